"""Publishing through the real client against a Hub on loopback: what arrives, what is refused, what failures leave."""

import contextlib
import gzip
import io
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import CommitInfo, ModelCard
from safetensors.torch import save
from transformers import AutoModelForCausalLM, AutoTokenizer

from smt_hf.data import byte_tokenizer
from smt_hf.errors import InputError
from smt_hf.publishing import hub as publishing
from smt_hf.publishing.export import export_student, write_card
from smt_hf.publishing.hub import check_folder
from smt_hf.publishing.model_card import license_of
from smt_hf.upload import check_files, check_hub_access
from tests.conftest import make_student
from tests.loopback_hub import TOKEN, Hub

ROOT = Path(__file__).parents[3]
ARM = {"bits_per_byte": 2.5, "accuracy": 0.5, "wall_clock_s": 1.0, "sequential_steps": 3, "tokens": 100}


def results_for(student):
    return {
        "arms": {"smt8": ARM},
        "student_arm": "smt8",
        "task": {"name": "text", "difficulty": 128, "chance": 8.0},
        "metric": "bits_per_byte",
        "data": {"name": "a text", "hash": "0", "training_tokens": 10, "heldout_tokens": 5, "heldout_streams": 1},
        "config": {"student": student.config.to_dict(), "teacher": None},
        "phases": [{"phase": "smt", "max_steps": 3}],
        "seed": 0,
        "commit": "0",
        "hardware": "CPU",
        "versions": {},
        "num_threads": 1,
        "world_size": 1,
    }


@pytest.fixture
def folder(tmp_path):
    student = make_student(vocab_size=258)
    export_student(student, byte_tokenizer(), tmp_path / "student")
    write_card(tmp_path / "student", student, results_for(student))
    return tmp_path / "student"


@pytest.fixture
def hub():
    with Hub() as running:
        yield running


def environment(hub, tmp_path, token=TOKEN):
    """Without HF_HUB_OFFLINE, which may be set outside: the Hub on loopback is not the network."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    own |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", **({"HF_TOKEN": token} if token else {})}
    return {**kept, **own, "PYTHONPATH": str(ROOT)}


def start(own_environment, cwd, *words):
    words = [sys.executable, *map(str, words)]
    return subprocess.run(words, env=own_environment, cwd=cwd, capture_output=True, text=True, timeout=300)


def publish(hub, folder, tmp_path, *words, repo="user/name", **token):
    words = [ROOT / "recipes" / "publish.py", "--checkpoint", folder, "--repo_id", repo, *words]
    return start(environment(hub, tmp_path, **token), ROOT, *words)


LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("user/name", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("user/name", trust_remote_code=True)
assert "smt_hf" not in sys.modules
inputs = tokenizer("from afar", return_tensors="pt")
print(model.generate(**inputs, max_new_tokens=6, do_sample=False).tolist())
"""


@pytest.mark.processes
def test_published_and_loaded_elsewhere(hub, folder, tmp_path):
    """One commit; a clean process that knows nothing of us downloads it and generates the same tokens."""
    listed = publish(hub, folder, tmp_path, "--dry_run")
    assert listed.returncode == 0 and "Nothing was sent" in listed.stdout, listed.stderr
    assert not hub.requests and "model.safetensors" in listed.stdout
    done = publish(hub, folder, tmp_path)
    assert done.returncode == 0 and f"{hub.endpoint}/user/name/commit/" in done.stdout, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    commits = hub.repos["user/name"]["main"]
    assert [commit["message"] for commit in commits] == ["initial commit", "Publish a student"]
    sent = {path: content for path, content in commits[-1]["files"].items() if path != ".gitattributes"}
    assert sent == {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.iterdir()}
    loaded = start(environment(hub, tmp_path, None), tmp_path, "-I", "-c", LOAD)
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    student, tokenizer = make_student(vocab_size=258), byte_tokenizer()
    student.generation_config.eos_token_id = 256
    ids = student.generate(**tokenizer("from afar", return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert loaded.stdout.strip().splitlines()[-1] == str(ids.tolist())


@pytest.mark.processes
def test_a_branch_and_an_update(hub, folder, tmp_path):
    """A branch leaves main alone; new weights take the place of old ones of another name in one commit."""
    assert publish(hub, folder, tmp_path).returncode == 0
    student = make_student(vocab_size=258, updater_type="mlp")
    student.save_pretrained(folder, max_shard_size="50KB")
    (folder / "model.safetensors").unlink()
    done = publish(hub, folder, tmp_path, "--revision", "v2", "--commit_message", "Shards")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in hub.head("user/name")["files"]
    files = hub.head("user/name", "v2")["files"]
    assert "model.safetensors" not in files and "model.safetensors.index.json" in files
    assert publish(hub, folder, tmp_path, "--revision", "v2").returncode == 0  # nothing changed


# What the Hub does -> whether it passes.
FAILURES = {
    "create busy": (("POST", "/api/repos/create", 503, 2), True),
    "too many requests": (("POST", "/preupload/", 429, 1), True),
    "batch unavailable": (("POST", "/objects/batch", 503, 2), True),
    "upload cut": (("PUT", "/lfs-upload/", "cut", 1), True),
    "upload unavailable": (("PUT", "/lfs-upload/", 503, 2), True),
    "commit unavailable": (("POST", "/commit/", 503, 1), True),
    "commit cut": (("POST", "/commit/", "cut", 1), True),
    "create cut": (("POST", "/api/repos/create", "cut", 1), True),
    "commit never": (("POST", "/commit/", 503, 99), False),
    "upload always cut": (("PUT", "/lfs-upload/", "cut", 99), False),
    "commit in conflict": (("POST", "/commit/", 409, 1), False),
    "no permission": (("POST", "/api/", 401, 99), False),
    "forbidden": (("POST", "/preupload/", 403, 99), False),
}
PUBLISH_ALL = """
import json, sys, time
from smt_hf.publishing.hub import publish
time.sleep = lambda seconds: None
folder, *endpoints = sys.argv[1:]
for endpoint in endpoints:
    try:
        publish(folder, "user/name", endpoint=endpoint)
        print("sent")
    except Exception as error:
        print(type(error).__name__, str(error).replace(chr(10), " "))
"""


@pytest.mark.processes
def test_failures(folder, tmp_path):
    """What passes is tried again; what stays leaves the repository as it was."""
    before = {"model.safetensors": b"old", "README.md": b"old"}
    with contextlib.ExitStack() as stack:
        hubs = {name: stack.enter_context(Hub()) for name in FAILURES}
        for name, hub in hubs.items():
            hub.repos["user/name"] = {}
            hub.commit("user/name", "main", "old", before)
            hub.fail(*FAILURES[name][0])
        own = environment(next(iter(hubs.values())), tmp_path)
        done = start(own, ROOT, "-c", PUBLISH_ALL, folder, *(hub.endpoint for hub in hubs.values()))
        assert done.returncode == 0, done.stderr
        outcomes = dict(zip(hubs, done.stdout.splitlines()))
        for name, (_, passes) in FAILURES.items():
            head, num_commits = hubs[name].head("user/name"), len(hubs[name].repos["user/name"]["main"])
            assert (outcomes[name] == "sent") == passes, (name, outcomes[name])
            assert num_commits == (2 if passes else 1), name
            if passes:
                assert hubs[name].failures[0][-1] == 0, name  # it did fail before
                assert head["files"]["model.safetensors"] == (folder / "model.safetensors").read_bytes()
            else:
                assert head["files"] == before, name
        assert "401" in outcomes["no permission"] and TOKEN not in done.stdout + done.stderr


class Runs:
    """Unpickling it would run a command."""

    def __reduce__(self):
        return print, ("ran",)


def pickled(protocol):
    return pickle.dumps(Runs(), protocol)


def zipped():
    torch.save({}, buffer := io.BytesIO())
    return buffer.getvalue()


def arrays():
    np.save(buffer := io.BytesIO(), np.zeros(2))
    return buffer.getvalue()


def replace(name, old, new):
    def spoil(folder):
        path = folder / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return spoil


def lose_a_shard(folder):
    make_student(vocab_size=258).save_pretrained(folder, max_shard_size="20KB")
    next(folder.glob("model-00002*")).unlink()


HUGGING_FACE = "hf_" + "aB3" * 12
# Files that are written into the folder -> part of the refusal.
REFUSED_FILES = {
    "training_args.bin": (zipped(), "training_args.bin is no part"),
    "MODEL.PT": (zipped(), "MODEL.PT is no part"),
    "notes.docx": ("x", "notes.docx is no part"),
    "notes": ("x", "notes is no part"),
    "model2.safetensors": (pickled(2), "model2.safetensors is no safetensors file"),
    "model3.safetensors": (zipped(), "model3.safetensors is no safetensors file"),
    "model4.safetensors": (b"", "model4.safetensors is no safetensors file"),
    "tokenizer.model": (pickled(4), "tokenizer.model is a pickle"),
    "spiece.model": (zipped(), "spiece.model is a pickle or an archive"),
    "old.txt": (pickled(0), "old.txt is a pickle"),
    "longer.txt": (pickled(0) + b"\nmore", "longer.txt is a pickle"),
    "first.py": (pickle.dumps({"a": 1}, 0), "first.py is a pickle"),
    "rows.txt": (arrays(), "rows.txt is a pickle"),
    "small.json": (gzip.compress(pickled(2)), "small.json is a pickle"),
    "merges.txt": (b"\xff\xfe\x00", "merges.txt is not text"),
    "extra.json": ("{", "extra.json is not valid JSON"),
    "log.jsonl": ("{}\n{", "log.jsonl is not valid JSON"),
    "curves.png": ("x", "curves.png is no PNG"),
    "both.png": (b"\x89PNG\r\n\x1a\n" + zipped(), "both.png is a pickle or an archive"),
    "notes.jsonl": (json.dumps({"token": HUGGING_FACE}), "notes.jsonl holds what looks like an access token"),
    "secret.md": (f"`{HUGGING_FACE}`", "secret.md holds"),
    "secret.json": (json.dumps({"text": f"login:\n{HUGGING_FACE}"}), "secret.json holds"),
    "secret.py": (f"KEY = 'sk-proj-{'Ab1' * 10}'", "secret.py holds"),
    "secret.jinja": ("AKIA" + "Z9" * 8, "secret.jinja holds"),
    "secret.txt": ("-----BEGIN OPENSSH PRIVATE KEY-----", "secret.txt holds"),
    "meta.safetensors": (save({"a": torch.zeros(1)}, {"by": HUGGING_FACE}), "meta.safetensors holds"),
    ".git/config.json": ("{}", ".git is hidden"),
    ".env": ("x", ".env is hidden"),
    "deep/.ssh/id.txt": ("x", "deep/.ssh is hidden"),
}
# How a folder is spoiled -> part of the refusal.
SPOILED = {
    "link to a file outside": (lambda f: (f / "a.txt").symlink_to(f.parent / "out.txt"), "a.txt is a symbolic link"),
    "link to a folder outside": (lambda f: (f / "a").symlink_to(f.parent), "a is a symbolic link"),
    "link to nothing": (lambda f: (f / "a.json").symlink_to("missing"), "a.json is a symbolic link"),
    "link to itself": (lambda f: (f / "a.json").symlink_to("a.json"), "a.json is a symbolic link"),
    "pipe": (lambda f: os.mkfifo(f / "a.txt"), "a.txt is no regular file"),
    "bad YAML": (lambda f: (f / "README.md").write_text("---\nlicense: [\n---\n"), "no valid metadata"),
    "a log line": (lambda f: (f / "eval_results.json").write_text('{"eval_loss": 1.0}'), "not that of a recipe"),
    "no card": (lambda f: (f / "README.md").unlink(), "README.md is missing"),
    "no tags": (replace("README.md", "tags:", "words:"), "no `tags`"),
    "other numbers": (replace("README.md", "value: 2.5", "value: 1.5"), "export again"),
    "no code": (lambda f: (f / "layers_smt_recurrent.py").unlink(), "layers_smt_recurrent.py is missing"),
    "code elsewhere": (replace("config.json", '": "modeling', '": "user/name--modeling'), "no `auto_map` that names"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "no shard": (lose_a_shard, "is named in model.safetensors.index.json and missing"),
}


def test_what_is_refused(folder, tmp_path):
    """By one listing: every file that is refused for itself, with its reason."""
    for name, (content, _) in REFUSED_FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as refusal:
        check_folder(folder)
    for name, (_, message) in REFUSED_FILES.items():
        assert f"- {message}" in str(refusal.value), name
    assert str(refusal.value).count("\n- ") == len(REFUSED_FILES)
    assert HUGGING_FACE not in str(refusal.value)
    with pytest.raises(InputError):
        check_files(folder)


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_spoiled(folder, tmp_path, name):
    (tmp_path / "out.txt").write_text("private")
    spoil, message = SPOILED[name]
    spoil(folder)
    with pytest.raises(InputError, match=re.escape(message)):
        publishing.publish(folder, "user/name", dry_run=True)


def test_what_is_not_refused(folder):
    known = check_folder(folder)
    (folder / "copy.md").symlink_to("README.md")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    (folder / "list.txt").write_text("1. one\n2. N.B. risk-free-of-any-secret-whatsoever\n")
    assert check_folder(folder).keys() - known == {"copy.md", "list.txt"}
    link = folder.with_name("link")
    link.symlink_to(folder)
    assert check_folder(link) == check_folder(folder)


def test_size_and_name(folder):
    with pytest.raises(InputError, match="max_shard_size"):
        check_folder(folder, largest_file=10_000)
    with pytest.raises(InputError, match="no folder"):
        check_folder(folder / "missing")
    for name in ("name", "a/b/c", "../b", "user/na me", ""):
        with pytest.raises(InputError, match="name"):
            publishing.publish(folder, name, dry_run=True)


def test_the_licence_is_the_publishers(folder, monkeypatch):
    """None is invented; the one that is given is in the card that is sent, and the folder stays as it is."""
    own = (folder / "README.md").read_bytes()
    assert b"license:" not in own and b"No licence was given" in own
    assert license_of(folder) is None and license_of(folder.parent) is None
    assert "names no licence" in str(publishing.publish(folder, "user/name", dry_run=True))
    sent = {}
    monkeypatch.setattr(publishing, "check_hub_access", lambda *_: None)
    monkeypatch.setattr(publishing, "upload", lambda *_, **settings: sent.update(settings) or CommitInfo)
    monkeypatch.setattr(CommitInfo, "commit_url", "URL", raising=False)
    assert "licence" not in str(publishing.publish(folder, "user/name", license="mit"))
    assert (folder / "README.md").read_bytes() == own
    (folder / "README.md").write_bytes(sent["contents"]["README.md"])
    assert license_of(folder) == "mit" and check_folder(folder)


def test_access_without_a_request(monkeypatch):
    monkeypatch.setattr("smt_hf.upload.is_offline_mode", lambda: True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        check_hub_access("user/name", TOKEN)
    monkeypatch.setattr("smt_hf.upload.is_offline_mode", lambda: False)
    monkeypatch.setattr("smt_hf.upload.get_token", lambda: None)
    with pytest.raises(InputError, match="hf auth login"):
        check_hub_access("user/name")
    with pytest.raises(InputError, match="named `user/name`"):
        check_hub_access("name", TOKEN)


# Repository, whether it must be private, what the account is, what the Hub does -> part of the refusal.
ACCESS = {
    "own": ("user/new", True, {}, None, None),
    "of an organisation": ("guild/new", None, {}, None, None),
    "fine-grained": ("user/new", None, {"role": "fineGrained", "fineGrained": {"scoped": [
        {"permissions": ["repo.content.read", "repo.write"]}]}}, None, None),
    "of another": ("other/new", None, {}, None, "user may not write to other's repositories"),
    "read-only": ("user/new", None, {"role": "read"}, None, "may only read"),
    "fine-grained for reading": ("user/new", None, {"role": "fineGrained", "fineGrained": {"scoped": [
        {"permissions": ["repo.content.read"]}]}}, None, "may only read"),
    "public": ("user/public", True, {}, None, "exists and is public"),
    "unknown token": ("user/new", None, {}, ("GET", "/api/whoami-v2", 401, 9), "refused the access token (401)"),
    "busy": ("user/new", None, {}, ("GET", "/api/whoami-v2", 503, 9), "cannot say who you are"),
    "cut": ("user/new", None, {}, ("GET", "/api/whoami-v2", "cut", 9), "cannot be reached"),
    "busy once": ("user/new", None, {}, ("GET", "/api/whoami-v2", 503, 1), None),
}  # fmt: skip
CHECK_ALL = """
import json, sys, time
from smt_hf.upload import check_hub_access
time.sleep = lambda seconds: None
for endpoint, repo, private in json.loads(sys.argv[1]):
    try:
        check_hub_access(repo, private=private, endpoint=endpoint)
        print("may write")
    except Exception as error:
        print(type(error).__name__, str(error).replace(chr(10), " "))
"""


@pytest.mark.processes
def test_access(tmp_path):
    """Found out by questions alone: nothing is created."""
    with contextlib.ExitStack() as stack:
        hubs = {name: stack.enter_context(Hub()) for name in ACCESS}
        asked = []
        for name, (repo, private, token, failure, _) in ACCESS.items():
            hubs[name].account["auth"] = {"accessToken": token}
            hubs[name].repos["user/public"] = {}
            hubs[name].commit("user/public", "main", "old", {"README.md": b"old"})
            if failure:
                hubs[name].fail(*failure)
            asked.append((hubs[name].endpoint, repo, private))
        own = environment(next(iter(hubs.values())), tmp_path)
        done = start(own, ROOT, "-c", CHECK_ALL, json.dumps(asked))
        assert done.returncode == 0, done.stderr
        for (name, hub), outcome in zip(hubs.items(), done.stdout.splitlines(), strict=True):
            expected = ACCESS[name][-1]
            assert (outcome == "may write") if expected is None else outcome.startswith("InputError"), (name, outcome)
            assert expected is None or expected in outcome, (name, outcome)
            assert hub.repos.keys() == {"user/public"} and {method for method, _ in hub.requests} == {"GET"}
        assert TOKEN not in done.stdout + done.stderr


SMALL = """
    --hidden_size 16 --num_attention_heads 2 --intermediate_size 32 --teacher_hidden_size 24
    --teacher_num_attention_heads 2 --per_device_train_batch_size 4 --context_length 32 --max_steps 4 --save_steps 2
    --num_threads 1 --disable_tqdm true
""".split()  # noqa: SIM905


@pytest.mark.processes
def test_a_run_that_pushes(hub, text_file, tmp_path):
    """Every save on the way, then the student with its card, as one history without pickles."""
    words = [ROOT / "recipes" / "pretrain.py", "--train_file", text_file, "--output_dir", "out"]
    words += ["--push_to_hub", "--hub_model_id", "user/name", "--hub_strategy", "all_checkpoints", *SMALL]
    words += ["--hub_always_push", "true"]
    done = start(environment(hub, tmp_path), tmp_path, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    commits = hub.repos["user/name"]["main"]
    messages = [commit["message"] for commit in commits]
    assert messages[-1] == "The student of smt8_bptt" and "Training in progress, step 2" in messages
    files = commits[-1]["files"]
    student = tmp_path / "out" / "student"
    assert {path.name: path.read_bytes() for path in student.iterdir()}.items() <= files.items()
    assert {"smt-checkpoint-2/model.safetensors", "bptt-checkpoint-2/model.safetensors"} <= files.keys()
    assert not [path for commit in commits for path in commit["files"] if path.endswith((".bin", ".pt", ".pth"))]
    assert TOKEN not in done.stdout + done.stderr and TOKEN.encode() not in b"".join(files.values())
    # What the Hub has lost, a finished run sends again.
    commits.pop()
    done = start(environment(hub, tmp_path), tmp_path, *words, "--resume_from_checkpoint")
    assert done.returncode == 0 and "finished already" in done.stdout, done.stderr[-3000:]
    assert commits[-1]["message"] == "The student of smt8_bptt" and commits[-1]["files"] == files


PUSH = """
from pathlib import Path
from smt_hf import BPTTTrainer, BPTTTrainingArguments
from smt_hf.data import byte_tokenizer
from tests.conftest import make_student
arguments = BPTTTrainingArguments(
    output_dir="run", use_cpu=True, max_steps=2, context_length=8, transition_steps=8, eval_strategy="steps",
    eval_steps=2, save_strategy="no", hub_model_id="user/name", disable_tqdm=True, logging_steps=1,
)
rows = [{"input_ids": list(range(n, n + 9))} for n in range(64)]
trainer = BPTTTrainer(
    make_student(vocab_size=258), arguments, train_dataset=rows, eval_dataset=rows, processing_class=byte_tokenizer()
)
trainer.train()
trainer.push_to_hub(license="apache-2.0", private=True)
Path("run/student/notes.jsonl").write_text('"hf_%s"' % ("aB3" * 12))
try:
    trainer.push_to_hub()
except ValueError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.processes
def test_a_trainer_that_pushes(hub, tmp_path):
    done = start(environment(hub, tmp_path), tmp_path, "-c", PUSH)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "InputError" in done.stdout and "notes.jsonl holds what looks like an access token" in done.stdout
    assert len(hub.repos["user/name"]["main"]) == 2 and hub.private == {"user/name"}
    (tmp_path / "read").mkdir()
    for name, content in hub.head("user/name")["files"].items():
        (tmp_path / "read" / name).write_bytes(content)
    card = ModelCard.load(tmp_path / "read" / "README.md")
    assert card.data.license == "apache-2.0" and "bptt" in card.data.tags
    assert json.loads((tmp_path / "read" / "eval_results.json").read_text())["eval_rollout"] > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "read")
    assert AutoTokenizer.from_pretrained(tmp_path / "read").eos_token_id == 256
    assert model(torch.tensor([[1, 2]])).logits.isfinite().all()


ELSEWHERE = """
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("user/name", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("user/name", trust_remote_code=True)
print("written: " + tokenizer.decode(model.generate(**tokenizer("2+2=", return_tensors="pt"), max_new_tokens=3)[0]))
"""


@pytest.mark.processes
def test_the_documented_way_from_a_checkpoint_to_the_hub(hub, folder, tmp_path):
    """The commands as they stand: generate, fine-tune, list, publish; then loaded elsewhere."""
    documents = [(ROOT / place).read_text() for place in ("README.md", "recipes/README.md")]
    blocks = re.findall(r"```bash\n(.*?)```", "".join(documents), flags=re.DOTALL)
    (commands,) = [block for block in blocks if "recipes/publish.py" in block]
    commands = commands.replace("\\\n", "").strip().splitlines()
    assert [re.search(r"recipes/(\w+)", command).group(1) for command in commands] == [
        "generate", "finetune", "publish", "publish",
    ]  # fmt: skip
    (tmp_path / "runs" / "pretrain").mkdir(parents=True)
    folder.rename(tmp_path / "runs" / "pretrain" / "student")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    rows = [{"prompt": f"{n % 5}+{n % 3}=", "completion": str(n % 5 + n % 3)} for n in range(40)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = environment(hub, tmp_path)
    own["PATH"] = f"{Path(sys.executable).parent}:{own['PATH']}"
    for command in commands:
        command = command.replace("USER/NAME", "user/name")
        command += " --max_steps 3 --num_threads 1" if "finetune" in command else ""
        done = subprocess.run(command, shell=True, env=own, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(hub.repos) == (command == commands[-1].replace("USER/NAME", "user/name"))
    done = start(environment(hub, tmp_path / "elsewhere", None), tmp_path / "runs", "-I", "-c", ELSEWHERE)
    assert done.returncode == 0 and "written: 2+2=" in done.stdout, done.stderr[-3000:]


@pytest.mark.processes
def test_a_public_repository_does_not_become_private_by_a_flag(hub, folder, tmp_path):
    hub.repos["user/name"] = {}
    hub.commit("user/name", "main", "old", {"README.md": b"old"})
    done = publish(hub, folder, tmp_path, "--private", "true")
    assert done.returncode != 0 and "exists and is public" in done.stderr
    assert len(hub.repos["user/name"]["main"]) == 1
    done = publish(hub, folder, tmp_path, "--private", "true", repo="user/new")
    assert done.returncode == 0 and hub.private == {"user/new"}, done.stderr[-2000:]
    assert len(hub.repos["user/new"]["main"]) == 2

"""Publishing through the real client against a Hub on loopback: what arrives, what is refused, what failures leave."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from smt_hf.data import byte_tokenizer
from smt_hf.publishing.export import export_student
from smt_hf.publishing.hub import check_folder
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
    export_student(student, byte_tokenizer(), tmp_path / "student", results_for(student))
    return tmp_path / "student"


@pytest.fixture
def hub():
    with Hub() as running:
        yield running


def environment(hub, tmp_path, token=TOKEN):
    """HF_HUB_OFFLINE may be set outside; the Hub on loopback is not the network."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    return {
        **kept,
        **own,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        **({"HF_TOKEN": token} if token else {}),
    }


def publish(hub, folder, tmp_path, *words, token=TOKEN, repo="user/name"):
    words = ["--checkpoint", folder, "--repo_id", repo, *words]
    return subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "publish.py"), *map(str, words)],
        env=environment(hub, tmp_path, token), cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


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
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD], env=environment(hub, tmp_path, None), cwd=tmp_path,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
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
        words = [sys.executable, "-c", PUBLISH_ALL, folder, *(hub.endpoint for hub in hubs.values())]
        done = subprocess.run(list(map(str, words)), env=own, cwd=ROOT, capture_output=True, text=True, timeout=300)
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


def spoiled(folder, name):
    if name == "bad YAML":
        (folder / "README.md").write_text("---\nlicense: [\n---\n")
        return "no valid metadata"
    if name == "a log line":
        (folder / "eval_results.json").write_text('{"eval_loss": 1.0}')
        return "not that of a recipe"
    if name == "pickle":
        torch.save({}, folder / "training_args.bin")
        return "training_args.bin may run code"
    if name == "stranger":
        (folder / "notes.docx").write_text("x")
        return "notes.docx is no part"
    if name == "token":
        (folder / "eval_results.json").write_text(
            json.dumps({**json.loads((folder / "eval_results.json").read_text()), "x": "hf_" + "a" * 34})
        )
        return "access token"
    if name == "no card":
        (folder / "README.md").unlink()
        return "README.md is missing"
    if name == "no licence":
        card = folder / "README.md"
        card.write_text(card.read_text().replace("license: apache-2.0\n", ""))
        return "no `license`"
    if name == "other numbers":
        card = folder / "README.md"
        card.write_text(card.read_text().replace("value: 2.5", "value: 1.5"))
        return "export again"
    if name == "no code":
        (folder / "layers_smt_recurrent.py").unlink()
        return "layers_smt_recurrent.py is missing"
    if name == "no weights":
        (folder / "model.safetensors").unlink()
        return "no weights"
    assert name == "no shard"
    make_student(vocab_size=258).save_pretrained(folder, max_shard_size="20KB")
    next(folder.glob("model-00002*")).unlink()
    return "is named in model.safetensors.index.json and missing"


@pytest.mark.parametrize(
    "name",
    [
        "bad YAML",
        "a log line",
        "pickle",
        "stranger",
        "token",
        "no card",
        "no licence",
        "other numbers",
        "no code",
        "no weights",
        "no shard",
    ],
)
def test_what_is_refused(folder, name):
    assert check_folder(folder)
    message = spoiled(folder, name)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_folder(folder)


def test_large_files_are_refused(folder):
    with pytest.raises(ValueError, match="max_shard_size"):
        check_folder(folder, largest_file=10_000)
    with pytest.raises(ValueError, match="no folder"):
        check_folder(folder / "missing")


SMALL = """
    --hidden_size 16 --num_attention_heads 2 --intermediate_size 32 --teacher_hidden_size 24
    --teacher_num_attention_heads 2 --per_device_train_batch_size 4 --context_length 32 --max_steps 4 --save_steps 2
    --num_threads 1 --disable_tqdm true
""".split()  # noqa: SIM905


@pytest.mark.processes
def test_a_run_that_pushes(hub, text_file, tmp_path):
    """Every save on the way, then the student with its card, as one history without pickles."""
    words = [sys.executable, str(ROOT / "recipes" / "pretrain.py"), "--train_file", text_file, "--output_dir", "out"]
    words += ["--push_to_hub", "--hub_model_id", "user/name", "--hub_strategy", "all_checkpoints", *SMALL]
    words += ["--hub_always_push", "true"]
    done = subprocess.run(
        list(map(str, words)), env=environment(hub, tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
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
    done = subprocess.run(
        [*map(str, words), "--resume_from_checkpoint"], env=environment(hub, tmp_path), cwd=tmp_path,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and "finished already" in done.stdout, done.stderr[-3000:]
    assert commits[-1]["message"] == "The student of smt8_bptt" and commits[-1]["files"] == files


PUSH = """
import sys
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
"""


@pytest.mark.processes
def test_a_trainer_that_pushes(hub, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PUSH], env={**environment(hub, tmp_path), "PYTHONPATH": str(ROOT)}, cwd=tmp_path,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
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
def test_the_readme_from_a_checkpoint_to_the_hub(hub, folder, tmp_path):
    """Its commands as they stand: generate, fine-tune, list, publish; then loaded elsewhere."""
    readme = (ROOT / "recipes" / "README.md").read_text()
    section = readme[readme.index("# From a checkpoint") :]
    commands = re.search(r"```bash\n(.*?)```", section, flags=re.DOTALL).group(1)
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
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], env=environment(hub, tmp_path / "elsewhere", None), cwd=tmp_path / "runs",
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
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

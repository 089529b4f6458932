"""The main job as a user runs it, on a small text: files, resumption, remote code, bad input."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from smt_hf.data import byte_tokenizer
from smt_hf.training.objective import part_of

ROOT = Path(__file__).parents[2]
SMALL = """
    --hidden_size 16 --num_attention_heads 2 --intermediate_size 32
    --teacher_hidden_size 24 --teacher_num_attention_heads 2
    --per_device_train_batch_size 4 --context_length 32 --max_steps 6 --save_steps 3 --logging_steps 2 --num_threads 1
""".split()  # noqa: SIM905


def run(*words, cwd, check=True):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, str(ROOT / "recipes" / "pretrain.py"), *map(str, words)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def error_of(done) -> str:
    """The one line that a user's error is, after checking that there is no other."""
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of all three phases and the rival."""
    folder = tmp_path_factory.mktemp("run")
    text = folder / "text.txt"
    text.write_text("".join(f"line {number}: the quick brown fox counts {number * 7}\n" for number in range(900)))
    words = ["--train_file", text, "--output_dir", "out", "--phases", "smt,dmt,bptt", "--compare_bptt", *SMALL]
    done = run(*words, cwd=folder)
    return folder, words, done


@pytest.mark.processes
def test_what_it_leaves(finished):
    folder, _, done = finished
    out = folder / "out"
    results = json.loads((out / "eval_results.json").read_text())
    assert results["student_arm"] == "smt8_dmt_bptt"
    students = {"smt8", "smt8_dmt", "smt8_dmt_bptt", "bptt_truncated"}
    assert set(results["arms"]) == students | {"teacher", "ngram1", "ngram2", "ngram3"}
    for arm in students:
        assert {"bits_per_byte", "accuracy", "wall_clock_s", "sequential_steps", "tokens"} <= set(results["arms"][arm])
        assert f"{results['arms'][arm]['bits_per_byte']:.3f}" in done.stdout
    arms = results["arms"]
    assert arms["smt8"]["tokens"] == 6 * 4 * 32 and arms["smt8_dmt_bptt"]["tokens"] > arms["smt8_dmt"]["tokens"]
    for key in ("task", "config", "seed", "commit", "hardware", "versions", "num_threads", "world_size"):
        assert key in results
    assert {path.name for path in folder.iterdir()} == {"out", "text.txt"}  # nothing beside the output folder
    assert results["distributed_type"] == "NO" and results["task"]["name"] == "text"
    student_files = {path.name for path in (out / "student").iterdir()}
    assert {
        "config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md",
        "eval_results.json", "modeling_smt_recurrent.py", "configuration_smt_recurrent.py", "cache_smt_recurrent.py",
        "layers_smt_recurrent.py",
    } <= student_files  # fmt: skip
    assert not {Path(name).suffix for name in student_files} & {".bin", ".pt", ".pkl"}
    assert {"model.safetensors", "config.json"} <= {path.name for path in (out / "teacher").iterdir()}
    assert [entry["phase"] for entry in results["drift"]] == ["smt", "dmt", "bptt"]
    assert ["by_age" in entry for entry in results["drift"]] == [True, True, False]
    assert "### Drift" in (out / "student" / "README.md").read_text()
    for picture in ("curves.png", "loss_by_position.png", "drift_by_age.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    for phase in ("smt", "dmt", "bptt"):
        history = json.loads((out / phase / "trainer_state.json").read_text())["log_history"]
        assert any("readout" in line for line in history) and any("eval_rollout" in line for line in history)
    assert "--- continuation ---" in done.stdout and "threads" in done.stdout


@pytest.mark.processes
def test_card_agrees_with_results(finished):
    folder, _, _ = finished
    results = json.loads((folder / "out" / "student" / "eval_results.json").read_text())
    card = ModelCard.load(folder / "out" / "student" / "README.md")
    (bits, accuracy) = card.data.eval_results
    arm = results["arms"][results["student_arm"]]
    assert bits.metric_value == pytest.approx(arm["bits_per_byte"], abs=1e-4)
    assert accuracy.metric_value == pytest.approx(arm["accuracy"], abs=1e-4)
    for name, scores in results["arms"].items():
        assert re.search(rf"\| {name}( \(this model\))? \| {scores['bits_per_byte']:.3f} \|", card.text)
    assert str(ROOT) not in card.content and "{{" not in card.content


@pytest.mark.processes
def test_finished_run_is_not_run_again(finished):
    folder, words, _ = finished
    before = (folder / "out" / "eval_results.json").read_text()
    done = run(*words, "--resume_from_checkpoint", cwd=folder)
    assert "finished already" in done.stdout and "compare" not in done.stderr and "smt8_dmt_bptt" in done.stdout
    assert (folder / "out" / "eval_results.json").read_text() == before
    for more, message in (
        ([], "--overwrite_output_dir"),
        (
            ["--resume_from_checkpoint", "--adam_beta1", "0.8", "--dmt_max_steps", "9", "--logging_steps", "1"],
            r"started with other arguments \(compare_bptt.adam_beta1: default then, 0.8 now, phases.0.adam_beta1: "
            r"default then, 0.8 now.*phases.1.max_steps: 6 then, 9 now",
        ),
    ):
        assert re.search(message, error_of(run(*words, *more, cwd=folder, check=False)))
    assert (folder / "out" / "eval_results.json").read_text() == before


@pytest.mark.processes
def test_resumed_run_equals_the_first(finished):
    """Cut off in the second phase, gone on: the student has the same weights as the uninterrupted run's."""
    folder, words, _ = finished
    out = folder / "out"
    whole = load_file(out / "student" / "model.safetensors")
    again = folder / "again"
    subprocess.run(["cp", "-r", str(out), str(again)], check=True)
    for name in ("eval_results.json", "curves.png", "dmt/scores.json", "dmt/trainer_state.json"):
        (again / name).unlink()
    for name in ("dmt/checkpoint-6", "bptt", "student", "compare_bptt"):
        subprocess.run(["rm", "-r", str(again / name)], check=True)
    (again / "dmt" / "checkpoint-9").mkdir()  # cut off while saving
    position = words.index("out")
    run(*words[:position], "again", *words[position + 1 :], "--resume_from_checkpoint", cwd=folder)
    resumed = load_file(again / "student" / "model.safetensors")
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.processes
def test_cut_off_after_the_last_step(finished):
    """A complete last checkpoint is the end of its phase: nothing is trained again, the scores are made anew."""
    folder, words, _ = finished
    late = folder / "late"
    subprocess.run(["cp", "-r", str(folder / "out"), str(late)], check=True)
    for name in ("eval_results.json", "bptt/scores.json", "bptt/trainer_state.json"):
        (late / name).unlink()
    for name in ("student", "compare_bptt"):
        subprocess.run(["rm", "-r", str(late / name)], check=True)
    words = [word if word != "out" else "late" for word in words if word != "--compare_bptt"]
    run(*words, "--resume_from_checkpoint", cwd=folder)
    assert {path.name for path in (late / "bptt").glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    results, first = (json.loads((folder / name / "eval_results.json").read_text()) for name in ("late", "out"))
    for arm in ("smt8", "smt8_dmt", "smt8_dmt_bptt"):
        assert results["arms"][arm]["bits_per_byte"] == pytest.approx(first["arms"][arm]["bits_per_byte"], rel=1e-5)
        for cost in ("wall_clock_s", "tokens", "sequential_steps"):
            assert results["arms"][arm][cost] == first["arms"][arm][cost]


def killed_when(condition, words, cwd):
    """Start the run and kill it, as the kernel would, as soon as `condition()` holds."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "recipes" / "pretrain.py"), *map(str, words)]
    with open(cwd / "killed.log", "a") as log:
        started = subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=log)
        try:
            while not condition():
                assert started.poll() is None, "it ended before it could be killed"
                time.sleep(0.002)
        finally:
            started.kill()
            started.wait()


@pytest.mark.processes
def test_killed_at_any_step(finished):
    """SIGKILL at a random step of each phase, while saving, and between phases: the same weights, the same log."""
    folder, words, _ = finished
    words = [word if word != "out" else "killed" for word in words if word != "--compare_bptt"]
    out, draw = folder / "killed", random.Random(os.environ.get("PYTEST_SEED", "0"))
    words += ["--save_steps", "1", "--save_total_limit", "2", "--logging_steps", "1"]
    first = [word if word != "killed" else "unkilled" for word in words]
    run(*first, cwd=folder)
    resumed = [*words, "--resume_from_checkpoint"]
    places = [
        lambda: (out / "smt" / f"checkpoint-{draw_1}").exists(),
        lambda: (out / "smt" / "checkpoint-6").exists(),  # between the phases
        lambda: (out / "dmt" / ".unfinished").exists() and (out / "dmt" / "checkpoint-2").exists(),  # while saving
        lambda: (out / "bptt" / f"checkpoint-{draw_2}").exists(),
    ]
    draw_1, draw_2 = draw.randint(1, 5), draw.randint(1, 5)
    killed_when(places[0], words, folder)
    for place in places[1:]:
        killed_when(place, resumed, folder)
    run(*resumed, cwd=folder)
    whole, again = (load_file(folder / name / "student" / "model.safetensors") for name in ("unkilled", "killed"))
    for name in whole:
        assert torch.equal(whole[name], again[name]), name
    for phase in ("smt", "dmt", "bptt"):
        logs = [
            [
                {key: value for key, value in line.items() if not re.search("seconds|runtime|per_second", key)}
                for line in json.loads((folder / name / phase / "trainer_state.json").read_text())["log_history"]
                if "train_loss" not in line  # the Trainer's last, of what it has trained since it was started
            ]
            for name in ("unkilled", "killed")
        ]
        assert logs[0] == logs[1]
        assert not (out / phase / ".unfinished").exists()


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal(finished, number):
    folder, words, _ = finished
    name = f"stopped_{number}"
    words = [word if word != "out" else name for word in words if word != "--compare_bptt"]
    words += ["--save_steps", "1000", "--bptt_max_steps", "400"]
    command = [sys.executable, str(ROOT / "recipes" / "pretrain.py"), *map(str, words)]
    started = subprocess.Popen(
        command, cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    while not (folder / name / "dmt" / "scores.json").exists():
        assert started.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)
    started.send_signal(number)
    stdout, stderr = started.communicate(timeout=60)
    assert started.returncode == 128 + number and "Traceback" not in stderr, stderr
    assert f"stopped by {number.name}" in stdout and "--resume_from_checkpoint" in stdout
    (checkpoint,) = (folder / name / "bptt").glob("checkpoint-*") if "bptt" in stdout else [None]
    assert checkpoint is None or (checkpoint / "contents.json").exists()


@pytest.mark.processes
def test_part_by_part(tmp_path, text_file):
    """The recipe of components: each phase moves its parts and leaves the others bit-equal."""
    words = ["--config", ROOT / "recipes" / "components.yaml", "--train_file", text_file, "--output_dir", "out"]
    run(*words, *SMALL, "--smt_max_steps", "3", "--dmt_max_steps", "3", "--save_steps", "3", cwd=tmp_path)
    states = {}
    for phase in ("smt", "smt_2", "dmt", "dmt_2"):
        (checkpoint,) = (tmp_path / "out" / phase).glob("checkpoint-3")
        states[phase] = load_file(checkpoint / "model.safetensors")
    for before, after, parts in (
        ("smt", "smt_2", {"updater"}),
        ("smt_2", "dmt", {"readout"}),
        ("dmt", "dmt_2", {"embeddings", "updater", "readout"}),
    ):
        names = [name for name in states[before] if not name.startswith("label_")]
        moved = {part_of(name) for name in names if not torch.equal(states[before][name], states[after][name])}
        assert moved == parts, after


@pytest.mark.processes
def test_a_stream_of_several_files(tmp_path):
    """No tokenised copy, packed by documents; a run that was killed reads on where it was."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(150):
        (texts / f"{number:03}.txt").write_text(
            "".join(f"{number} and {line} are {number + line}\n" for line in range(9))
        )
    words = ["--train_file", "texts", "--streaming", "--shuffle_buffer_size", "20", "--phases", "smt,bptt", *SMALL]
    words += ["--save_steps", "1"]
    run(*words, "--output_dir", "whole", cwd=tmp_path)
    results = json.loads((tmp_path / "whole" / "eval_results.json").read_text())
    assert results["data"]["streamed"] and "training_tokens" not in results["data"]
    assert "streamed" in (tmp_path / "whole" / "student" / "README.md").read_text()
    out = tmp_path / "cut"
    killed_when(lambda: (out / "smt" / "checkpoint-3").exists(), [*words, "--output_dir", "cut"], tmp_path)
    resumed = [*words, "--output_dir", "cut", "--resume_from_checkpoint"]
    refused = run(*resumed, "--shuffle_buffer_size", "7", cwd=tmp_path, check=False)
    assert "shuffle_buffer_size: 20 then, 7 now" in error_of(refused)
    killed_when(lambda: (out / "bptt" / "checkpoint-2").exists(), resumed, tmp_path)
    run(*resumed, cwd=tmp_path)
    whole, again = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("whole", "cut"))
    for name in whole:
        assert torch.equal(whole[name], again[name]), name


@pytest.mark.processes
def test_resume_from_a_named_checkpoint_and_refusals(finished, monkeypatch):
    folder, words, _ = finished
    named = folder / "named"
    subprocess.run(["cp", "-r", str(folder / "out"), str(named)], check=True)
    words = [word if word != "out" else "named" for word in words if word != "--compare_bptt"]
    for more, message in (
        (["--resume_from_checkpoint", "named/smt/checkpoint-5"], "is not a complete checkpoint"),
        (["--resume_from_checkpoint", "named/dmt/checkpoint-3", "--seed", "3"], "started with other arguments"),
        (
            ["--resume_from_checkpoint", "named/dmt/checkpoint-3", "--dmt_learning_rate", "1"],
            "started with other arguments",
        ),
    ):
        assert message in error_of(run(*words, *more, cwd=folder, check=False))
    assert (named / "eval_results.json").exists() and (
        named / "dmt" / "checkpoint-6"
    ).exists()  # refusals touch nothing
    before = load_file(named / "student" / "model.safetensors")
    # Weights that would show if the later checkpoint were not removed but taken for the end of its phase.
    weights = "checkpoint-6/model.safetensors"
    (named / "dmt" / weights).write_bytes((named / "smt" / weights).read_bytes())
    # Cut off while it trains what comes after the checkpoint: the run must not look finished.
    from smt_hf.experiments import pretrain, pretraining
    from smt_hf.experiments.run_arguments import parse_run

    def cut_off(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.chdir(folder)
    monkeypatch.setattr(pretraining, "run_phases", cut_off)
    parsed = parse_run([str(word) for word in (*words, "--resume_from_checkpoint", "named/dmt/checkpoint-3")])
    with pytest.raises(KeyboardInterrupt):
        pretrain(parsed)
    assert not (named / "eval_results.json").exists() and not (named / "compare_bptt").exists()
    done = run(*words, "--resume_from_checkpoint", "named/dmt/checkpoint-3", cwd=folder)
    assert "removed, since trained after it: dmt/checkpoint-6, bptt\n" in done.stdout
    after = load_file(named / "student" / "model.safetensors")
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.processes
def test_the_student_is_saved_before_anything_else(tmp_path, monkeypatch, text_file):
    """Yardsticks of a large corpus may take more memory than there is: what was trained is there by then."""
    from smt_hf.experiments import parse_run, pretrain
    from smt_hf.experiments.subjects import TextSubject

    def out_of_memory(subject):
        raise MemoryError

    monkeypatch.chdir(tmp_path)
    words = ["--train_file", str(text_file), "--output_dir", "out", "--phases", "smt", *SMALL, "--max_steps", "1"]
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(TextSubject, "ngram_bits", out_of_memory)
        pretrain(parse_run(words))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "student")
    assert (tmp_path / "out" / "teacher" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "eval_results.json").exists()
    results = pretrain(parse_run([*words, "--resume_from_checkpoint"]))
    assert "ngram3" in results["arms"] and (tmp_path / "out" / "student" / "README.md").exists()


CLEAN = """
import sys
sys.modules["smt_hf"] = None  # as if it had never been installed
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(["line 7", "the quick"], return_tensors="pt", padding=True, padding_side="left")
assert set(inputs) == {"input_ids", "attention_mask"}
tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
assert torch.equal(base(inputs["input_ids"]).last_hidden_state, model.model(inputs["input_ids"]).last_hidden_state)
model.save_pretrained(folder + "-again")
again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True)
assert torch.equal(again.generate(**inputs, max_new_tokens=8, do_sample=False), tokens)
assert config.model_type == "smt_recurrent" and "smt_hf" not in type(model).__module__
print("\\n" + str(tokens.tolist()))
"""


@pytest.mark.processes
def test_remote_code_in_a_clean_process(finished, tmp_path):
    folder, _, _ = finished
    student = folder / "out" / "student"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", CLEAN, str(student)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student), AutoTokenizer.from_pretrained(student)
    inputs = tokenizer(["line 7", "the quick"], return_tensors="pt", padding=True, padding_side="left")
    native = model.generate(**inputs, max_new_tokens=8, do_sample=False).tolist()
    assert done.stdout.strip().splitlines()[-1] == str(native)


BAD = {
    "unknown key": (["--max_stepz", "3"], "did you mean 'max_steps'"),
    "unknown phase": (["--phases", "smt,ppo"], "unknown phase 'ppo'"),
    "unknown updater": (["--updater_type", "lstm"], "updater_type"),
    "missing file": (["--train_file", "missing.txt"], "no file found"),
    "empty file": (["--train_file", "empty.txt"], "empty"),
    "binary file": (["--train_file", "binary.txt"], "not text"),
    "short text": (["--train_file", "short.txt"], "shorter than one training row"),
    "malformed YAML": (["--config", "bad.yaml"], "not valid YAML"),
    "an empty value": (["--train_file", ""], "`train_file` is empty"),
    "no tracker": (["--report_to", "abacus"], "abacus"),
    "a tracker that is not installed": (["--report_to", "swanlab"], "`report_to`"),
    "the Hub offline": (["--push_to_hub", "--hub_model_id", "a/b"], "nothing can be sent to a/b in offline mode"),
    "no repository": (["--push_to_hub"], "--hub_model_id user/name"),
    "batch size": (["--per_device_train_batch_size", "0"], "per_device_train_batch_size"),
    "accumulation": (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps"),
    "a negative rate": (["--learning_rate", "-1"], "learning_rate"),
    "no rate": (["--learning_rate", "nan"], "learning_rate"),
    "a negative seed": (["--seed", "-1"], "seed"),
    "no steps between evaluations": (["--eval_steps", "0"], "eval_steps"),
    "negative steps between checkpoints": (["--save_steps", "-3"], "save_steps"),
    "nothing held out": (["--num_heldout", "0"], "num_heldout"),
    "no width": (["--hidden_size", "0"], "hidden_size"),
    "a negative width": (["--hidden_size", "-8"], "hidden_size"),
    "below a file": (["--output_dir", "short.txt/out"], "short.txt is a file"),
    "evidence below a file": (["--evidence_file", "short.txt/lines.jsonl"], "evidence_file"),
    "data of a task": (["--task", "parity", "--difficulty", "8"], "leave train_file out"),
    "warm-up of the rival": (["--compare_bptt", "--warmup_steps", "3"], "bptt_warmup_steps"),
    "no memory tokens": (["--num_memory_tokens", "0"], "num_memory_tokens"),
    "heads": (["--num_attention_heads", "3"], "num_attention_heads"),
    "teacher heads": (["--teacher_num_attention_heads", "5"], "teacher"),
    "future": (["--future_length", "32"], "future_length"),
    "LoRA without dmt": (["--use_peft"], "smt,dmt"),
    "LoRA rank": (["--use_peft", "--lora_r", "0"], "rank"),
    "chunks": (["--smt_transition_steps", "5"], "transition_steps"),
    "vocabulary": (["--vocab_size", "100"], "vocab_size"),
    "occupied": (["--output_dir", "occupied"], "not empty"),
    "epochs": (["--num_train_epochs", "2"], "max_steps"),
    "no threads": (["--num_threads", "0"], "num_threads"),
    "no tokenizer": (["--tokenizer_name", "nowhere"], "no tokenizer could be loaded"),
    "value missing": (["--train_file"], "needs a value"),
    "scheduler": (["--lr_scheduler_type", "linear", "--lr_scheduler_kwargs", '{"min_lr_rate": 0.1}'], "do not fit"),
    "nothing to resume": (["--resume_from_checkpoint"], "no run to resume"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, tmp_path, monkeypatch, text_file):
    """An error that helps, before anything is written."""
    from smt_hf.errors import InputError
    from smt_hf.experiments import pretrain
    from smt_hf.experiments.run_arguments import parse_run

    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes([128, 255, 0]))
    (tmp_path / "short.txt").write_text("ten bytes.")
    (tmp_path / "bad.yaml").write_text("phases: [smt")
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.txt").write_text("dear")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    words, message = BAD[case]
    with pytest.raises(InputError, match=message):
        parsed = parse_run(["--train_file", str(text_file), "--output_dir", "out", *SMALL, *words])
        pretrain(parsed)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.processes
def test_bad_input_ends_the_process(tmp_path):
    """One line and status 2, of what is found while parsing and of what is found later."""
    for words, message in (
        (["--train_file", "missing.txt"], "no file found at 'missing.txt'"),
        (["--max_steps", "many"], "`--max_steps`: invalid int value: 'many'"),
        (["--num_memory_tokens", "0"], "num_memory_tokens"),
    ):
        assert message in error_of(run(*words, cwd=tmp_path, check=False))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_any_tokenizer_and_a_dataset(tmp_path):
    """A BPE tokenizer of words, a dataset by name, another column, evidence lines; bits are still per byte."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [f"sentence number {number} says that {number * 3} is three times {number}" for number in range(300)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<eos>"]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(
        tmp_path / "tokenizer"
    )
    (tmp_path / "corpus").mkdir()
    rows = "".join(json.dumps({"body": text}) + "\n" for text in texts)
    (tmp_path / "corpus" / "train.jsonl").write_text(rows)
    words = ["--dataset_name", "corpus", "--text_column", "body", "--tokenizer_name", "tokenizer"]
    words += ["--output_dir", "out", "--phases", "bptt", "--evidence_file", "evidence.jsonl", *SMALL]
    run(*words, cwd=tmp_path)
    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert results["student_arm"] == "bptt_truncated"
    assert set(results["arms"]) == {"bptt_truncated", "ngram1", "ngram2", "ngram3"}
    losses = results["arms"]["bptt_truncated"]["bits_per_byte"]
    assert 1.0 < losses < 7.0  # a token is several bytes here: bits a token would be near log2(120) = 6.9
    lines = [json.loads(line) for line in (tmp_path / "evidence.jsonl").read_text().splitlines()]
    assert [line["arm"] for line in lines] == list(results["arms"])
    assert {"task", "difficulty", "seed", "bits_per_byte", "n", "commit", "hardware"} <= set(lines[0])
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out" / "student")
    assert (
        loaded("sentence")["input_ids"] == AutoTokenizer.from_pretrained(tmp_path / "tokenizer")("sentence").input_ids
    )


@pytest.mark.processes
def test_a_language_model_is_read_once_for_all_seeds(tmp_path, text_file):
    """The first run fills the cache, the second one under another seed loads no model; checkpoints hold none."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    words = ["--teacher_model_name_or_path", "model", "--train_file", text_file, "--phases", "smt,dmt"]
    words += ["--teacher_cache_dir", "cache", "--distillation_weight", "1", "--distillation_top_k", "8"]
    words += ["--num_threads", "1", "--max_steps", "4", "--context_length", "32"]
    words += ["--hidden_size", "16", "--num_attention_heads", "2"]
    first = run(*words, "--output_dir", "first", cwd=tmp_path)
    assert first.stdout.count("teacher cache: ") == 4  # rows to train on and held-out ones, each in two folders
    assert "caching teacher: rows" in first.stderr
    files = sorted((tmp_path / "cache").rglob("*"))
    second = run(*words, "--output_dir", "second", "--seed", "1", cwd=tmp_path)
    assert "teacher cache: " not in second.stdout and "caching teacher" not in second.stderr
    assert sorted((tmp_path / "cache").rglob("*")) == files
    held = load_file(tmp_path / "second" / "dmt" / "checkpoint-4" / "model.safetensors")
    assert "teacher.memory_proj.weight" in held and not any(name.startswith("teacher.model.") for name in held)
    for folder in ("first", "second"):
        results = json.loads((tmp_path / folder / "eval_results.json").read_text())
        assert set(results["arms"]) == {"smt8", "smt8_dmt", "ngram1", "ngram2", "ngram3"}
        log = json.loads((tmp_path / folder / "dmt" / "trainer_state.json").read_text())["log_history"]
        assert any({"eval_distillation", "eval_drift_by_age"} <= line.keys() for line in log)
    resumed = run(*words, "--output_dir", "second", "--seed", "1", "--resume_from_checkpoint", cwd=tmp_path)
    assert "is finished already" in resumed.stdout


@pytest.mark.processes
def test_a_killed_cache_goes_on_where_it_stopped(tmp_path):
    """The second run reads the rows that the first had no time for, and no others."""
    (tmp_path / "text.txt").write_text("".join(f"line {number} counts {number * 7}\n" for number in range(6000)))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    words = ["--teacher_model_name_or_path", "model", "--train_file", "text.txt", "--phases", "smt,dmt"]
    words += ["--teacher_cache_dir", "cache", "--output_dir", "out", "--num_threads", "1", "--max_steps", "2"]
    words += ["--context_length", "32", "--hidden_size", "16", "--num_attention_heads", "2"]
    words += ["--per_device_eval_batch_size", "1"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "recipes" / "pretrain.py"), *words], cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def rows_there() -> list[np.ndarray]:
        return [np.load(path) for path in tmp_path.glob("cache/states-????????????????/filled.npy")]

    while not any(rows.sum() > 20 for rows in rows_there()):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    rows = rows_there()
    missing = sum(len(own) - int(own.sum()) for own in rows)
    assert len(rows) == 2 and 0 < missing < sum(map(len, rows)) - 20  # to train on and held-out ones
    done = run(*words, "--overwrite_output_dir", cwd=tmp_path)
    read = {int(number) for number in re.findall(r"caching teacher: rows: 100%[^\r\n]*\| \d+/(\d+)", done.stderr)}
    assert sum(read) == missing and all(own.all() for own in rows_there())


def test_recipes_parse():
    """Every YAML in recipes/ is accepted, and the table lists it."""
    from smt_hf.experiments.grid_file import parse_grid
    from smt_hf.experiments.run_arguments import parse_run

    table = (ROOT / "recipes" / "README.md").read_text()
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        if "\narms:" in path.read_text():
            has_model = "init_embeddings_from_teacher: true" in path.read_text()
            model = ["--teacher_model_name_or_path", "folder"] if has_model else []
            parsed = parse_grid(["--config", str(path), *model])
            assert parse_grid(["--config", str(path), "--report"]).report  # which needs no model
            assert parsed.runs and parsed.output == Path(f"runs/{path.stem}.jsonl")
        else:
            assert parse_run(["--config", str(path)]).phases
        assert path.name in table


def _without_teacher(words: list[str]) -> list[str]:
    pairs = zip(words[::2], words[1::2])
    return [word for pair in pairs if not pair[0].startswith("--teacher") for word in pair]


@pytest.mark.processes
def test_the_default_run_small(tmp_path):
    """Default updater, teacher, phases and optimiser. The student begins as its teacher, and loads without smt_hf."""
    (tmp_path / "text.txt").write_text("".join(f"line {n}: the quick brown fox counts {n * 7}\n" for n in range(900)))
    done = run("--train_file", "text.txt", "--output_dir", "out", *_without_teacher(SMALL), cwd=tmp_path)
    out = tmp_path / "out"
    results = json.loads((out / "eval_results.json").read_text())
    assert results["student_arm"] == "smt_dmt32" and {"teacher", "smt_dmt32"} <= set(results["arms"])
    config = json.loads((out / "student" / "config.json").read_text())
    assert config["updater_type"] == "fast_weight" and config["num_memory_tokens"] == 6
    assert (out / "student" / "fast_weight_smt_recurrent.py").exists()
    history = json.loads((out / "dmt" / "trainer_state.json").read_text())["log_history"]
    first = next(line for line in history if "dynamics" in line)
    assert first["dynamics"] < 0.02  # of the first two steps: 0 at birth
    check = (
        "from transformers import AutoModelForCausalLM; import torch, sys; sys.modules['smt_hf'] = None; model = "
        "AutoModelForCausalLM.from_pretrained('out/student', trust_remote_code=True); "
        "print(model(torch.arange(9)[None]).logits.shape)"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", check]
    loaded = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert "[1, 9, 258]" in loaded.stdout and "continuation" in done.stdout, loaded.stderr[-2000:]


TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CONVERTED = """
    --train_file text.txt --teacher_model_name_or_path llama --teacher_lora_r 2 --init_embeddings_from_teacher
    --hidden_size 16 --embedding_size 8 --num_attention_heads 2 --phases smt,bptt --compare_bptt
    --per_device_train_batch_size 4 --context_length 32 --max_steps 4 --save_steps 2 --num_threads 1
""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A run whose teacher is a Llama in bfloat16 with 264 embeddings, 258 bytes, a chat template and two ends."""
    folder = tmp_path_factory.mktemp("converted")
    lines = [f"line {number}: the quick brown fox counts {number * 7}\n" for number in range(300)]
    (folder / "text.txt").write_text("".join(lines))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=264, **sizes)).bfloat16()
    llama.generation_config.eos_token_id = [256, 10]
    llama.save_pretrained(folder / "llama")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "llama")
    return folder, run(*CONVERTED, "--output_dir", "out", cwd=folder)


@pytest.mark.processes
def test_a_language_model_is_converted(converted):
    folder, done = converted
    out = folder / "out"
    assert "(4,128 of them embeddings and head" in done.stdout  # 2 x 258 x 8
    results = json.loads((out / "eval_results.json").read_text())
    assert set(results["arms"]) >= {"smt8_bptt", "teacher", "bptt_truncated"}
    assert results["init_embeddings_from_teacher"] is True
    teacher = AutoModel.from_pretrained(out / "teacher")
    assert teacher.model.dtype == torch.bfloat16 and teacher.memory_proj.weight.dtype == torch.float32
    saved = load_file(out / "smt" / "checkpoint-4" / "model.safetensors")
    assert {weight.dtype for name, weight in saved.items() if name.startswith("student.")} == {torch.float32}
    trained = [name for name, weight in saved.items() if "lora_B" in name and weight.any()]
    assert trained and all(saved[name].dtype == torch.float32 for name in trained)


@pytest.mark.processes
def test_a_converted_model_chats(converted):
    """The exported student has the teacher's tokens, chat template and ends of a text."""
    folder, _ = converted
    tokenizer = AutoTokenizer.from_pretrained(folder / "out" / "student", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "out" / "student", trust_remote_code=True)
    assert model.config.vocab_size == len(tokenizer) == 258 and model.config.embedding_size == 8
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257)
    assert model.generation_config.eos_token_id == [256, 10]
    messages = [{"role": "user", "content": "hello"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    assert tokenizer.decode(inputs["input_ids"][0]) == "user: hello\nassistant: "
    written = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert written.shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.processes
def test_a_converted_model_is_resumed(converted):
    """Cut off in the first phase: the same weights. Without the flag that embeddings begin by, it is another run."""
    folder, _ = converted
    again = folder / "again"
    subprocess.run(["cp", "-r", str(folder / "out"), str(again)], check=True)
    for name in ("eval_results.json", "smt/scores.json", "smt/trainer_state.json"):
        (again / name).unlink()
    for name in ("smt/checkpoint-4", "bptt", "student", "teacher", "compare_bptt"):
        subprocess.run(["rm", "-r", str(again / name)], check=True)
    words = [word for word in CONVERTED if word != "--compare_bptt"]
    words += ["--output_dir", "again", "--resume_from_checkpoint"]
    others = [word for word in words if word != "--init_embeddings_from_teacher"]
    message = "started with other arguments.*init_embeddings_from_teacher: True then, default now"
    assert re.search(message, error_of(run(*others, cwd=folder, check=False)))
    run(*words, cwd=folder)
    for part in ("student", "teacher"):
        whole, resumed = (load_file(folder / name / part / "model.safetensors") for name in ("out", "again"))
        for name in whole:
            torch.testing.assert_close(resumed[name], whole[name], rtol=1e-5, atol=1e-6, msg=name)

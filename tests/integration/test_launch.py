"""Every launch configuration, as the README runs it: all phases, saved, resumed, exported; or a clear stop."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import smt_hf  # noqa: F401 - registers the model
from smt_hf.data import byte_tokenizer
from smt_hf.training.checkpoints import newest_checkpoint
from tests.integration.test_pretrain import SMALL
from tests.language_models import make_llama

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "accelerate"
TYPES = {
    "cpu": "MULTI_CPU",
    "ddp": "MULTI_CPU",
    "deepspeed_zero1": "DEEPSPEED",
    "deepspeed_zero2": "DEEPSPEED",
    "deepspeed_zero3": "DEEPSPEED",
}

pytestmark = pytest.mark.distributed


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def command(config, *words, launch=()):
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    return [*accelerate, *map(str, launch), str(ROOT / "recipes" / "pretrain.py"), *map(str, words)]


def started(config, *words, cwd, launch=(), **more):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), **more}
    launch = launch or ("--main_process_port", free_port())
    return subprocess.Popen(
        command(config, *words, launch=launch), cwd=cwd, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def launched(config, *words, cwd, check=True, **more):
    process = started(config, *words, cwd=cwd, **more)
    stdout, stderr = process.communicate(timeout=600)
    assert not check or process.returncode == 0, stderr[-4000:]
    return process.returncode, stdout, stderr


ENDS = """
import atexit, os, sys
import torch
from accelerate import PartialState
from smt_hf.recipe import run_to_end

class Finalised:
    def __del__(self, abort=os.abort):
        abort()  # as a thread of Gloo's may, when it lets go of a tensor so late

def main():
    wrapped = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    wrapped(torch.ones(1, 2)).sum().backward()
    sys.stdout.write("trained ")

PartialState(cpu=True)
atexit.register(lambda: print("tidied"))
kept = Finalised()
run_to_end(main)
"""


@pytest.mark.parametrize("num_processes", [2, 1])
def test_the_end_does_not_wait_for_the_interpreter(tmp_path, num_processes):
    """Output is written and exit handlers have run, but nothing is left to Python's shutdown beside live threads."""
    (tmp_path / "ends.py").write_text(ENDS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_processes),
         "--master_port", str(free_port()), "ends.py"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("trained") == done.stdout.count("tidied") == num_processes


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("".join(f"line {number}: the quick brown fox counts {number * 7}\n" for number in range(900)))
    own = [word if word != "6" else "4" for word in SMALL]
    return [
        "--train_file",
        text,
        "--phases",
        "smt,dmt,bptt",
        *own,
        "--save_steps",
        "2",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "99",
    ]


@pytest.fixture(scope="module")
def one_process(words, tmp_path_factory):
    """The same global batch in one process."""
    folder = tmp_path_factory.mktemp("one")
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "pretrain.py"), *map(str, words), "--output_dir", "out",
         "--per_device_train_batch_size", "8"],
        cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "out" / "student" / "model.safetensors")


@pytest.mark.parametrize("config", list(TYPES))
def test_a_pipeline(config, words, one_process, tmp_path):
    if config.startswith("deepspeed"):
        pytest.importorskip("deepspeed", reason='needs the extra: pip install -e ".[deepspeed]"')
    words = [*words, "--output_dir", "out"]
    launched(config, *words, cwd=tmp_path)
    out = tmp_path / "out"
    results = json.loads((out / "eval_results.json").read_text())
    assert (results["distributed_type"], results["world_size"]) == (TYPES[config], 2)
    student = load_file(out / "student" / "model.safetensors")
    for name, value in one_process.items():
        torch.testing.assert_close(student[name], value, rtol=1e-3, atol=1e-4, msg=name)
    if config in ("cpu", "deepspeed_zero1"):
        return
    # Cut off inside the last phase, and gone on.
    shutil.rmtree(out / "student")
    shutil.rmtree(out / "bptt" / "checkpoint-4")
    for path in (out / "eval_results.json", out / "bptt" / "scores.json", out / "bptt" / "trainer_state.json"):
        path.unlink()
    launched(config, *words, "--resume_from_checkpoint", cwd=tmp_path)
    again = AutoModelForCausalLM.from_pretrained(out / "student").state_dict()
    for name, value in student.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("config", ["ddp", "deepspeed_zero2"])
def test_a_language_model_is_cached_by_all_processes(config, words, tmp_path):
    """Both share out the rows, train from one cache without the model, and a second run finds it complete."""
    if config.startswith("deepspeed"):
        pytest.importorskip("deepspeed", reason='needs the extra: pip install -e ".[deepspeed]"')
    make_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    own = ["--teacher_model_name_or_path", "model", "--teacher_cache_dir", "cache", "--distillation_weight", "1"]
    own += ["--train_file", words[words.index("--train_file") + 1], "--phases", "smt,dmt", "--max_steps", "2"]
    own += ["--context_length", "32", "--hidden_size", "16", "--num_attention_heads", "2", "--num_threads", "1"]
    _, stdout, stderr = launched(config, *own, "--output_dir", "first", cwd=tmp_path)
    assert stdout.count("teacher cache: ") == 4 and "caching teacher: rows" in stderr
    files = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.npy")}
    assert all(np.load(path).all() for path in files if path.name == "filled.npy")
    _, stdout, stderr = launched(config, *own, "--output_dir", "second", "--seed", "1", cwd=tmp_path)
    assert "teacher cache: " not in stdout and "caching teacher" not in stderr
    assert {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.npy")} == files
    results = json.loads((tmp_path / "second" / "eval_results.json").read_text())
    assert (results["distributed_type"], results["world_size"]) == (TYPES[config], 2)
    held = load_file(tmp_path / "second" / "dmt" / "checkpoint-2" / "model.safetensors")
    assert "teacher.memory_proj.weight" in held and not any(name.startswith("teacher.model.") for name in held)


def test_fsdp_on_a_cpu_is_refused_before_the_cache_is_filled(words, tmp_path):
    make_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    own = ["--teacher_model_name_or_path", "model", "--teacher_cache_dir", "cache", "--output_dir", "out"]
    own += ["--train_file", words[words.index("--train_file") + 1], "--hidden_size", "16", "--num_attention_heads", "2"]
    code, _, stderr = launched("fsdp2", *own, "--phases", "smt,dmt", cwd=tmp_path, check=False)
    assert code != 0 and "the launch asked for FSDP, but this is MULTI_CPU with 2 process(es)" in stderr
    assert "caching teacher" not in stderr and not (tmp_path / "cache").exists()


def test_fsdp_on_a_cpu_says_so(words, tmp_path):
    code, _, stderr = launched("fsdp2", *words, "--output_dir", "out", cwd=tmp_path, check=False)
    assert code != 0 and "the launch asked for FSDP, but this is MULTI_CPU with 2 process(es)" in stderr


def test_a_conversion_is_launched_as_fsdp2_on_gpus():
    own, plain = (yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in ("fsdp2_conversion", "fsdp2"))
    assert own == {**plain, "num_processes": 8, "mixed_precision": "bf16", "use_cpu": False}


def test_two_machines(words, one_process, tmp_path):
    """Both on this one."""
    port = free_port()
    both = [
        started(
            "multi_node",
            *words,
            "--output_dir",
            "out",
            cwd=tmp_path,
            ACCELERATE_USE_CPU="true",
            launch=[
                "--machine_rank",
                rank,
                "--num_processes",
                2,
                "--main_process_ip",
                "127.0.0.1",
                "--main_process_port",
                port,
                "--mixed_precision",
                "no",
            ],
        )
        for rank in (0, 1)
    ]
    errors = [process.communicate(timeout=600)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    student = load_file(tmp_path / "out" / "student" / "model.safetensors")
    for name, value in one_process.items():
        torch.testing.assert_close(student[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--hidden_size", "15"], "must divide"),
        (["--max_steps", "many"], "`--max_steps`: invalid int value: 'many'"),
        (
            ["--global_batch_size", "7"],
            "`global_batch_size` (7) of the smt phase must be a multiple of 2: 2 process(es)",
        ),
    ],
)
def test_bad_input_is_one_line_of_all_ranks(more, message, words, tmp_path):
    """Nothing waits for the other, nothing has been written, and the launcher's own report ends with the sentence."""
    code, _, stderr = launched("ddp", *words, "--output_dir", "out", *more, cwd=tmp_path, check=False)
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code != 0 and message in line and "(exitcode: 2)" in stderr
    assert line.removeprefix("error: ") in stderr.splitlines()[-2]
    assert 'recipes/pretrain.py", line' not in stderr  # no traceback of ours
    assert not (tmp_path / "out").exists()


def test_a_contradiction_of_deepspeed_is_an_error_on_every_rank(words, tmp_path):
    pytest.importorskip("deepspeed", reason='needs the extra: pip install -e ".[deepspeed]"')
    settings = {"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 3, "gradient_clipping": "auto"}
    (tmp_path / "contradiction.json").write_text(json.dumps(settings))
    more = ["--deepspeed", "contradiction.json"]
    code, _, stderr = launched("ddp", *words, "--output_dir", "out", *more, cwd=tmp_path, check=False)
    assert code != 0 and "mismatch TrainingArguments values" in stderr
    assert not list((tmp_path / "out").rglob("checkpoint-*"))


@pytest.fixture
def training(words, tmp_path):
    """Two ranks that would train for long, after their first checkpoint: the launcher and the ranks."""
    process = started("ddp", *words, "--max_steps", "4000", "--output_dir", "out", cwd=tmp_path)
    while not list(tmp_path.glob("out/smt/checkpoint-*")):
        assert process.poll() is None
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    yield process, [child for child in children if "pretrain.py" in str(child.cmdline())]
    process.kill()


def test_a_rank_that_dies_ends_the_job(training):
    """The other one does not wait for it for ever."""
    process, ranks = training
    ranks[0].kill()
    process.communicate(timeout=120)
    assert process.returncode != 0


def test_a_signal_to_one_rank_ends_all_at_one_step(training, tmp_path):
    process, ranks = training
    ranks[-1].send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode != 0 and stdout.count("stopped by SIGTERM after saving") == 1, stderr
    newest = newest_checkpoint(tmp_path / "out" / "smt")
    assert newest is not None and str(Path(newest).relative_to(tmp_path)) in stdout

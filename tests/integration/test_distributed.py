"""One process == two == accumulation == every way of sharding, for every phase: weights, terms, carried memories.

accelerate cannot shard by FSDP on a CPU through its public switches; a switch in `train_phases.py` makes it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import VOCAB
from tests.language_models import make_llama
from tests.unit.training.test_trainers import TOLERANCES

ROOT = Path(__file__).parents[2]
KINDS = (
    "smt_teacher",
    "smt",
    "smt_ours",
    "smt_sparse",
    "dmt",
    "bptt",
    "bptt_full",
    "smt_adamw",
    "bptt_adamw",
    "smt_bf16",
    "smt_ragged",
    "bptt_full_ragged",
    "smt_teacher_fast",
    "smt_carried",
    "smt_fast",
    "dmt_fast",
    "bptt_fast",
    "smt_lora",
    "dmt_lora",
    "smt_distilled",
    "smt_distilled_documents",
    "dmt_distilled",
    "smt_cached",
    "dmt_cached",
)
# DeepSpeed takes weights of float32 alone.
HALF = ("smt_half", "dmt_half")
TYPES = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero1": "DEEPSPEED", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


def launch(folder, processes, batch, backend="ddp", accumulation=1, kinds=KINDS):
    folder.mkdir()
    make_llama(vocab_size=VOCAB).save_pretrained(folder / "model")  # for the kinds that are distilled
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    script = str(ROOT / "tests" / "integration" / "train_phases.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", script]
    words = [str(folder), str(batch), backend, str(accumulation), *kinds]
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed") / "one"
    return folder, launch(folder, 1, 8, kinds=(*KINDS, *HALF, "bptt_muon"))


def compare(one_process, folder, report, accumulation=1):
    expected_folder, expected = one_process
    for kind, found in report.items():
        costs = {"tokens", "sequential_steps"} if kind.endswith("_ragged") else set()  # they count the padding, too
        assert costs or found["tokens"] == expected[kind]["tokens"]
        first, second = (load_file(place / kind / "final" / "model.safetensors") for place in (expected_folder, folder))
        is_half = kind.endswith(("_bf16", "_half"))  # "_bf16": gradients are exchanged in it, too; weights are float32
        tolerance = {"rtol": 0, "atol": 2e-3} if is_half else TOLERANCES.get(kind, {"rtol": 1e-4, "atol": 2e-5})
        if kind.endswith("_cached"):  # what is kept is rounded to bfloat16, and the last bits depend on the batch
            tolerance = {"rtol": 1e-3, "atol": 2e-4}
        assert set(first) == set(second)
        for name in first:
            is_half_teacher = kind.endswith("_half") and name.startswith("teacher.model.") and "lora_" not in name
            assert second[name].dtype == first[name].dtype
            assert (first[name].dtype == torch.bfloat16) == is_half_teacher
            torch.testing.assert_close(first[name], second[name], msg=f"{kind} {name}", **tolerance)
        student = load_file(folder / kind / "final" / "student" / "model.safetensors")
        for name, value in student.items():
            torch.testing.assert_close(value, second[f"student.{name}"], rtol=0, atol=0)
        measured = {**expected[kind]["evaluation"]}
        if is_half and found["distributed_type"] == "DEEPSPEED":
            del measured["eval_lyapunov"]
        assert found["evaluation"].keys() == measured.keys() and "eval_rollout" in measured
        for name, value in measured.items():
            assert found["evaluation"][name] == pytest.approx(value, abs=1e-2 if is_half else 1e-3), (kind, name)
        assert len(found["log"]) == len(expected[kind]["log"]) > 0
        for own, theirs in zip(expected[kind]["log"], found["log"]):
            for name in set(own) - {"epoch", "learning_rate", "step", "grad_norm", "seconds", *costs}:
                # Micro-batches come one after the other.
                value = own[name] * accumulation if name == "sequential_steps" else own[name]
                assert value == pytest.approx(theirs[name], rel=2e-2 if is_half else 2e-3, abs=1e-5), (kind, name)


def check_shares(one, two):
    """Two processes have filled one cache: each has read a half of the rows, and nothing is left to the next phase."""
    whole, *shares = (
        json.loads((folder / f"read_smt_cached_{rank}.json").read_text())
        for folder, rank in ((one, 0), (two, 0), (two, 1))
    )
    assert len(whole) == 2 and all(map(sum, shares))  # rows to train on, and held-out ones
    for number, first, second in zip(whole, *shares):
        assert first + second == number and 0 <= first - second <= 1
    for rank in (0, 1):
        assert json.loads((two / f"read_dmt_cached_{rank}.json").read_text()) == []


@pytest.mark.distributed
@pytest.mark.parametrize("backend", list(TYPES))
def test_two_processes_equal_one(one_process, tmp_path, backend):
    if backend.startswith("zero"):
        pytest.importorskip("deepspeed", reason='needs the extra: pip install -e ".[deepspeed]"')
    kinds = (*KINDS, "bptt_muon") if backend == "ddp" else KINDS
    kinds += () if backend.startswith("zero") else HALF
    report = launch(tmp_path / "two", 2, 4, backend, kinds=kinds)
    for found in report.values():
        assert (found["world_size"], found["distributed_type"]) == (2, TYPES[backend])
        assert found["is_sharded"] == (backend != "ddp")
    compare(one_process, tmp_path / "two", report)
    places = [place / "bptt" / "checkpoint-4" for place in (one_process[0], tmp_path / "two")]
    check_shares(one_process[0], tmp_path / "two")
    states = [load_file(place / "rollout_state.safetensors")["memories"] for place in places]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)
    if backend != "ddp":  # whole optimiser states, by name
        for kind in ("smt_adamw", "bptt_adamw"):
            places = [place / kind / "checkpoint-4" for place in (one_process[0], tmp_path / "two")]
            first, second = (load_file(place / "student_optimizer.safetensors") for place in places)
            assert set(first) == set(second)
            for name in first:
                torch.testing.assert_close(first[name], second[name], msg=f"{kind} {name}", rtol=1e-3, atol=1e-6)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("backend", list(TYPES))
@pytest.mark.parametrize(("batch", "accumulation"), [(1, 4), (2, 2)])
def test_accumulation_equals_one_batch(one_process, tmp_path, backend, batch, accumulation):
    kinds = ("smt", "dmt", "bptt_full", "smt_adamw", "smt_ragged")
    report = launch(tmp_path / "cut", 2, batch, backend, accumulation, kinds)
    compare(one_process, tmp_path / "cut", report, accumulation)

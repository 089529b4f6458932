"""Two processes of four rows == one process of eight, for every phase: weights, terms, carried memories."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.unit.training.test_trainers import TOLERANCES

ROOT = Path(__file__).parents[2]
KINDS = ("smt_teacher", "smt", "dmt", "bptt", "bptt_full", "bptt_muon")


def launch(folder, processes, batch):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "tests" / "integration" / "train_phases.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", script]
    done = subprocess.run(
        [*command, str(folder), str(batch), *KINDS], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "report.json").read_text())


@pytest.mark.distributed
def test_two_processes_equal_one(tmp_path):
    reports = {}
    for processes, batch in ((1, 8), (2, 4)):
        folder = tmp_path / str(processes)
        folder.mkdir()
        reports[processes] = launch(folder, processes, batch)
    for kind in KINDS:
        one, two = reports[1][kind], reports[2][kind]
        assert (one["world_size"], two["world_size"]) == (1, 2) and two["distributed_type"] == "MULTI_CPU"
        assert one["tokens"] == two["tokens"]
        first, second = (load_file(tmp_path / number / f"{kind}.st") for number in ("1", "2"))
        tolerance = TOLERANCES.get(kind, {"rtol": 1e-4, "atol": 2e-5})
        for name in first:
            torch.testing.assert_close(first[name], second[name], msg=f"{kind} {name}", **tolerance)
        for own, theirs in zip(one["log"], two["log"]):
            for name in set(own) - {"epoch", "learning_rate", "step", "grad_norm", "seconds"}:
                assert own[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-5), (kind, name)
    states = [
        load_file(tmp_path / number / "bptt" / "checkpoint-4" / "rollout_state.safetensors")["memories"]
        for number in ("1", "2")
    ]
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-5)

"""The step alone: eager, compiled, exported."""

import pytest
import torch

from smt_hf import SMTRecurrentStep
from tests.conftest import VOCAB


def rolled(step, tokens, memory):
    logits = []
    for column in tokens.unbind(1):
        of_step, memory = step(column.clone(), memory)
        logits.append(of_step)
    return torch.stack(logits, 1), memory


@pytest.mark.parametrize("backend", ["none", "eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_steps_are_the_forward(student, tokens, backend):
    torch.compiler.reset()
    step = SMTRecurrentStep(student)
    run = step if backend == "none" else torch.compile(step, backend=backend, fullgraph=True)
    with torch.no_grad():
        logits, last = rolled(run, tokens, step.start(3))
        outputs = student(tokens, use_cache=True)
    torch.testing.assert_close(logits, outputs.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last, student.model.final_memory(tokens), atol=1e-5, rtol=1e-5)


def test_exported_step(student, tokens, tmp_path):
    """For any batch size, through a file."""
    step = SMTRecurrentStep(student)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(
        step, (tokens[:, 0].clone(), step.start(3).contiguous()), dynamic_shapes=({0: batch}, {0: batch})
    )
    torch.export.save(exported, tmp_path / "step.pt2")
    loaded = torch.export.load(tmp_path / "step.pt2").module()
    ids = torch.randint(1, VOCAB, (5, 6))
    logits, _ = rolled(loaded, ids, step.start(5).contiguous())
    torch.testing.assert_close(logits, student(ids).logits, atol=1e-5, rtol=1e-5)

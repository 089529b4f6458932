"""The cost model on paper against what the modules do at small sizes; and the table in the README of the recipes."""

from pathlib import Path

import pytest
import torch
from measurements.cost_model import (
    STRATEGIES,
    CostModelArguments,
    cost_lines,
    cost_table,
    saved_bytes,
    state_bytes,
    step_flops,
)
from torch.utils.flop_counter import FlopCounterMode

from smt_hf import SMTForPreTraining
from smt_hf.training import SMTPreTrainingConfig
from smt_hf.training.objective import Objective
from tests.conftest import UPDATERS, student_config, teacher_config

ROWS, LENGTH = 2, 24
WEIGHTS = {"readout": 1.0, "predictive": 1.0, "teacher": 1.0}
DECODED = {"num_predictive_positions": 3, "future_length": 4}
OBJECTIVES = {
    "smt": Objective("smt", 4, WEIGHTS, **DECODED),
    "own": Objective("smt", 4, WEIGHTS, **DECODED, on_policy_fraction=1.0, on_policy_mode="parallel"),
    "dmt": Objective("dmt", 4, {"readout": 1.0}, on_policy_fraction=1.0, on_policy_mode="sequential"),
    "bptt": Objective("bptt", LENGTH, {"readout": 1.0}),
}


def composite(updater_type, window=64):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_memory_tokens": 3, "num_readout_layers": 2, "num_hidden_layers": 2}
    student = student_config(updater_type=updater_type, **sizes)
    teacher = teacher_config(hidden_size=48, memory_size=32, sliding_window=window)
    return SMTForPreTraining(SMTPreTrainingConfig(student=student, teacher=teacher)).train()


@pytest.mark.parametrize("phase", list(OBJECTIVES))
@pytest.mark.parametrize("updater_type", UPDATERS)
def test_flops(phase, updater_type):
    model, objective = composite(updater_type), OBJECTIVES[phase]
    model.freeze_for(objective.phase, objective=objective)
    tokens = torch.randint(1, model.config.student.vocab_size, (ROWS, LENGTH + 1))
    with FlopCounterMode(display=False) as counter:
        model(tokens, objective).loss.backward()
    expected = ROWS * step_flops(model.config.student, model.config.teacher, objective, LENGTH)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.05)


def test_flops_of_a_window_shorter_than_the_row():
    model, objective = composite("mlp", window=6), OBJECTIVES["smt"]
    tokens = torch.randint(1, model.config.student.vocab_size, (ROWS, LENGTH + 1))
    with FlopCounterMode(display=False) as counter:
        model(tokens, objective).loss.backward()
    expected = ROWS * step_flops(model.config.student, model.config.teacher, objective, LENGTH)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("updater_type", UPDATERS)
def test_saved_bytes(updater_type):
    """Tensors that the student keeps for its backward pass, each storage once, weights left out."""
    model, objective = composite(updater_type), OBJECTIVES["bptt"]
    tokens = torch.randint(1, model.config.student.vocab_size, (ROWS, LENGTH + 1))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens, objective).loss
    assert loss.requires_grad
    measured = sum(size for size, _ in kept.values())
    assert measured == pytest.approx(ROWS * saved_bytes(model.config.student, LENGTH), rel=0.25)


def test_states():
    model = composite("transformer")
    number = sum(parameter.numel() for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(1, model.config.student.vocab_size, (ROWS, LENGTH + 1))
    model(tokens, OBJECTIVES["smt"]).loss.backward()
    optimizer.step()
    tensors = [tensor for parameter in model.parameters() for tensor in (parameter, parameter.grad)]
    tensors += [own[name] for own in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    measured = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert measured == state_bytes(number, "ddp", 8) == state_bytes(number, "zero3 / fsdp2", 1)
    assert (
        state_bytes(number, "zero1", 2) == 0.75 * measured and state_bytes(number, "zero3 / fsdp2", 8) == measured / 8
    )


def test_the_table_is_the_readmes():
    lines = cost_lines(CostModelArguments())
    for line in lines:
        states = [line[f"{strategy} states GB"] for strategy in STRATEGIES]
        assert states == sorted(states, reverse=True)
    assert cost_table(lines) in (Path(__file__).parents[2] / "recipes" / "README.md").read_text()

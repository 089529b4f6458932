"""The cost model on paper against what the modules do at small sizes; and the tables in the README of the recipes."""

from pathlib import Path

import pytest
import torch
from measurements import conversion_cost
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
from transformers import AutoModelForCausalLM, LlamaConfig

from smt_hf import SMTForPreTraining
from smt_hf.teachers.loading import hidden_states
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


CONVERSION = Objective("smt", 4, {"readout": 1.0, "predictive": 1.0}, **DECODED)


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


def converted(**fields):
    """A composite whose teacher is a Llama in bfloat16, and whose student has narrow embeddings."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    llama = LlamaConfig(vocab_size=300, num_key_value_heads=2, **sizes)
    teacher = {"model_type": "smt_pretrained_teacher", "base_config": {**llama.to_dict(), "dtype": "bfloat16"}}
    student = {"hidden_size": 32, "embedding_size": 8, "num_memory_tokens": 3, "num_readout_layers": 2, **fields}
    model = SMTForPreTraining(SMTPreTrainingConfig(student=student_config(**student, vocab_size=290), teacher=teacher))
    model.teacher.model.set_attn_implementation("eager")  # the other kernel's products are not counted
    return model.train()


@pytest.mark.parametrize("phase", ["smt", "dmt"])
@pytest.mark.parametrize("updater_type", UPDATERS)
def test_flops_of_a_conversion(phase, updater_type):
    model, objective = converted(updater_type=updater_type), {**OBJECTIVES, "smt": CONVERSION}[phase]
    model.freeze_for(phase, objective=objective)
    tokens = torch.randint(1, 290, (ROWS, LENGTH + 1))
    with FlopCounterMode(display=False) as counter:
        model(tokens, objective).loss.backward()
    expected = ROWS * step_flops(model.config.student, model.config.teacher, objective, LENGTH)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("tied", [False, True])
def test_states_of_a_conversion(tied):
    """Counted without data as with it, and in bytes what a step under AdamW holds."""
    model = converted(tie_word_embeddings=tied)
    parameters = conversion_cost.counted(model.config)
    model.freeze_for("smt")
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert parameters.trained == sum(map(torch.numel, trained))
    assert parameters.frozen == sum(map(torch.numel, model.teacher.model.parameters()))
    assert parameters.student == sum(map(torch.numel, model.student.parameters()))
    assert parameters.tables == (1 if tied else 2) * 290 * 8 + 2 * 32 * 8
    optimizer = torch.optim.AdamW(trained)
    model(torch.randint(1, 290, (ROWS, LENGTH + 1)), CONVERSION).loss.backward()
    optimizer.step()
    tensors = [*model.parameters(), *(weight.grad for weight in trained)]
    tensors += [own[name] for own in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    measured = sum(tensor.nbytes for tensor in tensors)
    assert measured == conversion_cost.state_bytes(parameters, "ddp", 8)
    assert conversion_cost.state_bytes(parameters, "fsdp2", 8) == measured / 8
    as_float = measured + 2 * parameters.frozen  # under DeepSpeed
    assert conversion_cost.state_bytes(parameters, "zero2", 1) == as_float
    assert conversion_cost.state_bytes(parameters, "zero3", 4) == as_float / 4


def test_bytes_of_hidden_states():
    """All that the model returns for a token; and what is cached of it."""
    model = converted()
    tokens = torch.randint(290, (ROWS, LENGTH))
    states = hidden_states(model.teacher.model, tokens)
    measured = sum(state.nbytes for state in states) / tokens.numel()
    assert measured == conversion_cost.hidden_state_bytes(model.config.teacher.base)
    kept = [states[number].half() for number in model.config.teacher.layers]
    logits = torch.randn(*tokens.shape, 290).topk(5)
    cached = [sum(state.nbytes for state in kept), logits.values.half().nbytes + logits.indices.int().nbytes]
    assert conversion_cost.cache_bytes(model.config.teacher, 5) == tuple(size / tokens.numel() for size in cached)


def test_language_models_have_the_sizes_that_their_names_say():
    for name, fields in conversion_cost.TEACHERS.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**fields))
        millions = float(name[:-1]) * (1000 if name.endswith("B") else 1)
        assert sum(map(torch.numel, model.parameters())) / 1e6 == pytest.approx(millions, rel=0.01)


def test_the_table_of_conversions_is_the_readmes():
    lines = conversion_cost.conversion_lines(CostModelArguments())
    for line in lines:
        assert line["fsdp2 tokens"] > line["ddp tokens"]
        assert line["table_parameters"] < line["table_parameters_as_wide"]
    table = conversion_cost.conversion_table(lines)
    assert table in (Path(__file__).parents[2] / "recipes" / "README.md").read_text()


def test_the_table_is_the_readmes():
    lines = cost_lines(CostModelArguments())
    for line in lines:
        states = [line[f"{strategy} states GB"] for strategy in STRATEGIES]
        assert states == sorted(states, reverse=True)
    assert cost_table(lines) in (Path(__file__).parents[2] / "recipes" / "README.md").read_text()

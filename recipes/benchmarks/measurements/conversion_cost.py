"""What it costs on paper to convert language models of 135M to 8B parameters into students of 10M to 1B.

The teacher is frozen and runs forward alone. Its weights are bfloat16; what is trained, the student and the linear map
from hidden states to memories, is float32 with gradients and two moments of AdamW. Parameters are counted on models
without data (torch's meta device). What depends on the batch is per token: the student's saved numbers (float32, no
activation checkpointing), or the teacher's hidden states of all layers and its widest layer, whichever is more, since
the labels are there before the student begins.

DeepSpeed takes weights of float32 alone, so that the teacher has 4 bytes per parameter under ZeRO-2 and ZeRO-3.
"""

from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig

from smt_hf import SMTForPreTraining
from smt_hf.student import SMTRecurrentConfig
from smt_hf.teachers import SMTPretrainedTeacherConfig
from smt_hf.training import SMTPreTrainingConfig
from smt_hf.training.objective import Objective

from .cost_model import FLOAT, SIZES, CostModelArguments, saved_bytes, step_flops, trunk_flops

HALF = 2  # bytes
# Sizes of language models of that many parameters, as in SmolLM2 (the first two) and Llama 3.1.
_SMALL = {"vocab_size": 49_152, "tie_word_embeddings": True}
TEACHERS: dict[str, dict[str, Any]] = {
    "135M": _SMALL
    | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    | {"num_attention_heads": 9, "num_key_value_heads": 3},
    "1.7B": _SMALL
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
    | {"num_attention_heads": 32, "num_key_value_heads": 32},
    "8B": {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8},
}
STUDENTS = ("10M", "100M", "1B")
# Least split first.
STRATEGIES = ("ddp", "zero2", "fsdp2", "zero3")


class Parameters(NamedTuple):
    """Numbers of parameters of a composite."""

    frozen: int  # of the language model, without its head
    trained: int  # the student, and the map from hidden states to memories
    student: int
    tables: int  # of the student: embeddings, head, and the maps to its width


def counted(config: SMTPreTrainingConfig) -> Parameters:
    """Parameters of the composite in the smt phase."""
    with torch.device("meta"):
        model = SMTForPreTraining(config)
    model.freeze_for("smt")
    student = model.student
    parts = (student.get_input_embeddings(), student.model.embed_proj, student.head_proj, student.lm_head)
    tables = {weight for part in parts for weight in part.parameters()}  # a tied one once
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    total = sum(weight.numel() for weight in student.parameters())
    frozen = sum(weight.numel() for weight in model.parameters() if not weight.requires_grad)
    return Parameters(frozen, trained, total, sum(table.numel() for table in tables))


def state_bytes(parameters: Parameters, strategy: str, gpus: int) -> float:
    """Weights, gradients and moments on one GPU."""
    frozen, trained = parameters.frozen, parameters.trained
    if strategy == "ddp":
        return HALF * frozen + 4 * FLOAT * trained
    if strategy == "fsdp2":
        return (HALF * frozen + 4 * FLOAT * trained) / gpus
    if strategy == "zero2":
        return FLOAT * (frozen + trained) + 3 * FLOAT * trained / gpus
    return (FLOAT * frozen + 4 * FLOAT * trained) / gpus


def hidden_state_bytes(base: LlamaConfig) -> int:
    """Of one token: the states after the embeddings and after every layer, which transformers returns together."""
    return HALF * (base.num_hidden_layers + 1) * base.hidden_size


def token_bytes(student: SMTRecurrentConfig, teacher: SMTPretrainedTeacherConfig, length: int) -> float:
    """What a token of a row needs at most at one time, besides the states."""
    base: Any = teacher.base
    widest = HALF * (3 * base.intermediate_size + 4 * base.hidden_size)
    assert isinstance(teacher.layers, list)
    # The map keeps its input, and the norms theirs; then the label itself.
    label = FLOAT * (2 * len(teacher.layers) * base.hidden_size + teacher.num_memory_tokens * teacher.memory_size)
    return max(hidden_state_bytes(base) + widest, saved_bytes(student, length) / length + label)


def cache_bytes(teacher: SMTPretrainedTeacherConfig, top_k: int) -> tuple[int, int]:
    """Of one token on the disk: the hidden states that memories are made of in half precision, and the `top_k` highest
    logits, each 2 bytes and a number of 4."""
    assert isinstance(teacher.layers, list)
    return HALF * len(teacher.layers) * teacher.base.hidden_size, (HALF + 4) * top_k


def composite_of(arguments: CostModelArguments, teacher: str, student: str, embedding_size: int | None):
    """The configuration of a conversion. `embedding_size`: of the student; `None`: its width."""
    width, layers, readout_layers, heads = SIZES[student]
    sizes = {
        **{"vocab_size": TEACHERS[teacher]["vocab_size"], "hidden_size": width, "num_hidden_layers": layers},
        **{"num_attention_heads": heads, "num_memory_tokens": arguments.memory_tokens},
        **{"num_readout_layers": readout_layers, "embedding_size": embedding_size},
    }
    base = {**LlamaConfig(**TEACHERS[teacher]).to_dict(), "dtype": "bfloat16"}
    fields = {"model_type": SMTPretrainedTeacherConfig.model_type, "base_config": base}
    return SMTPreTrainingConfig(student=sizes, teacher=fields)


def conversion_lines(arguments: CostModelArguments) -> list[dict]:
    """One line per teacher and student."""
    arguments.at_least_1("gpu_gb", "embedding_size", "cached_logits")
    return [_line_of(arguments, teacher, student) for teacher in TEACHERS for student in STUDENTS]


def _line_of(arguments: CostModelArguments, teacher: str, student: str) -> dict:
    config = composite_of(arguments, teacher, student, arguments.embedding_size)
    parameters = counted(config)
    as_wide = counted(composite_of(arguments, teacher, student, None))
    length = arguments.context_length
    weights = {"readout": 1.0, "predictive": 1.0}
    own: dict[str, Any] = {"on_policy_fraction": 0.5, "on_policy_mode": "parallel"}
    smt = Objective("smt", arguments.transition_steps, weights, num_predictive_positions=8, future_length=8, **own)
    forward = trunk_flops(config.teacher, length)
    per_token = token_bytes(config.student, config.teacher, length)
    states, logits = cache_bytes(config.teacher, arguments.cached_logits)
    line: dict[str, Any] = {
        **{"teacher": teacher, "student": student, "teacher_parameters": parameters.frozen},
        **{"student_parameters": parameters.student, "table_parameters": parameters.tables},
        **{"table_parameters_as_wide": as_wide.tables, "map_parameters": parameters.trained - parameters.student},
        "teacher_gflops_per_token": forward / length / 1e9,
        "student_gflops_per_token": (step_flops(config.student, config.teacher, smt, length, True) - forward)
        / length
        / 1e9,
        **{"token_mb": per_token / 1e6, "cached_states_gb": states / 1e3, "cached_logits_gb": logits / 1e3},
    }
    for strategy in STRATEGIES:
        held = state_bytes(parameters, strategy, arguments.gpus)
        line[f"{strategy} states GB"] = held / 1e9
        line[f"{strategy} tokens"] = max(int((1e9 * arguments.gpu_gb - held) / per_token), 0)
    line["strategy"] = next((name for name in STRATEGIES if line[f"{name} tokens"] >= length), None)
    return line


def conversion_table(lines: list[dict]) -> str:
    """The lines as Markdown."""

    def number(value: float) -> str:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    rows = [
        "| teacher, student | parameters, M: student, its tables, tables as wide as the student, map "
        "| GFLOPs per token: teacher, student | states, GB: DDP, ZeRO-2, FSDP2, ZeRO-3 | MB per token "
        "| tokens that fit: DDP, FSDP2 | a row fits under | cache, GB per million tokens: states, logits |",
        "|---" * 8 + "|",
    ]
    for line in lines:
        keys = ("student_parameters", "table_parameters", "table_parameters_as_wide", "map_parameters")
        cells = [
            f"{line['teacher']}, {line['student']}",
            ", ".join(number(line[key] / 1e6) for key in keys),
            ", ".join(number(line[f"{part}_gflops_per_token"]) for part in ("teacher", "student")),
            ", ".join(number(line[f"{strategy} states GB"]) for strategy in STRATEGIES),
            number(line["token_mb"]),
            ", ".join(f"{line[f'{strategy} tokens']:,}" for strategy in ("ddp", "fsdp2")),
            line["strategy"] or "none",
            ", ".join(number(line[f"cached_{part}_gb"]) for part in ("states", "logits")),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)

"""What a step costs on paper: FLOPs, memory and communication, for sizes that no machine at hand holds.

FLOPs are those of matrix products, two per multiply-add, as `torch.utils.flop_counter` counts them; norms, activations
and softmax are left out. Memory is what a GPU holds between steps (weights, gradients, two moments of AdamW, all
float32) and what a step saves for its backward pass. Communication is what a GPU sends in a step over a ring, float32.
What an updater computes and keeps is known to its class. The counts of FLOPs and of memory are checked against measured
ones at small sizes
(`tests/integration/test_cost_model.py`).

Symbols: B rows, T transitions per row, K memory tokens, D width, E width of the embeddings, k `transition_steps`,
N GPUs.
"""

from dataclasses import dataclass
from typing import Any

from smt_hf.command_line import argument
from smt_hf.student import SMTRecurrentConfig
from smt_hf.student.layers_smt_recurrent import UPDATERS, SMTRecurrentBlock
from smt_hf.teachers import SMTPretrainedTeacherConfig, SMTTeacherConfig
from smt_hf.training.objective import Objective

from .arguments import BenchmarkArguments

FLOAT = 4  # bytes
# Width, updater layers, readout layers, heads; the teacher has the updater's width and layers.
SIZES = {
    "10M": (256, 8, 4, 8),
    "100M": (768, 8, 4, 12),
    "1B": (2048, 12, 4, 16),
    "7B": (4096, 24, 8, 32),
}
STRATEGIES = ("ddp", "zero1", "zero2", "zero3 / fsdp2")


@dataclass
class CostModelArguments(BenchmarkArguments):
    """The training that is costed, at each of the sizes."""

    gpus: int = argument(8, "GPUs that share the states.")
    rows_per_gpu: int = argument(8, "Rows per step on each of them.")
    context_length: int = argument(2048, "Transitions per row.")
    transition_steps: int = argument(8, "Transitions that a gradient crosses.")
    memory_tokens: int = argument(16, "Memory tokens of every size. Paper: 16.")
    vocabulary: int = argument(32_000, "Tokens of every size.")
    window: int = argument(512, "Tokens that the teacher's attention sees.")
    gpu_gb: int = argument(80, "Memory of a GPU that a language model is converted on.")
    embedding_size: int = argument(128, "`embedding_size` of the students of language models.")
    cached_logits: int = argument(64, "Logits per token in a cache of what a language model predicts.")


def projection_flops(config: SMTRecurrentConfig) -> float:
    """Forward of the map between the width of the embeddings and that of the model, if they differ."""
    width = config.embedding_size or config.hidden_size
    return 0 if width == config.hidden_size else 2 * width * config.hidden_size


def updater_flops(config: SMTRecurrentConfig) -> float:
    """Forward of one transition, its token embedded."""
    return 2 * UPDATERS[config.updater_type].multiply_adds(config) + projection_flops(config)


def readout_flops(config: SMTRecurrentConfig, future: int = 1) -> float:
    """Forward of one memory that is read out, the next `future` tokens decoded from it, head included."""
    positions = UPDATERS[config.updater_type].num_read_tokens(config) + future - 1
    blocks = (config.num_readout_layers - 1) * SMTRecurrentBlock.multiply_adds(config, positions, positions)
    blocks += SMTRecurrentBlock.multiply_adds(config, positions, future)
    head = 2 * (config.embedding_size or config.hidden_size) * config.vocab_size + projection_flops(config)
    return 2 * blocks + future * head + (future - 1) * projection_flops(config)


def trunk_flops(config: SMTPretrainedTeacherConfig, length: int) -> float:
    """Forward of a Llama without its head over one row of `length` tokens."""
    base: Any = config.base
    width, heads = base.hidden_size, base.num_attention_heads
    inner = heads * (getattr(base, "head_dim", None) or width // heads)
    keys = base.num_key_value_heads * inner // heads
    layer = 4 * width * (inner + keys) + 4 * length * inner + 6 * width * base.intermediate_size
    return length * base.num_hidden_layers * layer


def label_flops(
    config: SMTTeacherConfig | SMTPretrainedTeacherConfig, length: int, with_logits: bool
) -> tuple[float, float]:
    """Forward of one row of `length` tokens, a memory at each: of what is not trained, and of what is."""
    if isinstance(config, SMTTeacherConfig):
        return 0.0, teacher_flops(config, length, with_logits)
    assert isinstance(config.layers, list)
    mapped = 2 * len(config.layers) * config.base.hidden_size * config.num_memory_tokens * config.memory_size
    return trunk_flops(config, length), (length + 1) * mapped


def teacher_flops(config: SMTTeacherConfig, length: int, with_logits: bool) -> float:
    """Forward of one row of `length` tokens, a memory at each."""
    width, inner = config.hidden_size, config.intermediate_size or 4 * config.hidden_size
    keys = length if length <= config.sliding_window else 2 * min(config.sliding_window, length)
    layer = 8 * width * width + 4 * keys * width + 4 * width * inner
    memory = 2 * config.num_hidden_layers * width * config.num_memory_tokens * config.memory_size
    logits = 2 * width * config.vocab_size if with_logits else 0
    return length * (config.num_hidden_layers * layer + logits) + (length + 1) * memory


def step_flops(
    student: SMTRecurrentConfig,
    teacher: SMTTeacherConfig | SMTPretrainedTeacherConfig | None,
    objective: Objective,
    length: int,
    on_gpu: bool = False,
) -> float:
    """FLOPs of one row in one training step, forward and backward: a backward pass is twice its forward one.

    Args:
        objective: of the smt phase without own states but those of `parallel` sweeps, of dmt with own states of every
            row, or of bptt over the row; without consistency and sparse labels.
        length: transitions of the row [T].
        on_gpu: own states of dmt are computed first, without gradient, so that all chunks run side by side; on a CPU
            they come out of the one pass.
    """
    updates = length * updater_flops(student)
    read = (length + 1) * readout_flops(student) if objective.weight("readout") else 0.0
    flops = 3 * (updates + read)
    if objective.phase == "bptt" or teacher is None:
        return flops
    fixed, labels = label_flops(teacher, length, objective.phase == "smt" and objective.weight("teacher") > 0)
    if objective.phase == "dmt":
        return flops + fixed + labels + (updates if on_gpu else 0)
    flops += fixed + 3 * labels
    if objective.weight("predictive"):
        flops += 3 * objective.num_predictive_positions * readout_flops(student, objective.future_length)
    if objective.on_policy_mode == "parallel":
        flops += objective.on_policy_fraction * objective.on_policy_sweeps * updates
    return flops


def saved_bytes(student: SMTRecurrentConfig, length: int) -> float:
    """What one row of the student keeps for its backward pass: the updater at every transition, the readout at every
    memory. (The teacher adds what a Transformer of its size keeps.)"""
    updater, layers = UPDATERS[student.updater_type], student.num_readout_layers
    update, tokens = updater.saved_numbers(student), updater.num_read_tokens(student)
    read = (layers - 1) * SMTRecurrentBlock.saved_numbers(student, tokens, tokens)
    read += SMTRecurrentBlock.saved_numbers(student, tokens, 1) + 2 * student.hidden_size + student.vocab_size
    if student.embedding_size not in (None, student.hidden_size):
        read += 2 * student.embedding_size  # the embedding, and what the head reads
    return FLOAT * length * (update + read)


def state_bytes(parameters: int, strategy: str, gpus: int) -> float:
    """Weights, gradients and two moments of AdamW on one GPU."""
    shards = {"ddp": (1, 1, 1), "zero1": (1, 1, gpus), "zero2": (1, gpus, gpus), STRATEGIES[3]: (gpus, gpus, gpus)}
    weights, gradients, moments = shards[strategy]
    return FLOAT * parameters * (1 / weights + 1 / gradients + 2 / moments)


def sent_bytes(teacher: int, updater: int, rest: int, strategy: str, gpus: int, depth: int) -> float:
    """What one GPU sends in an smt step.

    Args:
        teacher, updater, rest: parameters.
        depth: transitions that the gradient crosses, and as many before them without one (a sweep for own states).
            ZeRO-3 gathers the updater's weights for every call, forward and backward.
    """
    share = FLOAT * (gpus - 1) / gpus
    if strategy != STRATEGIES[3]:
        return 2 * share * (teacher + updater + rest)  # an all-reduce, or a reduce-scatter and an all-gather
    return share * (3 * (teacher + rest) + (3 * depth + 1) * updater)


def cost_lines(arguments: CostModelArguments) -> list[dict]:
    """One line per size: parameters, FLOPs per token by phase, bytes by strategy."""
    arguments.at_least_1("gpus", "rows_per_gpu", "context_length", "transition_steps", "memory_tokens", "window")
    return [_line_of(arguments, name, *sizes) for name, sizes in SIZES.items()]


def _line_of(
    arguments: CostModelArguments, name: str, width: int, layers: int, readout_layers: int, heads: int
) -> dict:
    shared: dict[str, Any] = {
        **{"vocab_size": arguments.vocabulary, "hidden_size": width, "num_hidden_layers": layers},
        **{"num_attention_heads": heads, "num_memory_tokens": arguments.memory_tokens},
    }
    student = SMTRecurrentConfig(num_readout_layers=readout_layers, **shared)
    teacher = SMTTeacherConfig(sliding_window=arguments.window, memory_size=width, **shared)
    block = 12 * width * width  # four projections, two of four times the width
    updater = layers * block + width * width
    rest = readout_layers * block + 2 * width * arguments.vocabulary
    teacher_parameters = layers * block + 2 * width * arguments.vocabulary
    teacher_parameters += layers * width * arguments.memory_tokens * width
    line: dict = {"size": name, "student": updater + rest, "teacher": teacher_parameters}
    length, steps = arguments.context_length, arguments.transition_steps
    weights = {"readout": 1.0, "predictive": 1.0, "teacher": 1.0}
    own: dict[str, Any] = {"on_policy_fraction": 0.5, "on_policy_mode": "parallel"}
    smt = Objective("smt", steps, weights, num_predictive_positions=8, future_length=8, **own)
    dmt, bptt = Objective("dmt", steps, {"readout": 1.0}), Objective("bptt", length, {"readout": 1.0})
    for objective in (smt, dmt, bptt):
        flops = step_flops(student, teacher, objective, length, on_gpu=True)
        line[f"{objective.phase}_gflops_per_token"] = flops / length / 1e9
    for strategy in STRATEGIES:
        total = updater + rest + teacher_parameters
        line[f"{strategy} states GB"] = state_bytes(total, strategy, arguments.gpus) / 1e9
    line["saved GB"] = arguments.rows_per_gpu * saved_bytes(student, length) / 1e9
    for strategy in STRATEGIES:
        sent = sent_bytes(teacher_parameters, updater, rest, strategy, arguments.gpus, steps)
        line[f"{strategy} sent GB"] = sent / 1e9
    return line


def cost_table(lines: list[dict]) -> str:
    """The lines as Markdown."""

    def number(value: float) -> str:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    def millions(value: int) -> str:
        return f"{value / 1e6:,.0f}M"

    rows = [
        "| | " + " | ".join(line["size"] for line in lines) + " |",
        "|---|" + "---|" * len(lines),
        "| parameters: student, teacher | "
        + " | ".join(f"{millions(line['student'])}, {millions(line['teacher'])}" for line in lines)
        + " |",
    ]
    for title, names in (
        ("GFLOPs per token: smt, dmt, bptt", [f"{phase}_gflops_per_token" for phase in ("smt", "dmt", "bptt")]),
        ("states per GPU, GB: DDP, ZeRO-1, -2, -3", [f"{strategy} states GB" for strategy in STRATEGIES]),
        ("saved for backward by the student, GB", ["saved GB"]),
        ("sent per step by a GPU, GB: DDP to ZeRO-2, ZeRO-3", ["ddp sent GB", f"{STRATEGIES[3]} sent GB"]),
    ):
        cells = [", ".join(number(line[name]) for name in names) for line in lines]
        rows.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(rows)

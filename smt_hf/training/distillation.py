"""What the teacher's own predictions are to the student: the arguments of distillation."""

from dataclasses import dataclass

from smt_hf.command_line import argument


@dataclass
class DistillationArguments:
    """Arguments of a phase about `distillation_weight`."""

    distillation_temperature: float = argument(
        1.0,
        "Temperature of both next-token distributions of `distillation_weight`, whose loss is scaled by its square. "
        "Ours, not searched.",
    )
    distillation_top_k: int = argument(
        64,
        "Tokens that `distillation_weight` compares one by one, the likeliest of the teacher; all others count as one "
        "token. Ours, not searched.",
    )

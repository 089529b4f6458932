"""What a phase optimises: the table of loss terms, and the settings that a phase computes them with.

To add a loss term, write its arithmetic in `losses.py` and add a row to `LOSS_TERMS`. The row gives the term its
flags (`--smt_NAME_weight`, `--smt_NAME_warmup_ratio`), its place in the total loss and its value in the log.
Shapes: B sequences, T transitions, S positions, K memory tokens, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Any

import torch

from smt_hf.command_line import argument
from smt_hf.errors import InputError

from .losses import dynamics_loss, masked_mean, next_token_loss, uniformity_loss, warmed_up

if TYPE_CHECKING:
    from .supervision import Supervision

PHASES = ("smt", "dmt", "bptt")
PARTS = ("teacher", "embeddings", "updater", "readout")


@dataclass(frozen=True)
class LossTerm:
    """One term of the total loss."""

    name: str  # in the log, and before `_weight` and `_warmup_ratio` in the arguments
    meaning: str  # for the help text, after "Weight of"
    # (student, supervision, objective) -> (B,): the mean of the term inside each example, in nats unless `meaning` says
    # otherwise.
    compute: Callable[[Any, Any, "Objective"], torch.Tensor]
    # The attribute of `Supervision` that the term is computed from. A batch where it is `None` is trained without it.
    needs: str
    # Phase -> default weight and the source of that default. Other phases do not have the term.
    weights: dict[str, tuple[float, str]]
    # Of `PARTS`, those that the gradient of the term reaches in the smt phase at `on_policy_fraction` 0. The learned
    # initial memory counts as a part of the updater.
    trains: tuple[str, ...]
    waits_for_teacher: bool = False  # `dynamics_starts_below` holds the term back while the teacher is poor
    is_always_logged: bool = False  # computed, and shown in the log, at weight 0 too


LOSS_TERMS = {
    term.name: term
    for term in (
        LossTerm(
            "readout",
            "the next-token loss of the readout on the student's memories",
            lambda student, seen, _: seen.readout_loss(student, "read"),
            needs="read",
            weights={phase: (1.0, "Ours.") for phase in PHASES},
            trains=PARTS,
        ),
        LossTerm(
            "dynamics",
            "the squared error of the student's memories against the teacher's, no unit [Eq. 3; in dmt Eq. 6]",
            lambda student, seen, _: dynamics_loss(seen.reached, seen.reached_labels, seen.reached_weights),
            needs="reached",
            weights={
                "smt": (0.1, "Paper."),
                "dmt": (1.0, "Paper: 10. Ours: 1, because the readout loss trains the updater as well."),
            },
            trains=("teacher", "embeddings", "updater"),
            waits_for_teacher=True,
            is_always_logged=True,
        ),
        LossTerm(
            "normalized_dynamics",
            "the dynamics error divided by the variance of the labels per coordinate, no unit",
            lambda student, seen, _: masked_mean(seen.errors, seen.reached_weights),
            needs="errors",
            weights={
                phase: (
                    0.0,
                    "Ours. At 0 the student can lose directions of little variance in the labels. The recipes set 1 "
                    "on the probes (retrieval 64 in 45 s: 91.6 % with it, 11.9 % without; modular arithmetic 7: 90.7 "
                    "and 92.9 %) and on digits (after 24 s 2.122 bits per pixel against 2.302); on text it changes "
                    "nothing.",
                )
                for phase in ("smt", "dmt")
            },
            trains=("teacher", "embeddings", "updater"),
            waits_for_teacher=True,
        ),
        LossTerm(
            "readout_match",
            "the divergence of the readout of the student's memories from that of the teacher's memories there "
            "[KL(label || student), no gradient on the label's side]",
            lambda student, seen, _: seen.readout_match(student),
            needs="reached",
            weights={phase: (0.0, "Ours; see model_cards/evidence.") for phase in ("smt", "dmt")},
            trains=PARTS,
            waits_for_teacher=True,
        ),
        LossTerm(
            "predictive",
            "the next-token loss of the future that is decoded from the teacher's memory [Eq. 2]",
            lambda student, seen, objective: seen.future_loss(student, seen.picked, objective.future_length),
            needs="picked",
            weights={"smt": (1.0, "Paper.")},
            trains=("teacher", "embeddings", "updater", "readout"),
        ),
        LossTerm(
            "consistency",
            "the next-token loss of the future that is decoded from the student's memory at chunk ends (bptt: at the "
            "ends of windows inside a row, and where memory is carried at any position of the window with "
            "`future_length` tokens after it)",
            lambda student, seen, objective: seen.future_loss(student, seen.chunk_ends, objective.future_length),
            needs="chunk_ends",
            weights={
                "smt": (0.0, "Ours."),
                "dmt": (0.0, "Ours; see model_cards/evidence."),
                "bptt": (0.0, "Ours; see model_cards/evidence."),
            },
            trains=PARTS,
        ),
        LossTerm(
            "teacher_readout",
            "the next-token loss of the student's readout on all memories of the teacher",
            lambda student, seen, _: seen.readout_loss(student, "labels"),
            needs="labels",
            weights={"smt": (0.0, "Ours.")},
            trains=("teacher", "updater", "readout"),
        ),
        LossTerm(
            "distillation",
            "the divergence of the readout of the student's memories (without the updater: of the teacher's) from the "
            "teacher's own next-token distribution [T^2 KL(teacher || student) at `distillation_temperature` T]",
            lambda student, seen, objective: seen.distillation(student, objective.distillation_temperature),
            needs="next_tokens",
            weights={phase: (0.0, "Ours, not measured yet.") for phase in ("smt", "dmt")},
            trains=PARTS,
        ),
        LossTerm(
            "uniformity",
            "the spread of the teacher's memory tokens, no unit [Eq. 4]",
            lambda student, seen, _: uniformity_loss(seen.picked[0], seen.picked[2]),
            needs="picked",
            weights={"smt": (0.001, "Paper.")},
            trains=("teacher", "updater"),
        ),
        LossTerm(
            "teacher",
            "the next-token loss of the teacher's own head",
            lambda student, seen, _: next_token_loss(seen.teacher_logits[:, 1:], seen.batch.labels[:, 1:]),
            needs="teacher_logits",
            weights={"smt": (1.0, "Ours: it helps and costs little.")},
            trains=("teacher",),
        ),
    )
}


def terms_of(phase: str) -> list[LossTerm]:
    """The terms that a phase can have, in the order in which they are added up."""
    return [term for term in LOSS_TERMS.values() if phase in term.weights]


def loss_weights(phase: str) -> type:
    """A dataclass with the weight and the warm-up of every term of a phase: a base of the phase's arguments."""
    entries: list[tuple[str, type, Any]] = []
    for term in terms_of(phase):
        default, source = term.weights[phase]
        weight = argument(default, f"Weight of {term.meaning}. {source}")
        warmup = argument(0.0, f"Share of the phase over which `{term.name}_weight` rises linearly from 0.")
        entries += [(f"{term.name}_weight", float, weight), (f"{term.name}_warmup_ratio", float, warmup)]
    return make_dataclass(f"{phase.upper()}LossWeights", entries)


@dataclass(frozen=True)
class Objective:
    """What a phase computes, with the values of its training arguments, which document each of them.

    Args:
        weights: term -> weight; a term that is missing has weight 0.
        warmup_ratios: term -> share of the phase over which its weight rises linearly from 0.
        others: as in the arguments of the phase. What a phase does not have is off here.
    """

    phase: str
    transition_steps: int
    weights: dict[str, float]
    seed: int = 0
    warmup_ratios: dict[str, float] = field(default_factory=dict)
    readout_trains_updater: bool = True
    label_stride: int = 1
    num_consistency_chunks: int = 1
    hard_chunk_fraction: float = 0.0
    hard_transition_fraction: float = 0.0
    num_supervised_transitions: int = 0
    supervised_chunk_steps: int = 1
    carries_memory: bool = True
    carries_teacher_memory: bool = False
    trains_updater: bool = True
    num_predictive_positions: int = 0
    future_length: int = 1
    on_policy_fraction: float = 0.0
    on_policy_warmup_ratio: float = 0.0
    on_policy_mode: str = "sequential"
    on_policy_sweeps: int = 1
    teacher_forcing: float = 0.0
    teacher_forcing_ratio: float = 1.0
    distillation_temperature: float = 1.0
    distillation_top_k: int = 64

    def weight(self, name: str) -> float:
        """The full weight of a term."""
        return self.weights.get(name, 0.0)

    def weight_at(self, name: str, progress: float, dynamics_scale: float = 1.0) -> float:
        """The weight of a term at a share `progress` of the phase, in [0, 1].

        Args:
            dynamics_scale: factor on the terms that wait for the teacher.
        """
        weight = warmed_up(self.weight(name), progress, self.warmup_ratios.get(name, 0.0))
        return weight * dynamics_scale if LOSS_TERMS[name].waits_for_teacher else weight

    @property
    def likeliest(self) -> dict[str, Any]:
        """The arguments of a teacher's forward for the distribution that the student is distilled from, if it is."""
        if not self.weight("distillation"):
            return {}
        return {"top_k": self.distillation_top_k, "temperature": self.distillation_temperature}

    @property
    def trains_teachers_head(self) -> bool:
        """Whether a loss reaches the next-token head that a teacher of ours has."""
        return bool(self.weight("teacher")) and not self.num_supervised_transitions

    def forcing_at(self, progress: float) -> float:
        """The share by which labels pull own memories at a share `progress` of the phase: linearly down to 0."""
        if progress >= self.teacher_forcing_ratio:
            return 0.0
        return self.teacher_forcing * (1 - progress / self.teacher_forcing_ratio)

    def needs(self, attribute: str) -> bool:
        """Whether a term with a weight is computed from this attribute of `Supervision`."""
        return any(term.needs == attribute and self.weight(term.name) for term in terms_of(self.phase))

    def terms(self, supervision: "Supervision") -> list[LossTerm]:
        """The terms to compute for a batch: those with a weight, and those that are always logged."""
        return [
            term
            for term in terms_of(self.phase)
            if getattr(supervision, term.needs) is not None and (self.weight(term.name) or term.is_always_logged)
        ]


def trained_parts(phase: str, trains_updater: bool, trainable: Sequence[str] | None) -> list[str]:
    """Of `PARTS`, those that a phase trains.

    Raises:
        InputError: `trainable` names one that the phase cannot train.
    """
    possible = [
        part for part in PARTS if (part != "teacher" or phase == "smt") and (part != "updater" or trains_updater)
    ]
    chosen = possible if trainable is None else list(trainable)
    for part in chosen:
        if part not in possible:
            raise InputError(f"`trainable` of the {phase} phase names {part!r}: choose from {', '.join(possible)}.")
    return chosen


def part_of(name: str) -> str:
    """The one of `PARTS` that a parameter of the composite belongs to, by its name."""
    if name.startswith("teacher."):
        return "teacher"
    if ".embed_" in name:
        return "embeddings"
    return "readout" if any(part in name for part in (".readout.", ".lm_head.", ".head_proj.")) else "updater"

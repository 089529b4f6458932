"""Arguments of the three phases: transformers' `TrainingArguments` with our defaults, and the objective's settings.

`PhaseArguments` is what all phases share, `SupervisedArguments` what smt and dmt share. The weights of the loss terms
come from the table in `objective.py`; `argument_checks.py` refuses what does not fit together. Every default names its
source: the paper (arXiv:2606.06479) or "ours" with what was measured.
"""

import math
from dataclasses import dataclass, fields

import torch
from transformers import get_scheduler

from smt_hf.command_line import argument
from smt_hf.errors import InputError

from .argument_checks import (
    check_cache,
    check_carried,
    check_curriculum,
    check_distillation,
    check_own_memories,
    check_sparse,
    check_strided,
    check_teacher_alone,
    check_transitions,
    check_windows,
    refuse,
    words_of,
)
from .cached_teacher import TeacherCacheArguments
from .distillation import DistillationArguments
from .drift_watch import DriftArguments
from .launch import applied_launch, launched_sharded, launched_with_deepspeed
from .long_rows import check_checkpointing
from .objective import Objective, loss_weights, terms_of, trained_parts

UNBOUNDED = 10_000_000  # steps of a phase that ends by its seconds
MATRIX_OPTIMIZERS = ("adamw", "muon")
_CONTINUES = (
    "Go on with the learning-rate schedule of the previous phase and the student's optimiser state, instead of "
    "starting both anew. The teacher's optimiser state starts anew in every phase. Ours: going on was better for dmt "
    "(2.70 bits per byte against 2.80)."
)
_MODES = (
    "Where own memories come from: `sequential` (rolled out from m_0 over the row), `parallel` (sweeps "
    "over all chunks: up to `on_policy_sweeps` chunks after a label) or `aggregate` (sequential ones, kept and reused; "
    "dmt only)."
)


@dataclass
class PhaseArguments(DriftArguments):
    """What all phases share. Not used by itself."""

    phase = ""
    # Whether no earlier phase of the pipeline has trained the student's updater. Set by `lay_out`.
    student_is_new = False
    # What only some phases have is off in the others.
    trains_updater = True
    num_supervised_transitions = 0
    carries_memory = False
    carries_teacher_memory = False
    dynamics_starts_below = None
    dynamics_full_below = None
    label_cache_dir = None

    learning_rate: float = argument(
        4e-3, "Peak learning rate. Ours: for BPTT as good as 2e-3, better than 8e-3; see model_cards/evidence."
    )
    per_device_train_batch_size: int = argument(
        16, "Rows per device. Ours; with Muon at a rate of 0.016, smt is better with 32 in 180 s on text."
    )
    global_batch_size: int | None = argument(
        None,
        "Rows per optimiser step, over all processes and `gradient_accumulation_steps`. "
        "It sets `per_device_train_batch_size`, so that the rows per step do not depend on the number of processes.",
    )
    per_device_eval_batch_size: int = argument(32, "Rows per device in evaluation.")
    max_seconds: float | None = argument(
        None,
        "Seconds inside training steps after which the phase ends, instead of `max_steps`; schedule and warm-ups then "
        "go by seconds. For comparisons at equal time; such a run cannot be repeated bit by bit.",
    )
    evaluates_by_seconds: bool = argument(True, "With `max_seconds`: evaluate ten times during the phase.")
    curriculum_threshold: float | None = argument(
        None,
        "Loss of the student's own rollout, in nats per label, below which the next level of a curriculum begins. Data "
        "of one level has no curriculum. In a phase that does not train the updater it is the loss of the readout on "
        "the teacher's memories. Ours: if the teacher's loss sets the student's levels, the student stays at chance.",
    )
    curriculum_levels: list[str] | None = argument(
        None,
        "All difficulties that the phase goes through, easiest first, instead of those of the run; the run's "
        "`difficulty` is not added to them. Rows of the `documents` task may be longer than `difficulty`, in a phase "
        "that has no other level. A phase starts at the first level that is at least as hard as the hardest "
        "that the student has reached, or at its last level.",
    )
    max_steps: int = argument(600, "Optimiser steps of the phase. Ours.")
    matrix_optimizer: str = argument(
        "adamw",
        "Optimiser of the weights of linear layers: `adamw`, or `muon` (everything else stays with AdamW, at the same "
        "rate). Muon does not run under DeepSpeed or FSDP. Ours: far better on text, worse on some probes; see "
        "model_cards/evidence.",
    )
    adam_beta2: float = argument(0.95, "Decay rate of AdamW's second moment. Paper.")
    weight_decay: float = argument(0.01, "Weight decay, applied to the weights of linear layers only. Paper.")
    max_grad_norm: float = argument(1.0, "Norm to which larger gradients are scaled down. Paper.")
    max_skipped_steps: int = argument(
        0,
        "Optimiser steps in a row that may be left out because their gradient is not finite; one more ends the run. "
        "A loss that is not finite ends the run all the same. Not with DeepSpeed. Ours.",
    )
    lr_scheduler_type: str = argument("cosine_with_min_lr", "Rate schedule. Ours: cosine to a tenth of the peak.")
    lr_scheduler_kwargs: dict | str | None = argument(
        None, "Arguments of the scheduler; default for cosine_with_min_lr: min_lr_rate 0.1. Ours."
    )
    warmup_steps: float = argument(
        0.03, "Steps of learning-rate warm-up, or their share of the phase if below 1. Ours: 3 %."
    )
    logging_steps: float = argument(10, "Steps between two lines of the log.")
    logging_nan_inf_filter: bool = argument(False, "Hide losses that are not finite in the log.")
    save_total_limit: int | None = argument(2, "Checkpoints kept per phase.")
    remove_unused_columns: bool = argument(False, "Leave it false: the Trainer would drop columns that are needed.")
    context_length: int = argument(64, "Transitions per training row; a row holds one token more. Ours, not searched.")
    transition_steps: int = argument(8, "Transitions that a gradient crosses [k]; must divide `context_length`.")
    num_consistency_chunks: int = argument(
        2, "Memories per row whose future is decoded for `consistency_weight`, drawn at random. Ours."
    )
    future_length: int = argument(
        8, "Tokens decoded from a memory [T_f]; shorter than `context_length`. Ours, not searched."
    )
    trainable: list[str] | None = argument(
        None,
        "Parts that the phase trains, of teacher, embeddings, updater and readout; the others stay bit-equal. Default: "
        "all that its losses reach.",
    )
    continue_previous_phase: bool = argument(False, _CONTINUES)
    schedule_offset: int = argument(0, "Steps of the schedule that earlier phases have used. Set by the pipeline.")
    schedule_steps: int = argument(0, "Steps of the whole schedule; 0: of this phase. Set by the pipeline.")

    def __post_init__(self):
        self._check_numbers()
        self._read_lists()
        if self.lr_scheduler_kwargs is None and str(self.lr_scheduler_type).endswith("cosine_with_min_lr"):
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        with applied_launch(self):
            super().__post_init__()
        self._check_batches_and_budget()
        self._check_optimizer()
        check_checkpointing(self, bool(self.deepspeed or self.fsdp) or launched_sharded())
        refuse(
            self.max_skipped_steps and (self.deepspeed or launched_with_deepspeed()),
            f"`max_skipped_steps` of the {self.phase} phase cannot be used with DeepSpeed, whose engine steps with "
            "gradients of its own: leave it at 0.",
        )
        refuse(self.label_smoothing_factor, "`label_smoothing_factor` is not supported by the losses: leave it at 0.")
        refuse(
            not any(getattr(self, f"{term.name}_weight") for term in terms_of(self.phase)),
            f"every loss of the {self.phase} phase has weight 0: give one of them a weight.",
        )

    def _check_numbers(self) -> None:
        """Ranges, before transformers derives anything from the numbers."""
        at_least_1 = ["context_length", "transition_steps", "gradient_accumulation_steps", "max_steps"]
        at_least_1 += ["num_consistency_chunks", "future_length"]
        for name in [*at_least_1, "per_device_train_batch_size", "per_device_eval_batch_size"]:
            value = getattr(self, name)
            is_epochs = name == "max_steps" and value == -1  # as transformers has it
            refuse(value < 1 and not is_epochs, f"`{name}` of the {self.phase} phase must be at least 1, got {value}.")
        own = [entry.name for entry in fields(self)]
        refuse(
            self.max_skipped_steps < 0,
            f"`max_skipped_steps` of the {self.phase} phase must be at least 0, got {self.max_skipped_steps}.",
        )
        not_negative = [name for name in own if name.endswith("_weight")]
        for name in [*not_negative, "learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "adam_epsilon"]:
            value = getattr(self, name)
            refuse(
                not (math.isfinite(value) and value >= 0),
                f"`{name}` of the {self.phase} phase must be a finite number of at least 0, got {value}.",
            )
        for name in own:
            is_share = name.endswith(("_fraction", "_warmup_ratio")) or name.startswith("teacher_forcing")
            if is_share or name in ("adam_beta1", "adam_beta2"):
                value = getattr(self, name)
                refuse(not 0 <= value <= 1, f"`{name}` must lie between 0 and 1, got {value}.")

    def _read_lists(self) -> None:
        if self.trainable is not None:
            self.trainable = words_of(self.trainable)
            refuse(not self.trainable, "`trainable` names no part: leave it out to train all that the phase can.")
            trained_parts(self.phase, self.trains_updater, self.trainable)
        if self.curriculum_levels is not None:
            given, self.curriculum_levels = self.curriculum_levels, words_of(self.curriculum_levels)
            refuse(
                not all(level.isdecimal() for level in self.curriculum_levels),
                f"`curriculum_levels` must be numbers joined by commas, got {given!r}.",
            )
            refuse(
                not self.levels or self.levels != sorted(set(self.levels)),
                f"`curriculum_levels` must be rising difficulties, got {given!r}.",
            )

    def _check_batches_and_budget(self) -> None:
        if self.global_batch_size is not None:
            parts = self.world_size * self.gradient_accumulation_steps
            refuse(
                self.global_batch_size < 1 or self.global_batch_size % parts,
                f"`global_batch_size` ({self.global_batch_size}) of the {self.phase} phase must be a multiple of "
                f"{parts}: {self.world_size} process(es) times {self.gradient_accumulation_steps} step(s) of gradient "
                "accumulation.",
            )
            self.per_device_train_batch_size = self.global_batch_size // parts
        if self.max_seconds is not None:
            refuse(
                not self.max_seconds > 0,
                f"`max_seconds` of the {self.phase} phase must be positive, got {self.max_seconds}.",
            )
            refuse(self.warmup_steps >= 1, "with `max_seconds`, `warmup_steps` must be a share of the phase, below 1.")
            self.max_steps = UNBOUNDED
        # Other rows are padded to a multiple, which costs little.
        refuse(
            (self.carries_memory or self.carries_teacher_memory) and self.context_length % self.transition_steps,
            f"`transition_steps` ({self.transition_steps}) of the {self.phase} phase must divide its `context_length` "
            f"({self.context_length}).",
        )

    def _check_optimizer(self) -> None:
        try:
            optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
            get_scheduler(self.lr_scheduler_type, optimizer, 1, 10, self.lr_scheduler_kwargs)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"`lr_scheduler_kwargs` {self.lr_scheduler_kwargs} do not fit `lr_scheduler_type` "
                f"{getattr(self.lr_scheduler_type, 'value', self.lr_scheduler_type)}: {error}."
            ) from error
        refuse(
            self.matrix_optimizer not in MATRIX_OPTIMIZERS,
            f"unknown `matrix_optimizer` {self.matrix_optimizer!r}: choose one of {', '.join(MATRIX_OPTIMIZERS)}.",
        )
        if self.matrix_optimizer != "muon":
            return
        optim = str(getattr(self.optim, "value", self.optim))
        refuse(
            not optim.startswith("adamw_torch"),
            f"`matrix_optimizer=muon` trains everything else by torch's AdamW and has no use for `optim={optim}`: "
            "leave one of the two out.",
        )
        refuse(
            self.deepspeed or self.fsdp or launched_sharded(),
            f"`matrix_optimizer=muon` of the {self.phase} phase needs whole matrices, and DeepSpeed and FSDP split "
            "them: use adamw, or launch without them.",
        )

    @property
    def levels(self) -> list[int]:
        """`curriculum_levels` as numbers; empty where the phase has none."""
        return [int(level) for level in self.curriculum_levels or ()]

    def objective(self) -> Objective:
        """The settings that the composite's `forward` needs."""
        own = {entry.name: getattr(self, entry.name) for entry in fields(Objective) if hasattr(self, entry.name)}
        names = [term.name for term in terms_of(self.phase)]
        own["weights"] = {name: getattr(self, f"{name}_weight") for name in names}
        own["warmup_ratios"] = {name: getattr(self, f"{name}_warmup_ratio") for name in names}
        return Objective(**{**own, "phase": self.phase})


@dataclass
class SupervisedArguments(TeacherCacheArguments, DistillationArguments, PhaseArguments):
    """What smt and dmt share: chunks of transitions between memory labels. Not used by itself."""

    readout_trains_updater: bool = argument(
        True,
        "The gradient of the student's readout loss reaches the updater. Paper: no. Ours: yes; after smt8 the paper's "
        "dmt made the student worse (2.66 to 2.70 bits per byte), this one better (2.66 to 2.54).",
    )
    on_policy_fraction: float = argument(
        0.5, "Share of rows whose chunks start from the student's own memories. Ours, not searched."
    )
    on_policy_warmup_ratio: float = argument(0.1, "Share of the phase before the first own memories. Ours.")
    on_policy_mode: str = argument("parallel", _MODES)
    on_policy_sweeps: int = argument(1, "Sweeps of the `parallel` mode. Ours.")
    teacher_forcing: float = argument(
        0.0,
        "Share by which a chunk that begins at an own memory is pulled towards the label there, at the start of the "
        "phase: start = own + share (label - own), without gradient. The rollout that makes the own memories goes on "
        "from the pulled ones. Generalised teacher forcing (Hess et al. 2023, arXiv:2306.04406). Ours; see "
        "model_cards/evidence.",
    )
    teacher_forcing_ratio: float = argument(
        1.0, "Share of the phase over which `teacher_forcing` falls linearly to 0. Ours; see model_cards/evidence."
    )
    hard_transition_fraction: float = argument(
        0.0,
        "Share of a row's weight in the dynamics and `readout_match` losses that goes, in equal parts, to the "
        "sixteenth of its transitions (rounded up) with the largest normalised error; the rest is spread over all "
        "transitions. Ours; see model_cards/evidence.",
    )
    hard_chunk_fraction: float = argument(
        0.7,
        "Share of the decoded chunk ends at the chunk with the largest dynamics error; the others are drawn uniformly. "
        "Ours.",
    )

    def __post_init__(self):
        super().__post_init__()
        self._check_counts("on_policy_sweeps")
        check_own_memories(self)
        check_curriculum(self)
        check_distillation(self)
        check_cache(self)
        check_transitions(self)

    def _check_counts(self, *names: str) -> None:
        for name in names:
            refuse(getattr(self, name) < 1, f"`{name}` must be at least 1, got {getattr(self, name)}.")


@dataclass
class SMTTrainingArguments(loss_weights("smt"), SupervisedArguments):  # type: ignore[misc]
    """Supervised memory training: student and teacher together, chunks start at the teacher's memories."""

    phase = "smt"

    dynamics_starts_below: float | None = argument(  # type: ignore[assignment]
        None,
        "Nats per label: the dynamics terms stay at 5 % of their weight while the running loss of the readout on the "
        "teacher's memories (without it: the predictive loss) is above this value. Default: no such wait. Ours.",
    )
    dynamics_full_below: float | None = argument(  # type: ignore[assignment]
        None,
        "Nats per label at which the dynamics terms reach their full weight, linearly from `dynamics_starts_below`. "
        "Ours.",
    )
    num_supervised_transitions: int = argument(
        0, "Random transitions per row that are supervised, each with labels of its own; 0: all. Paper: 1."
    )
    supervised_chunk_steps: int = argument(
        1,
        "With `num_supervised_transitions`: transitions that the student makes from the label at each of these random "
        "places, all of them supervised. Above 1 they are chunks. Paper: 1.",
    )
    trains_updater: bool = argument(
        True,
        "False: train the teacher and the readout of its memories alone, before a phase that trains the student; a "
        "curriculum then goes by the teacher's loss. Ours: on probes the teacher solves the task in seconds.",
    )
    num_predictive_positions: int = argument(8, "Random positions per row whose future is decoded. Ours, not searched.")
    carries_teacher_memory: bool = argument(  # type: ignore[assignment]
        False,
        "With `trains_updater` false: read the rows in windows of `transition_steps`, each from the teacher's memory "
        "at the end of the window before, as truncated BPTT does; for a teacher that can go on from a memory. Ours.",
    )

    def __post_init__(self):
        refuse(
            self.on_policy_mode == "aggregate",
            "`on_policy_mode=aggregate` needs a frozen teacher: use it in the dmt phase.",
        )
        super().__post_init__()
        refuse(
            (self.dynamics_starts_below is None) != (self.dynamics_full_below is None),
            "set both `dynamics_starts_below` and `dynamics_full_below`, or neither.",
        )
        self._check_counts("num_predictive_positions", "supervised_chunk_steps")
        check_sparse(self)
        check_carried(self)
        if not self.trains_updater:
            check_teacher_alone(self)


@dataclass
class DMTTrainingArguments(loss_weights("dmt"), SupervisedArguments):  # type: ignore[misc]
    """DAgger memory training: the teacher is frozen, the student starts from its own memories."""

    phase = "dmt"

    max_steps: int = argument(500, "Optimiser steps of the phase. Ours: as many seconds as smt on two CPU cores.")
    transition_steps: int = argument(1, "Transitions that a gradient crosses [k]. Paper: 1.")
    continue_previous_phase: bool = argument(True, _CONTINUES)
    on_policy_fraction: float = argument(1.0, "Share of rows whose chunks start from own memories. Paper: all.")
    on_policy_warmup_ratio: float = argument(0.0, "Share of the phase before the first own memories. Paper.")
    on_policy_mode: str = argument("sequential", _MODES)
    label_stride: int = argument(
        1, "Tokens between two labels of the dynamics loss [the paper's k]. Paper: 16. Ours: 1, labels are cheap."
    )
    aggregate_capacity: int = argument(512, "Rows whose own memories are kept in the `aggregate` mode. Ours.")
    aggregate_fraction: float = argument(0.5, "Share of rows taken from the kept ones in the `aggregate` mode. Ours.")
    label_cache_dir: str | None = argument(  # type: ignore[assignment]
        None,
        "Folder for the frozen teacher's memories of every training row, in a file named after teacher and data: "
        "later epochs then do not run the teacher. The size of the file is "
        "4 bytes x rows x transitions x numbers in a memory.",
    )

    def __post_init__(self):
        super().__post_init__()
        self._check_counts("label_stride", "aggregate_capacity")
        check_strided(self)
        refuse(
            self.label_cache_dir and self.on_policy_mode == "aggregate",
            "`label_cache_dir` does not fit `on_policy_mode=aggregate`, which exchanges rows.",
        )


@dataclass
class BPTTTrainingArguments(loss_weights("bptt"), PhaseArguments):  # type: ignore[misc]
    """Backpropagation through time, without a teacher: the baseline, and a way to fine-tune after the other phases.

    `transition_steps == context_length` is full BPTT, every row from `m_0`; below it, rows are read in windows of
    `transition_steps` with the memory carried on and its gradient cut (truncated BPTT).
    """

    phase = "bptt"

    per_device_train_batch_size: int = argument(
        48, "Streams per device. Ours: 32 was as good (2.150 against 2.147 bits per byte)."
    )
    max_steps: int = argument(
        2800,
        "Optimiser steps of the phase. Ours: with the steps of smt, three quarters of the time of `smt,bptt`.",
    )
    context_length: int = argument(256, "Transitions per row, over which the memory is carried. Ours, not searched.")
    transition_steps: int = argument(
        16, "Transitions per window. Ours: of 8, 16 and 32 the best with Muon in 180 s on text (text.jsonl)."
    )
    carries_memory: bool = argument(
        True,
        "True: the windows of a row are read in consecutive steps. False: every step reads whole rows, window by "
        "window; for rows of different lengths.",
    )
    continue_previous_phase: bool = argument(True, _CONTINUES)

    def __post_init__(self):
        super().__post_init__()
        check_windows(self)

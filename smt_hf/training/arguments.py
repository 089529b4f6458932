"""Arguments of the three phases: transformers' `TrainingArguments` with our defaults, and the objective's settings.

Every default names its source: the paper (arXiv:2606.06479) or "ours" with what was measured.
"""

import os
from dataclasses import dataclass, fields

import torch
from transformers import TrainingArguments, get_scheduler

from smt_hf.command_line import argument

from .composite import Objective, trained_parts
from .launch import LAUNCHED_PRECISION, autocast_by_deepspeed, launched_with_deepspeed, settle_deepspeed

UNBOUNDED = 10_000_000  # steps of a phase that ends by its seconds
_CONTINUE = "continue_previous_phase"
_LOSS_WEIGHTS = {
    "readout_weight",
    "dynamics_weight",
    "normalized_dynamics_weight",
    "predictive_weight",
    "consistency_weight",
    "teacher_readout_weight",
    "uniformity_weight",
    "teacher_weight",
}
MATRIX_OPTIMIZERS = ("adamw", "muon")
ON_POLICY_MODES = ("sequential", "parallel", "aggregate")


@dataclass
class PhaseArguments(TrainingArguments):
    """What all phases share. Not used by itself."""

    phase = ""

    learning_rate: float = argument(
        4e-3, "Peak learning rate. Ours: for BPTT level with 2e-3, better than 8e-3; see model_cards/evidence."
    )
    per_device_train_batch_size: int = argument(
        16, "Rows a device. Ours; with Muon at 0.016, smt is better with 32 in 180 s on text."
    )
    global_batch_size: int | None = argument(
        None,
        "Rows an optimiser step, all processes and `gradient_accumulation_steps` together: the same recipe at any "
        "scale. Sets `per_device_train_batch_size`.",
    )
    per_device_eval_batch_size: int = argument(32, "Rows a device in evaluation.")
    max_seconds: float | None = argument(
        None,
        "Seconds inside training steps after which the phase ends, instead of `max_steps`; schedule and warm-ups then "
        "go by seconds. For comparisons at equal time; such a run cannot be repeated bit by bit.",
    )
    evaluates_by_seconds: bool = argument(True, "With `max_seconds`: evaluate ten times on the way.")
    curriculum_threshold: float | None = argument(
        None,
        "Nats a label of the student's own rollout below which the next level of a curriculum begins; data of one "
        "level has none. Ours: gated by the teacher instead, the student stays at chance. Where the student is not "
        "trained yet (`trains_updater` false), of the readout of the teacher's memories.",
    )
    curriculum_levels: list[str] | None = argument(
        None,
        "All difficulties that the phase goes through, easiest first, where they are not those of the run; the run's "
        "`difficulty` is not added to them. A phase starts at the first that is no easier than the hardest that the "
        "student has got to, or at its last.",
    )
    max_steps: int = argument(600, "Optimiser steps of the phase. Ours: a quarter of 4 minutes on two CPU cores.")
    matrix_optimizer: str = argument(
        "adamw",
        "What trains the weights of linear layers: `adamw`, or `muon` (the rest stays with AdamW, at the same rate). "
        "Not with DeepSpeed or FSDP. Ours: far better on text, worse on some probes; see model_cards/evidence.",
    )
    adam_beta2: float = argument(0.95, "Paper.")
    weight_decay: float = argument(0.01, "Paper. Applied to the weights of linear layers only.")
    max_grad_norm: float = argument(1.0, "Paper.")
    lr_scheduler_type: str = argument("cosine_with_min_lr", "Ours: cosine to a tenth of the peak.")
    lr_scheduler_kwargs: dict | str | None = argument(
        None, "Of the scheduler; default for cosine_with_min_lr: min_lr_rate 0.1. Ours: a tenth of the peak at the end."
    )
    warmup_steps: float = argument(0.03, "Steps of learning-rate warm-up, or their share if below 1. Ours: 3 %.")
    logging_steps: float = argument(10, "Steps between two lines of the log.")
    logging_nan_inf_filter: bool = argument(False, "Show a loss that is not finite as what it is.")
    save_total_limit: int | None = argument(2, "Checkpoints kept a phase.")
    remove_unused_columns: bool = argument(False, "The collator keeps what the objective needs.")
    context_length: int = argument(64, "Transitions a training row; rows hold one token more. Ours, not searched.")
    transition_steps: int = argument(8, "Transitions that a gradient crosses [k]; divides `context_length`.")
    readout_weight: float = argument(1.0, "Weight of the next-token loss on the student's memories. Ours.")
    readout_warmup_ratio: float = argument(0.0, "Share of the phase over which `readout_weight` is reached. Ours.")
    trainable: list[str] | None = argument(
        None,
        "Parts that the phase trains, of teacher, embeddings, updater and readout; the others stay bit-equal. Default: "
        "all that its losses reach.",
    )
    continue_previous_phase: bool = argument(
        False,
        "Go on with the previous phase's learning-rate schedule and the student's optimiser state instead of starting "
        "both anew. Ours: going on was better for dmt (2.70 bits/byte against 2.80).",
    )
    schedule_offset: int = argument(0, "Steps of the schedule that earlier phases have used. Set by the pipeline.")
    schedule_steps: int = argument(0, "Steps of the whole schedule, 0: of this phase. Set by the pipeline.")

    def __post_init__(self):
        if self.trainable is not None:
            words = [self.trainable] if isinstance(self.trainable, str) else self.trainable
            self.trainable = [part for word in words for part in word.replace(",", " ").split()]
            if not self.trainable:
                raise ValueError("`trainable` names no part: leave it out to train all that the phase can.")
            trained_parts(self.phase, getattr(self, "trains_updater", True), self.trainable)
        if self.curriculum_levels is not None:
            given = self.curriculum_levels if isinstance(self.curriculum_levels, list) else [self.curriculum_levels]
            self.curriculum_levels = [level for word in given for level in str(word).replace(",", " ").split()]
            if not all(level.isdecimal() for level in self.curriculum_levels):
                raise ValueError(f"`curriculum_levels` must be numbers joined by commas, got {given!r}.")
            if not self.levels or self.levels != sorted(set(self.levels)):
                raise ValueError(f"`curriculum_levels` must be rising difficulties, got {given!r}.")
        if self.lr_scheduler_kwargs is None and str(self.lr_scheduler_type).endswith("cosine_with_min_lr"):
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        if not torch.accelerator.is_available():
            self.use_cpu = True  # DeepSpeed and accelerate's launcher look for it, and for a GPU without it
        under_deepspeed = bool(self.deepspeed) or launched_with_deepspeed()
        if under_deepspeed:
            settle_deepspeed()
        autocasts = under_deepspeed and (self.bf16 or LAUNCHED_PRECISION == "bf16")
        if autocasts:
            # DeepSpeed's own bfloat16 would make memories and norms of half precision, too.
            self.bf16 = False
            os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
        if self.fp16 or LAUNCHED_PRECISION == "fp16":
            raise ValueError(
                "`fp16` is not supported: the memory is carried over thousands of steps, and a loss scale hides what "
                "overflows. Use `bf16`."
            )
        super().__post_init__()
        if autocasts:
            autocast_by_deepspeed(self.deepspeed_plugin)
        if self.distributed_state is not None and self.distributed_state.device.type == "cpu":
            # transformers 5.17 loads to this device, and torch knows no "cpu:0" there.
            self.distributed_state.device = torch.device("cpu")
            vars(self)["_setup_devices"] = torch.device("cpu")  # what `device` has been computed to already
        if self.global_batch_size is not None:
            parts = self.world_size * self.gradient_accumulation_steps
            if self.global_batch_size < 1 or self.global_batch_size % parts:
                raise ValueError(
                    f"`global_batch_size` ({self.global_batch_size}) of the {self.phase} phase must be a multiple of "
                    f"{parts}: {self.world_size} process(es) times {self.gradient_accumulation_steps} step(s) of "
                    "gradient accumulation."
                )
            self.per_device_train_batch_size = self.global_batch_size // parts
        if self.max_seconds is not None:
            if self.max_seconds <= 0:
                raise ValueError(f"`max_seconds` of the {self.phase} phase must be positive, got {self.max_seconds}.")
            if self.warmup_steps >= 1:
                raise ValueError("with `max_seconds`, `warmup_steps` must be a share of the phase, below 1.")
            self.max_steps = UNBOUNDED
        self._try_scheduler()
        if self.matrix_optimizer not in MATRIX_OPTIMIZERS:
            raise ValueError(
                f"unknown `matrix_optimizer` {self.matrix_optimizer!r}: choose one of {', '.join(MATRIX_OPTIMIZERS)}."
            )
        optim = str(getattr(self.optim, "value", self.optim))
        if self.matrix_optimizer == "muon" and not optim.startswith("adamw_torch"):
            raise ValueError(
                f"`matrix_optimizer=muon` trains the rest by torch's AdamW and has no use for `optim={optim}`: leave "
                "one of the two out."
            )
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False
        for name in ("context_length", "transition_steps", "max_steps"):
            if getattr(self, name) == 0 or getattr(self, name) < (-1 if name == "max_steps" else 1):
                raise ValueError(f"`{name}` of the {self.phase} phase must be at least 1, got {getattr(self, name)}.")
        # Other rows are padded to a multiple, which costs little.
        if self.context_length % self.transition_steps and getattr(self, "carries_memory", False):
            raise ValueError(
                f"`transition_steps` ({self.transition_steps}) of the {self.phase} phase must divide its "
                f"`context_length` ({self.context_length})."
            )
        if self.gradient_checkpointing or getattr(self, "activation_checkpointing", False):
            raise ValueError(
                "activation checkpointing is not supported: a chunk of `transition_steps` is short already."
            )
        if self.label_smoothing_factor:
            raise ValueError("`label_smoothing_factor` is not supported by the objectives: leave it at 0.")
        for name in (own.name for own in fields(self)):
            if name.endswith("_weight") and getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if not any(getattr(self, own.name) for own in fields(self) if own.name in _LOSS_WEIGHTS):
            raise ValueError(f"every loss of the {self.phase} phase has weight 0: there is nothing to train.")
        for name in (own.name for own in fields(self)):
            if name.endswith(("_fraction", "_warmup_ratio")) and not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie between 0 and 1, got {getattr(self, name)}.")

    def _try_scheduler(self) -> None:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        try:
            get_scheduler(self.lr_scheduler_type, optimizer, 1, 10, self.lr_scheduler_kwargs)
        except TypeError as error:
            raise ValueError(
                f"`lr_scheduler_kwargs` {self.lr_scheduler_kwargs} do not fit `lr_scheduler_type` "
                f"{getattr(self.lr_scheduler_type, 'value', self.lr_scheduler_type)}: {error}."
            ) from error

    @property
    def levels(self) -> list[int]:
        """`curriculum_levels` as numbers; empty where the phase has none."""
        return [int(level) for level in self.curriculum_levels or ()]

    def objective(self) -> Objective:
        """The settings that the composite's `forward` needs."""
        own = {entry.name: getattr(self, entry.name) for entry in fields(Objective) if hasattr(self, entry.name)}
        return Objective(**{**own, "phase": self.phase})


@dataclass
class SMTTrainingArguments(PhaseArguments):
    """Supervised memory training: student and teacher together, chunks start at the teacher's memories."""

    phase = "smt"

    dynamics_weight: float = argument(0.1, "Weight of Eq. 3, squared error to the teacher's memories. Paper.")
    dynamics_warmup_ratio: float = argument(0.0, "Share of the phase over which `dynamics_weight` is reached. Ours.")
    normalized_dynamics_weight: float = argument(
        0.0,
        "Weight of the squared error divided by the labels' variance per coordinate. Ours: without it the teacher can "
        "hide what matters in directions of little variance. 1 on the probes (retrieval 64 in 45 s: 91.6 % with "
        "it, 11.9 % without; modular arithmetic 7: 90.7 and 92.9 %) and on digits (after 24 s 2.122 bits a pixel "
        "against 2.302); on text it changes nothing.",
    )
    dynamics_starts_below: float | None = argument(
        None,
        "Nats a label: the dynamics terms stay at 5 % of their weight while the running loss of the readout on the "
        "teacher's memories (else the predictive loss) is above; `None`: they do not wait. Ours.",
    )
    dynamics_full_below: float | None = argument(
        None, "Nats a label at which they reach their full weight, linearly from `dynamics_starts_below`. Ours."
    )
    consistency_weight: float = argument(
        0.0, "Weight of predictive consistency: the future decoded from the student's state at chunk ends. Ours."
    )
    num_consistency_chunks: int = argument(2, "Chunk ends a row that are decoded. Ours.")
    hard_chunk_fraction: float = argument(
        0.7, "Share of them at the row's chunk with the largest dynamics error, the rest anywhere. Ours."
    )
    teacher_readout_weight: float = argument(
        0.0, "Weight of the next-token loss of the student's readout on all the teacher's memories. Ours."
    )
    num_supervised_transitions: int = argument(
        0, "Random transitions a row that are supervised, each with labels of its own; 0: all. Paper: 1."
    )
    label_stride: int = argument(
        1, "dmt: tokens between two labels of the dynamics loss [the paper's k]. Paper: 16. Ours: 1, labels are cheap."
    )
    trains_updater: bool = argument(
        True,
        "smt: false: the teacher and the readout of its memories alone, before a phase that trains the student; a "
        "curriculum then goes by the teacher. Ours: solves in seconds what the student learns from it afterwards.",
    )
    readout_trains_updater: bool = argument(True, "The readout loss on the student's memories reaches the updater.")
    predictive_weight: float = argument(1.0, "Weight of Eq. 2, the future decoded from the teacher's memory. Paper.")
    predictive_warmup_ratio: float = argument(0.0, "Share of the phase over which `predictive_weight` is reached.")
    num_predictive_positions: int = argument(8, "Random positions a row whose future is decoded. Ours, not searched.")
    future_length: int = argument(
        8, "Tokens decoded from a memory [T_f]; shorter than `context_length`. Ours, not searched."
    )
    uniformity_weight: float = argument(0.001, "Weight of Eq. 4, spread of the memory tokens. Paper.")
    uniformity_warmup_ratio: float = argument(0.0, "Share of the phase over which `uniformity_weight` is reached.")
    teacher_weight: float = argument(1.0, "Weight of the teacher's own next-token loss. Ours: helps, costs little.")
    on_policy_fraction: float = argument(
        0.5, "Share of rows whose chunks start from the student's own memories. Ours, not searched."
    )
    on_policy_warmup_ratio: float = argument(0.1, "Share of the phase before the first own memories. Ours.")
    on_policy_mode: str = argument(
        "parallel",
        "Where own memories come from: `sequential` (rolled from m_0: all ages, T cheap steps), `parallel` (sweeps "
        "over all chunks at once: ages up to `on_policy_sweeps` chunks) or `aggregate` (sequential ones, kept and "
        "reused).",
    )
    on_policy_sweeps: int = argument(1, "Sweeps of the `parallel` mode. Ours.")

    def __post_init__(self):
        super().__post_init__()
        if self.on_policy_mode not in ON_POLICY_MODES:
            raise ValueError(
                f"unknown `on_policy_mode` {self.on_policy_mode!r}: choose one of {', '.join(ON_POLICY_MODES)}."
            )
        if self.phase == "smt" and self.on_policy_mode == "aggregate":
            raise ValueError("`on_policy_mode=aggregate` needs a frozen teacher: use it in the dmt phase.")
        if self.on_policy_mode == "aggregate" and self.on_policy_fraction < 1:
            raise ValueError(
                "`on_policy_mode=aggregate` keeps own memories of every row: set `on_policy_fraction` to 1."
            )
        if (self.dynamics_starts_below is None) != (self.dynamics_full_below is None):
            raise ValueError("set both `dynamics_starts_below` and `dynamics_full_below`, or neither.")
        only_own = (
            self.on_policy_fraction == 1 and not self.on_policy_warmup_ratio and self.on_policy_mode != "parallel"
        )
        if self.label_stride > 1 and (self.phase != "dmt" or not only_own):
            raise ValueError(
                "`label_stride` above 1 is for the dmt phase with `on_policy_fraction` 1, `on_policy_warmup_ratio` 0 "
                "and an `on_policy_mode` other than parallel: chunks start from own memories alone."
            )
        if self.num_supervised_transitions and self.phase != "smt":
            raise ValueError("`num_supervised_transitions` is for the smt phase; in dmt, set `label_stride`.")
        if not self.trains_updater and (self.phase != "smt" or self.num_supervised_transitions):
            raise ValueError("`trains_updater` false is for an smt phase without `num_supervised_transitions`.")
        if not self.trains_updater and not (
            self.teacher_readout_weight or self.predictive_weight or self.teacher_weight
        ):
            raise ValueError(
                "an smt phase that does not train the updater needs a `teacher_readout_weight`, `predictive_weight` or "
                "`teacher_weight` above 0."
            )
        if not self.trains_updater:
            for name in ("normalized_dynamics_weight", "consistency_weight", "dynamics_starts_below"):
                if getattr(self, name):
                    raise ValueError(f"a phase that does not train the updater has no use for `{name}`: leave it out.")
        if not self.trains_updater and self.curriculum_threshold is not None and not self.teacher_readout_weight:
            raise ValueError(
                "`curriculum_threshold` where the updater is not trained goes by the readout of the teacher's "
                "memories: set `teacher_readout_weight` above 0."
            )
        if self.dynamics_starts_below is not None and (self.phase != "smt" or self.num_supervised_transitions):
            raise ValueError(
                "`dynamics_starts_below` waits for a teacher that is being trained on all positions: use it in the smt "
                "phase without `num_supervised_transitions`."
            )
        if self.num_supervised_transitions:
            for name in ("normalized_dynamics_weight", "consistency_weight", "teacher_readout_weight"):
                if getattr(self, name):
                    raise ValueError(f"`num_supervised_transitions` has no use for `{name}`: set it to 0.")
        if (
            self.trains_updater
            and self.curriculum_threshold is not None
            and not (self.on_policy_mode == "sequential" and self.on_policy_fraction > 0 and self.readout_weight > 0)
        ):
            raise ValueError(
                "`curriculum_threshold` needs the student's own rollout: set `on_policy_mode` to sequential, and "
                "`on_policy_fraction` and `readout_weight` above 0."
            )
        if self.curriculum_threshold is not None and self.num_supervised_transitions:
            raise ValueError("`curriculum_threshold` needs whole rollouts: set `num_supervised_transitions` to 0.")
        for name in (
            "num_predictive_positions",
            "on_policy_sweeps",
            "future_length",
            "num_consistency_chunks",
            "label_stride",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.num_supervised_transitions < 0:
            raise ValueError(
                f"`num_supervised_transitions` must not be negative, got {self.num_supervised_transitions}."
            )


@dataclass
class DMTTrainingArguments(SMTTrainingArguments):
    """DAgger memory training: the teacher is frozen, the student starts from its own memories."""

    phase = "dmt"

    max_steps: int = argument(500, "Optimiser steps of the phase. Ours: as many seconds as smt on two CPU cores.")
    transition_steps: int = argument(1, "Transitions that a gradient crosses [k]. Paper: 1.")
    dynamics_weight: float = argument(
        1.0, "Weight of Eq. 6, squared error to the teacher's memories. Paper: 10. Ours: 1, see the next."
    )
    readout_trains_updater: bool = argument(
        True,
        "The readout loss on the student's memories reaches the updater. Paper: no. Ours: yes; after smt8 the paper's "
        "phase made the student worse (2.66 to 2.70 bits/byte), this one better (2.66 to 2.54).",
    )
    continue_previous_phase: bool = argument(True, PhaseArguments.__dataclass_fields__[_CONTINUE].metadata["help"])
    on_policy_fraction: float = argument(1.0, "Share of rows whose chunks start from own memories. Paper: all.")
    on_policy_warmup_ratio: float = argument(0.0, "Share of the phase before the first own memories. Paper.")
    on_policy_mode: str = argument(
        "sequential", SMTTrainingArguments.__dataclass_fields__["on_policy_mode"].metadata["help"]
    )
    aggregate_capacity: int = argument(512, "Rows whose own memories are kept in the `aggregate` mode. Ours.")
    aggregate_fraction: float = argument(0.5, "Share of rows taken from the kept ones in the `aggregate` mode. Ours.")
    label_cache_dir: str | None = argument(
        None,
        "Folder in which the frozen teacher's memories of every training row are kept, under a name made of teacher "
        "and data: epochs after the first do without the teacher. 4 bytes a number: rows x transitions x memory.",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.label_cache_dir and self.on_policy_mode == "aggregate":
            raise ValueError("`label_cache_dir` does not fit `on_policy_mode=aggregate`, which exchanges rows.")


@dataclass
class BPTTTrainingArguments(PhaseArguments):
    """Backpropagation through time, without a teacher: the rival, and a way to fine-tune after DMT.

    `transition_steps == context_length` is full BPTT, every row from `m_0`; below it, rows are read in windows of
    `transition_steps` with the memory carried on and its gradient cut (truncated BPTT).
    """

    phase = "bptt"

    per_device_train_batch_size: int = argument(
        48, "Streams a device. Ours: 32 was level (2.150 against 2.147 bits/byte)."
    )
    max_steps: int = argument(2800, "Optimiser steps of the phase. Ours: three quarters of 4 minutes on two CPU cores.")
    context_length: int = argument(256, "Transitions a row, over which the memory is carried. Ours, not searched.")
    transition_steps: int = argument(
        16, "Transitions a window. Ours: of 8, 16 and 32 the best with Muon in 180 s on text (text.jsonl)."
    )
    carries_memory: bool = argument(
        True,
        "True: windows of a row are read in consecutive steps. False: a row a step, as many windows as it has, for "
        "rows of different lengths.",
    )
    continue_previous_phase: bool = argument(True, PhaseArguments.__dataclass_fields__[_CONTINUE].metadata["help"])

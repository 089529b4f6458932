"""The arms whose training steps are measured: what each of them trains.

- **published**: SMT as published. A bidirectional teacher makes two labels per row, each from a window of its own
  (`context_length` tokens), and one transition per row is supervised. Losses: predictive, dynamics, uniformity.
- **smt**, **smt8**: ours. A causal teacher makes the labels of all prefixes in one pass and every transition of every
  row is supervised, by a gradient that crosses 1 or 8 transitions; all losses that are on by default.
- **smt8_compiled**: the same with the student's transition compiled by `torch.compile`.
- **bptt_truncated**, **bptt**: the baseline without a teacher, in windows with a carried memory (one step per window)
  and over the whole row.

Student, rows, number of rows and context are equal, as are layers and width of the two teachers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import set_seed

from smt_hf.command_line import argument
from smt_hf.errors import InputError
from smt_hf.student import SMTRecurrentConfig
from smt_hf.teachers import SMTTeacherConfig, SMTWindowedTeacherConfig
from smt_hf.training.arguments import BPTTTrainingArguments, PhaseArguments, SMTTrainingArguments
from smt_hf.training.composite import SMTForPreTraining, SMTPreTrainingConfig

from .arguments import BenchmarkArguments

PUBLISHED = "published"
# Arm -> transitions that a gradient crosses.
OURS = {"smt": 1, "smt8": 8, "smt8_compiled": 8}
ARMS = (PUBLISHED, "smt", "smt8", "bptt_truncated", "bptt", "smt8_compiled")


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class TrainStepArguments(BenchmarkArguments):
    """Arms, sizes and how long. Of a `model` only the sizes are used: every arm starts from fresh weights."""

    arms: list[str] = argument(list(ARMS), f"Arms to measure, side by side; {PUBLISHED} is the baseline.")
    context_length: int = argument(64, "Transitions per row, and tokens that a teacher sees. Paper: 256.")
    batch_size: int = argument(16, "Rows per step of every arm. Paper: 128.")
    future_length: int = argument(8, "Tokens decoded from a memory. Paper: 64.")
    on_policy_fraction: float = argument(0.5, "Share of rows of smt and smt8 that start from own memories.")
    bptt_window: int = argument(16, "Transitions per window of bptt_truncated; divides `context_length`.")
    teacher_hidden_size: int | None = argument(None, "Width of both teachers; default: theirs. Paper: 256.")
    teacher_layers: int | None = argument(None, "Layers of both teachers; default: theirs. Paper: 8.")
    teacher_heads: int | None = argument(None, "Heads of both teachers; default: theirs. Paper: 8.")
    device: str = argument(_default_device, "cpu or cuda; default: cuda where there is one.")
    warmup_steps: int = argument(3, "Untimed steps of every arm.")
    steps: int = argument(10, "Timed steps of an arm in a repeat.")
    repeats: int = argument(7, "Repeats, each of which runs all arms; medians count.")
    memory_steps: int = argument(3, "Steps of an arm in a fresh process whose peak memory is read; 0: leave it out.")
    reach_seconds: float | None = argument(
        None, f"Seconds of training of {PUBLISHED}; ours then trains until it reaches that loss. Default: none."
    )
    reach_interval: float = argument(2.0, "Seconds of training between two evaluations of the held-out loss.")
    heldout_rows: int = argument(2048, "Held-out rows, of which the token after the last is predicted.")
    learning_rate: float = argument(4e-3, "Learning rate of ours in training for `reach_seconds`.")
    published_learning_rates: list[float] = argument(
        [4e-3, 1e-3], f"Learning rates of {PUBLISHED}, which is trained once with each; the best one counts."
    )
    train_file: str | None = argument(None, "Text to train on; default: the embedded corpus.")

    def __post_init__(self):
        super().__post_init__()
        self.at_least_1("context_length", "batch_size", "future_length", "bptt_window")
        self.at_least_1("warmup_steps", "steps", "repeats", "heldout_rows")
        self.among("arms", ARMS)
        if PUBLISHED not in self.arms:
            raise InputError(f"`arms` must contain {PUBLISHED}: the others are measured against it.")
        if self.device not in ("cpu", "cuda") or (self.device == "cuda" and not torch.cuda.is_available()):
            raise InputError(f"`device` must be cpu, or cuda where there is one, got {self.device!r}.")
        if self.memory_steps < 0:
            raise InputError(f"`memory_steps` must not be negative, got {self.memory_steps}.")
        self.positive("reach_interval", "reach_seconds", "learning_rate", "published_learning_rates")
        if self.context_length % self.bptt_window:
            raise InputError(
                f"`bptt_window` ({self.bptt_window}) must divide `context_length` ({self.context_length})."
            )


def phase_of(arguments: TrainStepArguments, arm: str, folder: str, **fields) -> PhaseArguments:
    """The phase that an arm trains."""
    shared: dict[str, Any] = {
        "output_dir": folder,
        "seed": arguments.seed,
        "use_cpu": arguments.device == "cpu",
        "per_device_train_batch_size": arguments.batch_size,
        "context_length": arguments.context_length,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **fields,
    }
    if arm.startswith("bptt"):
        steps = arguments.bptt_window if arm == "bptt_truncated" else arguments.context_length
        return BPTTTrainingArguments(transition_steps=steps, **shared)
    shared["future_length"] = arguments.future_length
    if arm == PUBLISHED:
        return SMTTrainingArguments(
            transition_steps=1,
            num_supervised_transitions=1,
            teacher_weight=0.0,
            readout_weight=0.0,
            on_policy_fraction=0.0,
            **shared,
        )
    return SMTTrainingArguments(transition_steps=OURS[arm], on_policy_fraction=arguments.on_policy_fraction, **shared)


def build(arguments: TrainStepArguments, arm: str, config: SMTRecurrentConfig) -> SMTForPreTraining:
    """A fresh student, the same for all arms, with the arm's teacher."""
    set_seed(arguments.seed)
    if arm.startswith("bptt"):
        return SMTForPreTraining(SMTPreTrainingConfig(student=config.to_dict()))
    given = {
        "hidden_size": arguments.teacher_hidden_size,
        "num_hidden_layers": arguments.teacher_layers,
        "num_attention_heads": arguments.teacher_heads,
    }
    teacher: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if arm == PUBLISHED:
        teacher |= {"model_type": SMTWindowedTeacherConfig.model_type, "context_length": arguments.context_length}
    else:
        teacher |= {"model_type": SMTTeacherConfig.model_type, "sliding_window": arguments.context_length}
    return SMTForPreTraining(SMTPreTrainingConfig(student=config.to_dict(), teacher=teacher))

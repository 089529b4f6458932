"""The drift contract: what the student's free run loses against its teacher, measured in every evaluation.

`smt_hf.evaluation.free_run` says what is measured; here is when, on which rows, and what is said about it.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from smt_hf.command_line import argument
from smt_hf.data.batching import rows_at
from smt_hf.errors import InputError
from smt_hf.evaluation.free_run import means_of

from .cached_teacher import CachedTeacherTrainer

# What mends drift, by phase. The flags are those of `recipes/pretrain.py`.
_REMEDIES = {
    "smt": "let a `dmt` phase follow (`--phases smt,dmt`), or raise `smt_on_policy_fraction`",
    "dmt": (
        "train longer (`dmt_max_steps`), let gradients cross more transitions (`dmt_transition_steps`), or start from "
        "memories of all ages (`dmt_on_policy_mode` sequential)"
    ),
}
_DRIFT_BY_AGE = "drift_by_age"


@dataclass
class DriftArguments(TrainingArguments):
    """What all phases say about drift. Not used by itself."""

    # Whether a later phase of the pipeline trains the free run: drift is then no fault of the run. Set by `lay_out`.
    drift_is_mended = False

    drift_rows: int = argument(
        16,
        "Held-out rows, the first ones, on which every evaluation measures drift by age and the Lyapunov exponent; "
        "0: none. Ours: few, since an evaluation costs a forward pass per age on them.",
    )
    drift_warning: float | None = argument(
        0.2,
        "Nats per label: warn, once per phase and from its middle on, if the student's own rollout loses more than "
        "this against the teacher's memories and neither dmt nor bptt follows. Ours, not searched.",
    )

    def __post_init__(self):
        if self.drift_rows < 0:
            raise InputError(f"`drift_rows` must not be negative, got {self.drift_rows}.")
        if self.drift_warning is not None and not (math.isfinite(self.drift_warning) and self.drift_warning >= 0):
            raise InputError(f"`drift_warning` must be a finite number of at least 0, got {self.drift_warning}.")
        super().__post_init__()


class DriftWatchingTrainer(CachedTeacherTrainer):
    """A Trainer of an `SMTForPreTraining` whose evaluations measure drift and exponent on the first `drift_rows` rows.

    Metrics, for rows that are scored: `eval_drift_by_age` (a dict: age as a string -> nats per label, see
    `loss_by_age`), `eval_teacher_forced`, `eval_free_run` (nats per label) and `eval_lyapunov` (nats per token, see
    `largest_lyapunov`). They are in what `evaluate` returns and in `log_history`. Trackers of `report_to` take numbers
    alone: they get `eval_drift_by_age/8` for age 8, and so on.

    Every rank measures the same rows in one batch, so that the values depend neither on the number of processes nor on
    the batch size. The rows go through the composite's forward, as those of training do: shards are gathered there.

    Left out are: all of it, in a phase without transitions and for a dataset that can only be iterated over; the
    losses, in bptt, whose readout no longer reads the teacher's memories, and where the teacher needs a pass per
    position; the exponent, under DeepSpeed in bfloat16, which may have no float32 weights at hand.

    [`PhaseTrainer`] is built on it.
    """

    _evaluated: Any = None  # the module that the evaluation calls
    _has_warned = False

    def compute_loss(self, model, *args, **kwargs):
        if not model.training:
            self._evaluated = model
        return super().compute_loss(model, *args, **kwargs)

    def evaluation_loop(self, dataloader, *args, **kwargs):
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        model, self._evaluated = self._evaluated, None
        prefix = kwargs.get("metric_key_prefix", "eval")
        means = self._measured(model, dataloader.dataset)
        self._warn_of_drift(means)
        if _DRIFT_BY_AGE in means:
            means[_DRIFT_BY_AGE] = {str(age): value for age, value in means[_DRIFT_BY_AGE].items()}
        output.metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        return output

    def _measured(self, model, rows) -> dict[str, Any]:
        """The means of `free_run.means_of` over the first rows; the same on all ranks. A collective call."""
        arguments = self.args
        if model is None or isinstance(rows, IterableDataset) or not arguments.trains_updater:
            return {}
        num_rows = min(arguments.drift_rows, len(rows))
        if not num_rows:
            return {}
        batch = self._prepare_inputs(self.data_collator(rows_at(rows, list(range(num_rows)))))
        inputs = {
            name: batch[name] for name in ("input_ids", "attention_mask", "labels", "document_ids") if name in batch
        } | self.first_cached(num_rows)
        plugin = arguments.deepspeed_plugin if self.is_deepspeed_enabled else None
        in_half = plugin is not None and "torch_autocast" in plugin.hf_ds_config.config
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, objective=self.objective, measures_exponent=not in_half, measures_free_run=True)
        return means_of(outputs.free_run)

    def _warn_of_drift(self, means: dict[str, Any]) -> None:
        """Once per phase, from its middle on: before, the student has not caught up with its teacher."""
        arguments = self.args
        loss = means["free_run"] - means["teacher_forced"] if "free_run" in means else 0.0
        if arguments.drift_warning is None or not loss > arguments.drift_warning:
            return
        trains = any(parameter.requires_grad for parameter in self.model.student.model.updater.parameters())
        if self._has_warned or arguments.drift_is_mended or not trains or self._progress() < 0.5:
            return
        self._has_warned = True
        if not self.is_world_process_zero():
            return
        ages = ", ".join(f"{value:.3f} at age {age}" for age, value in means[_DRIFT_BY_AGE].items())
        exponent = f" Its Lyapunov exponent is {means['lyapunov']:.3f} per token." if "lyapunov" in means else ""
        warnings.warn(
            f"the student drifts from its teacher in the {arguments.phase} phase: its own rollout has "
            f"{means['free_run']:.3f} nats per label, the teacher's memories {means['teacher_forced']:.3f}. That is "
            f"more than `drift_warning` ({arguments.drift_warning:g}) apart. By the age of a memory: {ages}.{exponent} "
            f"To mend it, {_REMEDIES[arguments.phase]}.",
            stacklevel=2,
        )

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """As in transformers, but that callbacks get one number per entry of a dict."""
        by_name = {name: value for name, value in logs.items() if isinstance(value, dict)}
        entries = {f"{name}/{key}": value for name, own in by_name.items() for key, value in own.items()}
        numbers = {name: value for name, value in logs.items() if name not in by_name}
        super().log({**numbers, **entries}, start_time)
        if by_name:
            line = self.state.log_history[-1]
            self.state.log_history[-1] = {name: value for name, value in line.items() if name not in entries} | by_name

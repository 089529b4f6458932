"""The Trainer of each phase: what a phase carries between steps besides weights."""

from typing import Any

import torch

from smt_hf.data.batching import IndexedExamples
from smt_hf.errors import InputError
from smt_hf.student import SMTRecurrentForCausalLM

from .arguments import BPTTTrainingArguments, DMTTrainingArguments, SMTTrainingArguments
from .carrying import CarryingTrainer
from .composite import SMTForPreTraining
from .label_cache import LabelCache
from .phase_trainer import PhaseTrainer
from .rollout import example_uniforms

_STREAM_AGGREGATE = 8  # beside the streams of random numbers in positions.py


class SMTTrainer(CarryingTrainer):
    """Trains student and teacher together by supervised memory training.

    Takes [`SMTTrainingArguments`]; see [`PhaseTrainer`] for the others.
    """

    arguments_class = SMTTrainingArguments
    _tag_names = ["smt"]

    @property
    def carries_memory(self) -> bool:
        return self.args.carries_teacher_memory

    def _check(self, model, args) -> None:
        super()._check(model, args)
        if args.carries_teacher_memory and not getattr(model.teacher, "can_go_on", False):
            raise InputError(
                f"the teacher ({model.config.teacher.model_type}) cannot go on from a memory: leave "
                "`carries_teacher_memory` out, or take a teacher that can (smt_fast_weight_teacher)."
            )
        if model.teacher is not None and not model.teacher.has_next_token_head and args.teacher_weight:
            raise InputError(
                f"the teacher ({model.teacher.config.model_type}) has no next-token head: set `teacher_weight` of the "
                "smt phase to 0."
            )


class RowMemories:
    """Rows met in earlier steps, with the memories that the student of that time had on them.

    Args:
        capacity: rows kept; a row's place is its example number modulo it.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.kept: dict[str, torch.Tensor] = {}
        self._pending: list[tuple[torch.Tensor, ...]] = []
        self._pending_step = 0

    def exchange(self, inputs: dict, step: int, fraction: float, seed: int) -> torch.Tensor:
        """Put kept rows in the place of a share `fraction` of the batch, in `inputs`.

        Returns:
            `(B,)` bool, rows that are still the batch's own.
        """
        if self._pending_step != step:
            self.keep_pending()
        numbers = inputs["example_ids"]
        if not self.kept:
            return torch.ones_like(numbers, dtype=torch.bool)
        noise = example_uniforms(numbers, 2, seed, _STREAM_AGGREGATE)
        slots = (noise[:, 1] * self.capacity).long().cpu()
        old = (noise[:, 0] < fraction).cpu() & self.kept["filled"][slots]
        old_here, device = old.to(numbers.device), numbers.device
        for name in ("input_ids", "labels"):
            inputs[name] = torch.where(old_here[:, None], self.kept[name][slots].to(device), inputs[name])
        starts = self.kept["starts"][slots]
        inputs["stored_starts"] = starts.masked_fill(~old[:, None, None, None], float("nan")).to(device)
        return ~old_here

    def remember(self, inputs: dict, starts: torch.Tensor, new: torch.Tensor, step: int) -> None:
        """Note the new rows of a batch; they are kept from the next optimiser step on."""
        rows = (inputs["example_ids"], inputs["input_ids"], inputs["labels"], starts)
        self._pending.append(tuple(row[new].cpu() for row in rows))
        self._pending_step = step

    def keep_pending(self) -> None:
        """Only what earlier optimiser steps have seen is reused, so that micro-batches do not see each other."""
        for numbers, input_ids, labels, starts in self._pending:
            values = {"input_ids": input_ids, "labels": labels, "starts": starts}
            if not self.kept:
                self.kept = {name: value.new_zeros(self.capacity, *value.shape[1:]) for name, value in values.items()}
                self.kept["filled"] = torch.zeros(self.capacity, dtype=torch.bool)
            slots = numbers % self.capacity
            self.kept["filled"][slots] = True
            for name, value in values.items():
                self.kept[name][slots] = value
        self._pending = []


class DMTTrainer(PhaseTrainer):
    """Trains the student on its own memories towards those of the frozen teacher [Sec. 3.3].

    Takes [`DMTTrainingArguments`]; see [`PhaseTrainer`] for the others. In the `aggregate` mode a share of every batch
    is replaced by rows met before, with the memories that the student of that time had on them.
    """

    arguments_class = DMTTrainingArguments
    _tag_names = ["smt", "dmt"]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._met: RowMemories | None = None
        if self.objective.on_policy_mode == "aggregate":
            if self.args.world_size > 1:
                raise InputError("`on_policy_mode=aggregate` keeps its memories in one process: use `sequential`.")
            self._met = RowMemories(self.args.aggregate_capacity)
        self._label_cache: LabelCache | None = None
        if self.args.label_cache_dir and self.train_dataset is not None:
            self._label_cache = self._open_label_cache()

    def _open_label_cache(self) -> LabelCache:
        if self._is_sharded:  # one rank may have its rows and another not, and all would wait for the teacher
            raise InputError("`label_cache_dir` is for one process or DDP: leave it out with DeepSpeed and FSDP.")
        rows: Any = getattr(self.train_dataset, "rows", [{"levels": ()}])
        if not isinstance(self.train_dataset, IndexedExamples) or "levels" in rows[0]:
            raise InputError("`label_cache_dir` needs an indexed dataset without levels: leave it out here.")
        if "attention_mask" in rows[0] or "document_ids" in rows[0]:
            raise InputError("`label_cache_dir` needs packed rows without padding: leave it out here.")
        student = self.model.config.student
        num_labels = (len(rows[0]["input_ids"]) - 1) // self.args.label_stride
        shape = (num_labels, student.num_memory_tokens, student.hidden_size)
        precision = self.accelerator.mixed_precision
        cache = LabelCache(
            self.args.label_cache_dir, self.model.teacher, rows, shape, (self.args.label_stride, precision)
        )
        for creates in (True, False):
            if creates == (self.args.local_process_index == 0):
                cache.open(creates)
            self.accelerator.wait_for_everyone()
        return cache

    def _before_forward(self, inputs: dict) -> dict:
        carried = super()._before_forward(inputs)
        if not self.model.training:
            return carried
        if self._label_cache is not None:
            labels = self._label_cache.get(inputs["example_ids"])
            if labels is None:
                carried["labels_of"] = inputs["example_ids"]
            else:
                inputs["memory_labels"] = labels.to(inputs["input_ids"].device)
        if self._met is not None:
            if "attention_mask" in inputs or "document_ids" in inputs:
                raise InputError("`on_policy_mode=aggregate` needs packed rows without padding: use `sequential`.")
            carried["new"] = self._met.exchange(
                inputs, self.state.global_step, self.args.aggregate_fraction, self.objective.seed
            )
        return carried

    def _after_forward(self, inputs: dict, outputs, carried: dict) -> None:
        if self._label_cache is not None and "labels_of" in carried:
            self._label_cache.put(carried["labels_of"], outputs.memory_labels)
        if self._met is not None:
            self._met.remember(inputs, outputs.starts, carried["new"], self.state.global_step)

    def _carried_tensors(self) -> dict[str, torch.Tensor]:
        if self._met is None:
            return {}
        self._met.keep_pending()
        return dict(self._met.kept)

    def _restore_carried(self, tensors: dict[str, torch.Tensor]) -> None:
        if self._met is None:
            raise InputError("the checkpoint is of a phase with `on_policy_mode=aggregate`: resume with it.")
        self._met.kept = tensors


class BPTTTrainer(CarryingTrainer):
    """Trains the student by backpropagation through time: truncated with a carried memory, or full.

    Takes an [`SMTForPreTraining`] or a bare [`SMTRecurrentForCausalLM`] (to fine-tune a published checkpoint; the
    trained student is `trainer.model.student`).
    """

    arguments_class = BPTTTrainingArguments
    _tag_names = ["bptt"]

    def __init__(self, model, *args, **kwargs):
        if isinstance(model, SMTRecurrentForCausalLM):
            model = SMTForPreTraining.from_student(model)
        super().__init__(model, *args, **kwargs)

    @property
    def carries_memory(self) -> bool:
        return self.args.carries_memory and self.args.transition_steps < self.args.context_length

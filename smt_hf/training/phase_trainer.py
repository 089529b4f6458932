"""The Trainer that the three phases share: named loss terms, data, optimiser, schedule and checkpoints.

The losses are in `SMTForPreTraining.forward`; nothing here calls a part of the model past the wrapped module.
"""

import json
import os
from contextlib import nullcontext
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from smt_hf.data.batching import EpochSampler, IndexedExamples, Levels, collate
from smt_hf.data.packing import StreamedRows
from smt_hf.errors import InputError
from smt_hf.student import SMTRecurrentForCausalLM

from .adapters import has_lora, merged_copy
from .arguments import PhaseArguments
from .checkpoints import CheckpointingTrainer
from .composite import SMTForPreTraining
from .drift_watch import DriftWatchingTrainer
from .launch import check_launch
from .long_rows import LongRowTrainer
from .optimizer import muon_with_adamw
from .pacing import VIRTUAL_STEPS_PER_SECOND, Pace, PhaseProgress, TrainingCost, shifted_schedule
from .pushing import StudentPushingTrainer
from .sharding import STUDENT_OPTIMIZER, give_state, whole_state
from .stopping import check_finite, leave_out_if_not_finite

_ROLLOUT_STATE = "rollout_state.safetensors"


class PhaseTrainer(DriftWatchingTrainer, LongRowTrainer, StudentPushingTrainer, CheckpointingTrainer):
    """Trains an [`SMTForPreTraining`] in one phase. Not used by itself: each phase has its own subclass.

    Args:
        model: an [`SMTForPreTraining`].
        args: the arguments of the phase.
        train_dataset: a dataset, or [`Levels`] of them for a curriculum; rows with `input_ids` (`context_length + 1`
            tokens each, as `smt_hf.data.pack` makes them; other lengths work, ragged ones are padded) and optionally
            `attention_mask`, `labels`, `document_ids`.
        eval_dataset: rows likewise. Evaluation adds `eval_rollout` (nats per token of the student's own rollout from
            `m_0`) to the terms of the phase, and `eval_drift` where the teacher `labels_all_positions`;
            [`DriftWatchingTrainer`] adds drift by age and the Lyapunov exponent.
        student_optimizer_state: name of a student parameter -> optimiser state to start from.
        curriculum_level: of the levels of `train_dataset`, the one to start with.

    Raises:
        InputError: the model has no teacher, or the arguments are of another phase.
    """

    arguments_class: type[PhaseArguments]

    def __init__(
        self,
        model: SMTForPreTraining,
        args: PhaseArguments | None = None,
        data_collator=collate,
        train_dataset=None,
        eval_dataset=None,
        student_optimizer_state: dict[str, dict[str, torch.Tensor]] | None = None,
        curriculum_level: int = 0,
        **kwargs,
    ):
        args = self.arguments_class() if args is None else args
        self._check(model, args)
        model.freeze_for(args.phase, args.trains_updater, args.trainable, args.objective())
        self.pace = Pace(
            len(train_dataset.levels) if isinstance(train_dataset, Levels) else 1,
            args.curriculum_threshold,
            curriculum_level,
        )
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        check_launch(self.accelerator, bool(args.deepspeed), bool(args.fsdp))
        if self.is_fsdp_enabled:  # autocast takes care of bfloat16; FSDP's own would take memories and norms along
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        if train_dataset is not None:
            self.train_dataset = self._numbered(train_dataset)
        self.objective = args.objective()
        if self.processing_class is not None:
            _take_special_tokens(model.student, self.processing_class)
        self.cost = TrainingCost()
        for callback in (self.cost, self.pace, _StepEnd(self)):
            self.add_callback(callback)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        if not args.disable_tqdm:
            self.add_callback(PhaseProgress(args.phase))
        self._student_optimizer_state = student_optimizer_state
        self._resting_state: dict[str, dict[str, torch.Tensor]] = {}  # of what this phase has frozen
        self._term_sums: dict[str, dict[str, torch.Tensor]] = {"train": {}, "eval": {}}
        self._num_items: dict[str, torch.Tensor | float] = {"train": 0.0, "eval": 0.0}
        self._step_sums: dict[str, torch.Tensor] = {}  # of the optimiser step, for `after_step`
        self._scored_rows: set[int] = set()  # of the evaluation

    def _check(self, model, args) -> None:
        if not isinstance(model, SMTForPreTraining):
            raise InputError(
                f"{type(self).__name__} trains an SMTForPreTraining (student and teacher), got {type(model).__name__}."
            )
        if not isinstance(args, PhaseArguments) or args.phase != self.arguments_class.phase:
            raise InputError(f"{type(self).__name__} takes {self.arguments_class.__name__}, got {type(args).__name__}.")

    def _numbered(self, rows, column: str = "example_ids"):
        """Rows under global numbers; an iterable dataset is left as it is (`collate` makes numbers for examples)."""
        is_counted = not isinstance(rows, IterableDataset) and hasattr(rows, "__len__")
        return IndexedExamples(rows, column) if is_counted else rows

    def get_train_dataloader(self):
        """As in transformers; a stream is split by rank already, and gives its batches to its own rank."""
        if not isinstance(self.train_dataset, StreamedRows):
            return super().get_train_dataloader()
        return DataLoader(self.train_dataset, self._train_batch_size, collate_fn=self.data_collator)

    def get_eval_dataloader(self, eval_dataset=None):
        """As in transformers; the rows are numbered, to find those that are served twice and those of a cache."""
        if self.args.world_size > 1 or self.has_cache:
            rows = self.eval_dataset if eval_dataset is None else eval_dataset
            eval_dataset = self._numbered(self.eval_dataset[rows] if isinstance(rows, str) else rows, "row_ids")
        return super().get_eval_dataloader(eval_dataset)

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(rows, IndexedExamples):
            return super()._get_train_sampler(train_dataset)
        return EpochSampler(len(rows), self._data_seed)

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Batches of all levels are fetched ahead of time; the level is chosen when the step begins."""
        return super().get_batch_samples(self._at_level(epoch_iterator), num_batches, device)

    def _at_level(self, batches):
        for batch in batches:
            yield batch["levels"][self.pace.level] if "levels" in batch else batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {**self._of_one_length(inputs), "objective": self.objective, "progress": self._progress()}
        inputs["dynamics_scale"] = self.pace.dynamics_scale(
            self.args.dynamics_starts_below, self.args.dynamics_full_below
        )
        carried = self._before_forward(inputs)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._record(outputs, "train" if model.training else "eval")
        if model.training:
            if not loss.requires_grad:
                raise InputError(
                    f"no loss of the {self.args.phase} phase reaches what it trains ({self.args.trainable}): give one "
                    "of its losses a weight, or let it train more."
                )
            check_finite(outputs.term_sums, self.state.global_step + 1, self.args.phase, inputs.get("example_ids"))
            self.cost.sequential_steps += outputs.sequential_steps
            self.cost.tokens += outputs.transitions * self.args.world_size
            self._keep_for_step(outputs)
            self._after_forward(inputs, outputs, carried)
        return (loss, outputs) if return_outputs else loss

    def _of_one_length(self, inputs: dict) -> dict:
        """Rows as long as the longest of any rank. Where weights are in shards, every call of the updater gathers them,
        and a rank whose rows are shorter would leave the others waiting."""
        if not self._is_sharded or self.args.world_size == 1:
            return inputs
        length, has_mask = inputs["input_ids"].shape[1], "attention_mask" in inputs
        own = torch.tensor([[length, has_mask]], device=self.args.device)
        longest, any_mask = self.accelerator.gather(own).amax(0).tolist()
        if longest == length and any_mask == has_mask:
            return inputs
        padded = {"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs}
        for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100), ("document_ids", -1)):
            if name in padded:
                padded[name] = nn.functional.pad(padded[name], (0, longest - length), value=fill)
        return padded

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None:
            leave_out_if_not_finite(norm, model, self.cost, self.args, self.state.global_step + 1)
        return norm

    def _keep_for_step(self, outputs) -> None:
        """Add up what `after_step` needs over the forwards of an optimiser step."""
        new = {"own": outputs.own_sums, "moments": outputs.label_moments}
        for name in ("teacher_readout", "predictive"):
            if name in outputs.term_sums:
                value = outputs.term_sums[name]
                new["teacher"] = torch.stack([value, outputs.num_items.to(value)])
                break
        for name, sums in new.items():
            if sums is not None:
                self._step_sums[name] = sums + self._step_sums.get(name, 0)

    def after_step(self) -> None:
        """Move the pace and the running spread of the labels on, by what all ranks saw in the optimiser step."""
        uses_pace = self.pace.num_levels > 1 or self.args.dynamics_starts_below is not None
        losses: list[float | None] = []
        for name in ("own", "teacher"):
            if name not in self._step_sums or not uses_pace:
                losses.append(None)
                continue
            total, number = self.accelerator.reduce(self._step_sums[name].double(), reduction="sum").tolist()
            losses.append(total / number if number else None)
        self.pace.update(*losses)
        if "moments" in self._step_sums:
            moments = self.accelerator.reduce(self._step_sums["moments"], reduction="sum")
            self.accelerator.unwrap_model(self.model, keep_torch_compile=False).update_label_moments(moments)
        self._step_sums = {}

    def _progress(self) -> float:
        if self.args.max_seconds:
            return min(self.cost.seconds / self.args.max_seconds, 1.0)
        return self.state.global_step / max(self.state.max_steps, 1)

    def _before_forward(self, inputs: dict) -> dict:
        """Put into `inputs` what the phase carries between steps; returns what `_after_forward` needs."""
        inputs.pop("stream_ids", None)
        inputs.pop("is_fresh", None)
        return {}

    def _after_forward(self, inputs: dict, outputs, carried: dict) -> None:
        """Keep what the phase carries between steps."""

    def _record(self, outputs, mode: str) -> None:
        sums = self._term_sums[mode]
        for name, value in outputs.term_sums.items():
            sums[name] = sums.get(name, 0.0) + value
        self._num_items[mode] = self._num_items[mode] + outputs.num_items

    def _mean_terms(self, mode: str) -> dict[str, float]:
        """Means of the terms since the last call: over micro-batches, steps and ranks, weighted by labels."""
        names = sorted(self._term_sums[mode])
        if not names:
            return {}
        totals = [torch.as_tensor(self._term_sums[mode][name]) for name in names]
        values = torch.stack([*totals, torch.as_tensor(self._num_items[mode])]).double()
        values = self.accelerator.reduce(values, reduction="sum").tolist()
        self._term_sums[mode], self._num_items[mode] = {}, 0.0
        return {name: value / max(values[-1], 1.0) for name, value in zip(names, values)}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self._mean_terms("train")}
            if self.pace.num_levels > 1:
                logs["level"] = self.pace.level
        if "loss" in logs or "eval_loss" in logs:
            logs = {**logs, **self.cost.spent()}
        super().log(logs, start_time)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._counted_once(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def _counted_once(self, inputs: dict) -> dict:
        """The batch without the labels of rows that this evaluation has scored already, on this rank or another.

        accelerate fills the last batches of an evaluation with rows from its beginning, so that all ranks have as many.
        """
        if "row_ids" not in inputs:
            return inputs
        own = inputs["row_ids"]
        padded = self.accelerator.pad_across_processes(own, pad_index=-1)  # for `even_batches: false`
        is_new = []
        for number in self.accelerator.gather(padded).tolist():
            is_new.append(number not in self._scored_rows)
            self._scored_rows.add(number)
        first = self.args.process_index * len(padded)
        repeated = ~torch.tensor(is_new[first : first + len(own)], device=own.device)
        return {**inputs, "labels": inputs["labels"].masked_fill(repeated[:, None], -100)}

    def evaluation_loop(self, *args, **kwargs):
        self._term_sums["eval"], self._num_items["eval"] = {}, 0.0
        self._scored_rows = set()
        begins = self.args.student_is_new and not self.args.trains_updater and not self._is_sharded
        # The rollout that is scored is that of the student that would begin as this teacher now.
        with self.accelerator.unwrap_model(self.model).begun_as_teacher() if begins else nullcontext():
            output = super().evaluation_loop(*args, **kwargs)
        prefix, terms = kwargs.get("metric_key_prefix", "eval"), self._mean_terms("eval")
        scale = self.pace.dynamics_scale(self.args.dynamics_starts_below, self.args.dynamics_full_below)
        # transformers averages the losses of batches, whose numbers of labels may differ.
        weights = {name: self.objective.weight_at(name, self._progress(), scale) for name in self.objective.weights}
        if terms:
            terms["loss"] = sum(weight * terms[name] for name, weight in weights.items() if name in terms)
        output.metrics.update({f"{prefix}_{name}": value for name, value in terms.items()})
        return output

    def floating_point_ops(self, inputs) -> int:
        """0: transformers' 6 x parameters x tokens does not hold for a model that is applied in chunks."""
        return 0

    def get_decay_parameter_names(self, model) -> list[str]:
        """Weights of linear layers: no embedding, norm, bias, slot or initial memory is decayed."""
        return [
            f"{prefix}.weight" if prefix else "weight"
            for prefix, module in model.named_modules()
            if isinstance(module, nn.Linear)
        ]

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None and self.args.matrix_optimizer == "muon":
            self.optimizer = muon_with_adamw(self.model, self.get_decay_parameter_names(self.model), self.args)
        optimizer = super().create_optimizer(*args, **kwargs)
        if not self._is_sharded:
            self._take_over()
        return optimizer

    @property
    def _is_sharded(self) -> bool:
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def _take_over(self, is_resumed: bool = False) -> None:
        """The optimiser state that an earlier phase has handed on; a resumed phase has its own already."""
        given, self._student_optimizer_state = self._student_optimizer_state, None
        if given:
            if not is_resumed:
                give_state(self, given)
            trained = {name for name, parameter in self.model.student.named_parameters() if parameter.requires_grad}
            self._resting_state = {name: state for name, state in given.items() if name not in trained}

    def student_optimizer_state(self) -> dict[str, dict[str, torch.Tensor]]:
        """Optimiser state of the student by parameter name, for a phase that continues this one. A collective call."""
        return self._resting_state | whole_state(self)

    lr_scheduler: Any

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """The schedule of the phase, or the phase's part of a schedule that spans several."""
        by_seconds = self.args.max_seconds
        if self.lr_scheduler is not None or not (self.args.schedule_steps or by_seconds):
            return super().create_scheduler(num_training_steps, optimizer)
        own_steps = int(by_seconds * VIRTUAL_STEPS_PER_SECOND) if by_seconds else num_training_steps
        scheduler = super().create_scheduler(self.args.schedule_steps or own_steps, optimizer)
        offset = self.args.schedule_offset
        cost = self.cost if by_seconds else None
        shifted = [shifted_schedule(function, offset, cost) for function in scheduler.lr_lambdas]
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(scheduler.optimizer, shifted)
        return self.lr_scheduler

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers; where FSDP saves shards, whole weights and the student are written beside them."""
        is_whole = not self.is_fsdp_enabled or "FULL" in str(self.accelerator.state.fsdp_plugin.state_dict_type)
        if not is_whole:
            state = self.accelerator.get_state_dict(self.model)  # on all ranks
            if self.args.should_save:
                self._save(output_dir, state_dict=state)
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        """The composite, and beside it the student alone as a model that loads by itself."""
        own = None
        if state_dict is not None:  # before transformers empties it as it writes
            prefix = "student."
            own = {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = os.path.join(self.args.output_dir if output_dir is None else output_dir, "student")
        student = self.accelerator.unwrap_model(self.model, keep_torch_compile=False).student
        if has_lora(student):
            student, own = merged_copy(student), None
        student.save_pretrained(folder, state_dict=own)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if isinstance(self.train_dataset, StreamedRows):
            os.makedirs(output_dir, exist_ok=True)  # every rank has its own position
            with open(os.path.join(output_dir, self._position_file()), "w", encoding="utf-8") as file:
                json.dump(self.train_dataset.state_dict(), file)
        tensors = self._carried_tensors()
        if tensors and self.args.should_save:
            save_file(tensors, os.path.join(output_dir, _ROLLOUT_STATE))
        state = {
            f"{name}/{key}": value.cpu().contiguous()
            for name, own in self.student_optimizer_state().items()
            for key, value in own.items()
        }
        if self.args.should_save:
            save_file(state, os.path.join(output_dir, STUDENT_OPTIMIZER))

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            raise InputError(
                f"the optimiser state in {checkpoint} is of other parameter groups than this run's: resume with the "
                f"`matrix_optimizer` and `optim` that wrote it (now {self.args.matrix_optimizer} and "
                f"{getattr(self.args.optim, 'value', self.args.optim)}). torch says: {error}"
            ) from error
        if checkpoint is not None and isinstance(self.train_dataset, StreamedRows):
            position = os.path.join(checkpoint, self._position_file())
            if not os.path.exists(position):
                raise InputError(
                    f"{checkpoint} has no position in the stream for process {self.args.process_index}: it was saved "
                    "by fewer processes, or by a run that did not stream. Resume with as many processes."
                )
            with open(position, encoding="utf-8") as file:
                self.train_dataset.load_state_dict(json.load(file))
        path = None if checkpoint is None else os.path.join(checkpoint, _ROLLOUT_STATE)
        if path is not None and os.path.exists(path):
            self._restore_carried(load_file(path))

    def _position_file(self) -> str:
        return f"data_position_{self.args.process_index}.json"

    def _carried_tensors(self) -> dict[str, torch.Tensor]:
        """What the phase carries between steps, the same on all ranks. A collective call."""
        return {}

    def _restore_carried(self, tensors: dict[str, torch.Tensor]) -> None:
        """Inverse of `_carried_tensors`."""


def _take_special_tokens(student: SMTRecurrentForCausalLM, tokenizer) -> None:
    """The special tokens of the tokenizer, where the student has none: `generate()` then ends where a text ends."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(student.config, name) is None:
            setattr(student.config, name, getattr(tokenizer, name, None))
            setattr(student.generation_config, name, getattr(tokenizer, name, None))


class _StepEnd(TrainerCallback):
    """Tells the trainer that training begins, when a sharded optimiser is there, and that an optimiser step is over."""

    def __init__(self, trainer: PhaseTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer._is_sharded:
            self.trainer._take_over(is_resumed=state.global_step > 0)

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.after_step()

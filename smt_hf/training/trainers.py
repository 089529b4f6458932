"""One Trainer a phase. They pick the phase, record its named terms, and keep what the phase carries between steps.

The losses are in `SMTForPreTraining.forward`; nothing here calls a part of the model past the wrapped module.
"""

import json
import os
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from smt_hf.data.batching import CarriedWindows, EpochSampler, IndexedExamples, Levels, collate
from smt_hf.data.streaming import StreamedRows
from smt_hf.student import SMTRecurrentForCausalLM
from smt_hf.teachers import SMTWindowedTeacher

from .adapters import has_lora, merged_copy
from .arguments import BPTTTrainingArguments, DMTTrainingArguments, PhaseArguments, SMTTrainingArguments
from .checkpoints import CheckpointingTrainer
from .composite import SMTForPreTraining
from .label_cache import LabelCache
from .launch import check_launch
from .optimizer import muon_with_adamw
from .pacing import VIRTUAL_STEPS_A_SECOND, Pace, TrainingCost
from .pushing import StudentPushingTrainer
from .rollout import example_uniforms
from .sharding import give_state, whole_state
from .stopping import check_finite

_ROLLOUT_STATE = "rollout_state.safetensors"
STUDENT_OPTIMIZER = "student_optimizer.safetensors"
_STREAM_AGGREGATE = 8  # beside the streams of random numbers in pretraining.py


class PhaseProgress(TrainerCallback):
    """A bar a phase: its name, the named losses of the last log line, steps and time to go."""

    def __init__(self, phase: str):
        self.phase, self.bar = phase, None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            total = None if args.max_seconds else state.max_steps
            self.bar = tqdm(total=total, initial=state.global_step, desc=self.phase, dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is None or logs is None:
            return
        names = ("loss", "readout", "dynamics", "predictive", "teacher", "eval_rollout", "eval_drift")
        shown = {name.removeprefix("eval_"): f"{logs[name]:.3g}" for name in names if name in logs}
        if shown:
            self.bar.set_postfix({**getattr(self, "_shown", {}), **shown}, refresh=False)
            self._shown = {**getattr(self, "_shown", {}), **shown}

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class SMTTrainer(StudentPushingTrainer, CheckpointingTrainer):
    """Trains student and teacher together by supervised memory training.

    Args:
        model: an [`SMTForPreTraining`].
        args: [`SMTTrainingArguments`].
        train_dataset: a dataset, or [`Levels`] of them for a curriculum; rows with `input_ids` (`context_length + 1`
            tokens each, as `smt_hf.data.pack` makes them; other lengths work, ragged ones are padded) and, if wanted,
            `attention_mask`, `labels`, `document_ids`.
        eval_dataset: rows likewise. Evaluation adds `eval_rollout` (nats a token of the student's own rollout from
            `m_0`) and `eval_drift` to the terms of the phase.
        student_optimizer_state: name of a student parameter -> optimiser state to start from.
        curriculum_level: of the levels of `train_dataset`, the one to start with.

    Raises:
        ValueError: the model has no teacher, or the arguments are of another phase.
    """

    arguments_class: type[PhaseArguments] = SMTTrainingArguments
    _tag_names = ["smt"]

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
        if not isinstance(model, SMTForPreTraining):
            raise ValueError(
                f"{type(self).__name__} trains an SMTForPreTraining (student and teacher), got {type(model).__name__}."
            )
        if getattr(args, "phase", None) != self.arguments_class.phase:
            raise ValueError(f"{type(self).__name__} takes {self.arguments_class.__name__}, got {type(args).__name__}.")
        model.freeze_for(args.phase, getattr(args, "trains_updater", True), args.trainable, args.objective())
        if isinstance(model.teacher, SMTWindowedTeacher) and args.phase == "smt" and args.teacher_weight:
            raise ValueError("the windowed teacher has no next-token head: set `teacher_weight` of the smt phase to 0.")
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
        self.add_callback(self.cost)
        self.add_callback(self.pace)
        self.add_callback(_StepEnd(self))
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        if not args.disable_tqdm:
            self.add_callback(PhaseProgress(args.phase))
        self._student_optimizer_state = student_optimizer_state
        self._resting_state: dict[str, dict[str, torch.Tensor]] = {}  # of what this phase has frozen
        self._term_sums: dict[str, dict[str, torch.Tensor]] = {"train": {}, "eval": {}}
        self._num_items: dict[str, torch.Tensor | float] = {"train": 0.0, "eval": 0.0}
        self._own_sums: torch.Tensor | None = None
        self._teacher_sums: torch.Tensor | None = None
        self._label_moments: torch.Tensor | None = None

    # Data ---------------------------------------------------------------------------------------------------------

    def _numbered(self, rows):
        """Rows under global example numbers; an iterable dataset is left as it is (`collate` numbers its rows)."""
        return rows if isinstance(rows, IterableDataset) or not hasattr(rows, "__len__") else IndexedExamples(rows)

    def get_train_dataloader(self):
        """As in transformers; a stream is split by rank already, and gives its batches to its own rank."""
        if not isinstance(self.train_dataset, StreamedRows):
            return super().get_train_dataloader()
        return DataLoader(self.train_dataset, self._train_batch_size, collate_fn=self.data_collator)

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(rows, IndexedExamples):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochSampler(len(rows), seed)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Batches of all levels are fetched ahead of time; the level is chosen when the step begins."""
        return super().get_batch_samples(self._at_level(epoch_iterator), num_batches, device)

    def _at_level(self, batches):
        for batch in batches:
            yield batch["levels"][self.pace.level] if "levels" in batch else batch

    # Loss and its terms -------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {**self._of_one_length(inputs), "objective": self.objective, "progress": self._progress()}
        inputs["dynamics_scale"] = self.pace.dynamics_scale(
            getattr(self.args, "dynamics_starts_below", None), getattr(self.args, "dynamics_full_below", None)
        )
        carried = self._before_forward(inputs)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._record(outputs, "train" if model.training else "eval")
        if model.training:
            if not loss.requires_grad:
                raise ValueError(
                    f"no loss of the {self.args.phase} phase reaches what it trains ({self.args.trainable}): give one "
                    "of its losses a weight, or let it train more."
                )
            check_finite(outputs.term_sums, self.state.global_step + 1, self.args.phase, inputs.get("example_ids"))
            self.cost.sequential_steps += outputs.sequential_steps
            self.cost.tokens += outputs.transitions * self.args.world_size
            self._keep_for_pace(outputs)
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
                padded[name] = torch.nn.functional.pad(padded[name], (0, longest - length), value=fill)
        return padded

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None:
            check_finite({"the gradient": norm}, self.state.global_step + 1, self.args.phase, None)
        return norm

    def _keep_for_pace(self, outputs) -> None:
        if outputs.own_sums is not None:
            self._own_sums = outputs.own_sums + (0 if self._own_sums is None else self._own_sums)
        for name in ("teacher_readout", "predictive"):
            if name in outputs.term_sums:
                sums = torch.stack([outputs.term_sums[name], outputs.num_items.to(outputs.term_sums[name])])
                self._teacher_sums = sums + (0 if self._teacher_sums is None else self._teacher_sums)
                break
        if outputs.label_moments is not None:
            self._label_moments = outputs.label_moments + (0 if self._label_moments is None else self._label_moments)

    def after_step(self) -> None:
        """Move the pace and the running spread of the labels on, by what all ranks saw in the optimiser step."""
        uses_pace = self.pace.num_levels > 1 or getattr(self.args, "dynamics_starts_below", None) is not None
        losses: list[float | None] = []
        for sums in (self._own_sums, self._teacher_sums):
            if sums is None or not uses_pace:
                losses.append(None)
                continue
            total, number = self.accelerator.reduce(sums.double(), reduction="sum").tolist()
            losses.append(total / number if number else None)
        self.pace.update(*losses)
        if self._label_moments is not None:
            moments = self.accelerator.reduce(self._label_moments, reduction="sum")
            self.accelerator.unwrap_model(self.model, keep_torch_compile=False).update_label_moments(moments)
        self._own_sums = self._teacher_sums = self._label_moments = None

    def _progress(self) -> float:
        if self.args.max_seconds:
            return min(self.cost.seconds / self.args.max_seconds, 1.0)
        return self.state.global_step / max(self.state.max_steps, 1)

    def _before_forward(self, inputs: dict) -> dict:
        """Put into `inputs` what the phase carries between steps; returns what `_after_forward` needs."""
        for name in ("stream_ids", "is_fresh"):
            inputs.pop(name, None)
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
            logs = {**logs, **{name: getattr(self.cost, name) for name in ("seconds", "sequential_steps", "tokens")}}
        super().log(logs, start_time)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def evaluation_loop(self, *args, **kwargs):
        self._term_sums["eval"], self._num_items["eval"] = {}, 0.0
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in self._mean_terms("eval").items()})
        return output

    def floating_point_ops(self, inputs) -> int:
        """0: transformers' 6 x parameters x tokens does not hold for a model that is applied in chunks."""
        return 0

    # Optimiser and schedule ---------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model) -> list[str]:
        """Weights of linear layers: no embedding, norm, bias, slot or initial memory is decayed."""
        return [
            f"{prefix}.weight" if prefix else "weight"
            for prefix, module in model.named_modules()
            if isinstance(module, nn.Linear)
        ]

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None and self.args.matrix_optimizer == "muon":
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:
                raise ValueError("`matrix_optimizer=muon` needs whole matrices: not with DeepSpeed or FSDP, use adamw.")
            self.optimizer = muon_with_adamw(self.model, self.get_decay_parameter_names(self.model), self.args)
        optimizer = super().create_optimizer(*args, **kwargs)
        if not self._is_sharded:
            self._take_over()
        return optimizer

    @property
    def _is_sharded(self) -> bool:
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def _take_over(self, is_resumed: bool = False) -> None:
        """The optimiser state that an earlier phase has handed on; a resumed one has its own already."""
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
        own_steps = int(by_seconds * VIRTUAL_STEPS_A_SECOND) if by_seconds else num_training_steps
        scheduler = super().create_scheduler(self.args.schedule_steps or own_steps, optimizer)
        offset = self.args.schedule_offset
        cost = self.cost if by_seconds else None
        shifted = [_shifted(function, offset, cost) for function in scheduler.lr_lambdas]
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(scheduler.optimizer, shifted)
        return self.lr_scheduler

    # Saving -------------------------------------------------------------------------------------------------------

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
            raise ValueError(
                f"the optimiser state in {checkpoint} is of other parameter groups than this run's: resume with the "
                f"`matrix_optimizer` and `optim` that wrote it (now {self.args.matrix_optimizer} and "
                f"{getattr(self.args.optim, 'value', self.args.optim)}). torch says: {error}"
            ) from error
        if checkpoint is not None and isinstance(self.train_dataset, StreamedRows):
            position = os.path.join(checkpoint, self._position_file())
            if not os.path.exists(position):
                raise ValueError(
                    f"{checkpoint} has no position in the stream for process {self.args.process_index}: it was saved "
                    "by fewer processes, or by a run that did not stream."
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
    """The tokenizer's special tokens, where the student has none: `generate()` then ends where a text ends."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(student.config, name) is None:
            setattr(student.config, name, getattr(tokenizer, name, None))
            setattr(student.generation_config, name, getattr(tokenizer, name, None))


def load_student_optimizer(checkpoint: str) -> dict[str, dict[str, torch.Tensor]]:
    """Optimiser state of the student by parameter name, from a checkpoint of any phase."""
    state: dict[str, dict[str, torch.Tensor]] = {}
    for entry, value in load_file(os.path.join(checkpoint, STUDENT_OPTIMIZER)).items():
        name, key = entry.rsplit("/", 1)
        state.setdefault(name, {})[key] = value
    return state


class _StepEnd(TrainerCallback):
    """Tells the trainer that training begins, when a sharded optimiser is there, and that an optimiser step is over."""

    def __init__(self, trainer: SMTTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer._is_sharded:
            self.trainer._take_over(is_resumed=state.global_step > 0)

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.after_step()


def _shifted(function, offset: int, cost: TrainingCost | None):
    """A learning-rate schedule from a later step on; with `cost`, by the seconds used.

    A plain function: the scheduler's saved state holds the attributes of any other callable, and a checkpoint is read
    back with `weights_only=True`.
    """

    def rate(step: int) -> float:
        return function(offset + (step if cost is None else int(cost.seconds * VIRTUAL_STEPS_A_SECOND)))

    return rate


class DMTTrainer(SMTTrainer):
    """Trains the student on its own memories towards those of the frozen teacher [Sec. 3.3].

    In the `aggregate` mode a share of every batch is replaced by rows met before, with the memories that the student of
    that time had on them.
    """

    arguments_class = DMTTrainingArguments
    _tag_names = ["smt", "dmt"]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.objective.on_policy_mode == "aggregate" and self.args.world_size > 1:
            raise ValueError("`on_policy_mode=aggregate` keeps its memories in one process: use `sequential`.")
        self._label_cache: LabelCache | None = None
        if self.args.label_cache_dir and self.train_dataset is not None:
            self._label_cache = self._open_label_cache()
        self._kept: dict[str, torch.Tensor] = {}
        self._pending: list[tuple[torch.Tensor, ...]] = []
        self._pending_step = 0

    def _open_label_cache(self) -> LabelCache:
        if self._is_sharded:  # one rank may have its rows and another not, and all would wait for the teacher
            raise ValueError("`label_cache_dir` is for one process or DDP: leave it out with DeepSpeed and FSDP.")
        rows: Any = getattr(self.train_dataset, "rows", [{"levels": ()}])
        if not isinstance(self.train_dataset, IndexedExamples) or "levels" in rows[0]:
            raise ValueError("`label_cache_dir` needs rows of one level that can be counted: leave it out here.")
        if "attention_mask" in rows[0] or "document_ids" in rows[0]:
            raise ValueError("`label_cache_dir` needs packed rows without padding: leave it out here.")
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
        if self._label_cache is not None and self.model.training:
            labels = self._label_cache.get(inputs["example_ids"])
            if labels is None:
                carried["labels_of"] = inputs["example_ids"]
            else:
                inputs["memory_labels"] = labels.to(inputs["input_ids"].device)
        if self.objective.on_policy_mode != "aggregate" or not self.model.training:
            return carried
        if "attention_mask" in inputs or "document_ids" in inputs:
            raise ValueError("`on_policy_mode=aggregate` needs packed rows without padding: use `sequential`.")
        if self._pending_step != self.state.global_step:
            self._keep_pending()
        numbers = inputs["example_ids"]
        if not self._kept:
            return {**carried, "new": torch.ones_like(numbers, dtype=torch.bool)}
        capacity = len(self._kept["filled"])
        noise = example_uniforms(numbers, 2, self.objective.seed, _STREAM_AGGREGATE)
        slots = (noise[:, 1] * capacity).long().cpu()
        old = (noise[:, 0] < self.args.aggregate_fraction).cpu() & self._kept["filled"][slots]
        old_here, device = old.to(numbers.device), numbers.device
        for name in ("input_ids", "labels"):
            inputs[name] = torch.where(old_here[:, None], self._kept[name][slots].to(device), inputs[name])
        starts = self._kept["starts"][slots]
        inputs["stored_starts"] = starts.masked_fill(~old[:, None, None, None], float("nan")).to(device)
        return {**carried, "new": ~old_here}

    def _after_forward(self, inputs: dict, outputs, carried: dict) -> None:
        if "labels_of" in carried and self._label_cache is not None:
            self._label_cache.put(carried["labels_of"], outputs.memory_labels)
        if "new" not in carried:
            return
        new = carried["new"]
        rows = (inputs["example_ids"], inputs["input_ids"], inputs["labels"], outputs.starts)
        self._pending.append(tuple(row[new].cpu() for row in rows))
        self._pending_step = self.state.global_step

    def _keep_pending(self) -> None:
        """Only what earlier optimiser steps have seen is reused, so that micro-batches do not see each other."""
        capacity = self.args.aggregate_capacity
        for numbers, input_ids, labels, starts in self._pending:
            if not self._kept:
                self._kept = {
                    "filled": torch.zeros(capacity, dtype=torch.bool),
                    "input_ids": input_ids.new_zeros(capacity, *input_ids.shape[1:]),
                    "labels": labels.new_zeros(capacity, *labels.shape[1:]),
                    "starts": starts.new_zeros(capacity, *starts.shape[1:]),
                }
            slots = numbers % capacity
            self._kept["filled"][slots] = True
            for name, value in (("input_ids", input_ids), ("labels", labels), ("starts", starts)):
                self._kept[name][slots] = value
        self._pending = []

    def _carried_tensors(self) -> dict[str, torch.Tensor]:
        self._keep_pending()
        return dict(self._kept)

    def _restore_carried(self, tensors: dict[str, torch.Tensor]) -> None:
        self._kept = tensors


class BPTTTrainer(SMTTrainer):
    """Trains the student by backpropagation through time: truncated with a carried memory, or full.

    Takes an [`SMTForPreTraining`] or a bare [`SMTRecurrentForCausalLM`] (to fine-tune a published checkpoint; the
    trained student is `trainer.model.student`).
    """

    arguments_class = BPTTTrainingArguments
    _tag_names = ["bptt"]

    def __init__(self, model, *args, **kwargs):
        self._memories: torch.Tensor | None = None
        if isinstance(model, SMTRecurrentForCausalLM):
            model = SMTForPreTraining.from_student(model)
        super().__init__(model, *args, **kwargs)

    @property
    def is_truncated(self) -> bool:
        return self.args.transition_steps < self.args.context_length

    def _numbered(self, rows):
        if not self.is_truncated or not self.args.carries_memory:
            return super()._numbered(rows)
        args = self.args
        streams = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        num_steps = args.max_steps
        if num_steps < 1:
            windows = len(rows) * (len(rows[0]["input_ids"]) - 1) // args.transition_steps
            num_steps = max(windows // streams, 1)  # of one epoch
        seed = args.seed if args.data_seed is None else args.data_seed
        return CarriedWindows(rows, streams, args.transition_steps, num_steps, seed)

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(rows) if isinstance(rows, CarriedWindows) else super()._get_train_sampler(rows)

    def _before_forward(self, inputs: dict) -> dict:
        streams, is_fresh = inputs.get("stream_ids"), inputs.get("is_fresh")
        super()._before_forward(inputs)
        if streams is None:
            return {}
        if self._memories is not None and is_fresh is not None:
            memory = self._memories[streams]
            inputs["memory"] = memory.masked_fill(is_fresh[:, None, None], float("nan"))
        return {"streams": streams}

    def _after_forward(self, inputs: dict, outputs, carried: dict) -> None:
        if not carried:
            return
        if self._memories is None:
            shape = (self.train_dataset.num_streams, *outputs.memory.shape[1:])
            self._memories = torch.full(shape, float("nan"), dtype=outputs.memory.dtype, device=outputs.memory.device)
        self._memories[carried["streams"]] = outputs.memory

    def _carried_tensors(self) -> dict[str, torch.Tensor]:
        if self._memories is None:
            return {}
        # Every stream lives on one rank; the others hold NaN for it.
        owned = self.accelerator.reduce((~self._memories.isnan()).to(self._memories.dtype), reduction="sum")
        memories = self.accelerator.reduce(self._memories.nan_to_num(0.0), reduction="sum")
        return {"memories": memories.masked_fill(owned == 0, float("nan")).cpu()}

    def _restore_carried(self, tensors: dict[str, torch.Tensor]) -> None:
        self._memories = tensors["memories"].to(self.args.device)

"""Training from a `TeacherCache`: its argument, the Trainer that reads it, and what fills it before a run."""

import copy
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedConfig, Trainer

from smt_hf.command_line import argument
from smt_hf.data.batching import IndexedExamples, Levels
from smt_hf.errors import InputError
from smt_hf.teachers import SMTPretrainedTeacher, make_teacher
from smt_hf.teachers.loading import is_in_shards

from .teacher_cache import TeacherCache


@dataclass
class TeacherCacheArguments:
    """The argument of a phase that has a frozen language model as its teacher."""

    teacher_cache_dir: str | None = argument(
        None,
        "Folder for what the teacher's model says of every row: hidden states of its `layers` and, with "
        "`distillation_weight`, its likeliest next tokens. The rows are read before the training, which then goes "
        "without the model. Later phases and runs, under any seed, take what is there. For "
        "`teacher_model_name_or_path` without LoRA.",
    )


@dataclass(frozen=True)
class ReadingCost:
    """What it has cost this process to let a language model read rows for caches."""

    folders: tuple[str, ...]  # names of the caches, whether they had everything before or not
    rows: int  # in the caches, those that were there before included
    tokens: int  # of these rows, without the last of each, which is only a target
    bytes: int  # on the disk
    rows_read: int  # now
    tokens_read: int  # now
    seconds: float  # of reading
    load_seconds: float  # of making the model


class CachedTeacherTrainer(Trainer):
    """A Trainer of an `SMTForPreTraining` whose forwards get what a `TeacherCache` has of their rows.

    Rows that are missing are read when training or an evaluation begins, by the model that the teacher holds.
    """

    args: Any
    pace: Any

    def __init__(self, *args, **kwargs):
        self._train_caches: list[TeacherCache] = []  # one per level
        self._eval_caches: dict[int, TeacherCache] = {}  # by the identity of the rows
        super().__init__(*args, **kwargs)

    @property
    def has_cache(self) -> bool:
        """Whether the phase has a `teacher_cache_dir`."""
        return getattr(self.args, "teacher_cache_dir", None) is not None

    def _opened(self, rows) -> TeacherCache:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return opened_caches(self.args, model.config.teacher, [rows], lambda: model.teacher)[0]

    def train(self, *args, **kwargs):
        """As in transformers, after the rows that the cache lacks have been read."""
        if self.has_cache and not self._train_caches:
            data: Any = self.train_dataset
            if not isinstance(data, IndexedExamples):
                raise InputError("`teacher_cache_dir` needs rows that are read again: leave it out with a stream.")
            self._train_caches = [self._opened(rows) for rows in levels_of(data.rows)]
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # now, while the model is whole
                held_out: Any = self.eval_dataset
                for rows in held_out.values() if isinstance(held_out, dict) else [held_out]:
                    if rows is not None:
                        self._open_for_evaluation(rows)
        return super().train(*args, **kwargs)

    def _open_for_evaluation(self, rows) -> TeacherCache:
        if isinstance(rows, IterableDataset) or not hasattr(rows, "__len__"):
            raise InputError("`teacher_cache_dir` needs held-out rows that are read again: not a stream.")
        if id(rows) not in self._eval_caches:
            self._eval_caches[id(rows)] = self._opened(rows)
        return self._eval_caches[id(rows)]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs):
        """As in transformers, with what is known of the rows."""
        numbers = inputs.pop("row_ids", None)
        if self.has_cache and model.training:
            level = self.pace.level if len(self._train_caches) > 1 else 0
            inputs["cached"] = self._train_caches[level].get(inputs["example_ids"], self.args.device)
        elif self.has_cache:
            inputs["cached"] = self._evaluated_cache.get(numbers, self.args.device)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluation_loop(self, dataloader, *args, **kwargs):
        """As in transformers, after the rows that the cache lacks have been read."""
        if self.has_cache:
            self._evaluated_cache = self._open_for_evaluation(getattr(dataloader.dataset, "rows", None))
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def first_cached(self, num_rows: int) -> dict[str, Any]:
        """What is known of the first rows that are evaluated now, as an argument of the composite's forward."""
        if not self.has_cache:
            return {}
        return {"cached": self._evaluated_cache.get(torch.arange(num_rows), self.args.device)}


def levels_of(rows) -> list:
    """The datasets of a curriculum, or the one dataset."""
    return list(rows.levels) if isinstance(rows, Levels) else [rows]


def opened_caches(
    arguments, config: PreTrainedConfig, datasets: Sequence, teacher: Callable[[], Any]
) -> list[TeacherCache]:
    """Caches of datasets for a phase, complete. A collective call: every process reads its share of what is missing.

    Args:
        arguments: of the phase.
        config: of the teacher.
        teacher: makes one that holds its model, if a row is missing.

    Raises:
        InputError: as [`TeacherCache`]; or rows are missing and the teacher holds no model, or one in shards.
    """
    caches = _created(arguments, config, datasets)
    _complete(arguments, caches, teacher)
    return caches


def _created(arguments, config: PreTrainedConfig, datasets: Sequence) -> list[TeacherCache]:
    """Caches of datasets for a phase, whose files are there and as large as they will be. A collective call."""
    state = PartialState()
    objective = arguments.objective()
    caches = [TeacherCache(arguments.teacher_cache_dir, config, rows, objective.likeliest) for rows in datasets]
    for cache in caches:
        if state.is_local_main_process:
            cache.create()
    state.wait_for_everyone()
    for cache in caches:
        cache.open()
    return caches


def _complete(arguments, caches: list[TeacherCache], teacher: Callable[[], Any]) -> None:
    """Read what the caches of a phase lack. A collective call."""
    state = PartialState()
    missing = [cache.missing() for cache in caches]
    state.wait_for_everyone()  # before a process writes: all have seen the same places, and share them out
    if any(map(len, missing)):
        reader = teacher()
        if not reader.reads_rows:
            raise InputError(
                f"`teacher_cache_dir` {arguments.teacher_cache_dir} lacks rows, and the teacher holds no model to read "
                "them with: call its `attach_model()` first, or `fill_teacher_caches` before it is made."
            )
        if is_in_shards(reader.model):
            raise InputError(
                f"`teacher_cache_dir` {arguments.teacher_cache_dir} lacks rows, and FSDP or ZeRO-3 has split the model "
                "that would read them: let them be read by `fill_teacher_caches` before the training."
            )
        index, local_size = state.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
        for cache, places in zip(caches, missing):
            cache.fill(reader, arguments.per_device_eval_batch_size, places[index::local_size], shows=index == 0)
    state.wait_for_everyone()


def fill_teacher_caches(
    config: PreTrainedConfig, phases: Sequence, rows_for: Callable[[Any], Any], eval_rows
) -> ReadingCost:
    """Let the model of a teacher read what its caches lack, for a run whose teacher is made without the model.

    The files of all phases are made before the first row is read, so that data which cannot be kept, and a disk that is
    too small, are found at once. The model is loaded if a row is missing, and let go of afterwards. A collective call.

    Args:
        config: of the teacher.
        phases: arguments of all phases of the run.
        rows_for: training rows of a phase.
        eval_rows: held-out rows, which the evaluations in all phases read.

    Raises:
        InputError: as [`TeacherCache`], or the model cannot be loaded.
    """
    made: list[SMTPretrainedTeacher] = []
    caching = [arguments for arguments in phases if getattr(arguments, "teacher_cache_dir", None) is not None]
    load_seconds = 0.0

    def teacher() -> Any:
        nonlocal load_seconds
        if not made:
            began = time.perf_counter()
            full: Any = copy.deepcopy(config)
            full.holds_model = True
            with torch.random.fork_rng(devices=[]):  # later draws are the same whether a row was missing or not
                made.append(make_teacher(full).eval())  # type: ignore[arg-type]
            if full.device_map is None:
                made[0].to(caching[0].device)
            load_seconds = time.perf_counter() - began
        return made[0]

    # Those that keep next tokens keep states as well.
    caching.sort(key=lambda arguments: not arguments.objective().likeliest)
    opened = [_created(arguments, config, [*levels_of(rows_for(arguments)), eval_rows]) for arguments in caching]
    for arguments, of_phase in zip(caching, opened):
        _complete(arguments, of_phase, teacher)
    caches = [cache for of_phase in opened for cache in of_phase]
    parts = {part.folder.name: part for cache in caches for part in cache.parts}
    whole = {cache.parts[0].folder.name: cache for cache in caches}  # the states, which all caches keep
    return ReadingCost(
        folders=tuple(sorted(parts)),
        rows=sum(len(cache.first) for cache in whole.values()),
        tokens=sum(len(cache.first) * (cache.length - 1) for cache in whole.values()),
        bytes=sum(part.num_bytes for part in parts.values()),
        rows_read=sum(cache.rows_read for cache in caches),
        tokens_read=sum(cache.rows_read * (cache.length - 1) for cache in caches),
        seconds=sum(cache.seconds_read for cache in caches),
        load_seconds=load_seconds,
    )

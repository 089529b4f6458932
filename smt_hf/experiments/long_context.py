"""What `recipes/evaluate.py` runs: a checkpoint on long-context tasks, or on held-out text read as one stream.

A cell is a task at a length. Its line is appended when it is complete, so that a run that was cut off loses one cell at
most, and the same command goes on from there.
"""

import contextlib
import dataclasses
import hashlib
import json
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from smt_hf.command_line import argument, built, check_keys, closest, described, names_of, read_layers, whole_number
from smt_hf.data.files import find_files, name_of_files, rows_of, text_in
from smt_hf.errors import InputError
from smt_hf.evaluation.long_context import (
    SUITES,
    LongContextSettings,
    Sample,
    SampleCache,
    Task,
    TooShort,
    tasks_of,
    tokenizer_fingerprint,
)
from smt_hf.evaluation.long_context.examination import Examiner
from smt_hf.evaluation.long_context.loading import LanguageModel, load_language_model
from smt_hf.evaluation.long_context.manners import find_manner
from smt_hf.evaluation.long_context.reading import Reader
from smt_hf.evaluation.long_context.streams import cut_streams, measure_streams, num_passes
from smt_hf.publishing.evidence import append_lines, read_lines
from smt_hf.publishing.provenance import run_facts

from .run_folder import locked

TEXT = "text"  # the suite of held-out text
_USAGE = "usage: python recipes/evaluate.py --checkpoint DIR_OR_REPO --suite NAME --output FILE.jsonl [--flag ...]"
# What tells a cell from others in a file of lines.
_KEY = ("checkpoint", "weights", "suite", "task", "length", "num_samples", "seed", "made_by", "settings")


@dataclass
class EvaluateArguments:
    """Arguments of `evaluate` besides those of the suites."""

    config: str | None = argument(None, "YAML file with any of these arguments; flags override it.")
    checkpoint: str | None = argument(None, "Folder or Hub name of any causal language model, a student or another.")
    suite: str | None = argument(
        None, "The benchmark (ruler, babilong, scrolls), or `text`: bits per byte of held-out text by position."
    )
    tasks: list[str] | None = argument(None, "Names of tasks, joined by commas or spaces; default: all of the suite.")
    lengths: list[str] | None = argument(
        None,
        "Lengths in tokens (bytes for a byte tokenizer), joined by commas or spaces. Default: 1024,4096,8192,16384; "
        "for text 65536.",
    )
    num_samples: int | None = argument(
        None, "Samples per cell, fewer where there are fewer; default: 400 (5 points either way), for text 8 streams."
    )
    output: str | None = argument(None, "JSON lines file that one line per cell is appended to.")
    report: bool = argument(False, "Evaluate nothing: write tables and figures of the lines in `output` next to it.")
    against: str | None = argument(
        None, "With `report`: name of the model that all others are compared with, cell by cell.", is_text=True
    )
    card: str | None = argument(
        None,
        "With `report`: folder of a student. Those lines of `output` that are of its weights go into its "
        "eval_results.json and its model card, which is written anew.",
    )
    name: str | None = argument(
        None, "What tables and figures call the model. Lines of one name count as one model trained with several seeds."
    )
    trained_on: str | None = argument(
        None, "What the model was trained on, in words that tables are to say.", is_text=True
    )
    files: list[str] | None = argument(None, "Held-out files, folders or patterns of text, for the suite `text`.")
    text_column: str = argument("text", "Column of those files that holds the text, where they are tables.")
    controls: bool = argument(True, "Also examine each sample without its needles, and its last tokens alone.")
    control_samples: int | None = argument(
        None,
        "Samples that the controls are examined on, the first ones; default: all. The control "
        "without needles costs as much as the score.",
    )
    window: int = argument(512, "Tokens of a prompt that the control `last_window` reads.")
    seed: int = argument(0, "Seed of the samples.")
    batch_size: int = argument(8, "Prompts side by side. It changes memory use and speed, not the result.")
    chunk_size: int = argument(512, "Most tokens of one forward. It changes memory use and speed, not the result.")
    sample_cache: str | None = argument(
        None, "Folder that keeps samples for other models with the same tokenizer; default: they are made each time."
    )
    tokenizer_name: str | None = argument(None, "Tokenizer of the model; default: the one in its checkpoint.")
    device: str | None = argument(None, "Device of torch; default: cuda if there is one, else cpu.")
    dtype: str = argument("float32", "Type of the weights: float32, bfloat16, float16 or float64.")
    num_threads: int | None = argument(None, "Threads of torch; default: torch's.")

    def __post_init__(self):
        if not self.output:
            raise InputError("name the file of the results: `--output runs/long_context.jsonl`.")
        for name in ("num_samples", "control_samples", "window", "batch_size", "chunk_size", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"`{name}` must be 1 or more, got {value}.")
        if self.report:
            return
        for name in ("against", "card"):
            if getattr(self, name) is not None:
                raise InputError(f"`{name}` goes with `--report`: evaluate first, then write the report.")
        if not self.checkpoint or not self.suite:
            raise InputError("name a checkpoint and a suite: `--checkpoint DIR_OR_REPO --suite ruler`.")
        known = [*SUITES, TEXT]
        if self.suite not in known:
            raise InputError(f"unknown suite {self.suite!r}{closest(self.suite, known)} There are {', '.join(known)}.")
        if self.suite == TEXT and (self.tasks or not self.files):
            raise InputError("the suite `text` has no tasks: name held-out text by `--files`, and leave `tasks` out.")
        if self.suite != TEXT and self.files:
            raise InputError(
                "`files` goes with `--suite text`; `--haystack` names the text that needles are hidden in."
            )
        self.all_lengths()

    def all_lengths(self) -> list[int]:
        """The lengths, shortest first.

        Raises:
            InputError: one is no whole number above 1.
        """
        words = _parted(self.lengths) or (["65536"] if self.suite == TEXT else ["1024", "4096", "8192", "16384"])
        lengths = sorted({whole_number("lengths", word) for word in words})
        if lengths[0] < 2:
            raise InputError(f"`lengths` must be 2 or more, got {lengths[0]}.")
        return lengths

    @property
    def asked(self) -> int:
        """Samples per cell, if there are as many."""
        return self.num_samples or (8 if self.suite == TEXT else 400)

    @property
    def shown_name(self) -> str:
        """What tables call the model: the last folder of the checkpoint that says something."""
        parts = [part for part in Path(str(self.checkpoint)).parts if part not in ("student", "/", ".", "..")]
        return self.name or (parts[-1] if parts else str(self.checkpoint))


def parse_evaluate(argv: list[str]) -> tuple[EvaluateArguments, LongContextSettings]:
    """All settings of an evaluation from its command line, those of the suites among them.

    Raises:
        InputError: an unknown flag, or a value that does not fit.
        SystemExit: after `--help`.
    """
    own, of_suites = names_of(EvaluateArguments), names_of(LongContextSettings)
    texts = [field.name for field in dataclasses.fields(EvaluateArguments) if field.metadata.get("is_text")]
    given: dict[str, Any] = {}
    for layer in read_layers(argv, _help_text, texts):
        check_keys(layer, own | of_suites, "argument")
        given |= layer
    settings = built(LongContextSettings, {key: value for key, value in given.items() if key in of_suites})
    return built(EvaluateArguments, {key: value for key, value in given.items() if key in own}), settings


def _help_text() -> str:
    parts = [_USAGE, "", *described(EvaluateArguments), "", "Settings of the suites:", *described(LongContextSettings)]
    return "\n".join(parts)


def _parted(words: Sequence[str] | None) -> list[str]:
    return [part for word in words or () for part in str(word).split(",") if part]


@dataclass(frozen=True)
class TaskCell:
    """A task of a suite at a length."""

    arguments: EvaluateArguments
    examiner: Examiner
    length: int

    @property
    def facts(self) -> dict[str, Any]:
        """What tells the cell from others; `made_by` is all that its samples depend on besides length and seed."""
        task = self.examiner.task
        return {"task": task.name, "length": self.length, "made_by": repr(task), "metric": task.metric}

    @property
    def num_prompts(self) -> int:
        """Prompts to read, as far as is known before."""
        return self.num_samples + 2 * self.num_controlled

    @property
    def num_controlled(self) -> int:
        """Samples that the controls are examined on."""
        asked = self.arguments.control_samples
        return min(self.num_samples, self.num_samples if asked is None else asked) if self.arguments.controls else 0

    @property
    def num_samples(self) -> int:
        """Samples that are asked for and that there are."""
        there_are = self.examiner.task.num_samples
        return self.arguments.asked if there_are is None else min(self.arguments.asked, there_are)

    def samples(self, number: int) -> list[Sample]:
        """The first samples."""
        task, loaded, seed = self.examiner.task, self.examiner.language_model, self.arguments.seed
        if self.arguments.sample_cache is None:
            return [task.sample(self.length, index, seed, loaded.count) for index in range(number)]
        cache, fingerprint = SampleCache(self.arguments.sample_cache), tokenizer_fingerprint(loaded.tokenizer)
        return cache.samples(task, self.length, number, seed, loaded.count, fingerprint)

    def check(self) -> None:
        """Raises InputError for what cannot be examined, as far as the first sample shows it."""
        (first,) = self.samples(1)
        loaded = self.examiner.language_model
        loaded.check_length(len(loaded.prompt(first.prompt)) + self.examiner.task.num_generated)

    def examine(self, advance: Callable[[int], object]) -> dict[str, Any]:
        """All scores, by the names of a line; `advance` is told the number of prompts that were read."""
        self.examiner.advance = advance
        return self.examiner.examine(self.samples(self.num_samples), self.num_controlled)


@dataclass(frozen=True)
class TextCell:
    """Held-out text in streams of a length."""

    arguments: EvaluateArguments
    loaded: LanguageModel
    reader: Reader
    streams: list[list[int]]
    made_by: str  # a hash of the text

    @property
    def length(self) -> int:
        """Tokens of a stream that are predicted."""
        return len(self.streams[0]) - 1

    @property
    def facts(self) -> dict[str, Any]:
        """As in `TaskCell`."""
        name = name_of_files(self.arguments.files or "")
        return {"task": name, "length": self.length, "made_by": self.made_by, "metric": "bits_per_byte"}

    @property
    def num_prompts(self) -> int:
        """Streams to read, those of shorter contexts included."""
        return len(self.streams) * num_passes(self.length)

    def check(self) -> None:
        """Raises InputError if the model has too few positions."""
        self.loaded.check_length(self.length + 1)

    def examine(self, advance: Callable[[int], object]) -> dict[str, Any]:
        """As in `TaskCell`."""
        return measure_streams(self.loaded, self.reader, self.streams, self.arguments.batch_size, advance)


def evaluate(arguments: EvaluateArguments, settings: LongContextSettings) -> Iterator[dict[str, Any]]:
    """Examine every cell that `output` has no line of; append its line, and yield it.

    A cell whose length cannot hold its samples is left out, and the smallest length that can is printed.

    Raises:
        InputError: bad input, with the way to mend it; found before the first cell is examined, as far as it can be. No
            length holds its samples.
    """
    output = Path(str(arguments.output))
    if arguments.num_threads:
        torch.set_num_threads(arguments.num_threads)
    logging.disable_progress_bar()
    is_text = arguments.suite == TEXT
    tasks = [] if is_text else tasks_of(str(arguments.suite), _parted(arguments.tasks) or None, settings)
    loaded = load_language_model(str(arguments.checkpoint), arguments.tokenizer_name, arguments.device, arguments.dtype)
    reader = Reader(loaded.model, find_manner(loaded.model), arguments.chunk_size)
    tqdm.write(f"{arguments.shown_name} reads in {reader.described()}")
    cells = _text_cells(arguments, loaded, reader) if is_text else _task_cells(arguments, loaded, reader, tasks)
    shared = _shared(arguments, loaded, reader)
    with locked(output.parent, f".{output.name}.lock"):
        done = [_key(line) for line in (read_lines(output) if output.exists() else [])]
        waiting = [cell for cell in cells if _key({**shared, **cell.facts}) not in done]
        for cell in waiting:
            with contextlib.suppress(TooShort):  # which is found again when it is the cell's turn
                cell.check()
        too_short: list[TooShort] = []
        for cell in waiting:
            try:
                line = {**shared, **cell.facts, **_examined(cell, reader)}
            except TooShort as error:
                too_short.append(error)
                tqdm.write(f"left out: {error}")
                continue
            append_lines([line], output)
            tqdm.write(f"{line['task']} {line['length']}: {line['metric']} {line['value']:.4f}, n {line['n']}")
            yield line
        if len(too_short) == len(cells):
            raise too_short[-1]


def _examined(cell: TaskCell | TextCell, reader: Reader) -> dict[str, Any]:
    """What the cell's line says of its scores and of what they took."""
    on_cuda = reader.model.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    begin, before = time.perf_counter(), reader.num_tokens
    reader.state_bytes = 0
    title = f"{cell.facts['task']} {cell.length}"
    with tqdm(total=cell.num_prompts, desc=title, unit="prompt", dynamic_ncols=True) as bar:
        found = cell.examine(bar.update)
        bar.total = bar.n  # some samples have no needle, some prompts no more than a window
    seconds = time.perf_counter() - begin
    found |= {"seconds": round(seconds, 2), "tokens_per_second": round((reader.num_tokens - before) / seconds, 1)}
    found["state_bytes"] = reader.state_bytes  # of one prompt
    found["peak_memory_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of the process so far
    if on_cuda:
        found["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated()
    return found


def _task_cells(
    arguments: EvaluateArguments, loaded: LanguageModel, reader: Reader, tasks: list[Task]
) -> list[TaskCell | TextCell]:
    examiners = [Examiner(loaded, reader, task, arguments.batch_size, arguments.window) for task in tasks]
    return [TaskCell(arguments, examiner, length) for length in arguments.all_lengths() for examiner in examiners]


def _text_cells(arguments: EvaluateArguments, loaded: LanguageModel, reader: Reader) -> list[TaskCell | TextCell]:
    texts = list(_texts(arguments))
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    parts = [cut_streams(texts, loaded, length, arguments.asked) for length in arguments.all_lengths()]
    return [TextCell(arguments, loaded, reader, streams, digest) for streams in parts]


def _texts(arguments: EvaluateArguments) -> Iterator[str]:
    paths, table_format = find_files(arguments.files or ())
    for path in paths:
        for place, row in rows_of(path, table_format, arguments.text_column):
            text = text_in(place, row, arguments.text_column)
            if text.strip():
                yield text


def _shared(arguments: EvaluateArguments, loaded: LanguageModel, reader: Reader) -> dict[str, Any]:
    """What all lines of a run have in common."""
    settings: dict[str, Any] = {"dtype": arguments.dtype}
    if arguments.suite != TEXT:
        settings |= {"controls": arguments.controls} | ({"window": arguments.window} if arguments.controls else {})
        number = arguments.control_samples
        settings |= {"control_samples": number} if arguments.controls and number and number < arguments.asked else {}
    return {
        **{"suite": arguments.suite, "name": arguments.shown_name, "checkpoint": arguments.checkpoint},
        **{"weights": loaded.weights_digest(), "model_type": loaded.model.config.model_type},
        **{"num_parameters": loaded.model.num_parameters(), "trained_on": arguments.trained_on},
        **{"length_unit": loaded.length_unit, "num_samples": arguments.asked, "seed": arguments.seed},
        **{"settings": settings, "device": loaded.model.device.type, "batch_size": arguments.batch_size},
        "reading": reader.described(),
        **run_facts(torch.get_num_threads()),
    }


def _key(line: dict[str, Any]) -> tuple:
    return tuple(json.dumps(line.get(name), sort_keys=True) for name in _KEY)

"""What a row of n tokens costs in training: the peak memory of one forward and backward pass, and what
`gradient_checkpointing` changes.

- **bptt**: the gradient crosses the whole row.
- **dmt**: own memories in one pass over the row, the gradient crosses `window` transitions; the teacher is frozen.

Each arm stands beside the same one with `gradient_checkpointing`. Student, teacher and settings are those of the run
without arguments, but for the sizes that are given. Every cell has a process that has done nothing else. A cell that
would exceed the limit, going by the row half as long, is not measured. Processor seconds are those of the process, not
of the clock.
"""

import gc
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import set_seed

from smt_hf.command_line import argument
from smt_hf.errors import InputError
from smt_hf.experiments.default_run import SETTINGS, STUDENT, TEACHER
from smt_hf.student import SMTRecurrentConfig
from smt_hf.training.composite import SMTForPreTraining, SMTPreTrainingConfig
from smt_hf.training.phases import ARGUMENTS

from .arguments import BenchmarkArguments
from .memory_wall import PeakMemory
from .peers import count_parameters, describe
from .results import facts

PHASES = ("bptt", "dmt")
CHECKPOINTED = ", checkpointed"
# Of the settings of the run without arguments, those that say how a long row is trained.
_OF_DMT = ("on_policy_", "dynamics_weight", "normalized_dynamics_weight")


@dataclass
class LongRowsArguments(BenchmarkArguments):
    """Phases, rows, and when to stop."""

    phases: list[str] = argument(list(PHASES), "Phases to measure.")
    min_tokens: int = argument(1024, "Transitions of the shortest row; each longer one has twice as many.")
    max_tokens: int = argument(32768, "Transitions of the longest row.")
    batch_size: int = argument(1, "Rows side by side.")
    window: int = argument(32, "Transitions that a gradient crosses in dmt, as in the run without arguments.")
    memory_limit_gb: float = argument(6.0, "Limit of the peak, in 1e9 bytes.")
    ratio_tokens: int = argument(512, "Transitions of the row whose seconds are compared.")
    repeats: int = argument(3, "Passes of either arm for the ratio of seconds, alternating; the median ratio counts.")
    figure: str | None = argument(None, "Picture of the lines of `output`, a file that ends in .png.")

    def __post_init__(self):
        super().__post_init__()
        self.at_least_1("min_tokens", "batch_size", "window", "ratio_tokens", "repeats")
        self.among("phases", PHASES)
        self.positive("memory_limit_gb")
        if self.model is not None:
            raise InputError("this benchmark trains a fresh student: leave `model` out, and give sizes.")
        if self.max_tokens < self.min_tokens:
            raise InputError("`max_tokens` must be at least `min_tokens`.")
        if self.figure is not None and not (self.figure.endswith(".png") and self.output):
            raise InputError("`figure` must be a file that ends in .png, and needs an `output` to draw from.")

    def lengths(self) -> list[int]:
        """Ascending; the last is `max_tokens` at most."""
        lengths = [self.min_tokens]
        while 2 * lengths[-1] <= self.max_tokens:
            lengths.append(2 * lengths[-1])
        return lengths


class Row:
    """One phase of the run without arguments, on random rows.

    Args:
        arguments: sizes.
        phase: which.
        length: transitions of a row.
    """

    def __init__(self, arguments: LongRowsArguments, phase: str, length: int):
        torch.set_num_threads(arguments.num_threads)
        set_seed(arguments.seed)
        own: dict[str, Any] = {"transition_steps": length}
        if phase == "dmt":
            own = {name: value for name, value in SETTINGS["dmt"].items() if name.startswith(_OF_DMT)}
            own["transition_steps"] = min(arguments.window, length)
        settings = ARGUMENTS[phase](
            output_dir="unused",
            context_length=length,
            use_cpu=True,
            report_to="none",
            gradient_checkpointing=True,
            **own,
        )
        self.kind = settings.gradient_checkpointing_kwargs
        self.objective = settings.objective()
        student = SMTRecurrentConfig(**{**STUDENT, "tie_word_embeddings": False, **arguments.sizes()})
        teacher = None if phase == "bptt" else TEACHER if student.updater_type == STUDENT["updater_type"] else {}
        self.model = SMTForPreTraining(SMTPreTrainingConfig(student=student.to_dict(), teacher=teacher)).train()
        self.model.freeze_for(phase, settings.trains_updater, None, self.objective)
        self.tokens = torch.randint(student.vocab_size, (arguments.batch_size, length + 1))

    def passes(self, is_checkpointed: bool) -> float:
        """Forward and backward pass; processor seconds."""
        if is_checkpointed:
            self.model.gradient_checkpointing_enable(self.kind)
        else:
            self.model.gradient_checkpointing_disable()
        begin = time.process_time()
        self.model(input_ids=self.tokens, objective=self.objective).loss.backward()
        seconds = time.process_time() - begin
        self.model.zero_grad()
        return seconds


def peak_of(arguments: LongRowsArguments, phase: str, length: int, is_checkpointed: bool) -> tuple[int | None, float]:
    """Peak growth of this process by one pass over a row, in bytes, and its processor seconds."""
    Row(arguments, phase, 2 * arguments.window).passes(is_checkpointed)  # what torch loads and allocates once
    gc.collect()
    memory = PeakMemory()
    seconds = Row(arguments, phase, length).passes(is_checkpointed)
    return memory.peak_growth(), seconds


def ratio_of(arguments: LongRowsArguments, phase: str) -> float:
    """Processor seconds of a checkpointed pass over those of a plain one."""
    row = Row(arguments, phase, arguments.ratio_tokens)
    row.passes(False)
    return statistics.median(row.passes(True) / row.passes(False) for _ in range(arguments.repeats))


def _in_a_process_of_its_own(function, *arguments):
    """As `in_a_fresh_process`, in a copy of this process, which computes nothing: imports cost more than short rows."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *arguments).result()


def measure_long_rows(arguments: LongRowsArguments, known: list[dict]) -> Iterator[dict]:
    """Measure the cells that are not among the known lines, short rows first.

    Yields:
        One line per phase, length and arm, as soon as it is there: `arm`, `tokens` (transitions of a row),
        `peak_growth_bytes`, `seconds` (of the processor, forward and backward pass), `measured`, `needs_bytes` (of a
        cell that is not measured: twice those of the row half as long, which are beyond the limit), and
        `seconds_ratio` (checkpointed over plain, at `ratio_tokens`; in the line of the shortest checkpointed row).
    """
    there = {(line["arm"], line["tokens"]): line for line in known if line.get("benchmark") == "long_rows"}
    with torch.device("meta"):
        student = SMTRecurrentConfig(**{**STUDENT, "tie_word_embeddings": False, **arguments.sizes()})
        parameters = count_parameters(SMTForPreTraining(SMTPreTrainingConfig(student=student.to_dict())))
    shared: dict[str, Any] = {name: getattr(arguments, name) for name in ("batch_size", "memory_limit_gb", "seed")}
    shared |= {"parameters": parameters, "sizes": describe(student), **facts(arguments.num_threads)}
    cells = [
        (length, phase, is_checkpointed)
        for length in arguments.lengths()
        for phase in arguments.phases
        for is_checkpointed in (True, False)
    ]
    for length, phase, is_checkpointed in tqdm(cells, unit="cell", dynamic_ncols=True):
        arm = phase + CHECKPOINTED * is_checkpointed
        if (arm, length) in there:
            continue
        before = there.get((arm, length // 2), {})
        needs = 2 * (before.get("peak_growth_bytes") or before.get("needs_bytes") or 0)
        line: dict[str, Any] = {"benchmark": "long_rows", "arm": arm, "tokens": length, "peak_growth_bytes": None}
        line |= {"seconds": None, "measured": needs <= 1e9 * arguments.memory_limit_gb, "needs_bytes": None}
        line |= {"window": arguments.window if phase == "dmt" else length, **shared}
        if line["measured"]:
            cell = (arguments, phase, length, is_checkpointed)
            line["peak_growth_bytes"], line["seconds"] = _in_a_process_of_its_own(peak_of, *cell)
            if is_checkpointed and length == arguments.min_tokens:
                line["ratio_tokens"] = arguments.ratio_tokens
                line["seconds_ratio"] = _in_a_process_of_its_own(ratio_of, arguments, phase)
        else:
            line["needs_bytes"] = needs
        there[arm, length] = line
        yield line

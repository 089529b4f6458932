"""A grid of runs from YAML: every task at every difficulty by every arm under every seed, one JSON line an arm.

Lines are appended as each run ends, so that a grid can be cut off and resumed; the report is made from them alone.
"""

import concurrent.futures
import contextlib
import json
import math
import multiprocessing
import os
import tempfile
import threading
import time
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from tqdm.auto import tqdm
from transformers import set_seed
from transformers.utils import logging

from smt_hf.evaluation import evaluate_rows, score_student
from smt_hf.publishing.provenance import run_facts
from smt_hf.training.arguments import PhaseArguments
from smt_hf.training.composite import SMTForPreTraining
from smt_hf.training.phases import ARGUMENTS, PhaseResult, apply_required, lay_out, run_phases

from .composition import model_config, phase_settings
from .subjects import HELDOUT_SEED, PixelSubject, Subject, TaskSubject, TextSubject

# Rows of the pictures: drift, gradients, geometry, longer rows.
_PICTURE_ROWS, _LONGER_ROWS = 64, 256
_UNUSED = "unused"  # every run gets a folder of its own
_QUIET: dict[str, Any] = {"disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "report_to": "none"}


@dataclass(frozen=True)
class Run:
    """One training of the grid.

    Args:
        task, difficulty, arm, seed: the cell. `arm` is what the YAML calls it; the lines carry the names of the
            pipelines that come out of it.
        phases: names and arguments, in order, each with its `max_seconds` or `max_steps`.
        student, teacher: fields of the configurations.
        curriculum: easier difficulties.
        group, variant: of a sweep or an ablation.
        num_threads: of the process.
        sources: files that the subject is read from.
    """

    task: str
    difficulty: int | None
    arm: str
    seed: int
    phases: tuple[tuple[str, dict], ...]
    student: dict
    teacher: dict
    curriculum: tuple[int, ...] = ()
    group: str | None = None
    variant: str | None = None
    num_threads: int = 1
    num_heldout: int = 4096
    sources: dict = field(default_factory=dict)

    def key(self) -> tuple:
        """What tells a run from others in a file of lines."""
        return (self.task, self.difficulty, self.arm, self.seed, self.group, self.variant)

    def digest(self) -> str:
        """Of the settings; the same key with another digest is another experiment."""
        names = ("phases", "student", "teacher", "curriculum", "num_threads", "num_heldout")
        settings = [getattr(self, name) for name in names] + ([self.sources] if self.sources else [])
        return f"{zlib.crc32(json.dumps(settings, sort_keys=True, default=str).encode()):08x}"


def is_done(run: Run, lines: list[dict]) -> bool:
    """Whether the last line of the run is among `lines`.

    Raises:
        ValueError: it is, with other settings.
    """
    names = ("task", "asked_difficulty", "run", "seed", "group", "variant")
    for line in lines:
        if line.get("is_last") and tuple(line.get(name) for name in names) == run.key():
            if line.get("settings_digest", run.digest()) != run.digest():
                raise ValueError(
                    f"the lines of {run.key()} come from other settings than the grid has now: take its old lines out "
                    "of the file, or name another `--output`."
                )
            return True
    return False


def train_run(run: Run) -> list[dict]:
    """Train and score; the lines of all arms that come out of the run, in order."""
    arguments: list[PhaseArguments] = [
        ARGUMENTS[name](**{"output_dir": _UNUSED, "seed": run.seed, **_QUIET, **settings})
        for name, settings in run.phases
    ]
    torch.set_num_threads(run.num_threads)
    logging.disable_progress_bar()
    disable_progress_bars()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    subject = subject_of(run, arguments)
    for phase, values in zip(arguments, subject.required_of(arguments)):
        apply_required(phase, values)
    config = model_config(subject, arguments, run.student, run.teacher)
    set_seed(run.seed)
    model = SMTForPreTraining(config)
    facts = run_facts(run.num_threads, arguments[0])
    shared = {
        "task": subject.name,
        "difficulty": subject.difficulty,
        "chance": subject.chance,
        "seed": run.seed,
        "run": run.arm,
        "asked_difficulty": run.difficulty,
        "settings_digest": run.digest(),
        **({"group": run.group, "variant": run.variant} if run.group else {}),
        **{name: facts[name] for name in ("commit", "hardware", "num_threads", "versions")},
        "data_hash": subject.facts()["hash"],
        "student": run.student,
        "teacher": run.teacher,
        "curriculum": list(run.curriculum),
        "num_parameters": sum(parameter.numel() for parameter in model.student.parameters()),
    }
    lines: list[dict] = []
    spent = {"wall_clock_s": 0.0, "sequential_steps": 0, "tokens": 0, "optimizer_steps": 0}
    curve: list[dict] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        lay_out(arguments, folder)
        for result in run_phases(model, arguments, subject.rows, subject.eval_rows, None, subject.evaluate):
            curve += _curve(result, spent)
            spent["wall_clock_s"] += result.seconds
            spent["sequential_steps"] += result.sequential_steps
            spent["tokens"] += result.tokens
            spent["optimizer_steps"] += max((line.get("step", 0) for line in result.log_history), default=0)
            if not getattr(result.arguments, "trains_updater", True):
                continue  # the teacher's line comes with the phase that trains the student
            for part, scores in reversed(result.scores.items()):  # the teacher's line before the student's
                name = result.arm if part == "student" else part
                line = {**shared, "arm": name, **{key: _finite(scores[key]) for key in scores if key != "losses"}}
                line |= {**spent, "phases": [phase_settings(phase) for phase in arguments]}
                if part == "student":
                    line["curve"] = list(curve)
                lines.append(line)
        if lines[-1][subject.metric] is not None:  # a diverged student has no pictures
            lines[-1] |= pictures(model, subject)
    lines[-1] |= {"is_last": True, "total_seconds": round(time.perf_counter() - started, 1)}
    return lines


def _finite(value):
    return value if not isinstance(value, float) or math.isfinite(value) else None


def _curve(result: PhaseResult, spent: dict) -> list[dict]:
    """Held-out loss of the student's own rollout on the way, over seconds and sequential steps."""
    points = []
    for line in result.log_history:
        if "eval_rollout" in line:
            point = {
                "seconds": round(spent["wall_clock_s"] + line.get("seconds", 0.0), 2),
                "sequential_steps": spent["sequential_steps"] + line.get("sequential_steps", 0),
                "tokens": spent["tokens"] + line.get("tokens", 0),
                "step": spent["optimizer_steps"] + line["step"],
                "loss": _finite(round(line["eval_rollout"], 4)),
            }
            points.append(point | {"accuracy": round(line.get("eval_accuracy", 0.0), 4)})
    return points


def pictures(model: SMTForPreTraining, subject: Subject) -> dict[str, Any]:
    """What the figures of a line are drawn from: drift, gradients, geometry, longer rows, samples."""
    rows, labels = (part[:_PICTURE_ROWS] for part in subject.heldout)
    shown: dict[str, Any] = {}
    if isinstance(subject, TextSubject):
        rows, labels = rows[:, : 256 + 1], labels[:, : 256 + 1]
        shown["samples"] = [_written(model.student, subject)]
    elif isinstance(subject, PixelSubject):
        shown["samples"] = subject.samples(model.student)
    elif isinstance(subject, TaskSubject):
        shown["length_generalization"] = _longer(model.student, subject)
    return shown | evaluate_rows(model, rows, labels)


def _longer(student, subject: TaskSubject) -> dict[str, float]:
    scores = {}
    for factor in (1, 2, 4):
        difficulty = subject.longer(factor)
        if difficulty is not None:
            rows = subject.heldout_rows(difficulty, _LONGER_ROWS)
            scores[str(factor)] = round(score_student(student, *rows).accuracy, 4)
    return scores


@torch.inference_mode()
def _written(student, subject: TextSubject, prompt_tokens: int = 96, new_tokens: int = 160) -> str:
    prompt = torch.from_numpy(subject.streams[len(subject.streams) // 3, :prompt_tokens])[None]
    set_seed(0)
    tokens = student.generate(
        prompt.to(student.device), max_new_tokens=new_tokens, do_sample=True, temperature=0.7, pad_token_id=0
    )
    return subject.tokenizer.decode(tokens[0])


def subject_of(run: Run, arguments: list[PhaseArguments]) -> Subject:
    """The subject of a run."""
    if run.task == "text":
        train_file = run.sources.get("train_file")
        return TextSubject(arguments, run.seed, train_file, stream_length=run.difficulty)  # the same for all arms
    if run.task == "pixels":
        return PixelSubject(run.sources.get("mnist_dir"), run.num_heldout)
    if run.difficulty is None:
        raise ValueError(f"task {run.task!r} needs `difficulties`.")
    # Runs of a group are there to choose settings by.
    heldout_seed = HELDOUT_SEED + (2 if run.group else 1)
    return TaskSubject(run.task, run.difficulty, run.curriculum, run.seed, run.num_heldout, heldout_seed)


def run_grid(runs: list[Run], output: Path, jobs: int = 1) -> Iterator[list[dict]]:
    """Train what is not yet in `output`, `jobs` at a time, and append the lines of each run as it ends.

    Yields the lines of each run.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in output.read_text().splitlines() if line] if output.exists() else []
    waiting = [run for run in runs if not is_done(run, done)]
    bar = tqdm(total=len(runs), initial=len(runs) - len(waiting), desc=output.stem, dynamic_ncols=True)
    # Processes of their own, with no more threads than a run has, and cores of their own where there are enough: two
    # timed runs on one core would each take the other's seconds.
    context = multiprocessing.get_context("spawn")
    num_threads = max((run.num_threads for run in waiting), default=1)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(num_threads)
    slots = context.Queue()
    for slot in range(jobs):
        slots.put(slot)
    with concurrent.futures.ProcessPoolExecutor(
        jobs, context, initializer=_settle, initargs=(slots, jobs, num_threads)
    ) as pool:
        futures = {pool.submit(_train_quietly, run): run for run in waiting}
        for future in concurrent.futures.as_completed(futures):
            run = futures[future]
            try:
                lines = future.result()
            except Exception:
                tqdm.write(f"failed: {run.key()}")
                for other in futures:
                    other.cancel()
                raise
            with output.open("a") as file:
                file.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
            bar.update()
            tqdm.write("; ".join(_short(line) for line in lines))
            yield lines
    bar.close()


def _settle(slots, jobs: int, num_threads: int) -> None:
    """Give a worker cores of its own, and let it end with the process that started it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        slot = slots.get()
        if jobs * num_threads <= len(cores):
            os.sched_setaffinity(0, cores[slot * num_threads : (slot + 1) * num_threads])


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # a worker of a grid that was killed would go on training beside the next one


def _train_quietly(run: Run) -> list[dict]:
    with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
        return train_run(run)


def _short(line: dict) -> str:
    metric = next(name for name in ("bits_per_pixel", "bits_per_byte", "accuracy") if name in line)
    value = line[metric]
    named = f"{line['task']} {line['difficulty']} {line['arm']} seed {line['seed']}"
    named += f" [{line['variant']}]" if line.get("variant") else ""
    return f"{named}: {metric} {'diverged' if value is None else f'{value:.3f}'} after {line['wall_clock_s']:.0f} s"

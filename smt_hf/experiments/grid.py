"""A grid of runs: every task at every difficulty by every arm under every seed, one JSON line per arm.

Lines are appended as each run ends, so that a grid can be cut off and resumed; the report is made from them alone. The
last line of a run (`is_last`) says what the run was: settings of its phases that differ from their defaults, student
and teacher, versions, the curve of its held-out loss, and what figures are drawn from. The lines of the stages before
it, of the teacher and of shorter pipelines, hold their scores and costs, and of their phases what tells arms apart.
"""

import concurrent.futures
import contextlib
import json
import math
import multiprocessing
import os
import re
import tempfile
import threading
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import disable_progress_bars
from tqdm.auto import tqdm
from transformers import set_seed
from transformers.utils import logging

from smt_hf.errors import InputError
from smt_hf.evaluation import evaluate_rows, score_student
from smt_hf.publishing.arms import NAMING
from smt_hf.publishing.evidence import append_lines, read_lines
from smt_hf.publishing.export import export_student
from smt_hf.publishing.provenance import run_facts
from smt_hf.publishing.scores import metric_of
from smt_hf.training.arguments import PhaseArguments
from smt_hf.training.composite import SMTForPreTraining, SMTPreTrainingConfig
from smt_hf.training.embeddings import init_embeddings_from_model
from smt_hf.training.phases import ARGUMENTS, PhaseResult, lay_out, run_phases

from .composition import changed_settings, cost_of, model_config, resolve
from .grid_card import write_grid_card
from .grid_teacher import cache_dir_of, is_language_model, name_of, read_for, reading_line, told, unpacked_teacher
from .run_folder import check_writable, locked
from .subjects import (
    HELDOUT_SEED,
    DocumentSubject,
    PixelSubject,
    Subject,
    TaskSubject,
    TextSubject,
    check_rows,
)
from .teacher_language import teacher_tokenizer

# What the data of figures is computed from: rows, tokens of a stream of text, rows of several times the length, rows of
# documents.
_FIGURE_ROWS, _STREAM_TOKENS, _LONGER_ROWS, _DOCUMENT_ROWS = 64, 256 + 1, 256, 16
# Logits of those rows at most, 256 MB: a language model's vocabulary leaves few rows.
_FIGURE_LOGITS = 2**26
_CURVE_POINTS = 24
_QUIET: dict[str, Any] = {"disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "report_to": "none"}


@dataclass(frozen=True)
class Run:
    """One training of the grid."""

    # The cell. `arm` is the name in the YAML; the lines carry the names of the pipelines that the run trains.
    task: str
    difficulty: int | None
    arm: str
    seed: int
    phases: tuple[tuple[str, dict], ...]  # names and arguments, in order, each with its `max_seconds` or `max_steps`
    student: dict  # fields of the configuration
    teacher: dict  # likewise
    curriculum: tuple[int, ...] = ()  # easier difficulties
    group: str | None = None  # of a sweep or an ablation
    variant: str | None = None  # what this run of the group changes
    num_threads: int = 1  # of the process
    num_heldout: int = 4096  # labels of a task, or images, that are scored
    documents: tuple[str, ...] = ()  # what the rows are made of, where they are documents
    sources: dict = field(default_factory=dict)  # files that the subject is read from
    train_tokens: int | None = None  # of the text, where it is not all of it
    init_embeddings_from_teacher: bool = False  # begin embeddings and head as those of the teacher's model
    loaded_teacher: dict | None = None  # `teacher`, where the model has been unpacked to another folder

    def key(self) -> tuple:
        """What tells the run from others in a file of lines."""
        return (self.task, self.difficulty, self.arm, self.seed, self.group, self.variant)

    def folder(self) -> str:
        """Name of the folder of its student."""
        named = [str(part) for part in self.key() if part is not None]
        return re.sub(r"[^\w.+-]+", "_", "_".join(named))

    def digest(self) -> str:
        """A hash of the settings; the same key with another digest is another experiment."""
        # Where the cache of a teacher and its model lie changes nothing.
        phases = [(name, {key: of[key] for key in of if key != "teacher_cache_dir"}) for name, of in self.phases]
        settings = [phases, self.student, told(self.teacher), self.curriculum, self.num_threads, self.num_heldout]
        optional = (self.sources, self.documents, self.train_tokens, self.init_embeddings_from_teacher)
        settings += [given for given in optional if given]
        return f"{zlib.crc32(json.dumps(settings, sort_keys=True, default=str).encode()):08x}"


def train_run(run: Run, students: Path | None = None) -> list[dict]:
    """Train and score; the lines of all arms that the run trains, in order.

    Args:
        students: folder in which the student is kept, in a folder of its own.
    """
    arguments, subject, config = _prepared(run, run.num_threads)
    cost = read_for(config, arguments, subject, run.num_threads)
    set_seed(run.seed)
    model = SMTForPreTraining(config)
    if run.init_embeddings_from_teacher:
        where = run.loaded_teacher or run.teacher
        name, revision, gguf_file = (where.get(key) for key in ("model_name_or_path", "revision", "gguf_file"))
        init_embeddings_from_model(model.student, str(name), revision, gguf_file)
    facts = run_facts(run.num_threads, arguments[0])
    shared = {
        **{"task": subject.name, "difficulty": subject.difficulty, "chance": subject.chance, "seed": run.seed},
        **{"run": run.arm, "asked_difficulty": run.difficulty},
        **({"group": run.group, "variant": run.variant} if run.group else {}),
        **{name: facts[name] for name in ("commit", "hardware")},
    }
    lines: list[dict] = []
    spent = Counter(wall_clock_s=0, sequential_steps=0, tokens=0, optimizer_steps=0)
    phases: list[dict] = []
    curve: list[dict] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        lay_out(arguments, folder)
        for result in run_phases(model, arguments, subject.rows, subject.eval_rows, None, subject.evaluate):
            curve += _curve(result, spent)
            steps = max((line.get("step", 0) for line in result.log_history), default=0)
            spent.update({**cost_of(result), "optimizer_steps": steps})
            phases.append(changed_settings(result.arguments))
            if not result.arguments.trains_updater:
                continue  # the teacher's line comes with the phase that trains the student
            naming = [{name: phase[name] for name in NAMING if name in phase} for phase in phases]
            for part, scores in reversed(result.scores.items()):  # the teacher's line before the student's
                arm = result.arm if part == "student" else part
                known = {name: _finite(scores[name]) for name in scores if name != "losses"}
                lines.append({**shared, "arm": arm, **known, **spent, "phases": naming})
        given = {"student": run.student, "teacher": told(run.teacher), "curriculum": list(run.curriculum)}
        given |= {name: getattr(run, name) for name in ("train_tokens", "init_embeddings_from_teacher")}
        last = lines[-1]
        last |= {"settings_digest": run.digest(), "phases": phases}
        last |= {name: value for name, value in given.items() if value}
        last |= {"data_hash": subject.facts()["hash"], "num_parameters": model.student.num_parameters()}
        last |= {name: facts[name] for name in ("num_threads", "versions")}
        last["curve"] = _columns(curve)
        if last[subject.metric] is not None:  # a diverged student has no figures
            last |= data_of_figures(model, subject)
    if students is not None:
        export_student(model.student, subject.tokenizer, students / run.folder())
        if is_language_model(run.teacher):
            reading = None if cost is None else reading_line(cost, str(cache_dir_of(arguments)))
            write_grid_card(students / run.folder(), model, subject, arguments, last, name_of(run.teacher), reading)
    last |= {"is_last": True, "total_seconds": round(time.perf_counter() - started, 1)}
    return lines


def _prepared(run: Run, num_threads: int) -> tuple[list[PhaseArguments], Subject, SMTPreTrainingConfig]:
    """Arguments, data and sizes of a run, in a process with so many threads."""
    fixed = {"output_dir": "unused", "seed": run.seed, **_QUIET}  # every run gets a folder of its own
    arguments = [ARGUMENTS[name](**{**fixed, **settings}) for name, settings in run.phases]
    torch.set_num_threads(num_threads)
    logging.disable_progress_bar()
    disable_progress_bars()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    subject = subject_of(run, arguments)
    resolve(arguments, subject)
    return arguments, subject, model_config(subject, arguments, run.student, run.loaded_teacher or run.teacher)


def _finite(value):
    return value if not isinstance(value, float) or math.isfinite(value) else None


def _curve(result: PhaseResult, spent: dict) -> list[dict]:
    """Held-out loss (nats per label) of the student's own rollout on the way, and what had been spent by then."""
    return [
        {
            "seconds": round(spent["wall_clock_s"] + line.get("seconds", 0.0), 1),
            "sequential_steps": spent["sequential_steps"] + line.get("sequential_steps", 0),
            "tokens": spent["tokens"] + line.get("tokens", 0),
            "loss": _finite(round(line["eval_rollout"], 4)),
            "accuracy": round(line.get("eval_accuracy", 0.0), 4),
        }
        for line in result.log_history
        if "eval_rollout" in line
    ]


def _columns(points: list[dict]) -> dict[str, list]:
    """Evenly spaced points of a curve, name -> values."""
    if not points:
        return {}
    places = sorted(set(np.linspace(0, len(points) - 1, _CURVE_POINTS).round().astype(int)))
    return {name: [points[at][name] for at in places] for name in points[0]}


def data_of_figures(model: SMTForPreTraining, subject: Subject) -> dict[str, Any]:
    """What the figures of a line are drawn from: all evaluations of `smt_hf.evaluation`, samples, longer rows."""
    # The streams of text are long; a row of a task is asked at its end.
    most = _STREAM_TOKENS if isinstance(subject, TextSubject) else None
    num_rows = _DOCUMENT_ROWS if isinstance(subject, DocumentSubject) else _FIGURE_ROWS  # documents are long
    rows, labels = (part[:num_rows, :most] for part in subject.heldout)
    fewer = max(_FIGURE_LOGITS // (rows.shape[1] * subject.vocab_size), 2)
    rows, labels = rows[:fewer], labels[:fewer]
    shown = evaluate_rows(model, rows, labels)
    if isinstance(subject, TextSubject):
        shown["samples"] = [subject.tokenizer.decode(torch.cat(subject.continuation(model.student, 96, 160)))]
    elif isinstance(subject, PixelSubject):
        shown["samples"] = subject.samples(model.student)
    elif isinstance(subject, TaskSubject | DocumentSubject):
        longer = {factor: subject.longer(factor) for factor in (1, 2, 4)}
        num_rows = _LONGER_ROWS if isinstance(subject, TaskSubject) else _DOCUMENT_ROWS
        shown["length_generalization"] = {
            str(factor): round(score_student(model.student, *subject.heldout_rows(level, num_rows)).accuracy, 4)
            for factor, level in longer.items()
            if level is not None
        }
    return shown


def subject_of(run: Run, arguments: list[PhaseArguments]) -> Subject:
    """The subject of a run."""
    if run.task == "text":
        # The held-out streams are the same for all arms.
        settings: dict[str, Any] = {"stream_length": run.difficulty, "train_tokens": run.train_tokens}
        settings["tokenizer"] = teacher_tokenizer(run.loaded_teacher or run.teacher)
        if is_language_model(run.teacher):  # which would have to read those rows besides the others
            settings["document_start_fraction"] = 0.0
        return TextSubject(arguments, run.seed, run.sources.get("train_file"), **settings)
    if run.task == "pixels":
        return PixelSubject(run.sources.get("mnist_dir"), run.num_heldout)
    assert run.difficulty is not None
    # Runs of a group are there to choose settings by.
    heldout_seed = HELDOUT_SEED + (2 if run.group else 1)
    asked = (run.difficulty, run.curriculum)
    rest = (run.seed, run.num_heldout, heldout_seed)
    if run.documents:
        return DocumentSubject(run.documents, *asked, run.sources.get("haystack"), *rest, name=run.task)
    return TaskSubject(run.task, *asked, *rest)


def is_done(run: Run, lines: list[dict]) -> bool:
    """Whether the last line of the run is among `lines`.

    Raises:
        InputError: it is, with other settings.
    """
    names = ("task", "asked_difficulty", "run", "seed", "group", "variant")
    digest = run.digest()
    ended = [line for line in lines if line.get("is_last") and tuple(line.get(name) for name in names) == run.key()]
    if ended and ended[0].get("settings_digest", digest) != digest:
        raise InputError(
            f"the lines of {run.key()} come from other settings than the grid has now: take its old lines out of the "
            "file, or name another `--output`."
        )
    return bool(ended)


def run_grid(runs: list[Run], output: Path, jobs: int = 1, students: Path | None = None) -> Iterator[list[dict]]:
    """Train what is not yet in `output`, `jobs` at a time; append the lines of each run as it ends, and yield them.

    Args:
        students: folder in which the trained students are kept, each in a folder of its own. A folder that is there
            before its run has ended is not replaced.

    Raises:
        InputError: another process writes to `output`; it holds something else, or lines of other settings.
    """
    with locked(output.parent, f".{output.name}.lock"):
        done = read_lines(output) if output.exists() else []
        waiting = [run for run in runs if not is_done(run, done)]
        _check_students(runs, waiting, students)
        for documents, levels, haystack in {_rows_of(run) for run in waiting if run.documents}:
            check_rows(documents, levels, haystack)
        waiting, readings = _with_teachers(waiting, jobs)
        told_before = {json.dumps(line["teacher_cache"]) for line in done if "teacher_cache" in line}
        append_lines([line for line in readings if json.dumps(line["teacher_cache"]) not in told_before], output)
        with tqdm(total=len(runs), initial=len(runs) - len(waiting), desc=output.stem, dynamic_ncols=True) as bar:
            for lines in _trained(waiting, jobs, students):
                append_lines(lines, output)
                bar.update()
                tqdm.write("; ".join(_short(line) for line in lines))
                yield lines


def _with_teachers(runs: list[Run], jobs: int) -> tuple[list[Run], list[dict]]:
    """The runs with their language models unpacked, and what it has cost to let these fill the caches: one line for
    every kind of rows. A process of its own does both, with all the threads that the grid may use."""
    if not any(is_language_model(run.teacher) for run in runs):
        return runs, []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, _follow_parent) as pool:
        return pool.submit(read_ahead, runs, jobs).result()


def read_ahead(runs: list[Run], jobs: int = 1) -> tuple[list[Run], list[dict]]:
    """Let the language models of runs read what their caches lack, before these runs are trained side by side.

    Returns:
        The runs as `train_run` takes them, and a line for every set of rows that was asked for: what the caches hold
        and what filling them has cost, under `teacher_cache`.
    """
    loaded: list[Run] = []
    lines: dict[tuple, list[tuple[set[str], dict]]] = {}
    # One for all runs: those by BPTT alone, which cache nothing, begin with the tables of the model as well.
    folders = (of.get("teacher_cache_dir") for run in runs for _, of in run.phases)
    folder = next(filter(None, folders), None)
    for run in runs:
        if is_language_model(run.teacher):
            run = replace(run, loaded_teacher=unpacked_teacher(run.teacher, folder))
        loaded.append(run)
    # Those that keep next tokens keep states as well.
    caching = [run for run in loaded if any(of.get("teacher_cache_dir") for _, of in run.phases)]
    asked: set[str] = set()
    for run in sorted(caching, key=lambda run: not any(of.get("distillation_weight") for _, of in run.phases)):
        num_threads = jobs * run.num_threads
        arguments, subject, config = _prepared(run, num_threads)
        taught = [one for one in arguments if one.phase != "bptt"]
        wants = [(one.context_length, sorted(one.objective().likeliest.items())) for one in taught]
        key = json.dumps([run.teacher, run.sources, run.train_tokens, run.difficulty, sorted(set(map(str, wants)))])
        if key in asked:
            continue
        asked.add(key)
        cost = read_for(config, arguments, subject, num_threads)
        assert cost is not None
        line = {"task": run.task, "difficulty": subject.difficulty, "teacher": told(run.teacher)}
        reading = reading_line(cost, str(cache_dir_of(arguments)))
        cells = lines.setdefault((run.task, subject.difficulty), [])
        if not any(set(cost.folders) <= known for known, _ in cells):  # states alone are a part of what is told
            cells.append((set(cost.folders), {**line, "teacher_cache": reading}))
    return loaded, [line for cells in lines.values() for _, line in cells]


def _check_students(runs: list[Run], waiting: list[Run], students: Path | None) -> None:
    """Refuse what would replace a student, and say which students are missing."""
    if students is None:
        return
    check_writable("students", students)
    names = [run.folder() for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"two runs would keep their student in {students / twice[0]}: give them other names.")
    there = [run.folder() for run in waiting if (students / run.folder()).exists()]
    if there:
        raise InputError(
            f"{students / there[0]} is there, and its run is not among the lines of `--output`: remove the folder, or "
            "name another one by `--students`."
        )
    ended = [run.folder() for run in runs if run not in waiting and not (students / run.folder()).exists()]
    if ended:
        tqdm.write(f"warning: of {len(ended)} runs there are lines but no students, {ended[0]} for example.")


def _rows_of(run: Run) -> tuple:
    levels = [level for level in run.curriculum if level < (run.difficulty or 0)]
    return run.documents, (*levels, run.difficulty), tuple(run.sources.get("haystack") or ())


def _trained(runs: list[Run], jobs: int, students: Path | None) -> Iterator[list[dict]]:
    """The lines of each run, in the order in which the runs end.

    Workers are processes of their own, with no more threads than a run has. Several workers have cores of their own
    where there are enough: two timed runs on one core would slow each other down.
    """
    if not runs:
        return
    context = multiprocessing.get_context("spawn")
    num_threads = max(run.num_threads for run in runs)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(num_threads)
    slots = context.Queue()
    for slot in range(jobs):
        slots.put(slot)
    with concurrent.futures.ProcessPoolExecutor(jobs, context, _settle, (slots, jobs, num_threads)) as pool:
        futures = {pool.submit(_train_quietly, run, students): run for run in runs}
        for future in concurrent.futures.as_completed(futures):
            try:
                yield future.result()
            except Exception:
                tqdm.write(f"failed: {futures[future].key()}")
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _settle(slots, jobs: int, num_threads: int) -> None:
    """Give a worker cores of its own, and let it end with the process that started it."""
    _follow_parent()
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        slot = slots.get()
        # A single worker is left to the scheduler: the first cores may be those of another grid.
        if jobs > 1 and jobs * num_threads <= len(cores):
            os.sched_setaffinity(0, cores[slot * num_threads : (slot + 1) * num_threads])


def _follow_parent() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # a worker of a grid that was killed would go on training beside the next one


def _train_quietly(run: Run, students: Path | None) -> list[dict]:
    with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
        return train_run(run, students)


def _short(line: dict) -> str:
    metric = metric_of(line)
    value = line[metric]
    named = f"{line['task']} {line['difficulty']} {line['arm']} seed {line['seed']}"
    named += f" [{line['variant']}]" if line.get("variant") else ""
    return f"{named}: {metric} {'diverged' if value is None else f'{value:.3f}'} after {line['wall_clock_s']:.0f} s"

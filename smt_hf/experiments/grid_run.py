"""One run of a grid: what it trains, and the lines that come out of it.

The last line of a run (`is_last`) says what the run was: settings of its phases that differ from their defaults,
student and teacher, versions, the curve of its held-out loss, and what figures are drawn from. The lines of the stages
before it, of the teacher and of shorter pipelines, hold their scores and costs, and of their phases what tells arms
apart.
"""

import json
import math
import tempfile
import time
import warnings
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import disable_progress_bars
from transformers import set_seed
from transformers.utils import logging

from smt_hf.evaluation import evaluate_rows, score_student
from smt_hf.publishing.arms import NAMING
from smt_hf.publishing.provenance import run_facts
from smt_hf.training.arguments import PhaseArguments
from smt_hf.training.composite import SMTForPreTraining
from smt_hf.training.phases import ARGUMENTS, PhaseResult, lay_out, run_phases

from .composition import changed_settings, model_config, resolve
from .subjects import HELDOUT_SEED, PixelSubject, Subject, TaskSubject, TextSubject

# What the data of figures is computed from: rows, tokens of a stream of text, rows of several times the length.
_FIGURE_ROWS, _STREAM_TOKENS, _LONGER_ROWS = 64, 256 + 1, 256
_CURVE_POINTS = 24
_UNUSED = "unused"  # every run gets a folder of its own
_QUIET: dict[str, Any] = {"disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "report_to": "none"}


@dataclass(frozen=True)
class Run:
    """One training of the grid.

    Args:
        task, difficulty, arm, seed: the cell. `arm` is the name in the YAML; the lines carry the names of the pipelines
            that the run trains.
        phases: names and arguments, in order, each with its `max_seconds` or `max_steps`.
        student, teacher: fields of the configurations.
        curriculum: easier difficulties.
        group, variant: names of a sweep or an ablation, and of what this run of it changes.
        num_threads: threads of the process.
        num_heldout: labels of a task, or images, that are scored.
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
        """What tells the run from others in a file of lines."""
        return (self.task, self.difficulty, self.arm, self.seed, self.group, self.variant)

    def digest(self) -> str:
        """A hash of the settings; the same key with another digest is another experiment."""
        names = ("phases", "student", "teacher", "curriculum", "num_threads", "num_heldout")
        settings = [getattr(self, name) for name in names] + ([self.sources] if self.sources else [])
        return f"{zlib.crc32(json.dumps(settings, sort_keys=True, default=str).encode()):08x}"


def train_run(run: Run) -> list[dict]:
    """Train and score; the lines of all arms that the run trains, in order."""
    arguments = phases_of(run)
    torch.set_num_threads(run.num_threads)
    _be_quiet()
    subject = subject_of(run, arguments)
    resolve(arguments, subject)
    config = model_config(subject, arguments, run.student, run.teacher)
    set_seed(run.seed)
    model = SMTForPreTraining(config)
    facts = run_facts(run.num_threads, arguments[0])
    shared = {
        **{"task": subject.name, "difficulty": subject.difficulty, "chance": subject.chance, "seed": run.seed},
        **{"run": run.arm, "asked_difficulty": run.difficulty},
        **({"group": run.group, "variant": run.variant} if run.group else {}),
        **{name: facts[name] for name in ("commit", "hardware")},
    }
    lines: list[dict] = []
    spent = {"wall_clock_s": 0.0, "sequential_steps": 0, "tokens": 0, "optimizer_steps": 0}
    curve: list[dict] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        lay_out(arguments, folder)
        results = run_phases(model, arguments, subject.rows, subject.eval_rows, None, subject.evaluate)
        for number, result in enumerate(results, start=1):
            curve += _curve(result, spent)
            _add_costs(spent, result)
            if not result.arguments.trains_updater:
                continue  # the teacher's line comes with the phase that trains the student
            phases = [naming_settings(phase) for phase in arguments[:number]]
            for part, scores in reversed(result.scores.items()):  # the teacher's line before the student's
                arm = result.arm if part == "student" else part
                known = {name: _finite(scores[name]) for name in scores if name != "losses"}
                lines.append({**shared, "arm": arm, **known, **spent, "phases": phases})
        last = lines[-1]
        last |= _settings_of(run, arguments, model, subject)
        last |= {name: facts[name] for name in ("num_threads", "versions")}
        last["curve"] = _columns(curve)
        if last[subject.metric] is not None:  # a diverged student has no figures
            last |= data_of_figures(model, subject)
    last |= {"is_last": True, "total_seconds": round(time.perf_counter() - started, 1)}
    return lines


def phases_of(run: Run) -> list[PhaseArguments]:
    """The arguments of a run's phases."""
    return [
        ARGUMENTS[name](**{"output_dir": _UNUSED, "seed": run.seed, **_QUIET, **settings})
        for name, settings in run.phases
    ]


def _be_quiet() -> None:
    logging.disable_progress_bar()
    disable_progress_bars()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def naming_settings(arguments: PhaseArguments) -> dict:
    """Of a phase's settings those that tell arms apart."""
    settings = changed_settings(arguments)
    return {name: settings[name] for name in NAMING if name in settings}


def _settings_of(run: Run, arguments: list[PhaseArguments], model: SMTForPreTraining, subject: Subject) -> dict:
    given = {"student": run.student, "teacher": run.teacher, "curriculum": list(run.curriculum)}
    return {
        "settings_digest": run.digest(),
        "phases": [changed_settings(phase) for phase in arguments],
        **{name: value for name, value in given.items() if value},
        "data_hash": subject.facts()["hash"],
        "num_parameters": sum(parameter.numel() for parameter in model.student.parameters()),
    }


def _add_costs(spent: dict, result: PhaseResult) -> None:
    spent["wall_clock_s"] += result.seconds
    spent["sequential_steps"] += result.sequential_steps
    spent["tokens"] += result.tokens
    spent["optimizer_steps"] += max((line.get("step", 0) for line in result.log_history), default=0)


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
    rows, labels = (part[:_FIGURE_ROWS, :most] for part in subject.heldout)
    shown = evaluate_rows(model, rows, labels)
    if isinstance(subject, TextSubject):
        shown["samples"] = [_written(model.student, subject)]
    elif isinstance(subject, PixelSubject):
        shown["samples"] = subject.samples(model.student)
    elif isinstance(subject, TaskSubject):
        shown["length_generalization"] = _longer(model.student, subject)
    return shown


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
    assert run.difficulty is not None
    # Runs of a group are there to choose settings by.
    heldout_seed = HELDOUT_SEED + (2 if run.group else 1)
    return TaskSubject(run.task, run.difficulty, run.curriculum, run.seed, run.num_heldout, heldout_seed)

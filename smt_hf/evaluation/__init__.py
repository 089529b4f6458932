"""Evaluations of students and teachers on held-out rows, and the yardsticks that they are compared with.

Add an evaluation here: write a module with a function of a model (an `SMTForPreTraining`), its `input_ids` and `labels`
(rows as in `scores.py`, `(N, T + 1)` each) that returns a value which JSON can hold, or `None` for a model that it does
not apply to, and give it a line in `EVALUATIONS`. Every student that a grid trains is then evaluated by it.

| module | question |
|---|---|
| `scores.py` | How many labels are predicted right, at which loss? The score of every run. |
| `text.py` | Which labels and how many bytes has a stream of text? What do n-gram models of bytes reach on it? |
| `drift.py` | How far are the student's memories from the teacher's, how far do gradients reach? |
| `free_run.py` | What does the readout lose by the age of the memory, and how fast do two nearby memories part? |
| `metrics/` | Modules of Hugging Face's `evaluate`, which takes the predictions of any model. |
| `memories.py` | The walks over rows that all of them share. |
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .drift import drift_by_position, geometry_of, gradient_norm_by_distance, memory_geometry, teacher_gradient_norm
from .free_run import largest_lyapunov, loss_by_age
from .memories import reading_teacher
from .scores import Scores, score_student, score_teacher
from .text import NGramModel

# Modules of Hugging Face's `evaluate`, which loads them by path, offline.
_FOLDER = Path(__file__).with_name("metrics")
METRICS = tuple(sorted(path.name for path in _FOLDER.iterdir() if path.is_dir() and not path.name.startswith("_")))


def metric_path(name: str) -> str:
    """The folder of a metric, for `evaluate.load`.

    Raises:
        ValueError: there is no such metric.
    """
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}: choose one of {', '.join(METRICS)}.")
    return str(_FOLDER / name)


def _thinned(values: np.ndarray, first: int = 0, most: int = 24) -> list[list[float]]:
    """`[place, value]` at places that are evenly spaced on a logarithmic axis; values that are not finite are left out.

    Args:
        values: one per place, the place of the first being `first`.
        most: pairs at most.
    """
    places = sorted(set(np.geomspace(1, len(values), most).astype(int) - 1))
    return [[int(at) + first, float(f"{values[at]:.4g}")] for at in places if np.isfinite(values[at])]


def _geometry(model, input_ids: np.ndarray, labels: np.ndarray) -> dict[str, dict[str, float]]:
    names = {name: name for name in ("effective_rank", "participation_ratio", "spread")}
    names["rank"] = "effective_rank"  # the name that the figures draw
    clouds = geometry_of(model, input_ids[:, :-1])
    return {part: {name: round(values[key], 4) for name, key in names.items()} for part, values in clouds.items()}


def _loss_by_age(model, input_ids: np.ndarray, labels: np.ndarray) -> dict[str, Any] | None:
    means = loss_by_age(model, input_ids, labels)
    if means is None:
        return None
    by_age = {str(age): _finite(value) for age, value in means.pop("drift_by_age").items()}
    return {"by_age": by_age, **{name: _finite(value) for name, value in means.items()}}


def _finite(value: float | None) -> float | None:
    return round(value, 4) if value is not None and np.isfinite(value) else None


# By the name that the value has in the lines of a grid. A value of `None` is left out: the model has no teacher,
# or one that the evaluation does not apply to.
EVALUATIONS: dict[str, Callable[[Any, np.ndarray, np.ndarray], Any]] = {
    "gradient_norm": lambda model, ids, labels: _thinned(gradient_norm_by_distance(model.student, ids, labels)),
    "geometry": _geometry,
    "teacher_gradient_norm": lambda model, ids, labels: (
        _thinned(teacher_gradient_norm(model, ids, labels))
        if reading_teacher(model) is not None and getattr(model.teacher, "has_embedding_gradients", True)
        else None
    ),
    "drift": lambda model, ids, labels: (
        _thinned(drift_by_position(model, ids[:, :-1]), first=1) if reading_teacher(model) is not None else None
    ),
    "loss_by_age": _loss_by_age,
    "lyapunov": lambda model, ids, labels: _finite(largest_lyapunov(model.student, ids)),
}


def evaluate_rows(model, input_ids: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """All evaluations of the table that apply to a model, by name.

    Args:
        model: an `SMTForPreTraining`.
        input_ids, labels: `(N, T + 1)`.
    """
    values = {name: evaluation(model, input_ids, labels) for name, evaluation in EVALUATIONS.items()}
    return {name: value for name, value in values.items() if value is not None}


__all__ = [
    "EVALUATIONS",
    "METRICS",
    "NGramModel",
    "Scores",
    "drift_by_position",
    "evaluate_rows",
    "geometry_of",
    "gradient_norm_by_distance",
    "largest_lyapunov",
    "loss_by_age",
    "memory_geometry",
    "metric_path",
    "reading_teacher",
    "score_student",
    "score_teacher",
    "teacher_gradient_norm",
]

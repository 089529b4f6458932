"""Evaluations of students and teachers on held-out rows, and the yardsticks that they are compared with.

Add an evaluation here: write a module with a function of a model (an `SMTForPreTraining`), its `input_ids` and `labels`
(rows as in `scores.py`, `(N, T + 1)` each) that returns a value which JSON can hold, and give it a line in
`EVALUATIONS`. Every student that a grid trains is then evaluated by it.

| module | question |
|---|---|
| `scores.py` | How many labels are predicted right, at which loss? The score of every run. |
| `streams.py` | Which labels and how many bytes has a stream of text? |
| `ngram.py` | What do n-gram models of bytes reach on the same text? |
| `drift.py` | How far are the student's memories from the teacher's, how far do gradients reach? |
| `long_context.py` | How do predictions and recall change far beyond the training length? |
| `metrics/` | Modules of Hugging Face's `evaluate`, which takes the predictions of any model. |
| `memories.py` | The walks over rows that all of them share. |
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .drift import drift_by_position, geometry_of, gradient_norm_by_distance, memory_geometry, teacher_gradient_norm
from .long_context import bits_by_position, far_needle_accuracy
from .metric_modules import METRICS, metric_path
from .ngram import NGramModel
from .scores import Scores, score_student, score_teacher


def _thinned(values: np.ndarray, first: int = 0, most: int = 24) -> list[list[float]]:
    """`[place, value]` at places that are evenly spaced on a logarithmic axis; values that are not finite are left out.

    Args:
        values: one per place, the place of the first being `first`.
        most: pairs at most.
    """
    places = sorted(set(np.geomspace(1, len(values), most).astype(int) - 1))
    return [[int(at) + first, float(f"{values[at]:.4g}")] for at in places if np.isfinite(values[at])]


def _geometry(model, input_ids: np.ndarray, labels: np.ndarray) -> dict[str, dict[str, float]]:
    clouds = geometry_of(model, input_ids[:, :-1])
    for values in clouds.values():
        values["rank"] = values["effective_rank"]  # the name that the figures draw
    names = ("effective_rank", "participation_ratio", "spread", "rank")
    return {part: {name: round(values[name], 4) for name in names} for part, values in clouds.items()}


class Evaluation(NamedTuple):
    """A line of the table.

    Args:
        value: function of `(model, input_ids, labels)`.
        needs_teacher: left out for models that have no teacher.
    """

    value: Callable[[Any, np.ndarray, np.ndarray], Any]
    needs_teacher: bool = False


# By the name that the value has in the lines of a grid.
EVALUATIONS = {
    "gradient_norm": Evaluation(
        lambda model, ids, labels: _thinned(gradient_norm_by_distance(model.student, ids, labels))
    ),
    "geometry": Evaluation(_geometry),
    "teacher_gradient_norm": Evaluation(
        lambda model, ids, labels: _thinned(teacher_gradient_norm(model, ids, labels)), needs_teacher=True
    ),
    "drift": Evaluation(
        lambda model, ids, labels: _thinned(drift_by_position(model, ids[:, :-1]), first=1), needs_teacher=True
    ),
}


def evaluate_rows(model, input_ids: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """All evaluations of the table that apply to a model, by name.

    Args:
        model: an `SMTForPreTraining`.
        input_ids, labels: `(N, T + 1)`.
    """
    return {
        name: evaluation.value(model, input_ids, labels)
        for name, evaluation in EVALUATIONS.items()
        if model.teacher is not None or not evaluation.needs_teacher
    }


__all__ = [
    "EVALUATIONS",
    "Evaluation",
    "METRICS",
    "NGramModel",
    "Scores",
    "bits_by_position",
    "drift_by_position",
    "evaluate_rows",
    "far_needle_accuracy",
    "geometry_of",
    "gradient_norm_by_distance",
    "memory_geometry",
    "metric_path",
    "score_student",
    "score_teacher",
    "teacher_gradient_norm",
]

"""Predictions and recall far beyond the training length, from a memory of constant size.

Shapes: B streams, L tokens predicted, N rows, T tokens.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from .scores import score_student
from .streams import stream_labels


def bits_by_position(student, tokens: np.ndarray, edges: Sequence[int]) -> list[dict[str, float]]:
    """Mean bits per token at increasing ages of long streams, the memory carried on from `m_0`.

    Args:
        student: an `SMTRecurrentForCausalLM`.
        tokens: `(B, L + 1)`.
        edges: ages (tokens read) that bound the bins, increasing, within 0 .. L.

    Returns:
        `{"position": b, "bits": x}` for each pair of neighbouring edges a < b: predictions after a + 1 .. b tokens.

    Raises:
        ValueError: fewer than two edges, not increasing, or beyond the streams.
    """
    length = tokens.shape[1] - 1
    if len(edges) < 2 or edges[0] < 0 or edges[-1] > length or any(a >= b for a, b in pairwise(edges)):
        raise ValueError(f"`edges` must be two or more increasing numbers from 0 to {length}, got {list(edges)}.")
    scores = score_student(student, tokens, stream_labels(tokens))
    bits = scores.nats[1:] / scores.counts[1:] / math.log(2)
    return [{"position": int(end), "bits": float(bits[begin:end].mean())} for begin, end in pairwise(edges)]


def far_needle_accuracy(
    student,
    make_rows: Callable[[int], tuple[np.ndarray, np.ndarray]],
    distances: Sequence[int],
    chance: float | None = None,
    batch_size: int = 512,
) -> list[dict[str, float | None]]:
    """Accuracy of the student's own rollout from `m_0` as the needle moves away from the question.

    Args:
        student: an `SMTRecurrentForCausalLM`.
        make_rows: distance (tokens) -> `input_ids`, `labels`, each `(N, T + 1)`, as in `scores.py`.
        distances: the distances to try.
        chance: accuracy of guessing, noted in every result.
        batch_size: rows side by side; changes memory use and speed, not the result.

    Returns:
        `{"distance": d, "accuracy": x, "loss": nats per label, "n": labels, "chance": chance}` for each distance.
    """
    scored = {distance: score_student(student, *make_rows(distance), batch_size=batch_size) for distance in distances}
    return [
        {"distance": distance, "accuracy": scores.accuracy, "loss": scores.loss, "n": scores.n, "chance": chance}
        for distance, scores in scored.items()
    ]

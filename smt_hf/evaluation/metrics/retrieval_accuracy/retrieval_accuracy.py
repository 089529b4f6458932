"""Exact-match retrieval as an `evaluate` module: all answers, and by the distance to what was asked for."""

from collections import defaultdict

import datasets
import evaluate

_DESCRIPTION = """Share of answers that are exactly the value that was asked for, over all texts and, where distances
are given, in bins of distance: the far bins show what a recurrent model forgets."""

_INPUTS = """
Args:
    predictions: list of strings, the answers; surrounding white space is ignored.
    references: list of strings, the values.
    distances: list of ints, tokens between a value and the question. Optional.

Returns:
    accuracy: float between 0 and 1.
    n: int, number of answers.
    by_distance: only with distances; upper bound of a bin (a power of two, as a string) -> accuracy in it.

Examples:
    >>> metric = evaluate.load(metric_path("retrieval_accuracy"))
    >>> metric.compute(predictions=["7", " 3"], references=["7", "4"], distances=[5, 900])
    {'accuracy': 0.5, 'n': 2, 'by_distance': {'8': 1.0, '1024': 0.0}}
"""


class RetrievalAccuracy(evaluate.Metric):
    """Exact match after stripping."""

    def _info(self):
        columns = dict.fromkeys(("predictions", "references"), datasets.Value("string"))
        return evaluate.MetricInfo(_DESCRIPTION, "", datasets.Features(columns), _INPUTS)

    def _compute(self, predictions, references, distances=None):
        if not references:
            raise ValueError("there are no answers to score.")
        hits = [answer.strip() == value.strip() for answer, value in zip(predictions, references)]
        scores = {"accuracy": sum(hits) / len(hits), "n": len(hits)}
        if distances is not None:
            if len(distances) != len(hits) or min(distances) < 1:
                raise ValueError("`distances` must be numbers from 1 on, one per answer.")
            bins = defaultdict(list)
            for hit, distance in zip(hits, distances):
                bins[1 << (distance - 1).bit_length()].append(hit)
            scores["by_distance"] = {str(bound): sum(bins[bound]) / len(bins[bound]) for bound in sorted(bins)}
        return scores

"""Scores of the arms of a grid, and our best arm against the better BPTT.

Everything is computed from the lines of the grid. A line is one arm in one cell with one seed; a cell is a task at a
difficulty.
"""

import math
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean, stdev
from typing import Any

from .units import UNITS, metric_of

SOLVED = 0.9  # two accuracies below it: neither side can do the task
BOTH_FAIL = ", both fail"
MARGIN = 0.02  # a smaller difference decides nothing, however small the standard error of a few seeds
_DIVERGED = 1e9  # badness of an arm that has no finite score


@dataclass(frozen=True)
class Score:
    """A metric over seeds.

    Args:
        mean: accuracy (0 to 1), or bits per byte or per pixel.
        error: standard error of the mean; `None` for a single seed.
        num_seeds: different seeds. Several lines of one seed are averaged first.
    """

    mean: float
    error: float | None
    num_seeds: int

    def __str__(self):
        return f"{self.mean:.3f}" + ("" if self.error is None else f" ± {self.error:.3f}")


@dataclass(frozen=True)
class Verdict:
    """Our best arm against the better BPTT in one cell.

    Args:
        ours, rival: the two arms.
        difference: ours minus rival, its error the root of the sum of the two squared.
        word: "ahead", "level" or "behind", with ", both fail" after it for two accuracies below 0.9.
    """

    ours: str
    rival: str
    difference: Score
    word: str

    def signed(self) -> str:
        """The difference with its sign, in the metric's units."""
        return ("+" if self.difference.mean >= 0 else "") + str(self.difference)


def judge(scores: dict[str, Score], kinds: dict[str, str], metric: str) -> Verdict | None:
    """Compare our best arm with the better BPTT.

    A difference counts beyond 0.02 and beyond two of its standard errors.

    Args:
        scores: arm -> score in one cell; of equal ones the first counts as the best.
        kinds: arm -> its kind: "ours" and "rival" are compared, others are not.
        metric: "accuracy" (higher is better), "bits_per_byte" or "bits_per_pixel" (lower is better).

    Returns:
        The verdict, or `None` if one of the two sides has no arm.
    """
    by_arm = {arm: badness(score, metric) for arm, score in scores.items()}
    sides = [[arm for arm in scores if kinds[arm] == kind] for kind in ("ours", "rival")]
    if not all(sides):
        return None
    ours, rival = (min(side, key=by_arm.__getitem__) for side in sides)
    errors = [error for error in (scores[ours].error, scores[rival].error) if error is not None]
    difference = Score(
        mean=scores[ours].mean - scores[rival].mean,
        error=math.hypot(*errors) if errors else None,
        num_seeds=min(scores[ours].num_seeds, scores[rival].num_seeds),
    )
    noise = 2 * (difference.error or 0)
    margin = max(MARGIN, noise if math.isfinite(noise) else 0) + 1e-9  # in floats 0.92 - 0.9 is more than 0.02
    gain = by_arm[rival] - by_arm[ours]
    word = "ahead" if gain > margin else "behind" if gain < -margin else "level"
    if metric == "accuracy" and min(by_arm[ours], by_arm[rival]) > -SOLVED:
        word += BOTH_FAIL
    return Verdict(ours, rival, difference, word)


def split_by(lines: list[dict], key: str) -> dict:
    """The value of a key, ascending -> lines that have it, in their order."""
    ordered = sorted(lines, key=lambda line: line[key])
    return {value: list(some) for value, some in groupby(ordered, key=lambda line: line[key])}


def score_of(lines: list[dict], *path: str) -> Score | None:
    """The score over the lines that have an entry at the path of keys, `None` without any.

    `null` there stands for a score that is not finite.
    """
    by_seed: dict[int, list[float]] = {}
    for line in lines:
        entry: Any = line
        for key in path:
            entry = (entry or {}).get(key, {})
        if entry != {}:
            by_seed.setdefault(line["seed"], []).append(math.nan if entry is None else entry)
    means = [fmean(values) for values in by_seed.values()]
    if not means:
        return None
    if len(means) == 1:
        return Score(means[0], None, 1)
    error = stdev(means) / math.sqrt(len(means)) if all(map(math.isfinite, means)) else math.nan
    return Score(fmean(means), error, len(means))


def metric_score(lines: list[dict]) -> Score:
    """The score of lines of one task in their metric."""
    score = score_of(lines, metric_of(lines[0]))
    assert score is not None
    return score


def chances_of(lines: list[dict]) -> dict[float, float]:
    """Difficulty -> the score of knowing nothing."""
    known = [line for line in lines if line.get("chance") is not None]
    return {
        difficulty: fmean(line["chance"] for line in some) for difficulty, some in split_by(known, "difficulty").items()
    }


def badness(score: Score, metric: str) -> float:
    """A score as a number that is lower for better ones, whatever the metric."""
    return UNITS[metric].badness(score.mean) if math.isfinite(score.mean) else _DIVERGED


def hardest_cells(lines: list[dict], *keys: str) -> list[tuple[str, list[dict]]]:
    """Title and lines of a cell per task: the highest difficulty at which lines have one of the keys, those lines."""
    cells = []
    for task, some in split_by([line for line in lines if any(line.get(key) for key in keys)], "task").items():
        difficulty, cell = list(split_by(some, "difficulty").items())[-1]
        cells.append((f"{task} {difficulty}", cell))
    return cells

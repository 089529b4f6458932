"""Scores of long-context lines: one model in one cell, over its training seeds.

A cell is a task at a length. Lines of one name in a cell are of one model that was trained several times, or that was
asked several draws of samples.
"""

import math
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from smt_hf.errors import InputError

from .evidence import split_by

_Z = 1.96
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # of 1 to 10 degrees of freedom
_NEEDED = ("suite", "task", "length", "length_unit", "name", "metric", "value")
# What an answer may come from without memory, besides chance.
CONTROLS = {"needle_removed": "needle removed", "last_window": "last window", "last_mentioned": "shortcut"}


@dataclass(frozen=True)
class Score:
    """One model in one cell."""

    suite: str
    task: str
    length: int
    unit: str
    name: str
    lines: list[dict]

    def values(self, *path: str) -> list[Any]:
        """What the lines have at a path of keys, those that have it."""
        found = []
        for line in self.lines:
            entry: Any = line
            for key in path:
                entry = (entry or {}).get(key)
            if entry is not None:
                found.append(entry)
        return found

    def mean(self, *path: str) -> float | None:
        """The mean over the lines; `None` if none has a value at the path."""
        values = self.values(*path)
        return fmean(values) if values else None

    def ends(self, *path: str) -> tuple[float, float] | None:
        """The 95 % interval of a value: that of the samples for one line, that over the lines for several."""
        values = self.values(*path)
        if len(values) > 1:
            half = _Z * stdev(values) / math.sqrt(len(values))
            return fmean(values) - half, fmean(values) + half
        intervals: list[Any] = self.values(*path[:-1], "interval")
        return tuple(intervals[0]) if intervals else None  # type: ignore[return-value]

    def standard_error(self) -> tuple[float, float]:
        """Of the mean value: that over trainings, or that of the samples if it is larger; and its degrees of freedom.

        All trainings are asked the same samples, so that several of them do not make the error of the samples smaller.
        """
        values = self.values("value")
        errors = [(high - low) / 2 / _Z for low, high in self.values("interval")]
        of_samples = fmean(errors) if errors else 0.0
        of_trainings = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        return (of_trainings, len(values) - 1) if of_trainings > of_samples else (of_samples, math.inf)

    def written(self, *path: str) -> str:
        """A value for a table: its interval for one line, its standard error and the number of lines for several."""
        values = self.values(*path)
        if not values:
            return ""
        if len(values) > 1:
            return f"{fmean(values):.3f} ± {stdev(values) / math.sqrt(len(values)):.3f} ({len(values)})"
        ends = self.ends(*path)
        return f"{values[0]:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")

    def rivals(self) -> list[float]:
        """Chance, and the score of each control that was measured."""
        found = [self.mean("chance"), *(self.mean("controls", name, "value") for name in CONTROLS)]
        return [value for value in found if value is not None]

    def shows_memory(self) -> bool | None:
        """Whether the lower end of the score is above chance and above every control; `None` without any of them."""
        ends, rivals = self.ends("value"), self.rivals()
        return ends[0] > max(rivals) if ends and rivals else None


def scores_of(lines: list[dict]) -> list[Score]:
    """The lines by suite, task, unit, length and name, in this order.

    Raises:
        InputError: a line lacks something; two lines of a name in a cell come from other settings or from other weights
            of one checkpoint, or are the same.
    """
    if not lines:
        raise InputError("there are no lines to report on: evaluate a model first.")
    for line in lines:
        missing = [key for key in _NEEDED if key not in line]
        if missing:
            known = {key: line[key] for key in _NEEDED if key in line}
            raise InputError(f"the line of {known} has no {', '.join(missing)}: mend or remove it.")
    cells = split_by(lines, "suite", "task", "length_unit", "length", "name")
    for (_, task, _, length, name), some in cells.items():
        for what in ("settings", "num_samples"):
            if any(line.get(what) != some[0].get(what) for line in some):
                raise InputError(
                    f"the lines of {name} at {task} {length} differ in their {what}: take those out that do not belong "
                    "together, or evaluate with another `--name`."
                )
        weights: dict[Any, Any] = {}
        for line in some:
            if weights.setdefault(line.get("checkpoint"), line.get("weights")) != line.get("weights"):
                raise InputError(
                    f"the lines of {line.get('checkpoint')} at {task} {length} come from different weights: take the "
                    "older ones out."
                )
        if len({(line.get("checkpoint"), line.get("seed")) for line in some}) < len(some):
            raise InputError(f"{task} {length} has the same line of {name} twice: take one of them out.")
    return [Score(suite, task, length, unit, name, some) for (suite, task, unit, length, name), some in cells.items()]


def difference(score: Score, rival: Score) -> tuple[float, float, float]:
    """How far a score is above that of a rival in the same cell, the standard error of that, and how far it would have
    to be for a probability of 5 % if the two were equal (Welch's test)."""
    ahead = (score.mean("value") or 0.0) - (rival.mean("value") or 0.0)
    parts = [score.standard_error(), rival.standard_error()]
    error = math.hypot(*(own for own, _ in parts))
    spread = sum(own**4 / degrees for own, degrees in parts)
    return ahead, error, error * _quantile(error**4 / spread if spread else math.inf)


def _quantile(degrees: float) -> float:
    """The 97.5 % quantile of Student's t, of degrees of freedom rounded down."""
    return _T[int(degrees) - 1] if degrees < len(_T) + 1 else 2.23 if math.isfinite(degrees) else _Z


def by_task(scores: list[Score]) -> dict[tuple[str, str, str], list[Score]]:
    """Suite, task and unit of length -> scores, in their order."""
    found: dict[tuple[str, str, str], list[Score]] = {}
    for score in scores:
        found.setdefault((score.suite, score.task, score.unit), []).append(score)
    return found


def means_by(score: Score, series: str, place: str, key: str) -> dict[float, float]:
    """Place -> mean over the lines of a series, `by_depth` for example, whose entries have a `place` and a `key`."""
    found: dict[float, list[float]] = {}
    for line in score.lines:
        for entry in line.get(series) or []:
            if entry.get(key) is not None:
                found.setdefault(entry[place], []).append(entry[key])
    return {at: fmean(found[at]) for at in sorted(found)}

"""Scores: their units, the table of a run, and of a grid the means over seeds and our best arm against the better BPTT.

A line of a grid is one arm in one cell with one seed; a cell is a task at a difficulty.
"""

import math
from collections.abc import Container
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from .evidence import split_by

SOLVED = 0.9  # two accuracies below it: neither side can do the task
REACHED = 0.95  # the accuracy whose first evaluation tells how fast an arm learns
MARGIN = 0.02  # a smaller difference decides nothing, however small the standard error of a few seeds
_DIVERGED = 1e9  # badness of an arm that has no finite score


@dataclass(frozen=True)
class Unit:
    """The unit of a score."""

    label: str  # in a sentence or at an axis, "bits per byte"
    heading: str  # at the head of a narrow column, "bits/byte"
    higher_is_better: bool = False

    @property
    def better(self) -> str:
        """The word for the better direction: "higher" or "lower"."""
        return "higher" if self.higher_is_better else "lower"

    def badness(self, value: float) -> float:
        """A key that sorts scores from best to worst."""
        return -value if self.higher_is_better else value

    def written(self, value: float) -> str:
        """A score for a table: shares as `87.5%`, losses with three decimals."""
        return f"{value:.1%}" if self.higher_is_better else f"{value:.3f}"


# A run is scored by the first of these metrics that its scores hold.
UNITS = {
    "bits_per_byte": Unit("bits per byte", "bits/byte"),
    "bits_per_pixel": Unit("bits per pixel", "bits/pixel"),
    "accuracy": Unit("accuracy", "accuracy", higher_is_better=True),
}


def metric_of(scores: Container[str]) -> str:
    """The metric that `scores`, a mapping with metrics among its keys, are compared in: the first of `UNITS`."""
    return next(metric for metric in UNITS if metric in scores)


def results_table(results: dict) -> str:
    """The arms as aligned lines, the best last, and a line that says what was scored."""
    metric = results["metric"]
    unit, task = UNITS[metric], results["task"]
    heads = f"{'' if metric == 'accuracy' else f'{unit.heading:>12}'}{'accuracy':>12}"
    lines = [f"{'arm':<18}{heads}{'seconds':>9}{'tokens':>13}{'sequential steps':>18}"]
    for arm, scores in sorted(results["arms"].items(), key=lambda entry: -unit.badness(entry[1][metric])):
        mark = " *" if arm == results["student_arm"] else ""
        columns = [] if metric == "accuracy" else [f"{unit.written(scores[metric]):>12}"]
        columns.append(f"{UNITS['accuracy'].written(scores['accuracy']) if 'accuracy' in scores else '':>12}")
        if "wall_clock_s" in scores:
            columns.append(f"{scores['wall_clock_s']:>9.0f}{scores['tokens']:>13,}{scores['sequential_steps']:>18,}")
        lines.append(f"{arm + mark:<18}" + "".join(columns))
    num_rows = f"{results['data']['heldout_streams']:,}"
    what = f"{num_rows} rows of {task['name']}, difficulty {task['difficulty']}, each"
    if task["name"] == "text":
        what = f"{num_rows} streams x {task['difficulty']} tokens"
    elif task["name"] == "instructions":
        what = f"answers of {num_rows} examples, each"
    else:
        lines.append(f"{'chance':<18}{unit.written(task['chance']):>12}")
    teacher = "; teacher: the shared readout on the teacher's memories" if "teacher" in results["arms"] else ""
    lines.append(f"held out: {what} from m_0; * the exported student{teacher}")
    skipped = {arm: scores["skipped_steps"] for arm, scores in results["arms"].items() if "skipped_steps" in scores}
    if skipped:
        counts = ", ".join(f"{arm} {number}" for arm, number in skipped.items())
        lines.append(
            f"steps left out because their gradient was not finite, those of earlier phases included: {counts}"
        )
    return "\n".join(line.rstrip() for line in lines)


def drift_of(histories: list[tuple[str, list[dict]]]) -> list[dict[str, Any]]:
    """What the last evaluation of each phase says of drift, for phases whose evaluations measure it.

    Args:
        histories: name and `log_history` of each phase, in order.

    Returns:
        Per phase `phase` and, where they were measured and are finite, `by_age` (age -> nats per label),
        `teacher_forced`, `free_run` (nats per label) and `lyapunov` (nats per token): the Trainer's `eval_...`.
    """
    found = []
    for phase, history in histories:
        last: dict[str, Any] = next((line for line in reversed(history) if "eval_loss" in line), {})
        numbers = {name: last.get(f"eval_{name}", math.nan) for name in ("teacher_forced", "free_run", "lyapunov")}
        values: dict[str, Any] = {name: value for name, value in numbers.items() if math.isfinite(value)}
        by_age = {age: value for age, value in last.get("eval_drift_by_age", {}).items() if math.isfinite(value)}
        if values or by_age:
            found.append({"phase": phase, **({"by_age": by_age} if by_age else {}), **values})
    return found


@dataclass(frozen=True)
class Score:
    """A metric over seeds."""

    mean: float  # accuracy (0 to 1), or bits per byte or per pixel
    error: float | None  # standard error of the mean; `None` for a single seed
    num_seeds: int  # different seeds; several lines of one seed are averaged first

    def __str__(self):
        return f"{self.mean:.3f}" + ("" if self.error is None else f" ± {self.error:.3f}")


@dataclass(frozen=True)
class Verdict:
    """Our best arm against the better BPTT in one cell."""

    ours: str
    rival: str
    difference: Score  # ours minus rival, its error the root of the sum of the two squared
    word: str  # "ahead", "level" or "behind", with ", both fail" after it for two accuracies below 0.9

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
        word += ", both fail"
    return Verdict(ours, rival, difference, word)


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
    if len(means) < 2:
        return Score(means[0], None, 1) if means else None
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

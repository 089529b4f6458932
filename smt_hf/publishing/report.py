"""The report of a grid: tables, verdicts and pictures, made from its JSON lines and from nothing else.

A line is one arm in one cell with one seed; a cell is a task at a difficulty, a number that grows with it. Scores are
accuracies (0 to 1) or bits a byte or a pixel. Lines with a `group` belong to a sweep or an ablation: they have tables
of their own and no figures.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

_METRICS = {"bits_per_byte": "bits a byte", "bits_per_pixel": "bits a pixel", "accuracy": "accuracy"}
_SOLVED = 0.9  # two accuracies below it: neither side can do the task
_MARGIN = 0.02  # a smaller difference decides nothing, however small the standard error of a few seeds
_SAME_TIME = 1.1  # seconds of the longer over those of the shorter training
_DIVERGED = 1e9  # bits a byte, or negative accuracy, of an arm that has no finite score
# Arms of a kind take its colours in order. The kinds' order is that of every table, axis and legend.
_COLOURS = {
    "ours": ("#0072B2", "#009E73", "#56B4E9", "#332288", "#8DB600", "#44AA99"),
    "mixed": ("#CC79A7", "#882255", "#AA4499"),
    "published": ("#8C564B",),
    "rival": ("#D55E00", "#E69F00", "#B2182B"),
    "other": ("#666633", "#999933"),
    "teacher": ("#111111",),
    "ngram": ("#B0B0B0", "#8C8C8C", "#686868"),
}
_MARKERS = dict(zip(_COLOURS, "oDPsXv^"))
_YARDSTICKS = ("teacher", "ngram")
_CHANCE: dict[str, Any] = {"color": "0.5", "ls": ":", "lw": 1.2, "label": "chance"}
_Styles = dict[str, dict[str, Any]]  # arm -> colour, marker and dashes, the same in every figure
_NUM_TEXTS, _NUM_IMAGES = 2, 10  # samples shown an arm

_HOW_TO_READ = f"""How to read the tables:

- Mean ± standard error over seeds (number of seeds). Bold: the best student of a row.
- `teacher` (the mean of the teachers of all arms) and n-grams are yardsticks, not students.
- Ours: the best arm with an smt or dmt phase and no bptt phase. Bptt: the best arm with bptt phases alone. The best of
  many arms is lucky more often than the best of a few: count the columns of both sides.
- Differences are ours minus bptt: of bits, those below zero are in our favour. One counts beyond {_MARGIN} and beyond
  two of its standard errors.
- Both fail: both accuracies are below {_SOLVED}. The difference is shown all the same."""


@dataclass(frozen=True)
class Score:
    """A metric over seeds.

    Args:
        mean: accuracy (0 to 1), or bits a byte or a pixel.
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
        word: "ahead", "level", "behind", or "both fail" for two accuracies below 0.9.
    """

    ours: str
    rival: str
    difference: Score
    word: str

    def signed(self) -> str:
        """The difference with its sign, in the metric's units."""
        return ("+" if self.difference.mean >= 0 else "") + str(self.difference)


def read_lines(path: str | Path) -> list[dict]:
    """The lines of a `.jsonl` file; blank ones are skipped.

    Raises:
        ValueError: a line is not a JSON object; names file and line number.
    """
    lines = []
    with Path(path).open(encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}): mend or remove it.") from None
            if not isinstance(line, dict):
                raise ValueError(f"{path}, line {number}: not a JSON object: mend or remove it.")
            lines.append(line)
    return lines


def render_report(lines: list[dict], name: str, folder: Path, settings: dict | None = None) -> list[Path]:
    """Write `<folder>/<name>.md`, and `<folder>/<name>_<figure>.png` for every figure that a line has data for.

    The order of the lines changes nothing. Figures of an earlier report of this name that have no data now are removed.

    Args:
        lines: as `read_lines` returns them.
        settings: of the grid; printed at the end as they are.

    Returns:
        The files written, the Markdown first.

    Raises:
        ValueError: no lines; a line without task, difficulty, arm, seed or metric, or in a group without `variant`; a
            task whose lines have different metrics.
    """
    _check(lines)
    num_stages = len(lines)
    lines = sorted(_without_stages(lines), key=_line_order)
    num_stages -= len(lines)
    main = [line for line in lines if line.get("group") is None]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths, pictures = [folder / f"{name}.md"], []
    styles = _styles(_arms(main))
    for title, (caption, draw) in _FIGURES.items():
        path = folder / f"{name}_{title}.png"
        path.unlink(missing_ok=True)
        figure = draw(main, styles)
        if figure is not None:
            figure.savefig(path, dpi=120)
            paths.append(path)
            pictures.append(f"### {caption}\n\n![{caption}]({path.name})")
    parts = [
        f"# {name}",
        f"Made by `smt_hf.publishing.report` from {len(lines)} lines: numbers are changed there, not here.",
        f"{num_stages} more lines, of stages that are also arms of their own, are left out." if num_stages else "",
        _results(main),
        _costs(main),
        _sweeps([line for line in lines if line.get("group") is not None]),
        "\n\n".join(["## Figures", *pictures]) if pictures else "",
        _text_samples(main),
        _provenance(lines),
        f"## Settings of the grid\n\n{_code(json.dumps(settings, indent=2), 'json')}" if settings else "",
    ]
    paths[0].write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return paths


def judge(scores: dict[str, Score], metric: str) -> Verdict | None:
    """Compare our best arm with the better BPTT.

    Ours are the arms with an smt or dmt phase and no bptt phase; rivals have bptt phases alone. A difference counts
    beyond 0.02 and beyond two of its standard errors.

    Args:
        scores: arm -> score in one cell.
        metric: "accuracy" (higher is better), "bits_per_byte" or "bits_per_pixel" (lower is better).

    Returns:
        The verdict, or `None` if one of the two sides has no arm.
    """
    badness = {arm: _badness(score, metric) for arm, score in scores.items()}
    sides = [[arm for arm in sorted(scores, key=_arm_order) if _kind(arm) == kind] for kind in ("ours", "rival")]
    if not all(sides):
        return None
    ours, rival = (min(side, key=badness.__getitem__) for side in sides)
    errors = [error for error in (scores[ours].error, scores[rival].error) if error is not None]
    difference = Score(
        mean=scores[ours].mean - scores[rival].mean,
        error=math.hypot(*errors) if errors else None,
        num_seeds=min(scores[ours].num_seeds, scores[rival].num_seeds),
    )
    noise = 2 * (difference.error or 0)
    margin = max(_MARGIN, noise if math.isfinite(noise) else 0) + 1e-9  # in floats 0.92 - 0.9 is more than 0.02
    gain = badness[rival] - badness[ours]
    if metric == "accuracy" and min(badness[ours], badness[rival]) > -_SOLVED:
        word = "both fail"
    else:
        word = "ahead" if gain > margin else "behind" if gain < -margin else "level"
    return Verdict(ours, rival, difference, word)


def _check(lines: list[dict]) -> None:
    if not lines:
        raise ValueError("there are no lines to report: run the grid first.")
    for line in lines:
        missing = [key for key in ("task", "difficulty", "arm", "seed") if key not in line]
        if line.get("group") is not None and "variant" not in line:
            missing.append("variant")
        if not any(metric in line for metric in _METRICS):
            missing.append(" or ".join(_METRICS))
        if missing:
            known = {key: line[key] for key in ("task", "difficulty", "arm", "seed", "group") if key in line}
            raise ValueError(f"the line of {known} has no {', '.join(missing)}: mend or remove it.")
    for task, some in _split(lines, "task").items():
        metrics = sorted({_metric(line) for line in some})
        if len(metrics) > 1:
            raise ValueError(f"lines of task {task!r} are scored in {' and in '.join(metrics)}: give all of them one.")


def _metric(line: dict) -> str:
    return next(metric for metric in _METRICS if metric in line)


def _kind(arm: str) -> str:
    phases = {re.sub(r"\d+$", "", part) for part in arm.split("_")}
    for kind in ("teacher", "published", "ngram"):
        if kind in phases:
            return kind
    if phases & {"smt", "dmt"}:
        return "mixed" if "bptt" in phases else "ours"
    return "rival" if "bptt" in phases else "other"


def _natural(text: str) -> list[tuple]:
    """A key that sorts `smt8` before `smt16`."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]


def _arm_order(arm: str) -> tuple:
    return list(_COLOURS).index(_kind(arm)), [_natural(part) for part in arm.split("_")]


def _line_order(line: dict) -> tuple:
    names = [_natural(str(line.get(key))) for key in ("group", "variant")]
    return (
        *names,
        line["task"],
        line["difficulty"],
        _arm_order(line["arm"]),
        line["seed"],
        json.dumps(line, sort_keys=True),
    )


def _without_stages(lines: list[dict]) -> list[dict]:
    """Leave out what a longer pipeline (`run`) said on its way about an arm that the cell has a whole run of."""

    def cell(line: dict) -> tuple:
        return tuple(line.get(key) for key in ("group", "variant", "task", "difficulty", "arm"))

    def is_whole(line: dict) -> bool:
        return line.get("is_last", "run" not in line)

    whole = {cell(line) for line in lines if is_whole(line)}
    return [line for line in lines if is_whole(line) or cell(line) not in whole]


def _arms(lines: Iterable[dict]) -> list[str]:
    return sorted({line["arm"] for line in lines}, key=_arm_order)


def _split(lines: list[dict], key: str) -> dict:
    """The value of a key, ascending -> lines that have it, in their order."""
    ordered = sorted(lines, key=lambda line: line[key])
    return {value: list(some) for value, some in groupby(ordered, key=lambda line: line[key])}


def _of(lines: list[dict], arm: str) -> list[dict]:
    return [line for line in lines if line["arm"] == arm]


def _score(lines: list[dict], *path: str) -> Score | None:
    """Over the lines that have an entry at the path of keys; `null` there stands for a score that is not finite."""
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


def _metric_score(lines: list[dict]) -> Score:
    score = _score(lines, _metric(lines[0]))
    assert score is not None
    return score


def _chances(lines: list[dict]) -> dict[float, float]:
    """Difficulty -> the score of knowing nothing."""
    known = [line for line in lines if line.get("chance") is not None]
    return {
        difficulty: fmean(line["chance"] for line in some) for difficulty, some in _split(known, "difficulty").items()
    }


def _badness(score: Score, metric: str) -> float:
    if not math.isfinite(score.mean):
        return _DIVERGED
    return -score.mean if metric == "accuracy" else score.mean


def _table(header: list[str], rows: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _code(text: str, language: str = "") -> str:
    """A fenced block. The fence is longer than any in the text; what cannot be printed is escaped."""
    text = "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode()
        for letter in text.replace("\t", "    ")
    )
    fence = "`" * max([2, *map(len, re.findall("`+", text))]) + "`"
    return f"{fence}{language}\n{text}\n{fence}"


def _results(lines: list[dict]) -> str:
    if not lines:
        return ""
    verdicts: dict[str, Verdict | None] = {}
    tables = [_task_table(task, some, verdicts) for task, some in _split(lines, "task").items()]
    notes = [*_summary(verdicts), *_unequal(lines, verdicts), *_doubles(lines)]
    return "\n\n".join(["## Results", *notes, _HOW_TO_READ, *tables])


def _task_table(task: str, lines: list[dict], verdicts: dict[str, Verdict | None]) -> str:
    """Rows are difficulties, columns are arms. Enters the verdict of every cell in `verdicts`."""
    metric, arms = _metric(lines[0]), _arms(lines)
    chances = _chances(lines)
    rows = []
    for difficulty, cell in _split(lines, "difficulty").items():
        scores = {arm: _metric_score(_of(cell, arm)) for arm in _arms(cell)}
        shown = {arm: f"{_badness(score, metric):.3f}" for arm, score in scores.items()}
        students = [arm for arm in scores if _kind(arm) not in _YARDSTICKS and math.isfinite(scores[arm].mean)]
        best = min((shown[arm] for arm in students), key=float, default="")
        row = [str(difficulty)]
        for arm in arms:
            bold = "**" if arm in students and shown[arm] == best else ""
            row.append(f"{bold}{scores[arm]}{bold} ({scores[arm].num_seeds})" if arm in scores else "")
        if chances:
            row.append(f"{chances[difficulty]:.3f}" if difficulty in chances else "")
        verdict = verdicts[f"{task} {difficulty}"] = judge(scores, metric)
        if verdict:
            row += [f"{verdict.signed()} ({verdict.ours} against {verdict.rival})", verdict.word]
        else:
            row += ["", "not compared"]
        rows.append(row)
    header = ["difficulty", *(f"`{arm}`" for arm in arms), *(["chance"] if chances else [])]
    better = "higher" if metric == "accuracy" else "lower"
    title = f"### `{task}`: {_METRICS[metric]} ({better} is better)"
    return f"{title}\n\n{_table([*header, 'ours - bptt', 'verdict'], rows)}"


def _summary(verdicts: dict[str, Verdict | None]) -> list[str]:
    compared = {cell: verdict for cell, verdict in verdicts.items() if verdict}
    cells = {
        word: [f"{cell} ({verdict.signed()})" for cell, verdict in compared.items() if verdict.word == word]
        for word in ("ahead", "level", "behind", "both fail")
    }
    counts = ", ".join(f"{word} in {len(cells[word])}" for word in ("ahead", "level", "behind"))
    failed = [cell for cell, verdict in compared.items() if verdict.word == "both fail"]
    lines = [
        f"**Our best arm against the better BPTT: {counts} of {len(compared)} cells; both below {_SOLVED} in: "
        f"{', '.join(failed) or 'none'}.**",
        "\n".join(f"- {word}: {', '.join(some) or 'nowhere'}" for word, some in cells.items()),
    ]
    single = [cell for cell, verdict in compared.items() if verdict.difference.num_seeds == 1]
    if single:
        lines.append(f"An arm with a single seed has no standard error: {len(single)} of the verdicts rest on one.")
    missing = [cell for cell, verdict in verdicts.items() if verdict is None]
    if missing:
        lines.append(f"Not compared, one of the two sides was not run: {', '.join(missing)}.")
    return lines


def _unequal(lines: list[dict], verdicts: dict[str, Verdict | None]) -> list[str]:
    """The verdicts on arms that were not trained for the same time."""
    notes = []
    for task, some in _split(lines, "task").items():
        for difficulty, cell in _split(some, "difficulty").items():
            verdict = verdicts[f"{task} {difficulty}"]
            if verdict is None:
                continue
            ours, rival = (_score(_of(cell, arm), "wall_clock_s") for arm in (verdict.ours, verdict.rival))
            if ours and rival and max(ours.mean, rival.mean) > _SAME_TIME * min(ours.mean, rival.mean):
                notes.append(f"{task} {difficulty} (ours {ours.mean:,.0f} s, bptt {rival.mean:,.0f} s)")
    return [f"Trained for times that differ by more than a tenth: {', '.join(notes)}."] if notes else []


def _doubles(lines: list[dict]) -> list[str]:
    counts = Counter(
        f"{line['task']} {line['difficulty']} {line['arm']} seed {line['seed']}"
        for line in lines
        if _kind(line["arm"]) not in _YARDSTICKS
    )
    doubles = [f"{run} ({count} lines)" for run, count in counts.items() if count > 1]
    return [f"Averaged before anything else, as one arm and seed: {', '.join(doubles)}."] if doubles else []


def _mean(lines: list[dict], key: str) -> str:
    values = [line[key] for line in lines if line.get(key) is not None]
    return f"{fmean(values):,.0f}" if values else ""


def _costs(lines: list[dict]) -> str:
    keys = {"wall_clock_s": "seconds", "tokens": "tokens", "sequential_steps": "sequential steps"}
    rows = []
    for task, some in _split(lines, "task").items():
        for arm in _arms(some):
            costs = [_mean(_of(some, arm), key) for key in keys]
            if any(costs):
                rows.append([f"`{task}`", f"`{arm}`", *costs, str(len(_of(some, arm)))])
    if not rows:
        return ""
    legend = "Of training, means over difficulties and seeds. Sequential steps: transitions computed one after another."
    return f"## Costs\n\n{legend}\n\n" + _table(["task", "arm", *keys.values(), "lines"], rows)


def _sweeps(lines: list[dict]) -> str:
    if not lines:
        return ""
    parts = ["## Ablations and sweeps", "Best first. They are not part of the results above, nor of the figures."]
    for group, of_group in _split(lines, "group").items():
        parts.append(f"### {group}")
        for task, of_task in _split(of_group, "task").items():
            metric = _metric(of_task[0])
            for difficulty, cell in _split(of_task, "difficulty").items():
                runs = []
                for variant, of_variant in _split(cell, "variant").items():
                    for arm in _arms(of_variant):
                        some = _of(of_variant, arm)
                        score = _metric_score(some)
                        row = [str(variant), f"`{arm}`", str(score), _mean(some, "wall_clock_s"), str(score.num_seeds)]
                        runs.append((_badness(score, metric), _natural(str(variant)), _arm_order(arm), row))
                header = ["variant", "arm", _METRICS[metric], "seconds", "seeds"]
                parts.append(f"`{task}` {difficulty}:\n\n{_table(header, [run[-1] for run in sorted(runs)])}")
        parts += _doubles([{**line, "arm": f"{line['variant']}, {line['arm']}"} for line in of_group])
    return "\n\n".join(parts)


def _text_samples(lines: list[dict]) -> str:
    parts = []
    for title, cell in _hardest(lines, "samples"):
        for arm in _arms(cell):
            line = min(_of(cell, arm), key=lambda line: line["seed"])
            texts = [sample for sample in line["samples"] if isinstance(sample, str)]
            if texts:
                shown = f"the first {min(len(texts), _NUM_TEXTS)} of {len(texts)}"
                parts.append(f"{title}, `{arm}`, seed {line['seed']}, {shown}:")
                parts += [_code(text) for text in texts[:_NUM_TEXTS]]
    return "\n\n".join(["## Sampled text", *parts]) if parts else ""


def _provenance(lines: list[dict]) -> str:
    def count(values: Iterable) -> str:
        return "; ".join(f"{value} ({number} lines)" for value, number in sorted(Counter(map(str, values)).items()))

    def listing(facts: dict) -> str:
        return ", ".join(f"{key} {value}" for key, value in sorted(facts.items()))

    facts = {}
    for title, key in (
        ("hardware", "hardware"),
        ("threads", "num_threads"),
        ("commits (`+`: with changes that are in no commit)", "commit"),
        ("versions", "versions"),
        ("students", "student"),
    ):
        values = [line[key] for line in lines if line.get(key) is not None]
        facts[title] = count(listing(value) if isinstance(value, dict) else value for value in values)
    for title, key in (("seeds", "seed"), ("labels scored (`n`)", "n")):
        of_task = {
            task: ", ".join(f"{value:,}" for value in _split([line for line in some if line.get(key) is not None], key))
            for task, some in _split(lines, "task").items()
        }
        facts[title] = "; ".join(f"{task}: {text}" for task, text in of_task.items() if text)
    return "## Where the numbers come from\n\n" + "\n".join(f"- {key}: {text}" for key, text in facts.items() if text)


def _styles(arms: list[str]) -> _Styles:
    styles, used = {}, Counter[str]()
    for arm in arms:
        kind = _kind(arm)
        rounds, place = divmod(used[kind], len(_COLOURS[kind]))
        dashes = "--" if kind in _YARDSTICKS else ("-", "-.", ":")[rounds % 3]
        styles[arm] = {"color": _COLOURS[kind][place], "marker": _MARKERS[kind], "ls": dashes}
        used[kind] += 1
    return styles


def _hardest(lines: list[dict], *keys: str) -> list[tuple[str, list[dict]]]:
    """Of each task the lines that have one of the keys, at the highest difficulty where there are any; with a title."""
    cells = []
    for task, some in _split([line for line in lines if any(line.get(key) for key in keys)], "task").items():
        difficulty, cell = list(_split(some, "difficulty").items())[-1]
        cells.append((f"{task} {difficulty}", cell))
    return cells


@dataclass(frozen=True)
class _Picture:
    """A figure with some axes for every cell, and one legend.

    Args:
        draw: draws one cell's lines on its axes.
        keys: the hardest cell of every task that has one of them is drawn; without keys, every task with all its cells.
        num_axes: for each cell.
    """

    draw: Callable[[list, list[dict], _Styles], None]
    keys: tuple[str, ...] = ()
    num_axes: int = 1

    def __call__(self, lines: list[dict], styles: _Styles) -> Figure | None:
        cells = _hardest(lines, *self.keys) if self.keys else list(_split(lines, "task").items())
        if not cells:
            return None
        columns = self.num_axes if self.num_axes > 1 else 2 if len(cells) == 4 else min(len(cells), 3)
        rows = math.ceil(len(cells) * self.num_axes / columns)
        figure = Figure(figsize=(max(4.1 * columns, 6), 3 * rows + 0.6), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        handles: dict[str, Any] = {}
        for title, cell in cells:
            own, axes = axes[: self.num_axes], axes[self.num_axes :]
            for axis in own:
                axis.set_title(title)
                axis.grid(alpha=0.25, lw=0.6)
                axis.set_axisbelow(True)
                axis.spines[["top", "right"]].set_visible(False)
            self.draw(own, cell, styles)
            for axis in own:
                found, labels = axis.get_legend_handles_labels()
                for handle, label in zip(found, labels):
                    handles.setdefault(label, handle)
        for axis in axes:
            axis.set_visible(False)
        labels = [arm for arm in styles if arm in handles] + [label for label in handles if label not in styles]
        columns = min(len(labels), max(2, int(figure.get_figwidth() / 1.6)))
        figure.legend(
            [handles[label] for label in labels],
            labels,
            loc="outside lower center",
            ncols=columns,
            fontsize=8,
            frameon=False,
        )
        return figure


def _set_log(axis, which: str, values: Iterable[float], ratio: float) -> None:
    """A logarithmic axis with plain numbers, if the positive values spread by more than `ratio`."""
    values = [value for value in values if math.isfinite(value) and value > 0]
    if not values or max(values) <= ratio * min(values):
        return
    shown = "25" if max(values) < 100 * min(values) else ""
    getattr(axis, f"set_{which}scale")("log", nonpositive="mask" if which == "x" else "clip")
    ticks = getattr(axis, f"{which}axis")
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in shown else ""))


def _draw_runs(axis, runs: list[tuple[str, list]], styles: _Styles, **look) -> None:
    """A line a seed, a marker at its end; `runs`: arm and points."""
    for arm, points in runs:
        known = [(at, value) for at, value in points if value is not None]
        if known:
            of_arm = {"label": arm, **styles[arm], **look}
            axis.plot(*zip(*known), lw=1.1, alpha=0.8, ms=5, markevery=[len(known) - 1], **of_arm)


def _draw_scores(axis, arms: dict[str, dict[int, Score]], styles: _Styles, width: float = 0.3) -> None:
    """Arm -> place on the axis -> score. Arms stand side by side in `width`: equal ones can be told apart."""
    for number, (arm, scores) in enumerate(arms.items()):
        shift = width * ((number + 0.5) / len(arms) - 0.5)
        means, errors = [score.mean for score in scores.values()], [score.error or 0 for score in scores.values()]
        places = [place + shift for place in scores]
        axis.errorbar(places, means, errors, label=arm, capsize=2.5, ms=5, lw=1.3, **styles[arm])


def _name_arms(axis, arms: list[str]) -> None:
    axis.set_xticks(range(len(arms)), arms, rotation=35, ha="right", fontsize=8)
    axis.set_xlim(-0.6, len(arms) - 0.4)


def _draw_difficulty(axes: list, lines: list[dict], styles: _Styles) -> None:
    (axis,) = axes
    metric, arms = _metric(lines[0]), _arms(lines)
    places = {difficulty: place for place, difficulty in enumerate(_split(lines, "difficulty"))}
    scores = {
        arm: {places[at]: _metric_score(cell) for at, cell in _split(_of(lines, arm), "difficulty").items()}
        for arm in arms
    }
    if len(places) == 1:
        _draw_scores(axis, {arm: {arms.index(arm): scores[arm][0]} for arm in arms}, styles, width=0)
        _name_arms(axis, arms)
        axis.set_title(f"{lines[0]['task']} {next(iter(places))}")
    else:
        _draw_scores(axis, scores, styles)
        axis.set_xticks(list(places.values()), [str(difficulty) for difficulty in places])
        axis.set_xlabel("difficulty")
    if metric == "accuracy":
        for difficulty, chance in _chances(lines).items():
            half = 0.5 if len(places) > 1 else len(arms)
            axis.hlines(chance, places[difficulty] - half, places[difficulty] + half, **_CHANCE)
        axis.set_ylim(-0.03, 1.03)
    axis.set_ylabel(_METRICS[metric] + ("" if metric == "accuracy" else " (lower is better)"))


def _draw_loss(axes: list, lines: list[dict], styles: _Styles) -> None:
    for axis, key in zip(axes, ("seconds", "sequential_steps")):
        runs = [(line["arm"], [(point[key], point["loss"]) for point in line["curve"]]) for line in lines]
        _draw_runs(axis, runs, styles)
        points = [point for _, points in runs for point in points if point[1] is not None]
        _set_log(axis, "y", [loss for _, loss in points], 10)
        if key == "sequential_steps":
            _set_log(axis, "x", [at for at, _ in points], 30)
        axis.set(xlabel=key.replace("_", " "), ylabel="nats a label")


def _draw_drift(axes: list, lines: list[dict], styles: _Styles) -> None:
    (axis,) = axes
    _draw_runs(axis, [(line["arm"], line["drift"]) for line in lines], styles)
    _set_log(axis, "x", [at for line in lines for at, _ in line["drift"]], 10)
    _set_log(axis, "y", [drift for line in lines for _, drift in line["drift"] if drift is not None], 10)
    axis.set(xlabel="tokens read since m_0", ylabel="drift / spread of the teacher's")


def _draw_gradient(axes: list, lines: list[dict], styles: _Styles) -> None:
    (axis,) = axes
    norms = []
    looks: dict[str, dict[str, Any]] = {"gradient_norm": {}, "teacher_gradient_norm": {"ls": ":"}}
    for key, look in looks.items():
        runs = [(line["arm"], line.get(key) or []) for line in lines]
        _draw_runs(axis, runs, styles, **look)
        norms += [norm for _, points in runs for _, norm in points if norm is not None]
    if any(line.get("teacher_gradient_norm") for line in lines):
        axis.plot([], [], color="0.3", ls=":", label="its teacher")
    _set_log(axis, "y", norms, 1)
    axis.set(xlabel="distance from the loss (tokens)", ylabel="gradient norm")


def _draw_length(axes: list, lines: list[dict], styles: _Styles) -> None:
    (axis,) = axes
    multiples = sorted({key for line in lines for key in line["length_generalization"]}, key=float)
    scores: dict[str, dict[int, Score]] = {arm: {} for arm in _arms(lines)}
    for arm in scores:
        for place, key in enumerate(multiples):
            score = _score(_of(lines, arm), "length_generalization", key)
            if score is not None:
                scores[arm][place] = score
    _draw_scores(axis, scores, styles)
    for chance in _chances(lines).values() if _metric(lines[0]) == "accuracy" else ():
        axis.axhline(chance, **_CHANCE)
    axis.set_xticks(range(len(multiples)), [f"{key}x" for key in multiples])
    axis.set(ylim=(-0.03, 1.03), xlabel="multiple of the training length", ylabel="accuracy")


def _draw_geometry(axes: list, lines: list[dict], styles: _Styles) -> None:
    looks: dict[str, dict[str, Any]] = {"student": {}, "teacher": {"alpha": 0.45, "hatch": "////"}}
    arms = _arms(lines)
    for axis, key in zip(axes, ("rank", "spread")):
        for offset, (whose, look) in zip((-0.2, 0.2), looks.items()):
            for place, arm in enumerate(arms):
                score = _score(_of(lines, arm), "geometry", whose, key)
                if score is not None:
                    bar = {"color": styles[arm]["color"], "edgecolor": "white", "ecolor": "0.2", **look}
                    axis.bar(place + offset, score.mean, 0.38, yerr=score.error, capsize=2.5, **bar)
            axis.fill_between([], [], label=f"the {whose}'s", **{"color": "0.4", "edgecolor": "white", **look})
        _name_arms(axis, arms)
        axis.set_ylabel(f"{key} of the memories")


def _draw_samples(lines: list[dict], styles: _Styles) -> Figure | None:
    """A row of images an arm."""
    rows = []
    for title, cell in _hardest(lines, "samples"):
        for arm in _arms(cell):
            line = min(_of(cell, arm), key=lambda line: line["seed"])
            images = [np.array(sample) for sample in line["samples"] if not isinstance(sample, str)][:_NUM_IMAGES]
            if images:
                rows.append((f"{title}, {arm}, seed {line['seed']}", styles[arm]["color"], images))
    if not rows:
        return None
    columns = max(len(images) for *_, images in rows)
    brightest = max(int(image.max()) for *_, images in rows for image in images)
    figure = Figure(figsize=(columns, 1.25 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (title, colour, images) in zip(axes, rows):
        row[0].set_title(title, loc="left", fontsize=9, color=colour)
        for axis in row:
            axis.set_axis_off()
        for axis, image in zip(row, images):
            axis.imshow(image, cmap="gray", vmin=0, vmax=max(brightest, 1))
    return figure


_FIGURES: dict[str, tuple[str, Callable[[list[dict], _Styles], Figure | None]]] = {
    "difficulty": ("Scores over difficulty (error bars: standard error over seeds)", _Picture(_draw_difficulty)),
    "loss": (
        "Held-out loss of the student's own rollout during training (a line a seed)",
        _Picture(_draw_loss, ("curve",), num_axes=2),
    ),
    "drift": (
        "Drift of the student's own rollout from the teacher's memories (a line a seed)",
        _Picture(_draw_drift, ("drift",)),
    ),
    "gradient": (
        "Norm of the gradient over its distance from the loss (a line a seed)",
        _Picture(_draw_gradient, ("gradient_norm", "teacher_gradient_norm")),
    ),
    "length": (
        "Accuracy beyond the training length (error bars: standard error over seeds)",
        _Picture(_draw_length, ("length_generalization",)),
    ),
    "geometry": (
        "Rank and spread of the memories (error bars: standard error over seeds)",
        _Picture(_draw_geometry, ("geometry",), num_axes=2),
    ),
    "samples": ("Sampled images (the first of the lowest seed)", _draw_samples),
}

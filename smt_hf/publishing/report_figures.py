"""The figures of a grid's report.

They show whole runs and yardsticks, not the stages on the way. An arm is drawn under the name of what it is, with the
colour, marker and dashes of that name.
"""

import math
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from .arms import YARDSTICKS, display_name, is_whole_run, kind_of
from .evidence import cells_with, hardest_cells, split_by
from .figures import looks_of, save_figures, set_log
from .scores import UNITS, Score, chances_of, metric_of, metric_score, score_of

_CHANCE: dict[str, Any] = {"color": "0.5", "ls": ":", "lw": 1.2, "label": "chance"}
_Looks = dict[str, dict[str, Any]]  # name -> colour, marker and dashes
_NUM_IMAGES = 10  # samples shown per arm


def draw_figures(lines: list[dict], name: str, folder: Path) -> dict[Path, str]:
    """Write `<folder>/<name>_<figure>.png` for every figure that a line has data for; remove those without data.

    Args:
        lines: of the grid, in order, without sweeps and ablations.

    Returns:
        File -> caption, in the order of the report.
    """
    lines = _named(lines)
    looks = looks_of([line["name"] for line in lines])
    figures = {title: (figure.caption, _drawn(figure, lines, looks)) for title, figure in _FIGURES.items()}
    figures["samples"] = ("Sampled images (the first of the lowest seed)", _samples(lines, looks))
    return save_figures(figures, name, folder)


def _named(lines: list[dict]) -> list[dict]:
    """The lines that are drawn, with a `name`; where two runs of a cell are the same by name, it holds the run, too."""
    drawn = [line for line in lines if is_whole_run(line) or kind_of(line) in YARDSTICKS]
    runs: dict[tuple, set[str]] = {}
    for line in drawn:
        if kind_of(line) not in YARDSTICKS:
            cell = (display_name(line), line["task"], line["difficulty"])
            runs.setdefault(cell, set()).add(line.get("run", line["arm"]))
    doubled = {name for (name, *_), some in runs.items() if len(some) > 1}
    names = [(display_name(line), line.get("run", line["arm"])) for line in drawn]
    named = [
        {**line, "name": f"{name} ({run})" if name in doubled else name} for line, (name, run) in zip(drawn, names)
    ]
    for line in named:  # of text, the loss over seconds says more
        line["accuracy_curve"] = metric_of(line) == "accuracy" and (line.get("curve") or {}).get("accuracy")
    return named


def _by_name(lines: list[dict], looks: _Looks) -> dict[str, list[dict]]:
    found = {name: [line for line in lines if line["name"] == name] for name in looks}
    return {name: own for name, own in found.items() if own}


class _Figure(NamedTuple):
    """A figure with some axes for every cell, and one legend.

    Args:
        caption: in the report.
        draw: draws one cell's lines on its axes.
        keys: the hardest cell of every task that has one of them is drawn; without keys, every task with all its cells.
        num_axes: for each cell.
        every_cell: draw every cell that has one of the keys, not the hardest of each task alone.
    """

    caption: str
    draw: Callable[..., None]
    keys: tuple[str, ...] = ()
    num_axes: int = 1
    every_cell: bool = False


def _drawn(what: _Figure, lines: list[dict], looks: _Looks) -> Figure | None:
    chosen = cells_with if what.every_cell else hardest_cells
    cells = chosen(lines, *what.keys) if what.keys else list(split_by(lines, "task").items())
    if not cells:
        return None
    columns = what.num_axes if what.num_axes > 1 else 2 if len(cells) == 4 else min(len(cells), 3)
    rows = math.ceil(len(cells) * what.num_axes / columns)
    figure = Figure(figsize=(max(4.1 * columns, 6), 3 * rows + 0.6), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    handles: dict[str, Any] = {}
    for title, cell in cells:
        own, axes = axes[: what.num_axes], axes[what.num_axes :]
        for axis in own:
            axis.set_title(title)
            axis.grid(alpha=0.25, lw=0.6)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
        what.draw(cell, looks, *own)
        for axis in own:
            for handle, label in zip(*axis.get_legend_handles_labels()):
                handles.setdefault(label, handle)
    for axis in axes:
        axis.set_visible(False)
    labels = [name for name in looks if name in handles] + [label for label in handles if label not in looks]
    if labels:
        columns = min(len(labels), max(2, int(figure.get_figwidth() / 1.6)))
        place = {"loc": "outside lower center", "ncols": columns, "fontsize": 8, "frameon": False}
        figure.legend([handles[label] for label in labels], labels, **place)
    return figure


def _draw_runs(axis, runs: list[tuple[str, list]], looks: _Looks, **look) -> None:
    """Faint lines for the seeds of an arm, and a line through their medians with a marker at its end.

    Args:
        runs: name and points of each seed. Seeds with another number of points than the first have no part in medians.
    """
    by_name: dict[str, list[list]] = {}
    for name, points in runs:
        known = [(at, value) for at, value in points if value is not None]
        if known:
            by_name.setdefault(name, []).append(known)
    for name, seeds in by_name.items():
        own = {"label": name, **looks[name], **look}
        for points in seeds if len(seeds) > 1 else ():
            axis.plot(*zip(*points), **{**own, "label": None, "marker": None, "lw": 0.7, "alpha": 0.3})
        alike = [points for points in seeds if len(points) == len(seeds[0])]
        axis.plot(*np.median(alike, axis=0).T, lw=1.6, ms=5, markevery=[-1], **own)


def _draw_scores(axis, by_name: dict[str, dict[int, Score]], looks: _Looks, width: float = 0.3) -> None:
    """Name -> place on the axis -> score. Arms stand side by side in `width`, so that equal ones can be told apart."""
    for number, (name, scores) in enumerate(by_name.items()):
        shift = width * ((number + 0.5) / len(by_name) - 0.5)
        means, errors = [score.mean for score in scores.values()], [score.error or 0 for score in scores.values()]
        places = [place + shift for place in scores]
        axis.errorbar(places, means, errors, label=name if width else None, capsize=2.5, ms=5, lw=1.3, **looks[name])


def _name_arms(axis, names: list[str]) -> None:
    axis.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
    axis.set_xlim(-0.6, len(names) - 0.4)


def _draw_difficulty(lines: list[dict], looks: _Looks, axis) -> None:
    metric, by_name = metric_of(lines[0]), _by_name(lines, looks)
    names = list(by_name)
    places = {difficulty: place for place, difficulty in enumerate(split_by(lines, "difficulty"))}
    scores = {
        name: {places[difficulty]: metric_score(cell) for difficulty, cell in split_by(own, "difficulty").items()}
        for name, own in by_name.items()
    }
    if len(places) == 1:
        _draw_scores(axis, {name: {names.index(name): scores[name][0]} for name in names}, looks, width=0)
        _name_arms(axis, names)
        axis.set_title(f"{lines[0]['task']} {next(iter(places))}")
    else:
        _draw_scores(axis, scores, looks)
        axis.set_xticks(list(places.values()), [str(difficulty) for difficulty in places])
        axis.set_xlabel("difficulty")
    if metric == "accuracy":
        for difficulty, chance in chances_of(lines).items():
            half = 0.5 if len(places) > 1 else len(names)
            axis.hlines(chance, places[difficulty] - half, places[difficulty] + half, **_CHANCE)
        axis.set_ylim(-0.03, 1.03)
    axis.set_ylabel(UNITS[metric].label + ("" if UNITS[metric].higher_is_better else " (lower is better)"))


def _draw_loss(lines: list[dict], looks: _Looks, *axes) -> None:
    for axis, key in zip(axes, ("seconds", "sequential_steps")):
        runs = [(line["name"], list(zip(line["curve"][key], line["curve"]["loss"]))) for line in lines]
        _draw_runs(axis, runs, looks)
        points = [point for _, points in runs for point in points if point[1] is not None]
        set_log(axis, "y", [loss for _, loss in points], 10)
        if key == "sequential_steps":
            set_log(axis, "x", [at for at, _ in points], 30)
        axis.set(xlabel=key.replace("_", " "), ylabel="nats per label")


def _draw_accuracy(lines: list[dict], looks: _Looks, axis) -> None:
    runs = [(line["name"], list(zip(line["curve"]["seconds"], line["accuracy_curve"]))) for line in lines]
    _draw_runs(axis, runs, looks)
    for chance in chances_of(lines).values():
        axis.axhline(chance, **_CHANCE)
    axis.set(ylim=(-0.03, 1.03), xlabel="seconds of training", ylabel="accuracy")


def _draw_drift(lines: list[dict], looks: _Looks, axis) -> None:
    _draw_runs(axis, [(line["name"], line["drift"]) for line in lines], looks)
    set_log(axis, "x", [at for line in lines for at, _ in line["drift"]], 10)
    set_log(axis, "y", [drift for line in lines for _, drift in line["drift"] if drift is not None], 10)
    axis.set(xlabel="tokens read since m_0", ylabel="drift / spread of the teacher's")


def _draw_gradient(lines: list[dict], looks: _Looks, axis) -> None:
    norms = []
    parts: dict[str, dict[str, Any]] = {"gradient_norm": {}, "teacher_gradient_norm": {"ls": ":"}}
    for key, look in parts.items():
        runs = [(line["name"], line.get(key) or []) for line in lines]
        _draw_runs(axis, runs, looks, **look)
        norms += [norm for _, points in runs for _, norm in points if norm is not None]
    if any(line.get("teacher_gradient_norm") for line in lines):
        axis.plot([], [], color="0.3", ls=":", label="its teacher")
    set_log(axis, "y", norms, 1)
    axis.set(xlabel="distance from the loss (tokens)", ylabel="gradient norm")


def _draw_length(lines: list[dict], looks: _Looks, axis) -> None:
    multiples = sorted({key for line in lines for key in line["length_generalization"]}, key=float)
    scores: dict[str, dict[int, Score]] = {}
    for name, own in _by_name(lines, looks).items():
        by_place = {place: score_of(own, "length_generalization", key) for place, key in enumerate(multiples)}
        scores[name] = {place: score for place, score in by_place.items() if score is not None}
    _draw_scores(axis, scores, looks)
    for chance in chances_of(lines).values():
        axis.axhline(chance, **_CHANCE)
    axis.set_xticks(range(len(multiples)), [f"{key}x" for key in multiples])
    axis.set(ylim=(-0.03, 1.03), xlabel="multiple of the training length", ylabel="accuracy")


def _draw_geometry(lines: list[dict], looks: _Looks, *axes) -> None:
    parts: dict[str, dict[str, Any]] = {"student": {}, "teacher": {"alpha": 0.45, "hatch": "////"}}
    by_name = _by_name(lines, looks)
    for axis, key in zip(axes, ("rank", "spread")):
        for offset, (whose, look) in zip((-0.2, 0.2), parts.items()):
            for place, (name, own) in enumerate(by_name.items()):
                score = score_of(own, "geometry", whose, key)
                if score is not None:
                    bar = {"color": looks[name]["color"], "edgecolor": "white", "ecolor": "0.2", **look}
                    axis.bar(place + offset, score.mean, 0.38, yerr=score.error, capsize=2.5, **bar)
            axis.fill_between([], [], label=f"the {whose}'s", **{"color": "0.4", "edgecolor": "white", **look})
        _name_arms(axis, list(by_name))
        axis.set_ylabel(f"{key} of the memories")


def _samples(lines: list[dict], looks: _Looks) -> Figure | None:
    """One row of images per arm."""
    rows = []
    for title, cell in hardest_cells(lines, "samples"):
        for name, own in _by_name(cell, looks).items():
            line = min(own, key=itemgetter("seed"))
            images = [np.array(sample) for sample in line["samples"] if not isinstance(sample, str)][:_NUM_IMAGES]
            if images:
                rows.append((f"{title}, {name}, seed {line['seed']}", looks[name]["color"], images))
    if not rows:
        return None
    columns = max(len(images) for *_, images in rows)
    brightest = max(int(image.max()) for *_, images in rows for image in images)
    figure = Figure(figsize=(columns, 1.3 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (title, colour, images) in zip(axes, rows):
        heading = row[0].text(0, 1.07, title, fontsize=9, color=colour, transform=row[0].transAxes)
        heading.set_in_layout(False)  # it spans the columns
        for axis in row:
            axis.set_axis_off()
        for axis, image in zip(row, images):
            axis.imshow(image, cmap="gray", vmin=0, vmax=max(brightest, 1))
    return figure


_BARS, _MEDIAN = "(error bars: standard error over seeds)", "(the median over seeds; faint: each seed)"
_FIGURES = {
    "difficulty": _Figure(f"Scores over difficulty {_BARS}", _draw_difficulty),
    "loss": _Figure(
        f"Held-out loss of the student's own rollout during training {_MEDIAN}", _draw_loss, ("curve",), num_axes=2
    ),
    "accuracy": _Figure(
        f"Held-out accuracy of the student's own rollout over the seconds of training {_MEDIAN}",
        _draw_accuracy,
        ("accuracy_curve",),
        every_cell=True,
    ),
    "drift": _Figure(
        f"Drift of the student's own rollout from the teacher's memories {_MEDIAN}", _draw_drift, ("drift",)
    ),
    "gradient": _Figure(
        f"Norm of the gradient over its distance from the loss {_MEDIAN}",
        _draw_gradient,
        ("gradient_norm", "teacher_gradient_norm"),
    ),
    "length": _Figure(f"Accuracy beyond the training length {_BARS}", _draw_length, ("length_generalization",)),
    "geometry": _Figure(f"Rank and spread of the memories {_BARS}", _draw_geometry, ("geometry",), num_axes=2),
}

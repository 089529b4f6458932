"""The figures of a grid's report.

An arm has the same colour, marker and dashes in all of them.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .figures import set_log
from .scores import (
    METRICS,
    YARDSTICKS,
    Score,
    arms_of,
    chances_of,
    hardest_cells,
    kind_of,
    lines_of_arm,
    metric_of,
    metric_score,
    score_of,
    split_by,
)

# Arms of a kind take its colours in order.
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
_CHANCE: dict[str, Any] = {"color": "0.5", "ls": ":", "lw": 1.2, "label": "chance"}
_Styles = dict[str, dict[str, Any]]  # arm -> colour, marker and dashes
_NUM_IMAGES = 10  # samples shown an arm


def draw_figures(lines: list[dict], name: str, folder: Path) -> dict[Path, str]:
    """Write `<folder>/<name>_<figure>.png` for every figure that a line has data for; remove those without data.

    Args:
        lines: of the grid, in order, without sweeps and ablations.

    Returns:
        File -> caption, in the order of the report.
    """
    styles, captions = _styles_of(arms_of(lines)), {}
    for title, (caption, draw) in _FIGURES.items():
        path = folder / f"{name}_{title}.png"
        path.unlink(missing_ok=True)
        figure = draw(lines, styles)
        if figure is not None:
            figure.savefig(path, dpi=120)
            captions[path] = caption
    return captions


def _styles_of(arms: list[str]) -> _Styles:
    styles, used = {}, Counter[str]()
    for arm in arms:
        kind = kind_of(arm)
        rounds, place = divmod(used[kind], len(_COLOURS[kind]))
        dashes = "--" if kind in YARDSTICKS else ("-", "-.", ":")[rounds % 3]
        styles[arm] = {"color": _COLOURS[kind][place], "marker": _MARKERS[kind], "ls": dashes}
        used[kind] += 1
    return styles


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
        cells = hardest_cells(lines, *self.keys) if self.keys else list(split_by(lines, "task").items())
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
    metric, arms = metric_of(lines[0]), arms_of(lines)
    places = {difficulty: place for place, difficulty in enumerate(split_by(lines, "difficulty"))}
    scores = {
        arm: {places[at]: metric_score(cell) for at, cell in split_by(lines_of_arm(lines, arm), "difficulty").items()}
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
        for difficulty, chance in chances_of(lines).items():
            half = 0.5 if len(places) > 1 else len(arms)
            axis.hlines(chance, places[difficulty] - half, places[difficulty] + half, **_CHANCE)
        axis.set_ylim(-0.03, 1.03)
    axis.set_ylabel(METRICS[metric] + ("" if metric == "accuracy" else " (lower is better)"))


def _draw_loss(axes: list, lines: list[dict], styles: _Styles) -> None:
    for axis, key in zip(axes, ("seconds", "sequential_steps")):
        runs = [(line["arm"], [(point[key], point["loss"]) for point in line["curve"]]) for line in lines]
        _draw_runs(axis, runs, styles)
        points = [point for _, points in runs for point in points if point[1] is not None]
        set_log(axis, "y", [loss for _, loss in points], 10)
        if key == "sequential_steps":
            set_log(axis, "x", [at for at, _ in points], 30)
        axis.set(xlabel=key.replace("_", " "), ylabel="nats a label")


def _draw_drift(axes: list, lines: list[dict], styles: _Styles) -> None:
    (axis,) = axes
    _draw_runs(axis, [(line["arm"], line["drift"]) for line in lines], styles)
    set_log(axis, "x", [at for line in lines for at, _ in line["drift"]], 10)
    set_log(axis, "y", [drift for line in lines for _, drift in line["drift"] if drift is not None], 10)
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
    set_log(axis, "y", norms, 1)
    axis.set(xlabel="distance from the loss (tokens)", ylabel="gradient norm")


def _draw_length(axes: list, lines: list[dict], styles: _Styles) -> None:
    (axis,) = axes
    multiples = sorted({key for line in lines for key in line["length_generalization"]}, key=float)
    scores: dict[str, dict[int, Score]] = {arm: {} for arm in arms_of(lines)}
    for arm in scores:
        for place, key in enumerate(multiples):
            score = score_of(lines_of_arm(lines, arm), "length_generalization", key)
            if score is not None:
                scores[arm][place] = score
    _draw_scores(axis, scores, styles)
    for chance in chances_of(lines).values() if metric_of(lines[0]) == "accuracy" else ():
        axis.axhline(chance, **_CHANCE)
    axis.set_xticks(range(len(multiples)), [f"{key}x" for key in multiples])
    axis.set(ylim=(-0.03, 1.03), xlabel="multiple of the training length", ylabel="accuracy")


def _draw_geometry(axes: list, lines: list[dict], styles: _Styles) -> None:
    looks: dict[str, dict[str, Any]] = {"student": {}, "teacher": {"alpha": 0.45, "hatch": "////"}}
    arms = arms_of(lines)
    for axis, key in zip(axes, ("rank", "spread")):
        for offset, (whose, look) in zip((-0.2, 0.2), looks.items()):
            for place, arm in enumerate(arms):
                score = score_of(lines_of_arm(lines, arm), "geometry", whose, key)
                if score is not None:
                    bar = {"color": styles[arm]["color"], "edgecolor": "white", "ecolor": "0.2", **look}
                    axis.bar(place + offset, score.mean, 0.38, yerr=score.error, capsize=2.5, **bar)
            axis.fill_between([], [], label=f"the {whose}'s", **{"color": "0.4", "edgecolor": "white", **look})
        _name_arms(axis, arms)
        axis.set_ylabel(f"{key} of the memories")


def _draw_samples(lines: list[dict], styles: _Styles) -> Figure | None:
    """A row of images an arm."""
    rows = []
    for title, cell in hardest_cells(lines, "samples"):
        for arm in arms_of(cell):
            line = min(lines_of_arm(cell, arm), key=lambda line: line["seed"])
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

"""The figures of a long-context report: scores over length, needle heat maps, bits per byte by position."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .figures import looks_of, save_figures
from .long_context_scores import Score, by_task, means_by

_CHANCE: dict[str, Any] = {"color": "0.5", "ls": ":", "lw": 1.2, "label": "chance"}
_SHORTCUT: dict[str, Any] = {"color": "0.3", "ls": "-.", "lw": 1.2, "label": "shortcut"}
# Lines in the colour of the model.
_OF_MODEL: dict[str, dict[str, Any]] = {
    "needle_removed": {"ls": "--", "label": "needle removed"},
    "last_window": {"ls": ":", "label": "last window"},
}
_MARKERS = "osXDv^P*"
_FIRST_POSITION = 16  # in the figure: those before it are of a few tokens
_Looks = dict[str, dict[str, Any]]  # name -> colour, marker and dashes


def draw_long_context(scores: list[Score], name: str, folder: Path) -> dict[Path, str]:
    """Write `<folder>/<name>_{score,depth,distance,position}.png` where there is something to draw; remove the others.

    Args:
        scores: as `scores_of` returns them.

    Returns:
        File -> caption, in the order of the report.
    """
    looks = looks_of([score.name for score in scores])
    for look, marker in zip(looks.values(), _MARKERS * len(looks)):  # dashes tell controls from scores
        look |= {"ls": "-", "marker": marker}
    tasks = [score for score in scores if not means_by(score, "by_position", "position", "value")]
    figures = {
        "score": ("Scores over length, with chance and controls (error bars: 95 %)", _scores(tasks, looks)),
        "depth": ("Score by the depth of the needle and the length", _depths(tasks)),
        "distance": ("Score by the distance between a needle and the end of the prompt", _distances(tasks, looks)),
        "position": ("Bits per byte by position, and of the end by the context before it", _positions(scores, looks)),
    }
    return save_figures(figures, name, folder)


def _grid(number: int, width: float = 4.1, height: float = 3.0) -> tuple[Figure, list]:
    """A figure with so many axes, and no others."""
    columns = min(number, 3) if number != 4 else 2
    rows = math.ceil(number / columns)
    figure = Figure(figsize=(max(width * columns, 6), height * rows + 0.6), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[number:]:
        axis.set_visible(False)
    return figure, axes[:number]


def _add_legend(figure: Figure, axes: list) -> None:
    handles: dict[str, Any] = {}
    for axis in axes:
        axis.grid(alpha=0.25, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    columns = min(len(handles), max(2, int(figure.get_figwidth() / 1.6)))
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "fontsize": 8, "frameon": False}
    figure.legend(list(handles.values()), list(handles), **place)


def _scores(scores: list[Score], looks: _Looks) -> Figure | None:
    tasks = by_task(scores)
    if not tasks:
        return None
    figure, axes = _grid(len(tasks))
    for axis, ((_, task, unit), own) in zip(axes, tasks.items()):
        lengths = sorted({score.length for score in own})
        for name in [name for name in looks if any(score.name == name for score in own)]:
            _draw_model(axis, [score for score in own if score.name == name], looks[name])
        for look, path in ((_CHANCE, ("chance",)), (_SHORTCUT, ("controls", "last_mentioned", "value"))):
            _draw_line(axis, own, path, look)
        _name_lengths(axis, lengths)
        axis.set(title=task, ylim=(-0.03, 1.03), xlabel=f"length ({unit})", ylabel=own[0].lines[0]["metric"])
    for look in _OF_MODEL.values():  # in the legend once, in no model's colour
        axes[0].plot([], [], color="0.3", lw=1, **look)
    _add_legend(figure, axes)
    return figure


def _draw_model(axis, scores: list[Score], look: dict[str, Any]) -> None:
    lengths, means = [score.length for score in scores], [score.mean("value") or 0.0 for score in scores]
    ends = [score.ends("value") or (mean, mean) for score, mean in zip(scores, means)]
    errors = np.array([[mean - low, high - mean] for (low, high), mean in zip(ends, means)]).T.clip(min=0)
    axis.errorbar(lengths, means, errors, label=scores[0].name, capsize=2.5, ms=5, lw=1.5, **look)
    for control, dashes in _OF_MODEL.items():
        style = {"color": look["color"], "lw": 1, "alpha": 0.7, **dashes, "label": None}
        _draw_line(axis, scores, ("controls", control, "value"), style)


def _draw_line(axis, scores: list[Score], path: tuple[str, ...], look: dict[str, Any]) -> None:
    """A line through the means of all scores at each length that have a value at the path."""
    points: dict[int, list[float]] = {}
    for score in scores:
        points.setdefault(score.length, []).extend(score.values(*path))
    known = [(length, float(np.mean(values))) for length, values in sorted(points.items()) if values]
    if known:
        marks: dict[str, Any] = {"marker": "_", "ms": 14} if len(known) == 1 else {}
        axis.plot(*zip(*known), **marks, **look)


def _name_lengths(axis, lengths: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=30, ha="right", fontsize=8)
    axis.minorticks_off()


def _depths(scores: list[Score]) -> Figure | None:
    maps: dict[tuple[str, str, str], dict[int, dict[float, float]]] = {}
    depths: set[float] = set()
    for score in scores:
        means = means_by(score, "by_depth", "depth", "value")
        depths |= {entry["depth"] for line in score.lines for entry in line.get("by_depth") or []}
        if means:
            maps.setdefault((score.task, score.name, score.unit), {})[score.length] = means
    if not maps:
        return None
    figure, axes = _grid(len(maps), 3.2)
    for axis, ((task, name, unit), by_length) in zip(axes, maps.items()):
        cells = np.array([[means.get(depth, np.nan) for means in by_length.values()] for depth in sorted(depths)])
        image = axis.imshow(cells, aspect="auto", cmap="viridis", vmin=0, vmax=1)
        axis.set_xticks(range(len(by_length)), [f"{length:,}" for length in by_length], rotation=30, fontsize=8)
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in sorted(depths)], fontsize=8)
        axis.set_title(f"{task}, {name}", fontsize=9)
        axis.set(xlabel=f"length ({unit})", ylabel="depth of the needle")
    figure.colorbar(image, ax=axes, label="score", shrink=0.8)
    return figure


def _distances(scores: list[Score], looks: _Looks) -> Figure | None:
    """Samples of all lengths together: a needle at one distance lies at different depths of them."""
    tasks = {
        key: {name: points for name in looks if (points := _by_distance([one for one in own if one.name == name]))}
        for key, own in by_task(scores).items()
    }
    tasks = {key: curves for key, curves in tasks.items() if curves}
    if not tasks:
        return None
    figure, axes = _grid(len(tasks))
    for axis, ((_, task, unit), curves) in zip(axes, tasks.items()):
        for name, points in curves.items():
            axis.plot(*zip(*points), ms=4, lw=1.4, label=name, **looks[name])
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.set(title=task, ylim=(-0.03, 1.03), xlabel=f"distance, at most ({unit})", ylabel="score")
    _add_legend(figure, axes)
    return figure


def _by_distance(scores: list[Score]) -> list[tuple[float, float]]:
    """Distance and mean score over the samples of all lines."""
    found: dict[float, list[tuple[int, float]]] = {}
    for score in scores:
        for entry in (entry for line in score.lines for entry in line.get("by_distance") or []):
            if entry["n"]:
                found.setdefault(entry["distance"], []).append((entry["n"], entry["value"]))
    return [
        (distance, sum(n * value for n, value in parts) / sum(n for n, _ in parts))
        for distance, parts in sorted(found.items())
    ]


def _positions(scores: list[Score], looks: _Looks) -> Figure | None:
    panels = []
    for series, place, label in (
        ("by_position", "position", "position: {unit} read"),
        ("by_context", "context", "{unit} of context before the end"),
    ):
        # The longest streams of a model say what the shorter ones say.
        own = {score.name: score for score in scores if means_by(score, series, place, "value")}
        if own:
            panels.append((series, place, label, own))
    if not panels:
        return None
    figure, axes = _grid(len(panels), 5.0, 3.6)
    for axis, (series, place, label, own) in zip(axes, panels):
        for name in [name for name in looks if name in own]:
            points = means_by(own[name], series, place, "value").items()
            shown = [point for point in points if point[0] >= _FIRST_POSITION] or list(points)
            axis.plot(*zip(*shown), ms=4, lw=1.4, label=name, **looks[name])
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        units = sorted({score.unit for score in own.values()})
        axis.set(xlabel=label.format(unit=" or ".join(units)), ylabel="bits per byte")
    _add_legend(figure, axes)
    return figure

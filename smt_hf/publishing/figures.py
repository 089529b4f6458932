"""How all figures look, and those of one run: its losses over steps, and its loss by position and by age.

An arm has one name, colour and marker in all figures, and a picture is a small file.
"""

import io
import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image

from .arms import display_name
from .scores import UNITS

# Name of what an arm is -> colour, marker, dashes.
_KNOWN = {
    "ours, 1 step": ("#0072B2", "o", "-"),
    "ours, multi-step": ("#009E73", "s", "-"),
    "ours, 1 step, no dmt": ("#56B4E9", "o", "-."),
    "ours, multi-step, no dmt": ("#8DB600", "s", "-."),
    "SMT, then BPTT": ("#CC79A7", "D", "-"),
    "published": ("#8C564B", "P", "-"),
    "BPTT": ("#D55E00", "X", "-"),
    "BPTT, truncated": ("#E69F00", "X", "-."),
    "teacher": ("#111111", "v", "--"),
    "teacher, published": ("#A1887F", "v", "--"),
    "1-gram": ("#B0B0B0", "^", "--"),
    "2-gram": ("#8C8C8C", "^", "--"),
    "3-gram": ("#686868", "^", "--"),
}
_OTHERS = ("#332288", "#882255", "#44AA99", "#B2182B", "#666633", "#AA4499")
_NUM_COLOURS = 128


def looks_of(names: list[str]) -> dict[str, dict[str, Any]]:
    """Names of what arms are -> colour, marker and dashes for matplotlib, in the order of all figures.

    A name that is not known takes one of a few more colours, by its place among the unknown ones.
    """
    known = [name for name in _KNOWN if name in names]
    unknown = sorted(set(names) - set(known))
    looks = {name: _KNOWN[name] for name in known}
    looks |= {name: (_OTHERS[place % len(_OTHERS)], "*", ":") for place, name in enumerate(unknown)}
    return {name: dict(zip(("color", "marker", "ls"), look)) for name, look in looks.items()}


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG with a palette of few colours, which has a fifth of the size that matplotlib writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    # This method keeps rare colours as they are, the colours of small markers among them.
    method = Image.Quantize.MAXCOVERAGE
    Image.open(drawn).convert("RGB").quantize(_NUM_COLOURS, method, dither=Image.Dither.NONE).save(path, optimize=True)


def save_figures(figures: dict[str, tuple[str, Figure | None]], name: str, folder: Path) -> dict[Path, str]:
    """Write `<folder>/<name>_<title>.png` for every figure that there is, and remove the files of the others.

    Args:
        figures: title -> caption, and the figure, or `None` where there was nothing to draw.

    Returns:
        File -> caption, in the order given.
    """
    captions = {}
    for title, (caption, figure) in figures.items():
        path = folder / f"{name}_{title}.png"
        path.unlink(missing_ok=True)
        if figure is not None:
            save_figure(figure, path)
            captions[path] = caption
    return captions


def plot_curves(histories: list[tuple[str, list[dict]]], path: Path) -> None:
    """Draw losses (left) and drift of the student's own rollout (right) over the optimiser steps of all phases.

    Args:
        histories: name and `log_history` of each phase, in order.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    panels: tuple[dict[str, str], ...] = (
        {
            "readout": "readout",
            "teacher": "teacher, next token",
            "teacher_readout": "readout of the teacher",
            "eval_rollout": "held-out rollout",
        },
        {"eval_drift": "drift", "eval_dynamics": "error within a chunk"},
    )
    colours = {name: f"C{index}" for index, name in enumerate(name for panel in panels for name in panel)}
    offset = 0
    for number, (phase, history) in enumerate(histories):
        last = max((line["step"] for line in history if "step" in line), default=0)
        for axis, panel in zip(axes, panels):
            for name, label in panel.items():
                points = [(offset + line["step"], line[name]) for line in history if name in line]
                if points:
                    marker = "o" if name.startswith("eval") else None
                    axis.plot(*zip(*points), color=colours[name], marker=marker, ms=3, lw=1, label=label)
            axis.axvspan(offset, offset + last, color=f"C{number % 10}", alpha=0.06, lw=0)
            axis.annotate(phase, (offset + last / 2, 0.97), xycoords=("data", "axes fraction"), ha="center", va="top")
        offset += last
    axes[0].set(xlabel="optimiser steps", ylabel="nats per token", title="losses")
    axes[1].set(xlabel="optimiser steps", ylabel="squared error", title="drift from the teacher's memories (held out)")
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        if unique := dict(zip(labels, handles)):
            axis.legend(unique.values(), unique.keys(), fontsize=8)
            set_log(axis, "y", [value for line in axis.get_lines() for value in line.get_ydata()], ratio=4)
        else:
            axis.annotate("not measured in this run", (0.5, 0.5), xycoords="axes fraction", ha="center")
    save_figure(figure, path)


def plot_drift_by_age(drift: list[dict], path: Path) -> None:
    """Draw the loss of the student's readout over the age of the memory, the transitions since the teacher's memory.

    A dashed line is the loss on the teacher's memories themselves (age 0), a dotted one that of the student's rollout
    from `m_0` over the same rows. Between them, each age adds to the dashed line what it costs at its own positions.

    Args:
        drift: as `drift_of` returns it; a phase without `by_age` is not drawn.
    """
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axis = figure.subplots()
    for number, phase in enumerate(entry for entry in drift if {"by_age", "teacher_forced", "free_run"} <= set(entry)):
        colour, forced = f"C{number}", phase["teacher_forced"]
        points = sorted((int(age), forced + value) for age, value in phase["by_age"].items())
        axis.plot(*zip(*points), color=colour, marker="o", ms=3, lw=1.2, label=f"{phase['phase']}: by age")
        axis.axhline(forced, color=colour, lw=1, ls="--", label=f"{phase['phase']}: teacher-forced")
        axis.axhline(phase["free_run"], color=colour, lw=1, ls=":", label=f"{phase['phase']}: free run from m_0")
    axis.set(xlabel="age of the memory: transitions since the teacher's", ylabel="nats per label")
    axis.set_title("held-out loss by age, after each phase")
    if axis.get_lines():
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.legend(fontsize=8)
        axis.grid(alpha=0.2)
    else:
        axis.annotate("not measured in this run", (0.5, 0.5), xycoords="axes fraction", ha="center")
    save_figure(figure, path)


def set_log(axis, which: str, values: Iterable[float], ratio: float) -> None:
    """Make an axis logarithmic, with plain numbers, if its largest positive value is above `ratio` times the least."""
    values = [value for value in values if math.isfinite(value) and value > 0]
    if not values or max(values) <= ratio * min(values):
        return
    shown = "25" if max(values) < 100 * min(values) else ""
    getattr(axis, f"set_{which}scale")("log", nonpositive="mask" if which == "x" else "clip")
    ticks = getattr(axis, f"{which}axis")
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in shown else ""))


def plot_loss_by_position(
    curves: dict[str, np.ndarray], ngram_bits: dict[str, float], phases: dict[str, list[dict]], path: Path
) -> None:
    """Draw bits per byte over the position in a held-out stream, one line per arm.

    Args:
        curves: arm -> mean loss at each position, nats per byte.
        ngram_bits: n-gram model -> bits per byte, drawn as a horizontal line.
        phases: arm -> settings of the phases that trained it.
    """
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axis = figure.subplots()
    names = {arm: display_name({"arm": arm, "phases": phases.get(arm)}) for arm in (*curves, *ngram_bits)}
    looks = looks_of(list(names.values()))
    for arm, losses in curves.items():
        edges = np.unique([0, *np.geomspace(1, len(losses), 25).astype(int)])
        means = [losses[begin:end].mean() / math.log(2) for begin, end in pairwise(edges)]
        axis.plot(edges[1:], means, ms=3, lw=1.2, label=names[arm], **looks[names[arm]])
    for arm, bits in ngram_bits.items():
        axis.axhline(bits, lw=1, label=names[arm], color=looks[names[arm]]["color"], ls=looks[names[arm]]["ls"])
    axis.set(xscale="log", xlabel="tokens read since m_0", ylabel=UNITS["bits_per_byte"].label)
    axis.set_title("held-out loss by position")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.2)
    save_figure(figure, path)

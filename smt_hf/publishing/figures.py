"""Pictures of a run."""

import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter


def plot_curves(histories: list[tuple[str, list[dict]]], path: Path) -> None:
    """Losses (left) and drift of the student's own rollout (right) over the steps of all phases.

    Args:
        histories: phase name and `log_history` of its Trainer, in order.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    losses, drift = figure.subplots(1, 2)
    names = {"readout": "readout", "teacher": "teacher, next token", "eval_rollout": "held-out rollout"}
    colours = {name: f"C{index}" for index, name in enumerate(names)}
    offset = 0
    for number, (phase, history) in enumerate(histories):
        for name, label in names.items():
            points = [(offset + line["step"], line[name]) for line in history if name in line]
            if points:
                marker = "o" if name.startswith("eval") else None
                losses.plot(*zip(*points), color=colours[name], marker=marker, ms=3, lw=1, label=label)
        for name, label, axis_colour in (("eval_drift", "drift", "C3"), ("eval_dynamics", "one chunk's error", "C4")):
            points = [(offset + line["step"], line[name]) for line in history if name in line]
            if points:
                drift.plot(*zip(*points), color=axis_colour, marker="o", ms=3, lw=1, label=label)
        last = max((line["step"] for line in history if "step" in line), default=0)
        for axis in (losses, drift):
            axis.axvspan(offset, offset + last, color=f"C{number % 10}", alpha=0.06, lw=0)
            axis.annotate(phase, (offset + last / 2, 0.97), xycoords=("data", "axes fraction"), ha="center", va="top")
        offset += last
    losses.set(xlabel="optimiser steps", ylabel="nats a token", title="losses")
    drift.set(xlabel="optimiser steps", ylabel="squared error", title="drift from the teacher's memories (held out)")
    for axis in (losses, drift):
        handles, labels = axis.get_legend_handles_labels()
        unique = dict(zip(labels, handles))
        if unique:
            axis.legend(unique.values(), unique.keys(), fontsize=8)
            set_log(axis, "y", [value for line in axis.get_lines() for value in line.get_ydata()], ratio=1)
        else:
            axis.annotate("no phase with a teacher", (0.5, 0.5), xycoords="axes fraction", ha="center")
    figure.savefig(path, dpi=120)


def set_log(axis, which: str, values: Iterable[float], ratio: float) -> None:
    """A logarithmic axis with plain numbers, if the positive values spread by more than `ratio`."""
    values = [value for value in values if math.isfinite(value) and value > 0]
    if not values or max(values) <= ratio * min(values):
        return
    shown = "25" if max(values) < 100 * min(values) else ""
    getattr(axis, f"set_{which}scale")("log", nonpositive="mask" if which == "x" else "clip")
    ticks = getattr(axis, f"{which}axis")
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in shown else ""))


def plot_loss_by_position(curves: dict[str, np.ndarray], ngram_bits: dict[str, float], path: Path) -> None:
    """Bits a byte over the position in a held-out stream.

    Args:
        curves: arm -> mean loss at each position, nats a byte.
        ngram_bits: yardstick -> bits a byte, drawn as level lines.
    """
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axis = figure.subplots()
    for index, (arm, losses) in enumerate(curves.items()):
        edges = np.unique(np.geomspace(1, len(losses), 25).astype(int))
        edges = np.unique(np.concatenate([[0], edges]))
        means = [losses[begin:end].mean() / math.log(2) for begin, end in pairwise(edges)]
        axis.plot(edges[1:], means, marker="o", ms=3, lw=1.2, color=f"C{index}", label=arm)
    for index, (name, bits) in enumerate(ngram_bits.items()):
        axis.axhline(bits, color="0.5", lw=1, ls=(":", "-.", "--")[index % 3], label=name)
    axis.set(xscale="log", xlabel="tokens read since m_0", ylabel="bits a byte", title="held-out loss by position")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.2)
    figure.savefig(path, dpi=120)

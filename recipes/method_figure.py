"""Draw the picture of the method, teacher, labels, transitions and phases: `python recipes/method_figure.py`."""

import io
import sys
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image

from smt_hf.command_line import argument, parse
from smt_hf.errors import InputError
from smt_hf.recipe import run_to_end

TEXT = "def main"  # one token per character; the picture's columns are numbers of tokens read
CHUNK, WINDOW = 2, 4  # transitions per chunk of smt and dmt, and per window of bptt, in the picture
_INK, _FAINT, _LABEL, _STUDENT, _LOSS = "#1f2328", "#59636e", "#0b6bb5", "#d4650a", "#a3165f"
_PANEL, _BORDER, _TEACHER = "#ffffff", "#d0d7de", "#dcecf9"
_LEFT, _RIGHT, _END = -2.9, 8.85, 14.75  # columns: names, explanations, their end

_TEACHER_SAYS = (
    "The teacher reads the whole text in one parallel pass\n"
    "and compresses every prefix into a memory label.\n"
    "$m_5$ holds what the first 5 tokens tell about the\n"
    "tokens that follow: it is trained to predict them.\n\n"
    "The student, a recurrent network, learns transitions:\n"
    "a memory and the next token give the next memory.\n"
    "Only the student is kept after training."
)
_PHASES = (
    # name, what it stands for, cut every n tokens, whether chunks start at labels, explanation
    (
        "smt",
        "Supervised Memory\nTraining",
        CHUNK,
        True,
        "Chunks of k tokens (here 2) start at the labels and\n"
        "are trained side by side. No gradient crosses more\n"
        "than k transitions. The teacher is trained along.\n"
        "In a share of the rows, chunks start as in dmt.",
    ),
    (
        "dmt",
        "DAgger Memory\nTraining",
        CHUNK,
        False,
        "Chunks start at memories that the student reached\n"
        "by itself; the labels pull it back to the teacher's\n"
        "path. The teacher is frozen.",
    ),
    (
        "bptt",
        "backpropagation\nthrough time",
        WINDOW,
        False,
        "No teacher. The student reads window after window\n(here 4 tokens) and carries its memory on.",
    ),
)


@dataclass
class MethodFigureArguments:
    """Arguments of `plot_method`."""

    output: str = argument("model_cards/method.png", "PNG file to write.")
    overwrite: bool = argument(False, "Replace the file if it exists.")


def plot_method(output: str | Path, overwrite: bool = False) -> Path:
    """Draw the method on a white card with a transparent margin, readable on light and dark pages.

    Args:
        output: PNG file to write.
        overwrite: whether a file that is there may be replaced.

    Returns:
        `output`.

    Raises:
        InputError: `output` exists and `overwrite` is false.
    """
    path = Path(output)
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists: pass --overwrite to replace it, or choose another --output.")
    figure = Figure(figsize=(11.6, 7.3), facecolor="none")
    axis = figure.add_axes((0, 0, 1, 1), facecolor="none")
    axis.set(xlim=(-3.3, 15.1), ylim=(-7.6, 4.05))
    axis.axis("off")
    axis.add_patch(_rounded((-3.15, -7.5), 18.1, 11.45, _PANEL, _BORDER))
    _draw_teacher(axis)
    for height, phase in zip((-1.0, -3.3, -5.6), _PHASES):
        _draw_phase(axis, height, *phase)
    _draw_legend(axis, -7.07)
    image = io.BytesIO()
    figure.savefig(image, dpi=130, transparent=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    # 128 colours are enough for it and make the file a quarter as large.
    Image.open(image).quantize(128, method=Image.Quantize.FASTOCTREE).save(path, optimize=True)
    return path


def _draw_teacher(axis) -> None:
    """Tokens, the teacher that reads them all at once, and the memory label after each token."""
    last, shown = len(TEXT), 5
    for name, height in (("text", 3.4), ("teacher", 2.2), ("memory labels", 0.45)):
        axis.text(_LEFT, height, name, color=_INK, fontsize=12, weight="bold", va="center")
    axis.text(_LEFT, 1.72, "causal Transformer", color=_FAINT, fontsize=9.5, va="center")
    axis.add_patch(_rounded((0.6, 1.25), last - 0.2, 1.4, _TEACHER, _LABEL))
    for position in range(1, last + 1):
        axis.text(position, 3.28, TEXT[position - 1].replace(" ", "␣"), **_typewriter(14))
        axis.plot((position, position), (3.08, 2.65), color=_FAINT, lw=1)
        width, alpha = (1.8, 1) if position == shown else (0.5, 0.25)
        for read in range(1, position + 1):
            axis.plot((read, position), (2.65, 1.25), color=_LABEL, lw=width, alpha=alpha)
        _arrow(axis, (position, 1.25), (position, 0.72), _LABEL)
    for position in range(last + 1):
        _label(axis, position, 0.45)
        axis.text(position, 0.02, f"$m_{position}$", color=_LABEL, fontsize=11, ha="center", va="center")
    axis.text(0, 1.15, "learned\nstart", color=_FAINT, fontsize=8.5, ha="center", va="center")
    axis.text(_RIGHT, 3.6, _TEACHER_SAYS, color=_INK, fontsize=10, va="top", linespacing=1.4)


def _draw_phase(axis, height: float, phase: str, name: str, cut: int, from_labels: bool, explanation: str) -> None:
    """Labels above, the student's memories below, and the losses: to the label, and of the next token."""
    has_labels = phase != "bptt"
    low = height - (1.0 if has_labels else 0.5)
    axis.plot((_LEFT, _END), (height + 0.7,) * 2, color=_BORDER, lw=1)
    axis.text(_LEFT, height + 0.1, phase, color=_INK, fontsize=15, weight="bold", family="monospace", va="center")
    axis.text(_LEFT, height - 0.3, name, color=_FAINT, fontsize=9.5, va="top", linespacing=1.3)
    axis.text(_RIGHT, height + 0.35, explanation, color=_INK, fontsize=10, va="top", linespacing=1.4)
    for position in range(len(TEXT) + 1):
        axis.plot(position, low, "o", ms=12, color=_STUDENT if position else _PANEL, mec=_STUDENT, mew=2)
        _arrow(axis, (position, low - 0.2), (position, low - 0.55), _LOSS, size=7)
        if position and has_labels:
            _label(axis, position, height)
            axis.plot((position, position), (height - 0.22, low + 0.22), **_dotted())
        if position == len(TEXT):
            continue
        is_start = position % cut == 0 and position > 0
        token = TEXT[position].replace(" ", "␣")
        if is_start and from_labels:
            _arrow(axis, (position + 0.17, height - 0.17), (position + 0.8, low + 0.14), _STUDENT, width=2)
            axis.text(position + 0.62, height - 0.43, token, **_typewriter(9))
        else:
            _arrow(axis, (position + 0.22, low), (position + 0.79, low), _STUDENT, width=2)
            axis.text(position + 0.5, low + 0.17 + 0.12 * is_start, token, **_typewriter(9))
            if is_start:
                _cut(axis, position + 0.44, low)


def _draw_legend(axis, height: float) -> None:
    axis.plot((_LEFT, _END), (height + 0.4,) * 2, color=_BORDER, lw=1)
    _label(axis, -2.75, height)
    axis.plot(-0.2, height, "o", ms=11, color=_STUDENT)
    _arrow(axis, (2.7, height), (3.4, height), _STUDENT, width=2)
    axis.plot((6.05, 6.05), (height - 0.24, height + 0.24), **_dotted())
    _arrow(axis, (9.35, height + 0.22), (9.35, height - 0.22), _LOSS, size=7)
    _cut(axis, 12.25, height)
    names = {
        "memory label": -2.5,
        "student's memory": 0.05,
        "transition, one token": 3.55,
        "loss: distance to the label": 6.25,
        "loss: next token": 9.55,
        "gradient is cut": 12.55,
    }
    for name, place in names.items():
        axis.text(place, height, name, color=_INK, fontsize=9.5, va="center")


def _rounded(corner, width: float, height: float, face: str, edge: str) -> FancyBboxPatch:
    return FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.2", fc=face, ec=edge, lw=1.2)


def _typewriter(size: float) -> dict:
    return {"color": _INK, "fontsize": size, "family": "monospace", "ha": "center", "va": "baseline"}


def _dotted() -> dict:
    return {"color": _LOSS, "lw": 1.6, "ls": (0, (1.2, 1.2))}


def _label(axis, position: float, height: float) -> None:
    axis.plot(position, height, "s", ms=11, color=_LABEL if position else _PANEL, mec=_LABEL, mew=2)


def _cut(axis, place: float, height: float) -> None:
    for shift in (-0.06, 0.06):
        axis.plot((place + shift - 0.05, place + shift + 0.05), (height - 0.2, height + 0.2), color=_INK, lw=1.6)


def _arrow(axis, begin, end, colour: str, width: float = 1.2, size: float = 10) -> None:
    axis.add_patch(
        FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=size, color=colour, lw=width, shrinkA=0, shrinkB=0)
    )


def main() -> None:
    usage = "usage: python recipes/method_figure.py [--output FILE.png] [--overwrite]"
    print(f"written: {plot_method(**vars(parse(MethodFigureArguments, sys.argv[1:], usage)))}")


if __name__ == "__main__":
    run_to_end(main)

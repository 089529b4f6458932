"""How figures look: an arm has one name, colour and marker in all of them, and a picture is a small file."""

import io
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

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

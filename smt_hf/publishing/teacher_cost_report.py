"""The part of a grid's report about students of a language model: what they lose at equal tokens and at equal seconds,
and what the teacher has cost.

A rival is a student that was trained by BPTT alone. It is taken at the best point of its curve up to the tokens, or the
seconds, that the other student has had at its end: one that has begun to learn its text by heart is taken before that.
"""

import itertools
import math
from statistics import fmean, median, stdev
from typing import Any

from matplotlib.figure import Figure

from .arms import is_whole_run, kind_of, natural_order
from .evidence import split_by
from .figures import looks_of
from .tables import markdown_table

FIGURE, CAPTION = "language_model", "Held-out loss over the student's tokens and seconds (median over seeds)"
_LEGEND = """Nats per token, each the mean ± standard error over seeds.

- `streams`: of all held-out streams, after the last step. `end` and `best`: of the student's curve, on fewer held-out
  rows, at its last point and at its best.
- `equal tokens`, `equal seconds`: the student's loss at the end of its curve minus that of the best BPTT under its
  seed, by its own best point up to as many tokens, or seconds. Below zero is in the student's favour.
- `core seconds with the teacher`: of one run, and of all that the language model has read for the cache."""


def split_readings(lines: list[dict]) -> tuple[list[dict], list[dict]]:
    """The lines of students, and those that say what it has cost to let a language model read."""
    return [line for line in lines if "teacher_cache" not in line], [line for line in lines if "teacher_cache" in line]


def teacher_cost_section(lines: list[dict], readings: list[dict]) -> str:
    """Tables of every cell with a reading; nothing without one."""
    parts = []
    for (task, difficulty), some in split_by(readings, "task", "difficulty").items() if readings else ():
        parts.append(f"### `{task}` {difficulty}")
        parts += [_said(reading) for reading in some]
        seconds = max(reading["teacher_cache"]["seconds"] for reading in some)
        for group, cell in _students(lines, task, difficulty).items():
            parts += [*([f"**{group}**"] if group else []), _table(cell, seconds)]
    return "\n\n".join(["## Students of a language model", _LEGEND, *parts]) if parts else ""


def teacher_cost_figure(lines: list[dict], readings: list[dict]) -> Figure | None:
    """Curves of the group of students with the most lines."""
    cells = [_students(lines, reading["task"], reading["difficulty"]).values() for reading in readings]
    cell = max(itertools.chain(*cells), key=len, default=[])
    if not cell:
        return None
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    looks = looks_of([_name(line) for line in cell])
    for axis, key in zip(figure.subplots(1, 2, sharey=True), ("tokens", "seconds")):
        for name, look in looks.items():
            own = [line["curve"] for line in cell if _name(line) == name]
            for curve in own:
                axis.plot(curve[key], curve["loss"], color=look["color"], lw=0.6, alpha=0.35)
            length = min(len(curve["loss"]) for curve in own)
            places = [median(curve[key][place] for curve in own) for place in range(length)]
            middle = [median(curve["loss"][place] for curve in own) for place in range(length)]
            axis.plot(places, middle, label=name if key == "tokens" else None, lw=1.6, ms=4, **look)
        axis.set(xlabel=f"student {key}", ylabel="nats per token" if key == "tokens" else "")
        axis.grid(alpha=0.25, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _students(lines: list[dict], task: str, difficulty: int) -> dict[str, list[dict]]:
    """Whole runs of a cell that have curves without a gap, by their group: sweeps, whose variants may have the names of
    others, are no rivals of the arms."""
    found = [
        {**line, "group": line.get("group") or ""}
        for line in lines
        if (line["task"], line["difficulty"]) == (task, difficulty)
        and is_whole_run(line)
        and (line.get("curve") or {}).get("loss")
        and None not in line["curve"]["loss"]
    ]
    return split_by(found, "group") if found else {}


def _name(line: dict) -> str:
    return str(line.get("variant") or line.get("run", line["arm"]))


def _said(reading: dict) -> str:
    cost, teacher = reading["teacher_cache"], reading["teacher"]
    name = teacher.get("gguf_file") or teacher.get("model_name_or_path")
    read = cost["tokens_read"] or cost["tokens"]
    said = (
        f"{name} has read {cost['tokens']:,} tokens ({cost['rows']:,} rows) for a cache of {cost['bytes'] / 1e9:.2f} "
        f"GB, {cost['bytes'] / cost['tokens']:,.0f} bytes a token: {cost['seconds']:,.0f} core seconds, "
        f"{1000 * cost['seconds'] / read:.2f} per 1,000 tokens, and {cost['load_seconds']:,.0f} to load it."
    )
    return said if read == cost["tokens"] else f"{said} Of these tokens {read:,} were read in those seconds."


def _table(cell: list[dict], teacher_seconds: float) -> str:
    rows = []
    for name, own in sorted(split_by([{**line, "name": _name(line)} for line in cell], "name").items(), key=_order):
        is_rival = kind_of(own[0]) == "rival"
        seconds = fmean(line["wall_clock_s"] * line.get("num_threads", 1) for line in own)
        tokens, spent = fmean(line["tokens"] for line in own), fmean(line["wall_clock_s"] for line in own)
        row = [name, str(len(own)), f"{tokens:,.0f}", f"{spent:,.0f}", f"{tokens / spent:,.0f}"]
        row.append(f"{seconds + (0 if is_rival else teacher_seconds):,.0f}")
        row.append(_shown([line.get("nats_per_token") for line in own]))
        row += [_shown([pick(line["curve"]["loss"]) for line in own]) for pick in (lambda losses: losses[-1], min)]
        row += ["" if is_rival else _shown(_differences(own, cell, key), signed=True) for key in ("tokens", "seconds")]
        rows.append(row)
    header = ["student", "seeds", "tokens", "seconds", "tokens per second", "core seconds with the teacher", "streams"]
    return markdown_table([*header, "end", "best", "equal tokens", "equal seconds"], rows)


def _order(entry: tuple[str, list[dict]]) -> tuple:
    name, own = entry
    return kind_of(own[0]) == "rival", natural_order(name)


def _differences(own: list[dict], cell: list[dict], key: str) -> list[float | None]:
    """The end of each curve minus the best point of the rivals' under its seed, up to as many tokens or seconds."""
    found: list[float | None] = []
    for line in own:
        until = line["curve"][key][-1]
        rivals = [other["curve"] for other in cell if kind_of(other) == "rival" and other["seed"] == line["seed"]]
        losses = [loss for curve in rivals for at, loss in zip(curve[key], curve["loss"]) if at <= until * 1.001]
        found.append(line["curve"]["loss"][-1] - min(losses) if losses else None)
    return found


def _shown(values: list[Any], signed: bool = False) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    error = f" ± {stdev(known) / math.sqrt(len(known)):.3f}" if len(known) > 1 else ""
    return f"{fmean(known):{'+' if signed else ''}.3f}{error}"

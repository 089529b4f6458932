"""Figures of benchmarks."""

from pathlib import Path

from matplotlib.figure import Figure

from smt_hf.publishing.arms import display_name
from smt_hf.publishing.figures import looks_of, save_figure
from smt_hf.publishing.scores import UNITS


def plot_memory_wall(lines: list[dict], path: Path) -> None:
    """Memory (left) and seconds per token (right) over the context, both axes logarithmic.

    Filled markers are measured, open ones calculated or extrapolated; a cross marks the context that no longer fits.

    Args:
        lines: as `measure_memory_wall` returns them, of one run.
    """
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    memory, seconds = figure.subplots(1, 2)
    for index, arm in enumerate(dict.fromkeys(line["arm"] for line in lines)):
        colour, own = f"C{index}", [line for line in lines if line["arm"] == arm]
        _plot(memory, own, "state_bytes", colour, "o", f"{arm}: state, seconds")
        _plot(memory, own, "peak_growth_bytes", colour, "^", f"{arm}: peak growth of the process", ls=":")
        _plot(seconds, own, "seconds_per_token", colour, "o", None)
        for line in own:
            if not line["fits"]:
                needed = max(line["state_bytes"], line["peak_growth_bytes"] or 0)
                memory.plot(line["context"], needed, "x", color=colour, ms=12, mew=2.5)
                memory.annotate(
                    "no longer fits", (line["context"], needed), (-10, 0), textcoords="offset points", ha="right"
                )
                seconds.axvline(line["context"], color=colour, ls="--", lw=1)
                seconds.annotate(
                    "no longer fits", (line["context"], 0.03 + 0.08 * index), (-4, 0), color=colour,
                    xycoords=("data", "axes fraction"), textcoords="offset points", ha="right",
                )  # fmt: skip
    limit = lines[0]["memory_limit_gb"]
    memory.axhline(1e9 * limit, color="0.5", lw=1, ls="--")
    memory.annotate(f"{limit:g} GB", (0.01, 1e9 * limit), xycoords=("axes fraction", "data"), va="bottom", color="0.4")
    memory.set(ylabel="bytes", title="memory besides the parameters")
    seconds.set(ylabel="seconds", title="one token more")
    for axis in (memory, seconds):
        axis.set(xscale="log", yscale="log", xlabel="tokens of context")
        axis.grid(alpha=0.2)
    memory.plot([], [], "o", color="0.4", mfc="white", label="open: not measured")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    save_figure(figure, path)


def plot_long_rows(lines: list[dict], path: Path) -> None:
    """Peak memory of a training pass over the length of its row, both axes logarithmic.

    Open markers are calculated from the row half as long: they are beyond the limit, the dashed line.

    Args:
        lines: as `measure_long_rows` yields them.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    arms = list(dict.fromkeys(line["arm"] for line in lines))
    for arm in arms:
        phase, is_checkpointed = arm.split(",")[0], "," in arm
        colour = f"C{sorted({name.split(',')[0] for name in arms}).index(phase)}"
        own = sorted((line for line in lines if line["arm"] == arm), key=lambda line: line["tokens"])
        points = [(line["tokens"], line["peak_growth_bytes"] or line["needs_bytes"], line["measured"]) for line in own]
        points = [point for point in points if point[1] is not None]
        axis.plot(*zip(*(point[:2] for point in points)), ls="-" if is_checkpointed else ":", color=colour)
        for tokens, size, measured in points:
            axis.plot(tokens, size, "o" if is_checkpointed else "^", color=colour, mfc=colour if measured else "white")
        axis.plot([], [], "o-" if is_checkpointed else "^:", color=colour, label=arm)
    limit = lines[0]["memory_limit_gb"]
    axis.axhline(1e9 * limit, color="0.5", lw=1, ls="--")
    axis.annotate(f"{limit:g} GB", (0.01, 1e9 * limit), xycoords=("axes fraction", "data"), va="bottom", color="0.4")
    axis.set(xscale="log", yscale="log", xlabel="transitions of a row", ylabel="bytes", title="peak memory of a pass")
    axis.set_xscale("log", base=2)
    axis.grid(alpha=0.2)
    axis.legend(fontsize=8)
    save_figure(figure, path)


def plot_long_context(lines: list[dict], path: Path) -> None:
    """Bits per byte by position (left) and accuracy over the distance of the needle (right).

    Args:
        lines: as `measure_long_context` returns them.
    """
    panels = [("text", "bits_per_byte"), ("retrieval", "accuracy")]
    panels = [panel for panel in panels if any(line["task"] == panel[0] for line in lines)]
    looks = looks_of([display_name(line) for line in lines])
    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    for axis, (task, score) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        own = [line for line in lines if line["task"] == task]
        for arm in dict.fromkeys(line["arm"] for line in own):
            points = [line for line in own if line["arm"] == arm]
            name = display_name(points[0])
            places, scores = zip(*((line["position"], line[score]) for line in points))
            axis.plot(places, scores, ms=5, label=name if name == arm else f"{name} ({arm})", **looks[name])
        if task == "retrieval":
            axis.axhline(own[0]["chance"], color="0.5", ls=":", label="chance")
        axis.set(xscale="log", xlabel="tokens read since m_0", ylabel=UNITS[score].label, title=task)
        axis.set_xticks([line["position"] for line in own], [f"{line['position']:,}" for line in own], minor=False)
        axis.minorticks_off()
        axis.legend(fontsize=8)
        axis.grid(alpha=0.2)
    save_figure(figure, path)


def _plot(axis, lines: list[dict], name: str, colour: str, marker: str, label: str | None, ls: str = "-") -> None:
    lines = [line for line in lines if line[name] is not None]
    if not lines:
        return
    values = [line[name] for line in lines]
    contexts = [line["context"] for line in lines]
    axis.plot(contexts, values, color=colour, ls=ls, lw=1.2, label=label)
    for line, value in zip(lines, values):
        axis.plot(line["context"], value, marker, color=colour, ms=5, mfc=colour if line["measured"] else "white")

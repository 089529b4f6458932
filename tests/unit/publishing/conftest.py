"""Lines of a grid, and their report."""

import re

from smt_hf.publishing.report import render_report


def phases_of(arm):
    """What trained an arm of this name."""
    if arm in ("bptt", "bptt_truncated"):
        return [{"phase": "bptt", "transition_steps": 64 if arm == "bptt" else 16, "context_length": 64}]
    if arm == "published":
        return [{"phase": "smt", "transition_steps": 1, "context_length": 64, "num_supervised_transitions": 1}]
    parts = [re.fullmatch(r"(smt|dmt|bptt)(\d*)", part) for part in arm.split("_")]
    if not all(parts):
        return []
    return [{"phase": part[1], "transition_steps": int(part[2] or 1), "context_length": 64} for part in parts]


def make_line(arm="smt", seed=0, accuracy: float | None = 0.95, **fields):
    line = {"task": "retrieval", "difficulty": 16, "arm": arm, "seed": seed, "accuracy": accuracy, "chance": 0.125}
    line |= {"n": 4096, "wall_clock_s": 240.4, "sequential_steps": 900, "tokens": 1_000_000}
    line |= {"commit": "abc123", "hardware": "CPU of mine", "num_threads": 1, "versions": {"torch": "2.13"}}
    return {**line, "student": {"hidden_size": 64}, "phases": phases_of(arm), **fields}


def make_bits(arm, bits, **fields):
    line = make_line(arm, task="text", difficulty=2048, bits_per_byte=bits, **fields)
    return line | {"accuracy": 0.5, "chance": 8.006}


def render(lines, folder):
    """The Markdown, and the names of the figures without the report's."""
    path, *figures = render_report(lines, "grid", folder)
    assert path == folder / "grid.md"
    assert all(figure.stat().st_size > 0 for figure in figures)
    assert sorted(folder.glob("*.png")) == sorted(figures)
    return path.read_text(encoding="utf-8"), {figure.stem.removeprefix("grid_") for figure in figures}

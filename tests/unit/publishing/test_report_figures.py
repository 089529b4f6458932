"""The figures of a report against the lines that they are drawn from."""

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from smt_hf.publishing import figures as drawing
from smt_hf.publishing.figures import looks_of, save_figure
from smt_hf.publishing.report import render_report
from tests.unit.publishing.conftest import make_bits, make_line, render


def drawn(monkeypatch):
    """Figures by name instead of files."""
    figures = {}

    def keep(figure, path):
        figures[path.stem.removeprefix("grid_")] = figure
        path.write_bytes(b"kept")

    monkeypatch.setattr(drawing, "save_figure", keep)
    return figures


def test_figures_are_drawn_for_what_the_lines_hold_alone(tmp_path):
    curve = {"seconds": [10.0, 20.0], "sequential_steps": [100, 200], "loss": [2.0, None]}
    data = {
        "loss": {"curve": curve},
        "drift": {"drift": [[1, 0.001], [8, 0.02], [16, 0.1]]},
        "gradient": {"gradient_norm": [[1, 1.0], [8, 1e-6], [16, 0.0]], "teacher_gradient_norm": [[1, 1.0], [16, 0.9]]},
        "length": {"length_generalization": {"1": 0.99, "2": 0.7, "4": 0.3}},
        "geometry": {"geometry": {"student": {"rank": 9.5, "spread": 0.4}, "teacher": {"rank": 12.0, "spread": 0.5}}},
        "samples": {"samples": [[[0, 1], [2, 3]], [[3, 2], [1, 0]]]},
    }
    lines = [make_line(), make_line("bptt")]
    assert render(lines, tmp_path)[1] == {"difficulty"}
    assert render([make_line(**{key: [] for key in ("curve", "drift", "samples")})], tmp_path)[1] == {"difficulty"}
    for name, fields in data.items():
        text, figures = render([make_line(**fields), *lines], tmp_path)
        assert figures == {"difficulty", name}
        assert f"(grid_{name}.png)" in text
    everything = {key: value for fields in data.values() for key, value in fields.items()}
    assert render([make_line(**everything)], tmp_path)[1] == {"difficulty", *data}
    assert render(lines, tmp_path)[1] == {"difficulty"}  # those of the earlier report are gone


def test_accuracy_over_seconds_is_drawn_for_every_cell_and_told_in_seconds(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)

    def line(arm, difficulty, accuracies, seed=0):
        curve = {"seconds": [5.0, 9.0], "sequential_steps": [50, 70], "loss": [1.0, 0.5], "accuracy": accuracies}
        return make_line(arm, seed, difficulty=difficulty, curve=curve)

    lines = [
        line("smt_dmt", 8, [0.95, 0.99]),
        line("smt_dmt", 8, [0.4, 0.96], seed=1),
        line("bptt", 8, [0.2, 0.94]),
        line("bptt", 16, [None, 0.97]),
    ]
    text, _ = render(lines, tmp_path)
    axes = [axis for axis in figures["accuracy"].axes if axis.get_visible()]
    assert [axis.get_title() for axis in axes] == ["retrieval 8", "retrieval 16"]
    assert len(figures["loss"].axes) == 2  # the hardest cell alone
    rows = [row for row in text.splitlines() if row.startswith(("| cell", "| retrieval"))]
    assert rows == [
        "| cell | ours, 1 step | BPTT |",
        "| retrieval 8 | 7 (2 of 2) | never |",
        "| retrieval 16 |  | 9 (1 of 1) |",
    ]
    bits = make_bits("smt", 2.0, curve=lines[0]["curve"])
    assert "Seconds to" not in render([bits], tmp_path)[0]


def test_an_arm_has_one_colour_and_its_own_data_in_every_figure(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    ends = {"smt_dmt": 0.01, "smt8": 0.02, "smt8_bptt": 0.03, "bptt": 0.04}
    names = ["ours, 1 step", "ours, multi-step, no dmt", "SMT, then BPTT", "BPTT"]
    of_name = dict(zip(names, ends.values()))
    lines = [
        make_line(
            arm,
            seed,
            curve={"seconds": [5, 9], "sequential_steps": [50, 70], "loss": [end, end]},
            drift=[[1, end], [2, end]],
            gradient_norm=[[1, end], [2, end]],
        )
        for arm, end in ends.items()
        for seed in (0, 1)
    ]
    lines += [make_line("smt", run="smt_dmt")]  # a stage on the way
    render_report(lines, "grid", tmp_path)
    colours = {}
    for name in ("loss", "drift", "gradient"):
        assert [text.get_text() for text in figures[name].legends[0].get_texts()] == names
        for axis in figures[name].axes:
            drawn_ones = [line for line in axis.lines if line.get_label() in names]
            assert len(axis.lines) == 12 and len(drawn_ones) == 4  # two seeds and their median per arm
            for line in drawn_ones:
                assert set(line.get_ydata()) == {of_name[line.get_label()]}
                colours.setdefault(line.get_label(), set()).add(line.get_color())
    at = [label.get_text() for label in figures["difficulty"].axes[0].get_xticklabels()]
    for name, container in zip(at, figures["difficulty"].axes[0].containers):
        colours[name].add(container.lines[0].get_color())
    assert at == list(colours) == names
    assert all(some == {looks_of(names)[name]["color"]} for name, some in colours.items())
    assert len(set.union(*colours.values())) == len(ends)


def test_the_hardest_cell_of_each_task_is_drawn(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    drift = [[1, 0.1], [2, 0.2]]
    lines = [make_line(task=task, difficulty=at, drift=drift) for task in ("stack", "retrieval") for at in (8, 16)]
    lines += [make_line(task="retrieval", difficulty=128)]  # harder, and without data
    render_report(lines, "grid", tmp_path)
    assert [axis.get_title() for axis in figures["drift"].axes] == ["retrieval 16", "stack 16"]
    assert [axis.get_title() for axis in figures["difficulty"].axes] == ["retrieval", "stack"]
    assert [label.get_text() for label in figures["difficulty"].axes[0].get_xticklabels()] == ["8", "16", "128"]


def test_an_arm_is_one_line_over_all_difficulties(tmp_path, monkeypatch):
    """Its gradient may cross another number of steps in every cell."""
    figures = drawn(monkeypatch)
    lines = [make_line(f"smt2_dmt{at}", difficulty=at, run="smt2_dmt", is_last=True) for at in (8, 16, 32)]
    render_report(lines, "grid", tmp_path)
    (container,) = figures["difficulty"].axes[0].containers
    assert container.get_label() == "ours, multi-step" and len(container.lines[0].get_xdata()) == 3


def test_two_runs_of_one_cell_that_are_the_same_by_name_are_told_apart(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    lines = [make_line("smt_dmt", difficulty=at, run=run, is_last=True) for run in ("a", "b") for at in (8, 16)]
    render_report([*lines, make_line("bptt", difficulty=8)], "grid", tmp_path)
    labels = [container.get_label() for container in figures["difficulty"].axes[0].containers]
    assert labels == ["BPTT", "ours, 1 step (a)", "ours, 1 step (b)"]


def test_a_small_file_keeps_the_colours_of_arms(tmp_path):
    names = ["ours, 1 step", "ours, multi-step", "BPTT", "BPTT, truncated", "SMT, then BPTT"]
    figure = Figure(figsize=(3, 2))
    axis = figure.subplots()
    for place, look in enumerate(looks_of(names).values()):
        axis.plot([0, 1], [place, place + 1], **look)
    save_figure(figure, tmp_path / "figure.png")
    image = Image.open(tmp_path / "figure.png")
    assert image.mode == "P" and image.size == (300, 200)
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
    for look in looks_of(names).values():
        colour = [int(look["color"][at : at + 2], 16) for at in (1, 3, 5)]
        assert np.abs(pixels - colour).max(1).min() <= 8

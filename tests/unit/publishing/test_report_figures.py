"""The figures of a report against the lines that they are drawn from."""

from smt_hf.publishing import report_figures
from smt_hf.publishing.report import render_report
from tests.unit.publishing.conftest import make_line, render


def drawn(monkeypatch):
    """Figures by name instead of files."""
    figures = {}

    def keep(figure, path, **options):
        figures[path.stem.removeprefix("grid_")] = figure
        path.write_bytes(b"kept")

    monkeypatch.setattr(report_figures.Figure, "savefig", keep)
    return figures


def test_figures_are_drawn_for_what_the_lines_hold_alone(tmp_path):
    curve = [{"seconds": 10.0 * i, "sequential_steps": 100 * i, "step": i, "loss": 2 / (1 + i)} for i in range(4)]
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


def test_an_arm_has_one_colour_and_its_own_data_in_every_figure(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    ends = {"smt": 0.01, "smt8": 0.02, "smt8_bptt": 0.03, "bptt": 0.04}
    lines = [
        make_line(
            arm,
            seed,
            curve=[
                {"seconds": 5, "sequential_steps": 50, "loss": end},
                {"seconds": 9, "sequential_steps": 70, "loss": end},
            ],
            drift=[[1, end], [2, end]],
            gradient_norm=[[1, end], [2, end]],
        )
        for arm, end in ends.items()
        for seed in (0, 1)
    ]
    render_report(lines, "grid", tmp_path)
    colours = {}
    for name in ("loss", "drift", "gradient"):
        assert [text.get_text() for text in figures[name].legends[0].get_texts()] == list(ends)
        for axis in figures[name].axes:
            assert len(axis.lines) == 8
            for line in axis.lines:
                assert set(line.get_ydata()) == {ends[line.get_label()]}
                colours.setdefault(line.get_label(), set()).add(line.get_color())
    for container in figures["difficulty"].axes[0].containers:
        colours[container.get_label()].add(container.lines[0].get_color())
    assert set(colours) == set(ends)
    assert all(len(some) == 1 for some in colours.values())
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

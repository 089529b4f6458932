"""The report of long-context lines against the lines that it is made from."""

import math
import random
import re
from statistics import stdev

import numpy as np
import pytest

from smt_hf.errors import InputError
from smt_hf.publishing import figures as drawing
from smt_hf.publishing.long_context_report import render_long_context
from smt_hf.publishing.long_context_scores import scores_of


def make_line(name="ours", length=1024, value=0.9, seed=0, **fields):
    interval = [round(value - 0.05, 3), round(value + 0.03, 3)]
    line = {"suite": "ruler", "task": "niah_single_1", "length": length, "length_unit": "bytes", "name": name}
    line |= {"metric": "string_match_all", "value": value, "interval": interval, "n": 400, "num_samples": 400}
    line |= {"checkpoint": f"runs/{name}_{seed}/student", "weights": f"{name}{seed}", "seed": 0, "chance": 0.001}
    line |= {"settings": {"controls": True}, "model_type": "smt_recurrent", "num_parameters": 1234}
    line |= {"reading": "chunks of 512 tokens", "trained_on": "128 to 1,024 bytes", "commit": "abc123"}
    return {**line, **fields}


def with_controls(removed, window, shortcut, more=2.5):
    def control(value):
        return {"value": value, "interval": [value - 0.01, value + 0.01], "n": 400}

    graded = {
        "tokens_right": control(0.8),
        "nats_per_token": {"value": 0.5, "interval": [0.4, 0.6], "n": 400},
        "ranking": {**control(0.7), "chance": 0.25},
    }
    nats = {"value": more, "interval": [more - 0.1, more + 0.1], "n": 400}
    controls = {"needle_removed": {**control(removed), "more_nats": nats}, "last_window": control(window)}
    return {"graded": graded, "controls": {**controls, "last_mentioned": control(shortcut)}}


def make_text(name="ours", **fields):
    by_position = [{"position": at, "value": bits} for at, bits in ((16, 3.0), (32, 2.5), (64, 2.25))]
    line = make_line(name, 64, 2.4, suite="text", task="book.txt", metric="bits_per_byte", n=8)
    del line["chance"]
    context = [{"context": 16, "value": 2.6}, {"context": 49, "value": 2.125}]
    return {**line, "by_position": by_position, "by_context": context, **fields}


def render(lines, folder):
    path, *figures = render_long_context(lines, "long", folder)
    assert path == folder / "long.md" and sorted(folder.glob("*.png")) == sorted(figures)
    assert all(figure.stat().st_size > 0 for figure in figures)
    return path.read_text(encoding="utf-8"), {figure.stem.removeprefix("long_") for figure in figures}


def table_after(text, heading):
    block = re.search(r"(?:^\|.*\|\n)+", text.split(heading)[1], flags=re.MULTILINE)
    header, _, *rows = [row[2:-2].split(" | ") for row in block[0].splitlines()]
    return [dict(zip(header, row)) for row in rows]


def test_the_table_says_what_the_lines_say(tmp_path):
    lines = [
        make_line(length=at, value=value, **with_controls(0.1, 0.3, 0.2)) for at, value in ((4096, 0.6), (1024, 0.9))
    ]
    lines.append(make_line("bptt", 1024, 0.25, **with_controls(0.1, 0.21, 0.2)))
    text, figures = render(lines, tmp_path)
    rows = table_after(text, "## ruler: niah_single_1")
    assert [(row["length (bytes)"], row["model"]) for row in rows] == [
        ("1,024", "bptt"),
        ("1,024", "ours"),
        ("4,096", "ours"),
    ]
    assert rows[1] == {
        "length (bytes)": "1,024",
        "model": "ours",
        "samples": "400",
        "string_match_all": "0.900 [0.850, 0.930]",
        "chance": "0.001",
        "needle removed": "0.100",
        "last window": "0.300",
        "shortcut": "0.200",
        "memory": "yes",
        "tokens right": "0.800 [0.790, 0.810]",
        "nats per token": "0.500 [0.400, 0.600]",
        "more nats without needle": "2.500 [2.400, 2.600]",
        "label ranking": "0.700 [0.690, 0.710], chance 0.250",
    }
    assert rows[0]["memory"] == "no"  # its lower end, 0.20, is not above the last window's 0.21
    assert figures == {"score"}
    assert "- **ours**: smt_recurrent, 1,234 parameters; trained on: 128 to 1,024 bytes; read in chunks of 512" in text


def test_several_trainings_of_a_name_are_one_model(tmp_path):
    values = [0.5, 0.7, 0.9]
    lines = [make_line(value=value, seed=seed, **with_controls(0.1, 0.1, 0.1)) for seed, value in enumerate(values)]
    (row,) = table_after(render(lines, tmp_path)[0], "## ruler: niah_single_1")
    assert row["string_match_all"] == f"0.700 ± {stdev(values) / math.sqrt(3):.3f} (3)"
    (score,) = scores_of(lines)
    half = 1.96 * stdev(values) / math.sqrt(3)
    assert score.ends("value") == pytest.approx((0.7 - half, 0.7 + half))
    assert score.shows_memory() is True
    spread = [
        make_line(value=value, seed=seed, **with_controls(0.1, 0.1, 0.1)) for seed, value in enumerate((0.0, 1.0))
    ]
    assert scores_of(spread)[0].shows_memory() is False


def test_models_are_compared_with_one_of_them(tmp_path):
    ours = [make_line(value=value, seed=seed) for seed, value in enumerate((0.5, 0.7, 0.9))]
    rivals = [make_line("BPTT", value=0.1), make_line("BPTT", 2048, 0.9), make_line("Llama", value=0.14)]
    path, *_ = render_long_context([*ours, *rivals], "long", tmp_path, against="BPTT")
    (row,) = [row for row in table_after(path.read_text(), "## Against BPTT") if row["length"] == "1,024 bytes"]
    of_samples = 0.04 / 1.96
    error = math.hypot(stdev((0.5, 0.7, 0.9)) / math.sqrt(3), of_samples)
    assert row["ours"] == f"ahead, +0.600 ± {error:.3f}"
    assert row["Llama"] == f"level, +0.040 ± {math.sqrt(2) * of_samples:.3f}"
    path, *_ = render_long_context([*ours, *rivals], "long", tmp_path, against="ours")
    (row,) = table_after(path.read_text(), "## Against ours")
    assert row["BPTT"].startswith("behind, -0.600")
    # Trainings that agree by chance say no more than their samples do, which are the same for all.
    same = [make_line(value=0.5, seed=seed) for seed in range(4)]
    assert scores_of(same)[0].standard_error() == (pytest.approx(of_samples), math.inf)
    # One success of three trainings is no difference from none.
    lucky = [make_line("lucky", value=value, seed=seed) for seed, value in enumerate((0.0, 0.0, 0.97))]
    sure = [make_line("sure", value=1.0, seed=seed) for seed in range(3)]
    path, *_ = render_long_context([*lucky, *sure], "long", tmp_path, against="lucky")
    (row,) = table_after(path.read_text(), "## Against lucky")
    assert row["sure"].startswith("level, +0.677")
    with pytest.raises(InputError, match=r"no model 'GRU' .* BPTT, Llama, ours"):
        render_long_context([*ours, *rivals], "long", tmp_path, against="GRU")


def test_only_scores_of_the_same_samples_are_compared(tmp_path):
    rival = make_line("BPTT", value=0.1)
    for other in (make_line(suite="babilong"), make_line(length=2048), make_line(made_by="other words")):
        with pytest.raises(InputError, match="no other model has a score in a cell"):
            render_long_context([rival, other], "long", tmp_path, against="BPTT")
    lines = [rival, make_line(value=0.9)]
    for line in lines:
        del line["interval"]
    path, *_ = render_long_context(lines, "long", tmp_path, against="BPTT")
    (row,) = table_after(path.read_text(), "## Against BPTT")
    assert row["ours"] == "+0.800"  # without an error, no verdict
    lines[0]["interval"] = [0.05, 0.15]
    path, *_ = render_long_context(lines, "long", tmp_path, against="BPTT")
    (row,) = table_after(path.read_text(), "## Against BPTT")
    assert row["ours"] == "+0.800"  # of one side alone neither


def test_bytes_of_the_state_are_exact(tmp_path):
    (row,) = table_after(render([make_line(state_bytes=3076, tokens_per_second=12345.6)], tmp_path)[0], "## ruler")
    assert (row["state (bytes)"], row["tokens/s"]) == ("3,076", "12,300")


def test_columns_without_anything_are_left_out(tmp_path):
    (row,) = table_after(render([make_line(controls={})], tmp_path)[0], "## ruler: niah_single_1")
    assert list(row) == ["length (bytes)", "model", "samples", "string_match_all", "chance", "memory"]
    (row,) = table_after(render([make_line(official=0.125)], tmp_path)[0], "## ruler: niah_single_1")
    assert row["official"] == "0.125"
    line = make_line()
    del line["chance"]
    (row,) = table_after(render([line], tmp_path)[0], "## ruler: niah_single_1")
    assert "memory" not in row


def test_text_is_told_by_position_and_context(tmp_path):
    lines = [make_text(), make_text("bptt", by_position=[{"position": 16, "value": 4.0}], by_context=[])]
    shorter = make_text(length=32, by_position=[{"position": 16, "value": 9.0}])
    text, figures = render([*lines, shorter], tmp_path)
    rows = table_after(text, "## text: book.txt, bits_per_byte")
    assert rows == [
        {"position (bytes)": "16", "bptt": "4.000", "ours": "3.000"},
        {"position (bytes)": "32", "bptt": "", "ours": "2.500"},
        {"position (bytes)": "64", "bptt": "", "ours": "2.250"},
    ]
    contexts = table_after(text, "after so much context:")
    assert [row["ours"] for row in contexts] == ["2.600", "2.125"] and list(contexts[0]) == ["context (bytes)", "ours"]
    assert figures == {"position"}


def test_the_order_of_lines_changes_nothing_and_old_figures_go(tmp_path):
    depths = [{"depth": 0.05, "value": 0.25, "n": 3}, {"depth": 0.15, "value": None, "n": 0}]
    series = {"by_depth": depths, "by_distance": [{"distance": 256, "value": 0.25, "n": 3}]}
    lines = [make_line(name, at, **series) for name in ("ours", "bptt") for at in (1024, 4096)] + [make_text()]
    first = render(lines, tmp_path / "a")
    assert first[1] == {"score", "depth", "distance", "position"}
    for seed in range(3):
        random.Random(seed).shuffle(lines)
        assert render(lines, tmp_path / "b") == first
    for figure in first[1]:
        ours, theirs = (tmp_path / folder / f"long_{figure}.png" for folder in "ab")
        assert ours.read_bytes() == theirs.read_bytes()
    assert render([make_text()], tmp_path / "a")[1] == {"position"}


@pytest.fixture
def drawn(monkeypatch):
    """Figures by name instead of files."""
    figures = {}

    def keep(figure, path):
        figures[path.stem.removeprefix("long_")] = figure
        path.write_bytes(b"kept")

    monkeypatch.setattr(drawing, "save_figure", keep)
    return figures


def test_scores_are_drawn_with_chance_and_controls(tmp_path, drawn):
    tmp_path.mkdir(exist_ok=True)
    lines = [
        make_line("ours", 1024, 0.9, **with_controls(0.1, 0.3, 0.2)),
        make_line("ours", 4096, 0.5, **with_controls(0.15, 0.25, 0.05)),
        make_line("bptt", 4096, 0.4, task="vt"),
    ]
    render_long_context(lines, "long", tmp_path)
    first, second = drawn["score"].axes
    assert [first.get_title(), second.get_title()] == ["niah_single_1", "vt"]
    (model,) = first.containers
    assert model.get_label() == "ours"
    np.testing.assert_allclose(model.lines[0].get_xydata(), [[1024, 0.9], [4096, 0.5]])
    ends = [segment[:, 1] for segment in model.lines[2][0].get_segments()]
    np.testing.assert_allclose(ends, [[0.85, 0.93], [0.45, 0.53]])
    plain = {line.get_label(): line for line in first.lines if not line.get_label().startswith("_")}
    np.testing.assert_allclose(plain["chance"].get_xydata(), [[1024, 0.001], [4096, 0.001]])
    np.testing.assert_allclose(plain["shortcut"].get_xydata(), [[1024, 0.2], [4096, 0.05]])
    dashed = [line for line in first.lines if line.get_linestyle() == "--" and len(line.get_xdata())]
    assert any(
        list(line.get_ydata()) == [0.1, 0.15] and line.get_color() == model.lines[0].get_color() for line in dashed
    )
    names = [text.get_text() for text in drawn["score"].legends[0].get_texts()]
    assert set(names) == {"ours", "bptt", "chance", "shortcut", "needle removed", "last window"}


def test_the_heat_map_has_length_across_and_depth_down(tmp_path, drawn):
    def depths(*values):
        return [{"depth": round(0.05 + place / 10, 2), "value": value} for place, value in enumerate(values)]

    lines = [
        make_line(length=1024, by_depth=depths(1.0, 0.5, None)),
        make_line(length=4096, by_depth=depths(0.2, 0.1, 0.0)),
    ]
    render_long_context(lines, "long", tmp_path)
    axis = drawn["depth"].axes[0]
    np.testing.assert_allclose(axis.images[0].get_array(), [[1.0, 0.2], [0.5, 0.1], [np.nan, 0.0]])
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1,024", "4,096"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["5%", "15%", "25%"]
    assert axis.get_title() == "niah_single_1, ours"


def test_distances_of_all_lengths_are_pooled_by_their_samples(tmp_path, drawn):
    near, far = {"distance": 512, "n": 3, "value": 1.0}, {"distance": 4096, "n": 1, "value": 0.0}
    empty = {"distance": 64, "n": 0, "value": None}
    lines = [
        make_line(length=1024, by_distance=[empty, near]),
        make_line(length=8192, by_distance=[{**near, "n": 1, "value": 0.0}, far]),
        make_line("bptt", length=1024),
    ]
    render_long_context(lines, "long", tmp_path)
    (axis,) = drawn["distance"].axes
    (line,) = axis.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([512, 4096], [0.75, 0.0])
    assert line.get_label() == "ours" and axis.get_title() == "niah_single_1"


def test_lines_that_do_not_belong_together_are_refused(tmp_path):
    with pytest.raises(InputError, match="no lines"):
        render_long_context([], "long", tmp_path)
    line = make_line()
    del line["name"]
    with pytest.raises(InputError, match="has no name"):
        render_long_context([line], "long", tmp_path)
    for other, reason in (
        ({"settings": {"controls": False}}, "differ in their settings"),
        ({"num_samples": 10}, "differ in their num_samples"),
        ({"weights": "older", "seed": 3}, "different weights"),
        ({}, "twice"),
    ):
        with pytest.raises(InputError, match=reason):
            render_long_context([make_line(), {**make_line(), **other}], "long", tmp_path)
    assert not list(tmp_path.iterdir())

"""The report against the lines that it is made from: verdicts and tables."""

import json
import math
import random
import re
from statistics import fmean, stdev

import pytest

from smt_hf.errors import InputError
from smt_hf.publishing.arms import display_name, kind_of
from smt_hf.publishing.evidence import append_lines, read_lines
from smt_hf.publishing.report import render_report
from smt_hf.publishing.scores import Score, judge
from tests.unit.publishing.conftest import make_bits, make_line, phases_of, render


def make_grid():
    """Accuracies of two tasks, three difficulties, some arms and three seeds, and bits of text."""
    numbers = random.Random(0)
    lines = [
        make_line(arm, seed, round(numbers.uniform(0.2, 1), 4), task=task, difficulty=difficulty)
        for task in ("retrieval", "stack")
        for difficulty in (8, 16, 128)
        for arm in ("smt", "smt8", "smt16_dmt", "smt8_bptt", "bptt", "bptt_truncated", "teacher")
        for seed in range(3)
    ]
    lines += [make_bits(arm, bits) for arm, bits in (("smt8", 2.1), ("bptt", 2.0), ("ngram1", 3.5))]
    lines += [make_line("smt", seed, 0.5, group="terms", variant="no readout") for seed in range(2)]
    return lines


def table_after(text, heading):
    """Rows of the first table below a heading, by the header's names without backticks."""
    block = re.search(r"(?:^\|.*\|\n)+", text.split(heading)[1], flags=re.MULTILINE)
    header, _, *rows = [[cell.strip("` ") for cell in row[2:-2].split(" | ")] for row in block[0].splitlines()]
    return [dict(zip(header, row)) for row in rows]


def judged(scores, metric):
    """The verdict on arms whose kinds follow from their names."""
    return judge(scores, {arm: kind_of({"arm": arm, "phases": phases_of(arm)}) for arm in scores}, metric)


def score(mean, error=None, num_seeds=1):
    return Score(mean, error, num_seeds)


@pytest.mark.parametrize(
    "ours, rival, word",
    [
        (score(0.95), score(0.90), "ahead"),
        (score(0.92), score(0.90), "level"),  # not beyond 0.02
        (score(0.90), score(0.95), "behind"),
        (score(0.5), score(0.95), "behind"),
        (score(0.95, 0.03, 3), score(0.85, 0.04, 3), "level"),  # two errors: 2 x 0.05
        (score(0.96, 0.03, 3), score(0.85, 0.04, 3), "ahead"),
        (score(0.85, 0.04, 3), score(0.96, 0.03, 3), "behind"),
        (score(0.95, 0.03, 3), score(0.90), "level"),  # a single seed has no error of its own
        (score(0.95, 0.0, 3), score(0.94, 0.0, 3), "level"),
        (score(0.6), score(0.2), "ahead, both fail"),
        (score(0.2), score(0.89), "behind, both fail"),
        (score(0.9), score(0.2), "ahead"),
        (score(0.95), score(math.nan), "ahead"),
        (score(math.nan, math.nan, 3), score(0.95, 0.01, 3), "behind"),
        (score(math.nan), score(math.nan), "level, both fail"),
    ],
)
def test_verdict_on_accuracy(ours, rival, word):
    verdict = judged({"smt": ours, "bptt": rival}, "accuracy")
    assert verdict is not None and verdict.word == word


@pytest.mark.parametrize(
    "ours, rival, word",
    [
        (score(2.00), score(2.05), "ahead"),
        (score(2.05), score(2.00), "behind"),
        (score(2.01), score(2.00), "level"),
        (score(2.00, 0.03, 2), score(2.09, 0.04, 2), "level"),
        (score(2.00, 0.03, 2), score(2.11, 0.04, 2), "ahead"),
        (score(math.inf), score(2.0), "behind"),
    ],
)
def test_verdict_on_bits_is_the_other_way_round(ours, rival, word):
    for metric in ("bits_per_byte", "bits_per_pixel"):
        verdict = judged({"smt": ours, "bptt": rival}, metric)
        assert verdict is not None and verdict.word == word


def test_verdict_takes_the_best_of_both_sides():
    arms = {"smt": 0.91, "smt8_dmt": 0.97, "bptt": 0.93, "bptt_truncated": 0.95, "teacher": 1.0, "published": 1.0}
    scores = {arm: score(mean) for arm, mean in arms.items()}
    verdict = judged(scores, "accuracy")
    assert (verdict.ours, verdict.rival, verdict.word) == ("smt8_dmt", "bptt_truncated", "level")
    assert verdict.difference.mean == pytest.approx(0.02)
    verdict = judged(scores, "bits_per_byte")
    assert (verdict.ours, verdict.rival, verdict.word) == ("smt", "bptt", "level")


def test_arms_with_a_bptt_phase_are_not_ours():
    scores = {"smt8": score(0.92), "smt8_bptt": score(1.0), "smt_dmt_bptt": score(1.0), "bptt": score(0.98)}
    verdict = judged(scores, "accuracy")
    assert (verdict.ours, verdict.rival, verdict.word) == ("smt8", "bptt", "behind")
    del scores["smt8"]
    assert judged(scores, "accuracy") is None
    assert judged({"smt8": score(0.92), "smt8_bptt": score(1.0), "teacher": score(1.0)}, "accuracy") is None


def test_summary_counts_cells_and_names_losses(tmp_path):
    cells = {8: (0.99, 0.5), 16: (0.95, 0.94), 32: (0.91, 0.99), 64: (0.3, 0.8), 128: (0.3, None)}
    lines = [
        make_line(arm, accuracy=accuracy, difficulty=difficulty)
        for difficulty, both in cells.items()
        for arm, accuracy in zip(("smt", "bptt"), both)
        if accuracy is not None
    ]
    text, _ = render(lines, tmp_path)
    assert "ahead in 1, level in 1, behind in 2 of 4 cells; among them, both are below 0.9 in: retrieval 64." in text
    assert "- behind: retrieval 32 (-0.080), retrieval 64 (-0.500, both fail)" in text
    assert "4 of the verdicts rest on one" in text
    assert "was not run: retrieval 128." in text
    words = [row["verdict"] for row in table_after(text, "### `retrieval`")]
    assert words == ["ahead", "level", "behind", "behind, both fail", "not compared"]


def test_numbers_are_those_of_the_lines(tmp_path):
    lines = make_grid()
    text, _ = render(lines, tmp_path)
    for task in ("retrieval", "stack"):
        rows = table_after(text, f"### `{task}`")
        assert [row["difficulty"] for row in rows] == ["8", "16", "128"]
        arms = ["smt", "smt8", "smt16_dmt", "smt8_bptt", "bptt", "bptt_truncated", "teacher"]
        assert list(rows[0]) == ["difficulty", *arms, "chance", "ours - bptt", "verdict"]
        for row in rows:
            means = {}
            for arm in arms:
                some = [line for line in lines if "group" not in line and line["arm"] == arm and line["task"] == task]
                values = [line["accuracy"] for line in some if str(line["difficulty"]) == row["difficulty"]]
                means[arm] = fmean(values)
                shown = f"{means[arm]:.3f} ± {stdev(values) / math.sqrt(3):.3f}"
                assert row[arm].replace("*", "") == f"{shown} (3)"
            assert row["chance"] == "0.125"
            bold = [arm for arm in arms if row[arm].startswith("**")]
            assert bold == [max(arms[:-1], key=means.__getitem__)]
            ours = max(arms[:3], key=means.__getitem__)
            rival = max(("bptt", "bptt_truncated"), key=means.__getitem__)
            assert row["ours - bptt"].startswith(f"{means[ours] - means[rival]:+.3f} ± ")
            assert row["ours - bptt"].endswith(f"({ours} against {rival})")
    (row,) = table_after(text, "### `text`: bits per byte (lower is better)")
    assert (row["smt8"], row["bptt"], row["ngram1"]) == ("2.100 (1)", "**2.000** (1)", "3.500 (1)")
    assert row["verdict"] == "behind"
    costs = table_after(text, "## Costs")[0]
    assert list(costs) == ["task", "arm", "seconds", "tokens", "sequential steps", "lines"]
    assert list(costs.values()) == ["retrieval", "smt", "240", "1,000,000", "900", "9"]
    assert "- hardware: CPU of mine (131 lines)" in text
    assert "- seeds: retrieval: 0, 1, 2; stack: 0, 1, 2; text: 0" in text


def test_unequal_training_times_are_named(tmp_path):
    lines = [
        make_line(arm, seed, difficulty=difficulty, wall_clock_s=seconds + seed)
        for difficulty, both in {8: (100, 109), 16: (100, 112), 32: (1200, 100)}.items()
        for arm, seconds in zip(("smt", "bptt"), both)
        for seed in (0, 1)
    ]
    text, _ = render(lines, tmp_path)
    named = "retrieval 16 (ours 100 s, bptt 112 s), retrieval 32 (ours 1,200 s, bptt 100 s)"
    assert f"Trained for times that differ by more than a tenth: {named}." in text


def test_several_lines_of_a_seed_count_once_and_are_named(tmp_path):
    lines = [make_line(seed=0, accuracy=0.9), make_line(seed=0, accuracy=1.0), make_line(seed=1, accuracy=0.93)]
    text, _ = render(lines, tmp_path)
    assert table_after(text, "### `retrieval`")[0]["smt"] == "**0.940 ± 0.010** (2)"
    assert "as one arm and seed: retrieval 16 smt seed 0 (2 lines)." in text


def test_stages_of_longer_runs_count_where_there_is_no_whole_run(tmp_path):
    stage = make_line("smt", accuracy=0.5, run="smt_dmt")
    lines = [stage, make_line("smt_dmt", accuracy=0.9, run="smt_dmt", is_last=True)]
    assert table_after(render(lines, tmp_path)[0], "### `retrieval`")[0]["smt"] == "0.500 (1)"
    lines += [make_line("teacher", accuracy=0.7, run=run) for run in ("smt", "smt_dmt")]
    lines += [make_line("smt", accuracy=0.8, run="smt", is_last=True)]
    text, _ = render(lines, tmp_path)
    row = table_after(text, "### `retrieval`")[0]
    assert (row["smt"], row["smt_dmt"], row["teacher"]) == ("0.800 (1)", "**0.900** (1)", "0.700 (1)")
    assert "1 more lines, of stages" in text and "Averaged" not in text


def test_a_diverged_arm_is_shown_and_never_the_best(tmp_path):
    lines = [make_line("smt", accuracy=math.nan), make_line("smt8", accuracy=None), make_line("bptt", accuracy=0.3)]
    row = table_after(render(lines, tmp_path)[0], "### `retrieval`")[0]
    assert (row["smt"], row["smt8"], row["bptt"]) == ("nan (1)", "nan (1)", "**0.300** (1)")


def test_groups_have_their_own_tables(tmp_path):
    lines = [make_line("smt2", 0, 0.99), make_line("bptt", 0, 0.95)]
    for variant, accuracy in (("raw | dynamics", 0.12), ("all terms", 0.97), ("no consistency", 0.85)):
        lines += [make_line("smt2", seed, accuracy + 0.01 * seed, group="terms", variant=variant) for seed in range(2)]
    lines += [make_bits("smt8", bits, group="weights", variant=f"w {bits}") for bits in (2.2, 2.1)]
    text, _ = render(lines, tmp_path)
    assert table_after(text, "### `retrieval`")[0]["smt2"] == "**0.990** (1)"
    rows = table_after(text, "### terms")
    assert [row["variant"] for row in rows] == ["all terms", "no consistency", "raw \\| dynamics"]
    assert list(rows[0]) == ["variant", "arm", "accuracy", "seconds", "seeds"]
    assert list(rows[0].values()) == ["all terms", "smt2", "0.975 ± 0.005", "240", "2"]
    assert [row["bits per byte"] for row in table_after(text, "### weights")] == ["2.100", "2.200"]
    assert "### `text`" not in text

    # A group with a run that no variant changes.
    lines += [make_line("smt2", 0, score, group="alone", variant=name) for name, score in ((None, 0.5), ("b", 0.4))]
    assert [row["variant"] for row in table_after(render(lines, tmp_path)[0], "### alone")] == ["as it stands", "b"]

    text, figures = render([line for line in lines if "group" in line], tmp_path)
    assert "## Results" not in text and "### terms" in text
    assert figures == set()


def test_text_samples_are_code_blocks(tmp_path):
    samples = ["a ``` b\x00\n", "second", "third"]
    lines = [make_bits("smt8", 2.0, seed=seed, samples=samples if seed == 1 else ["of seed 2"]) for seed in (2, 1)]
    text, figures = render(lines, tmp_path)
    assert "text 2048, `smt8`, seed 1, the first 2 of 3:\n\n````\na ``` b\\x00\n\n````\n\n```\nsecond\n```" in text
    assert "third" not in text and "of seed 2" not in text
    assert "samples" not in figures


def test_the_order_of_lines_changes_nothing(tmp_path):
    lines = make_grid() + [make_line("bptt", accuracy=0.1), make_line("smt", accuracy=0.2, difficulty=8)]
    lines += [make_bits(arm, 2.0, samples=[text]) for arm in ("smt8", "bptt") for text in "ab"]
    for number, line in enumerate(lines):
        line["geometry"] = {"student": {"rank": number / 7, "spread": number / 3}}
        line["drift"] = [[1, number / 3], [2, 7 / (1 + number)]]
    first, figures = render(lines, tmp_path / "a")
    for seed in range(3):
        random.Random(seed).shuffle(lines)
        assert render(lines, tmp_path / "b") == (first, figures)
    for figure in figures:
        ours, theirs = (tmp_path / folder / f"grid_{figure}.png" for folder in "ab")
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    "arm, phases, kind, name",
    [
        ("smt", [("smt", 1, 64)], "ours", "ours, 1 step, no dmt"),
        ("smt_dmt", [("smt", 1, 64), ("dmt", 1, 64)], "ours", "ours, 1 step"),
        ("smt_dmt4", [("smt", 1, 64), ("dmt", 4, 64)], "ours", "ours, multi-step"),
        ("any name", [("smt", 8, 64)], "ours", "ours, multi-step, no dmt"),
        ("smt8_bptt", [("smt", 8, 64), ("bptt", 16, 256)], "mixed", "SMT, then BPTT"),
        ("bptt", [("bptt", 64, 64)], "rival", "BPTT"),
        ("bptt", [("bptt", 16, 64)], "rival", "BPTT, truncated"),
        ("teacher", [("smt", 8, 64)], "teacher", "teacher"),
        ("ngram3", [], "ngram", "3-gram"),
        ("mamba", [], "other", "mamba"),
    ],
)
def test_an_arm_is_what_its_phases_say(arm, phases, kind, name):
    names = ("phase", "transition_steps", "context_length")
    line = {"arm": arm, "phases": [dict(zip(names, phase)) for phase in phases]}
    assert (kind_of(line), display_name(line)) == (kind, name)


def test_a_phase_of_the_teacher_alone_does_not_make_an_arm():
    first = {"phase": "smt", "transition_steps": 8, "context_length": 64, "trains_updater": False}
    line = {"arm": "dmt", "phases": [first, {"phase": "dmt", "transition_steps": 1, "context_length": 64}]}
    assert display_name(line) == "ours, 1 step"
    few = {"phase": "smt", "transition_steps": 1, "context_length": 64, "num_supervised_transitions": 1}
    assert display_name({"arm": "published", "phases": [few]}) == "published"
    assert display_name({"arm": "teacher", "phases": [few]}) == "teacher, published"


def test_lines_are_read(tmp_path):
    path = tmp_path / "grid.jsonl"
    lines = [make_line(samples=["\u2028 is no end of a line"]), make_line("bptt")]
    path.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n", encoding="utf-8")
    assert read_lines(path) == lines
    append_lines(lines, tmp_path / "new" / "grid.jsonl")
    append_lines(lines[:1], tmp_path / "new" / "grid.jsonl")
    assert read_lines(tmp_path / "new" / "grid.jsonl") == [*lines, lines[0]]
    with pytest.raises(ValueError):
        append_lines([make_line(), make_line(accuracy=math.nan)], tmp_path / "nothing.jsonl")
    assert not (tmp_path / "nothing.jsonl").exists()
    for path in (tmp_path / "nothing.jsonl", tmp_path):
        with pytest.raises(InputError, match=r"there is no file|cannot read"):
            read_lines(path)


@pytest.mark.parametrize("malformed", ['{"task": "retri', "[1, 2]", "3"])
def test_a_malformed_line_is_named(tmp_path, malformed):
    path = tmp_path / "grid.jsonl"
    path.write_text(json.dumps(make_line()) + "\n\n" + malformed + "\n")
    with pytest.raises(ValueError, match=r"grid\.jsonl, line 3: not "):
        read_lines(path)


@pytest.mark.parametrize("key", ["task", "difficulty", "arm", "seed", "accuracy"])
def test_an_incomplete_line_is_refused(tmp_path, key):
    line = make_line()
    del line[key]
    with pytest.raises(ValueError, match=f"has no .*{key}"):
        render_report([line], "grid", tmp_path)
    assert not list(tmp_path.iterdir())


def test_unfit_lines_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no lines"):
        render_report([], "grid", tmp_path)
    with pytest.raises(ValueError, match="has no variant"):
        render_report([make_line(group="terms")], "grid", tmp_path)
    with pytest.raises(ValueError, match="accuracy and in bits_per_byte"):
        render_report([make_bits("smt", 2.0), make_line(task="text")], "grid", tmp_path)

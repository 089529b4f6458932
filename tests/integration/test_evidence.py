"""Committed evidence: its size, its settings, and one cell of each table trained again."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from smt_hf.experiments.composition import changed_settings, phase_settings
from smt_hf.experiments.grid import is_done
from smt_hf.experiments.grid_file import parse_grid
from smt_hf.publishing.arms import display_name, is_whole_run
from smt_hf.publishing.evidence import read_lines
from smt_hf.publishing.long_context_report import compared, render_long_context
from smt_hf.publishing.long_context_scores import scores_of
from smt_hf.training.phases import ARGUMENTS

ROOT = Path(__file__).parents[2]
NAMES = ("SMT then DMT", "BPTT")
EVIDENCE = ROOT / "model_cards" / "evidence"
# Table -> the cell, and how far a run may lie outside the scores of the table: a second buys more steps on one machine
# than on another.
CELLS = {
    "probes": (["task=retrieval", "difficulty=32", "arm=smt_dmt", "seed=0"], 0.15),
    "bptt_sweep": (["task=stack", "arm=bptt", "variant=learning_rate=0.002, per_device_train_batch_size=32"], 0.25),
    "ablations": (["task=modular_arithmetic", "arm=smt_dmt", "variant=everything"], 0.15),
    "text": (["task=text", "arm=bptt_truncated", "seed=0"], 0.15),
    "text_mlp": (["task=text", "arm=bptt_swept", "variant=learning_rate=0.004, transition_steps=8"], 0.15),
    "ours_sweep": (
        ["task=stack", "arm=smt2_dmt_stack", "variant=learning_rate=0.004, per_device_train_batch_size=16"],
        0.15,
    ),
    "pixels": (["task=pixels", "arm=bptt", "seed=0"], 0.15),
    "open_cpu": (["task=retrieval", "arm=bptt", "seed=0"], 0.1),
    "parity": (["task=parity", "difficulty=64", "arm=bptt", "seed=0"], 0.1),
}


def test_size():
    assert sum(path.stat().st_size for path in EVIDENCE.iterdir()) < 3_500_000


@pytest.mark.parametrize(
    "table",
    [
        "probes",
        "probes_long",
        "text",
        "text_fast_weight",
        "levers",
        "pixels",
        "ablations",
        "ours_sweep",
        "search_pixels",
    ],
)
def test_lines_are_those_of_the_grid(table):
    """A grid that goes on takes its committed lines as done, which it refuses to do with lines of other settings."""
    lines = read_lines(EVIDENCE / f"{table}.jsonl")
    runs = parse_grid(["--config", str(ROOT / "recipes" / f"{table}.yaml")]).runs
    assert sum(is_done(run, lines) for run in runs) == sum(line.get("is_last", False) for line in lines)


def test_settings_that_lines_leave_out_are_still_the_defaults():
    """Where a default has changed, the lines that relied on it have to say the old one."""
    recorded = json.loads((EVIDENCE / "defaults.json").read_text())
    for phase, kind in ARGUMENTS.items():
        now = phase_settings(kind(output_dir="unused"))
        both = recorded[phase].keys() & now.keys()
        assert len(both) > 20 and {name: recorded[phase][name] for name in both} == {name: now[name] for name in both}


def test_phases_say_what_an_arm_is():
    """In all committed lines; a line holds what differs from the defaults, and always what the name is made from."""
    for path in EVIDENCE.glob("*.jsonl"):
        for line in read_lines(path):
            if "benchmark" in line or "suite" in line:  # no run of a grid
                continue
            name = display_name(line)
            is_named = line["arm"] in ("teacher", "published", "published_smt") or line["arm"].startswith("ngram")
            assert is_named or ("BPTT" in name) == ("bptt" in line["arm"]), (path.name, line["arm"])
            if "run" in line and not is_whole_run(line):
                assert "curve" not in line and "versions" not in line
    arguments = ARGUMENTS["smt"](output_dir="unused", max_seconds=3.0, learning_rate=0.5)
    always = {"phase": "smt", "context_length": 64, "transition_steps": 8}
    assert changed_settings(arguments) == {**always, "max_seconds": 3.0, "learning_rate": 0.5}


def test_long_contexts(tmp_path):
    """The report is made from the lines, and README's table says what they say."""
    lines = read_lines(EVIDENCE / "long_context.jsonl")
    (report, *_) = render_long_context(lines, "long_context", tmp_path, against="BPTT")
    text = report.read_text()
    assert text == (EVIDENCE / "long_context.md").read_text()
    readme = (EVIDENCE / "README.md").read_text().split("\n## Long contexts")[1].split("\n## ")[0]
    cells = {(score.name, score.task, score.length): score for score in scores_of(lines)}
    rows = [row.strip("| ").split(" | ") for row in readme.splitlines() if row.startswith(("| `niah", "| `qa"))]
    assert len(rows) == 23 and len([cell for cell in cells if cell[0] == "BPTT"]) == 23
    for task, length, *written, verdict, window in rows:
        task = task.strip("`")
        ours, rival = (cells[name, task, int(length.replace(",", ""))] for name in ("SMT then DMT", "BPTT"))
        for own, score in zip(written, (ours, rival), strict=True):
            assert own == score.written("value").removesuffix(" (3)") and len(score.lines) == 3
            assert {line["n"] for line in score.lines} == {400}
            without = max(score.values("controls", "needle_removed", "value"))
            assert without < 0.3 if task.startswith("qa") else without == 0  # a room may be guessed
        assert verdict == compared(ours, rival)
        (row,) = [row for row in text.splitlines() if row.startswith(f"| {task} | {length} bytes |")]
        assert f" {verdict} " in row
        assert window == f"{ours.mean('controls', 'last_window', 'value'):.3f}"


def test_labels_of_stories():
    """The table of arms on stories, the seconds to 0.85 of the labels, steps over long rows, and the tuning of BPTT."""
    section = (
        (EVIDENCE / "README.md").read_text().split("\n**Stories: SMT reads further.**")[1].split("\n**A card**")[0]
    )
    words = " ".join(section.split())
    rows = [row.strip("| ").split(" | ") for row in section.splitlines() if re.match(r"\| (SMT|BPTT)", row)]
    earlier = ["bptt_long_threshold_0.08", "bptt_long_threshold_0.08_rate_0.002"]
    runs = ["smt_dmt", "bptt", *earlier, "bptt_long", "bptt_long_rate_0.004"]
    assert len(rows) == len(runs)
    defaults = json.loads((EVIDENCE / "defaults.json").read_text())
    of_run = {run: lines_of(EVIDENCE / "long_context_students.jsonl", ["task=stories", f"arm={run}"]) for run in runs}
    for (_, settings, *written), lines in zip(rows, of_run.values()):
        lines.sort(key=lambda line: line["seed"])
        assert [line["seed"] for line in lines] == [0, 1, 2]
        assert written == [f"{line['accuracy']:.3f}" for line in lines]
        first = [defaults[line["phases"][0]["phase"]] | line["phases"][0] for line in lines]
        rates = {phase["learning_rate"] for phase in first}
        thresholds = {phase["curriculum_threshold"] for phase in first}
        assert settings == f"{thresholds.pop()}, {rates.pop()}" and not rates and not thresholds
    reached = {
        run: [
            round(next(at for at, right in zip(line["curve"]["seconds"], line["curve"]["accuracy"]) if right >= 0.85))
            for line in lines
        ]
        for run, lines in of_run.items()
    }
    assert reached["smt_dmt"] == [30, 30, 30] and "after 30 s under every seed" in words
    assert "BPTT after {}, {} and {} s".format(*reached["bptt_long"]) in words
    curves = [line["curve"] for line in of_run["smt_dmt"]]  # a step of the scan counts as one
    counts = [
        at(curve, "sequential_steps", 540) - at(curve, "sequential_steps", 300)  # seconds of the second phase
        for curve in curves
    ]
    assert "{}, {} and {} steps".format(*counts) in words
    curves = [line["curve"] for line in of_run["bptt_long"]]
    counts = [(curve["sequential_steps"][-1] - at(curve, "sequential_steps", 360)) // 8192 for curve in curves]
    assert "BPTT makes {}, {} and {} steps".format(*counts) in words


def at(curve, name, seconds):
    """The last value of a curve that was measured up to about so many seconds."""
    return [value for value, when in zip(curve[name], curve["seconds"]) if when < seconds + 5][-1]


def test_search_of_long_rows():
    """What the README says of BPTT's rates on long rows, against the lines of their students."""
    readme = " ".join((EVIDENCE / "README.md").read_text().split())
    lines = read_lines(EVIDENCE / "long_context_search.jsonl")
    at_the_end = {
        (line["name"].removeprefix("BPTT, rate of long rows "), line["checkpoint"][-1]): line["value"]
        for line in lines
        if (line["task"], line["length"]) == ("qa1", 16384)
    }
    seeds = [at_the_end["0.004", seed] for seed in "012"]
    assert "0.004 the seeds 0 to 2 have {:.3f}, {:.3f} and {:.3f}".format(*seeds) in readme
    assert f"seed 7 has {at_the_end['0.004, seed 7', '7']:.3f}" in readme
    assert f"0.008 seed 7 has {at_the_end['0.008, seed 7', '7']:.3f}" in readme
    assert f"per step, {at_the_end['0.002, 2 rows per step, seed 7', '7']:.3f}" in readme
    table = [line for line in read_lines(EVIDENCE / "long_context.jsonl") if line["task"] == "qa1"]
    ends = {
        name: [line["value"] for line in table if (line["name"], line["length"]) == (name, 16384)] for name in NAMES
    }
    assert f"No BPTT has more than {max([*at_the_end.values(), *ends['BPTT']]):.3f}" in readme
    assert f"no SMT less than {math.floor(min(ends['SMT then DMT']) * 1000 + 0.5) / 1000}" in readme


def lines_of(path: Path, words: list[str]) -> list[dict]:
    wanted = dict(word.split("=", 1) for word in words)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    names = {"arm": "run"}
    return [
        line
        for line in lines
        if line.get("is_last")
        and all(str(line.get(names.get(name, name))) == value for name, value in wanted.items() if name != "seed")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("table", [table for table in CELLS if (EVIDENCE / f"{table}.jsonl").exists()])
def test_a_cell_of_the_table(table, tmp_path):
    words, tolerance = CELLS[table]
    reported = lines_of(EVIDENCE / f"{table}.jsonl", words)
    assert reported, f"{table}.jsonl has no line of {words}"
    output = tmp_path / "again.jsonl"
    command = [sys.executable, str(ROOT / "recipes" / "experiment.py"), "--config", str(ROOT / f"recipes/{table}.yaml")]
    command += ["--only", *words, "--output", str(output), "--jobs", "1"]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (again,) = lines_of(output, words)
    metric = next(name for name in ("bits_per_byte", "bits_per_pixel", "accuracy") if name in again)
    scores = [line[metric] for line in reported]
    assert min(scores) - tolerance <= again[metric] <= max(scores) + tolerance, (again[metric], fmean(scores))

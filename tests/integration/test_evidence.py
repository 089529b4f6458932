"""Committed evidence: its size, its settings, and one cell of each table trained again."""

import json
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
    assert len(rows) == 23 and len([cell for cell in cells if cell[0] == "BPTT"]) == 16
    for task, length, *written, verdict, window in rows:
        task = task.strip("`")
        other = "BPTT, rows up to 1,024" if task.startswith("qa") else "BPTT"
        ours, rival = (cells[name, task, int(length.replace(",", ""))] for name in ("SMT then DMT", other))
        for own, score in zip(written, (ours, rival), strict=True):
            assert own == score.written("value").removesuffix(" (3)") and len(score.lines) == 3
            assert {line["n"] for line in score.lines} == {400}
            without = max(score.values("controls", "needle_removed", "value"))
            assert without < 0.3 if task.startswith("qa") else without == 0  # a room may be guessed
        assert verdict == compared(ours, rival)
        if other == "BPTT":  # whom the report compares all others with
            (row,) = [row for row in text.splitlines() if row.startswith(f"| {task} | {length} bytes |")]
            assert f" {verdict} " in row
        assert window == f"{ours.mean('controls', 'last_window', 'value'):.3f}"


def test_labels_of_stories():
    """The table of arms on stories, and the seconds to 0.85 of the labels."""
    section = (EVIDENCE / "README.md").read_text().split("\n**Stories: open.**")[1].split("\n**One student")[0]
    rows = [row.strip("| ").split(" | ") for row in section.splitlines() if re.match(r"\| (SMT|BPTT)", row)]
    runs = ("smt_dmt", "bptt", "bptt_long_threshold_0.08", "bptt_long_threshold_0.08_rate_0.002")
    assert len(rows) == len(runs)
    reached = {}
    for (_, settings, *written), run in zip(rows, runs):
        lines = lines_of(EVIDENCE / "long_context_students.jsonl", ["task=stories", f"arm={run}"])
        lines.sort(key=lambda line: line["seed"])
        assert [line["seed"] for line in lines] == [0, 1, 2]
        assert written == [f"{line['accuracy']:.3f}" for line in lines]
        defaults = json.loads((EVIDENCE / "defaults.json").read_text())
        first = [defaults[line["phases"][0]["phase"]] | line["phases"][0] for line in lines]
        rates = {phase["learning_rate"] for phase in first}
        thresholds = {phase["curriculum_threshold"] for phase in first}
        assert settings == f"{thresholds.pop()}, {rates.pop()}" and not rates and not thresholds
        curves = [line["curve"] for line in lines]
        reached[run] = [
            round(next(at for at, right in zip(curve["seconds"], curve["accuracy"]) if right >= 0.85))
            for curve in curves
        ]
    assert reached["smt_dmt"] == [30, 30, 30] and "after 30 s under every seed" in " ".join(section.split())
    assert "runs after {}, {} and {} s".format(*reached[runs[-1]]) in " ".join(section.split())


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

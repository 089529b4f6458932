"""Grids are checked as a whole before their first run."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from smt_hf.errors import InputError
from smt_hf.experiments.grid import run_grid
from smt_hf.experiments.grid_file import parse_grid
from smt_hf.experiments.run_folder import locked

GRID = {
    "student": {"hidden_size": 16, "num_attention_heads": 2},
    "tasks": {"retrieval": {"difficulties": [8]}, "pixels": {}},
    "arms": {"smt_dmt": {"phases": [{"smt": {"max_steps": 4}}, "dmt"]}, "bptt": {"phases": ["bptt"]}},
}


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        ({}, ["--only", "task=retrival"], "no task 'retrival': did you mean 'retrieval'"),
        ({}, ["--only", "arm=smtdmt"], "no arm 'smtdmt': did you mean 'smt_dmt'"),
        ({}, ["--only", "difficulty=5.5"], "must be a whole number"),
        ({}, ["--only", "task=retrieval", "difficulty=1"], "has no transitions"),
        ({}, ["--only", "variant=none"], "nothing of .* is left"),
        ({}, ["--jobs", "0"], "`jobs` must be at least 1"),
        ({}, ["--output"], "needs a value"),
        ({}, ["--outputs", "x"], "did you mean 'output'"),
        ({}, ["--train_file", ""], "`train_file` is empty"),
        ({"tasks": {"retrieve": {}}}, [], "unknown task 'retrieve': did you mean 'retrieval'"),
        ({"tasks": {"retrieval": {}}}, [], "needs `difficulties`"),
        ({"tasks": {}}, [], "needs `tasks`"),
        ({"num_threads": 0}, [], "`num_threads` of .* must be at least 1"),
        ({"arms": {"a": {"phases": [{"smt": {"max_step": 3}}]}}}, [], "did you mean 'max_steps'"),
        ({"tasks": {"needles": {"difficulties": [512], "documents": ["niah"]}}}, [], "must be a list of niah_single_1"),
        ({"tasks": {"text": {"documents": ["qa1"]}}}, [], "under a name that no other task has"),
        ({"tasks": {"needles": {"documents": ["niah_single_1"]}}}, [], "task needles needs `difficulties`"),
        ({"arms": {"a": {"phases": []}}}, [], "arm a needs `phases`"),
    ],
)
def test_a_grid_is_checked_before_the_first_run(tmp_path, change, words, message):
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({**GRID, **change}))
    with pytest.raises(InputError, match=message):
        parse_grid(["--config", str(path), *words])


def test_documents_have_a_name_of_their_own(tmp_path):
    path = tmp_path / "grid.yaml"
    task = {"needles": {"difficulties": [1024], "curriculum": [512], "documents": ["niah_single_1", "text"]}}
    path.write_text(yaml.safe_dump({**GRID, "tasks": task}))
    words = ["--haystack", "a.txt", "b.txt", "--students", "kept", "--only", "arm=bptt"]
    parsed = parse_grid(["--config", str(path), *words])
    (run,) = parsed.runs
    assert (run.task, run.documents, run.curriculum) == ("needles", ("niah_single_1", "text"), (512,))
    assert run.sources == {"haystack": ["a.txt", "b.txt"]} and parsed.students == Path("kept")
    assert run.folder() == "needles_1024_bptt_0"
    (other,) = parse_grid(["--config", str(path), "--only", "arm=bptt"]).runs
    changed = dataclasses.replace(run, documents=("niah_single_1",))
    assert len({run.digest(), other.digest(), changed.digest()}) == 3
    path.write_text(yaml.safe_dump(GRID))  # a grid without documents has no haystack
    assert all(not run.sources for run in parse_grid(["--config", str(path), "--haystack", "a.txt"]).runs)


def test_where_lines_of_a_grid_go(tmp_path, monkeypatch):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**GRID, "output": "model_cards/evidence/mine.jsonl"}))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.warns(UserWarning, match="`output` of .* is ignored"):
        assert parse_grid(["--config", str(path)]).output == Path("runs/mine.jsonl")
        assert parse_grid(["--config", "~/mine.yaml", "--output", "~/a.jsonl"]).output == tmp_path / "a.jsonl"
    with locked(tmp_path, ".a.jsonl.lock"), pytest.raises(InputError, match=r"a\.jsonl is in use by PID"):
        list(run_grid([], tmp_path / "a.jsonl"))

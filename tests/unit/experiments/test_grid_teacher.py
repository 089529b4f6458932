"""A grid with a language model as the teacher: whose tokens, who reads, what it costs, what is told."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from smt_hf import SMTRecurrentForCausalLM
from smt_hf.data import byte_tokenizer
from smt_hf.errors import InputError
from smt_hf.experiments import grid as grids
from smt_hf.experiments import grid_teacher
from smt_hf.experiments.grid import read_ahead, train_run
from smt_hf.experiments.grid_file import parse_grid
from smt_hf.publishing.report import render_report
from smt_hf.teachers import pretrained
from smt_hf.teachers.loading import load_model
from smt_hf.training.embeddings import principal_coordinates
from smt_hf.training.teacher_cache import RowArrays
from tests.unit.teachers.test_pretrained import write_gguf

LENGTH, TOKENS = 16, 640
SHORT = {"context_length": LENGTH, "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 0.0}
SHORT |= {"eval_strategy": "steps", "eval_steps": 2, "drift_rows": 0, "transition_steps": 8}
TAUGHT = {**SHORT, "distillation_top_k": 5, "distillation_weight": 1.0, "dynamics_weight": 0.0}
GRID = {
    "init_embeddings_from_teacher": True,
    "student": {"hidden_size": 8, "num_attention_heads": 2, "embedding_size": 6, "num_hidden_layers": 1},
    "tasks": {"text": {"difficulties": [32], "train_tokens": TOKENS}},
    "arms": {
        "memories": {
            "group": "all",
            "phases": [{"smt": {**SHORT, "teacher_weight": 0.0, "predictive_weight": 0.0}}],
            "variants": {"memories alone": {}},
        },
        "kl": {"group": "all", "phases": [{"dmt": TAUGHT}], "variants": {"KL alone": {}}},
        "bptt": {
            "group": "all",
            "phases": [{"bptt": {**SHORT, "carries_memory": False}}],
            "variants": {"BPTT": {}},
        },
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a random Llama that speaks bytes."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(1)
    sizes = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=258, **sizes)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def ready(model, tmp_path, text_file):
    """The runs of the grid by arm, read ahead, and the lines of what that has cost."""
    loaded, lines = read_ahead(parsed(tmp_path, model, text_file, tmp_path / "cache"))
    return {run.arm: run for run in loaded}, lines


def parsed(tmp_path, model, text_file, cache, **changes):
    (tmp_path / "hub.yaml").write_text(yaml.safe_dump({**GRID, **changes}))
    words = ["--config", tmp_path / "hub.yaml", "--train_file", text_file, "--teacher_model_name_or_path", model]
    return parse_grid([str(word) for word in [*words, "--teacher_cache_dir", cache]]).runs


def test_where_a_teacher_lies_is_no_setting(model, tmp_path, text_file):
    runs = parsed(tmp_path, model, text_file, tmp_path / "cache")
    caches = {run.arm: [of.get("teacher_cache_dir") for _, of in run.phases] for run in runs}
    assert caches == {"memories": [str(tmp_path / "cache")], "kl": [str(tmp_path / "cache")], "bptt": [None]}
    moved = tmp_path / "elsewhere" / "tiny"
    shutil.copytree(model, moved)
    again = parsed(tmp_path, moved, text_file, tmp_path / "other")
    assert [run.digest() for run in again] == [run.digest() for run in runs]
    others = [replace(runs[1], train_tokens=641), replace(runs[1], init_embeddings_from_teacher=False)]
    others.append(replace(runs[1], teacher={**runs[1].teacher, "model_name_or_path": "another"}))
    assert len({run.digest() for run in [runs[1], *others]}) == 4


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        ({}, ["--teacher_cache_dir", "x"], "`teacher_cache_dir` needs a language model"),
        ({}, ["--teacher_gguf_file", "x"], "`teacher_gguf_file` needs a language model"),
        ({}, [], "`init_embeddings_from_teacher` needs a language model"),
        ({"init_embeddings_from_teacher": 1}, [], "must be true or false"),
        ({"tasks": {"pixels": {"train_tokens": 9}}}, [], "task pixels has no use for it"),
        ({"tasks": {"text": {"train_tokens": 0}}}, [], "above 0"),
    ],
)
def test_what_is_refused(tmp_path, change, words, message):
    (tmp_path / "hub.yaml").write_text(yaml.safe_dump({**GRID, **change}))
    with pytest.raises(InputError, match=message):
        parse_grid(["--config", str(tmp_path / "hub.yaml"), *words])


def test_the_model_reads_once_and_is_told_with_its_cost(model, tmp_path, text_file, ready, monkeypatch):
    _, (line,) = ready
    cost = line["teacher_cache"]
    # Rows to train on and rows of 128 that are held out, none of them read twice.
    assert cost["tokens"] == cost["tokens_read"] and (cost["tokens"] - 12 * 128) % LENGTH == 0
    assert 12 * 128 < cost["tokens"] <= 12 * 128 + TOKENS - LENGTH and cost["seconds"] > 0 and cost["load_seconds"] > 0
    files = [path for path in (tmp_path / "cache").rglob("*.npy") if path.stem != "filled"]
    assert 0 < sum(path.stat().st_size for path in files) - cost["bytes"] < 128 * len(files) + 1
    assert line["task"] == "text" and line["difficulty"] == 32 and line["teacher"] == {"model_name_or_path": "tiny"}
    monkeypatch.setattr(pretrained, "load_model", None)
    _, again = read_ahead(parsed(tmp_path, model, text_file, tmp_path / "cache"), jobs=2)
    assert again == [line]


def test_students_learn_without_the_model(model, tmp_path, ready, monkeypatch):
    """And from the same tokens, with the same embeddings at birth; nothing tells where the model lies."""
    monkeypatch.setattr(pretrained, "load_model", None)
    runs, _ = ready
    lines = {arm: train_run(run, tmp_path / "students") for arm, run in runs.items()}
    for arm, (line,) in lines.items():
        assert line["tokens"] == 4 * 4 * LENGTH and line["n"] % 32 == 0 and line["train_tokens"] == TOKENS
        assert line["curve"]["tokens"] == [2 * 4 * LENGTH, 4 * 4 * LENGTH] and line["group"] == "all"
        # Tokens are bytes here.
        assert line["nats_per_token"] == pytest.approx(line["bits_per_byte"] * 0.693147, rel=1e-5)
        assert str(model.parent) not in json.dumps(line) and str(tmp_path) not in json.dumps(line)
        folder = tmp_path / "students" / runs[arm].folder()
        student = SMTRecurrentForCausalLM.from_pretrained(folder)
        table = AutoModelForCausalLM.from_pretrained(model).get_input_embeddings().weight
        own, expected = student.get_input_embeddings().weight, principal_coordinates(table, 6)
        torch.testing.assert_close(own / own.norm(), expected / expected.norm(), atol=1e-5, rtol=1e-3)
        card = (folder / "README.md").read_text()
        assert card.count("--------\n") == 3 and str(model.parent) not in card and "begun as those" in card
        assert ("the language model tiny, which has read" in card) == (arm != "bptt")


def test_read_ahead_in_a_process_of_its_own_is_told_in_the_output(model, tmp_path, text_file, monkeypatch):
    """Once, however often the grid goes on."""
    runs = parsed(tmp_path, model, text_file, tmp_path / "cache")
    monkeypatch.setattr(grids, "_with_teachers", lambda runs, jobs: read_ahead(runs, jobs))
    monkeypatch.setattr(grids, "_trained", lambda runs, jobs, students: iter(()))
    for _ in range(2):
        assert list(grids.run_grid(runs, tmp_path / "lines.jsonl")) == []
    (line,) = map(json.loads, (tmp_path / "lines.jsonl").read_text().splitlines())
    assert line["teacher_cache"]["tokens"] >= TOKENS - LENGTH


def student_line(variant, seed, phase, losses, seconds, nats):
    curve = {"tokens": [100, 200], "seconds": seconds, "loss": losses}
    phases = [{"phase": phase, "transition_steps": 8, "context_length": 16}]
    named = {"task": "text", "difficulty": 32, "arm": phase, "seed": seed, "group": "all", "variant": variant}
    costs = {
        "tokens": 200,
        "wall_clock_s": seconds[-1],
        "nats_per_token": nats,
        "bits_per_byte": nats,
        "num_threads": 2,
    }
    return {**named, **costs, "curve": curve, "phases": phases, "is_last": True}


def test_a_folder_that_another_run_has_made_meanwhile(tmp_path, monkeypatch):
    """What is there then is taken; nothing is left beside it."""
    cache = RowArrays(tmp_path / "states", 2, {"states": ((3,), np.int16)})
    winner = RowArrays(tmp_path / "states", 2, {"states": ((3,), np.int16)})
    real = Path.rename

    def late(self, target):
        monkeypatch.setattr(Path, "rename", real)
        winner.create()
        return real(self, target)

    monkeypatch.setattr(Path, "rename", late)
    cache.create()
    cache.open()
    assert [path.name for path in tmp_path.iterdir()] == ["states"]


def test_report_at_equal_tokens_and_seconds(tmp_path):
    """Against the best point of BPTT under the same seed; its point of 12 seconds lies behind the student's end."""
    cost = {"rows": 10, "tokens": 1000, "bytes": 5000, "seconds": 30.0, "load_seconds": 7.0, "tokens_read": 500}
    lines = [{"task": "text", "difficulty": 32, "teacher": {"model_name_or_path": "tiny"}, "teacher_cache": cost}]
    for seed in range(2):
        lines.append(student_line("KL alone", seed, "dmt", [5.0, 4.0 + seed], [4.0, 8.0], 4.2))
        lines.append(student_line("BPTT", seed, "bptt", [4.5, 4.8], [3.0, 6.0], 4.9))
        lines.append(student_line("BPTT, longer", seed, "bptt", [4.7, 4.4], [9.0, 12.0], 4.6))
    # A sweep: its best student by BPTT is no rival of the arms, and its names may be theirs.
    sweep = [("bptt", [3.0, 3.5]), ("dmt", [9.0, 9.0])]
    for phase, losses in sweep:
        line = student_line("KL alone", 0, phase, losses, [2.0, 4.0], 9.0)
        lines.append({**line, "group": f"sweep of {phase}"})
    report, *figures = render_report(lines, "hub", tmp_path)
    text = report.read_text()
    assert "**sweep of bptt**" in text and "**sweep of dmt**" in text
    assert (
        "tiny has read 1,000 tokens (10 rows)" in text and "60.00 per 1,000 tokens" in text and "500 were read" in text
    )
    (row,) = [line for line in text.splitlines() if line.startswith("| KL alone | 2 ")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # Equal tokens: against 4.4; equal seconds: against 4.5.
    assert cells[2:6] == ["200", "8", "25", "46"] and cells[6:9] == ["4.200 ± 0.000", "4.500 ± 0.500", "4.500 ± 0.500"]
    assert cells[9:] == ["+0.100 ± 0.500", "+0.000 ± 0.500"]
    assert Path(tmp_path / "hub_language_model.png") in figures
    (row,) = [line for line in text.splitlines() if line.startswith("| BPTT | 2 ")]
    assert [cell.strip() for cell in row.strip("|").split("|")][5] == "12"


def test_a_gguf_file_is_unpacked_once(tmp_path, monkeypatch):
    """To what transformers makes of it, and anew where the file holds something else."""
    calls = []

    def load(name, revision, gguf_file, *rest, with_head):
        calls.append((name, gguf_file))
        return load_model(name, revision, gguf_file, *rest, with_head)

    monkeypatch.setattr("smt_hf.teachers.unpacking.load_model", load)
    monkeypatch.setattr("smt_hf.teachers.unpacking.tokenizer_of", lambda *where: byte_tokenizer())
    write_gguf(tmp_path / "tiny.gguf")
    fields = {"model_name_or_path": str(tmp_path), "gguf_file": "tiny.gguf", "layers": "1"}
    try:
        expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    except ImportError:
        pytest.skip("transformers before 5.24 needs the package gguf")
    first, again = (grid_teacher.unpacked_teacher(fields, str(tmp_path / "cache")) for _ in range(2))
    assert first == again and calls == [(str(tmp_path), "tiny.gguf")]
    assert first.keys() == {"model_name_or_path", "layers"}
    folder = Path(first["model_name_or_path"])
    tokens = torch.tensor([[1, 2, 3, 0]])
    own = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(own(tokens).logits, expected(tokens).logits) and (folder / "tokenizer.json").exists()
    assert not list(folder.parent.glob("*.new"))
    with (tmp_path / "tiny.gguf").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    assert grid_teacher.unpacked_teacher(fields, str(tmp_path / "cache")) != first and len(calls) == 2
    with pytest.raises(InputError, match="there is no file"):
        grid_teacher.unpacked_teacher({**fields, "gguf_file": "none.gguf"}, str(tmp_path / "cache"))

"""Grids and tasks as a user runs them: lines, resumption, report, the retrieval recipe."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import smt_hf  # noqa: F401 - registers the model

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
GRID = {
    "jobs": 2,
    "seeds": [0],
    "num_heldout": 64,
    "student": {"hidden_size": 16, "num_attention_heads": 2, "updater_type": "mlp"},
    "teacher": {"hidden_size": 24, "num_attention_heads": 2},
    "tasks": {"retrieval": {"difficulties": [8], "curriculum": [4]}, "pixels": {}},
    "arms": {
        "smt_dmt": {
            "phases": [
                {
                    "smt": {
                        "max_steps": 4,
                        "transition_steps": 1,
                        "curriculum_threshold": 3.0,
                        "consistency_weight": 1.0,
                        "on_policy_mode": "sequential",
                        "on_policy_warmup_ratio": 0.0,
                    }
                },
                {"dmt": {"max_steps": 3}},
            ]
        },
        "bptt": {"phases": [{"bptt": {"max_steps": 4, "transition_steps": 256}}]},
        "published": {
            "teacher": {"model_type": "smt_windowed_teacher", "context_length": 8},
            "phases": [
                {
                    "smt": {
                        "max_steps": 4,
                        "num_supervised_transitions": 1,
                        "teacher_weight": 0.0,
                        "transition_steps": 1,
                        "on_policy_fraction": 0.0,
                    }
                },
                {"dmt": {"max_steps": 2, "label_stride": 4, "continue_previous_phase": False}},
            ],
        },
    },
}


def recipe(script, *words, cwd):
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / script), *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    (folder / "grid.yaml").write_text(yaml.safe_dump(GRID))
    recipe("experiment.py", "--config", "grid.yaml", cwd=folder)
    return folder, [json.loads(line) for line in (folder / "runs" / "grid.jsonl").read_text().splitlines()]


def test_lines_of_a_grid(ran):
    _, lines = ran
    arms = {(line["task"], line["arm"]) for line in lines}
    names = {"teacher", "smt", "smt_dmt", "bptt", "published_smt", "published"}
    assert arms == {(task, arm) for task in ("retrieval", "pixels") for arm in names}
    promised = {"task", "difficulty", "arm", "seed", "n", "chance", "wall_clock_s", "sequential_steps", "tokens"}
    for line in lines:
        assert promised | {"commit", "hardware", "phases", "optimizer_steps"} <= set(line)
        assert ("is_last" in line) == ("curve" in line) == ("versions" in line) == ("settings_digest" in line)
        assert 0 <= line["accuracy"] <= 1 and line["n"] >= 64
        assert ("bits_per_pixel" in line) == (line["task"] == "pixels")
        if line.get("is_last"):
            assert line["geometry"]["student"]["rank"] >= 1 and line["gradient_norm"]
        if line["task"] == "retrieval" and line.get("is_last"):
            assert set(line["length_generalization"]) == {"1", "2", "4"}
    by_arm = {(line["task"], line["arm"]): line for line in lines}
    smt, both = by_arm["retrieval", "smt"], by_arm["retrieval", "smt_dmt"]
    assert both["wall_clock_s"] > smt["wall_clock_s"] and both["optimizer_steps"] == 7 and smt["optimizer_steps"] == 4
    assert both["is_last"] and "is_last" not in smt
    # 4 steps of 16 rows; the curriculum has moved on from rows of 4 transitions to rows of 8 on the way.
    assert 4 * 16 * 4 < smt["tokens"] < 4 * 16 * 8
    assert by_arm["retrieval", "bptt"]["phases"][0]["transition_steps"] == 8
    smt, dmt = both["phases"]
    naming = ("phase", "transition_steps", "context_length")
    assert dmt == {"phase": "dmt", "transition_steps": 1, "context_length": 8, "max_steps": 3}
    assert by_arm["retrieval", "smt"]["phases"] == [{name: smt[name] for name in naming}]
    assert by_arm["retrieval", "published_smt"]["tokens"] == 4 * 16  # one transition per row


def test_a_grid_resumes_and_runs_what_is_named(ran, tmp_path):
    _, lines = ran
    cut = [line for line in lines if line["arm"] != "bptt"]
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(GRID))
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in cut))
    words = ["--config", "grid.yaml", "--only", "task=retrieval", "arm=bptt", "difficulty=8", "seed=0"]
    words += ["--output", "lines.jsonl"]
    recipe("experiment.py", *words, cwd=tmp_path)
    again = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert again[: len(cut)] == cut and len(again) == len(cut) + 1
    new, old = again[-1], next(line for line in lines if line["arm"] == "bptt" and line["task"] == "retrieval")
    assert new["accuracy"] == old["accuracy"] and new["loss"] == pytest.approx(old["loss"], rel=1e-5)
    recipe("experiment.py", *words, cwd=tmp_path)  # nothing is left to do
    assert len((tmp_path / "lines.jsonl").read_text().splitlines()) == len(again)


def test_a_grid_does_not_mix_settings(ran, tmp_path):
    """Lines of the same name from other settings are no reason to skip a run, and not to be mixed with new ones."""
    folder, _ = ran
    changed = json.loads(json.dumps(GRID))
    changed["arms"]["bptt"]["phases"][0]["bptt"]["learning_rate"] = 1e-3
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(changed))
    lines = (folder / "runs" / "grid.jsonl").read_text()
    (tmp_path / "lines.jsonl").write_text(lines)
    words = [
        sys.executable,
        str(ROOT / "recipes" / "experiment.py"),
        "--config",
        "grid.yaml",
        "--output",
        "lines.jsonl",
    ]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "other settings" in done.stderr
    assert (tmp_path / "lines.jsonl").read_text() == lines


def test_report_of_a_grid(ran):
    folder, _ = ran
    done = recipe("experiment.py", "--config", "grid.yaml", "--report", cwd=folder)
    written = [folder / name for name in done.stdout.split()]
    assert folder / "runs" / "grid.md" in written and all(path.stat().st_size for path in written)
    assert {"grid_difficulty.png", "grid_gradient.png", "grid_samples.png"} <= {path.name for path in written}
    assert "retrieval" in (folder / "runs" / "grid.md").read_text()


def test_the_retrieval_recipe(tmp_path):
    """A few steps of it: both phases, the rival, a student that loads and answers as it was scored."""
    words = "--difficulty 8 --curriculum 4 --smt_max_steps 3 --dmt_max_steps 2 --num_heldout 40 --output_dir out"
    done = recipe(
        "pretrain.py",
        "--config",
        ROOT / "recipes" / "retrieval_cpu.yaml",
        *words.split(),
        "--num_threads",
        1,
        cwd=tmp_path,
    )
    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert results["task"] == {"name": "retrieval", "difficulty": 8, "chance": 0.125}
    student = results["arms"][results["student_arm"]]
    assert {"teacher", "bptt", results["student_arm"]} <= set(results["arms"])
    assert results["arms"]["bptt"]["wall_clock_s"] == pytest.approx(student["wall_clock_s"], rel=0.6)
    assert f"{student['accuracy']:.1%}" in done.stdout and "chance" in done.stdout
    from smt_hf.experiments.subjects import TaskSubject

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "student").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "student")
    ids, labels = TaskSubject("retrieval", 8, num_heldout=40).heldout
    assert tokenizer(" ".join(map(str, ids[0])))["input_ids"] == ids[0].tolist()
    with torch.inference_mode():
        answers = model(torch.from_numpy(ids[:, :-1])).logits[:, -1].argmax(-1).numpy()
    assert np.mean(answers == labels[:, -1]) == pytest.approx(student["accuracy"])


def test_students_of_documents_are_kept_and_examined(tmp_path):
    """Training on documents, the students' folders, and their scores on other samples than they were trained on."""
    pytest.importorskip("wonderwords")
    pytest.importorskip("nltk")
    (tmp_path / "book.txt").write_text("A sentence of some words is here. " * 400)
    task = {"documents": ["niah_single_1", "qa1"], "difficulties": [512], "curriculum": [256]}
    bptt = {
        "bptt": {"max_steps": 2, "transition_steps": 64, "per_device_train_batch_size": 2, "curriculum_threshold": 9.0}
    }
    grid = {**GRID, "tasks": {"mixture": task}, "arms": {"bptt": {"phases": [bptt]}}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    words = ["--config", "grid.yaml", "--haystack", "book.txt", "--students", "students"]
    recipe("experiment.py", *words, cwd=tmp_path)
    (line,) = [json.loads(line) for line in (tmp_path / "runs" / "grid.jsonl").read_text().splitlines()]
    assert (line["task"], line["difficulty"], line["arm"]) == ("mixture", 512, "bptt_truncated")
    assert 0 < line["chance"] < 1 and set(line["length_generalization"]) == {"1", "2", "4"}
    folder = tmp_path / "students" / "mixture_512_bptt_0"
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() == line["num_parameters"]
    words = [
        "--suite",
        "ruler",
        "--tasks",
        "niah_single_1",
        "--lengths",
        "700",
        "--num_samples",
        "2",
        "--num_threads",
        "1",
    ]
    recipe("evaluate.py", "--checkpoint", folder, *words, "--output", "long.jsonl", cwd=tmp_path)
    (score,) = [json.loads(line) for line in (tmp_path / "long.jsonl").read_text().splitlines()]
    assert score["n"] == 2 and score["length_unit"] == "bytes"
    words = [sys.executable, ROOT / "recipes" / "experiment.py", "--config", "grid.yaml", "--haystack", "book.txt"]
    words += ["--students", "students", "--output"]
    again = subprocess.run([*words, "runs/other.jsonl"], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 2 and "mixture_512_bptt_0 is there" in again.stderr  # it would be replaced
    shutil.rmtree(folder)
    again = subprocess.run([*words, "runs/grid.jsonl"], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0 and "no students" in again.stdout + again.stderr  # nothing is left to train
    assert len((tmp_path / "runs" / "grid.jsonl").read_text().splitlines()) == 1


def test_a_run_on_documents_has_a_card_that_says_so(tmp_path):
    pytest.importorskip("wonderwords")
    words = ["--task", "documents", "--documents", "niah_single_1", "--difficulty", "384", "--phases", "bptt"]
    words += ["--max_steps", "2", "--per_device_train_batch_size", "2", "--hidden_size", "16", "--num_heldout", "20"]
    recipe("pretrain.py", *words, "--output_dir", "run", cwd=tmp_path)
    card = (tmp_path / "run" / "student" / "README.md").read_text()
    assert "It answers questions about a document" in card and "Its tokens are numbers" not in card
    results = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert "What reads the answer alone" in card and len(results["samples"]) == 4
    assert f"document = {json.dumps(results['samples'][0]['prompt'])}\n" in card
    assert results["data"]["documents"] == ["niah_single_1"] and 0.2 < results["task"]["chance"] < 0.5

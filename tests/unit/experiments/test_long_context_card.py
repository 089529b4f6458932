"""Long-context scores in the card of a student."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from smt_hf.data import byte_tokenizer
from smt_hf.errors import InputError
from smt_hf.evaluation.long_context.loading import load_language_model
from smt_hf.experiments.long_context import parse_evaluate
from smt_hf.experiments.long_context_card import add_to_card
from smt_hf.publishing.export import export_student, write_card
from smt_hf.publishing.hub import check_folder, problems_of_card
from tests.conftest import make_student
from tests.unit.publishing.test_hub import results_for

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    student = make_student(vocab_size=len(byte_tokenizer()))
    export_student(student, byte_tokenizer(), tmp_path / "student")
    write_card(tmp_path / "student", student, results_for(student))
    return tmp_path / "student"


def make_line(folder, length=1024, value=0.25, **fields):
    line = {"suite": "ruler", "task": "niah_single_1", "length": length, "length_unit": "bytes"}
    line |= {"metric": "string_match_all", "value": value, "interval": [0.2, 0.3], "n": 400, "chance": 0.0, "seed": 0}
    line |= {
        "weights": load_language_model(str(folder), device="cpu").weights_digest(),
        "by_depth": [{"depth": 0.5, "n": 400, "value": value}],
    }
    return line | {"controls": {"last_window": {"value": 0.125}}, **fields}


def test_scores_get_into_the_card(folder):
    before = ModelCard.load(folder / "README.md")
    lines = [make_line(folder, 16384, 0.5), make_line(folder), make_line(folder, task="vt", weights="another's")]
    assert add_to_card(folder, lines) == folder / "README.md"
    kept = json.loads((folder / "eval_results.json").read_text())["long_contexts"]
    assert [(entry["length"], entry["value"], entry["controls"]) for entry in kept] == [
        (1024, 0.25, {"last_window": 0.125}),
        (16384, 0.5, {"last_window": 0.125}),
    ]
    assert all("by_depth" not in entry for entry in kept)
    card = ModelCard.load(folder / "README.md")
    row = (
        "| ruler | niah_single_1 | 16,384 bytes | 400 | string_match_all | 0.500 [0.200, 0.300] | 0.000 |  | 0.125 |  |"
    )
    assert row in card.text.splitlines() and "vt" not in card.text
    assert "### Long contexts" not in before.text
    new = [entry for entry in card.data.eval_results if entry not in before.data.eval_results]
    assert [(entry.dataset_name, entry.metric_value) for entry in new] == [
        ("ruler niah_single_1, 1,024 bytes", 0.25),
        ("ruler niah_single_1, 16,384 bytes", 0.5),
    ]
    assert check_folder(folder)


def test_a_score_is_replaced_and_the_licence_stays(folder):
    card = ModelCard.load(folder / "README.md")
    card.data.license = "apache-2.0"
    card.save(folder / "README.md")
    add_to_card(folder, [make_line(folder), make_line(folder, 2048)])
    add_to_card(folder, [make_line(folder, value=0.75)])
    kept = json.loads((folder / "eval_results.json").read_text())["long_contexts"]
    assert [(entry["length"], entry["value"]) for entry in kept] == [(1024, 0.75), (2048, 0.25)]
    assert ModelCard.load(folder / "README.md").data.license == "apache-2.0"


def test_a_card_with_another_score_is_not_published(folder):
    add_to_card(folder, [make_line(folder)])
    path = folder / "eval_results.json"
    path.write_text(path.read_text().replace('"value": 0.25', '"value": 0.125'))
    assert problems_of_card(folder) == [
        "README.md says string_match_all 0.25 and eval_results.json 0.125: export again."
    ]


def test_bits_per_byte_are_no_answers(folder):
    add_to_card(folder, [make_line(folder), make_line(folder, 4096, suite="text", metric="bits_per_byte")])
    assert "4,096" not in (folder / "README.md").read_text()


def test_the_command(folder, tmp_path):
    output = tmp_path / "runs" / "long.jsonl"
    output.parent.mkdir()
    line = make_line(folder, name="student", checkpoint=str(folder), reading="chunks", model_type="smt_recurrent")
    output.write_text(json.dumps({**line, "num_parameters": 5, "controls": {}}) + "\n")
    command = [sys.executable, "recipes/evaluate.py", "--report", "--output", str(output), "--card", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert said.splitlines()[-1] == str(folder / "README.md")
    assert "### Long contexts" in (folder / "README.md").read_text()
    with pytest.raises(InputError, match="`card` goes with `--report`"):
        parse_evaluate(["--checkpoint", "x", "--suite", "ruler", "--output", "y", "--card", "z"])


def test_what_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match=r"niah_single_1 at 1,024 bytes: several lines are of the weights"):
        add_to_card(folder, [make_line(folder), make_line(folder, seed=1)])
    with pytest.raises(InputError, match="no line is of the weights"):
        add_to_card(folder, [make_line(folder, weights="another's")])
    assert "long_contexts" not in (folder / "eval_results.json").read_text()
    with pytest.raises(InputError, match=r"has no eval_results\.json"):
        add_to_card(tmp_path, [])

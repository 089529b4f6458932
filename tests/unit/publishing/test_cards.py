"""Committed cards and tables against the JSON that they are made from."""

import ast
import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results

from smt_hf import SMTRecurrentConfig, SMTRecurrentForCausalLM
from smt_hf.publishing.hub import problems_of_card
from smt_hf.publishing.model_card import student_card

ROOT = Path(__file__).parents[3]
CARDS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/eval_results.json"))


def test_there_is_a_card():
    assert CARDS


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_card_is_rendered_from_its_results(folder):
    results = json.loads((folder / "eval_results.json").read_text())
    known = {
        name: value
        for name, value in results["config"]["student"].items()
        if name in SMTRecurrentConfig.__annotations__ and name != "model_type"
    }
    student = SMTRecurrentForCausalLM(SMTRecurrentConfig(**known))
    card = ModelCard.load(folder / "README.md")
    assert card.content == student_card(student, results).content
    assert problems_of_card(folder) == []
    index = metadata_load(folder / "README.md")["model-index"]
    assert model_index_to_eval_results(index)[1] == card.data.eval_results
    own = results["arms"][results["student_arm"]]
    long = {
        f"{entry['task']}-{entry['length']}-{entry['length_unit']}": entry for entry in results.get("long_contexts", [])
    }
    for metric in card.data.eval_results:
        entry = long.pop(metric.dataset_config)["value"] if metric.dataset_config else own[metric.metric_type]
        assert metric.metric_value == round(entry, 4)
    assert not long


def test_card_of_documents():
    """Its example is a document that the student was asked about, and runs; seconds stand where no steps were given."""
    folder = ROOT / "model_cards" / "stories_cpu"
    results = json.loads((folder / "eval_results.json").read_text())
    card = (folder / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1]
    texts = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    (first, *_) = results["samples"]
    assert first["prompt"] in texts and "\n" in first["prompt"]
    assert f"{first['prompt']}\n--------\n{first['continuation']} ({first['answer'].strip()})\n```" in card
    assert "| phases | smt (300 s), smt (240 s), dmt (60 s) |" in card


def test_evidence_lines():
    for path in (ROOT / "model_cards" / "evidence").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            assert {"commit", "hardware"} <= set(entry), path.name
            if "suite" in entry:  # of recipes/evaluate.py
                promised = {
                    "name",
                    "task",
                    "length",
                    "length_unit",
                    "metric",
                    "value",
                    "interval",
                    "n",
                    "chance",
                    "seed",
                }
                assert promised <= set(entry), path.name
            elif "benchmark" not in entry:
                promised = {"task", "difficulty", "arm", "seed", "n"}
                assert promised <= set(entry), path.name
                assert {"accuracy", "bits_per_byte", "bits_per_pixel"} & set(entry), path.name

"""Committed cards and tables against the JSON that they are made from."""

import json
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
    for metric in card.data.eval_results:
        assert metric.metric_value == round(results["arms"][results["student_arm"]][metric.metric_type], 4)


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

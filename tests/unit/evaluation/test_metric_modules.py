"""The metrics as `evaluate` loads them, against their definitions."""

import doctest
import math

import evaluate
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from smt_hf.evaluation import METRICS, metric_path


@pytest.mark.parametrize("name", METRICS)
def test_documented_examples(name):
    metric = evaluate.load(metric_path(name))
    assert metric.description and "Args:" in metric.inputs_description and metric.features
    examples = doctest.DocTestParser().get_doctest(
        metric.inputs_description, {"evaluate": evaluate, "metric_path": metric_path}, name, None, 0
    )
    assert examples.examples
    assert doctest.DocTestRunner(verbose=False).run(examples).failed == 0


def test_bits_per_byte():
    texts = ["héllo", "", "a much longer text"]
    nats = [3.0, 0.0, 20.0]
    scores = evaluate.load(metric_path("bits_per_byte")).compute(predictions=nats, references=texts)
    assert scores == {"bits_per_byte": pytest.approx(23 / math.log(2) / 24, abs=1e-6), "num_bytes": 24}


@pytest.mark.parametrize("shift", [True, False])
def test_perplexity_from_logits(shift):
    logits = torch.randn(2, 6, 11)
    labels = torch.randint(0, 11, (2, 6))
    labels[0, 3] = -100
    one, other = (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)
    loss = F.cross_entropy(one.flatten(0, 1), other.flatten())
    metric = evaluate.load(metric_path("perplexity_from_logits"))
    scores = metric.compute(predictions=logits.tolist(), references=labels.tolist(), shift=shift)
    assert scores["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert scores["num_labels"] == (10 if shift else 12) - 1


def test_retrieval_accuracy_by_distance():
    answers = ["1", "2", "3", " 4\n", "5"]
    scores = evaluate.load(metric_path("retrieval_accuracy")).compute(
        predictions=answers, references=["1", "0", "3", "4", "0"], distances=[1, 2, 3, 4, 5]
    )
    assert scores["accuracy"] == 0.6 and scores["n"] == 5
    assert scores["by_distance"] == {"1": 1.0, "2": 0.0, "4": 1.0, "8": 0.0}


@pytest.mark.parametrize(
    "name, inputs, word",
    [
        ("bits_per_byte", {"predictions": [1.0], "references": [""]}, "no bytes"),
        ("bits_per_byte", {"predictions": [float("inf")], "references": ["a"]}, "not finite"),
        ("perplexity_from_logits", {"predictions": [[[0.0, 1.0]]], "references": [[0]]}, "no label"),
        ("perplexity_from_logits", {"predictions": [[[0.0, 1.0]] * 2], "references": [[0, 2]]}, "0 .. 1"),
        ("perplexity_from_logits", {"predictions": [[[0.0, 1.0]] * 2], "references": [[0]]}, "as many"),
        ("retrieval_accuracy", {"predictions": ["a"], "references": ["a"], "distances": [0]}, "distances"),
    ],
)
def test_refusals(name, inputs, word):
    with pytest.raises(ValueError, match=word):
        evaluate.load(metric_path(name)).compute(**inputs)


def test_unknown_metric():
    with pytest.raises(ValueError, match="bits_per_byte"):
        metric_path("bits_per_bite")


def test_perplexity_is_that_of_a_models_loss(tokens, student):
    outputs = student(tokens, labels=tokens)
    scores = evaluate.load(metric_path("perplexity_from_logits")).compute(
        predictions=outputs.logits.detach().numpy(), references=np.asarray(tokens)
    )
    assert scores["loss"] == pytest.approx(outputs.loss.item(), abs=1e-5)

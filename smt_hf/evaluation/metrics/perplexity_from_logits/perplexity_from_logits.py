"""Perplexity from logits as an `evaluate` module, for what a Trainer's evaluation returns."""

import datasets
import evaluate
import numpy as np
import torch
from torch.nn.functional import cross_entropy

_DESCRIPTION = """Exponential of the mean negative log-likelihood of labelled tokens, from the logits of a causal
language model. It compares models with one tokenizer only; across tokenizers, take bits_per_byte."""

_INPUTS = """
Args:
    predictions: list of logits, (tokens, vocabulary) per text.
    references: list of labels, (tokens) per text; -100 is ignored.
    shift: whether the logits at a token predict the next one, as those of transformers do. Default: true.

Returns:
    perplexity: float, lower is better.
    loss: float, nats per label.
    num_labels: int.

Examples:
    >>> metric = evaluate.load(metric_path("perplexity_from_logits"))
    >>> metric.compute(predictions=[[[0.0, 0.0], [0.0, 0.0]]], references=[[0, 1]])
    {'perplexity': 2.0, 'loss': 0.693147, 'num_labels': 1}
"""


class PerplexityFromLogits(evaluate.Metric):
    """Mean over all labels of all texts."""

    def _info(self):
        columns = {
            "predictions": datasets.Sequence(datasets.Sequence(datasets.Value("float32"))),
            "references": datasets.Sequence(datasets.Value("int64")),
        }
        return evaluate.MetricInfo(_DESCRIPTION, "", datasets.Features(columns), _INPUTS)

    def _compute(self, predictions, references, shift=True):
        total, num_labels = 0.0, 0
        for logits, labels in zip(predictions, references):
            logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)
            if len(logits) != len(labels):
                raise ValueError(
                    f"a text has {len(logits)} rows of logits and {len(labels)} labels: give as many of each."
                )
            if shift:
                logits, labels = logits[:-1], labels[1:]
            logits, labels = logits[labels != -100], labels[labels != -100]
            if not len(labels):
                continue
            if labels.min() < 0 or labels.max() >= logits.shape[1]:
                raise ValueError(f"labels must lie in 0 .. {logits.shape[1] - 1}, or be -100.")
            total += float(cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels), reduction="sum"))
            num_labels += len(labels)
        if not num_labels:
            raise ValueError("there is no label to score: all are -100, or every text has one token.")
        loss = total / num_labels
        return {"perplexity": round(float(np.exp(loss)), 6), "loss": round(loss, 6), "num_labels": num_labels}

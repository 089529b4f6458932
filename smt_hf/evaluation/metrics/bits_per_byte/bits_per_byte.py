"""Bits per byte as an `evaluate` module: `evaluate.load(smt_hf.evaluation.metric_path("bits_per_byte"))`."""

import math

import datasets
import evaluate

_DESCRIPTION = """Negative log-likelihood of texts in bits, divided by their bytes in UTF-8. Unlike the
perplexity of tokens it does not depend on the tokenizer; a uniform distribution over bytes has 8."""

_INPUTS = """
Args:
    predictions: list of floats, the negative log-likelihood of each text in nats, summed over its tokens.
    references: list of strings, the texts.

Returns:
    bits_per_byte: float, lower is better.
    num_bytes: int, of all texts.

Examples:
    >>> metric = evaluate.load(metric_path("bits_per_byte"))
    >>> metric.compute(predictions=[2.0794415], references=["abc"])
    {'bits_per_byte': 1.0, 'num_bytes': 3}
"""


class BitsPerByte(evaluate.Metric):
    """Sum of bits over sum of bytes; long texts count for more."""

    def _info(self):
        columns = {"predictions": datasets.Value("float64"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(_DESCRIPTION, "", datasets.Features(columns), _INPUTS)

    def _compute(self, predictions, references):
        num_bytes = sum(len(text.encode()) for text in references)
        if not num_bytes:
            raise ValueError("the references are empty: there are no bytes to divide by.")
        if not all(map(math.isfinite, predictions)):
            raise ValueError(
                "a negative log-likelihood is not finite: the model has diverged, or a text has no tokens."
            )
        return {"bits_per_byte": round(sum(predictions) / math.log(2) / num_bytes, 6), "num_bytes": num_bytes}

"""Bits per byte as an `evaluate` module: `evaluate.load(smt_hf.evaluation.metric_path("bits_per_byte"))`."""

import math

import datasets
import evaluate

_DESCRIPTION = """Negative log-likelihood of texts in bits, divided by their bytes in UTF-8. It does not depend on the
tokenizer, unlike the perplexity of tokens: a model that knows nothing of bytes has 8."""

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
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        num_bytes = sum(len(text.encode()) for text in references)
        if not num_bytes:
            raise ValueError("the references are empty: there are no bytes to divide by.")
        if not all(map(math.isfinite, predictions)):
            raise ValueError(
                "a negative log-likelihood is not finite: the model has diverged, or a text has no tokens."
            )
        return {"bits_per_byte": round(sum(predictions) / math.log(2) / num_bytes, 6), "num_bytes": num_bytes}

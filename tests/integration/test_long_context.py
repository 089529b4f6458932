"""Long streams and far needles against whole-sequence twins."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from measurements.long_context import bits_by_position, far_needle_accuracy

from smt_hf.evaluation import score_student
from tests.conftest import VOCAB, make_student


def test_bits_by_position_equal_a_whole_forward():
    student = make_student()
    streams = np.random.default_rng(0).integers(0, VOCAB, (3, 301))  # more than two windows of the walk
    tokens = torch.from_numpy(streams)
    with torch.no_grad():
        logits = student(tokens[:, :-1]).logits
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(3, 300)
    results = bits_by_position(student, streams, [0, 1, 130, 300])
    assert [result["position"] for result in results] == [1, 130, 300]
    for result, (begin, end) in zip(results, [(0, 1), (1, 130), (130, 300)]):
        assert result["bits"] == pytest.approx(losses[:, begin:end].mean().item() / math.log(2), rel=1e-4)


@pytest.mark.parametrize("edges", [[5], [0, 4, 4], [8, 3], [-1, 3], [0, 11]])
def test_edges_that_make_no_bins_are_refused(edges):
    with pytest.raises(ValueError, match="edges"):
        bits_by_position(make_student(), np.zeros((1, 11), dtype=np.int64), edges)


def test_far_needle():
    student = make_student()

    def make_rows(distance):
        """The needle first, filler, and the answer asked for at the end: right in all rows at distance 3, in none
        at 9."""
        input_ids = np.random.default_rng(distance).integers(0, VOCAB, (6, distance + 2))
        labels = np.full_like(input_ids, -100)
        with torch.no_grad():
            answers = student(torch.from_numpy(input_ids[:, :-1])).logits[:, -1].argmax(-1).numpy()
        labels[:, -1] = answers if distance == 3 else (answers + 1) % VOCAB
        return input_ids, labels

    near, far = far_needle_accuracy(student, make_rows, [3, 9], chance=1 / VOCAB)
    assert (near["distance"], near["accuracy"], near["n"], near["chance"]) == (3, 1.0, 6, 1 / VOCAB)
    assert (far["distance"], far["accuracy"], far["n"]) == (9, 0.0, 6)
    assert far["loss"] == score_student(student, *make_rows(9)).loss
    assert far_needle_accuracy(student, make_rows, [3], batch_size=4)[0]["loss"] == pytest.approx(near["loss"])

"""N-gram models against a naive twin."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from smt_hf.evaluation import NGramModel
from smt_hf.evaluation.text import NUM_SYMBOLS, document_symbols


def naive_probability(text, context, symbol):
    """Witten-Bell by its recursion, counts taken afresh."""
    if context is None:
        return 1 / NUM_SYMBOLS
    followers = Counter(
        text[at + len(context)]
        for at in range(len(text) - len(context))
        if tuple(text[at : at + len(context)]) == context
    )
    shorter = naive_probability(text, context[1:] if context else None, symbol)
    if not followers:
        return shorter
    return (followers[symbol] + len(followers) * shorter) / (sum(followers.values()) + len(followers))


@pytest.mark.parametrize("context", [0, 1, 2, 3])
def test_ngram_equals_naive_twin(context):
    generator = np.random.default_rng(0)
    text = generator.integers(0, 4, 300)
    heldout = [generator.integers(0, 5, 40), generator.integers(0, 4, 2)]
    bits = []
    for sequence in heldout:
        for at in range(1, len(sequence)):
            before = tuple(sequence[max(at - context, 0) : at])
            bits.append(-math.log2(naive_probability(text.tolist(), before, sequence[at])))
    assert NGramModel(text).bits_per_byte(heldout, context) == pytest.approx(np.mean(bits), rel=1e-9)


def test_ngram_probabilities_sum_to_one():
    text = document_symbols(["abracadabra", "banana"])
    model = NGramModel(text)
    total = defaultdict(float)
    for symbol in range(NUM_SYMBOLS):
        sequence = np.array([97, 98, 114, symbol])
        total["all"] += 2 ** -(3 * model.bits_per_byte([sequence], 3) - 2 * model.bits_per_byte([sequence[:3]], 3))
    assert total["all"] == pytest.approx(1.0)

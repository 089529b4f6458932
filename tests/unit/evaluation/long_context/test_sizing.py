"""The largest prompt that fits."""

from itertools import accumulate

import pytest

from smt_hf.errors import InputError
from smt_hf.evaluation.long_context import Sample, TooShort
from smt_hf.evaluation.long_context.sizing import largest_sample


def builder(length, per_unit=3, fixed=10):
    return lambda units: Sample("t", length, 0, "x" * (fixed + per_unit * units), ("a",))


@pytest.mark.parametrize("length", range(26, 60))
def test_one_unit_more_does_not_fit(length):
    prompt = largest_sample(builder(length), len, num_generated=5, least=2).prompt
    assert len(prompt) + 5 <= length < len(prompt) + 5 + 3


def test_a_length_that_is_too_short_names_the_smallest():
    with pytest.raises(TooShort, match="length of 20: the smallest that holds its sample 0 is 21 "):
        largest_sample(builder(20), len, num_generated=5, least=2)
    assert len(largest_sample(builder(21), len, num_generated=5, least=2).prompt) == 16


def test_a_haystack_that_ends():
    with pytest.raises(InputError, match="for a length of 30 at most, and 31 is"):
        largest_sample(builder(31), len, num_generated=5, least=0, most=5)
    assert len(largest_sample(builder(30), len, num_generated=5, least=0, most=5).prompt) == 25
    assert len(largest_sample(builder(99), len, 5, least=0, most=5, may_be_short=True).prompt) == 25


def test_a_tokenizer_that_counts_nothing():
    with pytest.raises(InputError, match="at most"):
        largest_sample(builder(30), lambda text: 0, num_generated=5, least=0)


def test_no_text_is_counted_that_is_much_longer_than_the_length():
    sizes = []
    largest_sample(builder(10_000), lambda text: sizes.append(len(text)) or len(text), num_generated=5, least=1)
    assert max(sizes) < 2.1 * 10_000 and len(sizes) < 40


@pytest.mark.parametrize(
    "sizes", [[7, 1, 1, 9, 2, 30, 1], [1] * 40 + [200] * 4, [90, *[1] * 60], [3, 0, 0, 0, 5, 0, 8]]
)
def test_units_of_uneven_size(sizes):
    """The number of units is the one that a search from the front finds, whatever the units are like."""
    totals = list(accumulate(sizes * 3, initial=0))
    for length in range(5, totals[-1] + 5):
        build = lambda units: Sample("t", length, 0, "x" * totals[units], ("a",))  # noqa: B023, E731
        found = largest_sample(build, len, 5, least=0, most=len(totals) - 1, may_be_short=True)
        assert len(found.prompt) == max(total for total in totals if total <= length - 5)


def test_few_long_texts_are_counted():
    """As many as the doublings, and a handful more: halving would count thirteen texts of about the length."""
    words = [3 + number * 7919 % 8 for number in range(8000)]
    totals = list(accumulate(words, initial=0))
    sizes = []
    build = lambda units: Sample("t", 16_384, 0, "x" * totals[units], ("a",))  # noqa: E731
    largest_sample(build, lambda text: sizes.append(len(text)) or len(text), num_generated=5, least=1)
    assert sum(size > 12_000 for size in sizes) <= 7

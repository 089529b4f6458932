"""The largest prompt that fits: how many whole units of haystack a sample may hold."""

import functools
from collections.abc import Callable

from smt_hf.errors import InputError

from .sample import Count, Sample


class TooShort(InputError):
    """A length that cannot hold a sample; `smallest` is the least that can."""

    def __init__(self, sample: Sample, smallest: int):
        self.smallest = smallest
        super().__init__(
            f"`{sample.task}` does not fit in a length of {sample.length}: the smallest that holds its sample "
            f"{sample.index} is {smallest} (prompt and tokens to generate)."
        )


def largest_sample(
    build: Callable[[int], Sample],
    count: Count,
    num_generated: int,
    least: int,
    most: int | None = None,
    may_be_short: bool = False,
) -> Sample:
    """The sample with the most units of haystack whose prompt and tokens to generate fit in its length.

    One unit more does not fit. The number is found by doubling, so that no text is counted that is much longer than
    the length, and then between the last two by interpolation: counting a long text takes longer than all else, and
    most units have about as many tokens. Every third guess halves instead, for texts that do not.

    Args:
        build: units -> sample; a sample with more units is no shorter.
        count: tokens of a text.
        num_generated: tokens that are kept free for the answer.
        least: the fewest units that the task is defined for.
        most: units that there are; default: without end.
        may_be_short: a sample with all units may be shorter than its length.

    Raises:
        TooShort: with the smallest length that holds the sample.
        InputError: with the largest length that the haystack fills.
    """
    smallest = build(least)
    length, budget = smallest.length, smallest.length - num_generated
    if count(smallest.prompt) > budget:
        raise TooShort(smallest, count(smallest.prompt) + num_generated)
    size = functools.cache(lambda units: count(build(units).prompt))
    limit = least + budget + 1 if most is None else most  # a unit has at least one token
    low = high = least
    while high < limit and size(high) <= budget:
        low, high = high, min(2 * high + 1, limit)
    units = limit if size(high) <= budget else _last_that_fits(low, high, budget, size)
    if units == limit and size(units) < budget and not may_be_short:
        raise InputError(
            f"`{smallest.task}` has haystack for a length of {size(units) + num_generated} at most, and {length} is "
            "asked for: give more of it, or a smaller length."
        )
    return build(units)


def _last_that_fits(fits: int, too_many: int, budget: int, size: Callable[[int], int]) -> int:
    """The most units of no more tokens than the budget, between a number that fits and one that does not."""
    guesses = 0
    while too_many - fits > 1:
        guesses += 1
        share = (budget - size(fits)) / (size(too_many) - size(fits))
        middle = (fits + too_many) // 2 if guesses % 3 == 0 else fits + int(share * (too_many - fits))
        middle = min(max(middle, fits + 1), too_many - 1)
        if size(middle) <= budget:
            fits = middle
        else:
            too_many = middle
    return fits

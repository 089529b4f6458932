"""Means of scores over samples, with the interval that holds the true mean in 95 of 100 draws of samples."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

_Z = 1.959964  # standard errors on either side that hold 95 % of a normal distribution


def wilson(num_right: float, num_all: int) -> tuple[float, float]:
    """The score interval of a share (Wilson 1927), which also tells something at 0 and 1.

    Args:
        num_right: trials that went well, of `num_all`.
    """
    share, spread = num_right / num_all, _Z**2 / num_all
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def estimate(values: Sequence[float], is_share: bool = True) -> dict[str, Any]:
    """`value`, the mean; `interval`, two ends, or `None` for a single value that is no share; `n`.

    The interval is Wilson's where every value is 0 or 1, and `mean +- 1.96 standard errors` elsewhere, for shares cut
    at 0 and 1.

    Args:
        values: one per sample, at least one.
        is_share: whether they lie between 0 and 1.
    """
    mean = fmean(values)
    ends: tuple[float, float] | None = None
    if is_share and set(values) <= {0, 1}:
        ends = wilson(sum(values), len(values))
    elif len(values) > 1:
        half = _Z * stdev(values) / math.sqrt(len(values))
        ends = (max(mean - half, 0.0), min(mean + half, 1.0)) if is_share else (mean - half, mean + half)
    interval = None if ends is None else [round(end, 6) for end in ends]
    return {"value": round(mean, 6), "interval": interval, "n": len(values)}

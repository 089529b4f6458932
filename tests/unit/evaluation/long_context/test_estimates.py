"""Intervals against numbers worked out by hand."""

import math

import pytest

from smt_hf.evaluation.long_context.estimates import estimate, wilson


@pytest.mark.parametrize(
    "num_right, num_all, ends",
    [
        (5, 10, (0.23659, 0.76341)),
        (0, 10, (0.0, 0.27753)),
        (10, 10, (0.72247, 1.0)),
        (1, 1, (0.20655, 1.0)),
        (380, 400, (0.92404, 0.96740)),
    ],
)
def test_wilson(num_right, num_all, ends):
    assert wilson(num_right, num_all) == pytest.approx(ends, abs=1e-5)


def test_wilson_holds_the_shares_that_explain_the_count():
    """Its ends are the shares p whose distance from the observed one is 1.96 standard errors of p itself."""
    for end in wilson(30, 100):
        assert abs(0.3 - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / 100), rel=1e-6)


def test_estimates():
    assert estimate([0.0, 1.0]) == {"value": 0.5, "interval": [0.094531, 0.905469], "n": 2}
    # The standard deviation of 0, 0.5, 1, 0.5 is sqrt(1/6); 1.96 standard errors of four are 0.4001.
    assert estimate([0.0, 0.5, 1.0, 0.5]) == {"value": 0.5, "interval": [0.099924, 0.900076], "n": 4}
    assert estimate([0.9, 1.0, 0.4])["interval"][1] == 1.0
    nats = estimate([2.0, 4.0], is_share=False)
    assert nats["value"] == 3.0 and nats["interval"] == pytest.approx([3 - 1.959964, 3 + 1.959964], abs=1e-6)
    assert estimate([0.5])["interval"] is None and estimate([2.0], is_share=False)["interval"] is None
    assert estimate([1.0], is_share=False)["interval"] is None

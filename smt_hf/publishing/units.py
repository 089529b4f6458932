"""The units of the scores: how each is named and written, and which of two is better."""

from collections.abc import Container
from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """The unit of a score.

    Args:
        label: in a sentence or at an axis, "bits per byte".
        heading: at the head of a narrow column, "bits/byte".
        higher_is_better: false for losses.
    """

    label: str
    heading: str
    higher_is_better: bool = False

    @property
    def better(self) -> str:
        """The word for the better direction: "higher" or "lower"."""
        return "higher" if self.higher_is_better else "lower"

    def badness(self, value: float) -> float:
        """A key that sorts scores from best to worst."""
        return -value if self.higher_is_better else value

    def written(self, value: float) -> str:
        """A score for a table: shares as `87.5%`, losses with three decimals."""
        return f"{value:.1%}" if self.higher_is_better else f"{value:.3f}"


# A run is scored by the first of these metrics that its scores hold.
UNITS = {
    "bits_per_byte": Unit("bits per byte", "bits/byte"),
    "bits_per_pixel": Unit("bits per pixel", "bits/pixel"),
    "accuracy": Unit("accuracy", "accuracy", higher_is_better=True),
}


def metric_of(scores: Container[str]) -> str:
    """The metric that `scores`, a mapping with metrics among its keys, are compared in: the first of `UNITS`."""
    return next(metric for metric in UNITS if metric in scores)

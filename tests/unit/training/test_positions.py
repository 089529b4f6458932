"""Weights of hard transitions, against a loop."""

import math

import pytest
import torch

from smt_hf.training.losses import masked_mean
from smt_hf.training.positions import transition_weights


@pytest.mark.parametrize("fraction", [0.3, 1.0])
@pytest.mark.parametrize("is_masked", [False, True])
def test_transition_weights(is_masked, fraction):
    """A row at a time, by sorting its transitions; equal errors go to the first."""
    errors = torch.rand(5, 40)
    errors[1] = 0.0
    errors[2, 7:9] = 5.0
    mask = None
    if is_masked:
        mask = torch.arange(40) < torch.tensor([40, 33, 16, 1, 0])[:, None]
        mask[0, 3] = False
    weights = transition_weights(errors, mask, fraction)
    for row in range(5):
        places = [at for at in range(40) if mask is None or mask[row, at]]
        hard = sorted(places, key=lambda at: -errors[row, at].item())[: math.ceil(len(places) / 16)]
        for at in range(40):
            expected = (1 - fraction) / len(places) if at in places else 0.0
            expected += fraction / len(hard) if at in hard else 0.0
            assert weights[row, at].item() == pytest.approx(expected * len(places), rel=1e-4)
    wider = transition_weights(torch.rand(5, 60).index_copy(1, torch.arange(40), errors), None, fraction)
    assert wider.shape == (5, 60)
    if mask is not None:
        padded = torch.nn.functional.pad(mask, (0, 20))
        wider = transition_weights(torch.nn.functional.pad(errors, (0, 20), value=9.0), padded, fraction)
        torch.testing.assert_close(wider, torch.nn.functional.pad(weights, (0, 20)))
    values = torch.rand(5, 40)
    numbers = weights.sum(1).clamp(min=1)
    torch.testing.assert_close(masked_mean(values, weights), (values * weights).sum(1) / numbers)


def test_no_hard_transitions():
    mask = torch.rand(2, 5) > 0.5
    assert transition_weights(torch.rand(2, 5), mask, 0.0) is mask
    assert transition_weights(torch.rand(2, 5), None, 0.0) is None

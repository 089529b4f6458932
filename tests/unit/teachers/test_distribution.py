"""The next-token distribution of a teacher, cut down to its likeliest tokens."""

import pytest
import torch

from smt_hf.teachers import NextTokens


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_of_logits_token_by_token(temperature):
    """The k highest of the softmax, and the sum of all others; every token if k is not below their number."""
    logits = 3 * torch.randn(2, 5, 11)
    given = logits.clone()
    found = NextTokens.of_logits(logits, 4, temperature)
    assert torch.equal(logits, given) and found.probabilities.shape == (2, 5, 5) and found.tokens.shape == (2, 5, 4)
    for row in range(2):
        for place in range(5):
            wanted = sorted(
                ((value / temperature).exp().item(), token) for token, value in enumerate(given[row, place])
            )
            total = sum(value for value, _ in wanted)
            likeliest = dict(zip(found.tokens[row, place].tolist(), found.probabilities[row, place].tolist()))
            assert likeliest == pytest.approx({token: value / total for value, token in wanted[-4:]}, rel=1e-4)
            others = sum(value for value, _ in wanted[:-4]) / total
            assert found.probabilities[row, place, -1].item() == pytest.approx(others, rel=1e-4)
    whole = NextTokens.of_logits(logits, 11, temperature)
    assert whole.tokens is None
    torch.testing.assert_close(whole.probabilities, (logits / temperature).softmax(-1))


def test_a_sure_teacher_leaves_the_mass_of_the_others_exact():
    logits = torch.zeros(1, 100)
    logits[0, 3] = 40.0
    found = NextTokens.of_logits(logits, 2)
    torch.testing.assert_close(found.probabilities[0, -1], 98 * torch.tensor(-40.0).exp())


def test_half_precision_logits_are_added_up_in_full():
    logits = torch.randn(1, 4000).bfloat16()
    found = NextTokens.of_logits(logits, 2)
    expected = logits.double().softmax(-1).sort(-1, descending=True).values
    torch.testing.assert_close(found.probabilities[0, :2], expected[0, :2].float())
    torch.testing.assert_close(found.probabilities.sum(-1), torch.ones(1))


def test_places_and_what_is_not_known():
    found = NextTokens.of_logits(torch.randn(2, 3, 7), 2)
    is_known = torch.tensor([[True, False, True], [False, True, True]])
    some = found.only(is_known)
    assert torch.equal(some.is_known, is_known) and found.is_known.all()
    assert torch.equal(some[is_known].probabilities, found.probabilities[is_known])
    assert torch.equal(NextTokens.cat([found[:1], found[1:]]).tokens, found.tokens)
    assert NextTokens.cat([NextTokens.of_logits(torch.randn(2, 3), 3)] * 2).probabilities.shape == (4, 3)

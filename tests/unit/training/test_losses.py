"""The losses on tensors small enough to work out by hand."""

import math

import pytest
import torch

from smt_hf.training.losses import (
    distillation_errors,
    divergence,
    dynamics_loss,
    masked_mean,
    next_token_loss,
    normalized_errors,
    predictive_loss,
    uniformity_loss,
    warmed_up,
)


def test_next_token_loss():
    logits = torch.zeros(3, 2, 4)
    logits[0, 0, 1] = math.log(5)  # 5 : 1 : 1 : 1
    targets = torch.tensor([[1, 0], [2, -100], [-100, -100]])
    expected = [(-math.log(5 / 8) + math.log(4)) / 2, math.log(4), 0.0]
    torch.testing.assert_close(next_token_loss(logits, targets), torch.tensor(expected))


def test_dynamics_loss():
    memories = torch.tensor([[[[1.0, 2.0]], [[0.0, 0.0]]]])
    labels = torch.tensor([[[[0.0, 0.0]], [[1.0, 3.0]]]])
    torch.testing.assert_close(dynamics_loss(memories, labels), torch.tensor([(2.5 + 5.0) / 2]))
    torch.testing.assert_close(dynamics_loss(memories, labels, torch.tensor([[0, 1]])), torch.tensor([5.0]))
    torch.testing.assert_close(dynamics_loss(memories, labels, torch.tensor([[0, 0]])), torch.tensor([0.0]))


def test_masked_mean():
    errors = torch.tensor([[1.0, 2.0, 6.0], [4.0, 5.0, 9.0]])
    torch.testing.assert_close(masked_mean(errors), torch.tensor([3.0, 6.0]))
    mask = torch.tensor([[True, False, True], [False, False, False]])
    torch.testing.assert_close(masked_mean(errors, mask), torch.tensor([3.5, 0.0]))
    assert masked_mean(errors[:, :0]).tolist() == masked_mean(errors[:, :0], mask[:, :0]).tolist() == [0.0, 0.0]
    memories = torch.zeros(2, 0, 3, 4)  # no label at all, as in rows shorter than the distance of two labels
    assert dynamics_loss(memories, memories).tolist() == [0.0, 0.0]


def test_normalized_errors():
    """A position, a token and a coordinate at a time; bounded; no gradient for the labels."""
    memories, labels = (torch.randn(2, 4, 3, 5).requires_grad_() for _ in range(2))
    variance = torch.rand(3, 5) * 0.5
    variance[0, 0] = 0.0
    errors = normalized_errors(memories, labels, variance, largest=30.0)
    expected = torch.zeros(2, 4)
    for row, position, token, at in torch.cartesian_prod(*map(torch.arange, memories.shape)).tolist():
        error = (memories[row, position, token, at] - labels[row, position, token, at]).item() ** 2
        expected[row, position] += error / (variance[token, at].item() + 1e-3) / 15
    assert 0 < (expected > 30).sum() < 8  # some are cut, some are not
    torch.testing.assert_close(errors, expected.clamp(max=30.0), rtol=1e-4, atol=1e-4)
    errors.sum().backward()
    assert labels.grad is None
    has_gradient = memories.grad.abs().sum((-2, -1)) > 0
    assert torch.equal(has_gradient, expected <= 30)
    far = normalized_errors(torch.full((1, 1, 3, 5), 1e3), torch.zeros(1, 1, 3, 5), torch.ones(3, 5))
    assert far.tolist() == [[20.0]]


def test_divergence():
    """Of the label's distribution from the student's, in nats; the label's side is a constant."""
    logits, label_logits = (torch.randn(2, 3, 5).requires_grad_() for _ in range(2))
    losses = divergence(logits, label_logits)
    for row, position in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        label, own = (one[row, position].detach().softmax(0).tolist() for one in (label_logits, logits))
        expected = sum(p * math.log(p / q) for p, q in zip(label, own))
        assert losses[row, position].item() == pytest.approx(expected, rel=1e-4)
    losses.sum().backward()
    assert label_logits.grad is None
    torch.testing.assert_close(logits.grad, (logits.softmax(-1) - label_logits.softmax(-1)).detach())
    assert divergence(logits, logits).abs().max() < 1e-6


def test_predictive_loss():
    logits = torch.zeros(1, 2, 2, 4)
    logits[0, 1, 1, 3] = math.log(3)
    future = torch.tensor([[[0, 1], [2, 3]]])
    expected = (3 * math.log(4) - math.log(3 / 6)) / 4
    torch.testing.assert_close(predictive_loss(logits, future), torch.tensor([expected]))


def test_uniformity_loss():
    memories = torch.tensor([[[[2.0, 0.0], [0.0, 5.0]]], [[[1.0, 0.0], [-3.0, 0.0]]], [[[1.0, 1.0], [2.0, 2.0]]]])
    # squared distances of the directions: 2, 4, 0
    torch.testing.assert_close(uniformity_loss(memories), torch.tensor([-4.0, -8.0, 0.0]), atol=1e-5, rtol=1e-5)
    mask = torch.tensor([[True, False]] * 3)
    doubled = torch.cat([memories, torch.randn(3, 1, 2, 2)], 1)
    torch.testing.assert_close(uniformity_loss(doubled, mask), uniformity_loss(memories))
    assert uniformity_loss(doubled[:, :, :1], mask).tolist() == [0.0, 0.0, 0.0]  # no pair
    one, three = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    mixed = torch.stack([one, one, three])[None, :, None]
    expected = math.log((1 + 2 * math.exp(-4)) / 3)
    torch.testing.assert_close(uniformity_loss(mixed), torch.tensor([expected]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("progress, expected", [(0.0, 0.0), (0.1, 1.0), (0.2, 2.0), (0.9, 2.0)])
def test_warmed_up(progress, expected):
    assert warmed_up(2.0, progress, 0.2) == pytest.approx(expected)
    assert warmed_up(2.0, progress, 0.0) == 2.0


@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_errors(is_whole, temperature):
    """Against distributions written out, and in pieces as at once; a row without a distribution is worth 0."""
    logits = (2 * torch.randn(5, 7)).requires_grad_()
    tokens = None if is_whole else torch.stack([torch.randperm(7)[:3] for _ in range(5)])
    probabilities = torch.rand(5, 7 if is_whole else 4).softmax(-1)
    probabilities[2] = 0.0
    own = (logits / temperature).softmax(-1)
    if tokens is not None:
        own = torch.cat([own.gather(1, tokens), 1 - own.gather(1, tokens).sum(1, keepdim=True)], dim=1)
    expected = temperature**2 * (probabilities * (probabilities.clamp(min=1e-30).log() - own.log())).sum(1)
    (gradient,) = torch.autograd.grad(expected.sum(), logits, retain_graph=True)
    for most in (10**6, 2 * 7, 1):  # at once, in pieces of two rows, row by row
        errors = distillation_errors(logits, probabilities, tokens, temperature, most)
        torch.testing.assert_close(errors, expected)
        torch.testing.assert_close(torch.autograd.grad(errors.sum(), logits)[0], gradient, rtol=1e-4, atol=1e-6)
    assert errors[2] == 0.0 and not gradient[2].any()


def test_pieces_of_distillation_keep_the_logits_alone():
    """For the backward pass: at once, copies of them too; in pieces, nothing else of their size."""
    logits = torch.randn(64, 100, requires_grad=True)
    probabilities, tokens = torch.full((64, 3), 1 / 3), torch.randint(2, (64, 2)) + torch.tensor([[0, 50]])
    kept = []
    for most in (10**6, 100):
        sizes = {}

        def keep(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            distillation_errors(logits, probabilities, tokens, 2.0, most)
        kept.append(sum(sizes.values()) / logits.numel())
    assert kept[0] > 1.9 and kept[1] < 1.1


def test_the_mass_of_unlikely_tokens_is_exact():
    """What a sure student leaves to the others is far below the rounding of 1."""
    logits = torch.zeros(1, 50)
    logits[0, 0] = 40.0
    error = distillation_errors(logits, torch.tensor([[0.5, 0.5]]), torch.tensor([[0]]), 1.0)
    expected = 0.5 * (math.log(0.5) - 0) + 0.5 * (math.log(0.5) - (math.log(49) - 40))
    assert error.item() == pytest.approx(expected, rel=1e-5)

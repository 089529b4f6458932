"""The losses, on plain tensors. Each returns one number per example, `(B,)`, in nats unless it says otherwise.

Shapes: B sequences, S positions, F future tokens, K memory tokens, D width, V vocabulary. Equations: arXiv:2606.06479.
How examples are added up is the composite's business (`SMTForPreTraining`).
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# Logits that are compared at once: 64 MB in float32.
MOST_COMPARED = 2**24


def next_token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy `(B, S, V)`, `(B, S)` -> `(B,)`: mean over the targets that are not -100; 0 if there are none."""
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
    return losses.view(targets.shape).sum(1) / (targets != -100).sum(1).clamp(min=1)


def dynamics_loss(memories: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Squared error of the student's memories against the teacher's [Eq. 3 and, on own states, Eq. 6].

    Args:
        memories, labels: `(B, S, K, D)`; both may carry gradients.
        mask: `(B, S)`, positions that count, or their weights; `None`: all.

    Returns:
        `(B,)`, mean over positions, memory tokens and width.
    """
    return masked_mean((memories - labels).square().mean((-2, -1)), mask)


def masked_mean(errors: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over the positions that count: `(B, S)`, mask or weights `(B, S)` -> `(B,)`; 0 where none does."""
    if mask is None:
        return errors.sum(1) / max(errors.shape[1], 1)
    return (errors * mask).sum(1) / mask.sum(1).clamp(min=1)


def normalized_errors(
    memories: torch.Tensor, labels: torch.Tensor, variance: torch.Tensor, largest: float = 20.0
) -> torch.Tensor:
    """Squared errors in units of the labels' variance; ours.

    A plain squared error lets the teacher hide what matters in directions of little variance, where the student loses
    it at no cost. The labels carry no gradient here: they would grow their variance instead.

    Args:
        memories, labels: `(B, S, K, D)`.
        variance: `(K, D)`, of the labels.
        largest: bound of a position's error, so that a few cannot drown the rest.

    Returns:
        `(B, S)`, mean over memory tokens and width, no unit.
    """
    errors = ((memories - labels.detach()).square() / (variance + 1e-3)).mean((-2, -1))
    return errors.clamp(max=largest)


def divergence(logits: torch.Tensor, label_logits: torch.Tensor) -> torch.Tensor:
    """`KL(softmax(label_logits) || softmax(logits))`, `(..., V)` twice -> `(...)`. The labels carry no gradient."""
    wanted = label_logits.detach().float().log_softmax(-1)
    return (wanted.exp() * (wanted - logits.float().log_softmax(-1))).sum(-1)


def distillation_errors(
    logits: torch.Tensor,
    probabilities: torch.Tensor,
    tokens: torch.Tensor | None,
    temperature: float,
    most: int = MOST_COMPARED,
) -> torch.Tensor:
    """`T^2 KL(teacher || student)` of next-token distributions at temperature T (Hinton et al. 2015).

    Many are compared in pieces, which are computed again in the backward pass: what is kept of the student is its
    logits alone.

    Args:
        logits: `(N, V)`, the student's.
        probabilities, tokens: `(N, k + 1)` and `(N, k)`, or `(N, V)` and `None`, the teacher's at T: see `NextTokens`.
        most: number of logits in a piece.

    Returns:
        `(N,)`; 0 where all probabilities are 0.
    """
    size = max(most // logits.shape[-1], 1)
    if len(logits) <= size:
        return _distillation_errors(logits, probabilities, tokens, temperature)
    others = [[None] * len(logits)] if tokens is None else [tokens.split(size)]
    pieces = zip(logits.split(size), probabilities.split(size), *others)
    parts = [checkpoint(_distillation_errors, *piece, temperature, use_reentrant=False) for piece in pieces]
    return torch.cat(parts)


def _distillation_errors(logits, probabilities, tokens, temperature: float) -> torch.Tensor:
    own = logits.float() / temperature
    if tokens is None:
        expected = own.log_softmax(-1)
    else:
        others = own.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
        expected = torch.cat([own.gather(-1, tokens), others], dim=-1) - own.logsumexp(-1, keepdim=True)
    return temperature**2 * (torch.xlogy(probabilities, probabilities) - probabilities * expected).sum(-1)


def predictive_loss(logits: torch.Tensor, future: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the next F tokens, decoded from one memory with the true tokens as inputs [Eq. 2].

    Args:
        logits: `(B, S, F, V)`.
        future: `(B, S, F)`, -100 where nothing is to be predicted.

    Returns:
        `(B,)`, mean over everything predicted.
    """
    return next_token_loss(logits.flatten(1, 2), future.flatten(1))


def label_moments(labels: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Number of the labels that count, their sum and the sum of their squares: see `SMTForPreTrainingOutput`."""
    flat = (labels.flatten(0, 1) if mask is None else labels[mask]).float()
    number = flat.new_full((1, labels.shape[-1]), len(flat))
    return torch.cat([number, flat.sum(0), flat.square().sum(0)])


def uniformity_loss(memories: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """`log E exp(-2 |u_a - u_b|^2)` over pairs of normalised memory tokens of one example [Eq. 4], no unit.

    Taken inside a sequence, so that it does not depend on what else is in the batch.

    Args:
        memories: `(B, S, K, D)`.
        mask: `(B, S)` bool, positions that count; `None`: all.

    Returns:
        `(B,)`; 0 where there is no pair.
    """
    directions = F.normalize(memories.flatten(1, 2), dim=-1)
    cosines = directions @ directions.transpose(1, 2)
    pairs = ~torch.eye(directions.shape[1], dtype=torch.bool, device=memories.device).expand_as(cosines)
    if mask is not None:
        counts = mask.repeat_interleave(memories.shape[2], dim=1)
        pairs = pairs & counts[:, :, None] & counts[:, None]
    # |u_a - u_b|^2 = 2 - 2 cos
    exponents = (-4 + 4 * cosines).masked_fill(~pairs, -torch.inf).flatten(1)
    num_pairs = pairs.flatten(1).sum(1)
    exponents = exponents.masked_fill((num_pairs == 0)[:, None], 0.0)
    losses = torch.logsumexp(exponents, dim=1) - num_pairs.clamp(min=1).to(exponents.dtype).log()
    return losses.masked_fill(num_pairs == 0, 0.0)


def warmed_up(weight: float, progress: float, warmup_ratio: float) -> float:
    """`weight`, reached linearly over the first `warmup_ratio` of a phase; `progress` is in [0, 1]."""
    return weight if warmup_ratio <= 0 else weight * min(1.0, progress / warmup_ratio)

"""What a teacher expects next: its distribution over tokens, with the likeliest ones apart and all others as one.

Shapes: k likeliest tokens, V vocabulary; what stands in front of the last dimension is written `...`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class NextTokens:
    """Next-token distributions, without gradient.

    Args:
        probabilities: `(..., k + 1)` float32, of the likeliest tokens and, last, of all others together; `(..., V)` of
            all tokens where `tokens` is `None`. All 0 where there is no distribution, as after an empty prefix.
        tokens: `(..., k)` long, which tokens are the likeliest.
    """

    probabilities: torch.Tensor
    tokens: torch.Tensor | None = None

    @classmethod
    @torch.no_grad()
    def of_logits(cls, logits: torch.Tensor, top_k: int, temperature: float = 1.0) -> "NextTokens":
        """The distribution of logits `(..., V)` at a temperature; all of it if V is not above `top_k`.

        The others are one outcome rather than left out: renormalised without them, the k tokens would teach the student
        to expect nothing else.
        """
        logits = logits.float() / temperature  # a tensor of its own, which is changed below
        if top_k >= logits.shape[-1]:
            return cls(logits.softmax(-1))
        total = logits.logsumexp(-1, keepdim=True)
        highest, tokens = logits.topk(top_k, dim=-1)
        others = logits.scatter_(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
        return cls(torch.cat([highest, others], dim=-1).sub_(total).exp_(), tokens)

    @classmethod
    def cat(cls, parts: list["NextTokens"]) -> "NextTokens":
        """Those of several batches, one behind the other."""
        tokens = [part.tokens for part in parts if part.tokens is not None]
        return cls(torch.cat([part.probabilities for part in parts]), torch.cat(tokens) if tokens else None)

    @property
    def is_known(self) -> torch.Tensor:
        """`(...)` bool, where there is a distribution."""
        return self.probabilities.sum(-1) > 0

    def only(self, is_known: torch.Tensor) -> "NextTokens":
        """Without the distributions where `is_known` `(...)` is false."""
        return NextTokens(self.probabilities * is_known[..., None], self.tokens)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "NextTokens":
        """`function` of both tensors: a choice of places, or a move to another device."""
        return NextTokens(function(self.probabilities), None if self.tokens is None else function(self.tokens))

    def __getitem__(self, index: Any) -> "NextTokens":
        """Those at some places, as a tensor `(..., k)` is indexed."""
        return self.map(lambda tensor: tensor[index])


__all__ = ["NextTokens"]

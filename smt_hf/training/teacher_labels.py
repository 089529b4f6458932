"""What a teacher says of the rows of a batch: made now, or taken from what a cache has.

Shapes: B sequences, T transitions, S positions, K memory tokens, D width, E width of a model's hidden states, V
vocabulary.
"""

from dataclasses import dataclass

import torch

from smt_hf.teachers import NextTokens


@dataclass
class TeacherLabels:
    """What a teacher says at S positions; `None` for what it was not asked."""

    memories: torch.Tensor  # (B, S, K, D)
    logits: torch.Tensor | None = None  # (B, S, V), of its own head
    last: torch.Tensor | None = None  # (B, K, D), the memory after all tokens
    next_tokens: NextTokens | None = None  # of (B, S)


@dataclass(frozen=True)
class CachedRows:
    """What a cache has of the rows of a batch, after 0 .. T tokens."""

    states: torch.Tensor  # (B, T + 1, E), hidden states of the chosen layers of the teacher's model side by side
    next_tokens: NextTokens | None = None  # of (B, T + 1)

    def labels(self, teacher, positions, initial_memory, attention_mask, with_next_tokens: bool) -> TeacherLabels:
        """As `SMTForPreTraining.memory_labels`, for memories and next tokens."""
        index = positions.expand(len(self.states), -1)

        def taken(tensor):
            return tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[-1]))

        memories = teacher.memories_of(taken(self.states), index, initial_memory, attention_mask)
        if not with_next_tokens:
            return TeacherLabels(memories)
        assert self.next_tokens is not None
        return TeacherLabels(memories, next_tokens=self.next_tokens.map(taken))

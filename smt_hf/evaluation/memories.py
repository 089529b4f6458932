"""Walks over rows: the memories that a student and a teacher make of them. Every evaluation goes through these.

Shapes: B rows of a batch, T tokens, W tokens of a window, S positions, K memory tokens, D width.
"""

from collections.abc import Iterator

import torch

from smt_hf.student.recurrence_smt_recurrent import state_dtype

# Memories (rows x positions) per pass of a teacher that computes every position from tokens of its own.
_MEMORIES_PER_PASS = 4096


def own_memories(student, tokens: torch.Tensor, window: int = 32) -> Iterator[tuple[int, torch.Tensor]]:
    """Walk the student's own rollout from `m_0` window by window, the memory carried on.

    Args:
        student: an `SMTRecurrentForCausalLM`.
        tokens: `(B, T)`.
        window: tokens whose memories are held at once [W].

    Yields:
        The position (tokens read) of the first memory and the memories: first 0 and `m_0`, `(B, 1, K, D)`, then up to
        W memories at a time, `(B, W, K, D)`.
    """
    m_0 = student.model.start_memory()
    memory = m_0.to(state_dtype(m_0.dtype)).expand(len(tokens), -1, -1)  # as `forward` and `generate` carry it
    yield 0, memory[:, None]
    for start in range(0, tokens.shape[1], window):
        memories = student.model.unroll(memory, student.model.embed(tokens[:, start : start + window]))
        memory = memories[:, -1]
        yield start + 1, memories


def reading_teacher(model):
    """The teacher of an `SMTForPreTraining` if it can read rows, else `None`. One that was trained from a cache without
    its model cannot."""
    return model.teacher if getattr(model.teacher, "reads_rows", True) else None


def teacher_memories(model, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The memories that the teacher of an `SMTForPreTraining` makes of the tokens `(B, T)`.

    Args:
        positions: numbers of tokens read, `(S,)` or `(B, S)`.

    Returns:
        `(B, S, K, D)`.
    """
    makes_all = model.teacher.labels_all_positions
    span = positions.shape[-1] if makes_all else max(_MEMORIES_PER_PASS // len(tokens), 1)
    m_0 = model.student.model.start_memory()
    return torch.cat([model.teacher(tokens, some, m_0) for some in positions.split(span, dim=-1)], dim=1)

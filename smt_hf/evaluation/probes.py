"""How many labels of synthetic tasks are predicted right, at the positions that have one.

Rows are `input_ids (N, T + 1)` with aligned `labels (N, T + 1)`: `labels[:, t]` is the target of the memory after t
tokens (no shift; t = 0 is `m_0`), -100 is not scored. A row may be padded at its end, where it has no labels.
Shapes: N rows, B rows of a batch, T tokens, W tokens of a window, S positions, K memory tokens, D width, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from smt_hf.teachers import SMTTeacherConfig

# Memories (rows x positions) of one pass of a teacher that pays for each with tokens of its own.
_MEMORIES_A_PASS = 4096


@dataclass(frozen=True)
class ProbeScores:
    """Scores of labelled rows.

    Args:
        accuracy: share of labels predicted right.
        loss: mean loss, nats a label.
        n: labels scored.
        by_position: accuracy at each position t that has a label (t tokens read), or `None` if it was not counted.
    """

    accuracy: float
    loss: float
    n: int
    by_position: dict[int, float] | None = None


@torch.inference_mode()
def score_student_probe(
    student,
    input_ids: np.ndarray,
    labels: np.ndarray,
    batch_size: int = 512,
    keep_only_labelled: bool = True,
    window: int = 32,
) -> ProbeScores:
    """The student's own rollout from `m_0`, up to the last label of a batch.

    Args:
        student: an `SMTRecurrentForCausalLM`.
        input_ids, labels: `(N, T + 1)`.
        batch_size: rows side by side; changes memory use and speed, not the result.
        keep_only_labelled: read logits out of the labelled memories alone; otherwise out of every memory of a window,
            at a higher cost and for the same scores (the plain way, to check the lean one against).
        window: tokens whose memories are held at once; changes memory use, not the result.

    Raises:
        ValueError: the shapes differ or there is no label.
    """
    tally = _Tally(labels.shape[1])
    for tokens, targets in _batches(input_ids, labels, batch_size, student.device):
        labelled = targets != -100
        last = int(labelled.any(0).nonzero().max())
        for first, memories in own_memories(student, tokens[:, :last], window):
            positions = slice(first, first + memories.shape[1])
            mask = labelled[:, positions]
            if not mask.any():
                continue
            logits = student.read_logits(memories[mask]) if keep_only_labelled else student.read_logits(memories)[mask]
            tally.add(logits, targets[:, positions][mask], first + mask.nonzero()[:, 1])
    return tally.scores()


@torch.inference_mode()
def score_teacher_probe(model, input_ids: np.ndarray, labels: np.ndarray, batch_size: int = 64) -> ProbeScores:
    """The shared readout on the teacher's memories, made at labelled positions only: what imitation alone could reach.

    Args:
        model: student and teacher (an `SMTForPreTraining`).
        input_ids, labels: `(N, T + 1)`.
        batch_size: rows a pass; changes memory use and speed, not the result.

    Raises:
        ValueError: the shapes differ or there is no label.
    """
    tally = _Tally(labels.shape[1])
    for tokens, targets in _batches(input_ids, labels, batch_size, model.device):
        labelled = targets != -100
        # Each row's labelled positions first, as many columns as the row with the most labels needs.
        positions = (~labelled).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(labelled.sum(1).max())]
        mask = labelled.gather(1, positions)
        memories = teacher_memories(model, tokens, positions)
        tally.add(model.student.read_logits(memories[mask]), targets.gather(1, positions)[mask], positions[mask])
    return tally.scores()


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
    memory = student.model.start_memory().expand(len(tokens), -1, -1)
    yield 0, memory[:, None]
    for start in range(0, tokens.shape[1], window):
        memories = student.model.unroll(memory, student.model.embed_tokens(tokens[:, start : start + window]))
        memory = memories[:, -1]
        yield start + 1, memories


def teacher_memories(model, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The teacher's memories `(B, S, K, D)` at `positions`, `(S,)` or `(B, S)`, of the tokens `(B, T)`."""
    config = model.teacher.config
    # A projection makes all memories of a row at once.
    makes_all = isinstance(config, SMTTeacherConfig) and config.memory_readout == "projection"
    span = positions.shape[-1] if makes_all else max(_MEMORIES_A_PASS // len(tokens), 1)
    m_0 = model.student.model.start_memory()
    return torch.cat([model.teacher(tokens, some, m_0) for some in positions.split(span, dim=-1)], dim=1)


def check_aligned(input_ids: np.ndarray, labels: np.ndarray) -> None:
    """Refuse labels that are not one a token."""
    if input_ids.shape != labels.shape:
        raise ValueError(
            f"`labels` {labels.shape} must be aligned with `input_ids` {input_ids.shape}: one target a token."
        )


def _batches(input_ids: np.ndarray, labels: np.ndarray, batch_size: int, device):
    """Tokens `(B, T)` that are read and targets `(B, T + 1)` of the rows that have a label, batch by batch."""
    check_aligned(input_ids, labels)
    labelled = (labels != -100).any(1)
    if not labelled.any():
        raise ValueError("there is nothing to score: all `labels` are -100.")
    tokens, targets = torch.from_numpy(input_ids[labelled]), torch.from_numpy(labels[labelled])
    for some, wanted in zip(tokens.split(batch_size), targets.split(batch_size)):
        yield some[:, :-1].to(device), wanted.to(device)


class _Tally:
    """Hits, losses and labels of every position."""

    def __init__(self, num_positions: int):
        self.hits, self.losses, self.counts = np.zeros((3, num_positions))

    def add(self, logits: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor) -> None:
        """`(n, V)`, `(n,)`, `(n,)`."""
        places = positions.cpu().numpy()
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        for sums, values in ((self.hits, logits.argmax(-1) == targets), (self.losses, losses)):
            sums += np.bincount(places, values.double().cpu().numpy(), len(sums))
        self.counts += np.bincount(places, minlength=len(self.counts))

    def scores(self) -> ProbeScores:
        n = int(self.counts.sum())
        return ProbeScores(
            accuracy=float(self.hits.sum() / n),
            loss=float(self.losses.sum() / n),
            n=n,
            by_position={int(at): float(self.hits[at] / self.counts[at]) for at in self.counts.nonzero()[0]},
        )

"""How well the labels of held-out rows are predicted, by a student on its own and from its teacher's memories.

Rows are `input_ids (N, T + 1)` with aligned `labels (N, T + 1)`: `labels[:, t]` is the target of the memory after t
tokens (no shift; t = 0 is `m_0`), -100 is not scored. A row may be padded at its end, where it has no labels. Tasks and
images are such rows; `text.stream_labels` makes them of streams of text.
Shapes: N rows, B rows of a batch, T tokens, S positions, V vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object

from .memories import own_memories, teacher_memories

_TOKENS_PER_PASS = 8192  # of the rows that a teacher reads side by side


@dataclass(frozen=True)
class Scores:
    """Sums over the labels at each position (t tokens read)."""

    hits: np.ndarray  # (T + 1,), labels predicted right
    nats: np.ndarray  # (T + 1,), losses
    counts: np.ndarray  # (T + 1,), labels

    @property
    def n(self) -> int:
        """Labels scored."""
        return int(self.counts.sum())

    @property
    def accuracy(self) -> float:
        """Share of the labels predicted right."""
        return float(self.hits.sum() / self.n)

    @property
    def loss(self) -> float:
        """Mean loss, nats per label."""
        return float(self.nats.sum() / self.n)

    def bits_per(self, num_units: int) -> float:
        """Total loss in bits, divided by the bytes (or other units) that the labels stand for."""
        return float(self.nats.sum() / math.log(2) / num_units)


@torch.inference_mode()
def score_student(
    student,
    input_ids: np.ndarray,
    labels: np.ndarray,
    batch_size: int = 512,
    window: int = 32,
    process_index: int = 0,
    num_processes: int = 1,
) -> Scores:
    """The student's own rollout from `m_0`, up to the last label of a batch. Only labelled memories are read out.

    Args:
        student: an `SMTRecurrentForCausalLM`.
        input_ids, labels: `(N, T + 1)`, the same on all processes.
        batch_size: rows side by side; changes memory use and speed, not the result.
        window: tokens whose memories are held at once; changes memory use, not the result.
        process_index, num_processes: with several processes, all call this function; each scores every
            `num_processes`-th row and returns the scores of all rows.

    Raises:
        ValueError: the shapes differ or there is no label.
    """

    def predictions(tokens, targets, labelled):
        last = int(labelled.any(0).nonzero().max())
        for first, memories in own_memories(student, tokens[:, :last], window):
            places = slice(first, first + memories.shape[1])
            mask = labelled[:, places]
            if mask.any():
                logits = student.read_logits(memories[mask])
                yield logits, targets[:, places][mask], first + mask.nonzero()[:, 1]

    return _scores(predictions, input_ids, labels, batch_size, student.device, process_index, num_processes)


@torch.inference_mode()
def score_teacher(
    model,
    input_ids: np.ndarray,
    labels: np.ndarray,
    batch_size: int | None = None,
    process_index: int = 0,
    num_processes: int = 1,
) -> Scores:
    """The shared readout on the teacher's memories, made at labelled positions only: what imitation alone could reach.

    Args:
        model: student and teacher (an `SMTForPreTraining`).
        batch_size: rows per pass; default: as many as hold 8,192 tokens. Changes memory use and speed, not the result.
        others: as in `score_student`.

    Raises:
        ValueError: the shapes differ or there is no label.
    """

    def predictions(tokens, targets, labelled):
        # Each row's labelled positions first, as many columns as the row with the most labels needs.
        positions = (~labelled).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(labelled.sum(1).max())]
        mask = labelled.gather(1, positions)
        memories = teacher_memories(model, tokens, positions)
        yield model.student.read_logits(memories[mask]), targets.gather(1, positions)[mask], positions[mask]

    batch_size = batch_size or max(_TOKENS_PER_PASS // max(labels.shape[1] - 1, 1), 1)
    return _scores(predictions, input_ids, labels, batch_size, model.device, process_index, num_processes)


def check_aligned(input_ids: np.ndarray, labels: np.ndarray) -> None:
    """Refuse rows whose labels do not lie beside their tokens.

    Raises:
        ValueError: the shapes differ.
    """
    if input_ids.shape != labels.shape:
        raise ValueError(
            f"`labels` {labels.shape} must be aligned with `input_ids` {input_ids.shape}: one target per token."
        )


def _scores(
    predictions, input_ids: np.ndarray, labels: np.ndarray, batch_size: int, device, process_index, num_processes
) -> Scores:
    """Sums of the predictions for the process's rows that have a label, added up over all processes.

    Args:
        predictions: function of a batch, its tokens `(B, T)` that are read, targets `(B, T + 1)` and which of them are
            labels, that yields logits `(n, V)`, targets `(n,)` and positions `(n,)`.
    """
    check_aligned(input_ids, labels)
    labelled = np.flatnonzero((labels != -100).any(1))
    if not len(labelled):
        raise ValueError("there is nothing to score: all `labels` are -100.")
    own = labelled[process_index::num_processes]
    sums = np.zeros((3, labels.shape[1]))
    for start in range(0, len(own), batch_size):
        some = own[start : start + batch_size]
        rows, goals = torch.from_numpy(input_ids[some, :-1]).to(device), torch.from_numpy(labels[some]).to(device)
        for logits, targets, positions in predictions(rows, goals, goals != -100):
            places = positions.cpu().numpy()
            losses = F.cross_entropy(logits.float(), targets, reduction="none")
            hits = logits.argmax(-1) == targets
            for total, values in zip(sums, (hits, losses, torch.ones_like(losses))):
                total += np.bincount(places, values.double().cpu().numpy(), labels.shape[1])
    if num_processes > 1:
        parts = gather_object([sums])
        assert len(parts) == num_processes, "every process must score its rows"
        sums = np.sum(parts, axis=0)
    return Scores(*sums)

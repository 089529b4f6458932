"""How well held-out text is predicted: parallel streams with carried memory, from `m_0`.

Shapes: B streams, L tokens predicted, K memory tokens, D width, V vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers.convert_slow_tokenizer import bytes_to_unicode


@dataclass(frozen=True)
class StreamScores:
    """Scores of held-out streams.

    Args:
        losses: `(L,)`, mean loss (nats a token) at each position of a stream: at position t, t + 1 tokens are read.
        bits_per_byte: total loss in bits over the bytes of the predicted text.
        accuracy: share of tokens predicted right.
        num_tokens: tokens predicted.
    """

    losses: np.ndarray
    bits_per_byte: float
    accuracy: float
    num_tokens: int


def is_byte_tokenizer(tokenizer) -> bool:
    """Whether token `i` is byte `i`, for all 256 bytes."""
    characters = bytes_to_unicode()
    return len(tokenizer) >= 256 and tokenizer.convert_ids_to_tokens(list(range(256))) == [
        characters[byte] for byte in range(256)
    ]


def count_bytes(tokenizer, tokens: np.ndarray) -> int:
    """UTF-8 bytes of the text that the tokens `(B, L)` stand for; a special token counts as one byte."""
    if is_byte_tokenizer(tokenizer):  # pieces of a character have no text of their own
        return tokens.size
    special = set(tokenizer.all_special_ids)
    num_special = int(np.isin(tokens, list(special)).sum())
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return max(sum(len(text.encode()) for text in texts) + num_special, 1)


def _scores(losses: torch.Tensor, hits: torch.Tensor, num_bytes: int) -> StreamScores:
    return StreamScores(
        losses=losses.mean(0).numpy(),
        bits_per_byte=losses.double().sum().item() / math.log(2) / num_bytes,
        accuracy=hits.double().mean().item(),
        num_tokens=losses.numel(),
    )


@torch.inference_mode()
def score_student(student, streams: np.ndarray, num_bytes: int, window: int = 128) -> StreamScores:
    """The student's own rollout, started from `m_0` once a stream and carried on from window to window.

    Args:
        student: an `SMTRecurrentForCausalLM`.
        streams: `(B, L + 1)` tokens.
        num_bytes: bytes of `streams[:, 1:]`.
        window: tokens a forward; changes memory use, not the result.
    """
    tokens = torch.from_numpy(streams).to(student.device)
    memory = student.model.start_memory().expand(len(tokens), -1, -1)
    losses: list[torch.Tensor] = []
    hits: list[torch.Tensor] = []
    for start in range(0, tokens.shape[1] - 1, window):
        inputs = tokens[:, start : min(start + window, tokens.shape[1] - 1)]
        memories = student.model.unroll(memory, student.model.embed_tokens(inputs))
        memory = memories[:, -1]
        _collect(student.read_logits(memories), tokens[:, start + 1 : start + 1 + inputs.shape[1]], losses, hits)
    return _scores(torch.cat(losses, 1), torch.cat(hits, 1), num_bytes)


@torch.inference_mode()
def score_teacher(model, streams: np.ndarray, num_bytes: int, batch_size: int = 4) -> StreamScores:
    """The shared readout on the teacher's memories: what the student could reach by imitation alone."""
    tokens = torch.from_numpy(streams).to(model.device)
    positions = torch.arange(1, tokens.shape[1], device=tokens.device)
    losses: list[torch.Tensor] = []
    hits: list[torch.Tensor] = []
    for rows in tokens.split(batch_size):
        parts: list[list[torch.Tensor]] = [[], []]
        # Some teachers pay for each position with tokens of their own; a projection makes all memories in one pass.
        makes_all = getattr(model.teacher.config, "memory_readout", None) == "projection"
        for some in positions.split(len(positions) if makes_all else 256):
            memories = model.teacher(rows[:, :-1], some, model.student.model.start_memory())
            _collect(model.student.read_logits(memories), rows[:, some], *parts)
        losses.append(torch.cat(parts[0], dim=1))
        hits.append(torch.cat(parts[1], dim=1))
    return _scores(torch.cat(losses), torch.cat(hits), num_bytes)


def _collect(logits, targets, losses: list, hits: list) -> None:
    losses.append(
        F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view(targets.shape).cpu()
    )
    hits.append((logits.argmax(-1) == targets).cpu())

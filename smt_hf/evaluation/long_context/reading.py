"""Prompts read piece by piece, many side by side: what any causal language model writes and expects after them.

No forward gets more than `chunk_size` tokens, and no logits are held but those of what comes after the prompt. A
recurrent model reads a prompt of any length in the memory that a short one needs; an attention model adds its keys and
values.

Shapes: B prompts side by side, T tokens of one forward, V vocabulary.
"""

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from smt_hf.errors import InputError

# What models call their state; newer versions of transformers answer to older names too, so the first one counts.
_STATE_NAMES = ("cache", "past_key_values", "cache_params", "state")
PADDED, EQUAL, ALONE = "padded", "equal", "alone"


@dataclass(frozen=True)
class Manner:
    """How a model has to be read, so that it computes what one pass over the whole prompt alone computes.

    Args:
        carries_chunks: whether a forward of several tokens goes on from the state before it. Mamba of transformers does
            so for one token alone: in a longer forward, it begins with an empty state.
        together: which prompts go side by side: `padded` (on the left, behind a mask), `equal` (those of one length) or
            `alone`.
        masks_past: whether a later forward gets the mask of all tokens so far, or none. Padding lies within the first
            forward; a recurrent state has left it behind.
    """

    carries_chunks: bool = True
    together: str = PADDED
    masks_past: bool = True


class Reader:
    """A model with its manner of reading.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        manner: as `find_manner` has found it.
        chunk_size: most tokens of one forward.
    """

    def __init__(self, model, manner: Manner, chunk_size: int = 512):
        self.model, self.manner, self.chunk_size = model, manner, chunk_size
        self.takes = inspect.signature(model.forward).parameters
        self.num_tokens = 0  # read so far, padding left out
        self.state_bytes = 0  # of the largest state of one prompt so far

    def described(self) -> str:
        """The manner in words, for a line of results."""
        pieces = f"chunks of {self.chunk_size} tokens"
        if not self.manner.carries_chunks:
            pieces = f"a first chunk of {self.chunk_size} tokens, then token by token"
        side_by_side = {PADDED: "left-padded side by side", EQUAL: "equal lengths side by side", ALONE: "one by one"}
        return f"{pieces}; {side_by_side[self.manner.together]}"

    def read(self, prompts: Sequence[Sequence[int]]) -> "Reading":
        """Read prompts of token ids side by side.

        Raises:
            ValueError: a prompt is empty, or they may not go side by side: see `batches`.
        """
        lengths = [len(prompt) for prompt in prompts]
        if not min(lengths) or len(self.batches(lengths, len(prompts))) > 1:
            raise ValueError(f"prompts of {lengths} tokens cannot be read side by side ({self.manner}).")
        longest = max(lengths)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in zip(ids, prompts):
            row[longest - len(prompt) :] = torch.tensor(prompt)
        padding = torch.tensor([longest - length for length in lengths])
        reading = Reading(self, padding if padding.any() else None)
        reading.feed(ids)
        return reading

    def batches(self, lengths: Sequence[int], batch_size: int) -> list[list[int]]:
        """Which prompts go side by side: lists of their indices, the longest prompts first.

        Args:
            lengths: tokens of each prompt.
            batch_size: most prompts of a batch.
        """
        most = 1 if self.manner.together == ALONE else batch_size
        spread = self.chunk_size - 1 if self.manner.together == PADDED else 0  # padding lies within the first chunk
        groups: list[list[int]] = []
        for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
            if groups and len(groups[-1]) < most and lengths[groups[-1][0]] - lengths[index] <= spread:
                groups[-1].append(index)
            else:
                groups.append([index])
        return groups


class Reading:
    """The prompts of a batch after they were read: the model's state, and `logits` `(B, V)` of the next token.

    Args:
        padding: `(B,)`, tokens of padding in front of each prompt; `None`: there is none.
    """

    def __init__(self, reader: Reader, padding: torch.Tensor | None):
        self.reader = reader
        self.logits: torch.Tensor
        self._padding = None if padding is None else padding.to(reader.model.device)
        self._num_read = 0  # padding included
        self._state: dict[str, Any] = {}

    def copy(self) -> "Reading":
        """Another reading that goes on from the same state; neither changes the other."""
        other = copy.copy(self)
        other._state = copy.deepcopy(self._state)
        return other

    def feed(self, ids: torch.Tensor) -> None:
        """Read on: `(B, T)`."""
        for piece in self._pieces(ids):
            self.logits = self._forward(piece, 1)[:, -1]
        self._weigh_state()

    def losses(self, continuations: Sequence[Sequence[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """What the model expects of one continuation per prompt, each token after the true ones before it.

        The reading itself goes on past the continuations: score several of them on copies.

        Returns:
            Per prompt the loss of each token (nats), and whether it is the most likely one.
        """
        lengths = [len(continuation) for continuation in continuations]
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        for row, continuation in zip(ids, continuations):
            row[: len(continuation)] = torch.tensor(continuation)  # what comes after its end changes nothing before it
        ids = ids.to(self.reader.model.device)
        nats, hits = [], []
        first = 0
        for logits in self._expectations(ids):
            targets = ids[:, first : first + logits.shape[1]]
            nats.append(torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none").double().cpu())
            hits.append((logits.argmax(-1) == targets).cpu())
            first += logits.shape[1]
        self._weigh_state()
        both = torch.cat(nats, dim=1).numpy(), torch.cat(hits, dim=1).numpy()
        return [(both[0][row, :length], both[1][row, :length]) for row, length in enumerate(lengths)]

    def write(
        self, num_tokens: int, ends: Collection[int] = (), is_done: Callable[[list[int]], bool] | None = None
    ) -> list[list[int]]:
        """The most likely token again and again, for every prompt.

        Args:
            num_tokens: most tokens of a prompt.
            ends: tokens that end what is written; they are left out.
            is_done: told all that is written after a prompt, whether that is enough.
        """
        written: list[list[int]] = [[] for _ in range(len(self.logits))]
        is_open = [True] * len(written)
        for number in range(num_tokens):
            if number:
                self.feed(self.logits.argmax(-1)[:, None])
            for row, token in enumerate(self.logits.argmax(-1).tolist()):
                if is_open[row] and token not in ends:
                    written[row].append(token)
                    is_open[row] = is_done is None or not is_done(written[row])
                else:
                    is_open[row] = False
            if not any(is_open):
                break
        return written

    def _weigh_state(self) -> None:
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in _tensors_in(self._state, set()))
        self.reader.state_bytes = max(self.reader.state_bytes, num_bytes // len(self.logits))

    def _expectations(self, ids: torch.Tensor) -> Iterator[torch.Tensor]:
        """Logits `(B, T, V)` that expect the tokens `ids`, piece by piece; all but the last of `ids` are read."""
        yield self.logits[:, None]
        for piece in self._pieces(ids[:, :-1]):
            logits = self._forward(piece, piece.shape[1])
            self.logits = logits[:, -1]
            yield logits

    def _pieces(self, ids: torch.Tensor) -> Iterator[torch.Tensor]:
        """The tokens as forwards of at most `chunk_size`."""
        begin = 0
        while begin < ids.shape[1]:
            many = self.reader.manner.carries_chunks or not self._num_read
            end = begin + (self.reader.chunk_size if many else 1)
            yield ids[:, begin:end]
            begin = end

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor, num_kept: int) -> torch.Tensor:
        """Read a piece `(B, T)`; the logits after the last `num_kept` tokens, `(B, num_kept, V)`, float32."""
        reader, is_first = self.reader, not self._num_read
        ids = ids.to(reader.model.device)
        padding = 0 if self._padding is None or not is_first else int(self._padding.sum())
        self._num_read += ids.shape[1]
        reader.num_tokens += ids.numel() - padding
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": True, "return_dict": True, **self._state}
        if self._padding is not None:
            columns = torch.arange(self._num_read, device=ids.device) - self._padding[:, None]
            if is_first or reader.manner.masks_past:
                inputs["attention_mask"] = (columns >= 0).long()
            if "position_ids" in reader.takes:
                inputs["position_ids"] = columns[:, -ids.shape[1] :].clamp(min=0)
        if "logits_to_keep" in reader.takes:
            inputs["logits_to_keep"] = num_kept
        outputs = reader.model(**inputs)
        name = next((name for name in _STATE_NAMES if outputs.get(name) is not None), None)
        if name is None:
            raise InputError(f"a {type(reader.model).__name__} hands on no state: prompts cannot be read in pieces.")
        self._state = {name: outputs[name]}
        return outputs.logits[:, -num_kept:].float()


def _tensors_in(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor that a model's state holds, whatever class it is of, once."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
        return
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    for part in parts or getattr(value, "__dict__", {}).values():
        yield from _tensors_in(part, seen)

"""From rows on disk to batches: global example numbers, carried windows, padding.

Every row that is drawn carries a number that is unique over the run (row and epoch), so that whatever is random about
an example depends on nothing but that number and the seed.
"""

import functools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from smt_hf.errors import InputError

# What rows are filled up with at their end.
_FILLS = {"input_ids": 0, "attention_mask": 0, "labels": -100, "document_ids": -1}


@functools.lru_cache(maxsize=2)
def _order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of the rows in one epoch."""
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


def rows_at(rows: Sequence[dict], indices: list[int]) -> list[dict]:
    """The rows of a batch, read at once where `rows` can do that."""
    if hasattr(rows, "__getitems__"):
        return rows.__getitems__(indices)
    return [rows[index] for index in indices]


class IndexedExamples(Dataset):
    """Rows under global numbers, in `column`: number `i` is row `i % len(rows)` in epoch `i // len(rows)`."""

    def __init__(self, rows: Sequence[dict], column: str = "example_ids"):
        self.rows, self.column = rows, column

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        rows = rows_at(self.rows, [index % len(self.rows) for index in indices])
        return [{**row, self.column: index} for row, index in zip(rows, indices)]


class Levels(Dataset):
    """A curriculum: datasets of equal size, easiest first. An example holds one row of each level.

    The level is chosen when a step begins, not when its batch is fetched, so that a resumed run trains on the same
    rows as an uninterrupted one.

    Raises:
        InputError: no level, or levels of different sizes.
    """

    def __init__(self, levels: Sequence[Sequence[dict]]):
        if not levels or len({len(level) for level in levels}) > 1:
            raise InputError(f"levels must be of one size, got {[len(level) for level in levels]} rows.")
        self.levels = list(levels)

    def __len__(self) -> int:
        return len(self.levels[0])

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        by_level = [rows_at(level, indices) for level in self.levels]
        return [{"levels": list(rows)} for rows in zip(*by_level)]


class EpochSampler(Sampler):
    """One permutation of the rows per epoch, drawn from (seed, epoch), as global example numbers."""

    def __init__(self, num_rows: int, seed: int):
        self.num_rows, self.seed, self.epoch = num_rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        return iter((self.epoch * self.num_rows + _order(self.num_rows, self.seed, self.epoch)).tolist())


class CarriedWindows(Dataset):
    """Rows read as parallel streams of consecutive windows, for truncated BPTT with a carried memory.

    Example `i` is the window of stream `i % num_streams` at step `i // num_streams`. A stream reads a row from its
    first token to its last, one window per step, and then starts the next row from `m_0`. The streams start at
    different places of their rows, so that rows end at different steps.

    Args:
        rows: `input_ids` of equal length `n * window + 1` without padding, and optionally `labels`.
        num_streams: examples per optimiser step, summed over ranks.
        window: transitions per window.
        num_steps: optimiser steps of the run.
        seed: seed of the order of the rows.

    Raises:
        InputError: rows of another length, or levels of a curriculum.
    """

    def __init__(self, rows: Sequence[dict], num_streams: int, window: int, num_steps: int, seed: int):
        if "levels" in rows[0]:
            raise InputError("a curriculum cannot be read with a carried memory: set `carries_memory` to false.")
        unread = sorted({"attention_mask", "document_ids"} & set(rows[0]))
        if unread:
            raise InputError(
                f"rows read with a carried memory are packed, without padding; these have {', '.join(unread)}: leave "
                "that out, or set `transition_steps` to `context_length`."
            )
        length = len(rows[0]["input_ids"]) - 1
        if length < window or length % window:
            raise InputError(
                f"rows of {length + 1} tokens cannot be read in windows of {window} transitions: they must hold a "
                f"multiple of {window}, plus one."
            )
        self.rows, self.num_streams, self.window, self.num_steps = rows, num_streams, window, num_steps
        self.windows_per_row, self.seed = length // window, seed
        self._open: dict[int, tuple[int, np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.num_streams * self.num_steps

    def __getitem__(self, index: int) -> dict:
        step, stream = divmod(index, self.num_streams)
        at = step + stream * self.windows_per_row // self.num_streams
        turn, window = divmod(at, self.windows_per_row)
        number = turn * self.num_streams + stream
        if self._open.get(stream, (None,))[0] != number:
            epoch, place = divmod(number, len(self.rows))
            row = self.rows[int(_order(len(self.rows), self.seed, epoch)[place])]
            if len(row["input_ids"]) != self.windows_per_row * self.window + 1:
                raise InputError("rows to be read with a carried memory must all have the same number of tokens.")
            tokens = np.asarray(row["input_ids"])
            self._open[stream] = (number, tokens, np.asarray(row.get("labels", tokens)))
        part = slice(window * self.window, (window + 1) * self.window + 1)
        tokens, labels = self._open[stream][1][part], self._open[stream][2][part].copy()
        fresh = window == 0 or step == 0
        if not fresh:
            labels[0] = -100  # the window before has predicted it
        return {"input_ids": tokens, "labels": labels, "example_ids": index, "stream_ids": stream, "is_fresh": fresh}


def collate(examples: list[dict]) -> dict[str, Any]:
    """Batch rows of `input_ids`, and `attention_mask`, `labels`, `document_ids` where they have them.

    Examples of [`Levels`] become one batch per level, under `levels`. Rows of different lengths are padded at the end
    (token 0, mask 0, label -100). The `example_ids` of rows without them are hashes of their content.

    Raises:
        InputError: a row with fewer than two tokens, which holds no transition.
    """
    if "levels" in examples[0]:
        numbers = [{"example_ids": example["example_ids"]} if "example_ids" in example else {} for example in examples]
        by_level = zip(*(example["levels"] for example in examples))
        return {"levels": [collate([row | number for row, number in zip(rows, numbers)]) for rows in by_level]}
    if "input_ids" not in examples[0]:
        raise InputError(
            f"training rows need `input_ids`, these have {', '.join(examples[0])}: tokenize the text first."
        )
    lengths = [len(example["input_ids"]) for example in examples]
    if min(lengths) < 2:
        raise InputError("a training row needs at least two tokens: one to read and one to predict.")
    longest = max(lengths)

    def padded(name, fill):
        rows = np.full((len(examples), longest), fill, dtype=np.int64)
        for row, example in zip(rows, examples):
            row[: len(example[name])] = example[name]
        return torch.from_numpy(rows)

    batch = {name: padded(name, fill) for name, fill in _FILLS.items() if name in examples[0]}
    if "attention_mask" not in batch and min(lengths) != longest:
        batch["attention_mask"] = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    if "labels" not in batch:
        batch["labels"] = batch["input_ids"].clone()
        if "attention_mask" in batch:
            batch["labels"].masked_fill_(batch["attention_mask"] == 0, -100)
    for name in ("example_ids", "stream_ids", "is_fresh", "row_ids"):
        if name in examples[0]:
            batch[name] = torch.tensor([example[name] for example in examples])
    if "example_ids" not in batch:
        contents = (np.asarray(example["input_ids"], dtype=np.int64).tobytes() for example in examples)
        batch["example_ids"] = torch.tensor([zlib.crc32(content) for content in contents])
    return batch

"""Held-out text read as one stream: bits per byte by position, and by the length of the context before it.

Both are means over streams that begin with an empty state.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from smt_hf.errors import InputError
from smt_hf.evaluation.text import count_bytes

from .estimates import estimate
from .loading import LanguageModel
from .reading import Reader

NUM_SCORED = 256  # tokens at the end of a stream, scored after contexts of every length
_SHORTEST_CONTEXT = 16


def cut_streams(texts: Iterable[str], language_model: LanguageModel, length: int, most: int) -> list[list[int]]:
    """Stretches of `length + 1` tokens, one after the other, of the texts behind each other.

    The end-of-text token, where the tokenizer has one, is between two texts.

    Args:
        length: tokens that are predicted; the first is only read.
        most: streams.

    Raises:
        InputError: the texts are shorter than one stream.
    """
    end = language_model.tokenizer.eos_token_id
    ids: list[int] = []
    for text in texts:
        ids += ([end] if ids and end is not None else []) + language_model.encoded(text)
        if len(ids) >= most * (length + 1):
            break
    streams = [ids[begin : begin + length + 1] for begin in range(0, len(ids) - length, length + 1)]
    if not streams:
        raise InputError(
            f"the files hold {len(ids):,} tokens, and one stream needs {length + 1:,}: give more text, or smaller "
            "`lengths`."
        )
    return streams[:most]


def measure_streams(
    language_model: LanguageModel,
    reader: Reader,
    streams: Sequence[list[int]],
    batch_size: int = 8,
    advance: Callable[[int], object] = lambda number: None,
) -> dict[str, Any]:
    """Bits per byte of text, in one pass over each stream, and again of its end after shorter contexts.

    Args:
        streams: `L + 1` tokens each, the first of which is only read.
        batch_size: streams side by side; changes memory use and speed alone.
        advance: told the number of streams that were read, those of shorter contexts included.

    Returns:
        `value`, `interval` and `n` (streams) of whole streams. `by_position`: for each power of two the bits of the
        tokens up to it, from the power before on; a position counts the tokens read. `by_context`: bits of the last
        256 tokens of all streams after so many tokens of context.

    Raises:
        InputError: streams are longer than the model's positions.
    """
    length = len(streams[0]) - 1
    language_model.check_length(length + 1)
    whole = _nats(reader, streams, batch_size, advance)
    edges = [0, *(1 << power for power in range(length.bit_length()) if 1 << power < length), length]
    by_position = []
    for begin, end in pairwise(edges):
        bits = _bits(language_model, [stream[begin + 1 : end + 1] for stream in streams], whole[:, begin:end])
        by_position.append({"position": end, **estimate(bits, is_share=False)})
    total = _bits(language_model, [stream[1:] for stream in streams], whole)
    found = {**estimate(total, is_share=False), "by_position": by_position}
    scored = min(NUM_SCORED, length // 2)
    by_context = []
    for context in contexts_of(length):
        ends = [stream[-(context + scored) :] for stream in streams]
        nats = whole if context + scored > length else _nats(reader, ends, batch_size, advance)
        bits = _bits(language_model, [stream[-scored:] for stream in streams], nats[:, -scored:])
        by_context.append({"context": context, **estimate(bits, is_share=False)})
    return found | ({"by_context": by_context} if by_context else {})


def contexts_of(length: int) -> list[int]:
    """Lengths of context that the end of a stream is scored after: powers of two, and all that there is."""
    longest = length + 1 - min(NUM_SCORED, length // 2)
    powers = [1 << power for power in range(_SHORTEST_CONTEXT.bit_length() - 1, longest.bit_length())]
    return [*(power for power in powers if power < longest), longest] if length > _SHORTEST_CONTEXT else []


def num_passes(length: int) -> int:
    """Streams of any length that `measure_streams` reads for each stream."""
    return max(len(contexts_of(length)), 1)


def _nats(
    reader: Reader, streams: Sequence[list[int]], batch_size: int, advance: Callable[[int], object]
) -> np.ndarray:
    """Loss of every token but the first: `(N, L)`."""
    found = []
    most = 1 if len(reader.batches([1, 1], 2)) > 1 else batch_size
    for begin in range(0, len(streams), most):
        some = streams[begin : begin + most]
        losses = reader.read([stream[:1] for stream in some]).losses([stream[1:] for stream in some])
        found += [nats for nats, _ in losses]
        advance(len(some))
    return np.stack(found)


def _bits(language_model: LanguageModel, tokens: Sequence[list[int]], nats: np.ndarray) -> list[float]:
    """Bits per byte of each row."""
    num_bytes = [count_bytes(language_model.tokenizer, np.array([row])) for row in tokens]
    return [float(row.sum() / math.log(2) / number) for row, number in zip(nats, num_bytes)]

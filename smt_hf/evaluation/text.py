"""Held-out text: labels of its streams, the bytes that their tokens stand for, and n-gram models as a yardstick.

The models interpolate by Witten-Bell (Bell, Cleary & Witten 1990): the more different bytes have followed a context,
the more weight the next shorter context gets.
Shapes: B streams, L tokens predicted.
"""

import math

import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

END_OF_DOCUMENT = 256  # the symbol after the 256 bytes
NUM_SYMBOLS = END_OF_DOCUMENT + 1


def stream_labels(streams: np.ndarray) -> np.ndarray:
    """Labels `(B, L + 1)` of the streams `(B, L + 1)`: all tokens but the first, which nothing was read before."""
    labels = streams.copy()
    labels[:, 0] = -100
    return labels


def is_byte_tokenizer(tokenizer) -> bool:
    """Whether token `i` is byte `i`, for all 256 bytes."""
    characters = bytes_to_unicode()
    expected = [characters[byte] for byte in range(256)]
    return len(tokenizer) >= 256 and tokenizer.convert_ids_to_tokens(list(range(256))) == expected


def count_bytes(tokenizer, tokens: np.ndarray) -> int:
    """UTF-8 bytes of the text that the tokens `(B, L)` stand for; a special token counts as one byte."""
    if is_byte_tokenizer(tokenizer):  # pieces of a character have no text of their own
        return tokens.size
    num_special = int(np.isin(tokens, tokenizer.all_special_ids).sum())
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return max(sum(len(text.encode()) for text in texts) + num_special, 1)


def stream_symbols(tokenizer, streams: np.ndarray) -> list[np.ndarray]:
    """Streams `(B, L)` of tokens as bytes and `END_OF_DOCUMENT`: one sequence per stream."""
    if is_byte_tokenizer(tokenizer):
        return [np.minimum(row, END_OF_DOCUMENT) for row in streams]
    texts = tokenizer.batch_decode(streams, skip_special_tokens=True)
    return [text_symbols(text) for text in texts]


def text_symbols(text: str) -> np.ndarray:
    """Bytes of a text in UTF-8, `(N,)` int64."""
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)


def document_symbols(texts: list[str]) -> np.ndarray:
    """Bytes of all documents, each followed by `END_OF_DOCUMENT`; `(N,)` int64."""
    return np.concatenate([np.append(text_symbols(text), END_OF_DOCUMENT) for text in texts])


class NGramModel:
    """Counts of all contexts up to `max_context` symbols.

    Args:
        symbols: `(N,)`, the training text.
        max_context: longest context, at most 6 (a context and its successor must fit 63 bits).
    """

    def __init__(self, symbols: np.ndarray, max_context: int = 3):
        self.max_context = max_context
        self.tables = [_Table(symbols, context) for context in range(max_context + 1)]

    def bits_per_byte(self, sequences: list[np.ndarray], context: int) -> float:
        """Mean bits per symbol, over all symbols but the first of each sequence, with `context` symbols of context
        (fewer at the beginning of a sequence)."""
        total, count = 0.0, 0
        for sequence in sequences:
            probability = np.full(len(sequence) - 1, 1 / NUM_SYMBOLS)
            for order in range(context + 1):
                table = self.tables[order]
                first = max(order - 1, 0)  # the first predicted symbol that has so much context
                grams = _grams(sequence, order + 1)[max(1 - order, 0) :]
                joint, followers, seen = table.look_up(grams)
                shorter = probability[first:]
                probability[first:] = np.where(
                    seen > 0, (joint + followers * shorter) / np.maximum(seen + followers, 1), shorter
                )
            total -= np.log2(probability).sum()
            count += len(probability)
        return float(total / max(count, 1))


def uniform_bits() -> float:
    """Bits per byte of a uniform distribution over all symbols."""
    return math.log2(NUM_SYMBOLS)


def _grams(symbols: np.ndarray, length: int) -> np.ndarray:
    """All runs of `length` symbols as numbers, oldest symbol highest."""
    number = np.zeros(max(len(symbols) - length + 1, 0), dtype=np.int64)
    for offset in range(length):
        number = number * NUM_SYMBOLS + symbols[offset : offset + len(number)]
    return number


class _Table:
    """Counts of contexts of one length, and of what followed them."""

    def __init__(self, symbols: np.ndarray, context: int):
        self.grams, self.gram_counts = np.unique(_grams(symbols, context + 1), return_counts=True)
        self.contexts, begins = np.unique(self.grams // NUM_SYMBOLS, return_index=True)
        self.followers = np.diff([*begins, len(self.grams)])
        self.context_counts = np.add.reduceat(self.gram_counts, begins)

    def look_up(self, grams: np.ndarray):
        """Counts of the grams, of different followers of their contexts, and of their contexts."""
        return (
            _counts_at(self.grams, self.gram_counts, grams),
            _counts_at(self.contexts, self.followers, grams // NUM_SYMBOLS),
            _counts_at(self.contexts, self.context_counts, grams // NUM_SYMBOLS),
        )


def _counts_at(keys: np.ndarray, counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, counts[places], 0)

"""Streams of held-out text: their labels, and the bytes that their tokens stand for.

Shapes: B streams, L tokens predicted.
"""

import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

END_OF_DOCUMENT = 256  # the symbol after the 256 bytes


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
    special = set(tokenizer.all_special_ids)
    num_special = int(np.isin(tokens, list(special)).sum())
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

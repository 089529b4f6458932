"""Text to rows of tokens to batches."""

from .batching import CarriedWindows, EpochSampler, IndexedExamples, collate
from .packing import byte_tokenizer, heldout_streams, pack, tokenize
from .sources import Corpus, load_corpus

__all__ = [
    "CarriedWindows",
    "Corpus",
    "EpochSampler",
    "IndexedExamples",
    "byte_tokenizer",
    "collate",
    "heldout_streams",
    "load_corpus",
    "pack",
    "tokenize",
]

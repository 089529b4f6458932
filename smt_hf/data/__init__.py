"""Text, synthetic tasks and pixels to rows of tokens to batches."""

from .batching import CarriedWindows, EpochSampler, IndexedExamples, Levels, collate
from .packing import StreamedRows, byte_tokenizer, first_tokens, heldout_streams, number_tokenizer, pack, tokenize
from .pixels import load_pixels
from .sources import load_corpus, stream_corpus
from .tasks import TASKS, labelled_rows, load_task, task_facts

__all__ = [
    "TASKS", "CarriedWindows", "EpochSampler", "IndexedExamples", "Levels", "StreamedRows", "byte_tokenizer", "collate",
    "first_tokens", "heldout_streams", "labelled_rows", "load_corpus", "load_pixels", "load_task", "number_tokenizer",
    "pack", "stream_corpus", "task_facts", "tokenize",
]  # fmt: skip

"""Text, synthetic tasks and pixels to rows of tokens to batches."""

from .batching import CarriedWindows, EpochSampler, IndexedExamples, Levels, collate
from .files import load_table, name_of_files
from .instructions import Instructions, check_columns, holds_instructions, padded, tokenize_instructions
from .packing import byte_tokenizer, heldout_streams, number_tokenizer, pack, tokenize
from .pixels import PixelFacts, load_pixels
from .sources import Corpus, load_corpus, stream_corpus
from .streaming import StreamedRows
from .tasks import TASKS, Task, load_task, task_facts

__all__ = [
    "TASKS",
    "CarriedWindows",
    "Corpus",
    "EpochSampler",
    "IndexedExamples",
    "Instructions",
    "Levels",
    "PixelFacts",
    "StreamedRows",
    "Task",
    "byte_tokenizer",
    "check_columns",
    "collate",
    "heldout_streams",
    "holds_instructions",
    "load_corpus",
    "load_pixels",
    "load_table",
    "load_task",
    "name_of_files",
    "number_tokenizer",
    "pack",
    "padded",
    "stream_corpus",
    "task_facts",
    "tokenize",
    "tokenize_instructions",
]

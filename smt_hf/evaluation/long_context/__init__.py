"""Benchmarks of long contexts: RULER, BABILong and SCROLLS, made and scored offline for any tokenizer and length.

Add a task here: write a class with the methods of `Task` in `sample.py`, in a module beside it, and an entry of
`SUITES` in `suites.py`.
"""

from .cache import SampleCache, tokenizer_fingerprint
from .rows import sample_row
from .sample import Count, Needle, Sample, Task
from .scrolls import official
from .settings import LongContextSettings
from .sizing import TooShort
from .suites import SUITES, tasks_of

__all__ = [
    "SUITES",
    "Count",
    "LongContextSettings",
    "Needle",
    "Sample",
    "SampleCache",
    "Task",
    "TooShort",
    "official",
    "sample_row",
    "tasks_of",
    "tokenizer_fingerprint",
]

"""Measurements of speed and memory beside models of about equal size: what `recipes/benchmarks/` runs.

Add a benchmark here: a module with a subclass of `BenchmarkArguments` (its flags) and a function of it that returns
lines, each with the name of the benchmark, the arm and `facts()`; and a script in `recipes/benchmarks/` that parses,
calls, prints and writes.
"""

from .attention import AttentionArguments, train_transformer
from .generation import GenerationArguments, measure_generation
from .long_context import LongContextArguments, measure_long_context
from .long_rows import LongRowsArguments, measure_long_rows
from .memory_wall import MemoryWallArguments, measure_memory_wall
from .results import print_table, write_lines
from .train_step import TrainStepArguments, measure_train_step

__all__ = [
    "AttentionArguments",
    "GenerationArguments",
    "LongContextArguments",
    "LongRowsArguments",
    "MemoryWallArguments",
    "TrainStepArguments",
    "measure_generation",
    "measure_long_context",
    "measure_long_rows",
    "measure_memory_wall",
    "measure_train_step",
    "print_table",
    "train_transformer",
    "write_lines",
]

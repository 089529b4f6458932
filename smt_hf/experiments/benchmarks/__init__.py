"""Measurements of speed and memory beside models of about equal size: what `recipes/benchmarks/` runs."""

from .arguments import parse
from .generation import GenerationArguments, measure_generation
from .long_context import LongContextArguments, measure_long_context
from .memory_wall import MemoryWallArguments, measure_memory_wall
from .results import print_table, write_lines
from .train_step import TrainStepArguments, measure_train_step

__all__ = [
    "GenerationArguments",
    "LongContextArguments",
    "MemoryWallArguments",
    "TrainStepArguments",
    "measure_generation",
    "measure_long_context",
    "measure_memory_wall",
    "measure_train_step",
    "parse",
    "print_table",
    "write_lines",
]

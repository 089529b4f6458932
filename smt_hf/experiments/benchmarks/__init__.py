"""Measurements of speed and memory beside models of about equal size: what `recipes/benchmarks/` runs."""

from .arguments import parse
from .generation import GenerationArguments, measure_generation
from .memory_wall import MemoryWallArguments, measure_memory_wall
from .results import print_table, write_lines

__all__ = [
    "GenerationArguments",
    "MemoryWallArguments",
    "measure_generation",
    "measure_memory_wall",
    "parse",
    "print_table",
    "write_lines",
]

"""Memory and seconds per token over the context: `python recipes/benchmarks/memory_wall.py` (`--help`)."""

import sys
from pathlib import Path

from measurements import MemoryWallArguments, measure_memory_wall, print_table, write_lines
from measurements.figures import plot_memory_wall

from smt_hf.command_line import parse
from smt_hf.recipe import run_to_end


def main() -> None:
    arguments = parse(MemoryWallArguments, sys.argv[1:], __doc__)
    lines = measure_memory_wall(arguments)
    columns = ["arm", "context", "state_bytes", "peak_growth_bytes", "seconds_per_token", "fits", "measured"]
    print_table(lines, columns)
    write_lines(lines, arguments.output)
    if arguments.figure is not None:
        plot_memory_wall(lines, Path(arguments.figure))


if __name__ == "__main__":
    run_to_end(main)

"""Memory and seconds a token over the context: `python recipes/benchmarks/memory_wall.py` (`--help`)."""

import sys
from pathlib import Path

from smt_hf.experiments.benchmarks import MemoryWallArguments, measure_memory_wall, parse, print_table, write_lines
from smt_hf.publishing.benchmark_figures import plot_memory_wall


def main() -> None:
    arguments = parse(MemoryWallArguments, sys.argv[1:], __doc__)
    lines = measure_memory_wall(arguments)
    columns = ["arm", "context", "state_bytes", "peak_growth_bytes", "seconds_per_token", "fits", "measured"]
    print_table(lines, columns)
    write_lines(lines, arguments.output)
    if arguments.figure is not None:
        plot_memory_wall(lines, Path(arguments.figure))


if __name__ == "__main__":
    main()

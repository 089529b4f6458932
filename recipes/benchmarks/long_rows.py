"""Peak memory of training over the length of a row: `python recipes/benchmarks/long_rows.py` (`--help`).

Cells that `--output` has already are not measured again.
"""

import sys
from pathlib import Path

from measurements import LongRowsArguments, measure_long_rows, print_table, write_lines
from measurements.figures import plot_long_rows

from smt_hf.command_line import parse
from smt_hf.publishing.evidence import read_lines
from smt_hf.recipe import run_to_end


def main() -> None:
    arguments = parse(LongRowsArguments, sys.argv[1:], __doc__)
    output = arguments.output
    lines = read_lines(output) if output is not None and Path(output).exists() else []
    for line in measure_long_rows(arguments, list(lines)):
        lines.append(line)
        if output is not None:  # at once: the longest rows take hours on a busy machine
            write_lines([line], output)
    lines = [line for line in lines if line["benchmark"] == "long_rows"]
    print_table(lines, ["arm", "tokens", "peak_growth_bytes", "seconds", "measured", "needs_bytes"])
    if output is None:
        write_lines(lines, None)
    if arguments.figure is not None:
        plot_long_rows(lines, Path(arguments.figure))


if __name__ == "__main__":
    run_to_end(main)

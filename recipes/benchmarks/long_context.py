"""Past the training length: `python recipes/benchmarks/long_context.py --text_students NAME=DIR` (`--help`)."""

import sys
from pathlib import Path

from measurements import LongContextArguments, measure_long_context, print_table, write_lines
from measurements.figures import plot_long_context

from smt_hf.command_line import parse
from smt_hf.recipe import run_to_end


def main() -> None:
    arguments = parse(LongContextArguments, sys.argv[1:], __doc__)
    lines = measure_long_context(arguments)
    for task, score in (("text", "bits_per_byte"), ("retrieval", "accuracy")):
        own = [line for line in lines if line["task"] == task]
        if own:
            print_table(own, ["task", "arm", "position", score, "chance", "n"])
    write_lines(lines, arguments.output)
    if arguments.figure is not None:
        plot_long_context(lines, Path(arguments.figure))


if __name__ == "__main__":
    run_to_end(main)

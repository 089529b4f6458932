"""FLOPs, memory and communication of a step on paper, from 10M to 7B: `python recipes/benchmarks/cost_model.py`."""

import sys

from measurements.cost_model import CostModelArguments, cost_lines, cost_table
from measurements.results import write_lines

from smt_hf.command_line import parse
from smt_hf.recipe import run_to_end


def main() -> None:
    arguments = parse(CostModelArguments, sys.argv[1:], __doc__)
    lines = cost_lines(arguments)
    print(cost_table(lines))
    if arguments.output:
        write_lines(lines, arguments.output)


if __name__ == "__main__":
    run_to_end(main)

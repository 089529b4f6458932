"""FLOPs, memory and communication of a step on paper, from 10M to 7B, and those of converting a language model:
`python recipes/benchmarks/cost_model.py`."""

import sys

from measurements.conversion_cost import conversion_lines, conversion_table
from measurements.cost_model import CostModelArguments, cost_lines, cost_table
from measurements.results import write_lines

from smt_hf.command_line import parse
from smt_hf.recipe import run_to_end


def main() -> None:
    arguments = parse(CostModelArguments, sys.argv[1:], __doc__)
    lines, conversions = cost_lines(arguments), conversion_lines(arguments)
    print(f"{cost_table(lines)}\n\n{conversion_table(conversions)}")
    if arguments.output:
        write_lines([*lines, *conversions], arguments.output)


if __name__ == "__main__":
    run_to_end(main)

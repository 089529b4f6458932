"""Generated tokens per second of the student, Mamba and RWKV: `python recipes/benchmarks/generate.py` (`--help`)."""

import sys

from measurements import GenerationArguments, measure_generation, print_table, write_lines

from smt_hf.command_line import parse
from smt_hf.recipe import run_to_end


def main() -> None:
    arguments = parse(GenerationArguments, sys.argv[1:], __doc__)
    lines = measure_generation(arguments)
    print_table(lines, ["arm", "batch_size", "tokens_per_second", "seconds", "parameters", "error"])
    write_lines(lines, arguments.output)


if __name__ == "__main__":
    run_to_end(main)

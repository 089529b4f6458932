"""A Transformer of a student's size on documents with questions, for `recipes/evaluate.py` to compare.

`python recipes/benchmarks/train_transformer.py --documents niah_single_1 --haystack books --folder runs/llama`; with
`--window 256` attention reaches back as many tokens in each layer.
"""

import sys

from measurements import AttentionArguments, print_table, train_transformer, write_lines

from smt_hf.command_line import parse
from smt_hf.recipe import run_to_end


def main() -> None:
    arguments = parse(AttentionArguments, sys.argv[1:], __doc__)
    line = train_transformer(arguments)
    print_table([line], ["arm", "difficulty", "accuracy", "chance", "seconds", "steps", "parameters"])
    write_lines([line], arguments.output)


if __name__ == "__main__":
    run_to_end(main)

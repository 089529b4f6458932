"""Long-context scores: `python recipes/evaluate.py --checkpoint DIR_OR_REPO --suite ruler --output FILE` (`--help`)."""

import sys
from pathlib import Path

from smt_hf.experiments.long_context import evaluate, parse_evaluate
from smt_hf.experiments.long_context_card import add_to_card
from smt_hf.publishing.evidence import read_lines
from smt_hf.publishing.long_context_report import render_long_context
from smt_hf.recipe import run_to_end


def main() -> None:
    arguments, settings = parse_evaluate(sys.argv[1:])
    output = Path(str(arguments.output))
    if arguments.report:
        lines = read_lines(output)
        for path in render_long_context(lines, output.stem, output.parent, arguments.against):
            print(path)
        if arguments.card:
            print(add_to_card(arguments.card, lines))
        return
    for _ in evaluate(arguments, settings):
        pass


if __name__ == "__main__":
    run_to_end(main)

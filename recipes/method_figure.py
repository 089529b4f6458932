"""Draw the picture of the method: `python recipes/method_figure.py --output method.png`."""

import sys

from smt_hf.command_line import parse
from smt_hf.publishing.method_figure import MethodFigureArguments, plot_method
from smt_hf.recipe import run_to_end


def main() -> None:
    usage = "usage: python recipes/method_figure.py [--output FILE.png] [--overwrite]"
    print(f"written: {plot_method(**vars(parse(MethodFigureArguments, sys.argv[1:], usage)))}")


if __name__ == "__main__":
    run_to_end(main)

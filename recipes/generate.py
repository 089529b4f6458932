"""Continue a prompt with a checkpoint: `python recipes/generate.py --checkpoint DIR_OR_REPO --prompt 'def main('`."""

import sys

from smt_hf.experiments.continuation import continue_text, parse_generate
from smt_hf.recipe import run_to_end


def main() -> None:
    continue_text(parse_generate(sys.argv[1:]))


if __name__ == "__main__":
    run_to_end(main)

"""Let a checkpoint go on from a prompt: `python recipes/generate.py --checkpoint DIR_OR_REPO --prompt 'def main('`."""

import sys

from smt_hf.experiments.continuation import continue_text, parse_generate


def main() -> None:
    continue_text(parse_generate(sys.argv[1:]))


if __name__ == "__main__":
    main()

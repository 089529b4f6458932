"""Pretrain a recurrent language model: `accelerate launch recipes/pretrain.py` (`--help` lists every flag)."""

import sys

from smt_hf.experiments import parse_run, pretrain
from smt_hf.recipe import run_to_end


def main() -> None:
    pretrain(parse_run(sys.argv[1:]))


if __name__ == "__main__":
    run_to_end(main)

"""Pretrain a recurrent language model: `accelerate launch recipes/pretrain.py` (`--help` lists every flag)."""

import sys

from smt_hf.experiments import parse_run, pretrain
from smt_hf.training.launch import run_to_end


def main() -> None:
    parsed = parse_run(sys.argv[1:])
    run_to_end(pretrain, parsed.run, parsed.phases, parsed.student, parsed.teacher, parsed.rival)


if __name__ == "__main__":
    main()

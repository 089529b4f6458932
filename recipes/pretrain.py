"""Pretrain a recurrent language model: `accelerate launch recipes/pretrain.py` (`--help` lists every flag)."""

import sys

from accelerate import PartialState

from smt_hf.command_line import parse_run
from smt_hf.experiments import pretrain


def main() -> None:
    parsed = parse_run(sys.argv[1:])
    pretrain(parsed.run, parsed.phases, parsed.student, parsed.teacher, parsed.rival)
    PartialState().destroy_process_group()  # its threads would abort a process that ends before them


if __name__ == "__main__":
    main()

"""Fine-tune a checkpoint on a text or on instructions: `accelerate launch recipes/finetune.py` (see `--help`)."""

import sys

from accelerate import PartialState

from smt_hf.command_line import parse_finetune
from smt_hf.experiments import finetune


def main() -> None:
    finetune(*parse_finetune(sys.argv[1:]))
    PartialState().destroy_process_group()  # its threads would abort a process that ends before them


if __name__ == "__main__":
    main()

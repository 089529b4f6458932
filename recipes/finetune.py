"""Fine-tune a checkpoint on a text or on instructions: `accelerate launch recipes/finetune.py` (see `--help`)."""

import sys

from smt_hf.command_line import parse_finetune, run_to_end
from smt_hf.experiments import finetune


def main() -> None:
    run_to_end(finetune, *parse_finetune(sys.argv[1:]))


if __name__ == "__main__":
    main()

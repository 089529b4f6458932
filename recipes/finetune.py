"""Fine-tune a checkpoint on a text or on instructions: `accelerate launch recipes/finetune.py` (see `--help`)."""

import sys

from smt_hf.experiments.finetuning import finetune, parse_finetune
from smt_hf.recipe import run_to_end


def main() -> None:
    finetune(*parse_finetune(sys.argv[1:]))


if __name__ == "__main__":
    run_to_end(main)

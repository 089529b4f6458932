"""Supervised transitions per second, ours beside SMT as published and BPTT: `python recipes/benchmarks/train_step.py`.

The paper's sizes: `--hidden_size 256 --num_memory_tokens 16 --num_hidden_layers 8 --num_readout_layers 4
--num_attention_heads 8 --teacher_hidden_size 256 --teacher_layers 8 --teacher_heads 8 --context_length 256
--future_length 64 --batch_size 128`.
"""

import sys

from measurements import print_table, write_lines
from measurements.train_step import TrainStepArguments, measure_train_step

from smt_hf.command_line import parse
from smt_hf.recipe import run_to_end


def main() -> None:
    arguments = parse(TrainStepArguments, sys.argv[1:], __doc__)
    lines = measure_train_step(arguments)
    columns = ["arm", "transitions_per_second", "milliseconds_per_step", "ratio_to_published", "peak_memory_mb"]
    columns += ["seconds_to_loss", "loss", "student_loss", "parameters", "teacher_parameters", "error"]
    print_table(lines, columns)
    write_lines(lines, arguments.output)


if __name__ == "__main__":
    run_to_end(main)

"""Run, resume or report a grid of runs: `python recipes/experiment.py --config recipes/probes.yaml [--report]`."""

import sys

from smt_hf.experiments.grid import run_grid
from smt_hf.experiments.grid_file import parse_grid
from smt_hf.publishing.evidence import read_lines
from smt_hf.publishing.report import render_report
from smt_hf.recipe import run_to_end


def main() -> None:
    parsed = parse_grid(sys.argv[1:])
    if parsed.report:
        for path in render_report(read_lines(parsed.output), parsed.output.stem, parsed.output.parent):
            print(path)
        return
    for _ in run_grid(parsed.runs, parsed.output, parsed.jobs, parsed.students):
        pass


if __name__ == "__main__":
    run_to_end(main)

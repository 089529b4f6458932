"""Run, resume or report a grid of runs: `python recipes/experiment.py --config recipes/probes.yaml [--report]`."""

import sys
from pathlib import Path

from smt_hf.experiments.grid import run_grid
from smt_hf.experiments.grid_file import parse_grid
from smt_hf.publishing.report import read_lines, render_report


def main() -> None:
    parsed = parse_grid(sys.argv[1:])
    output = Path(parsed.output)
    if parsed.report:
        for path in render_report(read_lines(output), output.stem, output.parent):
            print(path)
        return
    for _ in run_grid(parsed.runs, output, parsed.jobs):
        pass


if __name__ == "__main__":
    main()

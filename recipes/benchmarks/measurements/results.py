"""Results as JSON lines and as a table."""

import json

from smt_hf.publishing.evidence import append_lines
from smt_hf.publishing.provenance import run_facts


def facts(num_threads: int) -> dict:
    """What every line says about where its numbers come from. Benchmarks run on the CPU, whatever else there is."""
    return {**run_facts(num_threads), "device": "cpu"}


def write_lines(lines: list[dict], output: str | None) -> None:
    """Append the lines to the file `output`; print them without one."""
    if output is None:
        print("".join(json.dumps(line) + "\n" for line in lines), end="")
    else:
        append_lines(lines, output)


def print_table(lines: list[dict], columns: list[str]) -> None:
    """The named fields of the lines, aligned; numbers with four significant digits, whole ones in full."""

    def cell(value) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, int):
            return f"{value:,}"
        return "" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value)

    rows = [columns] + [[cell(line[column]) for column in columns] for line in lines]
    aligned = []
    for index, column in enumerate(columns):
        width = max(len(row[index]) for row in rows)
        left = any(isinstance(line[column], str) for line in lines)
        aligned.append([row[index].ljust(width) if left else row[index].rjust(width) for row in rows])
    for row in zip(*aligned):
        print("  ".join(row).rstrip())

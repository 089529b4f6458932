"""Send a student to the Hub: `python recipes/publish.py --checkpoint DIR --repo_id USER/NAME [--dry_run]`."""

import sys

from smt_hf.command_line import parse
from smt_hf.publishing.hub import PublishArguments, publish
from smt_hf.recipe import run_to_end


def main() -> None:
    usage = "usage: python recipes/publish.py --checkpoint DIR --repo_id USER/NAME [--dry_run] [--flag ...]"
    arguments = vars(parse(PublishArguments, sys.argv[1:], usage))
    print(publish(arguments.pop("checkpoint"), **arguments))


if __name__ == "__main__":
    run_to_end(main)

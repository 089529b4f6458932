"""Send a student to the Hub: `python recipes/publish.py --checkpoint DIR --repo_id USER/NAME [--dry_run]`."""

import sys

from smt_hf.publishing.hub import parse_publish, publish
from smt_hf.recipe import run_to_end


def main() -> None:
    arguments = vars(parse_publish(sys.argv[1:]))
    print(publish(arguments.pop("checkpoint"), **arguments))


if __name__ == "__main__":
    run_to_end(main)

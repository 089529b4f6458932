"""lm-eval's command with our model and tasks: `python -m smt_hf.evaluation.harness run --model smt_rnn ...`."""

import sys

from smt_hf.errors import InputError

from . import TASK_FOLDER


def main() -> None:
    """Run lm-eval's command line; bad input ends it with one line and exit status 2, as in our recipes."""
    from lm_eval.__main__ import cli_evaluate

    from . import model  # noqa: F401, the import registers it

    if not any(word.startswith("--include_path") for word in sys.argv):
        sys.argv += ["--include_path", str(TASK_FOLDER)]
    try:
        cli_evaluate()
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()

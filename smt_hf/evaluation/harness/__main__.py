"""lm-eval's command with our model and tasks: `python -m smt_hf.evaluation.harness run --model smt_rnn ...`."""

import sys

from . import TASK_FOLDER


def main() -> None:
    """Run lm-eval's command line."""
    from lm_eval.__main__ import cli_evaluate

    from . import model  # noqa: F401, the import registers it

    if not any(word.startswith("--include_path") for word in sys.argv):
        sys.argv += ["--include_path", str(TASK_FOLDER)]
    cli_evaluate()


if __name__ == "__main__":
    main()

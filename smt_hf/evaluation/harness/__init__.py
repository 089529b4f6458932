"""Our long-context samples and our way of reading in lm-eval, which comes with the extra `eval`.

`python -m smt_hf.evaluation.harness` is lm-eval's own command, with the model `smt_rnn` and the tasks of the folder
`tasks` beside those it has. The same from Python: import `model`, and give `TASK_FOLDER` to lm-eval's
`TaskManager(include_path=...)`, `--include_path` on a command line.

| module | what is in it |
|---|---|
| `model.py` | the model class `smt_rnn`: state carried through any length, an error where stock lm-eval would cut |
| `documents.py` | samples of the suites as documents of lm-eval's tasks, and their score |
"""

from pathlib import Path

TASK_FOLDER = Path(__file__).with_name("tasks")

__all__ = ["TASK_FOLDER"]

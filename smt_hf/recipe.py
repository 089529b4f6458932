"""How the program of a recipe ends: what its exit status is and what it prints last."""

import atexit
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState

from smt_hf.errors import InputError
from smt_hf.training.stopping import Interrupted

# Seconds in which the launcher ends the other processes after the first one has reported the same error.
_HEAD_START = 5.0


def run_to_end(main: Callable[[], object]) -> None:
    """Call a recipe's `main`, parsing included, and end the process as a shell expects.

    - Bad input (`InputError`): one line `error: ...` on the standard error of the first process, exit status 2.
    - A signal that training has answered with a checkpoint: 128 + its number.
    - Any other exception is a bug and keeps its traceback.
    """
    code = 0
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # without a line of source code
    try:
        main()
    except BrokenPipeError:  # the reader of the output has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except InputError as error:
        rank = int(os.environ.get("RANK", "0"))
        sys.stdout.flush()
        if rank:  # the other processes find the same error, or are ended by the launcher
            time.sleep(_HEAD_START)
        message = " ".join(str(error).split())
        if "TORCHELASTIC_ERROR_FILE" in os.environ:  # then the launcher, which has much to say of its own, ends with it
            content = json.dumps({"message": message, "timestamp": int(time.time())})
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(content)
        print(f"error: {f'process {rank}: ' if rank else ''}{message}", file=sys.stderr, flush=True)
        code = 2
    except Interrupted as stopped:
        if PartialState().is_main_process:
            print(f"\n{stopped}", flush=True)
        code = 128 + stopped.signal_number
    if torch.distributed.is_available() and torch.distributed.is_initialized():  # of one process, too
        # A wrapped model keeps Gloo's threads alive after its group is destroyed, and one that lets go of a Python
        # tensor while the interpreter shuts down aborts the process (pytorch/pytorch#179291): end before it does.
        if code != 2:  # the other processes may wait for this one in a collective
            PartialState().destroy_process_group()
            threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        raise SystemExit(code)

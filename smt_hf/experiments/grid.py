"""A grid of runs: every task at every difficulty by every arm under every seed, one JSON line per arm.

Lines are appended as each run ends, so that a grid can be cut off and resumed; the report is made from them alone.
"""

import concurrent.futures
import contextlib
import multiprocessing
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from tqdm.auto import tqdm

from smt_hf.errors import InputError
from smt_hf.publishing.evidence import append_lines, read_lines
from smt_hf.publishing.scores import metric_of

from .grid_run import Run, train_run
from .run_folder import locked


def is_done(run: Run, lines: list[dict]) -> bool:
    """Whether the last line of the run is among `lines`.

    Raises:
        InputError: it is, with other settings.
    """
    names = ("task", "asked_difficulty", "run", "seed", "group", "variant")
    for line in lines:
        if line.get("is_last") and tuple(line.get(name) for name in names) == run.key():
            if line.get("settings_digest", run.digest()) != run.digest():
                raise InputError(
                    f"the lines of {run.key()} come from other settings than the grid has now: take its old lines out "
                    "of the file, or name another `--output`."
                )
            return True
    return False


def run_grid(runs: list[Run], output: Path, jobs: int = 1) -> Iterator[list[dict]]:
    """Train what is not yet in `output`, `jobs` at a time, and append the lines of each run as it ends.

    Yields the lines of each run.

    Raises:
        InputError: another process writes to `output`; it holds something else, or lines of other settings.
    """
    with locked(output.parent, f".{output.name}.lock"):
        done = read_lines(output) if output.exists() else []
        waiting = [run for run in runs if not is_done(run, done)]
        with tqdm(total=len(runs), initial=len(runs) - len(waiting), desc=output.stem, dynamic_ncols=True) as bar:
            for lines in _trained(waiting, jobs):
                append_lines(lines, output)
                bar.update()
                tqdm.write("; ".join(_short(line) for line in lines))
                yield lines


def _trained(runs: list[Run], jobs: int) -> Iterator[list[dict]]:
    """The lines of each run, in the order in which the runs end.

    Workers are processes of their own, with no more threads than a run has, and with cores of their own where there are
    enough: two timed runs on one core would each take the other's seconds.
    """
    if not runs:
        return
    context = multiprocessing.get_context("spawn")
    num_threads = max(run.num_threads for run in runs)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(num_threads)
    slots = context.Queue()
    for slot in range(jobs):
        slots.put(slot)
    with concurrent.futures.ProcessPoolExecutor(
        jobs, context, initializer=_settle, initargs=(slots, jobs, num_threads)
    ) as pool:
        futures = {pool.submit(_train_quietly, run): run for run in runs}
        for future in concurrent.futures.as_completed(futures):
            try:
                yield future.result()
            except Exception:
                tqdm.write(f"failed: {futures[future].key()}")
                for other in futures:
                    other.cancel()
                raise


def _settle(slots, jobs: int, num_threads: int) -> None:
    """Give a worker cores of its own, and let it end with the process that started it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        slot = slots.get()
        if jobs * num_threads <= len(cores):
            os.sched_setaffinity(0, cores[slot * num_threads : (slot + 1) * num_threads])


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # a worker of a grid that was killed would go on training beside the next one


def _train_quietly(run: Run) -> list[dict]:
    with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
        return train_run(run)


def _short(line: dict) -> str:
    metric = metric_of(line)
    value = line[metric]
    named = f"{line['task']} {line['difficulty']} {line['arm']} seed {line['seed']}"
    named += f" [{line['variant']}]" if line.get("variant") else ""
    return f"{named}: {metric} {'diverged' if value is None else f'{value:.3f}'} after {line['wall_clock_s']:.0f} s"

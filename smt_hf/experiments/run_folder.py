"""The folder of a run: who may write in it, and what the run in it was started with."""

import contextlib
import datetime
import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smt_hf.command_line import argument
from smt_hf.errors import InputError
from smt_hf.publishing.export import write_json

RESULTS = "eval_results.json"
RUN = "run.json"
LOCK = ".lock"
_RIVAL = "compare_bptt"
# What a run leaves in its folder, and `--overwrite_output_dir` removes.
_OF_A_RUN = re.compile(
    r"(smt|dmt|bptt)(_\d+)?|student|teacher|adapter|compare_bptt|run\.json|eval_results\.json"
    r"|curves\.png|loss_by_position\.png|drift_by_age\.png"
)
# Descriptors of the locks of this process. A lock would live as long as any forked child that has inherited it.
_held: set[int] = set()


@dataclass
class RunArguments:
    """What all runs that write a folder have among their arguments."""

    config: str | None = argument(None, "YAML file with any of these arguments; flags override it.")
    output_dir: str = argument("runs/pretrain", "Folder for everything that the run writes.")
    lora_r: int = argument(8, "Rank of the LoRA layers. Not searched.")
    lora_alpha: int = argument(16, "The LoRA update is scaled by `lora_alpha / lora_r`. Not searched.")
    lora_parts: str = argument("updater,readout", "Parts with LoRA layers: updater, readout, or both.")
    license: str | None = argument(None, "Licence that the model card names, for example apache-2.0; default: none.")
    seed: int = argument(0, "Seed of all random numbers.")
    overwrite_output_dir: bool = argument(False, "Remove what an earlier run has left in `output_dir`.")
    resume_from_checkpoint: Any = argument(False, "Continue from the newest complete checkpoint of the run.")
    num_threads: int | None = argument(None, "Threads per process; default: OMP_NUM_THREADS or cores / processes.")


def check_output_dir(run: RunArguments) -> None:
    """Refuse a folder that holds anything, unless the run is to go on in it or to start over.

    Raises:
        InputError: what to pass instead; or another run writes in the folder, or nobody can.
    """
    folder = Path(run.output_dir)
    if run.overwrite_output_dir and run.resume_from_checkpoint:
        raise InputError("pass either `--overwrite_output_dir` or `--resume_from_checkpoint`, not both.")
    check_writable("output_dir", folder)
    with contextlib.suppress(FileNotFoundError), (folder / LOCK).open() as file:
        if not _try_lock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB):  # shared: all processes of a run look at once
            raise InputError(_in_use(folder, LOCK))
    if folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
        if not (run.overwrite_output_dir or run.resume_from_checkpoint):
            raise InputError(
                f"`output_dir` {folder} is not empty: pass `--resume_from_checkpoint` to go on, "
                "`--overwrite_output_dir` to start over, or another folder."
            )
    elif run.resume_from_checkpoint:
        raise InputError(f"there is no run to resume in {folder}.")


def check_writable(name: str, folder: Path) -> None:
    """Raises:
    InputError: the folder that the flag `name` asks for can neither be made nor written.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"`{name}` {folder} cannot be made: {there} is a file. Name another folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"`{name}` {folder} cannot be written: {there} may not be written to by this user.")


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _in_use(folder: Path, name: str) -> str:
    place = folder / name.removeprefix(".").removesuffix("lock").removesuffix(".")
    try:
        holder = json.loads((folder / name).read_text())
        where = "" if holder["host"] == socket.gethostname() else f" on {holder['host']}"
        by = f"PID {holder['pid']}{where} since {holder['since']}"
    except (OSError, ValueError):
        by = "another process"
    return f"{place} is in use by {by}: wait until it has ended, or name another place."


@contextlib.contextmanager
def locked(folder: Path, name: str = LOCK, waits: bool = False) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if it is missing, until the context or the process ends.

    Args:
        folder: the folder to write in.
        name: of the lock file; `.NAME.lock` for a lock on the one file NAME of the folder.
        waits: wait for a process that holds the lock, instead of refusing.

    Raises:
        InputError: another process holds the lock, or the folder cannot be made.
    """
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise InputError(f"{folder} cannot be written: {error.strerror}. Name another folder.") from error
        if not _try_lock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB)):
            os.close(descriptor)
            raise InputError(_in_use(folder, name))
        with contextlib.suppress(FileNotFoundError):  # the last holder has removed the file if it was waited for
            if os.path.samestat(os.stat(folder / name), os.fstat(descriptor)):
                break
        os.close(descriptor)
    _held.add(descriptor)
    since = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode())
    try:
        yield
    finally:
        (folder / name).unlink(missing_ok=True)
        _held.discard(descriptor)
        os.close(descriptor)


def _let_go() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def writing(run: RunArguments, settings: dict) -> Iterator[None]:
    """Around everything that a run writes, on its first process: the folder is locked, cleared if it is to be
    overwritten, and `run.json` says what the run was started with. Bad input that is found inside before the first
    checkpoint leaves no new folder behind.

    Args:
        settings: everything that changes the result.

    Raises:
        InputError: the folder is in use, or a run to be resumed was started with other settings.
    """
    folder = Path(run.output_dir)
    is_new = not folder.exists() or not any(path.name != LOCK for path in folder.iterdir())
    try:
        with locked(folder):
            if run.resume_from_checkpoint:
                settings = same_run(folder / RUN, settings)
            elif run.overwrite_output_dir:
                _remove(path for path in folder.iterdir() if _OF_A_RUN.fullmatch(path.name))
            write_json(settings, folder / RUN)
            try:
                yield
            except InputError:
                if is_new and not any(folder.rglob("checkpoint-*")):
                    _remove(path for path in folder.iterdir() if path.name != LOCK)
                raise
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it holds something, or was never made
                folder.rmdir()


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def same_run(path: Path, settings: dict) -> dict:
    """The settings of a resumed run, which must be those that it was started with. `compare_bptt` may be added, and
    `max_skipped_steps` of a phase may be another one, so that a run goes on that ended for it.

    Args:
        path: of `run.json`.

    Raises:
        InputError: every difference.
    """
    if not path.exists():
        raise InputError(f"the run in {path.parent} cannot be resumed: {path.name} is missing. Start over.")
    try:
        earlier, now = json.loads(path.read_text()), json.loads(json.dumps(settings))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is damaged ({error}): restore it, or start over.") from error
    both = {**earlier, **now}
    old, new = (_flat({_RIVAL: both.get(_RIVAL), **part}) for part in (earlier, now))
    names = (name for name in sorted(old.keys() | new) if not name.endswith("max_skipped_steps"))
    changed = [name for name in names if old.get(name) != new.get(name)]
    if changed:
        shown = [f"{name}: {old.get(name, 'default')} then, {new.get(name, 'default')} now" for name in changed[:8]]
        shown += [f"and {len(changed) - 8} more"] if changed[8:] else []
        raise InputError(
            f"the run in {path.parent} was started with other arguments ({', '.join(shown)}): resume it with the same."
        )
    return both


def _flat(settings, prefix: str = "") -> dict:
    """Nested settings under dotted names."""
    items = enumerate(settings) if isinstance(settings, list) else settings.items()
    flat: dict = {}
    for name, value in items:
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict | list) else {f"{prefix}{name}": value}
    return flat

"""Checkpoints that are complete or absent: written aside, synced, listed with sizes and hashes, then renamed."""

import hashlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path

from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from smt_hf.errors import InputError

_ASIDE = ".unfinished"
_CONTENTS = "contents.json"


def aside(run_dir: str | Path) -> Path:
    """The folder in which a checkpoint of `run_dir` is written before it gets its name."""
    return Path(run_dir) / _ASIDE


def publish_checkpoint(written: Path, name: Path) -> None:
    """Give a finished checkpoint its name. After it, the checkpoint survives a power cut; before it, there is none.

    Args:
        written: the folder in `aside(...)`.
        name: what it is to be called; a folder of that name is replaced.
    """
    files = sorted(path for path in written.rglob("*") if path.is_file())
    listed = {path.relative_to(written).as_posix(): [path.stat().st_size, _hash(path)] for path in files}
    contents = written / _CONTENTS
    contents.write_text(json.dumps(listed, indent=1) + "\n")
    for path in [*files, contents, *(folder for folder in written.rglob("*") if folder.is_dir()), written]:
        _sync(path)
    if name.exists():
        replaced = written.parent / (name.name + ".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        name.rename(replaced)
    written.rename(name)
    _sync(name.parent)
    shutil.rmtree(written.parent, ignore_errors=True)


def _hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():  # some file systems do not sync folders
            raise
    finally:
        os.close(descriptor)


def what_is_missing(checkpoint: str | Path) -> str | None:
    """Why a checkpoint is not complete, in words; `None` if it is."""
    path = Path(checkpoint)
    if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name) is None or not path.is_dir():
        return f"it is no folder named {PREFIX_CHECKPOINT_DIR}-N"
    try:
        listed = json.loads((path / _CONTENTS).read_text())
    except (OSError, ValueError):
        return f"its list of files ({_CONTENTS}) is missing"
    for name, entry in listed.items():
        size, digest = entry if isinstance(entry, list) else (entry, None)  # older checkpoints list sizes alone
        file = path / name
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} of {size:,} bytes"
        if digest is not None and _hash(file) != digest:
            return f"the bytes of {name} are not those that were written"
    return None


def newest_checkpoint(folder: str | Path) -> str | None:
    """The complete checkpoint of a phase with the highest step, or `None`. Damaged ones are named in a warning."""
    for path in sorted(Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=step_of, reverse=True):
        problem = what_is_missing(path)
        if problem is None:
            return str(path)
        warnings.warn(f"skipped the checkpoint {path}: {problem}.", stacklevel=2)
    return None


def step_of(path: Path) -> int:
    """The optimiser step that a checkpoint's name says, -1 for other names."""
    number = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdigit() else -1


class CheckpointingTrainer(Trainer):
    """A Trainer whose checkpoints are complete or absent, whatever cuts a save off."""

    _is_saving = False

    def _get_output_dir(self, trial) -> str:
        """Where checkpoints are written: aside while one is being saved."""
        run_dir = super()._get_output_dir(trial)
        return str(aside(run_dir)) if self._is_saving else run_dir

    def _save_checkpoint(self, model, trial) -> None:
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        written = aside(run_dir) / name
        if self.args.should_save:
            shutil.rmtree(aside(run_dir), ignore_errors=True)
        self.accelerator.wait_for_everyone()
        # What is sent to the Hub is sent from a checkpoint that has its name.
        pushes, self.args.push_to_hub = self.args.push_to_hub, False
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            self._name_best(run_dir, written)
            if self.args.should_save:
                publish_checkpoint(written, run_dir / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(aside(run_dir), ignore_errors=True)
            last = newest_checkpoint(run_dir)
            raise RuntimeError(
                f"{run_dir / name} could not be saved: {error}. Its parts have been removed; the newest complete "
                f"checkpoint is {last or 'none yet'}. Pass `--resume_from_checkpoint` to go on; make room first if the "
                "disk is full."
            ) from error
        finally:
            self._is_saving, self.args.push_to_hub = False, pushes
        if pushes:
            self._push_from_checkpoint(str(run_dir / name))
        if self.args.should_save:
            rotate_checkpoints(
                str(run_dir), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )
        self.accelerator.wait_for_everyone()

    def _name_best(self, run_dir: Path, written: Path) -> None:
        """transformers looks for the best checkpoint beside the one it writes, which is aside; its place is here."""
        if not self.state.best_global_step:
            return
        best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best.exists() or self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As in transformers; `True` goes on from the newest checkpoint that is complete.

        Raises:
            InputError: the named checkpoint is damaged, or there is none.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise InputError(f"there is no complete checkpoint in {self.args.output_dir}: train without resuming.")
        elif resume_from_checkpoint:
            problem = what_is_missing(resume_from_checkpoint)
            if problem is not None:
                raise InputError(f"{resume_from_checkpoint} is not a complete checkpoint: {problem}.")
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

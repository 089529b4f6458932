"""Memory labels of a frozen teacher on disk: computed once per row, read in every later epoch."""

import hashlib
import json
import os
import socket
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel


class LabelCache:
    """`(num_rows, S, K, D)` float32 in a memory-mapped file, and which rows are there; the processes of a machine
    share it, machines do not.

    The file is named by a hash of teacher, rows and settings: another teacher or other data have another file.

    Args:
        folder: where it lies; made if it is missing.
        teacher: its weights are part of the name.
        rows: the training rows, likewise.
        shape: `(S, K, D)`, of one row's labels.
        settings: what else they follow from.
    """

    def __init__(
        self, folder: str | Path, teacher: PreTrainedModel, rows, shape: tuple[int, ...], settings: tuple = ()
    ):
        digest = hashlib.sha256(repr((len(rows), shape, settings, socket.gethostname())).encode())
        digest.update(json.dumps(teacher.config.to_dict(), sort_keys=True, default=str).encode())
        for name, value in sorted(teacher.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        digest.update(_fingerprint(rows))
        self.path = Path(folder) / f"labels-{digest.hexdigest()[:16]}.npy"
        self.num_rows, self.shape = len(rows), (len(rows), *shape)
        Path(folder).mkdir(parents=True, exist_ok=True)

    def open(self, creates: bool) -> None:
        """To be called by one process of a machine with `creates`, then by the others without."""
        filled = self.path.with_suffix(".filled.npy")
        if creates and not filled.exists():
            np.lib.format.open_memmap(self.path, "w+", np.float32, self.shape).flush()
            _occupy(self.path)
            np.lib.format.open_memmap(filled, "w+", np.bool_, (self.num_rows,)).flush()
        self._labels = np.load(self.path, mmap_mode="r+")
        self._filled = np.load(filled, mmap_mode="r+")

    def get(self, numbers: torch.Tensor) -> torch.Tensor | None:
        """Labels `(B, S, K, D)` of the rows of examples `(B,)`, or `None` if one of them is missing."""
        places = (numbers % self.num_rows).cpu().numpy()
        return torch.from_numpy(self._labels[places]) if self._filled[places].all() else None

    def put(self, numbers: torch.Tensor, labels: torch.Tensor) -> None:
        """Write the labels to the disk, and only then mark the rows as present: a killed run marks no missing row."""
        places = (numbers % self.num_rows).cpu().numpy()
        self._labels[places] = labels.detach().float().cpu().numpy()
        self._labels.flush()
        self._filled[places] = True


def _occupy(path: Path) -> None:
    """Allocate the whole file now: a full disk would otherwise kill the process at a later write to the mapping."""
    if not hasattr(os, "posix_fallocate"):
        return
    size = path.stat().st_size
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink()
        raise RuntimeError(
            f"`label_cache_dir` needs {size / 1e9:.2f} GB in {path.parent}: {error.strerror}."
        ) from error


def _fingerprint(rows) -> bytes:
    """What tells these rows from others: that of `datasets`, or their tokens."""
    if hasattr(rows, "_fingerprint"):
        return rows._fingerprint.encode()
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.asarray(row["input_ids"], dtype=np.int64).tobytes())
    return digest.digest()

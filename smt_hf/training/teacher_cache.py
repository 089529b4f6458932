"""What a language model says of rows, on disk: written once, read by every phase and run that asks the same of it.

Shapes: N different rows, S = T + 1 positions of a row (0 .. T tokens read), E width of the hidden states of all chosen
layers side by side, k likeliest tokens, V vocabulary.
"""

import functools
import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from smt_hf.data.batching import collate, rows_at
from smt_hf.errors import InputError
from smt_hf.teachers import NextTokens, SMTPretrainedTeacher, SMTPretrainedTeacherConfig
from smt_hf.teachers.loading import describe
from smt_hf.teachers.weight_files import commit_of, dtype_of_weights

from .teacher_labels import CachedRows

_READ = ("input_ids", "attention_mask", "document_ids")  # what the teacher reads of a row
_AT_A_TIME = 1024  # rows that are hashed at a time
_WEIGHTS = ("*.safetensors", "*.bin")  # the first kind that is there is loaded


class RowArrays:
    """Memory-mapped arrays with a row per row of data, and which rows are there.

    Args:
        folder: of these arrays alone, named after all that they follow from.
        num_rows: N.
        shapes: name -> shape and type of one row.
    """

    def __init__(self, folder: Path, num_rows: int, shapes: dict[str, tuple[tuple[int, ...], Any]]):
        self.folder, self.num_rows, self.shapes = folder, num_rows, shapes
        self.arrays: dict[str, np.ndarray] = {}
        self.filled: np.ndarray = np.zeros(num_rows, dtype=bool)

    @property
    def num_bytes(self) -> int:
        return self.num_rows * sum(
            int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in self.shapes.values()
        )

    def create(self) -> None:
        """Make the files unless they are there: whole, or not at all. To be called by one process of a machine.

        Raises:
            InputError: the disk has too little room, or the folder cannot be written.
        """
        if self.folder.exists():
            return
        aside = self.folder.with_name(f"{self.folder.name}.{os.getpid()}.new")
        try:
            aside.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(aside).free
            if free < self.num_bytes:
                raise InputError(
                    f"`teacher_cache_dir` needs {self.num_bytes / 1e9:.3f} GB in {self.folder.parent}, which has "
                    f"{free / 1e9:.3f} GB left: make room, name another folder, or leave it out."
                )
            for name, (shape, kind) in [*self.shapes.items(), ("filled", ((), np.bool_))]:
                array = np.lib.format.open_memmap(aside / f"{name}.npy", "w+", kind, (self.num_rows, *shape))
                array.flush()
                with (aside / f"{name}.npy").open("r+b") as file:
                    # The whole file now: a full disk would otherwise kill a process that writes to the mapping.
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            aside.rename(self.folder)
        except OSError as error:
            if self.folder.exists():  # another run has been faster
                return
            raise InputError(
                f"`teacher_cache_dir` {self.folder.parent} cannot be written: {error.strerror}."
            ) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def open(self) -> None:
        """Map the files, which are there."""
        self.arrays = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r+") for name in self.shapes}
        self.filled = np.load(self.folder / "filled.npy", mmap_mode="r+")

    def put(self, places: np.ndarray, values: dict[str, np.ndarray]) -> None:
        """Write rows to the disk, and only then mark them as present: a killed run marks no missing row."""
        for name, value in values.items():
            self.arrays[name][places] = value
            self.arrays[name].flush()  # type: ignore[attr-defined]
        self.filled[places] = True


class TeacherCache:
    """Hidden states of the chosen layers of a frozen language model, and the likeliest next tokens, for rows of a
    dataset.

    Rows are told apart by what the teacher reads of them. Their order and number, the seed, the phase and all that is
    trained leave the files as they are. The states and the tokens are in files of their own, since phases may ask for
    one or for both.

    Numbers are kept in bfloat16, and next tokens as probabilities with that of all others.

    Args:
        folder: where the files lie. The processes of a machine share it, machines do not.
        config: of the teacher.
        rows: as a Trainer takes them, all of one length.
        likeliest: `top_k` and `temperature` of the next tokens, or nothing for states alone.

    Raises:
        InputError: a stream, rows of different lengths, or a teacher whose states change or are not those of a model.
    """

    def __init__(self, folder: str | Path, config: PreTrainedConfig, rows, likeliest: dict[str, Any] | None = None):
        _check_teacher(config)
        assert isinstance(config, SMTPretrainedTeacherConfig) and isinstance(config.layers, list)
        if isinstance(rows, IterableDataset) or not hasattr(rows, "__len__"):
            raise InputError("`teacher_cache_dir` needs rows that are read again: leave it out with a stream.")
        self.folder, self.rows, self.config = Path(folder), rows, config
        self.likeliest = (likeliest["top_k"], likeliest["temperature"]) if likeliest else None
        digests, self.length = _digests(rows)
        # Place i of the files is the i-th smallest digest; row n of the data is at place `places[n]`.
        different, self.first, self.places = np.unique(digests, axis=0, return_index=True, return_inverse=True)
        self.places = self.places.reshape(-1)
        self.rows_read, self.seconds_read = 0, 0.0  # by `fill`
        shared = [hashlib.sha256(different.tobytes()).hexdigest(), _identity(config), self.length]
        shape = (self.length, len(config.layers) * config.base.hidden_size)
        self.parts = [self._part("states", [*shared, config.layers], {"states": (shape, np.int16)})]
        if self.likeliest is not None:
            kept = min(self.likeliest[0], config.vocab_size)
            width = kept + 1 if kept < config.vocab_size else kept
            arrays: dict[str, Any] = {"probabilities": ((self.length, width), np.int16)}
            if kept < config.vocab_size:
                arrays["tokens"] = ((self.length, kept), np.uint16 if config.vocab_size <= 2**16 else np.int32)
            settings = [*shared, config.vocab_size, kept, self.likeliest[1]]
            self.parts.append(self._part("next_tokens", settings, arrays))

    def _part(self, name: str, settings: list, shapes: dict[str, Any]) -> RowArrays:
        digest = hashlib.sha256(json.dumps([name, *settings], sort_keys=True).encode()).hexdigest()[:16]
        return RowArrays(self.folder / f"{name}-{digest}", len(self.first), shapes)

    def create(self) -> None:
        """Make the files that are missing, after saying how large they are. To be called by one process of a machine,
        and `open` by all of them then.

        Raises:
            InputError: there is too little room.
        """
        for part in self.parts:
            if not part.folder.exists():
                size = f"{part.num_rows:,} rows of {self.length - 1:,} tokens, {part.num_bytes / 1e9:.3f} GB"
                print(f"teacher cache: {part.folder} for {size}", flush=True)
                part.create()

    def open(self) -> None:
        """Map the files."""
        for part in self.parts:
            part.open()

    def missing(self) -> np.ndarray:
        """Places of the files that hold no row yet."""
        return np.flatnonzero(~np.logical_and.reduce([part.filled for part in self.parts]))

    @torch.no_grad()
    def fill(self, teacher: SMTPretrainedTeacher, batch_size: int, missing: np.ndarray, shows: bool = True) -> None:
        """Let the model read the rows at the places `missing`, with a progress bar if `shows`."""
        device = teacher.memory_proj.weight.device
        began = time.perf_counter()
        bar = tqdm(total=len(missing), desc="caching teacher: rows", disable=not (shows and len(missing)))
        for start in range(0, len(missing), batch_size):
            places = missing[start : start + batch_size]
            batch = collate(rows_at(self.rows, self.first[places].tolist()))
            read = {name: batch[name][:, :-1].to(device) for name in _READ if name in batch}
            positions = torch.arange(self.length, device=device).expand(len(places), -1)
            states, next_tokens = teacher.read(
                read["input_ids"], positions, read.get("attention_mask"), read.get("document_ids"), self.likeliest
            )
            self.parts[0].put(places, {"states": _halved(states)})
            if next_tokens is not None:
                values = {"probabilities": _halved(next_tokens.probabilities)}
                if next_tokens.tokens is not None:
                    values["tokens"] = next_tokens.tokens.cpu().numpy()
                self.parts[1].put(places, values)
            bar.update(len(places))
        bar.close()
        self.rows_read += len(missing)
        self.seconds_read += time.perf_counter() - began

    def get(self, numbers: torch.Tensor, device: torch.device | str = "cpu") -> CachedRows:
        """What is known of the rows of examples `(B,)`: example i is row `i % len(rows)`.

        Raises:
            InputError: one of them is missing.
        """
        places = self.places[(numbers % len(self.rows)).cpu().numpy()]
        if not all(part.filled[places].all() for part in self.parts):
            raise InputError(f"rows are missing in `teacher_cache_dir` {self.folder}: let it be filled first.")
        found = {name: array[places] for part in self.parts for name, array in part.arrays.items()}
        states = _whole(found["states"]).to(device)
        if self.likeliest is None:
            return CachedRows(states)
        probabilities = _whole(found["probabilities"]).to(device).float()
        # Rounded numbers add up to nearly 1; where there is no distribution, to 0.
        probabilities = probabilities / probabilities.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        tokens = torch.from_numpy(found["tokens"].astype(np.int64)).to(device) if "tokens" in found else None
        return CachedRows(states, NextTokens(probabilities, tokens))


def _halved(values: torch.Tensor) -> np.ndarray:
    """bfloat16 numbers as NumPy can hold them."""
    return values.to(torch.bfloat16).contiguous().view(torch.int16).cpu().numpy()


def _whole(values: np.ndarray) -> torch.Tensor:
    """Inverse of `_halved`."""
    return torch.from_numpy(values).view(torch.bfloat16)


def _check_teacher(config: PreTrainedConfig) -> None:
    if not isinstance(config, SMTPretrainedTeacherConfig):
        raise InputError(
            f"`teacher_cache_dir` keeps what a language model says, and the teacher ({config.model_type}) is trained: "
            "leave it out, or keep the frozen teacher's memories of a dmt phase by `label_cache_dir`."
        )
    if config.lora_r:
        raise InputError(
            "`teacher_cache_dir` keeps what a frozen model says, and LoRA layers change it: leave `teacher_lora_r` "
            "out, or keep the memories of a dmt phase by `label_cache_dir`."
        )


def _digests(rows) -> tuple[np.ndarray, int]:
    """`(N, 2)` uint64, a hash of what the teacher reads of each row, and the number of tokens of all rows."""
    hashes, length = [], None
    for start in range(0, len(rows), _AT_A_TIME):
        for row in rows_at(rows, list(range(start, min(start + _AT_A_TIME, len(rows))))):
            length = len(row["input_ids"]) if length is None else length
            if len(row["input_ids"]) != length:
                raise InputError(
                    f"`teacher_cache_dir` needs rows of one length, and there are some of {length} and of "
                    f"{len(row['input_ids'])} tokens: pack or pad them, or leave it out."
                )
            digest = hashlib.blake2b(digest_size=16)
            for name in _READ:
                if name in row:
                    digest.update(name.encode() + np.asarray(row[name], dtype=np.int64)[:-1].tobytes())
            hashes.append(digest.digest())
    if length is None:
        raise InputError("`teacher_cache_dir` needs rows, and there are none.")
    return np.frombuffer(b"".join(hashes), dtype=np.uint64).reshape(-1, 2), length


def _identity(config: SMTPretrainedTeacherConfig) -> dict[str, Any]:
    """What the states of a model follow from besides the rows and the layers: what is loaded from its folder, whatever
    the teacher's `base_config` says.

    The precision is that of the computation, and the same whether a configuration names it or not. Where neither the
    configuration nor safetensors files in a folder tell it, it follows from the weights.

    Raises:
        InputError: there is no such model.
    """
    if config.model_name_or_path is None:
        raise InputError("`teacher_cache_dir` needs a model that has a name: give `teacher_model_name_or_path`.")
    where = (config.model_name_or_path, config.revision, config.gguf_file)
    described = describe(*where)
    dtype = described.get("dtype") if config.model_dtype == "auto" else config.model_dtype
    if dtype is None and config.gguf_file is None and Path(config.model_name_or_path).is_dir():
        dtype = dtype_of_weights(config.model_name_or_path)
    names = ("model_context_length", "start_token", "load_in_4bit", "load_in_8bit")
    settings = {name: getattr(config, name) for name in names}
    return {**settings, "model": _without_dtype(described), "dtype": dtype, "weights": _weights_digest(*where)}


def _without_dtype(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a configuration without the precision, also of the configurations inside."""
    return {
        name: _without_dtype(value) if isinstance(value, dict) else value
        for name, value in fields.items()
        if name not in ("dtype", "torch_dtype")
    }


def _weights_digest(name: str, revision: str | None, gguf_file: str | None) -> list[str]:
    """Of the files of a folder by what they hold, of a repository by its commit.

    Raises:
        InputError: there is nothing of the kind.
    """
    if not Path(name).is_dir():
        commit = commit_of(name, revision, gguf_file)
        if commit is None:
            raise InputError(
                f"`teacher_cache_dir`: nothing says which version of {name} is meant; download it, and name the folder."
            )
        return [name, commit, str(gguf_file)]
    kinds = [sorted(Path(name).glob(kind)) for kind in _WEIGHTS]
    paths = [Path(name) / gguf_file] if gguf_file else next((paths for paths in kinds if paths), [])
    if not paths:
        raise InputError(
            f"`teacher_cache_dir`: {name} holds no weights ({', '.join(_WEIGHTS)}) to tell models apart by."
        )
    stamps = [(path, path.stat()) for path in paths]
    return [_file_digest(path, stamp.st_size, stamp.st_mtime_ns) for path, stamp in stamps]


@functools.lru_cache(maxsize=1024)
def _file_digest(path: Path, size: int, changed: int) -> str:
    """Read once per process, unless the file changes: every phase asks for it."""
    digest = hashlib.blake2b(path.name.encode(), digest_size=16)
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()

"""A model in a GGUF file as a folder that loads in seconds: unpacked once, for the many runs of a grid."""

import hashlib
import os
import shutil
from pathlib import Path

import torch

from smt_hf.errors import InputError

from .loading import describe, empty_model, load_model, tokenizer_of


def unpacked(name: str, gguf_file: str, folder: str | Path) -> str:
    """The folder below `folder` that holds the weights of a GGUF file as float32, and its tokenizer.

    It is made unless it is there, whole or not at all, and named after what the file holds.

    Args:
        name: folder of the GGUF file.

    Raises:
        InputError: there is no such file, or nothing can be loaded from it.
    """
    path = Path(name) / gguf_file
    if not path.is_file():
        raise InputError(f"there is no file {path}: `teacher_gguf_file` is the name of a GGUF file in the folder.")
    target = Path(folder) / f"{path.stem}-{_digest(path)}"
    if target.exists():
        return str(target)
    # transformers counts what it has loaded from such a file as quantised, and would not save it.
    model = empty_model(describe(name, None, gguf_file), with_head=True).to(torch.float32)
    model.load_state_dict(load_model(name, None, gguf_file, "float32", None, None, with_head=True).state_dict())
    tokenizer = tokenizer_of(name, None, gguf_file)
    aside = target.with_name(f"{target.name}.{os.getpid()}.new")
    try:
        aside.mkdir(parents=True)
        model.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        aside.rename(target)
    except OSError as error:
        if target.exists():  # another run has been faster
            return str(target)
        raise InputError(f"{path} cannot be unpacked to {folder}: {error.strerror}.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return str(target)


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


__all__ = ["unpacked"]

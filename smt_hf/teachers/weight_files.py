"""What the weight files of a language model hold, without the model: one tensor, or the precision of all.

Files are looked up as transformers does, in a folder or in a repository of the Hub. Those of a repository are
downloaded one by one, as they are needed.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

# For `cached_file`: a file that is not there is `None`.
SILENTLY = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
_FLOATING = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def commit_of(name: str, revision: str | None = None, gguf_file: str | None = None) -> str | None:
    """The commit of a repository of the Hub that its configuration comes from, or `None` if that cannot be told."""
    file = Path(gguf_file or CONFIG_NAME)
    path = cached_file(name, str(file), revision=revision, **SILENTLY)
    if path is None:
        return None
    folder = Path(path).parents[len(file.parts) - 1]
    return folder.name if folder.parent.name == "snapshots" else None


def weight_map(name: str, revision: str | None = None) -> dict[str, str]:
    """Name of a tensor -> the safetensors file that holds it, in its order there; empty if there is no such file."""
    path = cached_file(name, SAFE_WEIGHTS_NAME, revision=revision, **SILENTLY)
    if path is not None:
        with safe_open(path, "pt") as file:
            return dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
    path = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, revision=revision, **SILENTLY)
    return {} if path is None else json.loads(Path(path).read_text())["weight_map"]


def read_tensor(name: str, revision: str | None, file: str, tensor: str) -> torch.Tensor:
    """One tensor of a file that `weight_map` names, in the precision of the file."""
    path: Any = cached_file(name, file, revision=revision)
    with safe_open(path, "pt") as opened:
        return opened.get_tensor(tensor)


def dtype_of_weights(folder: str | Path) -> str | None:
    """The precision of the first floating-point weights in the safetensors files of a folder, which is that of a model
    whose configuration names none; `None` if there are no such files."""
    for file in sorted(set(weight_map(str(folder)).values())):
        with safe_open(Path(folder) / file, "pt") as opened:
            for tensor in opened.keys():  # noqa: SIM118 - it is no dictionary
                kind = opened.get_slice(tensor).get_dtype()
                if kind in _FLOATING:
                    return _FLOATING[kind]
    return None


__all__ = ["commit_of", "dtype_of_weights", "read_tensor", "weight_map"]

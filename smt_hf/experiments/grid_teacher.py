"""The language model that is the teacher of a grid: unpacked once, read from once, and told what it has cost.

The workers that train find what the model says in `teacher_cache_dir`, and never load it. What the reading has cost is
kept beside the caches, so that every grid that uses them can tell it.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from smt_hf.teachers import SMTPretrainedTeacherConfig, teacher_type
from smt_hf.teachers.unpacking import unpacked
from smt_hf.training.cached_teacher import ReadingCost, fill_teacher_caches

_READINGS = "readings.jsonl"


def is_language_model(teacher: Mapping[str, Any]) -> bool:
    """Whether the fields of a teacher name a language model that exists."""
    return (
        teacher.get("model_name_or_path") is not None and teacher_type(teacher) == SMTPretrainedTeacherConfig.model_type
    )


def told(teacher: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a teacher for results, which do not show the folders of the machine."""
    name = teacher.get("model_name_or_path")
    if name is None or not Path(name).exists():
        return dict(teacher)
    return {**teacher, "model_name_or_path": os.path.basename(os.path.normpath(name))}


def name_of(teacher: Mapping[str, Any]) -> str:
    """What people call the model: its file, or its repository or folder."""
    return str(teacher.get("gguf_file") or told(teacher)["model_name_or_path"])


def unpacked_teacher(teacher: Mapping[str, Any], cache_dir: str | None) -> dict[str, Any]:
    """The fields of a teacher with a folder that loads fast in the place of a GGUF file on this machine.

    Raises:
        InputError: the file cannot be loaded.
    """
    name, gguf_file = teacher.get("model_name_or_path"), teacher.get("gguf_file")
    if cache_dir is None or gguf_file is None or not Path(str(name)).is_dir():
        return dict(teacher)
    rest = {key: value for key, value in teacher.items() if key != "gguf_file"}
    return {**rest, "model_name_or_path": unpacked(str(name), gguf_file, Path(cache_dir) / "models")}


def cache_dir_of(phases: Iterable) -> str | None:
    """The `teacher_cache_dir` of arguments of phases, if they have one."""
    found = {getattr(arguments, "teacher_cache_dir", None) for arguments in phases}
    return next((folder for folder in sorted(filter(None, found))), None)


def read_for(config, arguments: list, subject, num_threads: int) -> ReadingCost | None:
    """Fill the caches of a run, and note what it has cost beside them; `None` for a run without a cache."""
    folder = cache_dir_of(arguments)
    if folder is None:
        return None
    cost = fill_teacher_caches(config.teacher, arguments, subject.rows, subject.eval_rows)
    if cost.rows_read:
        with (Path(folder) / _READINGS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({**asdict(cost), "num_threads": num_threads}) + "\n")
    return cost


def reading_line(cost: ReadingCost, folder: str) -> dict[str, Any]:
    """What the caches of a run hold, and what it has cost to fill them, whenever that was.

    Returns:
        `tokens`, `rows` and `bytes` of the caches; `seconds` of reading them and `load_seconds` of making the model,
        both times the threads that it had; `tokens_read`: that were read in those seconds. It is not `tokens` where a
        reading was killed, whose seconds are lost, or where caches ask for different things of the same rows.
    """
    path, names = Path(folder) / _READINGS, set(cost.folders)
    known = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    own = [reading for reading in known if names & set(reading["folders"])]
    return {
        **{name: getattr(cost, name) for name in ("rows", "tokens", "bytes")},
        **{
            name: round(sum(reading[name] * reading["num_threads"] for reading in own), 4)
            for name in ("seconds", "load_seconds")
        },
        "tokens_read": sum(reading["tokens_read"] for reading in own),
    }

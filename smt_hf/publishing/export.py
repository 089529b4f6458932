"""What a run leaves behind: folders that load by themselves, and JSON files. Each is complete or absent."""

import json
import shutil
from pathlib import Path

from .model_card import student_card


def write_text(text: str, path: Path) -> None:
    """Write a file that is complete or absent: it gets its name when it is whole."""
    aside = path.with_name(path.name + ".new")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def write_json(content: dict, path: Path) -> None:
    """Write a JSON file that is complete or absent.

    Raises:
        ValueError: a number is not finite.
    """
    write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", path)


def export_model(model, tokenizer, folder: Path) -> None:
    """Write `folder` with a model and its tokenizer, complete or not at all; it takes the place of an earlier one.

    The class of the model loads it by `from_pretrained`.
    """
    aside = folder.with_name(folder.name + ".new")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def export_student(student, tokenizer, folder: Path) -> None:
    """Write `folder` with everything that loads the student; `write_card` adds what explains it.

    Generation settings with several tokens that end a text keep them if the tokenizer's is one of them.
    The files are config.json, the weights as safetensors, generation_config.json, the modelling code (for
    `trust_remote_code=True`), and the tokenizer.
    """
    student.config.use_cache = True
    ends = student.generation_config.eos_token_id
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(student.generation_config, name, getattr(tokenizer, name))
    if isinstance(ends, list) and tokenizer.eos_token_id in ends:
        student.generation_config.eos_token_id = ends
    export_model(student, tokenizer, Path(folder))


def write_card(folder: Path, student, results: dict) -> None:
    """Write eval_results.json and README.md, the model card, into the folder of an exported student.

    Args:
        folder: as `export_student` has written it.
        student: the model, for its sizes.
        results: what eval_results.json is to hold; the card takes every number from it.
    """
    card = student_card(student, results)
    write_json(results, Path(folder) / "eval_results.json")
    write_text(str(card), Path(folder) / "README.md")

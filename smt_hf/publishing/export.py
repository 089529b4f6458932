"""What a run leaves behind: folders that load by themselves, and JSON files. Each is complete or absent."""

import json
import shutil
from pathlib import Path

from .evidence import append_lines
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


def append_evidence(results: dict, phases: dict[str, list[dict]], path: Path) -> None:
    """Append one JSON line per arm of a run; tables of several runs are made from such lines.

    Args:
        results: the content of `eval_results.json`.
        phases: arm -> settings of the phases that trained it; none for an n-gram model.
        path: file of JSON lines.
    """
    task, student = results["task"], results["config"]["student"]
    names = ("updater_type", "hidden_size", "num_hidden_layers", "num_memory_tokens", "intermediate_size")
    shared = {"task": task["name"], "difficulty": task["difficulty"], "chance": task["chance"], "seed": results["seed"]}
    shared |= {"n": results["data"]["heldout_tokens"], "data_hash": results["data"]["hash"]}
    shared |= {name: results[name] for name in ("commit", "hardware", "num_threads", "versions")}
    shared |= {"student": {name: student[name] for name in names}}
    shared |= {"lora": results["lora"]} if "lora" in results else {}
    lines = [{**shared, "arm": arm, "phases": phases.get(arm, []), **scores} for arm, scores in results["arms"].items()]
    append_lines(lines, path)


def _save(model, tokenizer, folder: Path) -> None:
    """Save model and tokenizer in a folder that is complete or absent; it takes the place of an earlier one."""
    aside = folder.with_name(folder.name + ".new")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def export_student(student, tokenizer, folder: Path) -> None:
    """Write `folder` with everything that loads the student; `write_card` adds what explains it.

    The files are config.json, the weights as safetensors, generation_config.json, the modelling code (for
    `trust_remote_code=True`), and the tokenizer.
    """
    student.config.use_cache = True
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(student.generation_config, name, getattr(tokenizer, name))
    _save(student, tokenizer, Path(folder))


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


def export_teacher(teacher, tokenizer, folder: Path) -> None:
    """Write `folder` with the teacher and its tokenizer; its class loads it by `from_pretrained`."""
    _save(teacher, tokenizer, Path(folder))

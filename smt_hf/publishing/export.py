"""What a run hands back: folders that load by themselves, complete or absent."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from .model_card import student_card


def write_json(content: dict, path: Path) -> None:
    """Write aside, then rename: the file is complete or absent."""
    aside = path.with_name(path.name + ".new")
    aside.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    aside.replace(path)


def append_evidence(results: dict, path: Path) -> None:
    """Append one JSON line an arm of `eval_results.json`: what a table of several runs is made from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    task = results["task"]
    shared = {name: results[name] for name in ("commit", "hardware", "num_threads")}
    names = ("updater_type", "hidden_size", "num_hidden_layers", "num_memory_tokens", "intermediate_size")
    shared["student"] = {name: results["config"]["student"][name] for name in names}
    shared |= {"versions": results["versions"], **({"lora": results["lora"]} if "lora" in results else {})}
    with path.open("a") as file:
        for arm, scores in results["arms"].items():
            line = {"task": task["name"], "difficulty": task["difficulty"], "arm": arm, "seed": results["seed"]}
            line |= {"n": results["data"]["heldout_tokens"], "data_hash": results["data"]["hash"]}
            line |= {"chance": task["chance"]}
            is_rival = arm in ("bptt", "bptt_truncated") and arm != results["student_arm"]
            line |= {"phases": results.get("compare_bptt", []) if is_rival else results["phases"]}
            file.write(json.dumps({**line, **scores, **shared}) + "\n")


def _whole(folder: Path, fill: Callable[[Path], None]) -> None:
    aside = folder.with_name(folder.name + ".new")
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    fill(aside)
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)


def export_student(student, tokenizer, folder: Path, results: dict) -> None:
    """Write `folder` with everything that loads and explains the student.

    config.json, model.safetensors, generation_config.json, the modelling code (for `trust_remote_code=True`), the
    tokenizer, eval_results.json, and README.md, the model card.
    """

    def fill(aside: Path) -> None:
        student.config.use_cache = True
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(student.generation_config, name, getattr(tokenizer, name))
        student.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        write_json(results, aside / "eval_results.json")
        student_card(student, results).save(aside / "README.md")

    _whole(Path(folder), fill)


def export_teacher(teacher, tokenizer, folder: Path) -> None:
    """Write `folder` with the teacher, which loads by `SMTTeacherEncoder.from_pretrained`."""

    def fill(aside: Path) -> None:
        teacher.save_pretrained(aside)
        tokenizer.save_pretrained(aside)

    _whole(Path(folder), fill)

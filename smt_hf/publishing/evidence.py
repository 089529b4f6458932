"""Lines of evidence: one JSON object per arm of a run, in a file of JSON lines that is only appended to."""

import json
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from smt_hf.errors import InputError


def read_lines(path: str | Path) -> list[dict]:
    """The lines of a `.jsonl` file; blank ones are skipped.

    Raises:
        InputError: there is no such file, or a line is not a JSON object; names file and line number.
    """
    try:
        texts = Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise InputError(f"there is no file {path}: run first what writes it, or name another.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the lines of {path}: {error}") from error
    lines = []
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error}): mend or remove it.") from None
        if not isinstance(line, dict):
            raise InputError(f"{path}, line {number}: not a JSON object: mend or remove it.")
        lines.append(line)
    return lines


def append_lines(lines: list[dict], path: str | Path) -> None:
    """Append the lines to a file, which is made with its folder where there is none.

    Raises:
        ValueError: a number in a line is not finite, which JSON cannot hold; nothing is written then.
    """
    text = "".join(json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n" for line in lines)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def append_evidence(results: dict, phases: dict[str, list[dict]], path: Path) -> None:
    """Append one JSON line per arm of a run; tables of several runs are made from such lines.

    Args:
        results: the content of `eval_results.json`.
        phases: arm -> settings of the phases that trained it; none for an n-gram model.
        path: file of JSON lines.
    """
    task, student = results["task"], results["config"]["student"]
    names = ["updater_type", "hidden_size", "num_hidden_layers", "num_memory_tokens", "intermediate_size"]
    shared = {"task": task["name"], "difficulty": task["difficulty"], "chance": task["chance"], "seed": results["seed"]}
    shared |= {"n": results["data"]["heldout_tokens"], "data_hash": results["data"]["hash"]}
    shared |= {name: results[name] for name in ("commit", "hardware", "num_threads", "versions")}
    names += ["embedding_size"] if student.get("embedding_size") else []
    shared |= {"student": {name: student[name] for name in names}}
    shared |= {name: results[name] for name in ("lora", "init_embeddings_from_teacher") if name in results}
    lines = [{**shared, "arm": arm, "phases": phases.get(arm, []), **scores} for arm, scores in results["arms"].items()]
    append_lines(lines, path)


def split_by(lines: list[dict], *keys: str) -> dict:
    """The value of a key, or the tuple of the values of several, ascending -> lines that have it, in their order."""
    value_of = itemgetter(*keys)
    return {value: list(some) for value, some in groupby(sorted(lines, key=value_of), key=value_of)}


def cells_with(lines: list[dict], *keys: str) -> list[tuple[str, list[dict]]]:
    """Title and lines of every cell that has lines with one of the keys: those lines."""
    cells = split_by([line for line in lines if any(line.get(key) for key in keys)], "task", "difficulty")
    return [(f"{task} {difficulty}", cell) for (task, difficulty), cell in cells.items()]


def hardest_cells(lines: list[dict], *keys: str) -> list[tuple[str, list[dict]]]:
    """Title and lines of a cell per task: the highest difficulty at which lines have one of the keys, those lines."""
    hardest = {cell[0]["task"]: (title, cell) for title, cell in cells_with(lines, *keys)}  # a task's last one
    return list(hardest.values())

"""Long-context scores of a student in its own model card."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from smt_hf.errors import InputError
from smt_hf.evaluation.long_context.loading import load_language_model
from smt_hf.publishing.export import write_card
from smt_hf.publishing.long_context_scores import CONTROLS
from smt_hf.publishing.model_card import license_of

_KEPT = ("suite", "task", "length", "length_unit", "metric", "value", "interval", "n", "chance")


def add_to_card(folder: str | Path, lines: list[dict]) -> Path:
    """Write a student's scores into its `eval_results.json`, and its card anew from that file.

    A cell is a task at a length. Its score from an earlier call is replaced. The card's licence stays; other changes
    that were made to the card by hand are lost.

    Args:
        folder: of the student, as a recipe has exported it.
        lines: as `read_lines` returns them. Those of other weights, and bits per byte of the suite `text`, are passed
            over.

    Returns:
        The card.

    Raises:
        InputError: the folder holds no student with results, no line is of its weights, or two lines are of one cell.
    """
    folder = Path(folder)
    path = folder / "eval_results.json"
    if not path.is_file():
        raise InputError(
            f"{folder} has no eval_results.json: name the `student` folder of a run of pretrain.py or finetune.py. "
            "Students of a grid have no card."
        )
    loaded = load_language_model(str(folder), device="cpu")
    digest = loaded.weights_digest()
    own = [entry_of(line) for line in lines if line.get("weights") == digest and line["metric"] != "bits_per_byte"]
    found = Counter(map(_cell, own))
    twice = [f"{task} at {length:,} {unit}" for (_, task, length, unit), number in found.items() if number > 1]
    if twice:
        raise InputError(
            f"{', '.join(twice)}: several lines are of the weights in {folder}, of other seeds or settings for "
            "example. Leave one of them in the file."
        )
    if not own:
        raise InputError(f"no line is of the weights in {folder}: evaluate it first, with `--dtype float32`.")
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    cells = {_cell(entry): entry for entry in [*results.get("long_contexts", []), *own]}
    results["long_contexts"] = [cells[cell] for cell in sorted(cells)]
    licence = license_of(folder)
    write_card(folder, loaded.model, results | ({"license": licence} if licence else {}))
    return folder / "README.md"


def entry_of(line: dict) -> dict[str, Any]:
    """What the card and its results keep of a line; of a control, its score."""
    controls = {name: line["controls"][name]["value"] for name in CONTROLS if name in (line.get("controls") or {})}
    kept = {name: line[name] for name in _KEPT if line.get(name) is not None}
    return kept | ({"controls": controls} if controls else {})


def _cell(entry: dict) -> tuple:
    return entry["suite"], entry["task"], entry["length"], entry["length_unit"]

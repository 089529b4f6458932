"""One HTML page with the model cards, their scores as bars, their pictures, and the figures of the evidence."""

import base64
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from smt_hf.command_line import argument
from smt_hf.errors import InputError

from .export import write_text
from .scores import UNITS, metric_of

_TEMPLATE = Path(__file__).with_name("gallery_template.html")


@dataclass
class GalleryArguments:
    """Arguments of `render_gallery`."""

    model_cards: str = argument("model_cards", "Folder of model cards.")
    output: str = argument("gallery.html", "HTML file to write; an earlier one is replaced.")


def render_gallery(model_cards: str | Path, output: str | Path) -> Path:
    """Write one static HTML file that holds its pictures.

    Args:
        model_cards: folder with `<card>/eval_results.json`, pictures beside it, and `evidence/*.png`.
        output: the file. An earlier one is replaced, since everything in it comes from the folder.

    Raises:
        InputError: there are no cards in the folder.
    """
    model_cards, output = Path(model_cards), Path(output)
    folders = sorted(path.parent for path in model_cards.glob("*/eval_results.json"))
    if not folders:
        raise InputError(f"{model_cards} holds no `<card>/eval_results.json`: name a folder of model cards.")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        _TEMPLATE.read_text(encoding="utf-8")
    )
    text = page.render(cards=[_card(folder) for folder in folders], grids=_grids(model_cards / "evidence"))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(text, output)
    return output


def _card(folder: Path) -> dict[str, Any]:
    results = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))
    metric = metric_of(results["arms"][results["student_arm"]])
    unit = UNITS[metric]
    scored = [(name, scores) for name, scores in results["arms"].items() if scores.get(metric) is not None]
    widest = 1.0 if unit.higher_is_better else max(scores[metric] for _, scores in scored)
    arms = [
        {
            "name": name,
            "is_own": name == results["student_arm"],
            "value": unit.written(scores[metric]),
            "width": round(100 * scores[metric] / widest, 1),
            "seconds": f"{scores['wall_clock_s']:.0f} s" if "wall_clock_s" in scores else "",
        }
        for name, scores in sorted(scored, key=lambda entry: unit.badness(entry[1][metric]))
    ]
    return {
        "name": folder.name,
        "data": results["data"]["name"],
        "unit": unit,
        "chance": unit.written(results["task"]["chance"]),
        "arms": arms,
        "sample": results.get("sample"),
        "facts": f"seed {results['seed']}, {results['hardware']}, commit {results['commit']}",
        "pictures": [_picture(path) for path in sorted(folder.glob("*.png"))],
    }


def _grids(folder: Path) -> list[dict[str, Any]]:
    """The figures in the report of each grid, with their captions."""
    grids = []
    for report in sorted(folder.glob("*.md")):
        captions = re.findall(r"!\[(.+?)\]\((.+?\.png)\)", report.read_text(encoding="utf-8"))
        if pictures := [_picture(folder / name, caption) for caption, name in captions if (folder / name).exists()]:
            grids.append({"name": report.stem, "pictures": pictures})
    return grids


def _picture(path: Path, caption: str | None = None) -> dict[str, str]:
    content = base64.b64encode(path.read_bytes()).decode()
    return {"source": f"data:image/png;base64,{content}", "caption": caption or path.stem.replace("_", " ")}

"""One page to look at: the cards, their numbers as bars, their pictures, and the figures of the evidence."""

import base64
import json
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

_TEMPLATE = Path(__file__).with_name("gallery_template.html")
_UNITS = {"bits_per_byte": "bits per byte", "bits_per_pixel": "bits per pixel", "accuracy": "accuracy"}


def render_gallery(model_cards: str | Path, output: str | Path) -> Path:
    """Write one static HTML file, pictures inside, from a folder of cards.

    Args:
        model_cards: `<card>/eval_results.json` with pictures beside it, and `evidence/*.png`.
        output: the file; it is replaced, as everything in it comes from the folder.

    Raises:
        ValueError: there are no cards in the folder.
    """
    model_cards, output = Path(model_cards), Path(output)
    folders = sorted(path.parent for path in model_cards.glob("*/eval_results.json"))
    if not folders:
        raise ValueError(f"{model_cards} holds no `<card>/eval_results.json`: name a folder of model cards.")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        _TEMPLATE.read_text(encoding="utf-8")
    )
    cards = [_card(folder) for folder in folders]
    text = page.render(cards=cards, grids=_grids(model_cards / "evidence"))
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(output.name + ".new")
    aside.write_text(text, encoding="utf-8")
    aside.replace(output)
    return output


def _card(folder: Path) -> dict[str, Any]:
    results = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))
    metric = results.get("metric", "bits_per_byte")
    best_first = sorted(
        ((name, scores) for name, scores in results["arms"].items() if scores.get(metric) is not None),
        key=lambda entry: entry[1][metric] if metric != "accuracy" else -entry[1][metric],
    )
    longest = max(scores[metric] for _, scores in best_first)
    arms = [
        {
            "name": name,
            "is_own": name == results["student_arm"],
            "value": f"{scores[metric]:.1%}" if metric == "accuracy" else f"{scores[metric]:.3f}",
            "width": round(100 * scores[metric] / (1.0 if metric == "accuracy" else longest), 1),
            "seconds": f"{scores['wall_clock_s']:.0f} s" if "wall_clock_s" in scores else "",
        }
        for name, scores in best_first
    ]
    task = results["task"]
    chance = f"{task['chance']:.1%}" if metric == "accuracy" else f"{task['chance']:.2f}"
    return {
        "name": folder.name,
        "data": results["data"]["name"],
        "unit": _UNITS[metric],
        "better": "higher" if metric == "accuracy" else "lower",
        "chance": chance,
        "arms": arms,
        "sample": results.get("sample"),
        "facts": f"seed {results['seed']}, {results['hardware']}, commit {results['commit']}",
        "pictures": [_picture(path) for path in sorted(folder.glob("*.png"))],
    }


def _grids(folder: Path) -> list[dict[str, Any]]:
    """Figures of each grid that has a report, with the captions that stand there."""
    grids = []
    for report in sorted(folder.glob("*.md")):
        captions = re.findall(r"!\[(.+?)\]\((.+?\.png)\)", report.read_text(encoding="utf-8"))
        pictures = [_picture(folder / name, caption) for caption, name in captions if (folder / name).exists()]
        if pictures:
            grids.append({"name": report.stem, "pictures": pictures})
    return grids


def _picture(path: Path, caption: str | None = None) -> dict[str, str]:
    content = base64.b64encode(path.read_bytes()).decode()
    return {"source": f"data:image/png;base64,{content}", "caption": caption or path.stem.replace("_", " ")}

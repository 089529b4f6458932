"""The model card: one template, filled from `eval_results.json`."""

import json
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled
from yaml import YAMLError

from .long_context_scores import CONTROLS
from .scores import UNITS, metric_of

_TEMPLATE = Path(__file__).with_name("model_card_template.md")


def student_card(student, results: dict) -> ModelCard:
    """Card of an exported student.

    Args:
        student: the model, for its sizes.
        results: the content of `eval_results.json`: every number of the card comes from it. With `license`, the card
            names that licence; without, it says that there is none.
    """
    arm = results["arms"][results["student_arm"]]
    metric = metric_of(arm)
    data = results["data"]
    long_contexts = results.get("long_contexts", [])
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=results.get("license"),
        datasets=[data.get("hub_name") or "local-" + re.sub(r"[^\w.]+", "-", data["name"]).strip("-")],
        tags=[*(["smt"] if results["config"]["teacher"] else []), "recurrent", "custom_code", results["student_arm"]],
        base_model=results.get("base_model") if "/" in results.get("base_model", "") else None,
        model_name=f"smt_recurrent {results['student_arm']}",
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=data["hash"],
                dataset_name=f"{data['name']}, held out",
                metric_type=name,
                metric_name=UNITS[name].label,
                metric_value=round(arm[name], 4),
            )
            for name in dict.fromkeys((metric, "accuracy"))
        ]
        + [
            EvalResult(
                task_type="text-generation",
                dataset_type=entry["suite"],
                dataset_config=f"{entry['task']}-{entry['length']}-{entry['length_unit']}",
                dataset_name=f"{entry['suite']} {entry['task']}, {entry['length']:,} {entry['length_unit']}",
                metric_type=entry["metric"],
                metric_name=entry["metric"],
                metric_value=round(entry["value"], 4),
            )
            for entry in long_contexts
        ],
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(_TEMPLATE),
        results=results,
        arm=arm,
        rows=sorted(results["arms"].items(), key=lambda entry: UNITS[metric].badness(entry[1][metric])),
        metric=metric,
        unit=UNITS[metric],
        long_contexts=long_contexts,
        control_names=CONTROLS,
        ages=sorted({age for entry in results.get("drift", []) for age in entry.get("by_age", {})}, key=int),
        is_text=results["task"]["name"] == "text",
        is_documents="documents" in results["data"],
        is_instructions=results["task"]["name"] == "instructions",
        prompt=_prompt(results),
        config=student.config,
        num_parameters=sum(parameter.numel() for parameter in student.parameters()),
    )


def _prompt(results: dict) -> str:
    """Text that the model can do something with, as it stands between the quotes of Python code."""
    if "documents" in results["data"] and results.get("samples"):
        return json.dumps(results["samples"][0]["prompt"], ensure_ascii=False)[1:-1]
    is_numbers = results["task"]["name"] not in ("text", "instructions") and "documents" not in results["data"]
    return "1 2 3" if is_numbers else "The beginning of a text"


def license_of(checkpoint: str | Path) -> str | None:
    """The licence that the card of a checkpoint names; `None` without a card or without a licence in it.

    Args:
        checkpoint: a folder, or a Hub repository.
    """
    card = Path(checkpoint) / "README.md"
    if Path(checkpoint).is_dir() and not card.exists():
        return None
    try:
        return ModelCard.load(card if card.exists() else str(checkpoint), ignore_metadata_errors=True).data.license
    except (EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, YAMLError, ValueError, OSError):
        return None

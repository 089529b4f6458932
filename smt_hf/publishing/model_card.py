"""The model card: one template, filled from `eval_results.json`."""

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

_METRICS = {"bits_per_byte": "bits per byte", "bits_per_pixel": "bits per pixel", "accuracy": "next-token accuracy"}
_TEMPLATE = Path(__file__).with_name("model_card_template.md")


def student_card(student, results: dict) -> ModelCard:
    """Card of an exported student.

    Args:
        student: the model, for its sizes.
        results: the content of `eval_results.json`: every number of the card comes from it.
    """
    arm = results["arms"][results["student_arm"]]
    metric = results.get("metric", "bits_per_byte")
    labels = {name: label for name, label in _METRICS.items() if name == metric or name == "accuracy"}
    data = results["data"]
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license="apache-2.0",
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
                metric_name=label,
                metric_value=round(arm[name], 4),
            )
            for name, label in labels.items()
        ],
    )
    sign = -1 if metric == "accuracy" else 1
    rows = sorted(results["arms"].items(), key=lambda entry: sign * entry[1][metric])
    return ModelCard.from_template(
        card_data,
        template_path=str(_TEMPLATE),
        results=results,
        arm=arm,
        rows=rows,
        metric=metric,
        unit=_METRICS[metric],
        is_text=results["task"]["name"] == "text",
        is_instructions=results["task"]["name"] == "instructions",
        config=student.config,
        num_parameters=sum(parameter.numel() for parameter in student.parameters()),
    )

"""The model card of a student that a grid has made of a language model: scores, what the teacher has cost, samples."""

from pathlib import Path
from typing import Any

import torch

from smt_hf.publishing.export import write_card
from smt_hf.training.arguments import PhaseArguments
from smt_hf.training.composite import SMTForPreTraining

from .composition import phase_settings, tokenizer_hash
from .subjects import Subject, TextSubject

_SAMPLES, _PROMPT, _NEW = 3, 32, 96
_FACTS = ("seed", "commit", "hardware", "num_threads", "versions")


def write_grid_card(
    folder: Path,
    model: SMTForPreTraining,
    subject: Subject,
    arguments: list[PhaseArguments],
    line: dict[str, Any],
    language_model: str,
    reading: dict[str, Any] | None,
) -> None:
    """Write eval_results.json and the model card into the folder of an exported student of text.

    Args:
        folder: as `export_student` has written it.
        arguments: of all phases.
        line: the last of the run, whose scores and costs the card has.
        language_model: name of the teacher's model.
        reading: what it has cost to let that model read the rows; `None` for a student that has learned without it.
    """
    if not isinstance(subject, TextSubject) or line[subject.metric] is None:
        return
    scores = ("bits_per_byte", "nats_per_token", "accuracy", "n", "wall_clock_s", "tokens", "sequential_steps")
    phases = [phase_settings(one) for one in arguments]
    if len(phases) == 1:  # which may have ended by its seconds
        phases[0]["max_steps"] = line["optimizer_steps"]
    config = {"student": model.config.to_dict()["student"], "teacher": None if reading is None else language_model}
    results = {
        "arms": {line["arm"]: {name: line[name] for name in scores}},
        "student_arm": line["arm"],
        "task": {"name": subject.name, "difficulty": subject.difficulty, "chance": subject.chance},
        "metric": subject.metric,
        "data": {**subject.facts(), "tokenizer_hash": tokenizer_hash(subject.tokenizer)},
        "config": config,
        "phases": phases,
        **({"init_embeddings_from_teacher": True} if line.get("init_embeddings_from_teacher") else {}),
        **({"language_model": {"name": language_model, **reading}} if reading is not None else {}),
        **{name: line[name] for name in _FACTS},
        "world_size": 1,
        "samples": samples_of(model, subject),
    }
    write_card(folder, model.student, results)


@torch.inference_mode()
def samples_of(model: SMTForPreTraining, subject: TextSubject) -> list[dict[str, str]]:
    """Held-out prompts from different streams, and how the student continues them."""
    places = [(2 * number + 1) * len(subject.streams) // (2 * _SAMPLES) for number in range(_SAMPLES)]
    samples = []
    for place in dict.fromkeys(places):
        parts = subject.continuation(model.student, _PROMPT, _NEW, place=place)
        prompt, continuation = (subject.tokenizer.decode(part) for part in parts)
        samples.append({"prompt": prompt, "continuation": continuation})
    return samples

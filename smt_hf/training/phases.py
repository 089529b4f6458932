"""A pipeline of phases: one folder and one Trainer a phase, resumable at any checkpoint.

`<output_dir>/<phase>/` holds the Trainer's `checkpoint-N/`, at its end `trainer_state.json` with the log history, and
last `phase.json`, which says that the phase is complete.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import get_last_checkpoint

from .arguments import BPTTTrainingArguments, DMTTrainingArguments, PhaseArguments, SMTTrainingArguments
from .pretraining import SMTForPreTraining
from .trainers import BPTTTrainer, DMTTrainer, SMTTrainer

TRAINERS: dict[str, type[SMTTrainer]] = {"smt": SMTTrainer, "dmt": DMTTrainer, "bptt": BPTTTrainer}
ARGUMENTS: dict[str, type[PhaseArguments]] = {
    "smt": SMTTrainingArguments,
    "dmt": DMTTrainingArguments,
    "bptt": BPTTTrainingArguments,
}
_OPTIMIZER_STATE = "student_optimizer.safetensors"
_PHASE_FILE = "phase.json"


@dataclass(frozen=True)
class PhaseResult:
    """What a finished phase leaves.

    Args:
        arm: name of the pipeline up to here (`smt8_bptt`).
        arguments: of the phase.
        seconds: inside training steps, evaluation and saving excluded, over interruptions.
        sequential_steps: transitions computed one after the other.
        tokens: transitions supervised.
        log_history: the Trainer's.
        scores: what `evaluate` returned after the phase.
        is_new: false if the phase was found complete on disk.
    """

    arm: str
    arguments: PhaseArguments
    seconds: float
    sequential_steps: int
    tokens: int
    log_history: list[dict]
    scores: dict
    is_new: bool


def arm_name(phases: list[PhaseArguments]) -> str:
    """Phases joined by underscores; a gradient that crosses more than one transition is named: `smt8_dmt`.

    BPTT alone is `bptt` if its window is the whole row, else `bptt_truncated`.
    """
    if [arguments.phase for arguments in phases] == ["bptt"]:
        return "bptt" if phases[0].transition_steps == phases[0].context_length else "bptt_truncated"
    parts = []
    for arguments in phases:
        steps = arguments.transition_steps
        parts.append(arguments.phase if arguments.phase == "bptt" or steps == 1 else f"{arguments.phase}{steps}")
    return "_".join(parts)


def lay_out(phases: list[PhaseArguments], output_dir: str) -> None:
    """Give every phase its folder and its part of a learning-rate schedule that it shares with others. In place."""
    names: dict[str, int] = {}
    for arguments in phases:
        names[arguments.phase] = names.get(arguments.phase, 0) + 1
        number = "" if names[arguments.phase] == 1 else f"_{names[arguments.phase]}"
        arguments.output_dir = os.path.join(output_dir, arguments.phase + number)
    first = 0
    for index in range(1, len(phases) + 1):
        if index < len(phases) and phases[index].continue_previous_phase:
            continue
        group = phases[first:index]
        total, used = sum(arguments.max_steps for arguments in group), 0
        for arguments in group:
            if len(group) > 1:
                arguments.schedule_offset, arguments.schedule_steps = used, total
            used += arguments.max_steps
        first = index


def run_phases(
    model: SMTForPreTraining,
    phases: list[PhaseArguments],
    rows_for: Callable[[PhaseArguments], Dataset],
    eval_rows: Dataset,
    processing_class=None,
    evaluate: Callable[[SMTForPreTraining, PhaseArguments], dict] | None = None,
    resume_from_checkpoint: str | bool | None = None,
) -> Iterator[PhaseResult]:
    """Train the phases one after the other, yielding as each ends. The model is trained in place.

    Args:
        model: student and teacher.
        phases: as left by `lay_out`.
        rows_for: training rows for a phase.
        eval_rows: held-out rows.
        processing_class: tokenizer, saved with every checkpoint.
        evaluate: scores of the model after a phase; a dict that JSON can hold.
        resume_from_checkpoint: true: skip complete phases and go on from the newest complete checkpoint of the next;
            a path: go on from that checkpoint of a phase.

    Raises:
        ValueError: the path is not a complete checkpoint of one of the phases.
    """
    named = _named_checkpoint(phases, resume_from_checkpoint) if isinstance(resume_from_checkpoint, str) else None
    optimizer_state = None
    for index, arguments in enumerate(phases):
        folder = Path(arguments.output_dir)
        arm = arm_name(phases[: index + 1])
        checkpoint = None
        if resume_from_checkpoint:
            is_named = named is not None and Path(named).parent.resolve() == folder.resolve()
            if (folder / _PHASE_FILE).exists() and not is_named:
                summary = json.loads((folder / _PHASE_FILE).read_text())
                model.load_state_dict(_weights(newest_checkpoint(folder)), strict=False)
                optimizer_state = _load_optimizer_state(folder)
                yield PhaseResult(arm, arguments, is_new=False, **summary)
                continue
            checkpoint = named if is_named else newest_checkpoint(folder)
            if is_named:
                resume_from_checkpoint = None  # what comes after the named checkpoint is done anew
        model.train()
        trainer = TRAINERS[arguments.phase](
            model=model,
            args=arguments,
            train_dataset=rows_for(arguments),
            eval_dataset=eval_rows,
            processing_class=processing_class,
            student_optimizer_state=optimizer_state if arguments.continue_previous_phase else None,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_state()
        model.eval()
        optimizer_state = trainer.student_optimizer_state()
        scores = evaluate(model, arguments) if evaluate and trainer.is_world_process_zero() else {}
        summary = {
            "seconds": trainer.cost.seconds,
            "sequential_steps": trainer.cost.sequential_steps,
            "tokens": trainer.cost.tokens,
            "log_history": trainer.state.log_history,
            "scores": scores,
        }
        if trainer.is_world_process_zero():
            _save_optimizer_state(folder, optimizer_state)
            aside = folder / (_PHASE_FILE + ".new")
            aside.write_text(json.dumps(summary))
            aside.replace(folder / _PHASE_FILE)
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.free_memory()
        yield PhaseResult(arm, arguments, is_new=True, **summary)


def newest_checkpoint(folder: str | Path) -> str | None:
    """The checkpoint of a phase with the highest step that is complete, or `None`."""
    if not Path(folder).is_dir():
        return None
    while (checkpoint := get_last_checkpoint(folder)) is not None:
        if _is_complete(checkpoint):
            return checkpoint
        # transformers writes trainer_state.json last: without it the save was cut off.
        Path(checkpoint).rename(checkpoint.replace("checkpoint-", "incomplete-checkpoint-"))
    return None


def _is_complete(checkpoint: str) -> bool:
    return all((Path(checkpoint) / name).exists() for name in ("trainer_state.json", "model.safetensors"))


def _named_checkpoint(phases: list[PhaseArguments], path: str) -> str:
    folders = [Path(arguments.output_dir).resolve() for arguments in phases]
    given = Path(path).resolve()
    if given.parent not in folders or not re.fullmatch(r"checkpoint-\d+", given.name) or not _is_complete(str(given)):
        raise ValueError(
            f"{path!r} is not a complete checkpoint of this run: pass one of {', '.join(map(str, folders))} with "
            "/checkpoint-N, or no path for the newest."
        )
    return str(given)


def _weights(checkpoint: str | None) -> dict[str, torch.Tensor]:
    if checkpoint is None:
        raise ValueError(
            "a phase is marked complete but its checkpoint is gone: start over with another output folder."
        )
    return load_file(os.path.join(checkpoint, "model.safetensors"))


def _save_optimizer_state(folder: Path, state: dict[str, dict[str, torch.Tensor]]) -> None:
    tensors = {f"{name}/{key}": value.cpu().contiguous() for name, own in state.items() for key, value in own.items()}
    save_file(tensors, folder / _OPTIMIZER_STATE)


def _load_optimizer_state(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    state: dict[str, dict[str, torch.Tensor]] = {}
    for entry, value in load_file(folder / _OPTIMIZER_STATE).items():
        name, key = entry.rsplit("/", 1)
        state.setdefault(name, {})[key] = value
    return state

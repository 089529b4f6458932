"""A pipeline of phases: one folder and one Trainer per phase, resumable at any checkpoint.

`<output_dir>/<phase>/` holds the Trainer's `checkpoint-N/`, and at its end `trainer_state.json` with the log history
and `scores.json`, what the evaluation after the phase said.
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from safetensors.torch import load_file

from smt_hf.errors import InputError

from .adapters import LoraSettings, add_lora
from .arguments import BPTTTrainingArguments, DMTTrainingArguments, PhaseArguments, SMTTrainingArguments, refuse
from .checkpoints import aside, newest_checkpoint, step_of, what_is_missing
from .composite import SMTForPreTraining
from .pacing import VIRTUAL_STEPS_PER_SECOND, Pace, TrainingCost
from .phase_trainer import PhaseTrainer
from .sharding import load_student_optimizer
from .stopping import Interrupted, StopOnSignal
from .trainers import BPTTTrainer, DMTTrainer, SMTTrainer

TRAINERS: dict[str, type[PhaseTrainer]] = {"smt": SMTTrainer, "dmt": DMTTrainer, "bptt": BPTTTrainer}
ARGUMENTS: dict[str, type[PhaseArguments]] = {
    "smt": SMTTrainingArguments,
    "dmt": DMTTrainingArguments,
    "bptt": BPTTTrainingArguments,
}
_SCORES = "scores.json"
_LOG = "trainer_state.json"
# Optimisers whose state is tensors by parameter.
_CARRIED_OPTIMIZERS = ("adamw_torch", "sgd", "rmsprop", "adagrad")


@dataclass(frozen=True)
class PhaseResult:
    """What a finished phase leaves."""

    arm: str  # name of the pipeline up to here (`smt8_bptt`)
    arguments: PhaseArguments
    seconds: float  # inside training steps, evaluation and saving excluded, over interruptions
    sequential_steps: int  # transitions computed one after the other
    tokens: int  # transitions supervised
    log_history: list[dict]  # the Trainer's
    scores: dict  # what `evaluate` returned after the phase
    is_new: bool  # trained now, not found complete on disk
    model: SMTForPreTraining  # the one that `run_phases` was given, unless the phase was sharded
    skipped_steps: int = 0  # left out, their gradient was not finite


def arm_name(phases: list[PhaseArguments]) -> str:
    """Phases joined by underscores; a gradient that crosses more than one transition is named: `smt8_dmt`.

    BPTT alone is `bptt` if its window is the whole row, else `bptt_truncated`. A pipeline whose smt phase supervises
    single transitions is the paper's: `published_smt` after that phase, `published` with what follows. A phase that
    does not train the updater has no part in the name, unless it is the only smt phase: `smt_dmt32` is a teacher that
    was trained alone, then dmt.
    """
    began_as_teacher = any(arguments.phase == "smt" for arguments in phases)
    phases = [arguments for arguments in phases if arguments.trains_updater]
    if not phases:
        return "teacher"
    if phases[0].num_supervised_transitions:
        return "published_smt" if len(phases) == 1 else "published"
    if [arguments.phase for arguments in phases] == ["bptt"] and not began_as_teacher:
        return "bptt" if phases[0].transition_steps == phases[0].context_length else "bptt_truncated"
    parts = ["smt"] if began_as_teacher and all(arguments.phase != "smt" for arguments in phases) else []
    for arguments in phases:
        steps = arguments.transition_steps
        parts.append(arguments.phase if arguments.phase == "bptt" or steps == 1 else f"{arguments.phase}{steps}")
    return "_".join(parts)


def apply_required(arguments: PhaseArguments, required: dict[str, Any]) -> list[str]:
    """Set the arguments of a phase that follow from what is learned, in place.

    Args:
        required: name -> value.

    Returns:
        One line per change, for the log: `bptt: context_length 256 -> 127`.
    """
    lines = []
    for name, value in required.items():
        earlier = getattr(arguments, name)
        if earlier != value:
            setattr(arguments, name, value)
            lines.append(f"{arguments.phase}: {name} {earlier} -> {value}")
    return lines


def lay_out(phases: list[PhaseArguments], output_dir: str) -> None:
    """Give every phase its folder and its part of a learning-rate schedule that it shares with others. In place.

    Raises:
        InputError: a phase without a number of steps, or with settings that a pipeline cannot resume from.
    """
    for arguments in phases:
        _check_phase(arguments)
    refuse(
        not phases[-1].trains_updater,
        "the last phase trains the teacher and the readout alone (`trains_updater` false): let a phase follow that "
        "trains the student.",
    )
    for index, (before, arguments) in enumerate(itertools.pairwise(phases), start=1):
        _check_continuation(before, arguments)
        before.drift_is_mended = any(later.phase in ("dmt", "bptt") for later in phases[index:])
    names: dict[str, int] = {}
    for place, arguments in enumerate(phases):
        arguments.student_is_new = not any(before.trains_updater for before in phases[:place])
        names[arguments.phase] = names.get(arguments.phase, 0) + 1
        number = "" if names[arguments.phase] == 1 else f"_{names[arguments.phase]}"
        arguments.output_dir = os.path.join(output_dir, arguments.phase + number)
    first = 0
    for index in range(1, len(phases) + 1):
        if index < len(phases) and phases[index].continue_previous_phase:
            continue
        group = phases[first:index]
        refuse(
            len({arguments.max_seconds is None for arguments in group}) > 1,
            "phases with one learning-rate schedule must all have `max_seconds`, or none of them: set it for each, or "
            "set `continue_previous_phase` to false.",
        )
        total, used = sum(map(_schedule_length, group)), 0
        for arguments in group:
            if len(group) > 1:
                arguments.schedule_offset, arguments.schedule_steps = used, total
            used += _schedule_length(arguments)
        first = index


def _check_phase(arguments: PhaseArguments) -> None:
    refuse(arguments.max_steps < 1, f"the {arguments.phase} phase of a pipeline needs `max_steps` of at least 1.")
    refuse(
        arguments.load_best_model_at_end,
        "`load_best_model_at_end` does not fit a pipeline, which goes on from the last step of a phase: leave it out.",
    )
    refuse(
        arguments.save_only_model,
        "`save_only_model` does not fit a pipeline: later phases and resumed runs read the optimiser state from the "
        "checkpoint. To save room on the disk, set `save_total_limit` to 1.",
    )


def _check_continuation(before: PhaseArguments, arguments: PhaseArguments) -> None:
    if not arguments.continue_previous_phase:
        return
    optim = getattr(arguments.optim, "value", arguments.optim)
    refuse(
        not str(optim).startswith(_CARRIED_OPTIMIZERS),
        f"the optimiser state of `optim={optim}` is not handed from phase to phase: set "
        "`continue_previous_phase` to false.",
    )
    refuse(
        arguments.matrix_optimizer != before.matrix_optimizer,
        f"the {arguments.phase} phase goes on with the optimiser of the phase before it: give both the same "
        "`matrix_optimizer`, or set `continue_previous_phase` to false.",
    )


def _schedule_length(arguments: PhaseArguments) -> int:
    if arguments.max_seconds is None:
        return arguments.max_steps
    return int(arguments.max_seconds * VIRTUAL_STEPS_PER_SECOND)


def run_phases(
    model: SMTForPreTraining,
    phases: list[PhaseArguments],
    rows_for: Callable[[PhaseArguments], Dataset],
    eval_rows: Dataset,
    processing_class=None,
    evaluate: Callable[[SMTForPreTraining, PhaseArguments], dict] | None = None,
    resume_from_checkpoint: str | bool | None = None,
    lora: dict[str, LoraSettings] | None = None,
) -> Iterator[PhaseResult]:
    """Train the phases one after the other, yielding as each ends. The model is trained in place, but where a
    phase is sharded: `PhaseResult.model` is the one to go on with.

    A phase is complete when its checkpoint at `max_steps` (or past `max_seconds`) is; what the checkpoint holds
    (weights, the student's optimiser state, cost, log) is all that later phases and results need, so that a run can be
    cut off anywhere.

    Args:
        model: student and teacher.
        phases: as left by `lay_out`.
        rows_for: training rows for a phase.
        eval_rows: held-out rows.
        processing_class: tokenizer, saved with every checkpoint.
        evaluate: scores of the model after a phase; a dict that JSON can hold. Called on all processes, whose scores
            are the same: they may share the work.
        resume_from_checkpoint: true: skip complete phases and go on from the newest complete checkpoint of the next;
            a path: go on from that checkpoint of a phase, and remove what came after it.
        lora: by phase: it trains LoRA layers alone, which are written to `adapter/` in its folder and then merged.

    Raises:
        InputError: the path is not a complete checkpoint of one of the phases.
        Interrupted: SIGTERM or Ctrl-C came, and a complete checkpoint has been saved.
    """
    if isinstance(resume_from_checkpoint, str):
        _forget_what_follows(phases, resume_from_checkpoint)
    handed: dict[str, Any] = {}  # what a phase hands to the next besides weights
    with StopOnSignal() as stop:
        for index, arguments in enumerate(phases):
            folder = Path(str(arguments.output_dir))
            found = _of_main(newest_checkpoint, folder) if resume_from_checkpoint else None
            is_new = found is None or not _is_last(found, arguments)
            if is_new and index and arguments.student_is_new and arguments.trains_updater:
                model.hand_over()  # the teacher has been trained alone since they were made
            adapted = add_lora(model.student, lora[arguments.phase]) if lora and arguments.phase in lora else None
            if is_new:
                trainer = TRAINERS[arguments.phase](
                    model=model,
                    args=arguments,
                    train_dataset=rows_for(arguments),
                    eval_dataset=eval_rows,
                    processing_class=processing_class,
                    callbacks=[stop],
                    **_start_of(arguments, handed),
                )
                model, checkpoint = _trained(trainer, found, adapted is not None, stop)
            else:
                checkpoint = str(found)
                _restore(model, checkpoint, folder, arguments.process_index == 0)
            if adapted is not None:
                _merge(adapted, folder, arguments.process_index == 0, is_new)
            model.eval()
            scores = {} if evaluate is None else _scored(model, arguments, evaluate, folder / _SCORES, is_new)
            if stop.agreed():
                raise Interrupted(stop.agreed() or 0, None)
            state = json.loads((Path(checkpoint) / _LOG).read_text())
            handed = _handed_on(arguments, checkpoint, state["stateful_callbacks"], handed)
            cost = state["stateful_callbacks"][TrainingCost.__name__]["attributes"]
            yield PhaseResult(
                arm=arm_name(phases[: index + 1]),
                arguments=arguments,
                log_history=state["log_history"],
                scores=scores,
                is_new=is_new,
                model=model,
                **{name: value for name, value in cost.items() if name in TrainingCost.spent_of_a_phase},
            )


def check_trainers(
    model: SMTForPreTraining,
    phases: list[PhaseArguments],
    rows_for: Callable[[PhaseArguments], Dataset],
    eval_rows: Dataset,
    processing_class=None,
) -> None:
    """Make the Trainer of every phase and let go of it again: what a phase refuses is then refused before any work.

    Args:
        others: as in [`run_phases`].

    Raises:
        InputError: the model, the data or the launch do not fit a phase.
    """
    for arguments in phases:
        words = {"train_dataset": rows_for(arguments), "eval_dataset": eval_rows, "processing_class": processing_class}
        trainer = TRAINERS[arguments.phase](model=model, args=arguments, **words)
        if trainer._is_sharded:
            AcceleratorState._reset_state()  # accelerate refuses a second engine beside the first


def _of_main(function: Callable[[Any], Any], path: Any) -> Any:
    """What the function returns on the main process, on all: what decides about a collective call is the same."""
    result = [function(path) if PartialState().is_main_process else None]
    return broadcast_object_list(result)[0]


def _trained(
    trainer: PhaseTrainer, checkpoint: str | None, is_adapted: bool, stop: StopOnSignal
) -> tuple[SMTForPreTraining, str]:
    """Train a phase to its end: the model to go on with, and the checkpoint that holds it."""
    refuse(
        is_adapted and trainer._is_sharded,
        "LoRA phases run on one process or under DDP: leave DeepSpeed, FSDP or LoRA out.",
    )
    model, folder = trainer.model, Path(str(trainer.args.output_dir))
    model.train()
    trainer.train(resume_from_checkpoint=checkpoint)
    checkpoint = str(folder / f"checkpoint-{trainer.state.global_step}")
    if _of_main(what_is_missing, checkpoint):  # whatever the save strategy is
        trainer._save_checkpoint(trainer.model, trial=None)
    trainer._finish_current_push()
    trainer.save_state()
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    if trainer._is_sharded:
        # The engine has split the weights of this model; the checkpoint has whole ones.
        model = SMTForPreTraining(model.config)
        _load_weights(model, checkpoint)
        model.to(trainer.args.device)
        AcceleratorState._reset_state()  # accelerate refuses a second engine beside the first
    if stop.agreed():
        raise Interrupted(stop.agreed() or 0, checkpoint)
    return model, checkpoint


def _restore(model: SMTForPreTraining, checkpoint: str, folder: Path, is_main: bool) -> None:
    """Take over a phase that an earlier run has completed."""
    _load_weights(model, checkpoint)
    if is_main:  # what a run leaves that is killed between two steps of saving
        shutil.rmtree(aside(folder), ignore_errors=True)
        if not (folder / _LOG).exists():
            shutil.copyfile(Path(checkpoint) / _LOG, folder / _LOG)


def _merge(adapted, folder: Path, is_main: bool, is_new: bool) -> None:
    """Write the LoRA layers of a phase to `adapter/`, complete or absent, and merge them into the weights."""
    if is_main and (is_new or not (folder / "adapter").exists()):
        shutil.rmtree(folder / "adapter.new", ignore_errors=True)
        adapted.save_pretrained(str(folder / "adapter.new"))
        shutil.rmtree(folder / "adapter", ignore_errors=True)
        (folder / "adapter.new").rename(folder / "adapter")
    adapted.merge_and_unload()


def _scored(model: SMTForPreTraining, arguments: PhaseArguments, evaluate, path: Path, is_new: bool) -> dict:
    """The scores of a phase: those of an earlier run where it was complete, else what `evaluate` says now."""
    known = _of_main(lambda path: json.loads(path.read_text()) if not is_new and path.exists() else None, path)
    if known is not None:
        return known
    scores = evaluate(model, arguments)
    if arguments.process_index == 0:
        new = path.with_name(path.name + ".new")
        new.write_text(json.dumps(scores))
        new.replace(path)
    return scores


def _start_of(arguments: PhaseArguments, handed: dict[str, Any]) -> dict[str, Any]:
    """What a phase begins with: the optimiser state, and the first level that is no easier than what the student has
    reached."""
    level, reached = handed.get("level", 0), handed.get("reached", 0)
    if arguments.levels:
        level = next((at for at, own in enumerate(arguments.levels) if own >= reached), len(arguments.levels) - 1)
    state = handed.get("optimizer") if arguments.continue_previous_phase else None
    return {"student_optimizer_state": state, "curriculum_level": level}


def _handed_on(arguments: PhaseArguments, checkpoint: str, callbacks: dict, handed: dict[str, Any]) -> dict[str, Any]:
    """For the next phase: optimiser state, and level and difficulty that the last curriculum has reached."""
    level, reached = handed.get("level", 0), handed.get("reached", 0)
    # A phase without levels, or without the student, says nothing of what the student has reached.
    if arguments.trains_updater and arguments.curriculum_threshold is not None:
        level = callbacks[Pace.__name__]["attributes"]["level"]
        reached = max(reached, arguments.levels[level]) if arguments.levels else reached
    return {"optimizer": load_student_optimizer(checkpoint), "level": level, "reached": reached}


def _is_last(checkpoint: str, arguments: PhaseArguments) -> bool:
    state = json.loads((Path(checkpoint) / _LOG).read_text())
    if arguments.max_seconds is None:
        return state["global_step"] >= arguments.max_steps
    return state["stateful_callbacks"][TrainingCost.__name__]["attributes"]["seconds"] >= arguments.max_seconds


def check_named_checkpoint(phases: list[PhaseArguments], path: str) -> int:
    """The index of the phase that the checkpoint is of.

    Raises:
        InputError: it is not a complete checkpoint of one of the phases.
    """
    folders = [Path(str(arguments.output_dir)).resolve() for arguments in phases]
    given = Path(path).resolve()
    problem = "it is not in a folder of one of the phases" if given.parent not in folders else what_is_missing(given)
    if problem:
        raise InputError(
            f"{path!r} is not a complete checkpoint of this run: {problem}. Pass one of "
            f"{', '.join(map(str, folders))} with /checkpoint-N, or no path for the newest."
        )
    return folders.index(given.parent)


def _forget_what_follows(phases: list[PhaseArguments], checkpoint: str) -> None:
    """Remove what was trained after a checkpoint, so that it is the newest of its phase and later phases start anew."""
    index = check_named_checkpoint(phases, checkpoint)
    if phases[index].process_index == 0:
        for later in phases[index + 1 :]:
            shutil.rmtree(str(later.output_dir), ignore_errors=True)
        folder = Path(str(phases[index].output_dir))
        for path in folder.glob("checkpoint-*"):
            if step_of(path) > step_of(Path(checkpoint)):
                shutil.rmtree(path)
        for name in (_SCORES, _LOG):
            (folder / name).unlink(missing_ok=True)
    PartialState().wait_for_everyone()


def _load_weights(model: SMTForPreTraining, checkpoint: str) -> None:
    missing, unexpected = model.load_state_dict(load_file(os.path.join(checkpoint, "model.safetensors")), strict=False)
    tied = set(model.all_tied_weights_keys)
    if unexpected or set(missing) - tied:
        raise InputError(f"{checkpoint} does not fit the model: missing {missing}, unexpected {unexpected}.")

"""A pipeline of phases: one folder and one Trainer a phase, resumable at any checkpoint.

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

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from datasets import Dataset
from safetensors.torch import load_file

from .adapters import LoraSettings, add_lora
from .arguments import BPTTTrainingArguments, DMTTrainingArguments, PhaseArguments, SMTTrainingArguments
from .checkpoints import newest_checkpoint, step_of, what_is_missing
from .composite import SMTForPreTraining
from .pacing import VIRTUAL_STEPS_A_SECOND, Pace, TrainingCost
from .stopping import Interrupted, StopOnSignal
from .trainers import BPTTTrainer, DMTTrainer, SMTTrainer, load_student_optimizer

TRAINERS: dict[str, type[SMTTrainer]] = {"smt": SMTTrainer, "dmt": DMTTrainer, "bptt": BPTTTrainer}
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
    """What a finished phase leaves.

    Args:
        arm: name of the pipeline up to here (`smt8_bptt`).
        arguments: of the phase.
        seconds: inside training steps, evaluation and saving excluded, over interruptions.
        sequential_steps: transitions computed one after the other.
        tokens: transitions supervised.
        log_history: the Trainer's.
        scores: what `evaluate` returned after the phase.
        is_new: whether it was trained now, not found complete on disk.
        model: student and teacher after the phase. The one that `run_phases` was given, unless the phase was sharded.
    """

    arm: str
    arguments: PhaseArguments
    seconds: float
    sequential_steps: int
    tokens: int
    log_history: list[dict]
    scores: dict
    is_new: bool
    model: SMTForPreTraining


def arm_name(phases: list[PhaseArguments]) -> str:
    """Phases joined by underscores; a gradient that crosses more than one transition is named: `smt8_dmt`.

    BPTT alone is `bptt` if its window is the whole row, else `bptt_truncated`. A pipeline whose SMT supervises single
    transitions a row is the paper's: `published_smt` after that phase, `published` with what follows. A phase that does
    not train the updater has no part in the name.
    """
    phases = [arguments for arguments in phases if getattr(arguments, "trains_updater", True)]
    if not phases:
        return "teacher"
    if getattr(phases[0], "num_supervised_transitions", 0):
        return "published_smt" if len(phases) == 1 else "published"
    if [arguments.phase for arguments in phases] == ["bptt"]:
        return "bptt" if phases[0].transition_steps == phases[0].context_length else "bptt_truncated"
    parts = []
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
        ValueError: a phase without a number of steps, or with settings that a pipeline cannot resume from.
    """
    for arguments in phases:
        if arguments.max_steps < 1:
            raise ValueError(f"the {arguments.phase} phase of a pipeline needs `max_steps` of at least 1.")
        if arguments.load_best_model_at_end:
            raise ValueError(
                "`load_best_model_at_end` does not fit a pipeline, which goes on from a phase's last step."
            )
    if not getattr(phases[-1], "trains_updater", True):
        raise ValueError(
            "the last phase trains the teacher and the readout alone (`trains_updater` false): let a phase follow that "
            "trains the student."
        )
    for arguments in phases[1:]:
        if arguments.continue_previous_phase and not str(arguments.optim).lower().split(".")[-1].startswith(
            _CARRIED_OPTIMIZERS
        ):
            raise ValueError(
                f"the optimiser state of `optim={arguments.optim}` is not handed from phase to phase: set "
                "`continue_previous_phase` to false."
            )
    for before, arguments in itertools.pairwise(phases):
        if arguments.continue_previous_phase and arguments.matrix_optimizer != before.matrix_optimizer:
            raise ValueError(
                f"the {arguments.phase} phase goes on with the optimiser of the phase before it: give both the same "
                "`matrix_optimizer`, or set `continue_previous_phase` to false."
            )
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
        if len({arguments.max_seconds is None for arguments in group}) > 1:
            raise ValueError(
                "phases with one learning-rate schedule must all have `max_seconds`, or none of them: set it for each, "
                "or set `continue_previous_phase` to false."
            )
        total, used = sum(map(_schedule_length, group)), 0
        for arguments in group:
            if len(group) > 1:
                arguments.schedule_offset, arguments.schedule_steps = used, total
            used += _schedule_length(arguments)
        first = index


def _schedule_length(arguments: PhaseArguments) -> int:
    if arguments.max_seconds is None:
        return arguments.max_steps
    return int(arguments.max_seconds * VIRTUAL_STEPS_A_SECOND)


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
        evaluate: scores of the model after a phase; a dict that JSON can hold. Called on the main process.
        resume_from_checkpoint: true: skip complete phases and go on from the newest complete checkpoint of the next;
            a path: go on from that checkpoint of a phase, and remove what came after it.
        lora: by phase: it trains LoRA layers alone, which are written to `adapter/` in its folder and then merged.

    Raises:
        ValueError: the path is not a complete checkpoint of one of the phases.
        Interrupted: SIGTERM or Ctrl-C came, and a complete checkpoint has been saved.
    """
    with StopOnSignal() as stop:
        yield from _run_phases(
            model, phases, rows_for, eval_rows, processing_class, evaluate, resume_from_checkpoint, lora, stop
        )


def _run_phases(
    model, phases, rows_for, eval_rows, processing_class, evaluate, resume_from_checkpoint, lora, stop: StopOnSignal
) -> Iterator[PhaseResult]:
    resume: str | bool | None = resume_from_checkpoint
    if isinstance(resume, str):
        _forget_what_follows(phases, resume)
    state: dict[str, dict[str, torch.Tensor]] | None = None
    level, reached = 0, 0  # of the last curriculum; the difficulty, where phases name theirs
    for index, arguments in enumerate(phases):
        folder = Path(str(arguments.output_dir))
        checkpoint = newest_checkpoint(folder) if resume else None
        is_new = checkpoint is None or not _is_last(checkpoint, arguments)
        adapted = add_lora(model.student, lora[arguments.phase]) if lora and arguments.phase in lora else None
        if is_new:
            model.train()
            trainer = TRAINERS[arguments.phase](
                model=model,
                args=arguments,
                train_dataset=rows_for(arguments),
                eval_dataset=eval_rows,
                processing_class=processing_class,
                student_optimizer_state=state if arguments.continue_previous_phase else None,
                curriculum_level=_first_level(arguments, level, reached),
                callbacks=[stop],
            )
            if adapted is not None and trainer._is_sharded:
                raise ValueError("LoRA phases run on one process or under DDP: leave DeepSpeed, FSDP or LoRA out.")
            trainer.train(resume_from_checkpoint=checkpoint)
            checkpoint = str(folder / f"checkpoint-{trainer.state.global_step}")
            if what_is_missing(checkpoint):  # whatever the save strategy is
                trainer._save_checkpoint(trainer.model, trial=None)
            trainer._finish_current_push()
            trainer.save_state()
            trainer.accelerator.wait_for_everyone()
            trainer.accelerator.free_memory()
            if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
                # What is left of the model belongs to the engine; the checkpoint has it whole.
                model = SMTForPreTraining(model.config)
                _load_weights(model, checkpoint)
                model.to(arguments.device)
                AcceleratorState._reset_state()  # accelerate refuses a second engine beside the first
            if stop.agreed():
                raise Interrupted(stop.agreed() or 0, checkpoint)
        else:
            _load_weights(model, str(checkpoint))
            if arguments.process_index == 0 and not (folder / _LOG).exists():  # killed between the two
                shutil.copyfile(Path(str(checkpoint)) / _LOG, folder / _LOG)
        if adapted is not None:
            if arguments.process_index == 0 and (is_new or not (folder / "adapter").exists()):
                shutil.rmtree(folder / "adapter.new", ignore_errors=True)
                adapted.save_pretrained(str(folder / "adapter.new"))
                shutil.rmtree(folder / "adapter", ignore_errors=True)
                (folder / "adapter.new").rename(folder / "adapter")
            adapted.merge_and_unload()
        state = load_student_optimizer(str(checkpoint))
        model.eval()
        if evaluate is None:
            scores = {}
        elif is_new or not (folder / _SCORES).exists():
            scores = evaluate(model, arguments)
            if arguments.process_index == 0:
                aside = folder / (_SCORES + ".new")
                aside.write_text(json.dumps(scores))
                aside.replace(folder / _SCORES)
        else:
            scores = json.loads((folder / _SCORES).read_text())
        if stop.agreed():
            raise Interrupted(stop.agreed() or 0, None)
        trainer_state = json.loads((Path(str(checkpoint)) / "trainer_state.json").read_text())
        callbacks = trainer_state["stateful_callbacks"]
        # What the student has got to; a phase without levels has nothing to say.
        if getattr(arguments, "trains_updater", True) and arguments.curriculum_threshold is not None:
            level = callbacks[Pace.__name__]["attributes"]["level"]
            reached = max(reached, arguments.levels[level]) if arguments.levels else reached
        yield PhaseResult(
            arm=arm_name(phases[: index + 1]),
            arguments=arguments,
            log_history=trainer_state["log_history"],
            scores=scores,
            is_new=is_new,
            model=model,
            **callbacks[TrainingCost.__name__]["attributes"],
        )


def _first_level(arguments: PhaseArguments, level: int, reached: int) -> int:
    """Where a phase begins: at the first level that is no easier than what the student has got to."""
    if not arguments.levels:
        return level
    return next((index for index, own in enumerate(arguments.levels) if own >= reached), len(arguments.levels) - 1)


def _is_last(checkpoint: str, arguments: PhaseArguments) -> bool:
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    if arguments.max_seconds is None:
        return state["global_step"] >= arguments.max_steps
    return state["stateful_callbacks"][TrainingCost.__name__]["attributes"]["seconds"] >= arguments.max_seconds


def check_named_checkpoint(phases: list[PhaseArguments], path: str) -> int:
    """The index of the phase that the checkpoint is of.

    Raises:
        ValueError: it is not a complete checkpoint of one of the phases.
    """
    folders = [Path(str(arguments.output_dir)).resolve() for arguments in phases]
    given = Path(path).resolve()
    problem = "it is not in a folder of one of the phases" if given.parent not in folders else what_is_missing(given)
    if problem:
        raise ValueError(
            f"{path!r} is not a complete checkpoint of this run: {problem}. Pass one of "
            f"{', '.join(map(str, folders))} with /checkpoint-N, or no path for the newest."
        )
    return folders.index(given.parent)


def _forget_what_follows(phases: list[PhaseArguments], checkpoint: str) -> None:
    """Remove what was trained after a checkpoint, so that it is its phase's newest and later phases start anew."""
    index = check_named_checkpoint(phases, checkpoint)
    if phases[index].process_index == 0:
        for later in phases[index + 1 :]:
            shutil.rmtree(str(later.output_dir), ignore_errors=True)
        folder = Path(str(phases[index].output_dir))
        for path in folder.glob("checkpoint-*"):
            if step_of(path) > step_of(Path(checkpoint)):
                shutil.rmtree(path)
        for name in (_SCORES, "trainer_state.json"):
            (folder / name).unlink(missing_ok=True)
    PartialState().wait_for_everyone()


def _load_weights(model: SMTForPreTraining, checkpoint: str) -> None:
    missing, unexpected = model.load_state_dict(load_file(os.path.join(checkpoint, "model.safetensors")), strict=False)
    tied = set(model.all_tied_weights_keys)
    if unexpected or set(missing) - tied:
        raise ValueError(f"{checkpoint} does not fit the model: missing {missing}, unexpected {unexpected}.")

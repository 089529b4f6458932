"""Pretraining from end to end, on text, a task, documents or pixels: what `recipes/pretrain.py` runs."""

import contextlib
import json
import math
import shutil
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import PreTrainedConfig, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import logging

from smt_hf.command_line import names_of
from smt_hf.errors import InputError
from smt_hf.publishing.evidence import append_evidence
from smt_hf.publishing.export import export_model, export_student, write_card, write_json
from smt_hf.publishing.figures import plot_curves, plot_drift_by_age, plot_loss_by_position
from smt_hf.publishing.hub import publish
from smt_hf.publishing.provenance import run_facts
from smt_hf.publishing.scores import drift_of, results_table
from smt_hf.teachers import SMTPretrainedTeacherConfig
from smt_hf.training.adapters import LoraSettings
from smt_hf.training.argument_checks import words_of
from smt_hf.training.arguments import UNBOUNDED, PhaseArguments
from smt_hf.training.cached_teacher import fill_teacher_caches
from smt_hf.training.checkpoints import step_of
from smt_hf.training.composite import SMTForPreTraining, SMTPreTrainingConfig
from smt_hf.training.embeddings import init_embeddings_from_teacher
from smt_hf.training.launch import launched_sharded, launched_with_deepspeed
from smt_hf.training.phases import arm_name, check_named_checkpoint, check_trainers, lay_out, run_phases
from smt_hf.upload import check_hub_access

from .composition import (
    changed_settings,
    cost_of,
    described_sizes,
    launch_settings,
    model_config,
    phase_settings,
    resolve,
    set_threads,
    tokenizer_hash,
)
from .run_arguments import ParsedRun, PretrainArguments
from .run_folder import RESULTS, RUN, check_output_dir, check_writable, locked, writing
from .subjects import DocumentSubject, PixelSubject, Subject, TaskSubject, TextSubject
from .teacher_language import end_tokens, teacher_tokenizer

# Settings that say what is read, where no hash of the documents does.
_SOURCE = ("train_file", "validation_file", "dataset_name", "dataset_config_name", "text_column")
_OF_A_STREAM = ("streaming", "shuffle_buffer_size", *_SOURCE)
_ANSWERS = 4  # held-out documents that the card shows


@dataclass
class Trained:
    """What the phases leave."""

    model: SMTForPreTraining  # student and teacher after the last phase
    spent: Counter[str]  # cost of all phases so far
    arms: dict[str, dict] = field(default_factory=dict)  # name -> scores and cost
    losses: dict[str, np.ndarray] = field(default_factory=dict)  # arm -> its held-out loss by position, if any
    phases: dict[str, list[dict]] = field(default_factory=dict)  # arm -> settings of the phases that trained it
    histories: list[tuple[str, list[dict]]] = field(default_factory=list)  # phase and log of each phase

    def add_arm(self, name: str, scores: dict, cost: dict, phases: list[PhaseArguments]) -> None:
        """Take in the scores of an arm; `losses` among them are kept apart."""
        if "losses" in scores:
            self.losses[name] = np.array(scores["losses"])
        self.phases[name] = [changed_settings(arguments) for arguments in phases]
        self.arms[name] = {**{key: value for key, value in scores.items() if key != "losses"}, **cost}


def pretrain(parsed: ParsedRun) -> dict:
    """Train, export, score, describe. Everything that can be wrong with the input is found before anything is written.

    Args:
        parsed: as `parse_run` returns it. Its arguments are resolved in place.

    Returns:
        The content of `eval_results.json`; on other processes than the first, nothing.

    Raises:
        InputError: bad input, with the way to mend it.
    """
    run, phases = parsed.run, parsed.phases
    is_main = phases[0].process_index == 0
    repository = check_run(parsed)
    logging.disable_progress_bar()  # of saving; the phases have their own
    num_threads = set_threads(run.num_threads)
    with phases[0].main_process_first(desc="preparing the data"):
        subject = make_subject(parsed)
    notes = parsed.notes + resolve(phases, subject, parsed.rival)
    config = model_config(subject, phases, parsed.student_fields, parsed.teacher_fields)
    if run.init_embeddings_from_teacher and not isinstance(config.teacher, SMTPretrainedTeacherConfig):
        raise InputError(
            "`init_embeddings_from_teacher` needs a phase with a language model as the teacher: give "
            "`teacher_model_name_or_path`, and smt or dmt among the phases, or leave it out."
        )
    ends = end_tokens(subject.tokenizer, config.teacher)  # now, while the model's folder is there
    if is_main:
        print("\n".join([*notes, subject.describe()]), flush=True)
    output_dir = Path(run.output_dir)
    with contextlib.ExitStack() as stack:
        if is_main:
            stack.enter_context(writing(run, _settings(parsed, config, subject)))
        PartialState().wait_for_everyone()  # an old run's folders are gone before a process looks into them
        results = _finished(parsed) if run.resume is True else None
        if results is None:
            trained = _train(parsed, config, subject, num_threads)
            if is_main:
                # Before anything that may take long or fail.
                if trained.model.teacher is not None:
                    export_model(trained.model.teacher, subject.tokenizer, output_dir / "teacher")
                trained.model.student.generation_config.eos_token_id = ends
                export_student(trained.model.student, subject.tokenizer, output_dir / "student")
            if parsed.rival is not None:
                _train_rival(parsed, config, subject, trained)
            if not is_main:
                return {}
            results = _results(parsed, config, subject, trained, run_facts(num_threads, phases[0]))
            print(f"\n{results_table(results)}\n")
            _describe(results, subject, trained, output_dir)
            if run.evidence_file:
                path = Path(run.evidence_file)
                with locked(path.absolute().parent, f".{path.name}.lock", waits=True):
                    append_evidence(results, trained.phases, path)
            print(f"\nwritten to {output_dir}: {', '.join(sorted(path.name for path in output_dir.glob('[!.]*')))}")
        if repository is not None and is_main:  # the Hub may have refused it the first time
            print(publish_student(output_dir / "student", repository, phases[-1], f"The student of {arm_name(phases)}"))
    return results


def check_run(parsed: ParsedRun) -> str | None:
    """Check everything about a pretraining run but its data, and lay out its phases, in place.

    Returns:
        The repository of the Hub to which the student is to be sent, if any.

    Raises:
        InputError: bad input, with the way to mend it.
    """
    run, phases, rival = parsed.run, parsed.phases, parsed.rival
    if rival is not None and rival.warmup_steps >= 1:
        raise InputError(
            "`bptt_warmup_steps` must be a share of the phase, below 1, with `compare_bptt`: BPTT ends by the seconds."
        )
    if run.use_peft:
        lora_settings(run)
        if launched_sharded() or any(arguments.deepspeed or arguments.fsdp for arguments in phases):
            raise InputError("LoRA phases run on one process or under DDP: leave DeepSpeed, FSDP or `use_peft` out.")
        if "dmt" not in [arguments.phase for arguments in phases[1:]]:
            raise InputError(
                "`use_peft` is of dmt phases that follow another phase: give `--phases smt,dmt`, or leave it out."
            )
        if any(arguments.phase == "dmt" and arguments.trainable is not None for arguments in phases):
            raise InputError(
                "`use_peft` trains LoRA layers: leave `trainable` of the dmt phase out, and choose with `lora_parts`."
            )
    check_output_dir(run)
    if run.evidence_file:
        check_writable("evidence_file", Path(run.evidence_file).absolute().parent)
    lay_out(phases, run.output_dir)
    if isinstance(run.resume, str):
        check_named_checkpoint(phases, run.resume)
    if rival is not None and arm_name(phases) == arm_name([rival]):
        warnings.warn("the pipeline is BPTT itself: there is nothing to compare it with.", stacklevel=2)
        parsed.rival = None
    if phases[0].phase == "dmt" and phases[0].process_index == 0:
        warnings.warn("the first phase is dmt: the student will imitate an untrained teacher.", stacklevel=2)
    check_trackers(phases)
    return pushed_repository(phases)


def lora_settings(run) -> LoraSettings | None:
    """The LoRA layers that a run asks for by `use_peft`, `lora_r`, `lora_alpha` and `lora_parts`, if it does."""
    return LoraSettings(run.lora_r, run.lora_alpha, parts=tuple(run.lora_parts.split(","))) if run.use_peft else None


def check_trackers(phases: list[PhaseArguments]) -> None:
    """Raises:
    InputError: a tracker of `report_to` is unknown or not installed.
    """
    for arguments in phases:
        try:
            for tracker in get_reporting_integration_callbacks(arguments.report_to):
                tracker()
        except (ValueError, RuntimeError, ImportError) as error:
            raise InputError(f"`report_to`: {error} Or pass `--report_to none`.") from error


def pushed_repository(phases: list[PhaseArguments]) -> str | None:
    """The repository that `--push_to_hub --hub_model_id` names, if any.

    Raises:
        InputError: none is named, or not one for all phases; or the account may not write there.
    """
    pushing = [arguments for arguments in phases if arguments.push_to_hub]
    if not pushing:
        return None
    first, names = pushing[0], {str(arguments.hub_model_id) for arguments in pushing}
    if len(names) > 1 or "/" not in str(first.hub_model_id):
        raise InputError("`push_to_hub` needs one `--hub_model_id user/name` for the whole run.")
    if first.process_index == 0:
        check_hub_access(str(first.hub_model_id), first.hub_token, first.hub_private_repo)
    return str(first.hub_model_id)


def make_subject(parsed: ParsedRun) -> Subject:
    """What a run is to learn.

    Raises:
        InputError: arguments that contradict each other, or data that cannot be read.
    """
    run = parsed.run
    if run.task == "text":
        if run.difficulty is not None or run.curriculum is not None:
            raise InputError(
                "`difficulty` and `curriculum` belong to other tasks than text: set `task`, or leave them out."
            )
        names = ("tokenizer_name", "document_start_fraction", "streaming", *_SOURCE)
        settings = {name: getattr(run, name) for name in names} | {"buffer_size": run.shuffle_buffer_size}
        if run.tokenizer_name is None and any(arguments.phase != "bptt" for arguments in parsed.phases):
            settings["tokenizer"] = teacher_tokenizer(parsed.teacher_fields)
        return TextSubject([*parsed.phases, *([parsed.rival] if parsed.rival else [])], run.seed, **settings)
    of_text = ("tokenizer_name", *_OF_A_STREAM)
    given = [name for name in of_text if getattr(run, name) != getattr(PretrainArguments, name)]
    if given:
        raise InputError(f"`task` {run.task} brings its own data: leave {', '.join(given)} out.")
    if run.task == "pixels":
        return PixelSubject(run.mnist_dir, run.num_heldout)
    try:
        levels = [int(level) for level in str(run.curriculum or "").split(",") if level]
    except ValueError as error:
        raise InputError(f"`curriculum` must be numbers joined by commas, got {run.curriculum!r}.") from error
    if run.difficulty is None:
        raise InputError(f"`task` {run.task} needs a `difficulty`.")
    if run.task == "documents":
        documents = words_of(run.documents or [])
        return DocumentSubject(documents, run.difficulty, levels, run.haystack, run.seed, run.num_heldout)
    return TaskSubject(run.task, run.difficulty, levels, run.seed, run.num_heldout)


def _settings(parsed: ParsedRun, config: SMTPreTrainingConfig, subject: Subject) -> dict:
    """Everything that changes what a run trains: a resumed run must have the same."""
    run, lora = parsed.run, lora_settings(parsed.run)
    settings: dict[str, Any] = {"student": None, "teacher": None}
    for part, own in (("student", config.student), ("teacher", config.teacher)):
        if own is not None:
            names = names_of(type(own)) - names_of(PreTrainedConfig) | {"bos_token_id", "eos_token_id", "pad_token_id"}
            settings[part] = {name: getattr(own, name, None) for name in ("model_type", *sorted(names))}
    settings |= {"phases": [phase_settings(arguments) for arguments in parsed.phases]}
    settings |= launch_settings(parsed.phases[0])
    settings |= {"data_hash": subject.facts()["hash"], "tokenizer_hash": tokenizer_hash(subject.tokenizer)}
    settings |= {"document_start_fraction": run.document_start_fraction, "seed": run.seed}
    if run.streaming:
        settings |= {name: getattr(run, name) for name in _OF_A_STREAM}
    if run.task != "text":
        settings |= {"curriculum": run.curriculum, "num_heldout": run.num_heldout}
    if lora is not None:
        settings["lora"] = asdict(lora)
    if run.init_embeddings_from_teacher:
        settings["init_embeddings_from_teacher"] = True
    if parsed.rival is not None:
        settings["compare_bptt"] = phase_settings(parsed.rival)
    return settings


def _finished(parsed: ParsedRun) -> dict | None:
    """The results of a run that has nothing left to do, after telling so."""
    path = Path(parsed.run.output_dir) / RESULTS
    if not path.exists():
        return None
    results = json.loads(path.read_text())
    if parsed.rival is not None and arm_name([parsed.rival]) not in results["arms"]:
        return None
    if parsed.phases[0].process_index == 0:
        print(f"{path.parent} is finished already, with the arguments in {RUN}:\n{results_table(results)}")
    return results


def _train(parsed: ParsedRun, config: SMTPreTrainingConfig, subject: Subject, num_threads: int) -> Trained:
    """Train all phases, from the start or from where the run was cut off."""
    run, phases = parsed.run, parsed.phases
    if isinstance(run.resume, str) and phases[0].process_index == 0:
        _say_what_is_removed(run.resume, phases)
        # What is trained anew must not look finished if it is cut off again.
        (Path(run.output_dir) / RESULTS).unlink(missing_ok=True)
        shutil.rmtree(Path(run.output_dir) / "compare_bptt", ignore_errors=True)
    set_seed(run.seed)
    model = SMTForPreTraining(config)
    under_deepspeed = launched_with_deepspeed() or any(arguments.deepspeed for arguments in phases)
    if under_deepspeed and any(weight.dtype != torch.float32 for weight in model.parameters()):
        raise InputError(
            "DeepSpeed takes weights of float32 alone, and the teacher's model has others: pass `--teacher_model_dtype "
            "float32`, or train under DDP or FSDP."
        )
    if run.init_embeddings_from_teacher:
        init_embeddings_from_teacher(model.student, model.teacher)
    of_subject = (subject.rows, subject.eval_rows, subject.tokenizer)
    if any(getattr(arguments, "teacher_cache_dir", None) for arguments in phases):  # may take hours
        check_trainers(model, phases, *of_subject)
        fill_teacher_caches(config.teacher, phases, subject.rows, subject.eval_rows)
    if phases[0].process_index == 0:
        print(f"{described_sizes(model)}; {num_threads} threads; pipeline {arm_name(phases)}", flush=True)
    lora = lora_settings(run)
    trained = Trained(model, Counter(wall_clock_s=0, sequential_steps=0, tokens=0))
    adapted = {"dmt": lora} if lora else None
    stages = run_phases(model, phases, *of_subject, subject.evaluate, run.resume or None, adapted)
    for number, result in enumerate(stages, start=1):
        trained.model = result.model
        trained.spent.update(cost_of(result))
        trained.histories.append((result.arguments.phase, result.log_history))
        for part, scores in result.scores.items():
            name = result.arm if part == "student" else part
            trained.add_arm(name, scores, trained.spent, phases[:number])
            bad = [f"{metric} {value}" for metric, value in trained.arms[name].items() if not math.isfinite(value)]
            if bad:
                raise InputError(
                    f"{name} has diverged ({bad[0]}): lower `{result.arguments.phase}_learning_rate`. Its log is in "
                    f"{result.arguments.output_dir}."
                )
    return trained


def _say_what_is_removed(checkpoint: str, phases: list[PhaseArguments]) -> None:
    """Name what a run loses that goes on from one of its earlier checkpoints."""
    given = Path(checkpoint).resolve()
    folders = [Path(str(arguments.output_dir)).resolve() for arguments in phases]
    index = folders.index(given.parent)
    later = [path for path in given.parent.glob("checkpoint-*") if step_of(path) > step_of(given)]
    lost = [path for path in [*sorted(later, key=step_of), *folders[index + 1 :]] if path.exists()]
    names = ", ".join(str(path.relative_to(given.parent.parent)) for path in lost)
    print(f"going on from {checkpoint}; removed, since trained after it: {names or 'nothing'}", flush=True)


def _train_rival(parsed: ParsedRun, config: SMTPreTrainingConfig, subject: Subject, trained: Trained) -> None:
    """The same student, from the same seed, by BPTT for the seconds that the pipeline has trained."""
    run, rival = parsed.run, parsed.rival
    assert rival is not None
    set_seed(run.seed)
    model = SMTForPreTraining(SMTPreTrainingConfig(student=config.to_dict()["student"]))
    if run.init_embeddings_from_teacher:
        init_embeddings_from_teacher(model.student, trained.model.teacher)
    rival.max_seconds, rival.max_steps = trained.spent["wall_clock_s"], UNBOUNDED
    rival.push_to_hub = False  # a rival is no result of the run
    lay_out([rival], str(Path(run.output_dir) / "compare_bptt"))
    resume = True if run.resume else None
    (result,) = run_phases(model, [rival], subject.rows, subject.eval_rows, subject.tokenizer, subject.evaluate, resume)
    trained.add_arm(result.arm, result.scores.get("student", {}), cost_of(result), [rival])


def _results(parsed: ParsedRun, config: SMTPreTrainingConfig, subject: Subject, trained: Trained, facts: dict) -> dict:
    """The content of `eval_results.json`, with what n-grams score on the same text."""
    run, phases, lora = parsed.run, parsed.phases, lora_settings(parsed.run)
    drift = drift_of(trained.histories)
    if isinstance(subject, TextSubject):
        trained.arms |= {name: {"bits_per_byte": bits} for name, bits in subject.ngram_bits().items()}
    return {
        "arms": trained.arms,
        "student_arm": arm_name(phases),
        "task": {"name": subject.name, "difficulty": subject.difficulty, "chance": subject.chance},
        "metric": subject.metric,
        "data": {**subject.facts(), "tokenizer_hash": tokenizer_hash(subject.tokenizer)},
        "config": config.to_dict(),
        "phases": [phase_settings(arguments) for arguments in phases],
        **({"drift": drift} if drift else {}),
        **({"compare_bptt": [phase_settings(parsed.rival)]} if parsed.rival is not None else {}),
        **({"lora": asdict(lora)} if lora is not None else {}),
        **({"init_embeddings_from_teacher": True} if run.init_embeddings_from_teacher else {}),
        **({"license": run.license} if run.license is not None else {}),
        "seed": run.seed,
        **facts,
    }


def _describe(results: dict, subject: Subject, trained: Trained, output_dir: Path) -> None:
    """Sample, pictures, model card, and `eval_results.json`, which is the last: with it the run is finished."""
    if isinstance(subject, TextSubject):
        parts = zip(("prompt", "continuation"), subject.continuation(trained.model.student, 160, 240, shows=True))
        results["sample"] = {name: subject.tokenizer.decode(part) for name, part in parts}
        losses = {arm: losses / subject.bytes_per_token for arm, losses in trained.losses.items()}
        ngrams = {arm: scores["bits_per_byte"] for arm, scores in trained.arms.items() if arm.startswith("ngram")}
        plot_loss_by_position(losses, ngrams, trained.phases, output_dir / "loss_by_position.png")
    if isinstance(subject, DocumentSubject):
        results["samples"] = subject.answered(trained.model.student, _ANSWERS)
    plot_curves(trained.histories, output_dir / "curves.png")
    plot_drift_by_age(results.get("drift", []), output_dir / "drift_by_age.png")
    write_card(output_dir / "student", trained.model.student, results)
    write_json(results, output_dir / RESULTS)


def publish_student(folder: Path, repo_id: str, arguments: PhaseArguments, message: str):
    """`publish` with the Hub settings of TrainingArguments."""
    settings = {"private": arguments.hub_private_repo, "revision": arguments.hub_revision, "token": arguments.hub_token}
    return publish(folder, repo_id, commit_message=message, **settings)

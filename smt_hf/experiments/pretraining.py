"""Pretraining from end to end, on text, a task or pixels: what `recipes/pretrain.py` runs."""

import dataclasses
import json
import math
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import TextStreamer, set_seed
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from smt_hf.publishing.export import append_evidence, export_student, export_teacher, write_json
from smt_hf.publishing.figures import plot_curves, plot_loss_by_position
from smt_hf.publishing.hub import publish
from smt_hf.publishing.provenance import run_facts
from smt_hf.student import SMTRecurrentConfig
from smt_hf.training.adapters import LoraSettings
from smt_hf.training.arguments import UNBOUNDED, BPTTTrainingArguments, PhaseArguments
from smt_hf.training.composite import SMTForPreTraining, SMTPreTrainingConfig
from smt_hf.training.launch import launched_with_deepspeed
from smt_hf.training.phases import PhaseResult, apply_required, arm_name, check_named_checkpoint, lay_out, run_phases

from .run_arguments import PretrainArguments
from .subjects import PixelSubject, Subject, TaskSubject, TextSubject

_RESULTS = "eval_results.json"
_RUN = "run.json"
_WRITTEN = ("student", "teacher", "compare_bptt", _RESULTS, _RUN, "curves.png", "loss_by_position.png")
# Settings that say what is read, and that no hash of the documents can stand for.
_OF_A_STREAM = (
    "streaming", "shuffle_buffer_size", "train_file", "validation_file", "dataset_name", "dataset_config_name",
    "text_column",
)  # fmt: skip
# Settings that a resumed run may change: they say what is written down, not what is trained.
MAY_CHANGE = {"logging_steps", "save_total_limit", "per_device_eval_batch_size", "logging_nan_inf_filter"}


def pretrain(
    run: PretrainArguments,
    phases: list[PhaseArguments],
    student_fields: dict[str, Any],
    teacher_fields: dict[str, Any],
    rival: BPTTTrainingArguments | None = None,
) -> dict:
    """Train, evaluate, export. Everything that can be wrong with the input is found before anything is written.

    Args:
        run, phases: arguments.
        student_fields, teacher_fields: fields of the two configurations that differ from their defaults.
        rival: arguments of `compare_bptt`; its steps are set from the seconds of the pipeline.

    Returns:
        The content of `eval_results.json`.

    Raises:
        ValueError: bad input, with the way to mend it.
    """
    output_dir = Path(run.output_dir)
    if rival is not None and rival.warmup_steps >= 1:
        raise ValueError(
            "`bptt_warmup_steps` must be a share of the phase, below 1, with `compare_bptt`: BPTT ends by the seconds."
        )
    pushed = pushed_repository(phases)
    if rival is not None:
        rival.push_to_hub = False  # a rival is no result of the run
    lora = None
    if run.use_peft:
        lora = LoraSettings(run.lora_r, run.lora_alpha, parts=tuple(run.lora_parts.split(",")))
        if launched_with_deepspeed() or any(arguments.deepspeed or arguments.fsdp for arguments in phases):
            raise ValueError("LoRA phases run on one process or under DDP: leave DeepSpeed, FSDP or `use_peft` out.")
        if "dmt" not in [arguments.phase for arguments in phases[1:]]:
            raise ValueError(
                "`use_peft` trains LoRA layers in dmt phases that follow another: give `--phases smt,dmt`, or leave it "
                "out."
            )
    check_output_dir(run, output_dir)
    resume = True if run.resume_from_checkpoint in ("True", "true") else run.resume_from_checkpoint or None
    lay_out(phases, str(output_dir))
    if isinstance(resume, str):
        check_named_checkpoint(phases, resume)
    elif resume and (output_dir / _RESULTS).exists():
        results = json.loads((output_dir / _RESULTS).read_text())
        if rival is None or arm_name([rival]) in results["arms"]:
            print(f"{output_dir} is finished already, with the arguments in {_RUN}:\n{results_table(results)}")
            if pushed is not None and phases[0].process_index == 0:  # the Hub may have refused it the first time
                print(publish_student(output_dir / "student", pushed, phases[-1], f"The student of {arm_name(phases)}"))
            return results
    logging.disable_progress_bar()  # of saving; the phases have their own
    num_threads = set_threads(run.num_threads)
    is_main = phases[0].process_index == 0
    if rival is not None and arm_name(phases) == arm_name([rival]):
        warnings.warn("the pipeline is BPTT itself: there is nothing to compare it with.", stacklevel=2)
        rival = None
    with phases[0].main_process_first(desc="preparing the data"):
        subject = _subject(run, phases, rival)
    config = model_config(subject, phases, student_fields, teacher_fields)
    _remember(run, output_dir, config, phases, subject.facts()["hash"], is_main)
    PartialState().wait_for_everyone()  # an old run's folders are gone before a rank looks into them
    if isinstance(resume, str) and is_main:
        # What is trained anew must not look finished if it is cut off again.
        (output_dir / _RESULTS).unlink(missing_ok=True)
        shutil.rmtree(output_dir / "compare_bptt", ignore_errors=True)
    set_seed(run.seed)
    model = SMTForPreTraining(config)
    for arguments in phases:
        evaluate_ten_times(arguments)
    if is_main and phases[0].phase == "dmt":
        warnings.warn(
            "the first phase is dmt: the student will imitate a teacher that was never trained.", stacklevel=2
        )
    if is_main:
        sizes = [
            f"{part} {sum(p.numel() for p in module.parameters()):,}"
            for part, module in model.named_children()
            if part in ("student", "teacher")
        ]
        print(
            f"{subject.describe()}\nparameters: {', '.join(sizes)}; {num_threads} threads; pipeline {arm_name(phases)}"
        )
    arms: dict[str, dict] = {}
    histories: list[tuple[str, list[dict]]] = []
    curves: dict[str, np.ndarray] = {}
    spent = {"wall_clock_s": 0.0, "sequential_steps": 0, "tokens": 0}
    for result in run_phases(
        model,
        phases,
        subject.rows,
        subject.eval_rows,
        subject.tokenizer,
        subject.evaluate,
        resume,
        {"dmt": lora} if lora else None,
    ):
        model = result.model
        spent = {
            "wall_clock_s": spent["wall_clock_s"] + result.seconds,
            "sequential_steps": spent["sequential_steps"] + result.sequential_steps,
            "tokens": spent["tokens"] + result.tokens,
        }
        histories.append((result.arguments.phase, result.log_history))
        for arm, scores in result.scores.items():
            name = result.arm if arm == "student" else arm
            if "losses" in scores:
                curves[name] = np.array(scores["losses"])
            arms[name] = {**{key: value for key, value in scores.items() if key != "losses"}, **spent}
            if not all(math.isfinite(value) for value in arms[name].values()):
                raise RuntimeError(
                    f"{name} has diverged ({subject.metric} {scores[subject.metric]}): lower "
                    f"`{result.arguments.phase}_learning_rate`. Its log is in {result.arguments.output_dir}."
                )
    student_arm = arm_name(phases)
    if rival is not None:
        name, scores = _train_rival(run, rival, config, subject, spent["wall_clock_s"])
        if is_main:
            if "losses" in scores:
                curves[name] = np.array(scores.pop("losses"))
            arms[name] = scores
    if not is_main:
        return {}
    ngram_bits = subject.ngram_bits() if isinstance(subject, TextSubject) else {}
    arms |= {name: {"bits_per_byte": bits} for name, bits in ngram_bits.items()}
    facts = run_facts(num_threads, phases[0])
    results = {
        "arms": arms,
        "student_arm": student_arm,
        "task": {"name": subject.name, "difficulty": subject.difficulty, "chance": subject.chance},
        "metric": subject.metric,
        "data": subject.facts(),
        "config": config.to_dict(),
        "phases": [phase_settings(arguments) for arguments in phases],
        **({"compare_bptt": [phase_settings(rival)]} if rival is not None else {}),
        **({"lora": dataclasses.asdict(lora)} if lora is not None else {}),
        "seed": run.seed,
        **facts,
    }
    print(f"\n{results_table(results)}\n")
    if isinstance(subject, TextSubject):
        results["sample"] = _sample(model.student, subject)
        curves = {arm: losses / subject.bytes_per_token for arm, losses in curves.items()}
        plot_loss_by_position(curves, ngram_bits, output_dir / "loss_by_position.png")
    plot_curves(histories, output_dir / "curves.png")
    if model.teacher is not None:
        export_teacher(model.teacher, subject.tokenizer, output_dir / "teacher")
    export_student(model.student, subject.tokenizer, output_dir / "student", results)
    write_json(results, output_dir / _RESULTS)
    if pushed is not None:
        print(publish_student(output_dir / "student", pushed, phases[-1], f"The student of {student_arm}"))
    if run.evidence_file:
        append_evidence(results, Path(run.evidence_file))
    print(f"\nwritten to {output_dir}: {', '.join(sorted(path.name for path in output_dir.iterdir()))}")
    return results


def publish_student(folder: Path, repo_id: str, arguments: PhaseArguments, message: str):
    """`publish` with the Hub settings of TrainingArguments."""
    return publish(
        folder,
        repo_id,
        private=arguments.hub_private_repo,
        revision=arguments.hub_revision,
        commit_message=message,
        token=arguments.hub_token,
    )


def pushed_repository(phases: list[PhaseArguments]) -> str | None:
    """The repository that `--push_to_hub --hub_model_id` names, if any.

    Raises:
        ValueError: none is named, or not one for all phases.
    """
    asked = {arguments.hub_model_id for arguments in phases if arguments.push_to_hub}
    if not asked:
        return None
    if len(asked) > 1 or not str(asked.copy().pop()).count("/"):
        raise ValueError("`push_to_hub` needs one `--hub_model_id user/name` for the whole run.")
    return str(asked.pop())


def check_output_dir(run, output_dir: Path) -> None:
    """Refuse a folder that holds anything, unless the run is to go on in it or to start over.

    Args:
        run: arguments with `overwrite_output_dir` and `resume_from_checkpoint`.

    Raises:
        ValueError: what to pass instead.
    """
    if run.overwrite_output_dir and run.resume_from_checkpoint:
        raise ValueError("pass either `--overwrite_output_dir` or `--resume_from_checkpoint`, not both.")
    if output_dir.is_file():
        raise ValueError(f"`output_dir` {output_dir} is a file: name a folder.")
    if output_dir.is_dir() and any(output_dir.iterdir()):
        if not (run.overwrite_output_dir or run.resume_from_checkpoint):
            raise ValueError(
                f"`output_dir` {output_dir} is not empty: pass `--resume_from_checkpoint` to go on, "
                "`--overwrite_output_dir` to start over, or another folder."
            )
    elif run.resume_from_checkpoint:
        raise ValueError(f"there is no run to resume in {output_dir}.")


def _subject(
    run: PretrainArguments, phases: list[PhaseArguments], rival: BPTTTrainingArguments | None = None
) -> Subject:
    subject: Subject
    if run.task == "text":
        if run.difficulty is not None or run.curriculum is not None:
            raise ValueError("`difficulty` and `curriculum` are of synthetic tasks: set `task`, or leave them out.")
        subject = TextSubject(
            [*phases, *([rival] if rival else [])],
            run.seed,
            run.train_file,
            run.validation_file,
            run.dataset_name,
            run.dataset_config_name,
            run.text_column,
            run.tokenizer_name,
            run.document_start_fraction,
            streaming=run.streaming,
            buffer_size=run.shuffle_buffer_size,
        )
    elif run.train_file or run.dataset_name or run.tokenizer_name:
        raise ValueError(f"`task` {run.task} brings its own data: leave `train_file` and the like out.")
    elif run.task == "pixels":
        subject = PixelSubject(run.mnist_dir, run.num_heldout)
    else:
        try:
            levels = [int(level) for level in str(run.curriculum or "").split(",") if level]
        except ValueError as error:
            raise ValueError(f"`curriculum` must be numbers joined by commas, got {run.curriculum!r}.") from error
        if run.difficulty is None:
            raise ValueError(f"`task` {run.task} needs a `difficulty`.")
        subject = TaskSubject(run.task, run.difficulty, levels, run.seed, run.num_heldout)
    changes = [
        change
        for arguments, values in zip(phases, subject.required_of(phases))
        for change in apply_required(arguments, values)
    ]
    if rival is not None:
        own = {level for arguments in phases for level in arguments.levels}
        if own and rival.curriculum_threshold is not None:  # it comes up through all that the student did
            rival.curriculum_levels = [str(level) for level in sorted(own | {int(subject.difficulty)})]
        changes += [f"compare_bptt: {change}" for change in apply_required(rival, subject.required(rival))]
    if changes and PartialState().is_main_process:
        print("\n".join(changes))
    return subject


def model_config(
    subject: Subject, phases: list[PhaseArguments], student_fields: dict, teacher_fields: dict
) -> SMTPreTrainingConfig:
    """Sizes of student and teacher for a subject and a pipeline; no teacher if no phase needs one.

    Raises:
        ValueError: a vocabulary smaller than the subject's.
    """
    tokenizer = subject.tokenizer
    fields = {"vocab_size": subject.vocab_size, **student_fields}
    if fields["vocab_size"] < subject.vocab_size:
        raise ValueError(
            f"`vocab_size` ({fields['vocab_size']}) is smaller than the tokenizer's ({subject.vocab_size}): leave it "
            "out."
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields.setdefault(name, getattr(tokenizer, name))
    student = SMTRecurrentConfig(**fields)
    if all(arguments.phase == "bptt" for arguments in phases):
        return SMTPreTrainingConfig(student=student)
    return SMTPreTrainingConfig(student=student, teacher=teacher_fields)


def _remember(
    run: PretrainArguments,
    output_dir: Path,
    config: SMTPreTrainingConfig,
    phases: list[PhaseArguments],
    corpus_digest: str,
    is_main: bool,
) -> None:
    """Clear the folder if asked to, note what the run trains, or check that a resumed run trains the same."""
    settings = {
        **{part: config.to_diff_dict().get(part) for part in ("student", "teacher")},
        "phases": [
            {name: value for name, value in phase_settings(arguments).items() if name not in MAY_CHANGE}
            for arguments in phases
        ],
        "data_hash": corpus_digest,
        "document_start_fraction": run.document_start_fraction,
        **({name: getattr(run, name) for name in _OF_A_STREAM} if run.streaming else {}),
        **({"curriculum": run.curriculum, "num_heldout": run.num_heldout} if run.task != "text" else {}),
        **(
            {"use_peft": True, "lora_r": run.lora_r, "lora_alpha": run.lora_alpha, "lora_parts": run.lora_parts}
            if run.use_peft
            else {}
        ),
        "seed": run.seed,
    }
    path = output_dir / _RUN
    if run.resume_from_checkpoint:
        check_same_run(path, settings)
        return
    if not is_main:
        return
    if output_dir.is_dir() and run.overwrite_output_dir:
        for entry in output_dir.iterdir():
            if entry.name in _WRITTEN or re.fullmatch(r"(smt|dmt|bptt)(_\d+)?", entry.name):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(settings, path)


def check_same_run(path: Path, settings: dict) -> None:
    """Compare what a resumed run trains with what `path`, written by the run that it resumes, says.

    Raises:
        ValueError: there is no such file, or what differs.
    """
    if not path.exists():
        raise ValueError(f"{path.parent} holds no run that could be resumed ({path.name} is missing).")
    earlier, now = _flat(json.loads(path.read_text())), _flat(json.loads(json.dumps(settings)))
    changed = [name for name in sorted(earlier.keys() | now) if earlier.get(name) != now.get(name)]
    if changed:
        differences = ", ".join(f"{name}: {earlier.get(name)} then, {now.get(name)} now" for name in changed)
        raise ValueError(
            f"the run in {path.parent} was started with other arguments ({differences}): resume it with the same."
        )


def _flat(settings, prefix: str = "") -> dict:
    """Nested settings under dotted names."""
    items = enumerate(settings) if isinstance(settings, list) else settings.items()
    flat: dict = {}
    for name, value in items:
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict | list) else {f"{prefix}{name}": value}
    return flat


def set_threads(num_threads: int | None) -> int:
    """Give torch its threads; returns how many. Default: this process's part of the cores."""
    # `accelerate launch` without a configuration exports OMP_NUM_THREADS=1, which would leave cores idle.
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"`num_threads` must be at least 1, got {num_threads}.")
    if num_threads is None:
        given = int(os.environ.get("OMP_NUM_THREADS", "1"))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_threads = given if given > 1 else max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    torch.set_num_threads(num_threads)
    return num_threads


def evaluate_ten_times(arguments: PhaseArguments) -> None:
    """Ten evaluations within a phase of steps that asks for none, in place."""
    if arguments.eval_strategy == IntervalStrategy.NO and arguments.max_steps > 0:
        arguments.eval_strategy = IntervalStrategy.STEPS
        arguments.eval_steps = max(arguments.max_steps // 10, 1)


def _train_rival(
    run: PretrainArguments, rival: BPTTTrainingArguments, config: SMTPreTrainingConfig, subject: Subject, seconds: float
):
    """The same student, from the same seed, by BPTT for the same seconds."""
    set_seed(run.seed)
    model = SMTForPreTraining(SMTPreTrainingConfig(student=config.to_dict()["student"]))
    rival.max_seconds, rival.max_steps = seconds, UNBOUNDED
    lay_out([rival], str(Path(run.output_dir) / "compare_bptt"))
    resume = True if run.resume_from_checkpoint else None
    (result,) = run_phases(model, [rival], subject.rows, subject.eval_rows, subject.tokenizer, subject.evaluate, resume)
    return result.arm, {**result.scores.get("student", {}), **_cost(result)}


def _cost(result: PhaseResult) -> dict:
    return {
        "wall_clock_s": result.seconds,
        "sequential_steps": result.sequential_steps,
        "tokens": result.tokens,
    }


def phase_settings(arguments: PhaseArguments) -> dict:
    """The arguments of a phase that concern its result, as JSON can hold them."""
    names = {
        entry.name
        for kind in type(arguments).__mro__
        if issubclass(kind, PhaseArguments)
        for entry in dataclasses.fields(kind)
    }
    inherited = {entry.name for entry in dataclasses.fields(PhaseArguments.__mro__[1])} - set(
        PhaseArguments.__annotations__
    )
    values = {name: getattr(arguments, name) for name in sorted(names - inherited)}
    return {"phase": arguments.phase, **{name: getattr(value, "value", value) for name, value in values.items()}}


def results_table(results: dict) -> str:
    """The arms of `eval_results.json` as aligned lines, best last."""
    metric = results.get("metric", "bits_per_byte")
    heads = [*([] if metric == "accuracy" else [metric.replace("_per_", "/")]), "accuracy"]
    lines = [f"{'arm':<18}" + "".join(f"{head:>11}" for head in heads)]
    lines[0] += f"{'seconds':>9}{'tokens':>13}{'sequential steps':>18}"
    sign = 1 if metric == "accuracy" else -1
    for arm, scores in sorted(results["arms"].items(), key=lambda entry: sign * entry[1][metric]):
        accuracy, seconds = scores.get("accuracy"), scores.get("wall_clock_s")
        mark = " *" if arm == results["student_arm"] else ""
        lines.append(
            f"{arm + mark:<18}"
            + ("" if metric == "accuracy" else f"{scores[metric]:>11.3f}")
            + (f"{accuracy:>11.1%}" if accuracy is not None else f"{'':>11}")
            + (
                f"{seconds:>9.0f}{scores['tokens']:>13,}{scores['sequential_steps']:>18,}"
                if seconds is not None
                else ""
            )
        )
    data, task = results["data"], results["task"]
    what = f"{data['heldout_streams']} streams x {task['difficulty']} tokens"
    if task["name"] == "instructions":
        what = f"answers of {data['heldout_streams']:,} examples, each"
    elif metric != "bits_per_byte":
        what = f"{data['heldout_streams']:,} rows of {task['name']}, difficulty {task['difficulty']}, each"
        lines.append(
            f"{'chance':<18}{task['chance']:>11.1%}"
            if metric == "accuracy"
            else f"{'chance':<18}{task['chance']:>11.3f}"
        )
    teacher = "; teacher: the shared readout on the teacher's memories" if "teacher" in results["arms"] else ""
    lines.append(f"held out: {what} from m_0; * the exported student{teacher}")
    return "\n".join(line.rstrip() for line in lines)


@torch.inference_mode()
def _sample(student, text: TextSubject, prompt_tokens: int = 160, new_tokens: int = 240) -> dict:
    """Print a held-out prompt and stream its continuation."""
    prompt = torch.from_numpy(text.streams[len(text.streams) // 3, :prompt_tokens])[None].to(student.device)
    shown = text.tokenizer.decode(prompt[0])
    print(f"--- held-out prompt ---\n{shown}\n--- continuation ---", flush=True)
    set_seed(0)
    generated = student.generate(
        prompt,
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=0.7,
        synced_gpus=False,  # under ZeRO-3 transformers would wait for ranks that do not generate
        streamer=TextStreamer(text.tokenizer, skip_prompt=True),
    )
    return {"prompt": shown, "continuation": text.tokenizer.decode(generated[0, prompt_tokens:])}

"""What a run is composed of: sizes of the models, arguments of the phases, threads; and how each is recorded."""

import hashlib
import json
import os
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from smt_hf.command_line import names_of
from smt_hf.errors import InputError
from smt_hf.student import SMTRecurrentConfig
from smt_hf.teachers import TEACHERS, teacher_config_class, teacher_type
from smt_hf.training.arguments import BPTTTrainingArguments, PhaseArguments
from smt_hf.training.composite import SMTForPreTraining, SMTPreTrainingConfig
from smt_hf.training.launch import LAUNCHED_PRECISION
from smt_hf.training.objective import trained_parts
from smt_hf.training.phases import PhaseResult, apply_required

from .subjects import Subject
from .teacher_language import check_tokenizer

# TrainingArguments that say what is written down, shown or loaded, not what is trained: a resumed run may change them.
_WRITTEN_DOWN = (
    "output_dir", "log", "report_to", "run_name", "project", "trackio_", "disable_tqdm", "include_", "eval_", "do_",
    "per_device_eval_batch_size", "prediction_loss_only", "batch_eval_metrics", "bf16", "seed", "save_", "push_to_hub",
    "enable_jit_checkpoint", "hub_", "resume_from_checkpoint", "restore_", "use_cpu", "dataloader_num_workers",
    "dataloader_p", "dataloader_multiprocessing_context", "ddp_", "debug", "skip_memory_metrics", "local_rank",
    "label_cache_dir", "teacher_cache_dir", "evaluates_by_seconds", "drift_",
)  # fmt: skip


def model_config(
    subject: Subject, phases: list[PhaseArguments], student_fields: dict, teacher_fields: dict
) -> SMTPreTrainingConfig:
    """Sizes of student and teacher for a subject and a pipeline; no teacher if no phase needs one.

    Raises:
        InputError: a size out of range, a vocabulary smaller than the subject's, or one that is not the teacher's.
    """
    fields = {"vocab_size": subject.vocab_size, **student_fields}
    if fields["vocab_size"] is not None and fields["vocab_size"] < subject.vocab_size:
        raise InputError(
            f"`vocab_size` ({fields['vocab_size']}) is smaller than the tokenizer's ({subject.vocab_size}): leave it "
            "out."
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields.setdefault(name, getattr(subject.tokenizer, name))
    taught = [arguments for arguments in phases if arguments.phase != "bptt"]
    if any(arguments.distillation_weight for arguments in taught):
        teacher_fields = _predicting(teacher_fields, taught)
    cached = [arguments for arguments in taught if arguments.teacher_cache_dir is not None]
    if cached:
        if len(cached) < len(taught):
            raise InputError("a phase without `teacher_cache_dir` needs the teacher's model: give all phases one.")
        if "holds_model" in names_of(teacher_config_class(teacher_type(teacher_fields))):
            teacher_fields = {**teacher_fields, "holds_model": False}
    try:
        student, teacher = SMTRecurrentConfig(**fields), teacher_fields if taught else None
        config = SMTPreTrainingConfig(student=student, teacher=teacher)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise InputError(str(error)) from error
    assert not isinstance(config.teacher, dict)
    check_tokenizer(subject.tokenizer, config.teacher)
    return config


def _predicting(teacher_fields: dict, taught: list[PhaseArguments]) -> dict:
    """The fields of a teacher whose own predictions a student is distilled from.

    Args:
        taught: the phases that have a teacher.

    Raises:
        InputError: this kind of teacher makes none, or a phase is distilled from a head that none has trained.
    """
    name = teacher_type(teacher_fields)
    if "keeps_head" in names_of(teacher_config_class(name)):
        return {**teacher_fields, "keeps_head": True}
    if not getattr(TEACHERS[name], "has_next_token_head", False):
        raise InputError(
            f"the teacher {name} predicts no tokens for `distillation_weight`: leave it out, or name a language model "
            "by `teacher_model_name_or_path`."
        )
    for number, arguments in enumerate(taught, start=1):
        if any(_trains_teachers_head(earlier) for earlier in taught[:number]):
            break
        if arguments.distillation_weight:
            raise InputError(
                f"`distillation_weight` of the {arguments.phase} phase takes the predictions of a head of the teacher "
                f"{name} that no phase has trained by then: set `teacher_weight` of an smt phase before it, or of its "
                "own, above 0 (without `num_supervised_transitions`, and with teacher in `trainable` if it is given)."
            )
    return teacher_fields


def _trains_teachers_head(arguments: PhaseArguments) -> bool:
    chosen = trained_parts(arguments.phase, arguments.trains_updater, arguments.trainable)
    return "teacher" in chosen and arguments.objective().trains_teachers_head


def resolve(phases: list[PhaseArguments], subject: Subject, rival: BPTTTrainingArguments | None = None) -> list[str]:
    """Set, in place, what of the arguments follows from the subject.

    Args:
        rival: arguments of `compare_bptt`, which goes through all levels that the pipeline goes through, up to the
            one that is scored.

    Returns:
        Every change as a line for people.

    Raises:
        InputError: arguments that do not fit the subject's rows.
    """
    changes = [
        change
        for arguments, required in zip(phases, subject.required_of(phases))
        for change in apply_required(arguments, required)
    ]
    if rival is not None:
        levels = {level for arguments in phases for level in arguments.levels}
        if levels and rival.curriculum_threshold is not None:
            last = int(subject.difficulty)
            rival.curriculum_levels = [str(level) for level in sorted(levels | {last}) if level <= last]
        changes += [f"compare_bptt: {change}" for change in apply_required(rival, subject.required(rival))]
    return [f"{change} (rows of {subject.name} {subject.difficulty})" for change in changes]


def described_sizes(model: SMTForPreTraining) -> str:
    """Numbers of parameters for people: of each part, and of what in the student grows with the vocabulary."""
    sizes = [
        f"{name} {sum(weight.numel() for weight in part.parameters()):,}"
        for name, part in model.named_children()
        if name in ("student", "teacher")
    ]
    student = model.student
    tables = {student.get_input_embeddings().weight, student.get_output_embeddings().weight}  # one if they are tied
    in_tables, total = (sum(map(torch.numel, weights)) for weights in (tables, student.parameters()))
    hint = "; `--embedding_size N` makes them narrower" if 2 * in_tables > total else ""
    sizes[0] += f" ({in_tables:,} of them embeddings and head{hint})"
    return f"parameters: {', '.join(sizes)}"


def set_threads(num_threads: int | None) -> int:
    """Give torch its threads, and return how many: those asked for, else OMP_NUM_THREADS, else this process's part of
    the cores.

    Raises:
        InputError: less than one was asked for.
    """
    if num_threads is not None and num_threads < 1:
        raise InputError(f"`num_threads` must be at least 1, got {num_threads}.")
    if num_threads is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_threads = _threads_of_the_user() or max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    torch.set_num_threads(num_threads)
    return num_threads


def _threads_of_the_user() -> int | None:
    """OMP_NUM_THREADS, unless it is the 1 that accelerate and torchrun export where the user has exported nothing."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(given) if given.isdecimal() else 0
    if threads == 1 and ("ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_RANK" in os.environ):
        try:
            of_the_launcher = Path(f"/proc/{os.getppid()}/environ").read_bytes()
        except OSError:
            return None
        threads = int(b"OMP_NUM_THREADS=" in of_the_launcher)
    return threads or None


def phase_settings(arguments: PhaseArguments) -> dict:
    """The arguments of a phase that change its result, as JSON can hold them: all of our own, and those of
    transformers that differ from their defaults."""
    plugin = arguments.deepspeed_plugin
    autocasts = plugin is not None and "torch_autocast" in plugin.hf_ds_config.config
    precision = "bf16" if arguments.bf16 or autocasts else LAUNCHED_PRECISION
    settings = {"phase": arguments.phase, **({"precision": precision} if precision != "no" else {})}
    inherited = TrainingArguments.__dataclass_fields__
    defaults = {name: entry.default for name, entry in inherited.items()}
    defaults["accelerator_config"] = AcceleratorConfig().to_dict()
    defaults["accelerator_config"].pop("use_configured_state")  # transformers takes it out
    for name, value in sorted(arguments.to_dict().items()):
        if name not in names_of(type(arguments)) or name.startswith(_WRITTEN_DOWN):
            continue
        if name in ("deepspeed", "fsdp_config") and isinstance(value, str) and os.path.isfile(value):
            value = hashlib.sha256(Path(value).read_bytes()).hexdigest()[:16]  # wherever the file lies
        is_own = name not in inherited or type(arguments).__dataclass_fields__[name] is not inherited[name]
        if is_own or _said(value) != _said(defaults[name]):
            settings[name] = value
    return settings


def changed_settings(arguments: PhaseArguments) -> dict:
    """The settings of a phase that differ from its defaults, and always its gradient's length and its rows'.

    A phase that ends by its seconds has no `max_steps` here, and a setting that is `None` is left out.
    """
    defaults = {name: entry.default for name, entry in type(arguments).__dataclass_fields__.items()}
    if arguments.lr_scheduler_type == defaults["lr_scheduler_type"]:
        defaults["lr_scheduler_kwargs"] = {"min_lr_rate": 0.1}
    if arguments.max_seconds is not None:
        defaults["max_steps"] = arguments.max_steps
    derived = ("schedule_offset", "schedule_steps")  # of a schedule that phases share
    always = ("phase", "transition_steps", "context_length", "max_seconds")
    return {
        name: value
        for name, value in phase_settings(arguments).items()
        if value is not None and name not in derived and (name in always or value != defaults.get(name))
    }


def _said(value):
    """A value; `None` for every way to leave a setting out."""
    return None if value is None or value is False or value in ("", [], {}) else getattr(value, "value", value)


def launch_settings(arguments: PhaseArguments) -> dict:
    """How many processes train, and how they work together."""
    state = arguments.distributed_state
    return {"world_size": arguments.world_size, "distributed_type": state.distributed_type.value if state else "NO"}


def tokenizer_hash(tokenizer) -> str:
    """Hash of everything that determines the tokens of a tokenizer."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content = {name: part for name, part in content.items() if name not in ("truncation", "padding")}
    else:
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps([content, special], sort_keys=True).encode()).hexdigest()[:16]


def cost_of(result: PhaseResult) -> dict:
    """What a phase has cost, as the results name it."""
    cost = {"wall_clock_s": result.seconds, "sequential_steps": result.sequential_steps, "tokens": result.tokens}
    return {**cost, "skipped_steps": result.skipped_steps} if result.skipped_steps else cost

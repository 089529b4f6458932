"""Settings of a pretraining run, from its command line and YAML."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from smt_hf.command_line import (
    argument,
    built,
    check_keys,
    closest,
    described,
    documented,
    names_of,
    own_fields,
    read_flags,
    read_yaml,
)
from smt_hf.student import SMTRecurrentConfig
from smt_hf.teachers import SMTTeacherConfig, SMTWindowedTeacherConfig
from smt_hf.training.arguments import BPTTTrainingArguments, PhaseArguments
from smt_hf.training.phases import ARGUMENTS

# Set by the pipeline, or the run's own business.
HIDDEN = {"schedule_offset", "schedule_steps", "output_dir", "resume_from_checkpoint", "seed"}
# Follow from the student.
_TEACHER_SHAPE = {"vocab_size", "num_memory_tokens", "memory_size"}


@dataclass
class PretrainArguments:
    """What concerns the whole run. Phases, student and teacher have their own arguments."""

    config: str | None = argument(None, "YAML file with any of these arguments; flags beat it.")
    output_dir: str = argument("runs/pretrain", "Folder for everything that the run writes.")
    phases: str = argument("smt,bptt", "Any sequence of smt, dmt and bptt, joined by commas.")
    task: str = argument(
        "text",
        "What is learned: text, pixels, or retrieval, string_copy, stack, keys_values, modular_arithmetic, parity.",
    )
    difficulty: int | None = argument(None, "Of a synthetic task: its length, depth, pairs or modulus.")
    curriculum: str | None = argument(
        None, "Easier difficulties of the task to begin with, joined by commas; see `curriculum_threshold`."
    )
    num_heldout: int = argument(4096, "Labels of a synthetic task, or images, that are scored.")
    mnist_dir: str | None = argument(None, "Folder with MNIST's idx files for `pixels`; default: the 8 x 8 digits.")
    train_file: str | None = argument(None, "Text file, folder, glob, or json / jsonl / csv / parquet.")
    validation_file: str | None = argument(None, "Held-out text; default: a tenth of the training text.")
    dataset_name: str | None = argument(None, "Dataset of the Hub, or a local one that `datasets` knows.")
    dataset_config_name: str | None = argument(None, "Its configuration.")
    text_column: str = argument("text", "Column of the dataset that holds the text.")
    streaming: bool = argument(
        False, "Read `train_file` or `dataset_name` while training: no download, no tokenisation before the first step."
    )
    shuffle_buffer_size: int = argument(1000, "Documents that the next one of a stream is drawn from.")
    tokenizer_name: str | None = argument(None, "Any Hugging Face tokenizer; default: one token a byte.")
    document_start_fraction: float = argument(0.05, "Share of rows that start where a document starts. Ours.")
    use_peft: bool = argument(
        False, "Train LoRA layers alone in dmt phases: a cheap second phase. They are merged as each phase ends."
    )
    lora_r: int = argument(8, "Rank of the LoRA layers. Not searched.")
    lora_alpha: int = argument(16, "Their change is scaled by `lora_alpha / lora_r`. Not searched.")
    lora_parts: str = argument("updater,readout", "Where they are put: updater, readout, or both.")
    evidence_file: str | None = argument(None, "JSON lines file to which the run appends a line an arm.")
    compare_bptt: bool = argument(
        False, "Also train the same student by BPTT for the same measured seconds, through all levels."
    )
    seed: int = argument(0, "Of everything random.")
    overwrite_output_dir: bool = argument(False, "Remove what an earlier run left in `output_dir`.")
    resume_from_checkpoint: str | None = argument(
        None, "Without a value: go on from the run's newest complete checkpoint. With one: from that checkpoint."
    )
    num_threads: int | None = argument(None, "CPU threads of this process; default: cores / local processes.")


@dataclasses.dataclass
class ParsedRun:
    """Args:
    run: of the whole run.
    student, teacher: fields of the configurations that were given.
    phases: arguments of each phase, in order.
    rival: arguments of `compare_bptt`, those of the bptt phase; `None` without it.
    """

    run: PretrainArguments
    student: dict[str, Any]
    teacher: dict[str, Any]
    phases: list[PhaseArguments]
    rival: BPTTTrainingArguments | None


_NEED_A_VALUE = {
    entry.name
    for entry in dataclasses.fields(PretrainArguments)
    if entry.type is not bool and entry.name != "resume_from_checkpoint"
}


def _plain_dataclass(config_class, left_out: Iterable[str] = ()):
    """The fields of a transformers configuration as a dataclass that `HfArgumentParser` understands."""
    plain = []
    for name, entry in own_fields(config_class).items():
        if name in left_out:
            continue
        kind = next(
            (
                kind
                for kind in (bool, float, int, str)
                if kind is entry.type or kind in getattr(entry.type, "__args__", ())
            ),
            str,
        )
        plain.append((name, kind | None, dataclasses.field(default=entry.default)))
    if config_class in (SMTTeacherConfig, SMTWindowedTeacherConfig):  # tells the two kinds of teacher apart
        plain.append(("model_type", str, dataclasses.field(default=SMTTeacherConfig.model_type)))
    return dataclasses.make_dataclass(config_class.__name__ + "Fields", plain)


STUDENT_FIELDS = _plain_dataclass(SMTRecurrentConfig)


TEACHER_FIELDS = _plain_dataclass(SMTTeacherConfig, _TEACHER_SHAPE)


WINDOWED_FIELDS = _plain_dataclass(SMTWindowedTeacherConfig, _TEACHER_SHAPE)


PHASE_NAMES = {phase: names_of(arguments) - HIDDEN for phase, arguments in ARGUMENTS.items()}


def _route(key: str) -> tuple[str, str]:
    """Where a key belongs: ("run" | "student" | "teacher" | "phases" | a phase, name there)."""
    if key.endswith("num_train_epochs"):
        raise ValueError("a pipeline counts steps, not epochs: set `max_steps`.")
    if key in names_of(PretrainArguments):
        return "run", key
    if key in names_of(STUDENT_FIELDS):
        return "student", key
    if any(key in names for names in PHASE_NAMES.values()):
        return "phases", key
    prefix, _, rest = key.partition("_")
    if prefix in ARGUMENTS and rest in PHASE_NAMES[prefix]:
        return prefix, rest
    if prefix == "teacher" and rest in names_of(TEACHER_FIELDS) | names_of(WINDOWED_FIELDS):
        return "teacher", rest
    raise ValueError(f"unknown argument {key!r}{closest(key, _all_keys())}")


def _all_keys() -> set[str]:
    keys = (
        names_of(PretrainArguments)
        | names_of(STUDENT_FIELDS)
        | {f"teacher_{name}" for name in names_of(TEACHER_FIELDS) | names_of(WINDOWED_FIELDS)}
    )
    for phase, names in PHASE_NAMES.items():
        keys |= names | {f"{phase}_{name}" for name in names}
    return keys


def _read_phases(value: Any) -> list[tuple[str, dict[str, Any]]]:
    """`smt,dmt`, or a list of names and one-key mappings `smt: {max_steps: 800}`."""
    entries = value.split(",") if isinstance(value, str) else value
    if not isinstance(entries, list) or not entries:
        raise ValueError("`phases` must be a list like `smt,dmt`, or a YAML list of names or one-key mappings.")
    phases = []
    for entry in entries:
        if isinstance(entry, dict) and len(entry) == 1:
            name, settings = next(iter(entry.items()))
        elif isinstance(entry, str):
            name, settings = entry.strip(), {}
        else:
            raise ValueError(f"a phase must be a name or a one-key mapping `name: {{...}}`, got {entry!r}.")
        if name not in ARGUMENTS:
            raise ValueError(
                f"unknown phase {name!r}: choose from {', '.join(ARGUMENTS)}{closest(str(name), ARGUMENTS)}"
            )
        if settings is not None and not isinstance(settings, dict):
            raise ValueError(f"the settings of phase {name!r} must be `name: value` pairs, got {settings!r}.")
        for key in settings or {}:
            if key not in PHASE_NAMES[name]:
                raise ValueError(f"unknown argument {key!r} of phase {name!r}{closest(key, PHASE_NAMES[name])}")
        phases.append((name, dict(settings or {})))
    return phases


def parse_run(argv: list[str]) -> ParsedRun:
    """All settings of a run from its command line.

    Args:
        argv: words after the script's name.

    Raises:
        ValueError: an unknown key (the closest valid one is named), a value of the wrong type, malformed YAML.
        SystemExit: after `--help`.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text())
        raise SystemExit(0)
    flags = read_flags(argv)
    if flags.get("resume_from_checkpoint") in ("False", "false"):
        del flags["resume_from_checkpoint"]
    layers = [read_yaml(str(flags["config"])) if "config" in flags else {}, flags]
    parts: dict[str, dict[str, Any]] = {"run": {}, "student": {}, "teacher": {}}
    phases = _read_phases(PretrainArguments.phases)
    per_phase: list[tuple[str, str, Any]] = []  # in order: later ones win
    for layer in layers:
        if "phases" in layer:
            phases = _read_phases(layer["phases"])
        for key, value in layer.items():
            if key == "phases":
                continue
            place, name = _route(key)
            if place in parts:
                parts[place][name] = value
            if value is True and name in _NEED_A_VALUE:
                raise ValueError(f"`--{key}` needs a value.")
        routed = [(*_route(key), value) for key, value in layer.items() if key != "phases"]
        per_phase += [entry for entry in routed if entry[0] == "phases"]
        if layer is layers[0]:
            # what the YAML says inside a phase beats what it says for all phases, flags beat both
            per_phase += [("inside", "", None)]
        per_phase += [entry for entry in routed if entry[0] in ARGUMENTS]
    run = built(PretrainArguments, {**parts["run"], "phases": ",".join(name for name, _ in phases)})

    def built_phase(phase: str, inside: dict[str, Any]):
        settings: dict[str, Any] = {}
        for place, name, value in per_phase:
            if place == "inside":
                settings.update(inside)
            elif (place == "phases" or place == phase) and name in PHASE_NAMES[phase]:
                settings[name] = value
        return built(ARGUMENTS[phase], {**settings, "seed": run.seed})

    built_phases = [built_phase(phase, inside) for phase, inside in phases]
    given = {"student": typed(STUDENT_FIELDS, parts["student"]), "teacher": typed_teacher({}, {}, parts["teacher"])}
    rival = None
    if run.compare_bptt:
        inside: dict[str, Any] = next((settings for phase, settings in reversed(phases) if phase == "bptt"), {})
        rival = built_phase("bptt", inside)
    return ParsedRun(run, given["student"], given["teacher"], built_phases, rival)


def help_text() -> str:
    """What `--help` prints."""
    lines = ["usage: accelerate launch recipes/pretrain.py [--config FILE.yaml] [--flag value ...]", ""]
    lines += ["the run:", *described(PretrainArguments, "", {}), ""]
    lines += ["the student:", *described(STUDENT_FIELDS, "", documented(SMTRecurrentConfig)), ""]
    lines += ["the teacher:", *described(TEACHER_FIELDS, "teacher_", documented(SMTTeacherConfig)), ""]
    own = [entry.name for entry in dataclasses.fields(WINDOWED_FIELDS) if entry.name not in names_of(TEACHER_FIELDS)]
    texts = documented(SMTWindowedTeacherConfig)
    lines += ["the published teacher (`--teacher_model_type smt_windowed_teacher`), what is its own:"]
    lines += [*described(WINDOWED_FIELDS, "teacher_", texts, own), ""]
    own = [entry for entry in vars(PhaseArguments)["__annotations__"] if entry not in HIDDEN]
    lines += ["all phases (`--NAME`), or one (`--smt_NAME`, `--dmt_NAME`, `--bptt_NAME`):"]
    lines += [*described(PhaseArguments, "", {}, own), ""]
    for phase, kind in ARGUMENTS.items():
        own = [entry for entry in vars(kind)["__annotations__"] if entry not in HIDDEN]
        lines += [
            f"the {phase} phase, what is its own or has another default:",
            *described(kind, "", {}, own),
            "",
        ]
    lines.append("Every other field of transformers' TrainingArguments is a flag of the phases too.")
    return "\n".join(lines)


def typed(dataclass, settings: dict) -> dict:
    check_keys(settings, names_of(dataclass), "field")
    values = built(dataclass, settings)
    return {name: getattr(values, name) for name in settings}


def typed_teacher(of_grid: dict, of_arm: dict, of_variant: dict) -> dict:
    changes = {**of_arm, **of_variant}
    kinds = (SMTTeacherConfig.model_type, SMTWindowedTeacherConfig.model_type)
    # The grid's fields are those of its own kind of teacher.
    of_that_kind = of_grid.get("model_type", kinds[0])
    settings = {**of_grid, **changes} if changes.get("model_type", of_that_kind) == of_that_kind else changes
    if settings.get("model_type", kinds[0]) not in kinds:
        raise ValueError(f"unknown teacher `model_type` {settings['model_type']!r}: choose one of {', '.join(kinds)}.")
    is_windowed = settings.get("model_type") == SMTWindowedTeacherConfig.model_type
    return typed(WINDOWED_FIELDS if is_windowed else TEACHER_FIELDS, settings)

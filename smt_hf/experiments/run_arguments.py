"""Settings of a pretraining run, from its command line and YAML."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from smt_hf.command_line import argument, built, check_keys, closest, described, names_of, read_layers, typed
from smt_hf.data import TASKS
from smt_hf.errors import InputError
from smt_hf.student import SMTRecurrentConfig
from smt_hf.teachers import TEACHERS, teacher_config_class, teacher_type
from smt_hf.teachers.protocol import SMTTeacherSizes
from smt_hf.training.arguments import BPTTTrainingArguments, PhaseArguments
from smt_hf.training.launch import launched_sharded
from smt_hf.training.phases import ARGUMENTS

from . import default_run
from .run_folder import RunArguments
from .subjects import DOCUMENTS

# Set by the pipeline, or arguments of the whole run.
HIDDEN = {"schedule_offset", "schedule_steps", "output_dir", "resume_from_checkpoint", "seed"}


@dataclass
class PretrainArguments(RunArguments):
    """Arguments of the whole run. Phases, student and teacher have their own."""

    phases: str = argument("smt,bptt", "Any sequence of smt, dmt and bptt, joined by commas.")
    task: str = argument("text", f"What is learned: text, pixels, documents, or a synthetic task ({', '.join(TASKS)}).")
    difficulty: int | None = argument(
        None, "Difficulty of a synthetic task: length, depth, pairs, or modulus. Of documents: transitions of a row."
    )
    curriculum: str | None = argument(
        None, "Easier difficulties to begin with, joined by commas; see `curriculum_threshold`."
    )
    documents: list[str] | None = argument(
        None,
        f"Of the task documents, joined by commas: long-context tasks, exercises, text ({', '.join(DOCUMENTS)}).",
    )
    haystack: list[str] | None = argument(
        None,
        "Files, folders or patterns of text that needles are hidden in and exercises filled with: novels, say.",
    )
    num_heldout: int = argument(4096, "Number of labels of a task, or of images, that are scored.")
    mnist_dir: str | None = argument(None, "Folder of MNIST's idx files for the task pixels; default: 8 x 8 digits.")
    train_file: list[str] | None = argument(
        None, "Files, folders or patterns of text, json, jsonl, csv or parquet; default: Python's standard library."
    )
    validation_file: list[str] | None = argument(None, "Held-out text; default: a tenth of the training text.")
    dataset_name: str | None = argument(None, "Dataset of the Hub, or a local one that `datasets.load_dataset` reads.")
    dataset_config_name: str | None = argument(None, "Configuration of that dataset.")
    text_column: str = argument("text", "Column of a table or dataset that holds the text.", is_text=True)
    streaming: bool = argument(False, "Read the text while training; nothing is downloaded or tokenised beforehand.")
    shuffle_buffer_size: int = argument(1000, "With `streaming`: documents among which the next one is drawn.")
    tokenizer_name: str | None = argument(
        None, "Any Hugging Face tokenizer; default: that of `teacher_model_name_or_path`, else one token per byte."
    )
    init_embeddings_from_teacher: bool = argument(
        False,
        "Begin the student's embeddings and head as those of `teacher_model_name_or_path`, projected to their width.",
    )
    document_start_fraction: float = argument(0.05, "Share of training rows that begin with a document. Ours.")
    use_peft: bool = argument(False, "Train LoRA layers alone in later dmt phases; each phase merges them at its end.")
    evidence_file: str | None = argument(None, "JSON lines file to which the run appends one line per arm.")
    compare_bptt: bool = argument(False, "Also train the same student by BPTT: the same seconds, the same curriculum.")
    resume_from_checkpoint: str | None = argument(
        None,
        "Without a value: go on from the newest complete checkpoint of the run in `output_dir`. With the path of one "
        "of its checkpoints: go on from there, and REMOVE what the run has trained after it. All arguments that change "
        "the result must be those that the run was started with.",
        may_be_bare=True,
    )

    def __post_init__(self):
        if str(self.resume_from_checkpoint).lower() == "false":
            self.resume_from_checkpoint = None
        if not 0 <= self.seed < 2**32:  # NumPy's seeds
            raise InputError(f"`seed` must lie between 0 and 2^32 - 1, got {self.seed}.")
        for name in ("num_heldout", "shuffle_buffer_size"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.document_start_fraction <= 1:
            raise InputError(f"`document_start_fraction` must lie between 0 and 1, got {self.document_start_fraction}.")

    @property
    def resume(self) -> str | bool:
        """Path of the checkpoint to go on from; true for the newest, false for none."""
        word = self.resume_from_checkpoint or "false"
        return word.lower() == "true" if word.lower() in ("true", "false") else word


@dataclass
class ParsedRun:
    """All settings of a run."""

    run: PretrainArguments
    student: dict[str, Any]  # fields of the configuration that were given
    teacher: dict[str, Any]  # likewise
    is_default: bool  # updater and teacher are those of `default_run`
    phases: list[PhaseArguments]  # in order
    rival: BPTTTrainingArguments | None  # of `compare_bptt`: those of the bptt phase
    # What was given and does nothing, or was set because of other arguments; one line per note.
    notes: list[str] = field(default_factory=list)

    @property
    def student_fields(self) -> dict[str, Any]:
        """`student`, over the fields that a run takes where none is given."""
        return {**(default_run.STUDENT if self.is_default else {}), **self.student}

    @property
    def teacher_fields(self) -> dict[str, Any]:
        """As `student_fields`, of the teacher."""
        return {**(default_run.TEACHER if self.is_default else {}), **self.teacher}


def _plain_dataclass(config_class, left_out: Collection[str] = ()):
    """The fields that are a transformers configuration's own, as a dataclass that `HfArgumentParser` understands."""
    names = names_of(config_class) - names_of(PreTrainedConfig) - set(left_out)
    plain = []
    for entry in dataclasses.fields(config_class):
        if entry.name in names:
            types = getattr(entry.type, "__args__", (entry.type,))
            kind = next((kind for kind in (bool, float, int, str) if kind in types), str)
            plain.append((entry.name, kind | None, field(default=entry.default)))
    return dataclasses.make_dataclass(config_class.__name__ + "Fields", plain)


STUDENT_FIELDS = _plain_dataclass(SMTRecurrentConfig)
# `model_type` of a teacher -> its fields.
TEACHER_FIELDS = {
    name: _plain_dataclass(
        teacher.config_class,
        {
            *getattr(teacher.config_class, "follows_student", SMTTeacherSizes.follows_student),
            *getattr(teacher.config_class, "derived", ()),
        },
    )
    for name, teacher in TEACHERS.items()
}
PHASE_NAMES = {phase: names_of(arguments) - HIDDEN for phase, arguments in ARGUMENTS.items()}
_TEACHER_NAMES = {"model_type"}.union(*map(names_of, TEACHER_FIELDS.values()))
# Key -> where it belongs ("run", "student", "teacher", "phases" or a phase), and its name there. Later entries win.
_ROUTES = {
    **{f"teacher_{name}": ("teacher", name) for name in _TEACHER_NAMES},
    **{f"{phase}_{name}": (phase, name) for phase, names in PHASE_NAMES.items() for name in names},
    **{name: ("phases", name) for names in PHASE_NAMES.values() for name in names},
    **{name: ("student", name) for name in names_of(STUDENT_FIELDS)},
    **{name: ("run", name) for name in names_of(PretrainArguments)},
}


def _route(key: str) -> tuple[str, str]:
    if key.endswith("num_train_epochs"):
        raise InputError("a pipeline counts steps, not epochs: set `max_steps`.")
    prefix, _, rest = key.partition("_")
    having = [phase for phase, names in PHASE_NAMES.items() if prefix in ARGUMENTS and rest in names]
    if having and key not in _ROUTES:
        raise InputError(f"the {prefix} phase has no `{rest}`, only {' and '.join(having)}: leave `{key}` out.")
    check_keys({key: None}, _ROUTES.keys(), "argument")
    return _ROUTES[key]


def read_phases(value: Any, also: Collection[str] = ()) -> list[tuple[str, dict[str, Any]]]:
    """Names and settings of phases, from `smt,dmt`, or a list of names and one-key mappings `smt: {max_steps: 800}`.

    Args:
        also: keys beside a phase's arguments.

    Raises:
        InputError: something else, an unknown phase, or an unknown key.
    """
    entries = value.split(",") if isinstance(value, str) else value
    if not isinstance(entries, list) or not entries:
        raise InputError("`phases` must be a list like `smt,dmt`, or a YAML list of names or one-key mappings.")
    phases = []
    for entry in entries:
        if isinstance(entry, str):
            entry = {entry.strip(): {}}
        if not isinstance(entry, dict) or len(entry) != 1:
            raise InputError(f"a phase must be a name or a one-key mapping `name: {{...}}`, got {entry!r}.")
        ((name, settings),) = entry.items()
        if name not in ARGUMENTS:
            choice = f"choose from {', '.join(ARGUMENTS)}{closest(str(name), ARGUMENTS)}"
            raise InputError(f"unknown phase {name!r}: {choice}")
        settings = {} if settings is None else settings
        check_keys(settings, PHASE_NAMES[name].union(also), f"argument of phase {name}")
        phases.append((name, settings))
    return phases


def parse_run(argv: list[str]) -> ParsedRun:
    """All settings of a run from the words after the script's name.

    Raises:
        InputError: an unknown key (the closest valid one is named), a value of the wrong type, malformed YAML.
        SystemExit: after `--help`.
    """
    layers = read_layers(argv, help_text)
    parts: dict[str, dict[str, Any]] = {"run": {}, "student": {}, "teacher": {}}
    phases = None
    # Settings of phases: what those inside a phase of the YAML beat, and for each phase what beats those.
    below: dict[str, Any] = {}
    above: dict[str, dict[str, Any]] = {phase: {} for phase in ARGUMENTS}
    for layer in layers:
        phases = read_phases(layer["phases"]) if "phases" in layer else phases
        routed = [(*_route(key), value) for key, value in layer.items()]
        for place, name, value in sorted(routed, key=lambda entry: entry[0] in ARGUMENTS):
            if place in parts:
                parts[place][name] = value
            elif place in ARGUMENTS:
                above[place][name] = value
            elif layer is not layers[-1]:
                below[name] = value
            else:
                for of_phase in above.values():
                    of_phase[name] = value
    student = typed(STUDENT_FIELDS, parts["student"])
    teacher = typed_teacher({}, {}, parts["teacher"])
    is_default = default_run.is_taken(student, teacher)
    phases = phases or read_phases(default_run.PHASES if is_default else PretrainArguments.phases)
    run = built(PretrainArguments, {**parts["run"], "phases": ",".join(name for name, _ in phases)})
    notes = _notes(run, {name for name, _ in phases}, [key for layer in layers for key in layer])
    names = [name for name, _ in phases]

    def settings_of(phase: str, inside: dict[str, Any], place: int) -> dict[str, Any]:
        merged = {**below, **inside, **above[phase]}
        merged = {name: value for name, value in merged.items() if name in PHASE_NAMES[phase]}
        if is_default:
            may_be_alone = place == 0 and phase == "smt" and len(names) > 1
            meant = {*inside, *(name.removeprefix("smt_") for layer in layers for name in layer if name[:4] == "smt_")}
            merged = _with_usual(phase, merged, meant, may_be_alone, notes)
        kind = teacher_type(default_run.TEACHER if is_default else teacher)
        return _with_teacher(phase, {**merged, "seed": run.seed}, kind, [] if is_default else notes)

    built_phases = [
        built_phase(ARGUMENTS[phase], settings_of(phase, inside, place)) for place, (phase, inside) in enumerate(phases)
    ]
    rival = None
    if run.compare_bptt:
        inside: dict[str, Any] = next((settings for phase, settings in reversed(phases) if phase == "bptt"), {})
        rival = built_phase(ARGUMENTS["bptt"], settings_of("bptt", inside, len(phases)), ends_by_seconds=True)
    return ParsedRun(run, student, teacher, is_default, built_phases, rival, notes)


def _with_usual(
    phase: str, given: dict[str, Any], meant: Collection[str], may_be_alone: bool, notes: list[str]
) -> dict[str, Any]:
    """The settings of a phase of the default run.

    Args:
        given: what the run gives this phase, by its name or for all phases.
        meant: names of what it gives by the phase's name.
        may_be_alone: the phase trains the teacher alone, unless what is meant for it says otherwise.
        notes: receives a line for what is left out or set because of what is given.
    """
    of_transitions = {name for name in given if name.startswith(default_run.OF_TRANSITIONS)}
    alone = may_be_alone and "trains_updater" not in given and not of_transitions & set(meant)
    if may_be_alone and not alone and "trains_updater" not in given:
        notes.append(f"smt: trains the student too, since {', '.join(sorted(of_transitions & set(meant)))} is given")
    if alone:  # what is given for all phases is for those with transitions
        given = {name: value for name, value in given.items() if name not in of_transitions}
    usual = default_run.settings_of(phase, alone)
    if "matrix_optimizer" not in given:
        why = None
        if given.get("deepspeed") or given.get("fsdp") or launched_sharded():
            why = "DeepSpeed and FSDP split the matrices that it needs whole"
        elif not str(given.get("optim", "adamw_torch")).startswith("adamw_torch"):
            why = f"`optim` is {given['optim']}"
        if why is not None:
            usual["matrix_optimizer"] = "adamw"
            notes.append(f"{phase}: matrix_optimizer muon -> adamw ({why}; `--matrix_optimizer adamw` says the same)")
    if given.get("max_seconds") is not None:
        usual.pop("max_steps", None)
    return {**usual, **given}


def built_phase(kind: type[PhaseArguments], settings: dict[str, Any], ends_by_seconds: bool = False):
    """Arguments of a phase from its settings. A phase of steps is evaluated ten times, unless they say otherwise.

    Args:
        ends_by_seconds: it will be given `max_seconds`, with evaluations of their own.

    Raises:
        InputError: a value that does not fit.
    """
    arguments = built(kind, settings)
    for name in ("eval_steps", "save_steps", "logging_steps"):
        if name in settings and not (settings[name] is None or getattr(arguments, name) > 0):
            raise InputError(f"`{name}` must be above 0, got {settings[name]}: to have none, set the strategy to no.")
    if "eval_strategy" in settings:
        if arguments.eval_strategy == IntervalStrategy.NO and "evaluates_by_seconds" not in settings:
            arguments.evaluates_by_seconds = False
    elif not ends_by_seconds and arguments.max_seconds is None and arguments.max_steps > 0:
        arguments.eval_strategy = IntervalStrategy.STEPS
        if "eval_steps" not in settings:
            arguments.eval_steps = max(arguments.max_steps // 10, 1)
    return arguments


def _with_teacher(phase: str, settings: dict[str, Any], name: str, notes: list[str]) -> dict[str, Any]:
    """The settings of a phase with what the teacher `name` takes where nothing is given."""
    if phase != "smt":
        return settings
    kind = TEACHERS[name]
    defaults = dict(getattr(kind, "smt_defaults", {}))
    if not kind.has_next_token_head:
        defaults["teacher_weight"] = 0.0
        if typed(ARGUMENTS["smt"], {"teacher_weight": settings.get("teacher_weight", 0.0)})["teacher_weight"]:
            raise InputError(f"the teacher {name} has no next-token head: leave `teacher_weight` out, or set it to 0.")
    for key, value in defaults.items():
        usual = ARGUMENTS["smt"].__dataclass_fields__[key].default
        if key not in settings and value != usual:
            why = "has no next-token head" if key == "teacher_weight" else "takes it so"
            notes.append(f"smt: {key} {usual} -> {value} ({name} {why})")
    return {**defaults, **settings}


def _notes(run: PretrainArguments, running: set[str], given: list[str]) -> list[str]:
    """A line for everything that was given and does nothing in this run."""
    running = running | ({"bptt"} if run.compare_bptt else set())
    idle = {}
    for key in given:
        place, name = _ROUTES[key]
        if place == "phases" and not any(name in PHASE_NAMES[phase] for phase in running):
            idle[key] = f"no phase of {','.join(sorted(running))} has it"
        elif place in PHASE_NAMES and place not in running:
            idle[key] = f"the run has no phase {place}"
        elif place == "teacher" and running == {"bptt"}:
            idle[key] = "bptt has no teacher"
    for names, is_idle, why in (
        (("lora_r", "lora_alpha", "lora_parts"), not run.use_peft, "it needs `use_peft`"),
        (("shuffle_buffer_size",), not run.streaming, "it needs `streaming`"),
        (("document_start_fraction",), run.streaming, "every row of a stream begins with a document"),
        (("num_heldout",), run.task == "text", "it applies to other tasks than text"),
        (("documents", "haystack"), run.task != "documents", "it applies to the task documents only"),
        (("mnist_dir",), run.task != "pixels", "it applies to the task pixels only"),
    ):
        idle |= {name: why for name in names if is_idle and name in given}
    return [f"`{name}` does nothing here: {why}" for name, why in idle.items()]


_FIRST = """usage: accelerate launch recipes/pretrain.py [--config FILE.yaml] [--flag value ...]

  --train_file FILE ...     text to train on (default: Python's standard library)
  --output_dir DIR          folder for everything that the run writes (default: runs/pretrain)
  --phases LIST             sequence of smt, dmt and bptt (default: smt,dmt)
  --max_steps N             optimiser steps of every phase; --smt_max_steps N of one
  --learning_rate X         peak learning rate of every phase; --bptt_learning_rate X of one
  --hidden_size N           width of the student; --num_memory_tokens N, --num_hidden_layers N, --updater_type NAME
  --tokenizer_name NAME     any Hugging Face tokenizer (default: one token per byte)
  --teacher_model_name_or_path DIR  a language model to make a recurrent one of; its tokenizer is the default then
  --compare_bptt            also train the same student by BPTT for the same seconds
  --seed N                  seed of all random numbers
  --resume_from_checkpoint  go on with the run in `output_dir`
  --overwrite_output_dir    start over in `output_dir`

All arguments, which the YAML file may hold too. "Paper": the default of arXiv:2606.06479. "Ours": chosen here.
"""


def help_text() -> str:
    """What `--help` prints."""
    lines = [_FIRST, *_of_the_default_run(), "the run:", *described(PretrainArguments), ""]
    lines += ["the student:", *described(STUDENT_FIELDS, documentation=SMTRecurrentConfig), ""]
    shown: set[str] = set()
    for name, fields in TEACHER_FIELDS.items():
        which = ", what is its own" if shown else ", its fields"
        lines += [f"the teacher `--teacher_model_type {name}`{which}:"]
        lines += [*described(fields, names_of(fields) - shown, "teacher_", teacher_config_class(name)), ""]
        shown |= names_of(fields)
    lines += ["all phases (`--NAME`), or one (`--smt_NAME`, `--dmt_NAME`, `--bptt_NAME`):"]
    lines += [*described(PhaseArguments, new_fields(PhaseArguments, TrainingArguments)), ""]
    for phase, kind in ARGUMENTS.items():
        lines += [f"the {phase} phase, what is its own or has another default:"]
        lines += [*described(kind, new_fields(kind, PhaseArguments)), ""]
    return "\n".join([*lines, "Every other field of transformers' TrainingArguments is a flag of the phases too."])


def _of_the_default_run() -> list[str]:
    """What a run takes in the place of the defaults below, where it names no other updater or teacher."""

    def shown(settings: dict[str, Any]) -> str:
        return " ".join(f"--{name} {value}" for name, value in settings.items())

    teacher = {f"teacher_{name}": value for name, value in default_run.TEACHER.items()}
    lines = ["the default run, unless another updater or a field of another teacher is named:"]
    lines += [f"  {shown({'phases': default_run.PHASES, **default_run.STUDENT})}", f"  {shown(teacher)}"]
    for phase in default_run.SETTINGS:
        settings = default_run.settings_of(phase, trains_teacher_alone=phase == "smt")
        lines.append(f"  {shown({f'{phase}_{name}': value for name, value in settings.items()})}")
    return [*lines, "The defaults below hold for all other runs, and for what is not named here.", ""]


def new_fields(kind, parent) -> set[str]:
    """The names of a dataclass's fields, but for those that it has from `parent` as they are, and hidden ones."""
    fields, of_parent = kind.__dataclass_fields__, parent.__dataclass_fields__
    return {name for name in names_of(kind) - HIDDEN if fields[name] is not of_parent.get(name)}


def typed_teacher(of_grid: dict, of_arm: dict, of_variant: dict) -> dict:
    """Fields of a teacher's configuration: those of the grid, changed by its arm and the arm's variant.

    Raises:
        InputError: an unknown teacher or field, or a value of the wrong type.
    """
    changes = {**of_arm, **of_variant}
    # The grid's fields are those of its own kind of teacher.
    of_that_kind = teacher_type(of_grid)
    names_its_kind = "model_type" in changes or teacher_type(changes) != teacher_type({})
    is_other = names_its_kind and teacher_type(changes) != of_that_kind
    settings = changes if is_other else {**of_grid, **changes}
    name = teacher_type(settings)
    teacher_config_class(name)  # knows the name, or says which there are
    fields = typed(TEACHER_FIELDS[name], {key: value for key, value in settings.items() if key != "model_type"})
    return {"model_type": name, **fields} if "model_type" in settings else fields

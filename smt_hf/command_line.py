"""YAML and flags into dataclasses. Flags beat YAML; an unknown key is an error that names the closest valid one."""

import atexit
import dataclasses
import difflib
import inspect
import itertools
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
import yaml
from accelerate import PartialState
from transformers import HfArgumentParser

from smt_hf.experiments.continuation import GenerateArguments
from smt_hf.experiments.finetuning import FinetuneArguments, FinetuneTrainingArguments
from smt_hf.experiments.grid import Run
from smt_hf.experiments.pretraining import PretrainArguments
from smt_hf.student import SMTRecurrentConfig
from smt_hf.teachers import SMTTeacherConfig, SMTWindowedTeacherConfig
from smt_hf.training.arguments import BPTTTrainingArguments, PhaseArguments, argument
from smt_hf.training.phases import ARGUMENTS
from smt_hf.training.stopping import Interrupted

# Set by the pipeline, or the run's own business.
_HIDDEN = {"schedule_offset", "schedule_steps", "output_dir", "resume_from_checkpoint", "seed"}
# Follow from the student.
_TEACHER_SHAPE = {"vocab_size", "num_memory_tokens", "memory_size"}


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


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _own_fields(config_class) -> dict[str, dataclasses.Field]:
    own = {name for name in config_class.__annotations__ if name not in ("model_type",)}
    return {entry.name: entry for entry in dataclasses.fields(config_class) if entry.name in own}


def _plain_dataclass(config_class, left_out: Iterable[str] = ()):
    """The fields of a transformers configuration as a dataclass that `HfArgumentParser` understands."""
    plain = []
    for name, entry in _own_fields(config_class).items():
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


_STUDENT = _plain_dataclass(SMTRecurrentConfig)
_TEACHER = _plain_dataclass(SMTTeacherConfig, _TEACHER_SHAPE)
_WINDOWED = _plain_dataclass(SMTWindowedTeacherConfig, _TEACHER_SHAPE)


def _names(dataclass) -> set[str]:
    return {entry.name for entry in dataclasses.fields(dataclass) if entry.init}


_PHASE_NAMES = {phase: _names(arguments) - _HIDDEN for phase, arguments in ARGUMENTS.items()}


def _route(key: str) -> tuple[str, str]:
    """Where a key belongs: ("run" | "student" | "teacher" | "phases" | a phase, name there)."""
    if key.endswith("num_train_epochs"):
        raise ValueError("a pipeline counts steps, not epochs: set `max_steps`.")
    if key in _names(PretrainArguments):
        return "run", key
    if key in _names(_STUDENT):
        return "student", key
    if any(key in names for names in _PHASE_NAMES.values()):
        return "phases", key
    prefix, _, rest = key.partition("_")
    if prefix in ARGUMENTS and rest in _PHASE_NAMES[prefix]:
        return prefix, rest
    if prefix == "teacher" and rest in _names(_TEACHER) | _names(_WINDOWED):
        return "teacher", rest
    raise ValueError(f"unknown argument {key!r}{_closest(key, _all_keys())}")


def _all_keys() -> set[str]:
    keys = (
        _names(PretrainArguments)
        | _names(_STUDENT)
        | {f"teacher_{name}" for name in _names(_TEACHER) | _names(_WINDOWED)}
    )
    for phase, names in _PHASE_NAMES.items():
        keys |= names | {f"{phase}_{name}" for name in names}
    return keys


def _closest(key: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, sorted(valid), n=1, cutoff=0.5)
    return f": did you mean {close[0]!r}?" if close else "."


def _read_flags(argv: list[str]) -> dict[str, Any]:
    flags: dict[str, Any] = {}
    key = None
    for word in argv:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            flags[key] = [value] if equals else []
        elif key is None:
            raise ValueError(f"unexpected argument {word!r}: every value follows a `--flag`.")
        else:
            flags[key].append(word)
    return {key: True if not values else values[0] if len(values) == 1 else values for key, values in flags.items()}


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise ValueError(f"cannot read the configuration {path!r}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path!r} is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path!r} must hold `name: value` lines, got a {type(content).__name__}.")
    return {str(key): value for key, value in content.items()}


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
                f"unknown phase {name!r}: choose from {', '.join(ARGUMENTS)}{_closest(str(name), ARGUMENTS)}"
            )
        if settings is not None and not isinstance(settings, dict):
            raise ValueError(f"the settings of phase {name!r} must be `name: value` pairs, got {settings!r}.")
        for key in settings or {}:
            if key not in _PHASE_NAMES[name]:
                raise ValueError(f"unknown argument {key!r} of phase {name!r}{_closest(key, _PHASE_NAMES[name])}")
        phases.append((name, dict(settings or {})))
    return phases


def _as_words(settings: dict[str, Any]) -> list[str]:
    words = []
    for key, value in settings.items():
        if value is None:
            continue
        words.append(f"--{key}")
        if isinstance(value, dict):
            words.append(json.dumps(value))
        elif isinstance(value, list):
            words.extend(str(item) for item in value)
        else:
            words.append(str(value))
    return words


def _built(dataclass, settings: dict[str, Any]):
    (result,) = _Parser(dataclass).parse_args_into_dataclasses(args=_as_words(settings), look_for_args_file=False)
    return result


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
    flags = _read_flags(argv)
    if flags.get("resume_from_checkpoint") in ("False", "false"):
        del flags["resume_from_checkpoint"]
    layers = [_read_yaml(str(flags["config"])) if "config" in flags else {}, flags]
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
    run = _built(PretrainArguments, {**parts["run"], "phases": ",".join(name for name, _ in phases)})

    def built_phase(phase: str, inside: dict[str, Any]):
        settings: dict[str, Any] = {}
        for place, name, value in per_phase:
            if place == "inside":
                settings.update(inside)
            elif (place == "phases" or place == phase) and name in _PHASE_NAMES[phase]:
                settings[name] = value
        return _built(ARGUMENTS[phase], {**settings, "seed": run.seed})

    built_phases = [built_phase(phase, inside) for phase, inside in phases]
    given = {"student": _typed(_STUDENT, parts["student"]), "teacher": _typed_teacher({}, {}, parts["teacher"])}
    rival = None
    if run.compare_bptt:
        inside: dict[str, Any] = next((settings for phase, settings in reversed(phases) if phase == "bptt"), {})
        rival = built_phase("bptt", inside)
    return ParsedRun(run, given["student"], given["teacher"], built_phases, rival)


def run_to_end(function: Callable[..., Any], *arguments) -> None:
    """What a recipe's `main` does: call `function`, and end as a shell expects after a signal: 128 + its number."""
    code = 0
    try:
        function(*arguments)
    except Interrupted as stopped:
        if PartialState().is_main_process:
            print(f"\n{stopped}", flush=True)
        code = 128 + stopped.signal_number
    if torch.distributed.is_available() and torch.distributed.is_initialized():  # of one process, too
        # A wrapped model keeps Gloo's threads alive after its group is destroyed, and one that lets go of a Python
        # tensor while the interpreter shuts down aborts the process (pytorch/pytorch#179291): end before it does.
        PartialState().destroy_process_group()
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        raise SystemExit(code)


def parse_finetune(argv: list[str]) -> tuple[FinetuneArguments, FinetuneTrainingArguments]:
    """All settings of a fine-tuning from its command line.

    Raises:
        ValueError: as `parse_run`.
        SystemExit: after `--help`.
    """
    if "--help" in argv or "-h" in argv:
        own = [entry for entry in vars(PhaseArguments)["__annotations__"] if entry not in _HIDDEN]
        own += [name for name in vars(BPTTTrainingArguments)["__annotations__"] if name not in own]
        lines = ["usage: accelerate launch recipes/finetune.py --checkpoint DIR_OR_REPO --train_file FILE [--flag ...]"]
        lines += ["", "the run:", *_described(FinetuneArguments, "", {}), "", "the training:"]
        lines += [*_described(FinetuneTrainingArguments, "", {}, own)]
        print("\n".join([*lines, "", "Every other field of transformers' TrainingArguments is a flag too."]))
        raise SystemExit(0)
    flags = _read_flags(argv)
    given = {**(_read_yaml(str(flags["config"])) if "config" in flags else {}), **flags}
    of_run, of_training = _names(FinetuneArguments), _names(FinetuneTrainingArguments) - _HIDDEN
    if "num_train_epochs" in given:
        raise ValueError("a fine-tuning counts steps, not epochs: set `max_steps`.")
    _check_keys(given, of_run | of_training, "argument")
    _check_values(given, FinetuneArguments)
    run = _built(FinetuneArguments, {key: value for key, value in given.items() if key in of_run})
    settings = {key: value for key, value in given.items() if key in of_training}
    if "context_length" in settings and "transition_steps" not in settings:
        length = _whole_number("context_length", settings["context_length"])
        default = FinetuneTrainingArguments.transition_steps
        settings["transition_steps"] = next((k for k in range(min(default, length), 0, -1) if length % k == 0), 1)
    return run, _built(FinetuneTrainingArguments, {**settings, "seed": run.seed})


def parse_generate(argv: list[str]) -> GenerateArguments:
    """All settings of a continuation from its command line.

    Raises:
        ValueError: as `parse_run`.
        SystemExit: after `--help`.
    """
    prompt = None
    if "--prompt" in argv:  # the word after it is any text, which no parser is to read
        at = argv.index("--prompt")
        if at + 1 == len(argv):
            raise ValueError("`--prompt` needs a value.")
        prompt, argv = argv[at + 1], [*argv[:at], *argv[at + 2 :]]
    if "--help" in argv or "-h" in argv:
        lines = ["usage: python recipes/generate.py --checkpoint DIR_OR_REPO --prompt TEXT [--flag ...]", ""]
        print("\n".join([*lines, *_described(GenerateArguments, "", {})]))
        raise SystemExit(0)
    flags = _read_flags(argv)
    _check_keys(flags, _names(GenerateArguments), "argument")
    _check_values(flags, GenerateArguments)
    arguments = _built(GenerateArguments, flags)
    arguments.prompt = prompt
    return arguments


@dataclasses.dataclass
class PublishArguments:
    """Arguments of `smt_hf.publishing.hub.publish`. The access token comes from `hf auth login` or HF_TOKEN."""

    checkpoint: str | None = argument(None, "The `student` folder of a run.")
    repo_id: str | None = argument(None, "`user/name`; created if it does not exist.")
    private: bool | None = argument(None, "Whether a repository that is created is private; default: its owner's.")
    revision: str | None = argument(None, "Branch; default: main.")
    commit_message: str = argument("Publish a student", "Of the one commit.")
    dry_run: bool = argument(False, "Check and list what would be sent; send nothing.")


def parse_publish(argv: list[str]) -> PublishArguments:
    """All settings of a publication from its command line.

    Raises:
        ValueError: as `parse_run`, or no checkpoint or repository.
        SystemExit: after `--help`.
    """
    if "--help" in argv or "-h" in argv:
        lines = ["usage: python recipes/publish.py --checkpoint DIR --repo_id USER/NAME [--dry_run] [--flag ...]", ""]
        print("\n".join([*lines, *_described(PublishArguments, "", {})]))
        raise SystemExit(0)
    flags = _read_flags(argv)
    _check_keys(flags, _names(PublishArguments), "argument")
    _check_values(flags, PublishArguments)
    arguments = _built(PublishArguments, flags)
    if not arguments.checkpoint or not arguments.repo_id:
        raise ValueError("name what to publish and where: `--checkpoint DIR --repo_id USER/NAME`.")
    return arguments


def _check_values(given: dict[str, Any], dataclass) -> None:
    for key, value in given.items():
        entry = dataclass.__dataclass_fields__.get(key)
        if value is True and entry is not None and entry.type is not bool and key != "resume_from_checkpoint":
            raise ValueError(f"`--{key}` needs a value.")


def help_text() -> str:
    """What `--help` prints."""
    lines = ["usage: accelerate launch recipes/pretrain.py [--config FILE.yaml] [--flag value ...]", ""]
    lines += ["the run:", *_described(PretrainArguments, "", {}), ""]
    lines += ["the student:", *_described(_STUDENT, "", _documented(SMTRecurrentConfig)), ""]
    lines += ["the teacher:", *_described(_TEACHER, "teacher_", _documented(SMTTeacherConfig)), ""]
    own = [entry.name for entry in dataclasses.fields(_WINDOWED) if entry.name not in _names(_TEACHER)]
    texts = _documented(SMTWindowedTeacherConfig)
    lines += ["the published teacher (`--teacher_model_type smt_windowed_teacher`), what is its own:"]
    lines += [*_described(_WINDOWED, "teacher_", texts, own), ""]
    own = [entry for entry in vars(PhaseArguments)["__annotations__"] if entry not in _HIDDEN]
    lines += ["all phases (`--NAME`), or one (`--smt_NAME`, `--dmt_NAME`, `--bptt_NAME`):"]
    lines += [*_described(PhaseArguments, "", {}, own), ""]
    for phase, dataclass in ARGUMENTS.items():
        own = [entry for entry in vars(dataclass)["__annotations__"] if entry not in _HIDDEN]
        lines += [
            f"the {phase} phase, what is its own or has another default:",
            *_described(dataclass, "", {}, own),
            "",
        ]
    lines.append("Every other field of transformers' TrainingArguments is a flag of the phases too.")
    return "\n".join(lines)


def _documented(config_class) -> dict[str, str]:
    """Texts of the `Args:` section of a configuration's docstring."""
    section = inspect.cleandoc(config_class.__doc__).partition("Args:\n")[2].partition("\nRaises:")[0]
    texts: dict[str, str] = {}
    for entry in re.split(r"\n    (?=\w)", "\n" + section):
        names, _, text = entry.partition(": ")
        for name in names.split(","):
            texts[name.strip()] = " ".join(text.split())
    return texts


def _described(dataclass, prefix: str, texts: dict[str, str], names: list[str] | None = None) -> list[str]:
    lines = []
    for entry in dataclasses.fields(dataclass):
        if names is not None and entry.name not in names:
            continue
        text = entry.metadata.get("help", "") or texts.get(entry.name, "")
        lines.append(f"  --{prefix}{entry.name} (default: {entry.default})" + (f"\n      {text}" if text else ""))
    return lines


@dataclasses.dataclass
class ParsedGrid:
    """Args:
    runs: what the grid holds, or what `--only` leaves of it.
    output: file of JSON lines.
    jobs: runs side by side.
    report: render what is in `output` instead of training.
    """

    runs: list[Run]
    output: str
    jobs: int
    report: bool


_GRID_KEYS = {"output", "jobs", "num_threads", "seeds", "num_heldout", "student", "teacher", "tasks", "arms"}
_TASK_KEYS = {"difficulties", "seconds", "curriculum", "arms"}
_ARM_KEYS = {"phases", "student", "teacher", "only", "sweep", "variants", "group"}
_ONLY_KEYS = {"task", "difficulty", "arm", "seed", "variant"}
_GRID_FLAGS = {"config", "output", "only", "jobs", "report", "train_file", "mnist_dir"}


_GRID_HELP = """usage: python recipes/experiment.py --config GRID.yaml [--flag ...]

  --config      grid of tasks, difficulties, arms and seeds
  --output      JSON lines file; what it has is skipped (default: the grid's `output`)
  --only        task= difficulty= arm= seed= variant=, with spaces between; seeds and difficulties may be new ones
  --jobs        runs side by side (default: the grid's)
  --report      train nothing; write tables and figures next to the output
  --train_file  text for the task `text`
  --mnist_dir   MNIST's files for the task `pixels`"""


def parse_grid(argv: list[str]) -> ParsedGrid:
    """A grid of runs from its command line.

    `--config GRID.yaml [--only task=... difficulty=... arm=... seed=... variant=...] [--output FILE.jsonl] [--jobs N]
    [--report] [--train_file FILE] [--mnist_dir DIR]`. A seed or difficulty that the grid does not list is run all the
    same when `--only` names it. Arms with a `sweep` run under the first seed, unless `--only` names the arm.

    Raises:
        ValueError: unknown keys (the closest valid one is named), values of the wrong type, malformed YAML.
    """
    if "--help" in argv or "-h" in argv:
        print(_GRID_HELP)
        raise SystemExit(0)
    flags = _read_flags(argv)
    _check_keys(flags, _GRID_FLAGS, "flag")
    if not isinstance(flags.get("config"), str):
        raise ValueError("name the grid: `--config recipes/probes.yaml`.")
    grid = _read_yaml(flags["config"])
    _check_keys(grid, _GRID_KEYS, f"key of {flags['config']}")
    if flags.get("only") is True:
        raise ValueError(f"`--only` takes {', '.join(sorted(_ONLY_KEYS))} as name=value.")
    only = _read_only(flags.get("only", []))
    for name in ("tasks", "arms", "output"):
        if not grid.get(name):
            raise ValueError(f"{flags['config']} needs `{name}`.")
    _check_grid(grid)
    runs = [
        run
        for task, settings in grid["tasks"].items()
        if only.get("task", task) == task
        for run in _runs_of_task(grid, str(task), settings or {}, only, flags)
    ]
    if not runs:
        raise ValueError(f"nothing of {flags['config']} is left by `--only` {only}.")
    return ParsedGrid(
        runs=runs,
        output=str(flags.get("output", grid["output"])),
        jobs=_whole_number("jobs", flags.get("jobs", grid.get("jobs", 1))),
        report=bool(flags.get("report", False)),
    )


def _whole_number(name: str, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` must be a whole number, got {value!r}.") from error


def _check_grid(grid: dict) -> None:
    """Names that are spelled right but belong to nothing would leave a run as it is, unseen."""
    for arm, spec in grid["arms"].items():
        _check_keys(spec, _ARM_KEYS, f"key of arm {arm}")
        phases = _phase_names_of(spec)
        _check_keys(dict.fromkeys(phase for _, phase, _ in _numbered_phases(spec)), set(ARGUMENTS), "phase")
        if ("sweep" in spec or "variants" in spec) and not spec.get("group"):
            raise ValueError(f"arm {arm} has variants: name their `group`, a title for their table.")
        if len(spec.get("sweep") or {}) > 1:
            raise ValueError("`sweep` takes one phase with lists of values: `bptt: {learning_rate: [...], ...}`.")
        _check_keys(spec.get("only") or {}, set(map(str, grid["tasks"])), f"task in `only` of arm {arm}")
        _check_keys(spec.get("sweep") or {}, phases, f"phase in `sweep` of arm {arm}")
        for changes in (spec.get("variants") or {}).values():
            _check_keys(changes or {}, phases | {"student", "teacher"}, f"part of a variant of arm {arm}")
    for task, settings in grid["tasks"].items():
        _check_keys(settings or {}, _TASK_KEYS, f"key of task {task}")
        for arm, of_arm in ((settings or {}).get("arms") or {}).items():
            if arm not in grid["arms"]:
                raise ValueError(f"unknown arm {arm!r} in task {task}{_closest(str(arm), grid['arms'])}")
            _check_keys(of_arm or {}, _phase_names_of(grid["arms"][arm]), f"phase of arm {arm}")


def _phase_names_of(spec: dict) -> set[str]:
    return {number for number, _, _ in _numbered_phases(spec)}


def _numbered_phases(spec: dict) -> list[tuple[str, str, dict]]:
    """Name in the grid (`smt`, `smt_2`, as their folders), phase and settings of an arm's phases."""
    numbered: list[tuple[str, str, dict]] = []
    for entry in (spec or {}).get("phases") or []:
        if isinstance(entry, dict) and len(entry) != 1:
            raise ValueError(f"a phase must be a name or a one-key mapping `name: {{...}}`, got {entry!r}.")
        phase, settings = next(iter(entry.items())) if isinstance(entry, dict) else (entry, {})
        earlier = sum(name == phase for _, name, _ in numbered)
        numbered.append((f"{phase}_{earlier + 1}" if earlier else str(phase), str(phase), settings or {}))
    return numbered


def _check_keys(given: Any, valid: set[str], what: str) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"expected `name: value` pairs, got {given!r} ({what}).")
    for key in given:
        if key not in valid:
            raise ValueError(f"unknown {what} {key!r}{_closest(str(key), valid)}")


def _read_only(words: Any) -> dict[str, Any]:
    only: dict[str, Any] = {}
    for word in [words] if isinstance(words, str) else words:
        name, equals, value = str(word).partition("=")
        if not equals or name not in _ONLY_KEYS:
            raise ValueError(f"`--only` takes {', '.join(sorted(_ONLY_KEYS))} as name=value, got {word!r}.")
        only[name] = _whole_number(name, value) if name in ("seed", "difficulty") else value
    return only


def _runs_of_task(grid: dict, task: str, settings: dict, only: dict, flags: dict) -> Iterable[Run]:
    difficulties = [only["difficulty"]] if "difficulty" in only else settings.get("difficulties", [None])
    seeds = [only["seed"]] if "seed" in only else grid.get("seeds", [0])
    sources = {name: flags[name] for name in ("train_file", "mnist_dir") if name in flags}
    for seed in seeds:
        for difficulty in difficulties:
            for arm, spec in grid["arms"].items():
                if only.get("arm", arm) != arm:
                    continue
                if "sweep" in spec and seed != grid.get("seeds", [0])[0] and "arm" not in only:
                    continue  # settings are chosen under one seed
                where = spec.get("only")
                is_named = "arm" in only and "difficulty" in only
                if where is not None and not is_named and difficulty not in (where.get(task) or []):
                    continue
                for variant, changes in _variants(spec):
                    if only.get("variant", variant) != variant:
                        continue
                    of_task = (settings.get("arms") or {}).get(arm) or {}
                    yield Run(
                        task=task,
                        difficulty=difficulty,
                        arm=str(arm),
                        seed=int(seed),
                        phases=_phases_of_arm(spec, of_task, changes, _seconds(settings, task, difficulty)),
                        student=_typed(
                            _STUDENT,
                            {**grid.get("student", {}), **spec.get("student", {}), **changes.get("student", {})},
                        ),
                        teacher=_typed_teacher(
                            grid.get("teacher", {}), spec.get("teacher", {}), changes.get("teacher", {})
                        ),
                        curriculum=tuple(settings.get("curriculum", ())),
                        group=spec.get("group"),
                        variant=variant,
                        num_threads=int(grid.get("num_threads", 1)),
                        num_heldout=int(grid.get("num_heldout", 4096)),
                        sources=sources,
                    )


def _seconds(settings: dict, task: str, difficulty: int | None) -> float | None:
    seconds = settings.get("seconds")
    if isinstance(seconds, dict):
        seconds = seconds.get(difficulty, max(seconds.values()))  # one that the grid does not list: the longest
    return None if seconds is None else float(seconds)


def _variants(spec: dict) -> Iterable[tuple[str | None, dict]]:
    """Names and changes (`student`, `teacher` or a phase -> settings) of an arm's variants; one without a name else."""
    if "sweep" in spec:
        ((phase, axes),) = spec["sweep"].items()
        if not isinstance(axes, dict):
            raise ValueError("`sweep` takes one phase with lists of values: `bptt: {learning_rate: [...], ...}`.")
        for values in itertools.product(*axes.values()):
            named = dict(zip(axes, values))
            yield ", ".join(f"{name}={value}" for name, value in named.items()), {phase: named}
    elif "variants" in spec:
        for name, changes in spec["variants"].items():
            yield str(name), changes or {}
    else:
        yield None, {}


def _phases_of_arm(spec: dict, of_task: dict, changes: dict, seconds: float | None) -> tuple[tuple[str, dict], ...]:
    """Arguments of the phases: what the arm says, then what the task says for it, then what the variant changes.

    A phase gets its `share` of the seconds (default: what the others leave, evenly).
    """
    phases = []
    for number, name, settings in _numbered_phases(spec):
        merged = {**settings, **(of_task.get(number) or {}), **(changes.get(number) or {})}
        phases.append((name, merged.pop("share", None), merged))
    if not phases:
        raise ValueError("every arm needs `phases`.")
    left = 1 - sum(share or 0 for _, share, _ in phases)
    num_open = sum(share is None and "max_steps" not in settings for _, share, settings in phases)
    typed = []
    for name, share, settings in phases:
        if seconds is not None and "max_steps" not in settings:
            settings["max_seconds"] = seconds * (share if share is not None else left / num_open)
        _check_keys(settings, _PHASE_NAMES[name], f"argument of phase {name}")
        built = _built(ARGUMENTS[name], {**settings, "output_dir": "unused"})
        typed.append((name, {key: getattr(built, key) for key in settings}))
    return tuple(typed)


def _typed(dataclass, settings: dict) -> dict:
    _check_keys(settings, _names(dataclass), "field")
    values = _built(dataclass, settings)
    return {name: getattr(values, name) for name in settings}


def _typed_teacher(of_grid: dict, of_arm: dict, of_variant: dict) -> dict:
    changes = {**of_arm, **of_variant}
    kinds = (SMTTeacherConfig.model_type, SMTWindowedTeacherConfig.model_type)
    # The grid's fields are those of its own kind of teacher.
    of_that_kind = of_grid.get("model_type", kinds[0])
    settings = {**of_grid, **changes} if changes.get("model_type", of_that_kind) == of_that_kind else changes
    if settings.get("model_type", kinds[0]) not in kinds:
        raise ValueError(f"unknown teacher `model_type` {settings['model_type']!r}: choose one of {', '.join(kinds)}.")
    is_windowed = settings.get("model_type") == SMTWindowedTeacherConfig.model_type
    return _typed(_WINDOWED if is_windowed else _TEACHER, settings)

"""YAML and flags into dataclasses. Flags beat YAML; an unknown key is an error that names the closest valid one."""

import dataclasses
import difflib
import inspect
import json
import re
from collections.abc import Iterable
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from smt_hf.experiments.pretraining import PretrainArguments
from smt_hf.student import SMTRecurrentConfig
from smt_hf.teachers import SMTTeacherConfig
from smt_hf.training.arguments import BPTTTrainingArguments, PhaseArguments
from smt_hf.training.phases import ARGUMENTS

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
    return dataclasses.make_dataclass(config_class.__name__ + "Fields", plain)


_STUDENT = _plain_dataclass(SMTRecurrentConfig)
_TEACHER = _plain_dataclass(SMTTeacherConfig, _TEACHER_SHAPE)


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
    if prefix == "teacher" and rest in _names(_TEACHER):
        return "teacher", rest
    raise ValueError(f"unknown argument {key!r}{_closest(key, _all_keys())}")


def _all_keys() -> set[str]:
    keys = _names(PretrainArguments) | _names(_STUDENT) | {f"teacher_{name}" for name in _names(_TEACHER)}
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
    given = {}
    for part, dataclass in (("student", _STUDENT), ("teacher", _TEACHER)):
        values = _built(dataclass, parts[part])
        given[part] = {name: getattr(values, name) for name in parts[part]}
    rival = None
    if run.compare_bptt:
        inside: dict[str, Any] = next((settings for phase, settings in reversed(phases) if phase == "bptt"), {})
        rival = built_phase("bptt", inside)
    return ParsedRun(run, given["student"], given["teacher"], built_phases, rival)


def help_text() -> str:
    """What `--help` prints."""
    lines = ["usage: accelerate launch recipes/pretrain.py [--config FILE.yaml] [--flag value ...]", ""]
    lines += ["the run:", *_described(PretrainArguments, "", {}), ""]
    lines += ["the student:", *_described(_STUDENT, "", _documented(SMTRecurrentConfig)), ""]
    lines += ["the teacher:", *_described(_TEACHER, "teacher_", _documented(SMTTeacherConfig)), ""]
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

"""Flags and YAML into dataclasses. Flags beat YAML; an unknown key is an error that names the closest valid one."""

import dataclasses
import difflib
import inspect
import json
import re
from collections.abc import Iterable
from dataclasses import field
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, PreTrainedConfig


def argument(default, help: str):
    """Field of a dataclass that is a flag; a list's default is copied, a function's is what it returns."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    if callable(default):
        return field(default_factory=default, metadata={"help": help})
    return field(default=default, metadata={"help": help})


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def closest(key: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, sorted(valid), n=1, cutoff=0.5)
    return f": did you mean {close[0]!r}?" if close else "."


def read_flags(argv: list[str]) -> dict[str, Any]:
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


def read_yaml(path: str) -> dict[str, Any]:
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


def as_words(settings: dict[str, Any]) -> list[str]:
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


def built(dataclass, settings: dict[str, Any]):
    (result,) = _Parser(dataclass).parse_args_into_dataclasses(args=as_words(settings), look_for_args_file=False)
    return result


def names_of(dataclass) -> set[str]:
    return {entry.name for entry in dataclasses.fields(dataclass) if entry.init}


def own_fields(config_class) -> dict[str, dataclasses.Field]:
    own = names_of(config_class) - names_of(PreTrainedConfig)
    return {entry.name: entry for entry in dataclasses.fields(config_class) if entry.name in own}


def check_keys(given: Any, valid: set[str], what: str) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"expected `name: value` pairs, got {given!r} ({what}).")
    for key in given:
        if key not in valid:
            raise ValueError(f"unknown {what} {key!r}{closest(str(key), valid)}")


def check_values(given: dict[str, Any], dataclass) -> None:
    for key, value in given.items():
        entry = dataclass.__dataclass_fields__.get(key)
        if value is True and entry is not None and entry.type is not bool and key != "resume_from_checkpoint":
            raise ValueError(f"`--{key}` needs a value.")


def whole_number(name: str, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` must be a whole number, got {value!r}.") from error


def documented(config_class) -> dict[str, str]:
    """Texts of the `Args:` section of a configuration's docstring."""
    section = inspect.cleandoc(config_class.__doc__).partition("Args:\n")[2].partition("\nRaises:")[0]
    texts: dict[str, str] = {}
    for entry in re.split(r"\n    (?=\w)", "\n" + section):
        names, _, text = entry.partition(": ")
        for name in names.split(","):
            texts[name.strip()] = " ".join(text.split())
    return texts


def described(dataclass, prefix: str, texts: dict[str, str], names: list[str] | None = None) -> list[str]:
    lines = []
    for entry in dataclasses.fields(dataclass):
        if names is not None and entry.name not in names:
            continue
        text = entry.metadata.get("help", "") or texts.get(entry.name, "")
        lines.append(f"  --{prefix}{entry.name} (default: {entry.default})" + (f"\n      {text}" if text else ""))
    return lines

"""Flags and YAML into dataclasses. Flags beat YAML; an unknown key is an error that names the closest valid one.

Every field of a dataclass is a flag. `parse` is the whole parser of a recipe with one dataclass; recipes with several
take the layers of settings from `read_layers` and turn each part into its dataclass with `built`. Bad input is an
`InputError` everywhere.
"""

import dataclasses
import difflib
import functools
import inspect
import itertools
import json
import os
import re
import types
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from smt_hf.errors import InputError

# Former name of a flag -> its name now. The former name keeps working, with a warning.
RENAMED: dict[str, str] = {"warmup_ratio": "warmup_steps"}  # transformers has dropped the first

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")
_Dataclass = TypeVar("_Dataclass")


def argument(default, help: str, is_text: bool = False, may_be_bare: bool = False):
    """Field of a dataclass that is a flag.

    Args:
        default: a list is copied; a function is called for the value.
        help: what `--help` says.
        is_text: any text, as a prompt: the word after the flag is taken as it stands, even if it is empty, begins with
            dashes or holds a `$`.
        may_be_bare: the flag may come without a value, which then is "True".
    """
    metadata = {"help": help, "is_text": is_text, "may_be_bare": may_be_bare}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse(dataclass_type: type[_Dataclass], argv: list[str], usage: str) -> _Dataclass:
    """All settings of a recipe that has one dataclass. A field `config` names a YAML file of the same settings.

    Args:
        usage: first lines of `--help`.

    Raises:
        InputError: an unknown flag or key, a value that does not fit, a malformed or missing YAML file.
        SystemExit: after `--help`.
    """
    fields = dataclasses.fields(dataclass_type)  # type: ignore[arg-type]
    texts = [entry.name for entry in fields if entry.metadata.get("is_text")]
    layers = read_layers(argv, lambda: "\n".join([usage.strip(), "", *described(dataclass_type)]), texts)
    return built(dataclass_type, {name: value for layer in layers for name, value in layer.items()})


def read_layers(argv: list[str], help_text: Callable[[], str], texts: Collection[str] = ()) -> list[dict[str, Any]]:
    """Settings of the YAML file that `--config` names, if any, and of the flags; later layers beat earlier ones.

    Args:
        argv: words after the script's name.
        help_text: what `--help` prints.
        texts: flags whose next word is taken as it stands.

    Raises:
        InputError: words that are no flags, a YAML file that cannot be read.
        SystemExit: after `--help`.
    """
    flags = read_flags(argv, texts)
    if "help" in flags:
        print(help_text())
        raise SystemExit(0)
    path = flags.get("config")  # where it is not one word, `typed` says so
    layers = [read_yaml(_expanded("config", path))] if isinstance(path, str) else []
    return [_with_new_names(layer) for layer in (*layers, flags)]


def read_flags(argv: list[str], texts: Collection[str] = ()) -> dict[str, Any]:
    """Flags -> their word, list of words, or `True` where they have none."""
    flags: dict[str, Any] = {}
    key = None
    words = iter(argv)
    for word in words:
        if word == "-h":
            flags["help"] = []
        elif word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            flags[key] = [value] if equals else []
            if key in texts and not equals:
                flags[key] = list(itertools.islice(words, 1))
        elif key is None or key in texts:
            raise InputError(f"unexpected argument {word!r}: every value follows a `--flag`.")
        else:
            flags[key].append(word)
    return {key: True if not values else values[0] if len(values) == 1 else values for key, values in flags.items()}


class _Loader(yaml.SafeLoader):
    """YAML whose booleans are those of YAML 1.2 (`no` is a word), and whose keys are given once."""

    yaml_implicit_resolvers = {
        letter: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if str(key.value) in seen:
                earlier = seen[str(key.value)]
                raise yaml.YAMLError(f"`{key.value}` is given twice (lines {earlier} and {line}): keep one.")
            seen[str(key.value)] = line
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def read_yaml(path: str) -> dict[str, Any]:
    """The `name: value` pairs of a YAML file.

    Raises:
        InputError: it cannot be read, is malformed, or has a key twice.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, _Loader)
    except OSError as error:
        raise InputError(f"cannot read the configuration {path!r}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path!r} is not valid YAML: {error}") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise InputError(f"{path!r} must hold `name: value` lines, got a {type(content).__name__}.")
    return {str(key): value for key, value in content.items()}


def _with_new_names(layer: dict[str, Any]) -> dict[str, Any]:
    for old in RENAMED.keys() & layer.keys():
        if RENAMED[old] in layer:
            raise InputError(f"`{old}` is called `{RENAMED[old]}` now, and both are given: leave `{old}` out.")
        warnings.warn(f"`{old}` is called `{RENAMED[old]}` now.", FutureWarning, stacklevel=3)
    return {RENAMED.get(key, key): value for key, value in layer.items()}


class _Parser(HfArgumentParser):
    def add_argument(self, *names, is_text=False, may_be_bare=False, **settings):
        return super().add_argument(*names, **settings)  # argparse refuses metadata that it does not know

    def error(self, message: str) -> NoReturn:
        raise InputError(re.sub(r"^argument (--\w+)\S*:", r"`\1`:", message))


def built(dataclass_type: type[_Dataclass], settings: dict[str, Any]) -> _Dataclass:
    """A dataclass from settings, whose names it must have.

    Raises:
        InputError: as `typed`, or a value that the dataclass itself or transformers refuses.
    """
    try:
        return dataclass_type(**typed(dataclass_type, settings))
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(str(error)) from error


def typed(dataclass_type, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the types that the fields of a dataclass have. `None` is kept where a field may be `None`.

    Paths begin in the home for `~`, and environment variables are replaced, as a shell would.

    Raises:
        InputError: an unknown name, a value of the wrong type, an empty value.
    """
    check_keys(settings, names_of(dataclass_type), "argument")
    parser, hints = _parser_of(dataclass_type)
    words: list[str] = []
    for name, value in settings.items():
        words += _words(dataclass_type.__dataclass_fields__[name], hints[name], value)
    parsed = parser.parse_args(words)
    return {name: None if value is None else getattr(parsed, name) for name, value in settings.items()}


@functools.cache
def _parser_of(dataclass_type) -> tuple[_Parser, dict[str, Any]]:
    """The parser of a dataclass, and the types of its fields."""
    parser, hints = _Parser(dataclass_type), get_type_hints(dataclass_type)
    for action in parser._actions:  # transformers' parser takes the first type of a union alone
        if action.nargs is None and _accepts(hints.get(action.dest), list):
            action.nargs = "+"
    return parser, hints


def _accepts(hint, kind: type) -> bool:
    """Whether a type, or one of a union, is `kind` (for `list[str]`: `list`)."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return any((get_origin(part) or part) is kind for part in parts)


def _words(entry: dataclasses.Field, hint, value: Any) -> list[str]:
    """A value as words of a command line, none for `None`, checked for what the parser would not see."""
    name, is_text = entry.name, entry.metadata.get("is_text", False)
    if value is None:
        if not _accepts(hint, type(None)):
            raise InputError(f"`{name}` needs a value, got null: leave it out for its default.")
        return []
    if value is True and not _accepts(hint, bool) and not entry.metadata.get("may_be_bare"):
        raise InputError(f"`--{name}` needs a value.")
    if isinstance(value, dict):
        if not _accepts(hint, dict):
            raise InputError(f"`{name}` takes one value, got `name: value` pairs: {value}.")
        return [f"--{name}={json.dumps(value)}"]
    values = [str(item) for item in (value if isinstance(value, list) else [value])]
    values = values if is_text else [_expanded(name, item) for item in values]
    if _accepts(hint, list) and values:
        return [f"--{name}", *values]
    if len(values) != 1:
        shown = f"{', '.join(values[:3])}{', ...' if values[3:] else ''}"
        advice = ": quote a pattern of file names, so that the shell does not expand it" if "file" in name else ""
        raise InputError(f"`{name}` takes one value, got {len(values)} ({shown}){advice}.")
    return [f"--{name}={values[0]}"]


def _expanded(name: str, value: str) -> str:
    if not value.strip():
        raise InputError(f"`{name}` is empty: give a value, or leave it out. Is a variable of the shell not set?")
    if not os.path.exists(value):
        unset = [name for parts in _VARIABLE.findall(value) for name in parts if name and name not in os.environ]
        if unset:
            raise InputError(f"`{name}` is {value!r}, and the environment variable {unset[0]} is not set.")
        value = os.path.expandvars(value)
    return os.path.expanduser(value)


def names_of(dataclass_type) -> set[str]:
    """The names of the fields that a dataclass is made from."""
    return {entry.name for entry in dataclasses.fields(dataclass_type) if entry.init}


def closest(key: str, valid: Iterable[str]) -> str:
    """The end of a sentence about an unknown key: the valid one that is spelled most like it, if any is."""
    close = difflib.get_close_matches(key, sorted(valid), n=1, cutoff=0.5)
    return f": did you mean {close[0]!r}?" if close else "."


def check_keys(given: Any, valid: Collection[str], what: str) -> None:
    """Raises:
    InputError: `given` is no mapping, or has a key that is not valid.
    """
    if not isinstance(given, dict):
        raise InputError(f"expected `name: value` pairs, got {given!r} ({what}).")
    for key in given:
        if key not in valid:
            raise InputError(f"unknown {what} {key!r}{closest(str(key), valid)}")


def whole_number(name: str, value: Any) -> int:
    """Raises:
    InputError: the value is no whole number.
    """
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"`{name}` must be a whole number, got {value!r}.") from error


def described(dataclass_type, names: Collection[str] | None = None, prefix: str = "", documentation=None) -> list[str]:
    """Lines of `--help` about the fields of a dataclass.

    Args:
        names: the fields to describe; default: all.
        prefix: of the flags.
        documentation: a configuration class; the `Args:` of its docstring describe fields that have no `help`.
    """
    texts: dict[str, str] = {}
    if documentation is not None:
        section = inspect.cleandoc(documentation.__doc__).partition("Args:\n")[2].partition("\nRaises:")[0]
        for entry in re.split(r"\n    (?=\w)", "\n" + section):
            heads, _, text = entry.partition(": ")
            texts |= {head.strip(): " ".join(text.split()) for head in heads.split(",")}
    lines = []
    for entry in dataclasses.fields(dataclass_type):
        if names is None or entry.name in names:
            made = entry.default_factory
            default = entry.default if made is dataclasses.MISSING else made()
            text = entry.metadata.get("help") or texts.get(entry.name)
            lines.append(f"  --{prefix}{entry.name} (default: {default})" + (f"\n      {text}" if text else ""))
    return lines

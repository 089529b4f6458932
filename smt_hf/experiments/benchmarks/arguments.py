"""Flags that all benchmarks share, and how they are parsed."""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers import HfArgumentParser

from smt_hf.command_line import argument

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_readout_layers",
    "num_attention_heads",
    "num_memory_tokens",
    "updater_type",
)


@dataclass
class BenchmarkArguments:
    """The student, a folder or sizes, and where results go."""

    model: str | None = argument(None, "Folder of a student; default: a fresh one with the sizes below.")
    vocab_size: int | None = argument(None, "As in SMTRecurrentConfig, like the sizes that follow.")
    hidden_size: int | None = argument(None, "Width of a memory token.")
    num_hidden_layers: int | None = argument(None, "Blocks of the updater.")
    num_readout_layers: int | None = argument(None, "Blocks of the readout.")
    num_attention_heads: int | None = argument(None, "Heads of every attention.")
    num_memory_tokens: int | None = argument(None, "Memory tokens.")
    updater_type: str | None = argument(None, "transformer, mlp or gru.")
    output: str | None = argument(None, "File to which a JSON line a result is appended; default: print the lines.")
    num_threads: int = argument(torch.get_num_threads, "CPU threads; default: torch's.")
    seed: int = argument(0, "Of weights and tokens.")

    def __post_init__(self):
        if self.model is not None and self.sizes():
            raise ValueError(f"`model` has its own sizes: leave out {', '.join(self.sizes())}.")
        self.at_least_1("num_threads")

    def sizes(self) -> dict[str, int | str]:
        """Sizes that were given, for `SMTRecurrentConfig`."""
        return {name: getattr(self, name) for name in _SIZES if getattr(self, name) is not None}

    def at_least_1(self, *names: str) -> None:
        """Raises:
        ValueError: one of the numbers, or of the lists of numbers, is smaller than 1, or a list is empty.
        """
        for name in names:
            values = getattr(self, name)
            values = values if isinstance(values, list) else [values]
            if not values or min(values) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {values}.")

    def among(self, name: str, choices: tuple[str, ...]) -> None:
        """Raises:
        ValueError: an entry of the list `name` is none of the choices, or the list is empty.
        """
        unknown = set(getattr(self, name)) - set(choices)
        if unknown or not getattr(self, name):
            raise ValueError(f"unknown `{name}` {sorted(unknown)}: choose from {', '.join(choices)}.")


Arguments = TypeVar("Arguments", bound=BenchmarkArguments)


def parse(dataclass_type: type[Arguments], argv: list[str], description: str | None) -> Arguments:
    """Flags into a dataclass.

    Raises:
        ValueError: an unknown flag (the closest valid one is named), a value that does not fit.
        SystemExit: after `--help`, or for a value of the wrong type.
    """
    parser = HfArgumentParser(dataclass_type, description=description, allow_abbrev=False)
    arguments, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if rest:
        valid = [f"--{entry.name}" for entry in dataclasses.fields(dataclass_type)]
        close = difflib.get_close_matches(rest[0], valid, n=1, cutoff=0.5)
        raise ValueError(f"unknown argument {rest[0]!r}" + (f": did you mean {close[0]!r}?" if close else "."))
    return arguments

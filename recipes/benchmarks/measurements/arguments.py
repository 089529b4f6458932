"""Flags that all benchmarks share."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from smt_hf.command_line import argument
from smt_hf.errors import InputError

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
    vocab_size: int | None = argument(None, "Tokens of the vocabulary. Sizes are those of SMTRecurrentConfig.")
    hidden_size: int | None = argument(None, "Width of a memory token.")
    num_hidden_layers: int | None = argument(None, "Blocks of the updater.")
    num_readout_layers: int | None = argument(None, "Blocks of the readout.")
    num_attention_heads: int | None = argument(None, "Heads of every attention.")
    num_memory_tokens: int | None = argument(None, "Memory tokens.")
    updater_type: str | None = argument(None, "Name of an updater, as `mlp`.")
    output: str | None = argument(
        None, "File to which the results are appended, one JSON line each; default: print them."
    )
    num_threads: int = argument(torch.get_num_threads, "CPU threads; default: torch's.")
    seed: int = argument(0, "Seed of weights and tokens.")

    def __post_init__(self):
        if self.model is not None and self.sizes():
            raise InputError(f"`model` has its own sizes: leave out {', '.join(self.sizes())}.")
        self.at_least_1("num_threads")

    def sizes(self) -> dict[str, int | str]:
        """Sizes that were given, for `SMTRecurrentConfig`."""
        return {name: getattr(self, name) for name in _SIZES if getattr(self, name) is not None}

    def at_least_1(self, *names: str) -> None:
        """Raises:
        InputError: one of the numbers, or of the lists of numbers, is smaller than 1, or a list is empty.
        """
        self._check(names, "be at least 1", lambda value: value >= 1)

    def positive(self, *names: str) -> None:
        """Raises:
        InputError: one of the numbers, or of the lists of numbers, is not positive or not finite; `None` is no number.
        """
        self._check(names, "be positive", lambda value: value is None or (value > 0 and math.isfinite(value)))

    def _check(self, names: tuple[str, ...], what: str, is_right: Callable[[Any], bool]) -> None:
        for name in names:
            given = getattr(self, name)
            values = given if isinstance(given, list) else [given]
            if not values or not all(map(is_right, values)):
                raise InputError(f"`{name}` must {what}, got {given}.")

    def among(self, name: str, choices: tuple[str, ...]) -> None:
        """Raises:
        InputError: an entry of the list `name` is none of the choices, or the list is empty.
        """
        unknown = set(getattr(self, name)) - set(choices)
        if unknown or not getattr(self, name):
            raise InputError(f"unknown `{name}` {sorted(unknown)}: choose from {', '.join(choices)}.")

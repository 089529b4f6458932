"""Synthetic tasks, with easier levels of them as a curriculum."""

import math
from collections.abc import Iterable

import numpy as np
from datasets import Dataset

from smt_hf.data import TASKS, load_task, number_tokenizer, task_facts
from smt_hf.errors import InputError

from .levelled import LevelledSubject
from .subject import HELDOUT_SEED

_ROWS, _EVAL_ROWS = 30_000, 128


class TaskSubject(LevelledSubject):
    """A synthetic task, with easier levels of it as a curriculum for phases that have a `curriculum_threshold`.

    Args:
        name, difficulty: see `smt_hf.data.tasks`.
        curriculum: easier difficulties to begin with; those not below `difficulty` are left out, as are those above it
            of a phase's own `curriculum_levels`.
        seed: of the training rows.
        num_heldout: labels to score at least.
        heldout_seed: of the rows to score. Settings are chosen on other rows than those of the final scores.

    Raises:
        InputError: no such task or difficulty, or a seed that is one of held-out rows.
    """

    metric = "accuracy"

    def __init__(
        self,
        name: str,
        difficulty: int,
        curriculum: Iterable[int] = (),
        seed: int = 0,
        num_heldout: int = 4096,
        heldout_seed: int = HELDOUT_SEED + 1,
    ):
        if seed >= HELDOUT_SEED:
            raise InputError(f"seeds from {HELDOUT_SEED:,} on are those of held-out rows: take a smaller one.")
        if num_heldout < 1:
            raise InputError(f"`num_heldout` must be at least 1, got {num_heldout}.")
        self.heldout_seed = heldout_seed
        task = task_facts(name, difficulty)
        self.name, self.difficulty, self.chance, self.vocab_size = name, difficulty, task.chance, task.vocab_size
        self.num_transitions = task.num_transitions
        self.tokenizer = number_tokenizer(task.vocab_size)
        self.seed = seed
        self.level_names = [*sorted(level for level in set(curriculum) if level < difficulty), difficulty]
        self.levels = {level: load_task(name, level, _ROWS, seed) for level in self.level_names}
        self.eval_rows = load_task(name, difficulty, _EVAL_ROWS, HELDOUT_SEED)
        labels_per_row = int((self.eval_rows[0]["labels"] != -100).sum())
        self.heldout = self.heldout_rows(difficulty, math.ceil(num_heldout / labels_per_row))

    def heldout_rows(self, difficulty: int, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """`input_ids` and `labels` `(num_rows, T + 1)` that no training seed draws."""
        rows = load_task(self.name, difficulty, num_rows, self.heldout_seed)
        return np.stack(rows["input_ids"][:]).astype(np.int64), np.stack(rows["labels"][:]).astype(np.int64)

    def longer(self, factor: int) -> int | None:
        """The difficulty of rows `factor` times as long, where the difficulty is a length of some kind."""
        family, difficulty = TASKS[self.name], self.difficulty * factor
        is_possible = family.allowed is None and (family.largest is None or difficulty <= family.largest)
        return difficulty if is_possible else None

    def level(self, difficulty: int) -> Dataset:
        if difficulty not in self.levels:
            self.levels[difficulty] = load_task(self.name, difficulty, _ROWS, self.seed)
        return self.levels[difficulty]

    def check_level(self, difficulty: int) -> None:
        task_facts(self.name, difficulty)

    def facts(self) -> dict:
        return {
            "name": self.name,
            "hash": f"{self.name}-{self.difficulty}",
            "training_tokens": len(self.levels[self.difficulty]) * self.num_transitions,
            **super().facts(),
        }

    def describe(self) -> str:
        family = TASKS[self.name]
        levels = ", ".join(map(str, self.level_names))
        return (
            f"{self.name}: {family.meaning} {levels}; rows of {self.num_transitions} transitions, chance "
            f"{self.chance:.1%}, {len(self.heldout[0]):,} held-out rows"
        )

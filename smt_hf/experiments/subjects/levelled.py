"""Subjects whose rows come in levels, easiest first, as a curriculum."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from smt_hf.data import Levels
from smt_hf.errors import InputError
from smt_hf.training.arguments import PhaseArguments

from .subject import Subject, row_length


class LevelledSubject(Subject):
    """Levels for phases that have a `curriculum_threshold`; other phases train on the last one."""

    level_names: list[int]  # rising, the last one is `difficulty`
    num_transitions: int  # of a row at the last level
    # Whether phases may name levels above `difficulty`, which are then trained on and not scored. A level of such a
    # subject is the transitions of a row.
    trains_beyond = False

    @abstractmethod
    def level(self, difficulty: int) -> Dataset:
        """Training rows of one level."""

    @abstractmethod
    def check_level(self, difficulty: int) -> None:
        """Raises: InputError: there is no such level."""

    def required(self, arguments: PhaseArguments) -> dict[str, Any]:
        longest, levels = self.num_transitions, self.level_names
        if arguments.levels:
            levels = [level for level in arguments.levels if level <= self.difficulty or self.trains_beyond]
            if not levels:
                raise InputError(
                    f"`curriculum_levels` of the {arguments.phase} phase are all above the run's `difficulty` "
                    f"({self.difficulty}): {arguments.levels}."
                )
            if len(levels) > 1 and arguments.curriculum_threshold is None:
                raise InputError(
                    f"`curriculum_levels` of the {arguments.phase} phase need a `curriculum_threshold`, which says "
                    "when the next one begins."
                )
            for level in levels:
                self.check_level(level)
            longest = max(longest, levels[-1]) if self.trains_beyond else longest
        required = row_length(arguments, longest)
        if arguments.levels:
            required["curriculum_levels"] = list(map(str, levels))
        if len(levels) == 1:
            required["curriculum_threshold"] = None
        return required

    def required_of(self, phases: Sequence[PhaseArguments]) -> list[dict[str, Any]]:
        """As `required`. Where one phase has levels of its own, all phases name theirs, since their order then tells
        where each phase begins."""
        required = super().required_of(phases)
        if any(arguments.levels for arguments in phases):
            for arguments, values in zip(phases, required):
                if values.get("curriculum_threshold", arguments.curriculum_threshold) is not None:
                    values.setdefault("curriculum_levels", list(map(str, self.level_names)))
        return required

    def rows(self, arguments: PhaseArguments):
        names = arguments.levels or self.level_names
        if arguments.curriculum_threshold is None:
            return self.level(names[-1])
        return Levels([self.level(name) for name in names])

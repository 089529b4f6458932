"""What every subject has: rows to train on, held-out rows, and scores of them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from smt_hf.errors import InputError
from smt_hf.evaluation import Scores, reading_teacher, score_student, score_teacher
from smt_hf.training.arguments import PhaseArguments
from smt_hf.training.composite import SMTForPreTraining

# Seeds of held-out rows lie above all seeds of training rows.
HELDOUT_SEED = 1_000_000


class Subject(ABC):
    """Rows to train on, and scores."""

    name: str  # goes under `task` in the results, as `difficulty` does
    difficulty: int
    chance: float  # the score of knowing nothing
    metric: str  # name of the score
    tokenizer: Any  # of the rows; it is exported with the student
    vocab_size: int  # tokens that the rows are made of
    eval_rows: Any  # held-out rows for the evaluations within a phase, labelled like training rows
    # `input_ids` and `labels` of the rows to score, `(N, T + 1)` each, as in `smt_hf.evaluation.scores`.
    heldout: tuple[np.ndarray, np.ndarray]

    @abstractmethod
    def rows(self, arguments: PhaseArguments):
        """Training rows of a phase: a dataset, or `Levels` of them."""

    @abstractmethod
    def required(self, arguments: PhaseArguments) -> dict[str, Any]:
        """Arguments of a phase that follow from the rows, by name. `apply_required` of `training.phases` sets them.

        Raises:
            InputError: arguments that do not fit the rows.
        """

    def required_of(self, phases: Sequence[PhaseArguments]) -> list[dict[str, Any]]:
        """`required`, and its errors, of each phase of a pipeline: what one phase asks for may concern the others."""
        return [self.required(arguments) for arguments in phases]

    def evaluate(self, model: SMTForPreTraining, arguments: PhaseArguments) -> dict[str, dict]:
        """Scores after a phase, the same on all processes, each of which must call this method.

        Returns:
            `student`: of its own rollout, if the phase trained it; `teacher`: of the shared readout on its memories,
            after an smt phase (later phases change the readout, or the memories that it reads), if it can read.
        """
        ranks = {"process_index": arguments.process_index, "num_processes": arguments.world_size}
        scores = {}
        if arguments.trains_updater:
            scores["student"] = self.described_scores(score_student(model.student, *self.heldout, **ranks))
        if arguments.phase == "smt" and reading_teacher(model) is not None:
            scores["teacher"] = self.described_scores(score_teacher(model, *self.heldout, **ranks))
        return scores

    def described_scores(self, scores: Scores) -> dict[str, Any]:
        """What goes into the results of an arm, with `metric` among it."""
        return {"accuracy": scores.accuracy, "loss": scores.loss, "n": scores.n}

    @abstractmethod
    def facts(self) -> dict:
        """What it is made of, with its `name` and `hash`; goes under `data` in the results."""
        return {"heldout_tokens": int((self.heldout[1] != -100).sum()), "heldout_streams": len(self.heldout[0])}

    @abstractmethod
    def describe(self) -> str:
        """One line for people."""


def row_length(arguments: PhaseArguments, num_transitions: int) -> dict[str, Any]:
    """Arguments that follow from the length of rows, each of which is a sequence of its own.

    Args:
        num_transitions: of a row. BPTT over the whole `context_length` becomes BPTT over the whole row.
    """
    steps = arguments.transition_steps
    is_whole = arguments.phase == "bptt" and steps >= arguments.context_length
    return {
        "context_length": num_transitions,
        "transition_steps": num_transitions if is_whole else min(steps, num_transitions),
        "carries_memory": False,
    }


def refuse_curriculum(arguments: PhaseArguments) -> None:
    """For subjects of one level.

    Raises:
        InputError: the phase has `curriculum_levels`.
    """
    if arguments.curriculum_levels is not None:
        raise InputError(
            f"`curriculum_levels` of the {arguments.phase} phase need a synthetic task or documents; the length of "
            "other rows is set by `context_length`."
        )

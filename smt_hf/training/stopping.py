"""Ending a run before its last step: on a signal, cleanly; on a number that is not finite, at once."""

import signal
import threading
import time

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from .launch import launched_with_deepspeed

logger = logging.get_logger(__name__)
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """The run was asked to end and did, after a complete checkpoint.

    Args:
        signal_number: what asked.
        checkpoint: what it left, `None` between phases, where the last phase's checkpoint is all there is to save.
    """

    def __init__(self, signal_number: int, checkpoint: str | None):
        super().__init__(signal_number, checkpoint)
        self.signal_number, self.checkpoint = signal_number, checkpoint

    def __str__(self) -> str:
        where = f" after saving {self.checkpoint}" if self.checkpoint else ""
        return f"stopped by {signal.Signals(self.signal_number).name}{where}: pass `--resume_from_checkpoint` to go on."


class StopOnSignal(TrainerCallback):
    """Inside the context, SIGTERM and Ctrl-C end the training after the step at hand, on all ranks at the same one,
    with a checkpoint. A second Ctrl-C ends the process at once.

    A job that is preempted or stopped by hand loses nothing; what a plain exception would leave is the last save.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._first = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _ask(self, number: int, frame) -> None:
        # A launcher passes on what its whole process group has got already, so that one Ctrl-C may arrive twice.
        if self.signal_number is not None and number == signal.SIGINT and time.monotonic() - self._first > 2:
            raise KeyboardInterrupt
        if self.signal_number is None:
            self.signal_number, self._first = number, time.monotonic()

    def agreed(self) -> int | None:
        """The signal that any rank has got. A collective call."""
        if PartialState().num_processes > 1:
            number = torch.tensor(self.signal_number or 0, device=PartialState().device)
            largest = reduce(torch.nn.functional.one_hot(number, 65).float()).nonzero().max().item()
            if largest:  # what has come in the meantime is agreed on in the next step
                self.signal_number = int(largest)
            return int(largest) or None
        return self.signal_number

    def on_step_end(self, args, state, control, **kwargs):
        if self.agreed() is not None:
            control.should_save = control.should_training_stop = True


def not_finite(terms: dict[str, torch.Tensor]) -> list[str]:
    """Names of the scalars that are not finite."""
    values = [torch.as_tensor(value).float() for value in terms.values()]
    values = [value.full_tensor() if hasattr(value, "full_tensor") else value for value in values]
    finite = torch.stack(values).isfinite().tolist()  # one transfer
    return [name for name, is_finite in zip(terms, finite) if not is_finite]


def check_finite(
    terms: dict[str, torch.Tensor], step: int, phase: str, example_ids: torch.Tensor | None, remedy: str | None = None
) -> None:
    """Refuse to go on from a loss that is not finite: one such gradient spoils every weight.

    Args:
        terms: name -> scalar.
        step: optimiser step that is being computed.
        example_ids: `(B,)`, the batch's.
        remedy: what may help, a sentence without its full stop.

    Raises:
        FloatingPointError: with the names of the terms, the step and the batch.
    """
    bad = ", ".join(not_finite(terms))
    if not bad:
        return
    batch = "" if example_ids is None else f", in the batch of examples {example_ids.tolist()}"
    raise FloatingPointError(
        f"{bad} of the {phase} phase is not finite at step {step}{batch}. Nothing of this step has been kept. "
        f"{remedy or ('Look at the data' if example_ids is None else 'Look at these examples')}, or start over with a "
        f"lower `learning_rate` of the phase."
    )


def leave_out_if_not_finite(norm, model: nn.Module, cost, arguments, step: int) -> None:
    """Take all gradients away if their norm is not finite: optimisers pass over weights without one.

    The norm is that of all ranks, which therefore agree.

    Args:
        norm: of the gradient of the optimiser step.
        cost: the phase's `TrainingCost`, which counts the steps that are left out.
        arguments: the phase's, with `max_skipped_steps`.
        step: optimiser step that is being computed.

    Raises:
        FloatingPointError: as many steps in a row have been left out as may be.
    """
    if not not_finite({"the gradient": norm}):
        cost.skipped_in_a_row = 0
        return
    if cost.skipped_in_a_row >= arguments.max_skipped_steps:
        remedy = (
            f"Raise `max_skipped_steps` of the phase, which is {arguments.max_skipped_steps}, and resume the run from "
            f"its last complete checkpoint (left out so far: {cost.skipped_steps}, in a row: {cost.skipped_in_a_row})"
        )
        is_possible = not arguments.deepspeed and not launched_with_deepspeed()
        check_finite({"the gradient": norm}, step, arguments.phase, None, remedy if is_possible else None)
    if not cost.skipped_steps and PartialState().is_main_process:
        logger.warning(
            f"{arguments.phase}: the gradient is not finite at step {step}. The step is left out, as "
            "`max_skipped_steps` allows. Later ones are counted without a warning."
        )
    cost.skipped_in_a_row += 1
    cost.skipped_steps += 1
    for parameter in model.parameters():
        parameter.grad = None

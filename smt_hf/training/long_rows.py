"""What makes long rows fit into memory: the argument `gradient_checkpointing` of a phase, and readouts in pieces.

With it, a backward pass holds the student's memories, and computes again what led from one to the next and what was
read out of them. Shapes: N positions of all rows, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Trainer

from smt_hf.student import SMTRecurrentForCausalLM

from .argument_checks import refuse
from .losses import MOST_COMPARED

# Positions that are read out at once: the readout's activations of these are computed again together.
_MOST_READ = 4096


def is_checkpointed(student: SMTRecurrentForCausalLM) -> bool:
    """Whether the student's rollout is computed again in the backward pass."""
    return student.model.stretch.gradient_checkpointing


def in_pieces(
    student: SMTRecurrentForCausalLM, compare: Callable[..., torch.Tensor], *tensors: torch.Tensor | None
) -> torch.Tensor:
    """`compare(*tensors)`, which reads memories out and returns values of each. Where the student is checkpointed, it
    works piece by piece, and no logits are kept.

    Args:
        tensors: `(N, ...)` each; one that is `None` is `None` in every piece.

    Returns:
        `(N, ...)`.
    """
    size = max(min(MOST_COMPARED // student.config.vocab_size, _MOST_READ), 1)
    (length,) = {len(tensor) for tensor in tensors if tensor is not None}
    if not is_checkpointed(student) or not length:
        return compare(*tensors)
    number = -(-length // size)
    parts = zip(*([None] * number if tensor is None else tensor.split(size) for tensor in tensors))
    return torch.cat([checkpoint(compare, *part, use_reentrant=False) for part in parts])


def check_checkpointing(args: Any, is_sharded: bool) -> None:
    """Refuse what does not go with `gradient_checkpointing`, and choose its kind.

    In one process it is the reentrant one, which keeps no graph of what it computes again: the graph of a small student
    is larger than its activations. DDP cannot follow that.

    Args:
        args: of a phase.
        is_sharded: whether weights or optimiser states are to be in shards.

    Raises:
        InputError: they are, or the reentrant kind was asked for in several processes.
    """
    if not args.gradient_checkpointing:
        return
    refuse(
        is_sharded,
        f"`gradient_checkpointing` of the {args.phase} phase is for one process or DDP: leave it out under FSDP and "
        "DeepSpeed, where ranks would gather weights at different times.",
    )
    kwargs = dict(args.gradient_checkpointing_kwargs or {})
    refuse(
        kwargs.get("use_reentrant") and args.world_size > 1,
        "DDP cannot follow reentrant checkpoints: leave `use_reentrant` out of `gradient_checkpointing_kwargs`.",
    )
    kwargs.setdefault("use_reentrant", args.world_size == 1)
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):  # transformers 5.17: one of them
        if hasattr(args, name):
            setattr(args, name, kwargs)
    if args.ddp_find_unused_parameters is None:  # transformers turns it off with checkpointing
        args.ddp_find_unused_parameters = True


class LongRowTrainer(Trainer):
    """A Trainer whose argument `gradient_checkpointing` decides for its phase: the phase before may have had it."""

    def __init__(self, model=None, args=None, *others, **kwargs):
        super().__init__(model, args, *others, **kwargs)
        if not self.args.gradient_checkpointing:
            # transformers 5.17 has the second name alone.
            getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()

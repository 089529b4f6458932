"""The loop over time: `m_{t+1} = f(m_t, x_{t+1})`, the only one of the package.

Shapes: N sequences or chunks side by side, T tokens, K memory tokens, D width.
"""

import torch
import torch.nn.functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

# Tokens between two memories that gradient checkpointing keeps. Not the root of the row's length: the readout needs the
# memories after all tokens anyway, beside which those of every 32nd token are few.
CHECKPOINT_EVERY = 32
# Tokens of all rows or chunks side by side that it computes again at once.
MOST_RECOMPUTED = 4096


def document_starts(document_ids: torch.Tensor) -> torch.Tensor:
    """Where another document starts inside a packed row: `(B, T)` -> `(B, T)` bool, false at the first token."""
    changes = document_ids[:, 1:] != document_ids[:, :-1]
    return F.pad(changes, (1, 0))


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of a state that a model of precision `dtype` carries from token to token: at least float32.

    A half-precision state loses every change below its resolution (0.4 % in bfloat16), at every token anew.
    """
    return torch.promote_types(dtype, torch.float32)


def unrolled(
    memory,
    embeds,
    attention_mask=None,
    starts_document=None,
    start=None,
    *,
    updater,
    layer_outputs: list | None = None,
    num_kept: int | None = None,
) -> torch.Tensor:
    """The memory after each token; the arguments are those of `SMTRecurrentModel.unroll`.

    Args:
        start: `(K, D)`, `m_0`; needed with `starts_document`.
        updater: `f`, called once per token.
    """
    keep = None if attention_mask is None else attention_mask.bool()[:, :, None, None].unbind(1)
    reset = None if starts_document is None else starts_document[:, :, None, None].unbind(1)
    first_kept = 0 if num_kept is None else embeds.shape[1] - num_kept
    memories = []
    for index, token in enumerate(embeds.unbind(1)):
        if reset is not None:
            memory = torch.where(reset[index], start, memory)
        collected: list | None = None if layer_outputs is None else []
        updated = updater(memory, token, collected)
        memory = updated if keep is None else torch.where(keep[index], updated, memory)
        if index >= first_kept:
            memories.append(memory)
        if layer_outputs is not None:
            layer_outputs.append(collected)
    return torch.stack(memories, dim=1)


class SMTRecurrentStretch(GradientCheckpointingLayer):
    """A stretch of tokens, the unit of gradient checkpointing. The layer has no weights: the updater is an argument."""

    def __init__(self):
        super().__init__()
        # One of so many stretches of a row is checkpointed, the others keep their activations.
        self.every_n = 1

    def forward(self, memory, embeds, attention_mask=None, starts_document=None, start=None, *, updater):
        """As `unrolled`."""
        return unrolled(memory, embeds, attention_mask, starts_document, start, updater=updater)

    def checkpointed(self, memory, embeds, attention_mask=None, starts_document=None, start=None, *, updater):
        """As `unrolled`, in stretches whose activations are computed again when needed.

        A stretch has `CHECKPOINT_EVERY` tokens, or fewer if those of all rows would be more than `MOST_RECOMPUTED`:
        chunks of a long row are short, but thousands stand side by side.
        """
        rows = (memory, embeds, attention_mask, starts_document)
        if len(memory) > MOST_RECOMPUTED:
            groups = _split(rows, MOST_RECOMPUTED, dim=0)
            return torch.cat([self.checkpointed(*group, start, updater=updater) for group in groups])
        if not (memory.requires_grad or embeds.requires_grad):
            # As with LoRA. A reentrant checkpoint whose inputs have no gradient gives none to the weights.
            memory = memory.detach().requires_grad_()
        size = max(min(CHECKPOINT_EVERY, MOST_RECOMPUTED // max(len(memory), 1)), 1)
        pieces = []
        for index, own in enumerate(_split(rows[1:], size, dim=1)):
            run = unrolled if index % self.every_n else self
            pieces.append(run(memory, *own, start, updater=updater))
            memory = pieces[-1][:, -1].clone()  # a view would keep the memories of the whole stretch
        return torch.cat(pieces, dim=1)


def _split(tensors: tuple, size: int, dim: int):
    """Tuples of parts of the tensors, `size` long; a tensor may be `None`. One backward pass joins the gradients of all
    parts, where slices would each fill a tensor as large as the whole."""
    parts = [None if tensor is None else tensor.split(size, dim) for tensor in tensors]
    number = max(len(part) for part in parts if part is not None)
    return zip(*([None] * number if part is None else part for part in parts))

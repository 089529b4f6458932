"""Which positions of a row count, by chance and by error: for decoded futures, and for hard transitions.

Every choice derives from the number of the example or from the row itself, so that it depends neither on the width of
the batch nor on how a step is cut. Shapes: B sequences, S positions, K memory tokens, D width.
"""

from typing import TYPE_CHECKING

import torch

from .objective import Objective
from .rollout import example_uniforms

if TYPE_CHECKING:
    from .supervision import TransitionBatch

# What the random numbers of an example are for; see `example_uniforms`.
STREAM_POSITIONS, STREAM_ON_POLICY, STREAM_AGES, STREAM_CHUNKS, STREAM_TRANSITIONS = range(5)
# One transition in so many is a hard one; see `transition_weights`.
HARD_SHARE = 16


def picked_positions(batch: "TransitionBatch", objective: Objective, labels: torch.Tensor):
    """Random positions of each row: the teacher's memories there, the positions, and whether they count."""
    if not objective.needs("picked"):
        return None
    # As many tokens ahead as the row has left, anywhere if the future is longer than the row; in a padded row,
    # positions past its own last one do not count, so that nothing depends on the width of the batch.
    fits = objective.future_length < batch.lengths - 1
    last = torch.where(fits, batch.lengths - objective.future_length, batch.lengths - 1).clamp(min=0)[:, None]
    noise = example_uniforms(batch.example_ids, batch.length + 1, objective.seed, STREAM_POSITIONS)
    noise = noise.masked_fill(torch.arange(batch.length + 1, device=last.device) > last, -1.0)
    count = min(objective.num_predictive_positions, int(last.max()) + 1)
    highest, chosen = noise.topk(count, dim=1)
    return gathered(labels, chosen), chosen, highest >= 0


def drawn_ends(
    batch: "TransitionBatch", objective: Objective, is_end: torch.Tensor, errors: torch.Tensor | None = None
) -> torch.Tensor:
    """Of the ends of a row, those whose future is decoded: `num_consistency_chunks` draws with replacement, `(B, S)`.

    Args:
        is_end: `(B, E)`, the ends that the row has; they come first.
        errors: `(B, E)`, largest error of the chunk before each end. A share `hard_chunk_fraction` of the draws is the
            end with the largest of them: of T transitions, about one is informative. `None`: all draws are uniform.
    """
    count = objective.num_consistency_chunks
    noise = example_uniforms(batch.example_ids, 2 * count, objective.seed, STREAM_CHUNKS)
    anywhere = (noise[:, :count] * is_end.sum(1, keepdim=True)).long()
    if errors is None:
        return anywhere
    hardest = errors.masked_fill(~is_end, -1.0).argmax(1)
    return torch.where(noise[:, count:] < objective.hard_chunk_fraction, hardest[:, None], anywhere)


def chunk_ends(batch: "TransitionBatch", objective: Objective, memories: torch.Tensor, errors: torch.Tensor):
    """Chunk ends whose future is decoded: the student's memories there, the tokens read, whether there is such an end.

    Args:
        memories: `(B, C k, K, D)`, the student's after each token.
        errors: `(B, S)`, normalised errors of every `label_stride`-th transition.
    """
    length, stride = batch.inputs.shape[1], objective.label_stride
    ends = torch.arange(batch.steps, length + 1, batch.steps, device=errors.device)
    # Something is left to predict; a row shorter than a chunk has no chunk end.
    is_end = (ends < batch.lengths[:, None]) & (batch.steps == objective.transition_steps)
    dense = errors.new_zeros(batch.size, length)
    dense[:, stride - 1 : batch.length : stride] = errors
    chosen = drawn_ends(batch, objective, is_end, dense.view(batch.size, len(ends), -1).amax(2))
    return _decoded_at(batch, memories, ends, is_end, chosen)


def window_ends(batch: "TransitionBatch", objective: Objective, memories: torch.Tensor):
    """Positions of a BPTT row whose future is decoded, as in `chunk_ends`.

    Where every step reads whole rows: the ends of windows, if tokens follow. Where a row is one window of a stream, it
    ends with the window: any position that has `future_length` tokens after it.
    """
    if objective.carries_memory:
        ends = torch.arange(1, batch.length + 1, device=memories.device)
        is_end = ends + objective.future_length <= batch.lengths[:, None]
    else:
        window = objective.transition_steps
        ends = torch.arange(window, max(batch.length, window) + 1, window, device=memories.device)
        is_end = ends < batch.lengths[:, None]
    return _decoded_at(batch, memories, ends, is_end, drawn_ends(batch, objective, is_end))


def _decoded_at(batch: "TransitionBatch", memories, ends, is_end, chosen):
    positions = ends[chosen].clamp(max=batch.length)
    return gathered(memories, positions - 1), positions, is_end.gather(1, chosen)


def transition_weights(
    errors: torch.Tensor, mask: torch.Tensor | None, hard_transition_fraction: float
) -> torch.Tensor | None:
    """Weights `(B, S)` of the transitions of a row, for `masked_mean`; without hard transitions, the mask itself.

    Of the n transitions of a row that count, the ceil(n / 16) with the largest errors are hard (of equal ones, the
    first). They share `hard_transition_fraction` of the weight of the row equally; the rest is spread over all n.

    Args:
        errors: `(B, S)`, not negative; no gradient is taken of them.
        mask: `(B, S)`, transitions that count; `None`: all.
    """
    if not hard_transition_fraction:
        return mask
    counts = torch.ones_like(errors, dtype=torch.bool) if mask is None else mask
    number = counts.sum(1, keepdim=True)
    num_hard = (number + HARD_SHARE - 1) // HARD_SHARE
    order = errors.detach().masked_fill(~counts, -1.0).argsort(dim=1, descending=True, stable=True)
    is_hard = order.argsort(dim=1) < num_hard
    shares = hard_transition_fraction * number / num_hard.clamp(min=1)
    return (1 - hard_transition_fraction + shares * is_hard) * counts


def gathered(memories: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Memories `(B, T, K, D)` at places `(B, S)`."""
    return memories.gather(1, index[..., None, None].expand(-1, -1, *memories.shape[2:]))

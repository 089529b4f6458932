"""SMT as published: a few random places per row are supervised, so that long rows cost little.

Shapes: B sequences, S places, k transitions from each (`supervised_chunk_steps`; 1 as published), K memory tokens, D
width.
"""

from typing import TYPE_CHECKING

import torch

from .objective import Objective
from .positions import STREAM_TRANSITIONS, drawn_ends, gathered
from .rollout import example_uniforms
from .supervision import Supervision, TransitionBatch, compared

if TYPE_CHECKING:
    from .composite import SMTForPreTraining


def sparsely_supervised(model: "SMTForPreTraining", batch: TransitionBatch, objective: Objective) -> Supervision:
    """A few random transitions per row, each between two labels of its own [Eq. 2-4].

    With k > 1 the student makes k transitions from the label at each place, and every one is supervised. A row of fewer
    than k transitions is read from its beginning, with as many as it has.
    """
    student, steps = model.student.model, objective.supervised_chunk_steps
    transitions = (batch.lengths - 1).clamp(min=1)[:, None]  # of the row
    noise = example_uniforms(
        batch.example_ids, objective.num_supervised_transitions, objective.seed, STREAM_TRANSITIONS
    )
    before = (noise * (transitions - steps + 1).clamp(min=1)).long()
    ahead = torch.arange(steps, device=before.device)
    is_real = None if steps == 1 else ((before[..., None] + ahead) < transitions[..., None]).flatten(1)
    read = (before[..., None] + ahead).flatten(1).clamp(max=batch.length - 1)  # (B, S k) places of the tokens
    positions = torch.cat([before, read + 1], dim=1)
    found = model.memory_labels(batch, positions, model.trains_teacher, likeliest=objective.likeliest)
    labels = found.memories
    starts, ends = labels[:, : before.shape[1]], labels[:, before.shape[1] :]
    is_first = None
    if batch.documents is not None:  # the first token of a document is read by m_0
        earlier = batch.documents.gather(1, (read - 1).clamp(min=0))
        is_first = batch.documents.gather(1, read) != earlier
        starts = torch.where(is_first[:, ::steps, None, None], student.start_memory().to(starts.dtype), starts)
    inside = None if is_first is None or steps == 1 else is_first.reshape(-1, steps)
    embeds = student.embed(batch.inputs.gather(1, read)).unflatten(1, (-1, steps)).flatten(0, 1)
    reached = student.unroll(starts.flatten(0, 1), embeds, None, inside).view(ends.shape)
    errors, weights, moments = compared(model, objective, reached, ends, is_real)
    targets = batch.labels.gather(1, positions)
    if is_real is not None:
        targets = targets.masked_fill(~torch.cat([torch.ones_like(before, dtype=torch.bool), is_real], dim=1), -100)
    return Supervision(
        batch,
        depth=steps,
        transitions=read.numel() if is_real is None else int(is_real.sum()),
        reached=reached,
        reached_labels=ends,
        reached_mask=is_real,
        reached_weights=weights,
        errors=errors,
        read=reached,
        read_targets=targets[:, before.shape[1] :],
        labels=labels,
        label_targets=targets,
        next_tokens=None if found.next_tokens is None else found.next_tokens[:, before.shape[1] :],
        picked=(starts, before, None),
        chunk_ends=_after(batch, objective, reached, before + steps, errors),
        label_moments=moments,
    )


def _after(batch: TransitionBatch, objective: Objective, reached, ends, errors):
    """The ends of the supervised chunks whose future is decoded: as `positions.chunk_ends`."""
    if not objective.needs("chunk_ends"):
        return None
    is_end = ends < batch.lengths[:, None]  # all of a row, or none: its chunks are whole if it is long enough
    largest = errors.detach().view(*ends.shape, -1).amax(2)
    chosen = drawn_ends(batch, objective, is_end, largest)
    last = reached.view(*ends.shape, -1, *reached.shape[2:])[:, :, -1]
    return gathered(last, chosen), ends.gather(1, chosen).clamp(max=batch.length), is_end.gather(1, chosen)

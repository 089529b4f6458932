"""How much a student loses the longer it runs on its own memories, and how fast two nearby memories of it part.

The *age* of a memory is the number of transitions since the student was put on the teacher's memory. Age 0 is the
teacher's memory itself, called teacher-forced; a free run was last put on `m_0`, the label of the empty prefix.
The exponent is that of Benettin et al. (1980), with finite differences in the place of the tangent map.

Rows as in `scores.py`: `input_ids (N, T + 1)`, the last token only a target, and aligned `labels (N, T + 1)`.
Shapes: N rows, B rows of a batch, T tokens, W tokens up to the last label of a batch, K memory tokens, D width.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from smt_hf.student.modeling_smt_recurrent import document_starts
from smt_hf.student.recurrence_smt_recurrent import state_dtype

from .memories import reading_teacher, teacher_memories
from .scores import check_aligned

# Name of a mean -> (2,) float64: the sum and the number of what was added up. Sums of batches and ranks can be added.
Sums = dict[str, torch.Tensor]

_READ_AT_ONCE = 2048  # memories whose logits are held
_LONGEST_BURN_IN = 16


def loss_by_age(model, input_ids: np.ndarray, labels: np.ndarray, batch_size: int = 64) -> dict[str, Any] | None:
    """What the readout loses by the age of the memory that it reads, nats per label.

    For every a = 1, 2, 4, 8, .. up to the first that is at least as large as the row, a row is cut into chunks of a
    transitions that end at its last label. Every chunk starts at the teacher's memory there and runs freely. Its
    memories of an age above a / 2 and up to a count for a: about half of all labels for every a, whatever T is, and
    always the last one. (The largest a is the free run from `m_0`.) The loss of the same readout on the teacher's own
    memories at the same positions is subtracted, so that ages of easy and of hard positions compare. A row costs about
    T log2(T) transitions. What `m_0` itself predicts, before the first token, is left out.

    Args:
        model: an `SMTForPreTraining`.
        input_ids, labels: `(N, T + 1)`.
        batch_size: rows side by side; changes memory use and speed, not the result.

    Returns:
        `drift_by_age`: a -> mean loss of memories of that age minus that of the teacher's memories at the same
        positions; an age that no label has is missing. `teacher_forced` and `free_run`: mean losses over all labels, of
        the teacher's memories and of the student's rollout from `m_0`. All in nats per label. `None` without a teacher,
        with one that makes every position by a pass of its own (`labels_all_positions`), and without labels after
        the first token.

    Raises:
        ValueError: the shapes differ.
    """
    check_aligned(input_ids, labels)
    teacher = reading_teacher(model)
    if teacher is None or not teacher.labels_all_positions:
        return None
    sums: Sums = {}
    with torch.inference_mode():
        for start in range(0, len(input_ids), batch_size):
            some = slice(start, start + batch_size)
            tokens, goals = (torch.from_numpy(part[some]).to(model.device) for part in (input_ids, labels))
            positions = torch.arange(tokens.shape[1], device=tokens.device)
            rows = _Rows(model.student, tokens, goals, labels=teacher_memories(model, tokens[:, :-1], positions))
            _add(sums, rows.losses())
    means = means_of(sums)
    return means if "drift_by_age" in means else None


def largest_lyapunov(student, input_ids: np.ndarray, burn_in: int | None = None, batch_size: int = 64) -> float | None:
    """Estimate of the largest Lyapunov exponent of the student's own rollout from `m_0`, nats per token.

    Two memories that differ a little differ `exp(exponent)` times as much a token later, both reading the same tokens:
    above 0 the rollout is chaotic and makes errors grow, below 0 it forgets them (and what it has read) at that
    rate. A difference of random direction and of `sqrt(eps)` of the memory's norm (eps: resolution of its numbers) is
    pushed through every transition and scaled back to that size. The exponent is the mean of the logarithms of its
    growth, over rows and tokens. A growth below 10 `sqrt(eps)` is rounding and counts as that much.

    Args:
        student: an `SMTRecurrentForCausalLM`.
        input_ids: `(N, T + 1)`, not padded.
        burn_in: transitions of a row that do not count, in which the difference turns to the direction that grows
            most; default: a quarter of T, at most 16.
        batch_size: rows side by side; changes memory use and speed, not the result.

    Returns:
        `None` where no transition counts.
    """
    sums: Sums = {}
    with torch.inference_mode():
        for rows in torch.from_numpy(input_ids).to(student.device).split(batch_size):
            _add(sums, _Rows(student, rows, rows).stretches(burn_in))
    return means_of(sums).get("lyapunov")


@torch.no_grad()
def free_run_sums(
    student,
    input_ids: torch.Tensor,
    targets: torch.Tensor,
    labels: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    with_exponent: bool = True,
) -> Sums:
    """Both measurements of one batch, up to the last label of each row: what `means_of` makes means of.

    Args:
        student: an `SMTRecurrentForCausalLM`.
        input_ids, targets, attention_mask, document_ids: `(B, T + 1)`, as in `SMTForPreTraining.forward`. Padding
            changes nothing and has no age; where another document starts the memory is `m_0` again, of age 0.
        labels: `(B, T + 1, K, D)`, the teacher's memories after 0 .. T tokens; `None`: the exponent alone.
        with_exponent: also measure the exponent. Autocast is off for it: in half precision, small differences drown.
    """
    rows = _Rows(student, input_ids, targets, labels, attention_mask, document_ids)
    sums = {} if labels is None else rows.losses()
    if with_exponent:
        with torch.autocast(input_ids.device.type, enabled=False):
            sums |= rows.stretches()
    return sums


def means_of(sums: Sums) -> dict[str, Any]:
    """The means: `drift_by_age` (age -> nats per label), `teacher_forced`, `free_run` (nats per label), `lyapunov`
    (nats per token). What nothing was added up for is missing."""
    means = {name: float(total / number) for name, (total, number) in sums.items() if number > 0}
    by_age = {int(name.removeprefix("age ")): means.pop(name) for name in list(means) if name.startswith("age ")}
    return {**({"drift_by_age": by_age} if by_age else {}), **means}


def _add(sums: Sums, more: Sums) -> None:
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value


def _summed(values: torch.Tensor) -> torch.Tensor:
    return torch.stack([values.double().sum(), torch.tensor(float(values.numel()), device=values.device).double()])


class _Rows:
    """The rows of a batch moved to the right, so that their last labels lie side by side in the last column.

    Column c of a row is the token that makes the memory after `c + 1 - shift` tokens of the row.
    """

    def __init__(self, student, input_ids, targets, labels=None, attention_mask=None, document_ids=None):
        self.student = student
        self.transitions = input_ids.shape[1] - 1
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = ((targets != -100) * places).amax(1)
        self.width = int(last.max())
        columns = places[: self.width] - (self.width - last)[:, None]
        self.real, columns = columns >= 0, columns.clamp(min=0)
        self.tokens, self.targets = input_ids.gather(1, columns), targets.gather(1, columns + 1)
        if attention_mask is not None:
            self.real = self.real & attention_mask.gather(1, columns).bool()
        self.targets = self.targets.masked_fill(~self.real, -100)
        self.resets = None if document_ids is None else document_starts(document_ids.gather(1, columns))
        self.labels = self.befores = None
        if labels is not None:  # the teacher's memories after and before each token
            rows = torch.arange(len(labels), device=labels.device)[:, None]
            self.labels, self.befores = labels[rows, columns + 1], labels[rows, columns]
        m_0 = student.model.start_memory()
        self.start = m_0.to(state_dtype(m_0.dtype))
        self.free = self._rolled(self.start.expand(len(last), 1, -1, -1), self.width) if self.width else None

    def _chunked(self, tensor: torch.Tensor, length: int) -> torch.Tensor:
        """`(B, W)` -> `(B, C, length)`, filled up on the left."""
        return F.pad(tensor, (-self.width % length, 0)).unflatten(1, (-1, length))

    def _rolled(self, starts: torch.Tensor, length: int) -> torch.Tensor:
        """The memories `(B, W, K, D)` of chunks of `length` columns from the memories `(B, C, K, D)` before them."""
        model = self.student.model
        memories = model.unroll(
            starts.flatten(0, 1),
            model.embed(self._chunked(self.tokens, length).flatten(0, 1)),
            self._chunked(self.real, length).flatten(0, 1),
            None if self.resets is None else self._chunked(self.resets, length).flatten(0, 1),
        )
        return memories.reshape(len(self.tokens), -1, *starts.shape[2:])[:, -self.width :]

    def _ages(self, length: int) -> torch.Tensor:
        """Real transitions since the start of the chunk, or since that of the document: `(B, W)`."""
        read = self.real.long().cumsum(1)
        places = torch.arange(self.width, device=read.device) + -self.width % length
        begins = (places % length == 0).expand_as(self.real)
        begins = begins if self.resets is None else begins | self.resets
        return read - ((read - self.real.long()) * begins).cummax(1).values

    def _nats(self, memories: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Losses of the readout on the chosen `(B, W)` of the memories `(B, W, K, D)`, `(n,)`."""
        parts = zip(memories[chosen].split(_READ_AT_ONCE), self.targets[chosen].split(_READ_AT_ONCE))
        read = [
            F.cross_entropy(self.student.read_logits(part).float(), goals, reduction="none") for part, goals in parts
        ]
        return torch.cat(read)

    def losses(self) -> Sums:
        """Sums of the losses by age, `age a` each, and of those that they compare with."""
        labelled = self.targets != -100
        if not labelled.any():
            return {}
        assert self.labels is not None and self.befores is not None and self.free is not None
        forced = torch.zeros(labelled.shape, device=labelled.device)
        forced[labelled] = self._nats(self.labels, labelled)
        sums = {"teacher_forced": _summed(forced[labelled]), "free_run": _summed(self._nats(self.free, labelled))}
        length = 1
        while length < 2 * self.width:
            memories = self.free
            if length < self.width:
                # The first chunk may be filled up: its first real token is then the row's, whatever stands before it.
                begins = torch.arange(-(-self.width % length), self.width, length, device=labelled.device).clamp(min=0)
                memories = self._rolled(self.befores[:, begins].to(self.free.dtype), length)
            ages = self._ages(min(length, self.width))
            chosen = labelled & (ages > length // 2) & (ages <= length)
            if chosen.any():
                sums[f"age {length}"] = _summed(self._nats(memories, chosen) - forced[chosen])
            length *= 2
        return sums

    def stretches(self, burn_in: int | None = None) -> Sums:
        """Sum of the logarithms of the growth of a small difference, token by token."""
        if self.free is None:
            return {}
        model, dtype = self.student.model, self.free.dtype
        step = torch.finfo(dtype).eps ** 0.5
        burn_in = min(self.transitions // 4, _LONGEST_BURN_IN) if burn_in is None else burn_in
        read = self.real.long().cumsum(1)
        direction = torch.randn(self.start.shape, generator=torch.Generator().manual_seed(0)).to(self.free)
        direction = F.normalize(direction.flatten(), dim=0).expand(len(self.free), -1)
        befores = torch.cat([self.start.expand(len(self.free), 1, -1, -1), self.free[:, :-1]], dim=1)
        if self.resets is not None:
            befores = torch.where(self.resets[..., None, None], self.start, befores)
        counted = []
        for column, memory in enumerate(befores.unbind(1)):
            size = step * memory.flatten(1).norm(dim=1, keepdim=True).clamp(min=step)
            both = torch.cat([memory + (size * direction).view(memory.shape), memory])
            embeds = model.embed(self.tokens[:, column : column + 1]).repeat(2, 1, 1)
            moved, kept = model.unroll(both, embeds)[:, 0].flatten(1).chunk(2)
            change = (moved - kept) / size
            growth, real = change.norm(dim=1, keepdim=True), self.real[:, column, None]
            direction = torch.where(real & (growth > 10 * step), change / growth, direction)
            counted.append(growth.clamp(min=10 * step).log()[real & (read[:, column, None] > burn_in)])
        return {"lyapunov": _summed(torch.cat(counted))}

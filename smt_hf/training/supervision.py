"""Where the chunks of a batch start, what their memories are compared with, and what is read out of them.

One function per way to supervise: `backpropagated` (bptt), `supervised` (smt and dmt, every transition),
`sparsely_supervised` (smt as published, in `sparse.py`) and `teacher_alone` (smt without the updater). Each returns a
`Supervision`, from which `objective.LOSS_TERMS` computes the loss terms.
Shapes: B sequences, T transitions (rows hold T + 1 tokens), C chunks, k = T / C, S positions, F future tokens, K memory
tokens, D width, V vocabulary. "Own memories" are those that the student has reached by its own rollout from `m_0`.
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from smt_hf.teachers import NextTokens

from .long_rows import in_pieces, is_checkpointed
from .losses import (
    distillation_errors,
    divergence,
    dynamics_loss,
    label_moments,
    masked_mean,
    normalized_errors,
    predictive_loss,
)
from .objective import Objective
from .positions import STREAM_AGES, STREAM_ON_POLICY, chunk_ends, picked_positions, transition_weights, window_ends
from .rollout import example_uniforms, parallel_starts, rollout, sequential_starts, truncated_rollout
from .teacher_labels import CachedRows, TeacherLabels

if TYPE_CHECKING:
    from .composite import SMTForPreTraining


class TransitionBatch:
    """A batch cut for the rollout: T transitions, padded at the end to a multiple of k.

    Args:
        input_ids, attention_mask, labels, document_ids: `(B, T + 1)`, as in `SMTForPreTraining.forward`.
        example_ids: `(B,)`.
        steps: k, transitions per chunk.
        cached: what the teacher's model says of the rows, where that is known already.

    Attributes:
        inputs, mask, documents: `(B, C k)`, what the rollout reads.
        transition_mask: `(B, T)` bool, transitions whose token and target are real; `None`: all.
        lengths: `(B,)`, number of tokens up to the last real one.
    """

    def __init__(
        self, input_ids, attention_mask, labels, document_ids, example_ids, steps: int, cached: CachedRows | None = None
    ):
        self.cached = cached
        self.size, self.length = input_ids.shape[0], input_ids.shape[1] - 1
        self.steps = steps
        self.input_ids, self.labels, self.example_ids = input_ids, labels, example_ids
        padding = -self.length % steps
        mask = None if attention_mask is None else attention_mask[:, :-1].bool()
        # The last real token of a row is only a target, whether padding follows it or not.
        self.transition_mask = None if mask is None else mask & attention_mask[:, 1:].bool()
        if padding and mask is None:
            mask = torch.ones_like(input_ids[:, :-1], dtype=torch.bool)
        self.lengths = torch.full((self.size,), self.length + 1, device=input_ids.device)
        if attention_mask is not None:
            places = torch.arange(1, self.length + 2, device=input_ids.device)
            self.lengths = (attention_mask.bool() * places).amax(1)
        self.inputs = F.pad(input_ids[:, :-1], (0, padding))
        self.mask = None if mask is None else F.pad(mask, (0, padding))
        self.documents = None
        if document_ids is not None:
            ends = document_ids[:, -2:-1].expand(-1, padding)
            self.documents = torch.cat([document_ids[:, :-1], ends], dim=1)

    @property
    def num_chunks(self) -> int:
        return self.inputs.shape[1] // self.steps

    @property
    def num_transitions(self) -> int:
        """Real ones, all rows together."""
        return self.size * self.length if self.transition_mask is None else int(self.transition_mask.sum())

    def read(self, rows=slice(None), length: int | None = None) -> tuple:
        """`input_ids`, mask and documents of some rows, up to `length` tokens, as the rollout takes them."""
        return tuple(None if part is None else part[rows, :length] for part in (self.inputs, self.mask, self.documents))


@dataclass
class Supervision:
    """What the supervision of a batch has computed. `None` where a way to supervise has no such thing."""

    batch: TransitionBatch
    depth: int  # transitions computed one after the other
    transitions: int  # transitions supervised, all rows together (memories, where the teacher is trained alone)
    # The student's memories after transitions, the teacher's there (B, S, K, D); those that count (B, S), `None`: all;
    # what each of them counts (`transition_weights`; without hard transitions the mask).
    reached: torch.Tensor | None = None
    reached_labels: torch.Tensor | None = None
    reached_mask: torch.Tensor | None = None
    reached_weights: torch.Tensor | None = None
    errors: torch.Tensor | None = None  # (B, S), normalised squared errors between the two
    read: torch.Tensor | None = None  # (B, S, K, D), memories of the student
    read_targets: torch.Tensor | None = None  # (B, S), the tokens that follow them
    labels: torch.Tensor | None = None  # (B, S, K, D), the teacher's memories at all positions that it computed
    label_targets: torch.Tensor | None = None  # (B, S), the tokens that follow them
    teacher_logits: torch.Tensor | None = None  # (B, T + 1, V), its own next-token logits there
    # Of (B, S), what the teacher expects next where `read` has memories; without those, where `labels` has.
    next_tokens: NextTokens | None = None
    # Memories whose future is decoded (B, S, K, D), number of tokens read there (B, S), whether they count (B, S) or
    # `None`: of the teacher, and of the student at the ends of chunks or windows.
    picked: tuple | None = None
    chunk_ends: tuple | None = None
    memory: torch.Tensor | None = None  # (B, K, D), the student's after the last transition
    starts: torch.Tensor | None = None  # (B, C, K, D), start states of the chunks
    own: torch.Tensor | None = None  # (B,) bool, rows that the student rolled out from `m_0` by itself
    label_moments: torch.Tensor | None = None  # see `SMTForPreTrainingOutput`
    _logits: dict[str, torch.Tensor] = field(default_factory=dict)  # by the name of the memories; terms share them

    def _read_out(self, student, name: str, compare, *others) -> torch.Tensor:
        """A value for each of the memories `read` or `labels` that has a target, from what is read out of it.

        Args:
            compare: logits `(M, V)`, targets `(M,)` and the others there -> values `(M,)`.
            others: `(B, S, ...)` each, or `None`.

        Returns:
            `(B, S)`, 0 where there is no target.
        """
        memories, targets = (self.read, self.read_targets) if name == "read" else (self.labels, self.label_targets)
        assert memories is not None and targets is not None
        is_labelled = self._is_labelled(name)
        wanted = [None if other is None else other[is_labelled] for other in (targets, *others)]
        if name not in self._logits:
            chosen = memories.flatten(0, 1) if bool(is_labelled.all()) else memories[is_labelled]
            if is_checkpointed(student):  # no logits to share
                pieces = in_pieces(student, lambda own, *its: compare(student.read_logits(own), *its), chosen, *wanted)
                return _spread(pieces, is_labelled)
            self._logits[name] = student.read_logits(chosen)
        return _spread(compare(self._logits[name], *wanted), is_labelled)

    def _is_labelled(self, name: str) -> torch.Tensor:
        targets = self.read_targets if name == "read" else self.label_targets
        return torch.ne(targets, -100)  # type: ignore[arg-type]  # no term asks where there are none

    def readout_loss(self, student, name: str) -> torch.Tensor:
        """Next-token loss of the memories `read` or `labels`, nats: `(B,)`. Only those with a target are read out."""
        losses = self._read_out(student, name, partial(F.cross_entropy, reduction="none"))
        return masked_mean(losses, self._is_labelled(name))

    def distillation(self, student, temperature: float) -> torch.Tensor:
        """How far the readout is from what the teacher expects next, nats: `(B,)`, where there is a target."""
        assert self.next_tokens is not None
        name = "labels" if self.read is None else "read"

        def compare(logits, _, probabilities, tokens):
            return distillation_errors(logits, probabilities, tokens, temperature)

        errors = self._read_out(student, name, compare, self.next_tokens.probabilities, self.next_tokens.tokens)
        return masked_mean(errors, self._is_labelled(name) & self.next_tokens.is_known)

    def readout_match(self, student) -> torch.Tensor:
        """How far the readout of the student's memories is from that of the labels there, nats: `(B,)`."""
        assert self.reached is not None and self.reached_labels is not None
        mask, reached, labels = self.reached_mask, self.reached, self.reached_labels.detach()
        if mask is not None:
            reached, labels = reached[mask], labels[mask]

        def compare(own, label):
            logits = student.read_logits(own)
            with torch.no_grad():
                label_logits = student.read_logits(label)
            return divergence(logits, label_logits)

        if mask is None:
            flat = in_pieces(student, compare, reached.flatten(0, 1), labels.flatten(0, 1))
            return masked_mean(flat.view(reached.shape[:2]), self.reached_weights)
        return masked_mean(_spread(in_pieces(student, compare, reached, labels), mask), self.reached_weights)

    def future_loss(self, student, decoded: tuple, future_length: int) -> torch.Tensor:
        """Cross-entropy of the tokens after some positions, decoded from the memories there: nats, `(B,)`.

        Tokens past the end of the row, or without a label, are not predicted.

        Args:
            decoded: memories `(B, S, K, D)`, positions `(B, S)`, and whether they count `(B, S)` or `None`.
        """
        batch, (memories, positions, is_real) = self.batch, decoded
        future_length = min(future_length, batch.length + 1 - int(positions.min()))
        ahead = positions[..., None] + torch.arange(future_length, device=positions.device)
        future_ids = F.pad(batch.input_ids, (0, future_length)).gather(1, ahead.flatten(1))
        targets = F.pad(batch.labels, (0, future_length), value=-100).gather(1, ahead.flatten(1)).view(ahead.shape)
        if is_real is not None:
            targets = targets.masked_fill(~is_real[..., None], -100)
        is_labelled = targets.flatten(0, 1) != -100
        most = max(int(is_labelled.sum(1).max()), 1)
        wanted = None
        if 2 * most < future_length:  # labels are sparse: bring those of each future to the front, decode no others
            wanted = (~is_labelled).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
            targets = targets.flatten(0, 1).gather(1, wanted).view(*positions.shape, most)
        logits = student.decode_logits(memories.flatten(0, 1), future_ids.view(-1, future_length), wanted)
        return predictive_loss(logits.view(*targets.shape, -1), targets)


def _spread(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`(M,)` values at the M places of a mask `(B, S)`, 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def backpropagated(
    model: "SMTForPreTraining", batch: TransitionBatch, objective: Objective, memory: torch.Tensor | None
) -> Supervision:
    """BPTT over the row from `m_0` or a carried memory; truncated where its windows are shorter than the row."""
    start = _start(model, batch, memory)
    if objective.carries_memory or objective.transition_steps >= batch.length:
        memories = rollout(model.student, start[:, None], *batch.read())
    else:
        memories = truncated_rollout(model.student, start, objective.transition_steps, *batch.read())
    return Supervision(
        batch,
        depth=batch.inputs.shape[1],
        transitions=batch.num_transitions,
        read=torch.cat([start[:, None], memories[:, : batch.length]], dim=1),
        read_targets=batch.labels,
        chunk_ends=window_ends(batch, objective, memories) if objective.needs("chunk_ends") else None,
        memory=memories[:, -1],
        own=torch.ones_like(batch.lengths, dtype=torch.bool) if objective.weight("readout") else None,
    )


def _start(model: "SMTForPreTraining", batch: TransitionBatch, memory: torch.Tensor | None) -> torch.Tensor:
    """`(B, K, D)`: `m_0` where `memory` is NaN or not given, else `memory`."""
    start = model.student.model.start_memory().expand(batch.size, -1, -1)
    return start if memory is None else torch.where(memory.isnan(), start, memory.to(start.dtype))


def teacher_alone(
    model: "SMTForPreTraining", batch: TransitionBatch, objective: Objective, memory: torch.Tensor | None
) -> Supervision:
    """SMT before the updater is trained: the teacher and the readout of its memories, no transitions.

    `memory`: the teacher's to go on from (`carries_teacher_memory`); the last one then stands in for the student's.
    """
    positions = torch.arange(0, batch.length + 1, device=batch.inputs.device)
    trains_teacher = model.trains_teacher
    carries = objective.carries_teacher_memory
    found = model.memory_labels(
        batch,
        positions,
        trains_teacher,
        with_logits=trains_teacher and objective.needs("teacher_logits"),
        reads_only=not objective.weight("uniformity"),  # the other terms read the memories out
        start=_start(model, batch, memory) if carries else None,
        likeliest=objective.likeliest,
    )
    return Supervision(
        batch,
        depth=1,
        transitions=batch.num_transitions,
        labels=found.memories,
        label_targets=batch.labels,
        teacher_logits=found.logits,
        next_tokens=found.next_tokens,
        memory=found.last,
        picked=picked_positions(batch, objective, found.memories),
        own=torch.ones_like(batch.lengths, dtype=torch.bool) if objective.weight("teacher_readout") else None,
    )


def supervised(
    model: "SMTForPreTraining",
    batch: TransitionBatch,
    objective: Objective,
    stored_starts: torch.Tensor | None,
    memory_labels: torch.Tensor | None,
    progress: float,
) -> Supervision:
    """SMT and DMT: chunks from the teacher's or own memories, every transition supervised."""
    is_smt = objective.phase == "smt"
    first = model.student.model.start_memory().expand(batch.size, 1, -1, -1)
    found, stride = _labels_of_rows(model, batch, objective, memory_labels), objective.label_stride
    labels = found.memories
    starts, own, memories, depth = _rolled_out(model, batch, objective, first, labels, stored_starts, progress)
    reached = memories[:, : batch.length][:, stride - 1 :: stride]
    mask = None if batch.transition_mask is None else batch.transition_mask[:, stride - 1 :: stride]
    errors, weights, moments = compared(model, objective, reached, labels[:, 1:], mask)
    decoded = None
    if objective.needs("chunk_ends"):
        assert errors is not None
        decoded = chunk_ends(batch, objective, memories, errors.detach())
    read = torch.cat([first, memories[:, : batch.length]], dim=1)
    return Supervision(
        batch,
        depth=depth,
        transitions=batch.num_transitions,
        reached=reached,
        reached_labels=labels[:, 1:],
        reached_mask=mask,
        reached_weights=weights,
        errors=errors,
        read=read if objective.readout_trains_updater else read.detach(),
        read_targets=batch.labels,
        labels=labels if is_smt else None,
        label_targets=batch.labels if is_smt else None,
        teacher_logits=found.logits,
        next_tokens=found.next_tokens,
        picked=picked_positions(batch, objective, labels) if is_smt else None,
        chunk_ends=decoded,
        memory=memories[:, -1],
        starts=starts,
        own=own if objective.weight("readout") else None,
        label_moments=moments,
    )


def compared(model, objective: Objective, reached, labels, mask):
    """Normalised errors of the student's memories against the teacher's `(B, S, K, D)`, weights of the transitions
    `(B, S)`, and moments of the labels; `None` for what the phase does not need (weights: for all equal)."""
    hard = objective.hard_transition_fraction
    errors = moments = None
    weights = mask
    if objective.needs("errors") or objective.needs("chunk_ends"):
        errors = normalized_errors(reached, labels, model.label_variance())
    if hard:  # without the bound of the errors, at which they would be equal
        with torch.no_grad():
            unbounded = normalized_errors(reached, labels, model.label_variance(), largest=math.inf)
        weights = transition_weights(unbounded, mask, hard)
    if errors is not None or hard:
        moments = label_moments(labels.detach(), mask)
    return errors, weights, moments


def _labels_of_rows(
    model, batch: TransitionBatch, objective: Objective, memory_labels: torch.Tensor | None
) -> TeacherLabels:
    """The teacher's memories at every `label_stride`-th position, 0 included, and at all of them what else it says."""
    if memory_labels is not None:
        m_0 = model.student.model.start_memory().detach().expand(batch.size, 1, -1, -1)
        return TeacherLabels(torch.cat([m_0, memory_labels.to(m_0.dtype)], dim=1))
    stride = objective.label_stride
    step = 1 if objective.likeliest else stride
    positions = torch.arange(0, batch.length + 1, step, device=batch.inputs.device)
    trains_teacher = objective.phase == "smt" and model.trains_teacher
    with_logits = trains_teacher and objective.needs("teacher_logits")
    found = model.memory_labels(
        batch, positions, trains_teacher, with_logits=with_logits, likeliest=objective.likeliest
    )
    return replace(found, memories=found.memories[:, :: stride // step])


def _rolled_out(model, batch: TransitionBatch, objective: Objective, first, labels, stored_starts, progress: float):
    """Starts of the chunks (`None` where one pass makes them), rows of the student's own, memories `(B, C k, K, D)`,
    and the number of transitions computed one after the other."""
    student = model.student
    # One chunk starts at m_0 whatever the teacher says: it is the student's own rollout already.
    own = batch.lengths - 1 <= objective.transition_steps
    takes_own = (
        objective.on_policy_fraction > 0 and batch.num_chunks > 1 and progress >= objective.on_policy_warmup_ratio
    )
    forcing = objective.forcing_at(progress)
    depth = batch.steps + (_depth_of_starts(batch, objective) if takes_own else 0)
    if takes_own and _is_one_pass(objective, batch.inputs.device):
        at_starts = labels[:, : batch.length : batch.steps] if forcing else None
        memories = truncated_rollout(
            student, first[:, 0], batch.steps, *batch.read(), labels=at_starts, forcing=forcing
        )
        return None, own if forcing else torch.ones_like(own), memories, depth
    if objective.label_stride == 1:
        starts = torch.cat([first, labels[:, : batch.length : batch.steps][:, 1:]], dim=1)
    else:  # own memories take the place of all starts but the first
        starts = first.expand(-1, batch.num_chunks, -1, -1)
    if takes_own:
        rows, own_starts = _own_starts(model, batch, objective, starts.detach(), stored_starts, forcing)
        if rows is not None:
            starts = starts.index_copy(0, rows, torch.cat([first[rows], own_starts[:, 1:]], dim=1))
            is_its_own = objective.on_policy_mode == "sequential" and not forcing
            own = own.index_fill(0, rows, True) if is_its_own else own
    return starts, own, rollout(student, starts, *batch.read()), depth


def _is_one_pass(objective: Objective, device: torch.device) -> bool:
    """Whether all chunks go on from where the one before ends, so that one pass over the row yields the starts too.

    On a GPU, T cheap steps without gradient and then k steps with gradient are faster than T steps with gradient.
    """
    return objective.on_policy_mode == "sequential" and objective.on_policy_fraction == 1 and device.type == "cpu"


def _depth_of_starts(batch: TransitionBatch, objective: Objective) -> int:
    if objective.on_policy_mode == "parallel":
        return objective.on_policy_sweeps * batch.steps
    return batch.inputs.shape[1] - batch.steps


def _own_starts(model, batch: TransitionBatch, objective: Objective, starts, stored_starts, forcing: float):
    """Rows whose chunks start from own memories, and those memories; `None` for both if this batch has no such row."""
    draws = example_uniforms(batch.example_ids, 1, objective.seed, STREAM_ON_POLICY)[:, 0]
    rows = own_rows = (draws < objective.on_policy_fraction).nonzero()[:, 0]
    if not len(rows):
        # Where weights are in shards, every call of the updater gathers them: all ranks have to call it as often.
        rows = torch.zeros(1, dtype=torch.long, device=draws.device)
    if objective.on_policy_mode == "parallel":
        noise = example_uniforms(batch.example_ids[rows], starts.shape[1], objective.seed, STREAM_AGES)
        ages = 1 + (noise * objective.on_policy_sweeps).long()
        input_ids, mask, documents = batch.read(rows)
        sweeps = objective.on_policy_sweeps
        own = parallel_starts(model.student, starts[rows], ages, input_ids, mask, documents, sweeps, forcing)
    else:
        at_starts = starts[rows] if forcing else None
        own = sequential_starts(model.student, starts.shape[1], *batch.read(rows), labels=at_starts, forcing=forcing)
        if objective.on_policy_mode == "aggregate" and stored_starts is not None:
            stored = stored_starts[rows].to(own.dtype)
            own = torch.where(stored.isnan(), own, stored)
    return (rows, own) if len(own_rows) else (None, None)


@torch.no_grad()
def rollout_scores(model: "SMTForPreTraining", batch: TransitionBatch, with_teacher: bool) -> dict[str, torch.Tensor]:
    """Scores of the student's own rollout from `m_0`, `(B,)` each: loss (nats), accuracy and drift.

    Drift is the squared distance to the teacher's memories relative to their spread over the row, no unit. A teacher
    that computes every position by itself is too slow: drift is then left out.
    """
    m_0 = model.student.model.start_memory()
    start = m_0.expand(batch.size, 1, -1, -1)
    memories = rollout(model.student, start, *batch.read())[:, : batch.length]
    is_labelled = batch.labels != -100

    def compare(read, targets):
        logits = model.student.read_logits(read)
        losses = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
        return torch.stack([losses, (logits.argmax(-1) == targets).to(losses)], dim=-1)

    read = torch.cat([start, memories], dim=1).flatten(0, 1)
    found = in_pieces(model.student, compare, read, batch.labels.flatten())
    losses, hits = found.view(*batch.labels.shape, 2).unbind(-1)
    terms = {"rollout": masked_mean(losses, is_labelled), "accuracy": masked_mean(hits, is_labelled)}
    if with_teacher and model.labels_rows(batch):
        positions = torch.arange(1, batch.length + 1, device=memories.device)
        labels = model.memory_labels(batch, positions, trains_teacher=False).memories
        mask = batch.transition_mask
        counts = torch.ones_like(batch.inputs[:, : batch.length]) if mask is None else mask
        weights = (counts / counts.sum(1, keepdim=True).clamp(min=1))[..., None, None]
        centre = (labels * weights).sum(1, keepdim=True)
        spread = dynamics_loss(labels, centre, mask)
        terms["drift"] = dynamics_loss(memories, labels, mask) / spread.clamp(min=1e-6)
    return terms

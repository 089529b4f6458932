"""The composite of student and teacher that is trained: one module, one forward, all losses of a phase.

accelerate prepares exactly one module, and DDP, FSDP and ZeRO hook its `forward`: nothing calls a part past it.
Shapes: B sequences, T transitions (rows hold T + 1 tokens), C chunks, k = T / C, S positions, K memory tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from smt_hf.student import SMTRecurrentConfig, SMTRecurrentForCausalLM
from smt_hf.teachers import SMTTeacherConfig, SMTTeacherEncoder, SMTWindowedTeacher, SMTWindowedTeacherConfig

from .adapters import has_lora
from .losses import (
    dynamics_loss,
    masked_mean,
    next_token_loss,
    normalized_errors,
    predictive_loss,
    uniformity_loss,
    warmed_up,
)
from .rollout import example_uniforms, parallel_starts, rollout, sequential_starts, truncated_rollout

PHASES = ("smt", "dmt", "bptt")
PARTS = ("teacher", "embeddings", "updater", "readout")
# Terms with a weight; evaluation adds others that have none.
_TERMS = (
    "readout",
    "dynamics",
    "normalized_dynamics",
    "predictive",
    "consistency",
    "teacher_readout",
    "uniformity",
    "teacher",
)
# Terms that the readout is a part of.
_READ_OUT = ("readout", "predictive", "consistency", "teacher_readout")
# Terms that `Objective.dynamics_starts_below` holds back.
_HELD_BACK = ("dynamics", "normalized_dynamics")
# What the random numbers of an example are for; see `example_uniforms`.
_STREAM_POSITIONS, _STREAM_ON_POLICY, _STREAM_AGES, _STREAM_CHUNKS, _STREAM_TRANSITIONS = range(5)


@dataclass(frozen=True)
class Objective:
    """What a phase computes, with the values of its training arguments (help, defaults and sources stand there); what
    a phase does not have is off here."""

    phase: str
    transition_steps: int
    readout_weight: float
    seed: int
    readout_warmup_ratio: float = 0.0
    readout_trains_updater: bool = True
    dynamics_weight: float = 0.0
    dynamics_warmup_ratio: float = 0.0
    normalized_dynamics_weight: float = 0.0
    label_stride: int = 1
    consistency_weight: float = 0.0
    num_consistency_chunks: int = 1
    hard_chunk_fraction: float = 0.0
    teacher_readout_weight: float = 0.0
    num_supervised_transitions: int = 0
    carries_memory: bool = True
    trains_updater: bool = True
    predictive_weight: float = 0.0
    predictive_warmup_ratio: float = 0.0
    num_predictive_positions: int = 0
    future_length: int = 1
    uniformity_weight: float = 0.0
    uniformity_warmup_ratio: float = 0.0
    teacher_weight: float = 0.0
    on_policy_fraction: float = 0.0
    on_policy_warmup_ratio: float = 0.0
    on_policy_mode: str = "sequential"
    on_policy_sweeps: int = 1


class SMTPreTrainingConfig(PreTrainedConfig):
    """Configuration of [`SMTForPreTraining`]: those of its two parts.

    Args:
        student: an `SMTRecurrentConfig` or its fields.
        teacher: an `SMTTeacherConfig` or its fields (vocabulary and shape of a memory default to the student's); `None`
            for a composite without a teacher (BPTT alone).

    Raises:
        ValueError: the teacher's memories do not have the student's shape or vocabulary.
    """

    model_type = "smt_pretraining"
    sub_configs = {"student": SMTRecurrentConfig, "teacher": SMTTeacherConfig}

    student: SMTRecurrentConfig | dict | None = None
    teacher: SMTTeacherConfig | SMTWindowedTeacherConfig | dict | None = None

    def __post_init__(self, **kwargs):
        if not isinstance(self.student, SMTRecurrentConfig):
            self.student = SMTRecurrentConfig(**(self.student or {}))
        if isinstance(self.teacher, dict):
            shape = {
                "vocab_size": self.student.vocab_size,
                "num_memory_tokens": self.student.num_memory_tokens,
                "memory_size": self.student.hidden_size,
            }
            self.teacher = _teacher_config({**shape, **self.teacher})
        if self.teacher is not None:
            shapes = {
                "vocab_size": (self.teacher.vocab_size, self.student.vocab_size),
                "num_memory_tokens": (self.teacher.num_memory_tokens, self.student.num_memory_tokens),
                "memory_size (the student's hidden_size)": (self.teacher.memory_size, self.student.hidden_size),
            }
            for name, (teachers, students) in shapes.items():
                if teachers != students:
                    raise ValueError(
                        f"the teacher's {name} is {teachers}, the student's is {students}: make them equal."
                    )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self, name, getattr(self.student, name))
            kwargs.pop(name, None)
        super().__post_init__(**kwargs)


def _teacher_config(fields: dict) -> SMTTeacherConfig | SMTWindowedTeacherConfig:
    """The configuration of the kind that `model_type` names; without it, the causal teacher's."""
    kinds = {kind.model_type: kind for kind in (SMTTeacherConfig, SMTWindowedTeacherConfig)}
    given = fields.get("model_type", SMTTeacherConfig.model_type)
    if given not in kinds:
        raise ValueError(f"unknown teacher `model_type` {given!r}: choose one of {', '.join(kinds)}.")
    return kinds[given](**{name: value for name, value in fields.items() if name != "model_type"})


@dataclass
class SMTForPreTrainingOutput(ModelOutput):
    """
    Args:
        loss: scalar, nats: the weighted terms, each example weighted by its number of labels, over `num_items`.
        term_sums: name -> detached scalar, sum over examples of (mean of the term) x (labels of the example).
        num_items: scalar, labels in this batch; `term_sums / num_items` are means.
        memory: `(B, K, D)`, detached: the student's memory after the row's last transition (bptt: to be carried on).
        starts: `(B, C, K, D)`, detached: start states of the chunks (dmt in `aggregate` mode: to be stored).
        memory_labels: `(B, S, K, D)`, detached: the teacher's memories after the positions that are supervised (dmt: to
            be cached).
        own_sums: `(2,)`, detached: readout loss (nats, summed over labels) of rows that the student rolled out from
            `m_0` by itself, and their labels; where it is not trained, of the teacher's memories. What a curriculum is
            gated by.
        label_moments: `(1 + 2 K, D)`, detached: number of memory labels seen, their sum and the sum of their squares
            by coordinate; `None` where nothing is normalised by them.
        sequential_steps: transitions that this forward computed one after the other.
        transitions: transitions supervised, all rows together (memories, where the teacher is trained alone).
    """

    loss: torch.Tensor | None = None
    term_sums: dict[str, torch.Tensor] | None = None
    num_items: torch.Tensor | None = None
    memory: torch.Tensor | None = None
    starts: torch.Tensor | None = None
    memory_labels: torch.Tensor | None = None
    own_sums: torch.Tensor | None = None
    label_moments: torch.Tensor | None = None
    sequential_steps: int | None = None
    transitions: int | None = None


class SMTForPreTraining(PreTrainedModel):
    """Student and teacher together; `forward` computes every loss of a phase.

    Every term is `sum_i n_i term_i / N` with `n_i` the labels of example i, `term_i` the term's mean inside the example
    and N the labels of the whole optimiser step on all ranks (`num_items_in_batch`): the sum does not depend on how
    the step is cut into micro-batches or ranks.
    """

    config_class = SMTPreTrainingConfig
    config: SMTPreTrainingConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = False
    _no_split_modules = [
        *SMTRecurrentForCausalLM._no_split_modules,
        *SMTTeacherEncoder._no_split_modules,
        *(SMTWindowedTeacher._no_split_modules or []),
    ]
    # Explicit, since the Trainer would otherwise guess both from the class's name and signature: the labels are
    # counted without a shift (m_0 predicts the first token), and the loss is already divided by their number.
    loss_type = None
    accepts_loss_kwargs = True

    def __init__(self, config: SMTPreTrainingConfig):
        super().__init__(config)
        assert isinstance(config.student, SMTRecurrentConfig) and not isinstance(config.teacher, dict)
        self.student = SMTRecurrentForCausalLM(config.student)
        self.teacher: SMTTeacherEncoder | SMTWindowedTeacher | None = None
        if isinstance(config.teacher, SMTWindowedTeacherConfig):
            self.teacher = SMTWindowedTeacher(config.teacher)
        elif config.teacher is not None:
            self.teacher = SMTTeacherEncoder(config.teacher)
        # Spread of the memory labels by coordinate, a running estimate that is fixed within an optimiser step, so that
        # what it divides does not depend on how the step is cut; 1 as long as none has been seen.
        shape = (config.student.num_memory_tokens, config.student.hidden_size)
        self.register_buffer("label_mean", torch.zeros(shape))
        self.register_buffer("label_square", torch.ones(shape))
        self.register_buffer("label_updates", torch.zeros((), dtype=torch.long))
        self.post_init()
        # FSDP asks for classes that are there; the updater is one of several.
        there = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = [name for name in type(self)._no_split_modules if name in there]

    def get_input_embeddings(self):
        return self.student.get_input_embeddings()

    def get_output_embeddings(self):
        return self.student.get_output_embeddings()

    def _init_weights(self, module):
        """Nothing: the parts initialise themselves."""

    @classmethod
    def from_student(cls, student: SMTRecurrentForCausalLM) -> "SMTForPreTraining":
        """A composite around an existing student, trained in place, without a teacher: for the `bptt` phase."""
        model = cls(SMTPreTrainingConfig(student=student.config.to_dict()))
        model.student = student
        return model

    def freeze_for(
        self,
        phase: str,
        trains_updater: bool = True,
        trainable: Sequence[str] | None = None,
        objective: Objective | None = None,
    ) -> None:
        """Freeze what `phase` does not train. To be called before the model is wrapped for a distributed run.

        Args:
            trains_updater: whether the phase has transitions at all.
            trainable: of `PARTS`, those to train; default: all that the phase can. `embeddings` are the student's input
                embeddings (with tied weights, its head too), `updater` has the initial memory, `readout` the head.
            objective: also freeze the heads that none of its losses reaches; a sharded optimiser would decay them.

        Raises:
            ValueError: the phase is unknown, the model has no teacher for it, or a part is not trained by it.
        """
        if phase not in PHASES:
            raise ValueError(f"unknown phase {phase!r}: choose one of {', '.join(PHASES)}.")
        if phase != "bptt" and self.teacher is None:
            raise ValueError(f"the {phase} phase needs a teacher and this model has none; use the bptt phase.")
        chosen = trained_parts(phase, trains_updater, trainable)
        adapted = has_lora(self.student)
        if adapted and trainable is not None:
            raise ValueError("LoRA trains its own layers: leave `trainable` out, and choose with `lora_parts`.")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("lora_" in name if adapted else part_of(name) in chosen)
        if not trains_updater and "teacher" in chosen:  # its label of the empty prefix
            self.student.model.initial_memory.requires_grad_(not adapted)
        if objective is None:
            return
        predicts = objective.teacher_weight and not objective.num_supervised_transitions
        if isinstance(self.teacher, SMTTeacherEncoder) and not predicts:
            self.teacher.lm_head.requires_grad_(False)
        read_out = _READ_OUT if phase == "smt" else ("readout",)  # the others are not computed there
        if not any(getattr(objective, f"{name}_weight") for name in read_out):
            for name, parameter in self.student.named_parameters():
                if part_of(f"student.{name}") == "readout":
                    parameter.requires_grad_(False)

    @torch.no_grad()
    def update_label_moments(self, moments: torch.Tensor, momentum: float = 0.9) -> None:
        """Take the `label_moments` of an optimiser step, summed over its forwards and ranks, into the estimate."""
        if not moments[0, 0]:
            return  # the step had no labels
        num_memory_tokens = self.label_mean.shape[0]
        mean, square = (moments[1:] / moments[0, 0].clamp(min=1)).split(num_memory_tokens)
        momentum = momentum if self.label_updates else 0.0
        self.label_mean.lerp_(mean.to(self.label_mean), 1 - momentum)
        self.label_square.lerp_(square.to(self.label_square), 1 - momentum)
        self.label_updates += 1

    def label_variance(self) -> torch.Tensor:
        """`(K, D)`, running variance of the memory labels; 1 before any was seen (they are RMS-normalised)."""
        return (self.label_square - self.label_mean.square()).clamp(min=0.0)

    def forward(
        self,
        input_ids: torch.Tensor,
        objective: Objective,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        example_ids: torch.Tensor | None = None,
        memory: torch.Tensor | None = None,
        stored_starts: torch.Tensor | None = None,
        memory_labels: torch.Tensor | None = None,
        progress: float = 1.0,
        dynamics_scale: float = 1.0,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> SMTForPreTrainingOutput:
        """All losses of one phase.

        Args:
            input_ids: `(B, T + 1)`: T transitions are supervised, the last token is only a target.
            objective: phase and settings.
            attention_mask: `(B, T + 1)`; padding counts nowhere.
            labels: `(B, T + 1)`, aligned with `input_ids` (no shift), -100 is not predicted; default: all real tokens.
                `labels[:, t]` is the target of the memory after t tokens, `labels[:, 0]` that of `m_0`.
            document_ids: `(B, T + 1)`; the memory starts anew where it changes.
            example_ids: `(B,)`, unique numbers that every random choice for an example derives from.
            memory: `(B, K, D)`, state to go on from (bptt with carried memory), NaN where a row starts from `m_0`;
                default: all do.
            stored_starts: `(B, C, K, D)`, own states of an earlier student (dmt, `aggregate`), NaN where there is none.
            memory_labels: `(B, S, K, D)`, the frozen teacher's, of every `label_stride`-th position (dmt); default: the
                teacher makes them.
            progress: share of the phase's steps done, for the warm-ups.
            dynamics_scale: factor on the weights of the dynamics terms, for a warm-up that waits for the teacher.
            num_items_in_batch: labels of the whole optimiser step on all ranks; default: of this batch.
        """
        targets: torch.Tensor = input_ids if labels is None else labels
        if labels is None and attention_mask is not None:
            targets = input_ids.masked_fill(attention_mask == 0, -100)
        numbers: torch.Tensor = torch.arange(len(input_ids), device=input_ids.device)
        numbers = numbers if example_ids is None else example_ids
        length = input_ids.shape[1] - 1
        steps = length if objective.phase == "bptt" else min(objective.transition_steps, length)
        tokens = _Row(input_ids, attention_mask, targets, document_ids, steps)
        if objective.phase == "bptt":
            supervised = self._unrolled_terms(tokens, objective, memory)
        elif not objective.trains_updater:
            supervised = self._teacher_only_terms(tokens, objective, numbers)
        elif objective.num_supervised_transitions:
            supervised = self._sparse_terms(tokens, objective, numbers)
        else:
            supervised = self._supervised_terms(tokens, objective, numbers, stored_starts, progress, memory_labels)
        terms = supervised.terms
        if not self.training:
            terms |= self._drift_terms(tokens, with_teacher=objective.phase != "bptt")
        weights = {
            name: (getattr(objective, f"{name}_weight"), getattr(objective, f"{name}_warmup_ratio", 0.0))
            for name in _TERMS
        }
        counts: torch.Tensor = targets.ne(-100).sum(1)
        num_items = counts.sum()
        sums = {name: (term * counts).sum() for name, term in terms.items()}
        # A term that is still at weight 0 in its warm-up stays in the sum: the loss then has a gradient, if a zero one.
        scales = {name: dynamics_scale for name in _HELD_BACK}
        total = torch.zeros((), device=input_ids.device)
        for name in (name for name in _TERMS if name in sums):
            weight = warmed_up(weights[name][0], progress, weights[name][1]) * scales.get(name, 1.0)
            total = total + weight * sums[name]
        denominator = num_items.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return SMTForPreTrainingOutput(
            loss=total / denominator,
            term_sums={name: value.detach().clone() for name, value in sums.items()},
            num_items=num_items,
            memory=None if supervised.memory is None else supervised.memory.detach(),
            starts=None if supervised.starts is None else supervised.starts.detach(),
            memory_labels=supervised.labels,
            own_sums=(
                None
                if supervised.own is None
                else _own_sums(terms["readout" if "readout" in terms else "teacher_readout"], counts, supervised.own)
            ),
            label_moments=supervised.label_moments,
            sequential_steps=supervised.depth + self._own_steps(tokens, objective, progress),
            transitions=supervised.transitions,
        )

    @staticmethod
    def _own_steps(tokens: "_Row", objective: Objective, progress: float) -> int:
        if (
            objective.phase == "bptt"
            or objective.num_supervised_transitions
            or not objective.trains_updater
            or not objective.on_policy_fraction
            or tokens.steps >= tokens.inputs.shape[1]
            or progress < objective.on_policy_warmup_ratio
        ):
            return 0
        if objective.on_policy_mode == "parallel":
            return objective.on_policy_sweeps * tokens.steps
        return tokens.inputs.shape[1] - tokens.steps

    def _unrolled_terms(self, tokens: "_Row", objective: Objective, memory: torch.Tensor | None) -> "_Supervised":
        """BPTT over the row from `m_0` or a carried memory; truncated where its windows are shorter than the row."""
        start = self.student.model.start_memory().expand(tokens.batch, -1, -1)
        if memory is not None:
            start = torch.where(memory.isnan(), start, memory.to(start.dtype))
        if objective.carries_memory or objective.transition_steps >= tokens.length:
            memories = rollout(self.student, start[:, None], tokens.inputs, tokens.mask, tokens.documents)
        else:
            memories = truncated_rollout(
                self.student, start, objective.transition_steps, tokens.inputs, tokens.mask, tokens.documents
            )
        read = torch.cat([start[:, None], memories[:, : tokens.length]], dim=1)
        return _Supervised(
            terms={"readout": self._readout_loss(read, tokens.labels)},
            memory=memories[:, -1],
            own=torch.ones_like(tokens.lengths, dtype=torch.bool),
            depth=tokens.inputs.shape[1],
            transitions=tokens.batch * tokens.length,
        )

    def _readout_loss(self, memories: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Next-token loss of memories `(B, S, K, D)`, `(B,)`. Only what has a target is read out."""
        is_labelled = targets != -100
        if bool(is_labelled.all()):
            return next_token_loss(self.student.read_logits(memories), targets)
        losses = F.cross_entropy(
            self.student.read_logits(memories[is_labelled]), targets[is_labelled], reduction="none"
        )
        losses = losses.new_zeros(targets.shape).masked_scatter(is_labelled, losses)
        return masked_mean(losses, is_labelled)

    @property
    def _trains_teacher(self) -> bool:
        return self.teacher is not None and any(parameter.requires_grad for parameter in self.teacher.parameters())

    def _labels(self, tokens: "_Row", positions: torch.Tensor, trains_teacher: bool, with_logits: bool):
        """The teacher's memories at `positions`, `(B, S, K, D)`, and its own logits or `None`."""
        assert self.teacher is not None  # refused by freeze_for
        m_0 = self.student.model.start_memory()
        with torch.set_grad_enabled(trains_teacher and torch.is_grad_enabled()):
            labels = self.teacher(
                tokens.inputs[:, : tokens.length],
                positions,
                m_0 if trains_teacher else m_0.detach(),
                None if tokens.mask is None else tokens.mask[:, : tokens.length],
                None if tokens.documents is None else tokens.documents[:, : tokens.length],
                return_logits=with_logits,
            )
        return labels if with_logits else (labels, None)

    def _sparse_terms(self, tokens: "_Row", objective: Objective, example_ids) -> "_Supervised":
        """SMT as published: a few random transitions a row, each between two labels of its own [Eq. 2-4]."""
        counts = (tokens.lengths - 1).clamp(min=1)[:, None]  # transitions of the row
        noise = example_uniforms(example_ids, objective.num_supervised_transitions, objective.seed, _STREAM_TRANSITIONS)
        before = (noise * counts).long()
        labels, _ = self._labels(tokens, torch.cat([before, before + 1], dim=1), self._trains_teacher, False)
        starts, ends = labels.chunk(2, dim=1)
        if tokens.documents is not None:  # a document's first token is read by m_0
            earlier = tokens.documents.gather(1, (before - 1).clamp(min=0))
            is_first = (tokens.documents.gather(1, before) != earlier)[..., None, None]
            starts = torch.where(is_first, self.student.model.start_memory().to(starts.dtype), starts)
        embeds = self.student.model.embed_tokens(tokens.inputs.gather(1, before))
        reached = self.student.model.unroll(starts.flatten(0, 1), embeds.flatten(0, 1)[:, None])[:, 0]
        terms = {"dynamics": dynamics_loss(reached.view(starts.shape), ends)}
        if objective.predictive_weight:
            terms["predictive"] = self._future_loss(tokens, starts, before, objective.future_length)
        if objective.readout_weight:
            after = tokens.labels.gather(1, before + 1)
            terms["readout"] = self._readout_loss(reached.view(starts.shape), after)
        if objective.uniformity_weight:
            terms["uniformity"] = uniformity_loss(starts)
        return _Supervised(terms=terms, depth=1, transitions=before.numel())

    def _supervised_terms(
        self, tokens: "_Row", objective: Objective, example_ids, stored_starts, progress: float, memory_labels=None
    ) -> "_Supervised":
        """SMT and DMT: chunks from the teacher's or own memories, every step supervised."""
        is_smt = objective.phase == "smt"
        trains_teacher = is_smt and self._trains_teacher
        m_0 = self.student.model.start_memory()
        stride = objective.label_stride
        positions = torch.arange(0, tokens.length + 1, stride, device=example_ids.device)
        if memory_labels is None:
            labels, teacher_logits = self._labels(
                tokens, positions, trains_teacher, with_logits=trains_teacher and objective.teacher_weight > 0
            )
        else:
            known = memory_labels.to(m_0.dtype)
            labels, teacher_logits = torch.cat([m_0.detach().expand(tokens.batch, 1, -1, -1), known], dim=1), None
        first = m_0.expand(tokens.batch, 1, -1, -1)
        num_chunks = tokens.inputs.shape[1] // tokens.steps
        if stride == 1:
            starts = torch.cat([first, labels[:, : tokens.length : tokens.steps][:, 1:]], dim=1)
        else:  # own memories take the place of all but the first
            starts = first.expand(-1, num_chunks, -1, -1)
        # One chunk starts at m_0 whatever the teacher says: it is the student's own rollout already.
        is_own = tokens.lengths - 1 <= objective.transition_steps
        own = None
        is_truncated = _is_truncated_rollout(objective, progress, starts)
        if is_truncated:
            is_own = torch.ones_like(is_own)
            memories = truncated_rollout(
                self.student, first[:, 0], tokens.steps, tokens.inputs, tokens.mask, tokens.documents
            )
        else:
            own = self._own_starts(tokens, objective, example_ids, starts.detach(), stored_starts, progress)
        if own is not None:
            rows, own_starts = own
            starts = starts.index_copy(0, rows, torch.cat([first[rows], own_starts[:, 1:]], dim=1))
            if objective.on_policy_mode == "sequential":
                is_own = is_own.index_fill(0, rows, True)
        if not is_truncated:
            memories = rollout(self.student, starts, tokens.inputs, tokens.mask, tokens.documents)
        reached = memories[:, : tokens.length][:, stride - 1 :: stride]
        mask = None if tokens.transition_mask is None else tokens.transition_mask[:, stride - 1 :: stride]
        terms = {"dynamics": dynamics_loss(reached, labels[:, 1:], mask)}
        moments = errors = None
        if objective.normalized_dynamics_weight or (is_smt and objective.consistency_weight):
            errors = normalized_errors(reached, labels[:, 1:], self.label_variance())
            moments = _moments(labels[:, 1:].detach(), mask)
        if objective.normalized_dynamics_weight:
            assert errors is not None
            terms["normalized_dynamics"] = masked_mean(errors, mask)
        if objective.readout_weight:
            read = torch.cat([first, memories[:, : tokens.length]], dim=1)
            read = read if objective.readout_trains_updater else read.detach()
            terms["readout"] = self._readout_loss(read, tokens.labels)
        supervised = _Supervised(
            terms=terms,
            memory=memories[:, -1],
            starts=None if is_truncated else starts,  # there, nothing asks for them
            own=is_own if objective.readout_weight else None,
            label_moments=moments,
            labels=None if is_smt else labels[:, 1:].detach(),
            depth=tokens.steps,
            transitions=tokens.batch * tokens.length,
        )
        if not is_smt:
            return supervised
        terms |= self._teacher_terms(tokens, objective, example_ids, labels, teacher_logits)
        if objective.consistency_weight:
            assert errors is not None
            ends, is_real = self._consistency_positions(tokens, objective, example_ids, errors.detach())
            picked = memories.gather(1, (ends - 1)[..., None, None].expand(-1, -1, *memories.shape[2:]))
            terms["consistency"] = self._future_loss(tokens, picked, ends, objective.future_length, is_real)
        return supervised

    def _teacher_only_terms(self, tokens: "_Row", objective: Objective, example_ids) -> "_Supervised":
        """SMT before the updater is trained: no transitions, the teacher and the readout of its memories."""
        positions = torch.arange(0, tokens.length + 1, device=example_ids.device)
        labels, logits = self._labels(
            tokens, positions, self._trains_teacher, self._trains_teacher and objective.teacher_weight > 0
        )
        return _Supervised(
            terms=self._teacher_terms(tokens, objective, example_ids, labels, logits),
            own=torch.ones_like(tokens.lengths, dtype=torch.bool) if objective.teacher_readout_weight else None,
            depth=1,
            transitions=tokens.batch * tokens.length,
        )

    def _teacher_terms(self, tokens: "_Row", objective: Objective, example_ids, labels, logits) -> dict:
        """The terms of all the teacher's memories `(B, T + 1, K, D)`, without a student."""
        terms = {}
        if logits is not None:
            terms["teacher"] = next_token_loss(logits[:, 1:], tokens.labels[:, 1:])
        if objective.teacher_readout_weight:
            terms["teacher_readout"] = self._readout_loss(labels, tokens.labels)
        if objective.predictive_weight or objective.uniformity_weight:
            # As many tokens ahead as the row has left, anywhere if the future is longer than the row; in a padded row,
            # positions past its own last one do not count, so that nothing depends on the width of the batch.
            fits = objective.future_length < tokens.lengths - 1
            last = torch.where(fits, tokens.lengths - objective.future_length, tokens.lengths - 1).clamp(min=0)[:, None]
            noise = example_uniforms(example_ids, tokens.length + 1, objective.seed, _STREAM_POSITIONS)
            noise = noise.masked_fill(torch.arange(tokens.length + 1, device=last.device) > last, -1.0)
            count = min(objective.num_predictive_positions, int(last.max()) + 1)
            highest, chosen = noise.topk(count, dim=1)
            is_real = highest >= 0
            picked = labels.gather(1, chosen[..., None, None].expand(-1, -1, *labels.shape[2:]))
        if objective.predictive_weight:
            terms["predictive"] = self._future_loss(tokens, picked, chosen, objective.future_length, is_real)
        if objective.uniformity_weight:
            terms["uniformity"] = uniformity_loss(picked, is_real)
        return terms

    def _consistency_positions(self, tokens: "_Row", objective: Objective, example_ids, errors: torch.Tensor):
        """Chunk ends whose future is decoded: `(B, S)` tokens read there, and whether there is such an end.

        A share `hard_chunk_fraction` of the draws is the row's chunk with the largest error: an informative transition
        is one of T.
        """
        length = tokens.inputs.shape[1]
        ends = torch.arange(tokens.steps, length + 1, tokens.steps, device=example_ids.device)
        # Something is left to predict; a row shorter than a chunk has no end of one.
        is_end = (ends < tokens.lengths[:, None]) & (tokens.steps == objective.transition_steps)
        padded = F.pad(errors, (0, length - errors.shape[1]))
        hardest = padded.view(tokens.batch, len(ends), -1).amax(2).masked_fill(~is_end, -1.0).argmax(1)
        count = objective.num_consistency_chunks
        noise = example_uniforms(example_ids, 2 * count, objective.seed, _STREAM_CHUNKS)
        anywhere = (noise[:, :count] * is_end.sum(1, keepdim=True)).long()
        chosen = torch.where(noise[:, count:] < objective.hard_chunk_fraction, hardest[:, None], anywhere)
        return ends[chosen].clamp(max=tokens.length), is_end.gather(1, chosen)

    def _future_loss(self, tokens: "_Row", memories, positions, future_length: int, is_real=None):
        """Cross-entropy of the tokens after `positions` `(B, S)`, decoded from the memories there `(B, S, K, D)`.

        Tokens past the row's end, or without a label, are not predicted.
        """
        future_length = min(future_length, tokens.length + 1 - int(positions.min()))
        ahead = positions[..., None] + torch.arange(future_length, device=positions.device)
        future_ids = F.pad(tokens.input_ids, (0, future_length)).gather(1, ahead.flatten(1))
        targets = F.pad(tokens.labels, (0, future_length), value=-100).gather(1, ahead.flatten(1)).view(ahead.shape)
        if is_real is not None:
            targets = targets.masked_fill(~is_real[..., None], -100)
        is_labelled = targets.flatten(0, 1) != -100
        most = max(int(is_labelled.sum(1).max()), 1)
        wanted = None
        if 2 * most < future_length:  # labels are sparse: bring those of each future to the front, decode no others
            wanted = (~is_labelled).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
            targets = targets.flatten(0, 1).gather(1, wanted).view(*positions.shape, most)
        logits = self.student.decode_logits(memories.flatten(0, 1), future_ids.view(-1, future_length), wanted)
        return predictive_loss(logits.view(*targets.shape, -1), targets)

    def _own_starts(self, tokens: "_Row", objective: Objective, example_ids, starts, stored_starts, progress: float):
        """Rows whose chunks start from own states, and those states; `None` if there are none in this batch."""
        fraction = objective.on_policy_fraction
        if progress < objective.on_policy_warmup_ratio or not fraction or starts.shape[1] == 1:
            return None
        draws = example_uniforms(example_ids, 1, objective.seed, _STREAM_ON_POLICY)[:, 0]
        rows = own_rows = (draws < fraction).nonzero()[:, 0]
        if not len(rows):
            # Where weights are in shards, every call of the updater gathers them: all ranks have to call it as often.
            rows = torch.zeros(1, dtype=torch.long, device=draws.device)
        inputs = tokens.inputs[rows]
        mask = None if tokens.mask is None else tokens.mask[rows]
        documents = None if tokens.documents is None else tokens.documents[rows]
        if objective.on_policy_mode == "parallel":
            noise = example_uniforms(example_ids[rows], starts.shape[1], objective.seed, _STREAM_AGES)
            ages = 1 + (noise * objective.on_policy_sweeps).long()
            sweeps = objective.on_policy_sweeps
            own = parallel_starts(self.student, starts[rows], ages, inputs, mask, documents, sweeps)
            return (rows, own) if len(own_rows) else None
        own = sequential_starts(self.student, starts.shape[1], inputs, mask, documents)
        if objective.on_policy_mode == "aggregate" and stored_starts is not None:
            stored = stored_starts[rows].to(own.dtype)
            own = torch.where(stored.isnan(), own, stored)
        return (rows, own) if len(own_rows) else None

    @torch.no_grad()
    def _drift_terms(self, tokens: "_Row", with_teacher: bool):
        """What the student is worth on its own: loss (nats) and drift of its rollout from `m_0` over the whole row.

        Drift is the squared distance to the teacher's memories relative to their spread over the row, no unit.
        """
        m_0 = self.student.model.start_memory()
        start = m_0.expand(tokens.batch, 1, -1, -1)
        memories = rollout(self.student, start, tokens.inputs, tokens.mask, tokens.documents)[:, : tokens.length]
        logits = self.student.read_logits(torch.cat([start, memories], dim=1))
        hits = (logits.argmax(-1) == tokens.labels).sum(1)
        terms = {
            "rollout": next_token_loss(logits, tokens.labels),
            "accuracy": hits / tokens.labels.ne(-100).sum(1).clamp(min=1),
        }
        if with_teacher and isinstance(self.teacher, SMTTeacherEncoder):  # a windowed one pays for every position
            labels = self.teacher(
                tokens.inputs[:, : tokens.length],
                torch.arange(1, tokens.length + 1, device=memories.device),
                m_0,
                None if tokens.mask is None else tokens.mask[:, : tokens.length],
                None if tokens.documents is None else tokens.documents[:, : tokens.length],
            )
            spread = dynamics_loss(labels, labels.mean(1, keepdim=True), tokens.transition_mask)
            terms["drift"] = dynamics_loss(memories, labels, tokens.transition_mask) / spread.clamp(min=1e-6)
        return terms


def trained_parts(phase: str, trains_updater: bool, trainable: Sequence[str] | None) -> list[str]:
    """Of `PARTS`, those that a phase trains.

    Raises:
        ValueError: `trainable` names one that it cannot train.
    """
    possible = [
        part for part in PARTS if (part != "teacher" or phase == "smt") and (part != "updater" or trains_updater)
    ]
    chosen = possible if trainable is None else list(trainable)
    for part in chosen:
        if part not in possible:
            raise ValueError(f"`trainable` of the {phase} phase names {part!r}: choose from {', '.join(possible)}.")
    return chosen


def part_of(name: str) -> str:
    """The one of `PARTS` that a parameter of the composite belongs to, by its name."""
    if name.startswith("teacher."):
        return "teacher"
    if "embed_tokens" in name:
        return "embeddings"
    return "readout" if ".readout." in name or ".lm_head." in name else "updater"


@dataclass
class _Supervised:
    """What the supervision of a batch yields; `own`: `(B,)` bool, rows rolled out from `m_0` by the student itself."""

    terms: dict[str, torch.Tensor]
    depth: int
    transitions: int
    memory: torch.Tensor | None = None
    starts: torch.Tensor | None = None
    own: torch.Tensor | None = None
    label_moments: torch.Tensor | None = None
    labels: torch.Tensor | None = None


def _is_truncated_rollout(objective: Objective, progress: float, starts: torch.Tensor) -> bool:
    """Whether all chunks go on from where the one before ends, so that one pass over the row yields the starts too.

    On a GPU, T cheap steps without gradient and then k with one are faster than T with one.
    """
    return (
        objective.on_policy_mode == "sequential"
        and objective.on_policy_fraction == 1
        and progress >= objective.on_policy_warmup_ratio
        and starts.shape[1] > 1
        and starts.device.type == "cpu"
    )


def _own_sums(losses: torch.Tensor, counts: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    return torch.stack([(losses * counts * own).sum(), (counts * own).sum()]).detach()


def _moments(labels: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    flat = (labels.flatten(0, 1) if mask is None else labels[mask]).float()
    number = flat.new_full((1, labels.shape[-1]), len(flat))
    return torch.cat([number, flat.sum(0), flat.square().sum(0)])


class _Row:
    """A batch cut for the rollout: T transitions, padded at the end to a multiple of k."""

    def __init__(self, input_ids, attention_mask, labels, document_ids, steps: int):
        self.batch, self.length = input_ids.shape[0], input_ids.shape[1] - 1
        self.steps = steps
        self.input_ids, self.labels = input_ids, labels
        padding = -self.length % steps
        mask = None if attention_mask is None else attention_mask[:, :-1].bool()
        # A row's last real token is only a target, whether padding follows it or not.
        self.transition_mask = None if mask is None else mask & attention_mask[:, 1:].bool()
        if padding and mask is None:
            mask = torch.ones_like(input_ids[:, :-1], dtype=torch.bool)
        # Tokens up to the last real one, (B,).
        self.lengths = torch.full((self.batch,), self.length + 1, device=input_ids.device)
        if attention_mask is not None:
            places = torch.arange(1, self.length + 2, device=input_ids.device)
            self.lengths = (attention_mask.bool() * places).amax(1)
        self.inputs = F.pad(input_ids[:, :-1], (0, padding))
        self.mask = None if mask is None else F.pad(mask, (0, padding))
        self.documents = None
        if document_ids is not None:
            ends = document_ids[:, -2:-1].expand(-1, padding)
            self.documents = torch.cat([document_ids[:, :-1], ends], dim=1)


AutoConfig.register(SMTPreTrainingConfig.model_type, SMTPreTrainingConfig, exist_ok=True)
AutoModel.register(SMTPreTrainingConfig, SMTForPreTraining, exist_ok=True)

__all__ = ["Objective", "SMTForPreTraining", "SMTForPreTrainingOutput", "SMTPreTrainingConfig"]

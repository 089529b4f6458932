"""The composite of student and teacher that is trained: one module, one forward, all losses of a phase.

accelerate prepares exactly one module, and DDP, FSDP and ZeRO hook its `forward`: nothing calls a part past it.
Shapes: B sequences, T transitions (rows hold T + 1 tokens), C chunks, k = T / C, S positions, K memory tokens, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from smt_hf.student import SMTRecurrentConfig, SMTRecurrentForCausalLM
from smt_hf.teachers import SMTTeacherConfig, SMTTeacherEncoder

from .objectives import dynamics_loss, next_token_loss, predictive_loss, uniformity_loss, warmed_up
from .rollout import example_uniforms, parallel_starts, rollout, sequential_starts

PHASES = ("smt", "dmt", "bptt")
# Terms with a weight; evaluation adds others that have none.
_TERMS = ("readout", "dynamics", "predictive", "uniformity", "teacher")
# What the random numbers of an example are for; see `example_uniforms`.
_STREAM_POSITIONS, _STREAM_ON_POLICY, _STREAM_AGES = range(3)


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
    teacher: SMTTeacherConfig | dict | None = None

    def __post_init__(self, **kwargs):
        if not isinstance(self.student, SMTRecurrentConfig):
            self.student = SMTRecurrentConfig(**(self.student or {}))
        if isinstance(self.teacher, dict):
            shape = {
                "vocab_size": self.student.vocab_size,
                "num_memory_tokens": self.student.num_memory_tokens,
                "memory_size": self.student.hidden_size,
            }
            self.teacher = SMTTeacherConfig(**{**shape, **self.teacher})
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


@dataclass
class SMTForPreTrainingOutput(ModelOutput):
    """
    Args:
        loss: scalar, nats: the weighted terms, each example weighted by its number of labels, over `num_items`.
        term_sums: name -> detached scalar, sum over examples of (mean of the term) x (labels of the example).
        num_items: scalar, labels in this batch; `term_sums / num_items` are means.
        memory: `(B, K, D)`, detached: the student's memory after the row's last transition (bptt: to be carried on).
        starts: `(B, C, K, D)`, detached: start states of the chunks (dmt in `aggregate` mode: to be stored).
        sequential_steps: transitions that this forward computed one after the other.
    """

    loss: torch.Tensor | None = None
    term_sums: dict[str, torch.Tensor] | None = None
    num_items: torch.Tensor | None = None
    memory: torch.Tensor | None = None
    starts: torch.Tensor | None = None
    sequential_steps: int | None = None


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
    _no_split_modules = SMTRecurrentForCausalLM._no_split_modules + SMTTeacherEncoder._no_split_modules
    # Explicit, since the Trainer would otherwise guess both from the class's name and signature: the labels are
    # counted without a shift (m_0 predicts the first token), and the loss is already divided by their number.
    loss_type = None
    accepts_loss_kwargs = True

    def __init__(self, config: SMTPreTrainingConfig):
        super().__init__(config)
        assert isinstance(config.student, SMTRecurrentConfig) and not isinstance(config.teacher, dict)
        self.student = SMTRecurrentForCausalLM(config.student)
        self.teacher = None if config.teacher is None else SMTTeacherEncoder(config.teacher)
        self.post_init()

    def _init_weights(self, module):
        """Nothing: the parts initialise themselves."""

    @classmethod
    def from_student(cls, student: SMTRecurrentForCausalLM) -> "SMTForPreTraining":
        """A composite around an existing student, trained in place, without a teacher: for the `bptt` phase."""
        model = cls(SMTPreTrainingConfig(student=student.config.to_dict()))
        model.student = student
        return model

    def freeze_for(self, phase: str) -> None:
        """Freeze what `phase` does not train. To be called before the model is wrapped for a distributed run."""
        if phase not in PHASES:
            raise ValueError(f"unknown phase {phase!r}: choose one of {', '.join(PHASES)}.")
        if phase != "bptt" and self.teacher is None:
            raise ValueError(f"the {phase} phase needs a teacher and this model has none; use the bptt phase.")
        self.student.requires_grad_(True)
        if self.teacher is not None:
            self.teacher.requires_grad_(phase == "smt")

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
        progress: float = 1.0,
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
            progress: share of the phase's steps done, for the warm-ups.
            num_items_in_batch: labels of the whole optimiser step on all ranks; default: of this batch.
        """
        targets: torch.Tensor = input_ids if labels is None else labels
        if labels is None and attention_mask is not None:
            targets = input_ids.masked_fill(attention_mask == 0, -100)
        numbers: torch.Tensor = torch.arange(len(input_ids), device=input_ids.device)
        numbers = numbers if example_ids is None else example_ids
        steps = input_ids.shape[1] - 1 if objective.phase == "bptt" else objective.transition_steps
        tokens = _Row(input_ids, attention_mask, targets, document_ids, steps)
        if objective.phase == "bptt":
            terms, final_memory = self._unrolled_terms(tokens, memory)
            starts = None
        else:
            terms, final_memory, starts = self._supervised_terms(tokens, objective, numbers, stored_starts, progress)
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
        total = sum(
            warmed_up(weights[name][0], progress, weights[name][1]) * sums[name] for name in _TERMS if name in sums
        )
        denominator = num_items.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return SMTForPreTrainingOutput(
            loss=total / denominator,
            term_sums={name: value.detach().clone() for name, value in sums.items()},
            num_items=num_items,
            memory=final_memory.detach(),
            starts=None if starts is None else starts.detach(),
            sequential_steps=tokens.steps + self._own_steps(tokens, objective, progress),
        )

    @staticmethod
    def _own_steps(tokens: "_Row", objective: Objective, progress: float) -> int:
        if objective.phase == "bptt" or not objective.on_policy_fraction or progress < objective.on_policy_warmup_ratio:
            return 0
        if objective.on_policy_mode == "parallel":
            return objective.on_policy_sweeps * tokens.steps
        return tokens.inputs.shape[1]

    def _unrolled_terms(self, tokens: "_Row", memory: torch.Tensor | None):
        """BPTT: one chunk as long as the row, from `m_0` or a carried memory."""
        start = self.student.model.start_memory().expand(tokens.batch, -1, -1)
        if memory is not None:
            start = torch.where(memory.isnan(), start, memory.to(start.dtype))
        memories = rollout(self.student, start[:, None], tokens.inputs, tokens.mask, tokens.documents)
        logits = self.student.read_logits(torch.cat([start[:, None], memories[:, : tokens.length]], dim=1))
        return {"readout": next_token_loss(logits, tokens.labels)}, memories[:, -1]

    def _supervised_terms(self, tokens: "_Row", objective: Objective, example_ids, stored_starts, progress: float):
        """SMT and DMT: chunks from the teacher's or own memories, every step supervised."""
        assert self.teacher is not None  # refused by freeze_for
        trains_teacher = objective.phase == "smt"
        m_0 = self.student.model.start_memory()
        positions = torch.arange(tokens.length + 1, device=example_ids.device)
        with torch.set_grad_enabled(trains_teacher and torch.is_grad_enabled()):
            labels, teacher_logits = self.teacher(
                tokens.inputs[:, : tokens.length],
                positions,
                m_0 if trains_teacher else m_0.detach(),
                None if tokens.mask is None else tokens.mask[:, : tokens.length],
                None if tokens.documents is None else tokens.documents[:, : tokens.length],
                return_logits=True,
            )
        starts = labels[:, : tokens.length : tokens.steps]
        first = m_0.expand(tokens.batch, 1, -1, -1)
        starts = torch.cat([first, starts[:, 1:]], dim=1)
        own = self._own_starts(tokens, objective, example_ids, starts.detach(), stored_starts, progress)
        if own is not None:
            rows, own_starts = own
            starts = starts.index_copy(0, rows, torch.cat([first[rows], own_starts[:, 1:]], dim=1))
        memories = rollout(self.student, starts, tokens.inputs, tokens.mask, tokens.documents)
        terms = {
            "dynamics": dynamics_loss(memories[:, : tokens.length], labels[:, 1:], tokens.transition_mask),
        }
        if objective.readout_weight:
            read = torch.cat([first, memories[:, : tokens.length]], dim=1)
            read = read if objective.readout_trains_updater else read.detach()
            terms["readout"] = next_token_loss(self.student.read_logits(read), tokens.labels)
        if not trains_teacher:
            return terms, memories[:, -1], starts
        if objective.teacher_weight:
            terms["teacher"] = next_token_loss(teacher_logits[:, 1:], tokens.labels[:, 1:])
        if objective.predictive_weight or objective.uniformity_weight:
            # As many tokens ahead as the row has left; in a padded row, positions past its own last one do not count,
            # so that nothing depends on the width of the batch.
            last = (tokens.lengths - objective.future_length).clamp(min=0)[:, None]
            noise = example_uniforms(example_ids, tokens.length + 1, objective.seed, _STREAM_POSITIONS)
            noise = noise.masked_fill(torch.arange(tokens.length + 1, device=last.device) > last, -1.0)
            count = min(objective.num_predictive_positions, int(last.max()) + 1)
            highest, chosen = noise.topk(count, dim=1)
            is_real = highest >= 0
            picked = labels.gather(1, chosen[..., None, None].expand(-1, -1, *labels.shape[2:]))
        if objective.predictive_weight:
            ahead = chosen[..., None] + torch.arange(objective.future_length, device=chosen.device)
            future_ids = F.pad(tokens.input_ids, (0, objective.future_length)).gather(1, ahead.flatten(1))
            targets = F.pad(tokens.labels, (0, objective.future_length), value=-100).gather(1, ahead.flatten(1))
            targets = targets.view(ahead.shape).masked_fill(~is_real[..., None], -100)
            logits = self.student.decode_logits(picked.flatten(0, 1), future_ids.view(-1, objective.future_length))
            terms["predictive"] = predictive_loss(logits.view(*ahead.shape, -1), targets)
        if objective.uniformity_weight:
            terms["uniformity"] = uniformity_loss(picked, is_real)
        return terms, memories[:, -1], starts

    def _own_starts(self, tokens: "_Row", objective: Objective, example_ids, starts, stored_starts, progress: float):
        """Rows whose chunks start from own states, and those states; `None` if there are none in this batch."""
        fraction = objective.on_policy_fraction
        if progress < objective.on_policy_warmup_ratio or not fraction:
            return None
        draws = example_uniforms(example_ids, 1, objective.seed, _STREAM_ON_POLICY)[:, 0]
        rows = (draws < fraction).nonzero()[:, 0]
        if not len(rows):
            return None
        inputs = tokens.inputs[rows]
        mask = None if tokens.mask is None else tokens.mask[rows]
        documents = None if tokens.documents is None else tokens.documents[rows]
        if objective.on_policy_mode == "parallel":
            noise = example_uniforms(example_ids[rows], starts.shape[1], objective.seed, _STREAM_AGES)
            ages = 1 + (noise * objective.on_policy_sweeps).long()
            return rows, parallel_starts(self.student, starts[rows], ages, inputs, mask, documents)
        own = sequential_starts(self.student, starts.shape[1], inputs, mask, documents)
        if objective.on_policy_mode == "aggregate" and stored_starts is not None:
            stored = stored_starts[rows].to(own.dtype)
            own = torch.where(stored.isnan(), own, stored)
        return rows, own

    @torch.no_grad()
    def _drift_terms(self, tokens: "_Row", with_teacher: bool):
        """What the student is worth on its own: loss (nats) and drift of its rollout from `m_0` over the whole row.

        Drift is the squared distance to the teacher's memories relative to their spread over the row, no unit.
        """
        m_0 = self.student.model.start_memory()
        start = m_0.expand(tokens.batch, 1, -1, -1)
        memories = rollout(self.student, start, tokens.inputs, tokens.mask, tokens.documents)[:, : tokens.length]
        logits = self.student.read_logits(torch.cat([start, memories], dim=1))
        terms = {"rollout": next_token_loss(logits, tokens.labels)}
        if with_teacher and self.teacher is not None:
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

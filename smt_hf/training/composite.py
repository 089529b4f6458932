"""The composite of student and teacher that is trained: one module, one forward, all losses of a phase.

accelerate prepares exactly one module, and DDP, FSDP and ZeRO hook its `forward`: nothing calls a part past it.
Shapes: B sequences, T transitions (rows hold T + 1 tokens), C chunks, S positions, K memory tokens, D width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from smt_hf.errors import InputError
from smt_hf.evaluation.free_run import Sums, free_run_sums
from smt_hf.student import SMTRecurrentConfig, SMTRecurrentForCausalLM
from smt_hf.teachers import make_teacher, teacher_config, teacher_config_class, teacher_type
from smt_hf.teachers.protocol import SMTTeacherSizes, check_distribution

from .adapters import has_lora
from .objective import PHASES, Objective, part_of, terms_of, trained_parts
from .sparse import sparsely_supervised
from .supervision import Supervision, TransitionBatch, backpropagated, rollout_scores, supervised, teacher_alone
from .teacher_labels import CachedRows, TeacherLabels


class SMTPreTrainingConfig(PreTrainedConfig):
    """Configuration of [`SMTForPreTraining`]: those of its two parts.

    Args:
        student: an `SMTRecurrentConfig` or its fields; without `vocab_size` it has the vocabulary of a teacher's model
            that exists (`{"model_name_or_path": ...}`).
        teacher: a teacher's configuration or its fields, of the kind that `model_type` names (vocabulary and shape of a
            memory default to the student's); `None` for a composite without a teacher (BPTT alone).

    Raises:
        InputError: the teacher's memories do not have the student's shape or vocabulary.
    """

    model_type = "smt_pretraining"
    sub_configs = {"student": SMTRecurrentConfig, "teacher": AutoConfig}

    student: SMTRecurrentConfig | dict | None = None
    teacher: PreTrainedConfig | dict | None = None

    def __post_init__(self, **kwargs):
        if not isinstance(self.student, SMTRecurrentConfig):
            self.student = SMTRecurrentConfig(**self._student_fields())
        if self.teacher is not None:
            self._fit_teacher()
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self, name, getattr(self.student, name))
            kwargs.pop(name, None)
        super().__post_init__(**kwargs)

    def _student_fields(self) -> dict[str, Any]:
        """The fields of the student, over those that a teacher which speaks a language already gives it."""
        fields = dict(self.student or {})  # type: ignore[call-overload]
        if "vocab_size" in fields or not isinstance(self.teacher, dict):
            return fields
        kind: Any = teacher_config_class(teacher_type(self.teacher))
        defaults = kind.student_defaults(self.teacher) if hasattr(kind, "student_defaults") else {}
        return {**defaults, **fields}

    def _fit_teacher(self) -> None:
        """Give the teacher's fields that follow the student the student's values; refuse others."""
        assert isinstance(self.student, SMTRecurrentConfig)
        kind: Any = type(self.teacher)
        if isinstance(self.teacher, dict):
            kind = teacher_config_class(teacher_type(self.teacher))
        follows = getattr(kind, "follows_student", SMTTeacherSizes.follows_student)
        sizes = {name: getattr(self.student, students) for name, students in follows.items()}
        if isinstance(self.teacher, dict):
            self.teacher = teacher_config({**sizes, **self.teacher})
        for name, size in sizes.items():
            if getattr(self.teacher, name) != size:
                raise InputError(
                    f"the teacher's {name} is {getattr(self.teacher, name)}, the student's {follows[name]} is {size}: "
                    "make them equal."
                )
        updater_type = getattr(kind, "updater_type", None)
        if updater_type is not None and self.student.tie_word_embeddings:
            raise InputError(
                f"the teacher {kind.model_type} hands its embeddings to the student, whose head they must not change: "
                "set `tie_word_embeddings` to false."
            )
        if updater_type not in (None, self.student.updater_type):
            raise InputError(
                f"the teacher {kind.model_type} is a part of the {updater_type} updater, the student's `updater_type` "
                f"is {self.student.updater_type}: set it to {updater_type}, or choose another teacher."
            )


@dataclass
class SMTForPreTrainingOutput(ModelOutput):
    """What a forward in a phase returns; all but `loss` is detached."""

    # Scalar, nats: the weighted terms, each example weighted by its number of labels, over `num_items`.
    loss: torch.Tensor | None = None
    # Name -> scalar, sum over examples of (mean of the term) x (labels of the example).
    term_sums: dict[str, torch.Tensor] | None = None
    num_items: torch.Tensor | None = None  # scalar, labels in this batch; `term_sums / num_items` are means
    memory: torch.Tensor | None = None  # (B, K, D), the student's after the last transition (bptt: carried on)
    starts: torch.Tensor | None = None  # (B, C, K, D), start states of the chunks (dmt, `aggregate`: stored)
    memory_labels: torch.Tensor | None = None  # (B, S, K, D), the teacher's at supervised positions (dmt: cached)
    # (2,): readout loss (nats, summed over labels) of the rows that the student rolled out from `m_0` by itself, and
    # the number of their labels; where the student is not trained, of the teacher's memories. It gates a curriculum.
    own_sums: torch.Tensor | None = None
    # (1 + 2 K, D): number of memory labels seen, their sum and the sum of their squares per coordinate; `None` where
    # nothing is normalised by them.
    label_moments: torch.Tensor | None = None
    sequential_steps: int | None = None  # transitions that this forward computed one after the other
    transitions: int | None = None  # transitions supervised (memories, where the teacher is trained alone)
    free_run: Sums | None = None  # of a forward that measures the free run, which has nothing else


class SMTForPreTraining(PreTrainedModel):
    """Student and teacher together; `forward` computes every loss of a phase.

    Every term is `sum_i n_i term_i / N` with `n_i` the labels of example i, `term_i` the mean of the term inside the
    example and N the labels of the whole optimiser step on all ranks (`num_items_in_batch`): the sum does not depend on
    how the step is cut into micro-batches or ranks.
    """

    config_class = SMTPreTrainingConfig
    config: SMTPreTrainingConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    # Explicit, since the Trainer would otherwise guess both from the name and signature of the class: the labels are
    # counted without a shift (m_0 predicts the first token), and the loss is already divided by their number.
    loss_type = None
    accepts_loss_kwargs = True

    def __init__(self, config: SMTPreTrainingConfig):
        super().__init__(config)
        assert isinstance(config.student, SMTRecurrentConfig) and not isinstance(config.teacher, dict)
        self.student = SMTRecurrentForCausalLM(config.student)
        self.teacher = None if config.teacher is None else make_teacher(config.teacher)
        # Spread of the memory labels per coordinate, a running estimate that is fixed within an optimiser step, so that
        # what it divides does not depend on how the step is cut; 1 as long as none has been seen.
        shape = (config.student.num_memory_tokens, config.student.hidden_size)
        self.register_buffer("label_mean", torch.zeros(shape))
        self.register_buffer("label_square", torch.ones(shape))
        self.register_buffer("label_updates", torch.zeros((), dtype=torch.long))
        self.post_init()
        self.hand_over()
        # FSDP asks for classes that are there; the updater is one of several.
        there = {type(module).__name__ for module in self.modules()}
        parts = [part for part in (self.student, self.teacher) if part is not None]
        self._no_split_modules = [name for part in parts for name in part._no_split_modules or () if name in there]

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, every_n_layers=1, **kwargs):
        """As of the student. In a phase its argument `gradient_checkpointing` decides, whatever was called before."""
        super().activation_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, **kwargs)
        self.student.model.stretch.every_n = every_n_layers

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
            InputError: the phase is unknown, the model has no teacher for it or none that predicts tokens to distil
                from, or a part is not trained by it.
        """
        if phase not in PHASES:
            raise InputError(f"unknown phase {phase!r}: choose one of {', '.join(PHASES)}.")
        if phase != "bptt" and self.teacher is None:
            raise InputError(f"the {phase} phase needs a teacher and this model has none; use the bptt phase.")
        chosen = trained_parts(phase, trains_updater, trainable)
        adapted = has_lora(self.student)
        if adapted and trainable is not None:
            raise InputError("LoRA trains its own layers: leave `trainable` out, and choose with `lora_parts`.")
        for name, parameter in self.named_parameters():
            of_student = name.startswith("student.")
            trains = of_student and "lora_" in name if adapted else part_of(name) in chosen
            parameter.requires_grad_(trains and (of_student or not self._is_fixed(name)))
        if not trains_updater and "teacher" in chosen:  # its label of the empty prefix
            self.student.model.initial_memory.requires_grad_(not adapted)
        if objective is None:
            return
        if objective.weight("distillation"):
            assert self.teacher is not None
            check_distribution(self.teacher)
        if self.teacher is not None and self.teacher.has_next_token_head and not objective.trains_teachers_head:
            self.teacher.get_output_embeddings().requires_grad_(False)
        if not any("readout" in term.trains and objective.weight(term.name) for term in terms_of(phase)):
            for name, parameter in self.student.named_parameters():
                if part_of(f"student.{name}") == "readout":
                    parameter.requires_grad_(False)

    def _is_fixed(self, name: str) -> bool:
        """Whether the parameter is one of the teacher that no phase trains."""
        is_fixed = getattr(self.teacher, "is_fixed", None)
        return is_fixed is not None and name.startswith("teacher.") and is_fixed(name.removeprefix("teacher."))

    def hand_over(self) -> None:
        """Let a student whose updater has not been trained begin as its teacher, where the two are of one kind."""
        if self.teacher is not None and hasattr(self.teacher, "hand_over"):
            self.teacher.hand_over(self.student)

    @contextmanager
    def begun_as_teacher(self) -> Iterator[None]:
        """The student as it would begin now, and its own weights again afterwards: an evaluation changes nothing."""
        parts = (self.student.model.updater, self.student.model.embed_tokens, self.student.model.embed_proj)
        kept = [{name: tensor.clone() for name, tensor in part.state_dict().items()} for part in parts]
        self.hand_over()
        try:
            yield
        finally:
            for part, own in zip(parts, kept):
                part.load_state_dict(own)

    @property
    def trains_teacher(self) -> bool:
        """Whether a parameter of the teacher takes a gradient."""
        return self.teacher is not None and any(parameter.requires_grad for parameter in self.teacher.parameters())

    def labels_rows(self, batch: TransitionBatch) -> bool:
        """Whether there is a teacher that says what stands at all positions of the rows in one pass."""
        if self.teacher is None or not self.teacher.labels_all_positions:
            return False
        return batch.cached is not None or getattr(self.teacher, "reads_rows", True)

    def memory_labels(
        self,
        batch: TransitionBatch,
        positions: torch.Tensor,
        trains_teacher: bool,
        with_logits: bool = False,
        reads_only: bool = False,
        start: torch.Tensor | None = None,
        likeliest: dict[str, Any] | None = None,
    ) -> TeacherLabels:
        """What the teacher says at `positions` (`(S,)` or `(B, S)` numbers of tokens read): memories, and what else is
        asked for.

        Args:
            trains_teacher: whether gradients reach the teacher.
            with_logits: also its own next-token logits.
            reads_only: what the readout sees of the memories is enough, where the teacher can tell it apart.
            start: `(B, K, D)`, memories to go on from, for a teacher that can: also the memory after all tokens.
            likeliest: `top_k` and `temperature`: also its next-token distribution, if they are given.
        """
        assert self.teacher is not None  # refused by freeze_for
        m_0 = self.student.model.start_memory() if start is None else start
        words: dict[str, Any] = {"return_logits": with_logits, **(likeliest or {})}
        if reads_only and getattr(self.teacher, "can_read_only", False):
            words["reads_only"] = True
        if start is not None:
            words["returns_last"] = True
        asked = (("logits", with_logits), ("last", start is not None), ("next_tokens", likeliest))
        names = ["memories", *(name for name, is_asked in asked if is_asked)]
        with torch.set_grad_enabled(trains_teacher and torch.is_grad_enabled()):
            m_0 = m_0 if trains_teacher else m_0.detach()
            input_ids, mask, documents = batch.read(length=batch.length)
            if batch.cached is not None:
                return batch.cached.labels(self.teacher, positions, m_0, mask, bool(likeliest))
            found = self.teacher(input_ids, positions, m_0, mask, documents, **words)
        return TeacherLabels(**dict(zip(names, found if len(names) > 1 else [found])))

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
        """`(K, D)`, running variance of the memory labels; 1 before any was seen."""
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
        cached: CachedRows | None = None,
        progress: float = 1.0,
        dynamics_scale: float = 1.0,
        num_items_in_batch: torch.Tensor | int | None = None,
        measures_free_run: bool = False,
        measures_exponent: bool = True,
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
            memory: `(B, K, D)`, state to go on from (with `carries_memory`), NaN where a row starts from `m_0`;
                default: all rows do.
            stored_starts: `(B, C, K, D)`, memories of an earlier student (dmt, `aggregate`), NaN where there is none.
            memory_labels: `(B, S, K, D)`, the frozen teacher's, of every `label_stride`-th position (dmt); default: the
                teacher makes them.
            cached: what a frozen model that is the teacher says of the rows; default: the teacher reads them.
            progress: share of the steps of the phase that are done, for the warm-ups.
            dynamics_scale: factor on the weights of the dynamics terms, for a warm-up that waits for the teacher.
            num_items_in_batch: labels of the whole optimiser step on all ranks; default: of this batch.
            measures_free_run: instead of the losses, the losses by age and the exponent of `evaluation/free_run.py`.
            measures_exponent: with it, the exponent too.
        """
        targets: torch.Tensor = input_ids if labels is None else labels
        if labels is None and attention_mask is not None:
            targets = input_ids.masked_fill(attention_mask == 0, -100)
        numbers: torch.Tensor = torch.arange(len(input_ids), device=input_ids.device)
        numbers = numbers if example_ids is None else example_ids
        length = input_ids.shape[1] - 1
        steps = length if objective.phase == "bptt" else min(objective.transition_steps, length)
        batch = TransitionBatch(input_ids, attention_mask, targets, document_ids, numbers, steps, cached)
        if measures_free_run:
            memories = None
            if objective.phase != "bptt" and self.labels_rows(batch):
                positions = torch.arange(length + 1, device=input_ids.device)
                memories = self.memory_labels(batch, positions, trains_teacher=False).memories
            read = (input_ids, targets, memories, attention_mask, document_ids, measures_exponent)
            return SMTForPreTrainingOutput(free_run=free_run_sums(self.student, *read))
        if objective.phase == "bptt":
            supervision = backpropagated(self, batch, objective, memory)
        elif not objective.trains_updater:
            supervision = teacher_alone(self, batch, objective, memory)
        elif objective.num_supervised_transitions:
            supervision = sparsely_supervised(self, batch, objective)
        else:
            supervision = supervised(self, batch, objective, stored_starts, memory_labels, progress)
        terms = {term.name: term.compute(self.student, supervision, objective) for term in objective.terms(supervision)}
        # A term that is still at weight 0 in its warm-up stays in the sum: the loss then has a gradient, if a zero one.
        weights = {name: objective.weight_at(name, progress, dynamics_scale) for name in terms}
        if not self.training:
            terms |= rollout_scores(self, batch, with_teacher=objective.phase != "bptt")
        return self._added_up(terms, weights, supervision, objective.phase, num_items_in_batch)

    @staticmethod
    def _added_up(
        terms: dict[str, torch.Tensor],
        weights: dict[str, float],
        supervision: Supervision,
        phase: str,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> SMTForPreTrainingOutput:
        """The output for terms `(B,)`; those without a weight are reported and not trained."""
        counts = supervision.batch.labels.ne(-100).sum(1)
        num_items = counts.sum()
        sums = {name: (term * counts).sum() for name, term in terms.items()}
        total = torch.zeros((), device=counts.device)
        for name, weight in weights.items():
            total = total + weight * sums[name]
        own_sums = None
        if supervision.own is not None:
            own_counts = counts * supervision.own
            losses = terms["readout" if "readout" in terms else "teacher_readout"]
            own_sums = torch.stack([(losses * own_counts).sum(), own_counts.sum()]).detach()

        def detached(tensor):
            return None if tensor is None else tensor.detach()

        return SMTForPreTrainingOutput(
            loss=total / (num_items.clamp(min=1) if num_items_in_batch is None else num_items_in_batch),
            term_sums={name: value.detach().clone() for name, value in sums.items()},
            num_items=num_items,
            memory=None if supervision.memory is None else supervision.memory.detach().clone(),  # not a view of all
            starts=detached(supervision.starts),
            memory_labels=detached(supervision.reached_labels) if phase == "dmt" else None,
            own_sums=own_sums,
            label_moments=supervision.label_moments,
            sequential_steps=supervision.depth,
            transitions=supervision.transitions,
        )


AutoConfig.register(SMTPreTrainingConfig.model_type, SMTPreTrainingConfig, exist_ok=True)
AutoModel.register(SMTPreTrainingConfig, SMTForPreTraining, exist_ok=True)

__all__ = ["SMTForPreTraining", "SMTForPreTrainingOutput", "SMTPreTrainingConfig"]

"""What a teacher is, and the list of those there are.

Shapes: B sequences, T tokens, S supervised positions, K memory tokens, D width of a memory token (the student's
`hidden_size`), V vocabulary. A *position* is a number of tokens read, 0 .. T.

A teacher is a `PreTrainedModel` that carries the decorator [`register_teacher`]. The rest of the package knows it by
its configuration (`vocab_size`, `num_memory_tokens` [K], `memory_size` [D]), by two attributes and by one call:

- `has_next_token_head`: whether it learns to predict tokens itself. The head is then `get_output_embeddings()`.
- `has_distribution` (false where it is missing): whether `forward` takes `top_k` and `temperature`, and then also
  returns its own next-token distribution, from which students are distilled.
- `labels_all_positions`: whether one pass makes the memories of all positions. Where it is false, every position costs
  tokens of its own, so that callers ask for few positions at a time.
- `can_read_only` (false where it is missing): whether `forward` takes `reads_only=True`. It then returns, for less
  work, only those last tokens of every memory that the readout sees.
- `can_go_on` (false where it is missing): whether `initial_memory` may be memories `(B, K, D)` to go on from, and
  whether `forward` takes `returns_last=True` and then returns the memory after all tokens, too.
- `is_fixed(name)` (false where it is missing): whether no phase trains the teacher's parameter of this name.
- `reads_rows` (true where it is missing): whether it can read rows. One that was trained from a cache without its model
  cannot.
- `has_embedding_gradients` (true where it is missing): whether gradients can reach the embeddings of the tokens.
- `hand_over(student)`: called before the first phase that trains the updater; where the student can begin as this
  teacher, it does.
- `teacher(input_ids, positions, initial_memory, attention_mask=None, document_ids=None, return_logits=False)` returns
  memories `(B, S, K, D)`, normalised as the student's are, and with `return_logits` also next-token logits
  `(B, S, V)`. [`SMTTeacher.forward`] describes the arguments, and those for what only some teachers can do.

A subclass of [`SMTTeacher`] sets the two attributes and `_no_split_modules` (the names of its block classes, for FSDP),
implements `encode`, and returns its embeddings of tokens from `get_input_embeddings()`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from smt_hf.errors import InputError
from smt_hf.student.configuration_smt_recurrent import check_layer_sizes, derive_sizes, share_weights

from .distribution import NextTokens

# The teacher that is meant where no `model_type` is given.
DEFAULT_TEACHER = "smt_teacher"
# `model_type` -> class of the teacher.
TEACHERS: dict[str, type[PreTrainedModel]] = {}

TeacherClass = TypeVar("TeacherClass", bound=type[PreTrainedModel])


def register_teacher(teacher: TeacherClass) -> TeacherClass:
    """Class decorator: `teacher_config`, `make_teacher`, `AutoConfig` and `AutoModel` know the teacher from then on."""
    config_class = teacher.config_class
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, teacher, exist_ok=True)
    TEACHERS[config_class.model_type] = teacher
    return teacher


def teacher_config_class(model_type: str) -> type[PreTrainedConfig]:
    """The configuration class of a teacher.

    Raises:
        InputError: no teacher has this `model_type`.
    """
    if model_type not in TEACHERS:
        raise InputError(f"unknown teacher `model_type` {model_type!r}: choose one of {', '.join(TEACHERS)}.")
    return TEACHERS[model_type].config_class


def teacher_type(fields: Mapping[str, Any]) -> str:
    """The `model_type` of the teacher that fields of a configuration are of: the one that they name, else that of a
    teacher which is known by one of its fields (`named_by`, as `model_name_or_path`), else `DEFAULT_TEACHER`."""
    for name, teacher in TEACHERS.items():
        if fields.get(getattr(teacher.config_class, "named_by", "")) is not None:
            return fields.get("model_type", name)
    return fields.get("model_type", DEFAULT_TEACHER)


def teacher_config(fields: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration of the teacher that `fields["model_type"]` names (default: `teacher_type`).

    Raises:
        InputError: no teacher has this `model_type`, or a field is out of range.
    """
    settings = {**fields, "model_type": teacher_type(fields)}
    teacher_config_class(settings["model_type"])  # transformers would go through all of its own models
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def make_teacher(config: PreTrainedConfig) -> PreTrainedModel:
    """A new teacher of this configuration.

    `AutoModel.from_config` would, under DeepSpeed's ZeRO-3, split this one half of the composite before the engine
    splits the whole.
    """
    return TEACHERS[config.model_type](config)


def check_distribution(teacher: PreTrainedModel) -> None:
    """Raises:
    InputError: the teacher has no next-token distribution to distil a student from.
    """
    if not getattr(teacher, "has_distribution", False):
        raise InputError(
            f"the teacher ({teacher.config.model_type}) predicts no tokens for `distillation_weight`: set it to 0, or "
            "take a language model as the teacher (`teacher_model_name_or_path`, in Python with `keeps_head` true)."
        )


def without_padding(input_ids, positions, attention_mask, document_ids=None):
    """The rows with their real tokens first, and the positions as numbers of real tokens: the arguments of
    [`SMTTeacher.encode`] from those of [`SMTTeacher.forward`]."""
    keep = attention_mask.bool()
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)
    document_ids = None if document_ids is None else document_ids.gather(1, order)
    return input_ids.gather(1, order), F.pad(keep.long().cumsum(1), (1, 0)).gather(1, positions), document_ids


@strict
class SMTTeacherSizes(PreTrainedConfig):
    """Fields and checks that the teachers of this package share; their docstrings describe the fields."""

    vocab_size: int = 258
    num_memory_tokens: int = 4
    memory_size: int = 64
    hidden_size: int = 96
    intermediate_size: int | None = None
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    hidden_act: str = "gelu"
    rope_theta: float | int = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float | int | None = None

    # Names of a subclass's own fields that must be at least 1.
    own_sizes: ClassVar[tuple[str, ...]] = ()
    # Fields that are the student's: name here -> name there. They are filled in, and must be equal.
    follows_student: ClassVar[dict[str, str]] = {
        "vocab_size": "vocab_size",
        "num_memory_tokens": "num_memory_tokens",
        "memory_size": "hidden_size",
    }
    # The `updater_type` of the only students that can have this teacher; `None`: any.
    updater_type: ClassVar[str | None] = None

    def __post_init__(self, **kwargs):
        self.validate_sizes()
        derive_sizes(self)
        super().__post_init__(**kwargs)

    def validate_sizes(self):
        """Part of `validate()`: refuses sizes that no teacher can be built from."""
        try:
            check_layer_sizes(self, ("num_hidden_layers", "memory_size", *self.own_sizes))
        except ValueError as error:
            raise InputError(f"the teacher's {error}") from None


class SMTTeacher(PreTrainedModel):
    """What the teachers of this package share; a subclass names its `config_class` and computes `encode`."""

    base_model_prefix = "teacher"
    supports_gradient_checkpointing = False
    has_next_token_head: bool
    labels_all_positions: bool
    # Whether `forward` takes `reads_only`, for the part of the memories that a readout sees.
    can_read_only = False
    # Whether the loss has a gradient at the embeddings of the tokens.
    has_embedding_gradients = True
    # Arguments of the smt phase that a run takes where it is given none: name -> value.
    smt_defaults: ClassVar[dict[str, Any]] = {}

    @property
    def has_distribution(self) -> bool:
        """Whether there is a next-token distribution to distil from."""
        return self.has_next_token_head

    def hand_over(self, student: PreTrainedModel) -> None:
        """Let a student whose updater has not been trained begin as this teacher. The default does nothing."""

    def is_fixed(self, name: str) -> bool:
        """Whether no phase trains the parameter of this name. By default every one is trained by some phase."""
        return False

    def encode(
        self, input_ids: torch.Tensor, positions: torch.Tensor, document_ids: torch.Tensor | None, with_states: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What stands at the given positions of rows without padding inside.

        Args:
            input_ids, document_ids: `(B, T)`; real tokens first.
            positions: `(B, S)`, numbers of real tokens read; what is returned for 0 is not used.
            with_states: whether the second result is needed.

        Returns:
            The memories before normalisation, viewable as `(B, S, K, D)`, and the states `(B, S, E)` that the
            next-token head reads, or `None` if `with_states` is false.
        """
        raise NotImplementedError

    def predict(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        document_ids: torch.Tensor | None,
        top_k: int,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor | None, NextTokens]:
        """As `encode`, with what the teacher expects next: memories, logits `(B, S, V)` of a head that is trained or
        `None`, and the distributions `(B, S)`."""
        memories, states = self.encode(input_ids, positions, document_ids, True)
        logits = self.get_output_embeddings()(states)
        return memories, logits, NextTokens.of_logits(logits, top_k, temperature).only(positions > 0)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        initial_memory: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        return_logits: bool = False,
        reads_only: bool = False,
        top_k: int | None = None,
        temperature: float = 1.0,
    ) -> Any:
        """Memory labels of prefixes.

        Args:
            input_ids: `(B, T)`.
            positions: `(S,)` or `(B, S)`, numbers of tokens read, 0 .. T, padding counted.
            initial_memory: `(K, D)`, the label of an empty prefix (the student's `start_memory()`).
            attention_mask: `(B, T)`; padding anywhere is as if it were not there: the label after it is the one
                before it.
            document_ids: `(B, T)`, constant inside a document; labels hold nothing of earlier documents in the row.
            return_logits: also return the teacher's own next-token logits.
            reads_only: a teacher that `can_read_only` may leave out the memory tokens that the readout does not see.
            top_k, temperature: of a teacher that `has_distribution`: also return what it expects next, see
                [`NextTokens.of_logits`].

        Returns:
            `(B, S, K, D)`, each memory token RMS-normalised (a subclass may differ). With `return_logits` also
            `(B, S, V)`, whose row at a position 0 is all zeros (the teacher predicts nothing from nothing). With
            `top_k` also `NextTokens` of `(B, S)`, last.

        Raises:
            InputError: logits of a teacher without a next-token head, or a distribution of one that has none.
        """
        if return_logits and not self.has_next_token_head:
            raise InputError(
                f"a {self.config.model_type} has no next-token head to return logits of; set `teacher_weight` to 0, as "
                "the published method does."
            )
        if top_k is not None:
            check_distribution(self)
        batch = input_ids.shape[0]
        positions = positions.expand(batch, -1) if positions.dim() == 1 else positions
        if attention_mask is not None:
            input_ids, positions, document_ids = without_padding(input_ids, positions, attention_mask, document_ids)
        extra: list[Any] = []
        if top_k is not None:
            memories, logits, next_tokens = self.predict(input_ids, positions, document_ids, top_k, temperature)
            extra = [next_tokens]
        else:
            memories, states = self.encode(input_ids, positions, document_ids, return_logits)
            logits = self.get_output_embeddings()(states) if return_logits else None
        if return_logits:
            assert logits is not None
            extra.insert(0, logits.masked_fill((positions == 0)[..., None], 0.0))
        memories = self.normalised(memories, positions, initial_memory)
        return (memories, *extra) if extra else memories

    def normalised(self, memories: torch.Tensor, positions: torch.Tensor, initial_memory: torch.Tensor) -> torch.Tensor:
        """Memories `(B, S, K, D)` from what `encode` returns; that of an empty prefix (position 0) is the given one."""
        # Under autocast the layers are of half precision; a memory is not.
        memories = memories.view(*positions.shape, *initial_memory.shape).to(initial_memory.dtype)
        memories = F.rms_norm(memories, memories.shape[-1:], eps=self.config.rms_norm_eps)
        return torch.where((positions == 0)[..., None, None], initial_memory, memories)

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            fan_in = module.in_features / self.config.hidden_size
            init.normal_(module.weight, std=self.config.initializer_range * fan_in**-0.5)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=1.0)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers, with weights that are as readable as `config.json`."""
        super().save_pretrained(save_directory, *args, **kwargs)
        share_weights(save_directory)

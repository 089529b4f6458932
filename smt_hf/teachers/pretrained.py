"""A language model that exists as the teacher: its hidden states at a token, turned into a memory.

Shapes: B sequences, T tokens, S supervised positions, N windows of L tokens, K memory tokens, D width of a memory token
(the student's `hidden_size`), E width of the model. A *position* is a number of tokens read, 0 .. T.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from smt_hf.errors import InputError
from smt_hf.student.recurrence_smt_recurrent import document_starts

from .distribution import NextTokens
from .loading import (
    add_lora,
    check_dtype,
    check_trunk,
    config_of,
    describe,
    empty_model,
    further_calls,
    load_model,
    start_token_of,
    states_and_logits,
    tokenizer_of,
    trunk_of,
    unreached_lora,
    vocabulary_size,
)
from .protocol import SMTTeacher, register_teacher, without_padding

NO_START_TOKEN = -1
# Logits that the model makes at once: a quarter of a GB in float32. More rows than that are read one after the other.
_MOST_LOGITS = 2**26


@strict
class SMTPretrainedTeacherConfig(PreTrainedConfig):
    """Configuration of [`SMTPretrainedTeacher`].

    Args:
        model_name_or_path: folder or repository of any causal language model of transformers. The student then
            speaks its tokenizer unless another is named, which must have the same tokens.
        revision: of the repository.
        gguf_file: name of a GGUF file in the folder or repository to load instead (older versions of
            transformers need the package gguf).
        layers: hidden states that memories are made of, joined by commas: 0 is the embeddings, 1 the first layer, -1
            the last. `None` means the middle and the last. Ours, not searched.
        model_context_length: tokens that the model reads at once. A longer row is read in windows that overlap by half,
            so that every memory comes from at least half as many tokens. `None` means all that the model can read.
        start_token: token in front of every window. `None` means the one that the model's own tokenizer puts
            before a text, if any; -1: none.
        lora_r: rank of LoRA layers in the model, which are trained with the smt phase; 0: the model stays as it is.
        lora_alpha: the LoRA update is scaled by `lora_alpha / lora_r`; `None` means `2 * lora_r`.
        model_dtype: precision of the model's weights: auto (that of its files), float32, bfloat16 or float16.
        device_map: passed on to `from_pretrained`.
        load_in_4bit, load_in_8bit: quantise the model's weights by bitsandbytes as it is loaded.
        keeps_head: keep the language-model head as well, whose predictions `distillation_weight` needs. The recipes set
            it where a phase has that weight.
        holds_model: false: the model stays out of memory and out of checkpoints, and memories are made of states that a
            cache has (`teacher_cache_dir`). The recipes set it.
        vocab_size: the student's number of tokens; the model may know more.
        num_memory_tokens, memory_size: shape of a memory [K, D]; must be the student's.
        rms_norm_eps: as in `SMTRecurrentConfig`.
        base_config: configuration of the model, filled in from `model_name_or_path`. With it a saved teacher is
            rebuilt where the folder of the model is gone. Without a name its weights are random.

    Raises:
        InputError: there is no such model, it has no such layers, or a value is out of range.
    """

    model_type = "smt_pretrained_teacher"

    model_name_or_path: str | None = None
    revision: str | None = None
    gguf_file: str | None = None
    layers: str | list[int] | None = None
    model_context_length: int | None = None
    start_token: int | None = None
    lora_r: int = 0
    lora_alpha: int | None = None
    model_dtype: str = "auto"
    device_map: str | dict | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    keeps_head: bool = False
    holds_model: bool = True
    vocab_size: int = 258
    num_memory_tokens: int = 4
    memory_size: int = 64
    rms_norm_eps: float = 1e-6
    base_config: dict | None = None

    # A teacher with this field and without a `model_type` is of this kind.
    named_by: ClassVar[str] = "model_name_or_path"
    # Fields that no flag sets.
    derived: ClassVar[tuple[str, ...]] = ("base_config", "keeps_head", "holds_model")

    def __post_init__(self, **kwargs):
        self.validate_sizes()
        if self.base_config is None and self.model_name_or_path is not None:
            where = (self.model_name_or_path, self.revision, self.gguf_file)
            self.base_config = describe(*where)
            if self.start_token is None:
                self.start_token = start_token_of(tokenizer_of(*where))
        if self.start_token is None:
            self.start_token = NO_START_TOKEN
        self.lora_alpha = 2 * self.lora_r if self.lora_alpha is None else self.lora_alpha
        if self.base_config is not None:
            self._fit_base()
        super().__post_init__(**kwargs)

    def validate_sizes(self):
        """Part of `validate()`: refuses values that no teacher can be built from."""
        least = {"vocab_size": 1, "num_memory_tokens": 1, "memory_size": 1, "model_context_length": 2}
        least |= {"lora_r": 0, "lora_alpha": 0, "rms_norm_eps": 0, "start_token": NO_START_TOKEN}
        for name, limit in least.items():
            value = getattr(self, name)
            if value is not None and not limit <= value < float("inf"):
                raise InputError(f"the teacher's `{name}` must be at least {limit}, got {value}.")
        if self.load_in_4bit and self.load_in_8bit:
            raise InputError("the teacher's model is loaded in 4 or in 8 bits: leave one of the two out.")
        check_dtype(self.model_dtype)

    @property
    def base(self) -> PreTrainedConfig:
        """The part of the model's configuration that is about text.

        Raises:
            InputError: no model has been named.
        """
        if self.base_config is None:
            raise InputError(f"a {self.model_type} needs a model: give `teacher_model_name_or_path`.")
        return config_of(self.base_config).get_text_config(decoder=True)

    def _fit_base(self) -> None:
        """Bring what depends on the model into its final form, and refuse what does not fit the model."""
        base = self.base
        depth, name = base.num_hidden_layers, self.model_name_or_path or base.model_type
        self.layers = _layer_numbers(self.layers, depth)
        if self.vocab_size > base.vocab_size:
            raise InputError(
                f"the student has {self.vocab_size} tokens, the teacher's model {name} knows {base.vocab_size}: give "
                "the student the tokenizer of the model (leave `tokenizer_name` and `vocab_size` out)."
            )
        assert self.start_token is not None
        if self.start_token >= base.vocab_size:
            raise InputError(
                f"`start_token` {self.start_token} is no token of the teacher's model {name}, which knows "
                f"{base.vocab_size}: leave it out."
            )
        limit = getattr(base, "max_position_embeddings", None)
        if not isinstance(limit, int) or limit < 2:  # it has none
            return
        limit -= self.start_token != NO_START_TOKEN
        if self.model_context_length is None:
            self.model_context_length = limit
        elif self.model_context_length > limit:
            raise InputError(
                f"the teacher's `model_context_length` is {self.model_context_length}, and the model {name} reads "
                f"{limit} tokens at most: lower it, or leave it out."
            )

    @classmethod
    def student_defaults(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Fields of a student that speaks the language of this teacher's model.

        Args:
            fields: of this teacher; where they are those of a saved one, the student has fields of its own: none.
        """
        if "base_config" in fields or fields.get(cls.named_by) is None:
            return {}
        where = (fields["model_name_or_path"], fields.get("revision"), fields.get("gguf_file"))
        tokenizer = tokenizer_of(*where)
        if tokenizer is None:
            return {"vocab_size": config_of(describe(*where)).get_text_config(decoder=True).vocab_size}
        special = ("bos_token_id", "eos_token_id", "pad_token_id")
        return {"vocab_size": vocabulary_size(tokenizer), **{name: getattr(tokenizer, name) for name in special}}


def _layer_numbers(layers: str | list[int] | None, depth: int) -> list[int]:
    """Numbers of hidden states, 0 .. depth, from what a user may write.

    Raises:
        InputError: it is no such number, or one is named twice.
    """
    if layers is None:
        return sorted({(depth + 1) // 2, depth})
    try:
        numbers = [int(word) for word in (layers.split(",") if isinstance(layers, str) else layers)]
    except ValueError:
        raise InputError(f"the teacher's `layers` must be numbers joined by commas, got {layers!r}.") from None
    found = [number if number >= 0 else depth + 1 + number for number in numbers]
    if not found or len(set(found)) < len(found) or min(found) < 0 or max(found) > depth:
        raise InputError(
            f"the teacher's `layers` must be different numbers from 0 (the embeddings) to {depth} (the last layer), or "
            f"-1 for the last, got {layers!r}."
        )
    return found


@register_teacher
class SMTPretrainedTeacher(SMTTeacher):
    """`m_t = W [h^i_t; h^j_t; ..]` of the RMS-normalised hidden states that a causal language model has after t tokens.

    The model stays as it is, in evaluation mode and without gradient, unless `lora_r` puts LoRA layers into it; its
    dropout is off then too, since it would be noise in the labels. The map `W` and the scales of the norms are trained
    in the smt phase like any teacher. The model is saved with them.

    Documents of a packed row, and windows of a row that is longer than the model reads, are rows of their own for the
    model: it sees each of them from its first position on, and nothing else.
    """

    config_class = SMTPretrainedTeacherConfig
    config: SMTPretrainedTeacherConfig
    has_next_token_head = False
    labels_all_positions = True
    has_embedding_gradients = False

    def __init__(self, config: SMTPretrainedTeacherConfig):
        super().__init__(config)
        base = config.base  # or says that there is none
        assert isinstance(config.layers, list)
        width = base.hidden_size
        self.norms = nn.ModuleList([nn.RMSNorm(width, eps=config.rms_norm_eps) for _ in config.layers])
        memory_width = config.num_memory_tokens * config.memory_size
        self.memory_proj = nn.Linear(len(config.layers) * width, memory_width, bias=False)
        self.post_init()
        self.model: Any = None
        self._unreached: set[str] | None = None
        if config.holds_model:
            self._take_model()  # after `post_init`, which would give new weights to what it finds

    def attach_model(self) -> None:
        """Load the model into a teacher that was made without it (`holds_model` false).

        Raises:
            InputError: the model cannot be loaded.
        """
        self.config.holds_model = True
        self._take_model()
        self.model.to(self.memory_proj.weight.device)

    def _take_model(self) -> None:
        config = self.config
        is_empty = torch.empty(0).device.type == "meta"  # `from_pretrained` fills it
        self.model = self._made_model(is_empty)
        self.model.requires_grad_(False)
        tied = self.model.all_tied_weights_keys
        self.all_tied_weights_keys.update({f"model.{name}": f"model.{source}" for name, source in tied.items()})
        if config.lora_r:
            assert config.lora_alpha is not None
            add_lora(self.trunk, config.lora_r, config.lora_alpha)
        if not is_empty:
            self.model.eval()
            check_trunk(self.trunk, config.base.num_hidden_layers)
            # A saved teacher is loaded in the precision that this one has, which `model_dtype` may have changed.
            config.base_config = {**(config.base_config or {}), "dtype": str(self.model.dtype).removeprefix("torch.")}
            for module in self.model.modules():  # the composite's `post_init` is still to come
                module._is_hf_initialized = True
        there = {type(module).__name__ for module in self.model.modules()}
        self._no_split_modules = [name for name in self.model._no_split_modules or () if name in there]
        self.train(self.training)

    def _made_model(self, is_empty: bool):
        config = self.config
        assert config.base_config is not None
        if is_empty or config.model_name_or_path is None:
            return empty_model(config.base_config, config.keeps_head)
        bits = 4 if config.load_in_4bit else 8 if config.load_in_8bit else None
        where = (config.model_name_or_path, config.revision, config.gguf_file)
        return load_model(*where, config.model_dtype, config.device_map, bits, config.keeps_head)

    @property
    def trunk(self):
        """The part of the model that makes the hidden states."""
        return trunk_of(self.model) if self.config.keeps_head else self.model

    @property
    def reads_rows(self) -> bool:
        """Whether the model is there."""
        return self.model is not None

    @property
    def has_distribution(self) -> bool:
        """Whether the model's language-model head is there."""
        return self.config.keeps_head

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=(3 * module.in_features) ** -0.5)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)

    def get_input_embeddings(self):
        return None if self.model is None else self.model.get_input_embeddings()

    def is_fixed(self, name: str) -> bool:
        """Whether no phase trains the parameter of this name: the model's own weights, and LoRA layers without effect
        on the hidden states that are read."""
        if not name.startswith("model."):
            return False
        if "lora_" not in name:
            return True
        if self._unreached is None:  # now, since `from_pretrained` has filled the model by now
            assert isinstance(self.config.layers, list)
            trunk = self.trunk
            (place,) = [place for place, module in self.named_modules() if module is trunk]
            self._unreached = {f"{place}.{own}" for own in unreached_lora(trunk, self.config.layers)}
        return name in self._unreached

    def train(self, mode: bool = True):
        """As in torch, but for the model, whose dropout stays off."""
        super().train(mode)
        if getattr(self, "model", None) is not None:
            self.model.eval()
        return self

    def encode(self, input_ids, positions, document_ids, with_states):
        """As in [`SMTTeacher`]: one pass of the model over all windows that a position needs."""
        return self._mapped(self._read(input_ids, positions, document_ids)[0]), None

    def predict(self, input_ids, positions, document_ids, top_k, temperature):
        """As in [`SMTTeacher`], by the model's own head and from the same pass.

        After an empty prefix there is a distribution if the model has a start token. Tokens that only the model knows
        are as if they were not there.
        """
        states, next_tokens = self._read(input_ids, positions, document_ids, (top_k, temperature))
        return self._mapped(states), None, next_tokens

    @torch.no_grad()
    def read(self, input_ids, positions, attention_mask=None, document_ids=None, likeliest=None):
        """What a cache keeps of rows, with arguments as in `forward`.

        Args:
            likeliest: `top_k` and `temperature` as a pair; `None`: no next tokens.

        Returns:
            The hidden states that memories are made of, `(B, S, E)` with those of all layers side by side, and
            `NextTokens` of `(B, S)` or `None`.
        """
        if attention_mask is not None:
            input_ids, positions, document_ids = without_padding(input_ids, positions, attention_mask, document_ids)
        return self._read(input_ids, positions, document_ids, likeliest)

    def memories_of(self, states, positions, initial_memory, attention_mask=None):
        """What `forward` returns for the states that `read` has returned."""
        if attention_mask is not None:
            positions = F.pad(attention_mask.long().cumsum(1), (1, 0)).gather(1, positions)
        return self.normalised(self._mapped(states), positions, initial_memory)

    def _mapped(self, states):
        weight = self.memory_proj.weight
        parts = states.to(weight.device, weight.dtype).chunk(len(self.norms), dim=-1)
        return self.memory_proj(torch.cat([norm(part) for norm, part in zip(self.norms, parts)], dim=-1))

    def _read(self, input_ids, positions, document_ids, likeliest: tuple[int, float] | None = None):
        """As `read`, of rows without padding, and with gradients where the model has LoRA layers that are trained."""
        if self.model is None:
            raise InputError(
                "this teacher was trained from a cache and holds no model to read rows with: load the model by "
                f"`attach_model()` of the teacher, from {self.config.model_name_or_path}."
            )
        if not input_ids.shape[1]:  # nothing has been read, and nothing is known
            input_ids, document_ids = positions.new_zeros(len(positions), 1), None
        rows, row_of, place_of = self._windows(input_ids, positions, document_ids)
        device, own = self.memory_proj.weight.device, self.model.get_input_embeddings().weight.device
        rows = rows.to(own)  # a `device_map` may have put it elsewhere
        model = self.trunk if likeliest is None else self.model
        size = max(_MOST_LOGITS // (rows.shape[1] * self.config.base.vocab_size), 1)
        parts, expected = [], []
        trains = any(parameter.requires_grad for parameter in self.model.parameters())
        assert isinstance(self.config.layers, list)
        layers: list[int] = self.config.layers
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            calls = list(rows.split(len(rows) if likeliest is None else size))
            calls += further_calls(model, len(calls)) * [rows[:1]]  # for the other processes: they are not looked at
            for some in calls:
                states, logits = states_and_logits(model, some)
                parts.append(torch.cat([states[number].to(device) for number in layers], dim=-1))
                if likeliest is not None:
                    assert logits is not None
                    found = NextTokens.of_logits(logits[..., : self.config.vocab_size], *likeliest)
                    expected.append(found.map(lambda tensor: tensor.to(device)))
        chosen = torch.cat(parts)[row_of, place_of]
        if likeliest is None:
            return chosen, None
        next_tokens = NextTokens.cat(expected)[row_of, place_of]
        return chosen, next_tokens.only(positions > 0) if self.config.start_token == NO_START_TOKEN else next_tokens

    def _windows(self, input_ids, positions, document_ids):
        """The rows that the model reads, and where in them every position is.

        Returns:
            Tokens `(N, L)`, and for every position the number of its row and the place in it of the last token read,
            both `(B, S)`; for position 0 that of the start token, if there is one. What stands in a row behind all
            places that are asked for does not count.
        """
        batch, length = input_ids.shape
        numbers = torch.arange(batch, device=input_ids.device)[:, None]
        last = (positions - 1).clamp(min=0)
        begins = torch.zeros_like(last)  # of the document, by its first token
        if document_ids is not None:
            time = torch.arange(length, device=input_ids.device)
            begins = torch.where(document_starts(document_ids), time, 0).cummax(1).values.gather(1, last)
        span = self.config.model_context_length
        if span is not None and span < length:
            # The first window of a document has its first tokens; each later one begins half a window further on.
            step = (span + 1) // 2
            begins = begins + ((last - begins - span).clamp(min=-1) // step + 1) * step
        windows, row_of = torch.unique(numbers * length + begins, return_inverse=True)
        place_of = last - begins
        longest = int(place_of.max()) + 1
        first = (windows % length)[:, None]
        index = (first + torch.arange(longest, device=input_ids.device)).clamp(max=length - 1)
        rows = input_ids[windows[:, None] // length, index]
        if self.config.start_token != NO_START_TOKEN:
            rows = F.pad(rows, (1, 0), value=self.config.start_token)
            place_of = torch.where(positions == 0, 0, place_of + 1)
        return rows, row_of, place_of


__all__ = ["SMTPretrainedTeacher", "SMTPretrainedTeacherConfig"]

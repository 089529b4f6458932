"""The layers of the student: attention over a handful of positions, the base class of updaters `f`, the readout `g`.

Shapes: N sequences or chunks side by side, S positions, K memory tokens, D width, F future tokens, M wanted positions.
Equations: arXiv:2606.06479.
"""

import re
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

if TYPE_CHECKING:  # the configuration asks the updaters for their names
    from .configuration_smt_recurrent import SMTRecurrentConfig


def rotary_angles(num_positions: int, head_dim: int, theta: float, device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary positions `0 .. num_positions - 1`, each `(num_positions, head_dim / 2)`."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.arange(num_positions, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions for `(..., positions, head_dim)`; `cos` and `sin` broadcast over what comes before."""
    first, second = states.chunk(2, dim=-1)
    cos, sin = cos.to(states.dtype), sin.to(states.dtype)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def positions_of(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The states at `places`: `(N, S, D)`, `(N, M)` -> `(N, M, D)`."""
    return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))


def projection(inputs: int, outputs: int) -> nn.Module:
    """A linear map between two widths; nothing where they are equal."""
    return nn.Identity() if inputs == outputs else nn.Linear(inputs, outputs, bias=False)


def init_projection(module: nn.Module) -> None:
    """Initial weights of what `projection` has made: the variance of its inputs is kept."""
    if isinstance(module, nn.Linear):
        init.normal_(module.weight, std=module.in_features**-0.5)


class SMTRecurrentAttention(nn.Module):
    """Multi-head attention whose queries are the last `num_queries` positions, or those at `places`."""

    def __init__(self, config: "SMTRecurrentConfig"):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.kv_proj = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, states, num_queries: int, is_causal: bool, rotary=None, places=None):
        """`(N, S, D)` -> `(N, num_queries, D)`; `places`, `(N, num_queries)`, are positions of the queries."""
        batch, length, width = states.shape
        queries = self.q_proj(states[:, length - num_queries :] if places is None else positions_of(states, places))
        queries = queries.view(batch, num_queries, self.num_heads, self.head_dim).transpose(1, 2)
        keys, values = (
            self.kv_proj(states).view(batch, length, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        )
        if rotary is not None:
            cos, sin = rotary
            asking = slice(length - num_queries, None) if places is None else places[:, None]
            queries = rotate(queries, cos[asking], sin[asking])
            keys = rotate(keys, cos, sin)
        mask = None
        if is_causal and places is not None:
            mask = (torch.arange(length, device=states.device) <= places[..., None])[:, None]
        elif is_causal and num_queries > 1:
            mask = torch.ones(num_queries, length, dtype=torch.bool, device=states.device)
            mask = mask.tril(length - num_queries)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, num_queries, width))


class SMTRecurrentMLP(nn.Module):
    def __init__(self, config: "SMTRecurrentConfig", width: int):
        super().__init__()
        self.up_proj = nn.Linear(width, self.inner_width(config), bias=False)
        self.down_proj = nn.Linear(self.inner_width(config), width, bias=False)
        self.activation = ACT2FN[config.hidden_act]

    @staticmethod
    def inner_width(config: "SMTRecurrentConfig") -> int:
        assert config.intermediate_size is not None  # filled in by the configuration
        return config.intermediate_size

    def forward(self, states):
        return self.down_proj(self.activation(self.up_proj(states)))


class SMTRecurrentBlock(nn.Module):
    """Pre-norm Transformer block over a handful of positions."""

    def __init__(self, config: "SMTRecurrentConfig"):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = SMTRecurrentAttention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SMTRecurrentMLP(config, config.hidden_size)

    @staticmethod
    def multiply_adds(config: "SMTRecurrentConfig", positions: int, queries: int) -> int:
        """Multiply-adds of the forward pass of one sequence: keys and values of `positions`, the rest of `queries`."""
        width = config.hidden_size
        attention = 2 * width**2 * (queries + positions) + 2 * queries * positions * width
        return attention + 2 * queries * width * SMTRecurrentMLP.inner_width(config)

    @staticmethod
    def saved_numbers(config: "SMTRecurrentConfig", positions: int, queries: int) -> int:
        """Numbers that one sequence keeps for the backward pass."""
        # Input, its norm, keys, values; the queries, what is mixed, the sum, its norm; both sides of the activation.
        inner = SMTRecurrentMLP.inner_width(config)
        return config.hidden_size * (positions * 4 + queries * 5) + queries * inner * 2

    def forward(self, states, num_queries: int | None = None, is_causal: bool = False, rotary=None, places=None):
        """`(N, S, D)` -> `(N, num_queries, D)`, the last positions (`None`: all), or those at `places` `(N, M)`."""
        num_queries = states.shape[1] if num_queries is None else num_queries
        num_queries = num_queries if places is None else places.shape[1]
        mixed = self.attention(self.attention_norm(states), num_queries, is_causal, rotary, places)
        states = positions_of(states, places) if places is not None else states[:, states.shape[1] - num_queries :]
        states = states + mixed
        return states + self.mlp(self.mlp_norm(states))


class SMTRecurrentTransition(nn.Module, ABC):
    """What the model asks of an updater `f`, whatever its form. A new one carries the decorator [`register_updater`].

    Most updaters have the form of [`SMTRecurrentUpdater`].
    """

    # The value of the configuration's `updater_type` that stands for the subclass.
    updater_type: ClassVar[str]
    # Patterns of names that weights had in earlier releases -> the names they have now.
    renamed_weights: ClassVar[dict[str, str]] = {}
    # Names of the updater's linear layers whose weights are zero at birth.
    zero_at_birth: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: "SMTRecurrentConfig"):
        super().__init__()
        self.config = config

    @classmethod
    def num_read_tokens(cls, config: "SMTRecurrentConfig") -> int:
        """How many of the last memory tokens the readout sees. The default is all."""
        return config.num_memory_tokens

    @classmethod
    def check_config(cls, config: "SMTRecurrentConfig") -> None:
        """Raise a ValueError for sizes that this updater cannot be built from. The default accepts all sizes."""

    @classmethod
    @abstractmethod
    def multiply_adds(cls, config: "SMTRecurrentConfig") -> int:
        """Multiply-adds of the matrix products of one transition of one sequence, forward pass."""

    @classmethod
    @abstractmethod
    def saved_numbers(cls, config: "SMTRecurrentConfig") -> int:
        """Numbers that one transition of one sequence keeps for its backward pass."""

    def init_own_weights(self) -> None:
        """Initialise the parameters that the updater holds outside its layers, which are initialised before."""

    def start(self, memory: torch.Tensor) -> torch.Tensor:
        """The memory of the empty prefix from the learned `initial_memory`, `(K, D)`: each token RMS-normalised."""
        return F.rms_norm(memory, memory.shape[-1:], eps=self.config.rms_norm_eps)

    @abstractmethod
    def forward(self, memory, embeds, layer_outputs: list | None = None):
        """One transition: `(N, K, D)`, `(N, D)` -> `(N, K, D)`, of the memory's precision.

        `layer_outputs`, if given, receives the stream of the last memory token after every layer but the last,
        each `(N, D)`.
        """

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for pattern, now in self.renamed_weights.items():
            for name in [name for name in state_dict if name.startswith(prefix)]:
                state_dict[re.sub(pattern, now, name)] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)


class SMTRecurrentUpdater(SMTRecurrentTransition):
    """`f(m, x) = RMSNorm(m + W_out h(m, x))` [Eq. 1]; subclasses compute `h`.

    `W_out` is zero when training begins, so that the memory keeps all information over any number of steps: with a
    random `W_out`, gradients through eight steps learned nothing on the retrieval task.
    """

    zero_at_birth = ("out_proj",)

    def __init__(self, config: "SMTRecurrentConfig"):
        super().__init__(config)
        width = self.stream_width(config)
        self.out_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.out_proj = nn.Linear(width, width, bias=False)

    @classmethod
    def stream_width(cls, config: "SMTRecurrentConfig") -> int:
        """Width of the stream between the layers. The default is that of the whole memory as one vector."""
        return config.num_memory_tokens * config.hidden_size

    @abstractmethod
    def layers_of(self, memory, embeds):
        """Yield the stream after every layer, `(N, K, D)` or `(N, K * D)`."""

    def forward(self, memory, embeds, layer_outputs: list | None = None):
        """One transition, as of [`SMTRecurrentTransition`]."""
        stream = None
        for index, stream in enumerate(self.layers_of(memory.to(embeds.dtype), embeds)):
            if layer_outputs is not None and index < self.config.num_hidden_layers - 1:
                layer_outputs.append(stream.reshape(memory.shape[0], -1, memory.shape[-1])[:, -1])
        change = self.out_proj(self.out_norm(stream)).view(memory.shape)
        return F.rms_norm(memory + change, memory.shape[-1:], eps=self.config.rms_norm_eps)


# `updater_type` -> class.
UPDATERS: dict[str, type[SMTRecurrentTransition]] = {}


def register_updater(updater: type[SMTRecurrentTransition]) -> type[SMTRecurrentTransition]:
    """Class decorator: configurations, models and the cost model know the updater from then on."""
    UPDATERS[updater.updater_type] = updater
    return updater


class SMTRecurrentReadout(nn.Module):
    """The decoder `g`: a causal Transformer over `[memory tokens, future tokens]` [Sec. 3.1].

    The last memory position predicts the next token. The true future tokens are further inputs, and their positions
    predict the tokens after them (the predictive state loss, Eq. 2). Of the memory it sees the last
    `SMTRecurrentTransition.num_read_tokens`.
    """

    def __init__(self, config: "SMTRecurrentConfig"):
        super().__init__()
        self.config = config
        num_read_tokens = UPDATERS[config.updater_type].num_read_tokens(config)
        self.slot_embeddings = nn.Parameter(torch.empty(num_read_tokens, config.hidden_size))
        self.layers = nn.ModuleList([SMTRecurrentBlock(config) for _ in range(config.num_readout_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, memories, future_embeds=None, wanted=None):
        """`(N, K, D)`, `(N, F, D)` -> `(N, 1 + F, D)`: the states that predict the next token and the F after it.

        `wanted`, `(N, M)` in 0 .. F: only those of them, `(N, M, D)`; the last layer computes no others.
        """
        num_read_tokens = len(self.slot_embeddings)
        states = memories[:, memories.shape[1] - num_read_tokens :].to(self.slot_embeddings.dtype)
        states = states + self.slot_embeddings
        if future_embeds is not None:
            states = torch.cat([states, future_embeds], dim=1)
        length = states.shape[1]
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        rotary = rotary_angles(length, head_dim, self.config.rope_theta, states.device)
        *inner, last = self.layers
        for layer in inner:
            states = layer(states, is_causal=True, rotary=rotary)
        places = None if wanted is None else wanted + num_read_tokens - 1
        states = last(states, length - num_read_tokens + 1, is_causal=True, rotary=rotary, places=places)
        return self.norm(states)

"""A memory that looks things up: the fast-weight updater, and the recurrences at its heart.

The memory holds, in this order:

- token 0, the **last token** read;
- the **traces**, R numbers: running means of the tokens so far, each with a forgetting rate that the tokens set. The
  first H of them are **pointers** instead, positions that tokens and running means move on, back, or to the start;
- the **matrix**, H heads of P x Q numbers: pairs of a key and a value, written by the delta rule, read by content;
- token K - 1, what was **read**, the only one that the readout sees.

A key is turned by an angle that grows with its head's pointer, as rotary positions turn queries and keys. A head can
then write to a place and come back to it, besides looking up by content.

`control_proj` lets what was read before change all of this. It is zero at birth. Without it there are three linear
recurrences, one after the other: the means, with coefficients computed from the tokens; the pointers, from the tokens
and the means; the matrix, from the tokens, the means and the pointers. `smt_hf.teachers.SMTFastWeightTeacher` computes
them for all positions of a row at once.

Shapes: N sequences or chunks side by side, T tokens, K memory tokens, D width, H heads, P value width, Q key width,
R traces. Sources: fast weights and the delta rule, arXiv:2102.11174; gates, arXiv:2412.06464.
"""

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .layers_smt_recurrent import SMTRecurrentTransition, register_updater

if TYPE_CHECKING:  # the configuration asks the updaters for their names
    from .configuration_smt_recurrent import SMTRecurrentConfig

# A pair that no later token overwrites, and a pointer that none moves, keep sigmoid(6) = 99.8 % per token at birth.
KEPT_AT_BIRTH = 6.0
# An empty matrix answers 0, which stays 0: with a small epsilon, rounding errors would grow to length 1. A large one
# leaves answers as small as the values are at birth.
ANSWER_EPS = 0.1
# Factor on the initial weights of the values of heads that look up from birth.
VALUES_AT_BIRTH = 3.0


class FastWeightSizes(NamedTuple):
    """How the K - 2 memory tokens between the first and the last are divided."""

    heads: int  # H
    values: int  # P
    keys: int  # Q
    traces: int  # R, the pointers among them

    @classmethod
    def of(cls, config: "SMTRecurrentConfig", width: int | None = None) -> "FastWeightSizes":
        """The sizes that follow from a configuration, and a width of memory tokens if it is not its `hidden_size`.

        Raises:
            ValueError: the memory cannot be divided so.
        """
        tokens, heads = config.num_memory_tokens, config.num_matrix_heads
        width = config.hidden_size if width is None else width
        if tokens < 3:
            raise ValueError(
                f"the fast_weight updater needs `num_memory_tokens` of at least 3, for the last token, the matrix and "
                f"what was read, got {tokens}."
            )
        traces = width if tokens > 3 else width // 2
        numbers = (tokens - 2) * width - traces
        if heads < 1 or numbers % heads or heads > traces // 2:
            raise ValueError(
                f"`num_matrix_heads` must be from 1 to {traces // 2} and divide the {numbers} numbers of the matrix "
                f"(`num_memory_tokens` {tokens}, `hidden_size` {width}), got {heads}."
            )
        own = numbers // heads
        keys = config.matrix_key_size
        if keys is None:  # at least four times as wide as the values: the number of pairs is what limits recall
            even = [size for size in range(2, own + 1, 2) if own % size == 0]
            keys = next((size for size in even if size * size >= 4 * own), even[-1] if even else 0)
        if keys < 2 or keys % 2 or own % keys:
            raise ValueError(
                f"`matrix_key_size` must be even and divide the {own} numbers of a head (`num_memory_tokens` {tokens}, "
                f"`hidden_size` {width}, `num_matrix_heads` {heads}), got {config.matrix_key_size}."
            )
        return cls(heads, own // keys, keys, traces)


def _moves(head: int) -> bool:
    """Whether the pointer of a head moves by one per token at birth. That of every other head rests."""
    return head % 2 == 0


def _whole(weight: torch.Tensor) -> contextlib.AbstractContextManager:
    """Around the first values of a weight of a grandchild, which ZeRO-3 has split by then."""
    if weight.numel():
        return contextlib.nullcontext()
    import deepspeed  # which alone makes such weights

    return deepspeed.zero.GatheredParameters([weight], modifier_rank=0)


def turned(vectors: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Pairs of coordinates turned by `angles` `(..., Q / 2)`: `(..., Q)` -> `(..., Q)`."""
    first, second = vectors.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class SMTRecurrentFastWeightCell(nn.Module):
    """The parameters of the recurrence and its arithmetic, but for the step from one position to the next.

    Every method takes any leading dimensions: one token of N chunks, or all T of B rows.
    """

    def __init__(self, config: "SMTRecurrentConfig", width: int | None = None):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.width = width = config.hidden_size if width is None else width
        self.sizes = FastWeightSizes.of(config, width)
        inner, (heads, values, keys, traces) = config.intermediate_size, self.sizes
        assert inner is not None  # filled in by the configuration
        means, features = traces - heads, 2 * width + traces - heads
        self.mean_proj = nn.Linear(2 * width, 2 * means, bias=False)
        self.pointer_proj = nn.Linear(features, 2 * heads, bias=False)
        self.matrix_proj = nn.Linear(features, heads * (keys + values + 2), bias=False)
        layers = range(config.num_hidden_layers)
        streams = [features + (width if layer else 0) for layer in layers]

        # By names that tools can pick out, as LoRA does by the last part of a name; a ModuleList's are "0" and "1".
        def projections(name: str, inputs: list[int], outputs: int) -> nn.ModuleDict:
            return nn.ModuleDict(
                {f"{name}_{layer}": nn.Linear(size, outputs, bias=False) for layer, size in enumerate(inputs)}
            )

        self.query_projs = projections("query_proj", streams, heads * keys)
        self.up_projs = projections("up_proj", [stream + heads * values for stream in streams], 2 * inner)
        self.down_projs = projections("down_proj", [inner for _ in layers], width)
        # Half-lives of the means at birth: from one token to about a hundred.
        self.mean_bias = nn.Parameter(torch.empty(means))

    @staticmethod
    def multiply_adds(config: "SMTRecurrentConfig") -> int:
        """Of the projections of one token of one sequence, forward pass."""
        width, inner = config.hidden_size, config.intermediate_size
        heads, values, keys, traces = FastWeightSizes.of(config)
        assert inner is not None
        means, features = traces - heads, 2 * width + traces - heads
        total = 2 * width * 2 * means + features * (2 * heads + heads * (keys + values + 2))
        for layer in range(config.num_hidden_layers):
            stream = features + (width if layer else 0)
            total += stream * heads * keys + (stream + heads * values) * 2 * inner + inner * width
        return total

    def init_own_weights(self) -> None:
        """After the projections have their random weights.

        Heads whose pointer rests look up from birth: they store each token under the token before it and the running
        means, and their first queries ask for what followed the same token and means earlier, as induction heads do
        (arXiv:2209.11895).
        """
        init.copy_(self.mean_bias, torch.linspace(-2.0, 5.0, len(self.mean_bias)))
        init.zeros_(self.pointer_proj.weight)
        query_weight = self.query_projs.get_parameter("query_proj_0.weight")
        with _whole(query_weight):
            self._init_lookup(query_weight)

    def _init_lookup(self, query_weight: torch.Tensor) -> None:
        heads, values, keys, _ = self.sizes
        written, asked = self.matrix_proj.weight.detach().clone(), query_weight.detach().clone()
        own_keys, own_values = written[: heads * keys], written[heads * keys : heads * (keys + values)]
        # Inputs are the token before, the token, and the means.
        before, token, means = slice(0, self.width), slice(self.width, 2 * self.width), slice(2 * self.width, None)
        for head in range(heads):
            if _moves(head):
                continue
            key, query = (weight.unflatten(0, (heads, keys))[head] for weight in (own_keys, asked))
            value = own_values.unflatten(0, (heads, values))[head]
            key[:, token] = 0.0
            query[:, before], query[:, token], query[:, means] = 0.0, key[:, before], key[:, means]
            value[:, before] = value[:, means] = 0.0
            value *= VALUES_AT_BIRTH
        init.copy_(self.matrix_proj.weight, written)
        init.copy_(query_weight, asked)

    def normed(self, states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(states, states.shape[-1:], eps=self.eps)

    def mean_inputs(self, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What each running mean keeps and what is added to it: `(..., 2 (R - H))` -> `(..., R - H)` twice."""
        gates, inputs = projected.chunk(2, dim=-1)
        kept = torch.sigmoid(gates + self.mean_bias)
        return kept, (1.0 - kept) * inputs

    def pointer_inputs(self, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What each pointer keeps and how far it moves: `(..., 2 H)` -> `(..., H)` twice."""
        gates, moves = projected.chunk(2, dim=-1)
        # At birth the pointers of every other head move by one token, so that a key is turned by its distance. The
        # others rest, and their heads look up by content alone.
        at_birth: torch.Tensor | float = 1.0
        if self.sizes.heads > 1:  # making the vector at every step costs a single head 3 %
            at_birth = moves.new_tensor([float(_moves(head)) for head in range(self.sizes.heads)])
        return torch.sigmoid(gates + KEPT_AT_BIRTH), moves + at_birth

    def features(self, tokens: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        """What pointers, matrix and queries are projected from, `(..., 2 D + R - H)`; `tokens`: the last two."""
        return torch.cat([tokens, self.normed(means).to(tokens.dtype)], dim=-1)

    def angles(self, pointers: torch.Tensor) -> torch.Tensor:
        """Angles of the keys at the pointers' places, `(..., H)` -> `(..., H, Q / 2)`."""
        # Angles per step of a pointer, from half a turn to a 64th. Not a buffer: a half-precision model would round it.
        octaves = torch.linspace(0.0, 5.0, self.sizes.keys // 2, device=pointers.device, dtype=pointers.dtype)
        return pointers[..., None] * torch.pi * torch.exp2(-octaves)

    def heads_of(self, projected: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """Keys or queries of length 1: `(..., H Q)` -> `(..., H, Q)`."""
        vectors = projected.unflatten(-1, (self.sizes.heads, self.sizes.keys)).to(angles.dtype)
        return turned(F.normalize(vectors, dim=-1), angles)

    def write_inputs(self, projected: torch.Tensor, angles: torch.Tensor):
        """Keys `(..., H, Q)`, values `(..., H, P)`, strengths and logarithms of what is kept `(..., H)`."""
        heads, values, keys, _ = self.sizes
        keys_, values_, gates = projected.split([heads * keys, heads * values, 2 * heads], dim=-1)
        strengths, kept = gates.to(angles.dtype).chunk(2, dim=-1)
        values_ = values_.unflatten(-1, (heads, values)).to(angles.dtype)
        return self.heads_of(keys_, angles), values_, torch.sigmoid(strengths), F.logsigmoid(kept + KEPT_AT_BIRTH)

    def read(self, features, angles, answer, control=None, layer_outputs: list | None = None) -> torch.Tensor:
        """What the matrix answers to queries, layer by layer, each from the answers before: `(..., D)`.

        Args:
            features, angles: as of the methods of these names.
            answer: queries `(..., H, Q)` -> what the matrices answer, `(..., H, P)`.
            control: per layer, what is added to the projections of its queries and of its inner layer, or `None`.
        """
        stream: Any = None
        projections = zip(self.query_projs.values(), self.up_projs.values(), self.down_projs.values())
        for layer, (query_proj, up_proj, down_proj) in enumerate(projections):
            seen = features if stream is None else torch.cat([features, self.normed(stream)], dim=-1)
            asked = query_proj(seen)
            if control is not None:
                asked = asked + control[2 * layer]
            answers = answer(self.heads_of(asked, angles)).flatten(-2)
            answers = F.rms_norm(answers, answers.shape[-1:], eps=ANSWER_EPS)
            inner = up_proj(torch.cat([seen, answers.to(seen.dtype)], dim=-1))
            if control is not None:
                inner = inner + control[2 * layer + 1]
            gates, inputs = inner.chunk(2, dim=-1)
            change = down_proj(F.silu(gates) * inputs).to(features.dtype)  # under autocast the stream is float32
            stream = change if stream is None else stream + change
            if layer_outputs is not None and layer < len(self.down_projs) - 1:
                layer_outputs.append(stream)
        return self.normed(stream)


class SMTRecurrentFastWeightStep(SMTRecurrentFastWeightCell):
    """The cell from one position to the next."""

    def forward(self, memory, embeds, control, layer_outputs: list | None = None):
        """`(N, K, D)`, `(N, D)` -> `(N, K, D)`.

        `control`: what is added to the projections, in the order in which they are computed.
        """
        heads, values, keys, num_traces = self.sizes
        parts = [self.width, num_traces, heads * values * keys, self.width]
        last, traces, matrix, _ = memory.flatten(1).split(parts, dim=-1)
        mean_control, pointer_control, write_control, *read_control = control
        pointers, means = traces.split([heads, num_traces - heads], dim=-1)
        token = self.normed(embeds)
        pair = torch.cat([last.to(embeds.dtype), token], dim=-1)
        kept, added = self.mean_inputs((self.mean_proj(pair) + mean_control).to(memory.dtype))
        means = kept * means + added
        features = self.features(pair, means)
        kept, moved = self.pointer_inputs((self.pointer_proj(features) + pointer_control).to(memory.dtype))
        pointers = kept * pointers + moved
        angles = self.angles(pointers)
        written_at, written, strengths, log_kept = self.write_inputs(self.matrix_proj(features) + write_control, angles)
        matrix = matrix.unflatten(-1, (heads, values, keys)) * log_kept.exp()[..., None, None]
        written_at = written_at[..., None, :]
        recalled = (matrix * written_at).sum(-1)
        matrix = matrix + (strengths[..., None] * (written - recalled))[..., None] * written_at

        def answer(queries):  # not a matrix product, which autocast would compute in half precision
            return (matrix * queries[..., None, :]).sum(-1)

        read = self.read(features, angles, answer, read_control, layer_outputs)
        new = [token.to(memory.dtype), pointers, means, matrix.flatten(1), read.to(memory.dtype)]
        return torch.cat(new, dim=-1).view(memory.shape)


@register_updater
class SMTRecurrentFastWeightUpdater(SMTRecurrentTransition):
    """The recurrence, one token at a time, with control: what was read before moves gates, keys, values and queries."""

    updater_type = "fast_weight"
    zero_at_birth = ("control_proj",)

    def __init__(self, config: "SMTRecurrentConfig"):
        super().__init__(config)
        self.cell = SMTRecurrentFastWeightStep(config)
        heads, values, keys, traces = self.cell.sizes
        assert config.intermediate_size is not None
        # In the order in which they are computed.
        self.controlled = [2 * (traces - heads), 2 * heads, heads * (keys + values + 2)]
        self.controlled += [heads * keys, 2 * config.intermediate_size] * config.num_hidden_layers
        self.control_proj = nn.Linear(config.hidden_size, sum(self.controlled), bias=False)

    @classmethod
    def num_read_tokens(cls, config: "SMTRecurrentConfig") -> int:
        return 1

    @classmethod
    def check_config(cls, config: "SMTRecurrentConfig") -> None:
        FastWeightSizes.of(config)

    @classmethod
    def multiply_adds(cls, config: "SMTRecurrentConfig") -> int:
        heads, values, keys, traces = FastWeightSizes.of(config)
        assert config.intermediate_size is not None
        per_layer = heads * keys + 2 * config.intermediate_size
        controlled = 2 * traces + heads * (keys + values + 2) + config.num_hidden_layers * per_layer
        return SMTRecurrentFastWeightCell.multiply_adds(config) + config.hidden_size * controlled

    @classmethod
    def saved_numbers(cls, config: "SMTRecurrentConfig") -> int:
        heads, values, keys, traces = FastWeightSizes.of(config)
        assert config.intermediate_size is not None
        width = config.hidden_size
        # The memory, its traces' gates, keys and values; the matrix before and after, and times each query; both
        # factors of the inner layer and their product, and its inputs.
        matrix = heads * values * keys
        per_layer = matrix + 3 * heads * keys + 2 * heads * values + 5 * config.intermediate_size + 5 * width
        return 8 * width + 8 * traces + 4 * matrix + 4 * heads * (keys + values) + config.num_hidden_layers * per_layer

    def start(self, memory: torch.Tensor) -> torch.Tensor:
        """Last token and what was read RMS-normalised, traces and matrix empty."""
        first, *between, last = memory.unbind(-2)
        return torch.stack([self.cell.normed(first), *map(torch.zeros_like, between), self.cell.normed(last)], dim=-2)

    def forward(self, memory, embeds, layer_outputs: list | None = None):
        """One transition, as of [`SMTRecurrentTransition`]."""
        read = memory[:, -1].to(embeds.dtype)
        return self.cell(memory, embeds, self.control_proj(read).split(self.controlled, dim=-1), layer_outputs)


__all__ = ["SMTRecurrentFastWeightCell", "SMTRecurrentFastWeightUpdater"]

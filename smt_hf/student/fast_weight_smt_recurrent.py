"""A memory that looks things up: the fast-weight updater, and the linear recurrence at its heart.

The memory holds, in this order:

- token 0, the **last token** read;
- the **traces**, R numbers: running means of the tokens so far, each with a forgetting rate that the tokens set. The
  first H of them are **pointers** instead, positions that tokens move on, back, or to the start;
- the **matrix**, H heads of P x Q numbers: pairs of a key and a value, written by the delta rule, read by content;
- token K - 1, what was **read**, the only one that the readout sees.

A key is turned by an angle that grows with its head's pointer, as rotary positions turn queries and keys. A head can
then write to a place and come back to it, besides looking up by content.

`control_proj` lets what was read before change all of this. It is zero at birth, and without it last token, traces and
matrix are a linear recurrence whose coefficients depend on the tokens alone. [`SMTRecurrentFastWeightCell.scan`]
computes that recurrence for all positions of a row at once; `smt_hf.teachers.SMTFastWeightTeacher` is that part.

Shapes: N sequences or chunks side by side, T tokens, K memory tokens, D width, H heads, P value width, Q key width,
R traces, C tokens of a block of the scan. Sources: fast weights and the delta rule, arXiv:2102.11174; gates,
arXiv:2412.06464; the scan in blocks, arXiv:2406.06484.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .layers_smt_recurrent import SMTRecurrentTransition, register_updater

if TYPE_CHECKING:  # the configuration asks the updaters for their names
    from .configuration_smt_recurrent import SMTRecurrentConfig

# Tokens that a block of the scan holds: its cost per token grows with them, the number of sequential steps falls.
BLOCK = 32
# A pair that no later token overwrites, and a pointer that none moves, keep sigmoid(6) = 99.8 % per token at birth.
KEPT_AT_BIRTH = 6.0


class FastWeightSizes(NamedTuple):
    """How the K - 2 memory tokens between the first and the last are divided."""

    heads: int  # H
    values: int  # P
    keys: int  # Q
    traces: int  # R, the pointers among them

    @classmethod
    def of(cls, config: "SMTRecurrentConfig") -> "FastWeightSizes":
        """The sizes that follow from a configuration.

        Raises:
            ValueError: the memory cannot be divided so.
        """
        tokens, width, heads = config.num_memory_tokens, config.hidden_size, config.num_matrix_heads
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


def turned(vectors: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Pairs of coordinates turned by `angles` `(..., Q / 2)`: `(..., Q)` -> `(..., Q)`."""
    first, second = vectors.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def gated_sums(kept: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """`s_t = kept_t s_{t-1} + added_t` from `s_0 = 0`, element by element: `(B, T, R)` twice -> `(B, T, R)`.

    By doubling: about log2(T) passes over the row.
    """
    length, reach = added.shape[1], 1
    while reach < length:
        added = added + kept * F.pad(added[:, :-reach], (0, 0, reach, 0))
        if 2 * reach < length:
            kept = kept * F.pad(kept[:, :-reach], (0, 0, reach, 0))
        reach *= 2
    return added


class ScannedMatrices:
    """The matrices `S_t = a_t S_{t-1} + b_t (v_t - a_t S_{t-1} k_t) k_t^T` of a row from `S_0 = 0`, block by block.

    Inside a block everything is matrix products and one triangular system. Only the T / C blocks follow one another,
    so that cost and memory are linear in T.

    Args:
        keys, values: `(B, H, T, Q)`, `(B, H, T, P)`: k and v.
        strengths, log_kept: `(B, H, T)`: b and the logarithm of a.
        resets: `(B, T)` bool, true where the matrix before a token is zero (another document), or `None`.
        block: C.
    """

    def __init__(self, keys, values, strengths, log_kept, resets=None, block: int = BLOCK):
        self.length, value_size, key_size = keys.shape[2], values.shape[-1], keys.shape[-1]
        self.block = min(block, self.length)
        keys, values = self._blocks(keys), self._blocks(values)
        strengths, sums = self._blocks(strengths[..., None]), self._blocks(log_kept[..., None])[..., 0].cumsum(-1)
        # What is left at token t of what was there after token i, and of what was there before the block.
        left = (sums[..., :, None] - sums[..., None, :]).tril().exp().tril()
        left_of_start = sums.exp()[..., None]
        if resets is not None:
            documents = self._blocks(resets[:, None, :, None].long())[..., 0].cumsum(-1)
            left = left * (documents[..., :, None] == documents[..., None, :])
            left_of_start = left_of_start * (documents == 0)[..., None]
        # The written u_t = b_t (v_t - sum_{i < t} left_ti (k_i . k_t) u_i - left_of_start_t S_start k_t).
        overlaps = (strengths * left * (keys @ keys.transpose(-1, -2))).tril(-1)
        wanted = torch.cat([strengths * values, strengths * left_of_start * keys], dim=-1)
        eye = torch.eye(self.block, dtype=keys.dtype, device=keys.device)
        solved = torch.linalg.solve_triangular(eye + overlaps, wanted, upper=False, unitriangular=True)
        own, of_start = solved.split([value_size, key_size], dim=-1)
        last_keys = left[..., -1, :, None] * keys
        matrix = keys.new_zeros(*keys.shape[:2], value_size, key_size)
        starts, written = [], []
        for index in range(keys.shape[2]):
            starts.append(matrix)
            written.append(own[:, :, index] - of_start[:, :, index] @ matrix.transpose(-1, -2))
            matrix = matrix * left_of_start[:, :, index, -1:] + written[-1].transpose(-1, -2) @ last_keys[:, :, index]
        self.keys, self.left, self.left_of_start = keys, left, left_of_start
        self.starts, self.written = torch.stack(starts, dim=2), torch.stack(written, dim=2)

    def _blocks(self, tensor: torch.Tensor) -> torch.Tensor:
        """`(B, H, T, X)` -> `(B, H, T / C, C, X)`, zeros at the end."""
        padding = -self.length % self.block
        return F.pad(tensor, (0, 0, 0, padding)).unflatten(2, (-1, self.block))

    def answers(self, queries: torch.Tensor) -> torch.Tensor:
        """`S_t q_t`: `(B, H, T, Q)` -> `(B, H, T, P)`. No matrix but those between blocks is computed."""
        queries = self._blocks(queries)
        answers = (self.left * (queries @ self.keys.transpose(-1, -2))) @ self.written
        answers = answers + (self.left_of_start * queries) @ self.starts.transpose(-1, -2)
        return answers.flatten(2, 3)[:, :, : self.length]

    def matrices(self) -> torch.Tensor:
        """`S_t` for all t, `(B, H, T, P, Q)`."""
        products = (self.written[..., None] * self.keys[..., None, :]).flatten(-2)
        matrices = self.left @ products + self.left_of_start * self.starts.flatten(-2)[..., None, :]
        return matrices.flatten(2, 3)[:, :, : self.length].unflatten(-1, self.starts.shape[-2:])


class SMTRecurrentFastWeightCell(nn.Module):
    """The parameters of the recurrence and its arithmetic, but for the step from one position to the next.

    Every method takes any leading dimensions: one token of N chunks, or all T of B rows.
    """

    def __init__(self, config: "SMTRecurrentConfig"):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.sizes = FastWeightSizes.of(config)
        self.width = config.hidden_size
        width, inner, (heads, values, keys, traces) = config.hidden_size, config.intermediate_size, self.sizes
        assert inner is not None  # filled in by the configuration
        self.trace_proj = nn.Linear(2 * width, 2 * traces, bias=False)
        features = 2 * width + traces
        self.matrix_proj = nn.Linear(features, heads * (keys + values + 2), bias=False)
        layers = range(config.num_hidden_layers)
        streams = [features + (width if layer else 0) for layer in layers]
        self.query_projs = nn.ModuleList([nn.Linear(stream, heads * keys, bias=False) for stream in streams])
        self.up_projs = nn.ModuleList([nn.Linear(stream + heads * values, 2 * inner, bias=False) for stream in streams])
        self.down_projs = nn.ModuleList([nn.Linear(inner, width, bias=False) for _ in layers])
        # Half-lives of the traces at birth: from one token to about a hundred.
        self.trace_bias = nn.Parameter(torch.empty(traces))
        # Angles per step of a pointer, from half a turn to a 64th.
        self.register_buffer("frequencies", torch.pi * 0.5 ** torch.linspace(0.0, 5.0, keys // 2))

    @staticmethod
    def multiply_adds(config: "SMTRecurrentConfig") -> int:
        """Of the projections of one token of one sequence, forward pass."""
        width, inner = config.hidden_size, config.intermediate_size
        heads, values, keys, traces = FastWeightSizes.of(config)
        assert inner is not None
        features = 2 * width + traces
        total = 2 * width * 2 * traces + features * heads * (keys + values + 2)
        for layer in range(config.num_hidden_layers):
            stream = features + (width if layer else 0)
            total += stream * heads * keys + (stream + heads * values) * 2 * inner + inner * width
        return total

    def init_own_weights(self) -> None:
        heads, traces = self.sizes.heads, self.sizes.traces
        with torch.no_grad():
            bias = torch.linspace(-2.0, 5.0, traces)
            bias[:heads] = KEPT_AT_BIRTH
            init.copy_(self.trace_bias, bias)
            init.copy_(self.frequencies, torch.pi * 0.5 ** torch.linspace(0.0, 5.0, self.sizes.keys // 2))

    def normed(self, states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(states, states.shape[-1:], eps=self.eps)

    def trace_inputs(self, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What each trace keeps and what is added to it: `(..., 2 R)` -> `(..., R)` twice."""
        gates, inputs = projected.chunk(2, dim=-1)
        kept = torch.sigmoid(gates + self.trace_bias)
        pointed, meant = inputs.split([self.sizes.heads, self.sizes.traces - self.sizes.heads], dim=-1)
        # A pointer moves by one token at birth, so that a key is turned by its distance.
        return kept, torch.cat([pointed + 1.0, (1.0 - kept[..., self.sizes.heads :]) * meant], dim=-1)

    def features(self, tokens: torch.Tensor, traces: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What everything is projected from, `(..., 2 D + R)`, and the angles of the keys, `(..., H, Q / 2)`."""
        pointers, means = traces.split([self.sizes.heads, self.sizes.traces - self.sizes.heads], dim=-1)
        angles = pointers[..., None] * self.frequencies
        # The pointers' own columns are zero: they grow without bound.
        means = F.pad(self.normed(means), (self.sizes.heads, 0))
        return torch.cat([tokens, means.to(tokens.dtype)], dim=-1), angles

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
            features, angles: as of `features`.
            answer: queries `(..., H, Q)` -> what the matrices answer, `(..., H, P)`.
            control: per layer, what is added to the projections of its queries and of its inner layer, or `None`.
        """
        stream: Any = None
        for layer, (query_proj, up_proj, down_proj) in enumerate(zip(self.query_projs, self.up_projs, self.down_projs)):
            seen = features if stream is None else torch.cat([features, self.normed(stream)], dim=-1)
            asked = query_proj(seen)
            if control is not None:
                asked = asked + control[2 * layer]
            answers = answer(self.heads_of(asked, angles)).flatten(-2)
            # An empty matrix answers 0, which stays 0: with a small epsilon, rounding errors would grow to length 1.
            answers = F.rms_norm(answers, answers.shape[-1:], eps=1.0)
            inner = up_proj(torch.cat([seen, answers.to(seen.dtype)], dim=-1))
            if control is not None:
                inner = inner + control[2 * layer + 1]
            gates, inputs = inner.chunk(2, dim=-1)
            change = down_proj(F.silu(gates) * inputs).to(features.dtype)  # under autocast the stream is float32
            stream = change if stream is None else stream + change
            if layer_outputs is not None and layer < len(self.down_projs) - 1:
                layer_outputs.append(stream)
        return self.normed(stream)

    def scan(self, tokens, first, resets=None, reads_only: bool = False) -> list[torch.Tensor]:
        """All memories of rows, without control.

        Args:
            tokens: `(B, T, D)`, embedded.
            first: `(D,)`, the last token of an empty prefix.
            resets: `(B, T)` bool, true at the first token of another document; `None`: one document per row.
            reads_only: return the last of the four alone, and compute no other matrices than those between blocks.

        Returns:
            Last tokens `(B, T, D)`, traces `(B, T, R)`, matrices `(B, T, H, P, Q)`, what was read `(B, T, D)`.
        """
        tokens = self.normed(tokens)
        before = torch.cat([first.to(tokens.dtype).expand(len(tokens), 1, -1), tokens[:, :-1]], dim=1)
        if resets is not None:
            before = torch.where(resets[..., None], first.to(tokens.dtype), before)
        pair = torch.cat([before, tokens], dim=-1)
        kept, added = self.trace_inputs(self.trace_proj(pair).to(first.dtype))
        traces = gated_sums(kept if resets is None else kept.masked_fill(resets[..., None], 0.0), added)
        features, angles = self.features(pair, traces)
        keys, values, strengths, log_kept = self.write_inputs(self.matrix_proj(features), angles)

        def in_full_precision():  # the matrices are of the memory's precision, whatever autocast says
            return torch.autocast(tokens.device.type, enabled=False)

        with in_full_precision():
            scanned = ScannedMatrices(
                keys.transpose(1, 2),
                values.transpose(1, 2),
                strengths.transpose(1, 2),
                log_kept.transpose(1, 2),
                resets,
            )

        def answer(queries):
            with in_full_precision():
                return scanned.answers(queries.transpose(1, 2)).transpose(1, 2)

        read = self.read(features, angles, answer)
        if reads_only:
            return [read]
        with in_full_precision():
            return [tokens, traces, scanned.matrices().transpose(1, 2), read]


@register_updater
class SMTRecurrentFastWeightUpdater(SMTRecurrentTransition):
    """The recurrence, one token at a time, with control: what was read before moves gates, keys, values and queries."""

    updater_type = "fast_weight"
    zero_at_birth = ("control_proj",)

    def __init__(self, config: "SMTRecurrentConfig"):
        super().__init__(config)
        self.cell = SMTRecurrentFastWeightCell(config)
        heads, values, keys, traces = self.cell.sizes
        assert config.intermediate_size is not None
        # In the order in which they are computed.
        self.controlled = [2 * traces, heads * (keys + values + 2)]
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
        cell, (heads, values, keys, num_traces) = self.cell, self.cell.sizes
        flat = memory.flatten(1)
        last, traces, matrix, read = flat.split([cell.width, num_traces, heads * values * keys, cell.width], dim=-1)
        token = cell.normed(embeds)
        trace_control, write_control, *read_control = self.control_proj(read.to(embeds.dtype)).split(
            self.controlled, dim=-1
        )
        pair = torch.cat([last.to(embeds.dtype), token], dim=-1)
        kept, added = cell.trace_inputs((cell.trace_proj(pair) + trace_control).to(memory.dtype))
        traces = kept * traces + added
        features, angles = cell.features(pair, traces)
        keys_, values_, strengths, log_kept = cell.write_inputs(cell.matrix_proj(features) + write_control, angles)
        matrix = matrix.unflatten(-1, (heads, values, keys)) * log_kept.exp()[..., None, None]
        keys_ = keys_[..., None, :]
        recalled = (matrix * keys_).sum(-1)
        matrix = matrix + (strengths[..., None] * (values_ - recalled))[..., None] * keys_

        def answer(queries):  # not a matrix product, which autocast would compute in half precision
            return (matrix * queries[..., None, :]).sum(-1)

        read = cell.read(features, angles, answer, read_control, layer_outputs)
        parts = [token.to(memory.dtype), traces, matrix.flatten(1), read.to(memory.dtype)]
        return torch.cat(parts, dim=-1).view(memory.shape)


__all__ = ["SMTRecurrentFastWeightCell", "SMTRecurrentFastWeightUpdater"]

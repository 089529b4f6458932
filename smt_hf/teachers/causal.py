"""The time-parallel teacher: memory labels of all prefixes of a sequence from one causal pass.

Shapes: B sequences, T tokens, S supervised positions, K memory tokens, D width of a memory token (the student's
`hidden_size`), E width of the teacher, H heads, W sliding window, V vocabulary. A *position* is a number of tokens
read, 0 .. T. Symbols: arXiv:2606.06479; the labels of all prefixes from one pass are this package's.
"""

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from smt_hf.errors import InputError

from .protocol import DEFAULT_TEACHER, SMTTeacher, SMTTeacherSizes, register_teacher

READOUTS = ("projection", "registers")


@strict
class SMTTeacherConfig(SMTTeacherSizes):
    """Configuration of [`SMTTeacherEncoder`].

    Args:
        vocab_size: number of tokens [V].
        hidden_size: width of the encoder [E].
        intermediate_size: width of the feed-forward layers; `None` means `4 * hidden_size`.
        num_hidden_layers: causal Transformer blocks.
        num_attention_heads: must divide `hidden_size` into even head widths (RoPE).
        sliding_window: tokens that a token sees, itself included [W]. A memory label depends on the last
            `num_hidden_layers * (sliding_window + conv_kernel - 2) + 1` tokens, at any position of any window alike.
        conv_kernel: tokens that a depthwise causal convolution in front of every attention mixes, 1: none.
        rotary_values: rotate the values by their distance to the query, as RoPE does queries and keys, so that one
            head can hold several tokens in their order.
        memory_readout: `"projection"`: a linear map of all layers' states at a position; `"registers"`: K register
            tokens per position that attend to the tokens read.
        num_memory_tokens, memory_size: shape of a memory [K, D]; must be the student's.
        hidden_act, rope_theta, rms_norm_eps, initializer_range: as in `SMTRecurrentConfig`.

    Raises:
        InputError: a size is out of range, a name unknown, or the heads do not divide the width.
    """

    model_type = DEFAULT_TEACHER

    sliding_window: int = 64
    conv_kernel: int = 4
    rotary_values: bool = True
    memory_readout: str = "projection"

    own_sizes = ("sliding_window", "conv_kernel")

    def validate_sizes(self):
        """Part of `validate()`: refuses sizes that no teacher can be built from."""
        super().validate_sizes()
        if self.memory_readout not in READOUTS:
            raise InputError(f"unknown `memory_readout` {self.memory_readout!r}: choose one of {', '.join(READOUTS)}.")


def local_causal_attention(queries, keys, values, window: int, document_ids=None) -> torch.Tensor:
    """Attention of every token to the last `window` tokens of its own document, itself included.

    Cost and memory are linear in T: the sequence is cut into blocks of `window`, each of which looks at itself and
    the one before.

    Args:
        queries, keys, values: `(B, H, T, E / H)`.
        document_ids: `(B, T)` or `None`; tokens of different documents do not see each other.

    Returns:
        `(B, H, T, E / H)`.
    """
    batch, heads, length, width = queries.shape
    if length <= window and document_ids is None:
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    block = min(window, length)
    num_blocks = -(-length // block)
    padded = num_blocks * block

    def blocks(states, with_previous):
        states = F.pad(states, (0, 0, block if with_previous else 0, padded - length))
        if with_previous:
            return states.unfold(2, 2 * block, block).transpose(-1, -2)
        return states.view(batch, heads, num_blocks, block, width)

    # Key c of block b stands at position (b - 1) * block + c.
    query_at = torch.arange(padded, device=queries.device).view(num_blocks, block, 1)
    key_at = query_at[:, :1] - block + torch.arange(2 * block, device=queries.device)
    mask = (key_at >= 0) & (key_at <= query_at) & (key_at > query_at - window)
    if document_ids is None:
        mask = mask[None, None]
    else:
        documents = F.pad(document_ids, (block, padded - length), value=-1)
        same = (
            documents[:, block:].view(batch, num_blocks, block, 1) == documents.unfold(1, 2 * block, block)[:, :, None]
        )
        # A padding query sees itself, so that no row of the softmax is empty.
        mask = (mask & same)[:, None]
    mixed = F.scaled_dot_product_attention(blocks(queries, False), blocks(keys, True), blocks(values, True), mask)
    return mixed.reshape(batch, heads, padded, width)[:, :, :length]


def rotate(heads, position_ids, theta: float, sign: int = 1) -> torch.Tensor:
    """Rotary positions (Su et al. 2021): `(B, ..., H, E / H)` at `(B, ...)`, or broadcastable, positions.

    `sign=-1` turns back.
    """
    width = heads.shape[-1]
    frequencies = theta ** -(torch.arange(0, width, 2, device=heads.device, dtype=torch.float32) / width)
    angles = (position_ids[..., None] * frequencies)[..., None, :]
    cos, sin = angles.cos().to(heads.dtype), sign * angles.sin().to(heads.dtype)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class SMTTeacherConvolution(nn.Module):
    """Every channel of a token mixed with the same channel of the `conv_kernel - 1` tokens before it, of the same
    document. Its initial weights change nothing.

    Keys and values of attention then depend on the tokens before theirs, as in pairs of a key and a value. Attention
    alone needs a further layer for that.
    """

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(kernel, width))

    def forward(self, states, document_ids=None):
        """`(B, T, E)` -> `(B, T, E)`; `document_ids`: `(B, T)`."""
        mixed = states * self.weight[0]
        for distance in range(1, min(len(self.weight), states.shape[1])):
            earlier = states[:, :-distance] * self.weight[distance]
            if document_ids is not None:
                earlier = earlier * (document_ids[:, distance:] == document_ids[:, :-distance])[..., None]
            mixed = mixed + F.pad(earlier, (0, 0, distance, 0))
        return mixed


class SMTTeacherBlock(nn.Module):
    def __init__(self, config: SMTTeacherConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.window = config.sliding_window
        self.theta = config.rope_theta
        self.rotates_values = config.rotary_values
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.conv = SMTTeacherConvolution(config.hidden_size, config.conv_kernel) if config.conv_kernel > 1 else None
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        assert config.intermediate_size is not None  # filled in by the configuration
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = ACT2FN[config.hidden_act]

    def heads_of(self, states, position_ids):
        """Normed `(B, ..., E)` at `(B, ...)`, or broadcastable, positions -> q, k and v, each `(B, ..., H, E / H)`."""
        queries, keys, values = self.qkv_proj(states).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        values = rotate(values, position_ids, self.theta) if self.rotates_values else values
        return rotate(queries, position_ids, self.theta), rotate(keys, position_ids, self.theta), values

    def after_attention(self, states, mixed, position_ids):
        """The block's output from its input and what the heads have gathered, `(B, ..., H, E / H)`."""
        mixed = rotate(mixed, position_ids, self.theta, sign=-1) if self.rotates_values else mixed
        states = states + self.o_proj(mixed.flatten(-2))
        return states + self.down_proj(self.activation(self.up_proj(self.mlp_norm(states))))

    def forward(self, tokens, registers=None, positions=None, visible=None, document_ids=None):
        """One block over the tokens and, if there are any, the registers.

        Args:
            tokens: `(B, T, E)`.
            registers: `(B, S, K, E)`, the K registers of each supervised position.
            positions: `(B, S)`, tokens read at each.
            visible: `(B, S, T)` bool, the tokens that the registers of a position see.

        Returns:
            The new tokens and registers. Tokens never look at registers, a register only at those of its position.
        """
        time = torch.arange(tokens.shape[1], device=tokens.device)
        normed = self.attention_norm(tokens)
        normed = normed if self.conv is None else self.conv(normed, document_ids)
        token_q, token_k, token_v = self.heads_of(normed, time)
        mixed = local_causal_attention(
            token_q.transpose(1, 2), token_k.transpose(1, 2), token_v.transpose(1, 2), self.window, document_ids
        )
        new_tokens = self.after_attention(tokens, mixed.transpose(1, 2), time)
        if registers is None:
            return new_tokens, None
        # A register of position p stands where the last token read stands: p - 1.
        places = (positions - 1)[..., None]
        query, key, value = self.heads_of(self.attention_norm(registers), places)
        scale = self.head_dim**-0.5
        to_tokens = torch.einsum("bskhd,bthd->bhskt", query, token_k) * scale
        to_tokens = to_tokens.masked_fill(~visible[:, None, :, None], float("-inf"))
        to_group = torch.einsum("bskhd,bsjhd->bhskj", query, key) * scale
        weights = torch.cat([to_tokens, to_group], dim=-1).softmax(-1)
        num_tokens = tokens.shape[1]
        mixed = torch.einsum("bhskt,bthd->bskhd", weights[..., :num_tokens], token_v)
        mixed = mixed + torch.einsum("bhskj,bsjhd->bskhd", weights[..., num_tokens:], value)
        return new_tokens, self.after_attention(registers, mixed, places)


@register_teacher
class SMTTeacherEncoder(SMTTeacher):
    """`m_t = E(x_{<=t})` for all t from one pass over the tokens [Sec. 3.1, made causal].

    The label of the empty prefix is not the teacher's: it is the student's learned `initial_memory`, one tensor for
    both. (With two tensors and a loss on their distance, accuracy stayed at chance.)
    """

    config_class = SMTTeacherConfig
    config: SMTTeacherConfig
    _no_split_modules = ["SMTTeacherBlock"]
    has_next_token_head = True
    labels_all_positions = True

    def __init__(self, config: SMTTeacherConfig):
        super().__init__(config)
        # Registers are K more tokens per position, which look at the last `sliding_window` tokens read.
        self.labels_all_positions = config.memory_readout == "projection"
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([SMTTeacherBlock(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.memory_readout == "projection":
            memory_width = config.num_memory_tokens * config.memory_size
            self.memory_proj = nn.Linear(config.num_hidden_layers * config.hidden_size, memory_width, bias=False)
        else:
            self.registers = nn.Parameter(torch.empty(config.num_memory_tokens, config.hidden_size))
            self.memory_proj = nn.Linear(config.hidden_size, config.memory_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, SMTTeacherConvolution):
            init.zeros_(module.weight)
            init.ones_(module.weight[0])
        elif module is self and self.config.memory_readout == "registers":
            init.normal_(module.registers, std=0.5)

    def encode(self, input_ids, positions, document_ids, with_states):
        """As in [`SMTTeacher`]: one causal pass, read at the last token of every prefix."""
        last = (positions - 1).clamp(min=0)  # the row of the last token read
        tokens, registers, visible = self.embed_tokens(input_ids), None, None
        if self.config.memory_readout == "registers":
            registers = self.registers.expand(*positions.shape, -1, -1)
            time = torch.arange(input_ids.shape[1], device=input_ids.device)
            visible = (time < positions[..., None]) & (time >= (positions - self.config.sliding_window)[..., None])
            if document_ids is not None:
                visible = visible & (document_ids[:, None] == document_ids.gather(1, last)[..., None])
        collected = []
        for layer in self.layers:
            tokens, registers = layer(tokens, registers, positions, visible, document_ids)
            if registers is None:
                collected.append(self.norm(tokens))

        def at_positions(states):
            return states.gather(1, last[..., None].expand(-1, -1, states.shape[-1]))

        if registers is None:
            memories = self.memory_proj(at_positions(torch.cat(collected, dim=-1)))
        else:
            memories = self.memory_proj(self.norm(registers))
        if not with_states:
            return memories, None
        return memories, at_positions(collected[-1] if collected else self.norm(tokens))


__all__ = ["SMTTeacherConfig", "SMTTeacherEncoder"]

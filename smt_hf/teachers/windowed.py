"""The teacher as published: a bidirectional Transformer over the window of tokens that ends at a position.

Shapes: B sequences, T tokens, S supervised positions, N = B x S windows, W tokens per window, K memory tokens, D width
of a memory token (the student's `hidden_size`), E width of the teacher, H heads. A *position* is a number of tokens
read, 0 .. T; a *place* is a token's number inside its window. Symbols: arXiv:2606.06479 [T_c is `context_length`].
"""

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init

from .causal import SMTTeacherBlock
from .protocol import SMTTeacher, SMTTeacherSizes, register_teacher


@strict
class SMTWindowedTeacherConfig(SMTTeacherSizes):
    """Configuration of [`SMTWindowedTeacher`].

    Args:
        context_length: tokens of a window [T_c, 256 in the paper]; a memory label depends on them and on nothing else.
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_memory_tokens,
        memory_size, hidden_act, rope_theta, rms_norm_eps, initializer_range: as in `SMTTeacherConfig`.

    Raises:
        InputError: a size is out of range, a name unknown, or the heads do not divide the width.
    """

    model_type = "smt_windowed_teacher"
    # `SMTTeacherBlock` reads the number of visible tokens by this name.
    attribute_map = {"sliding_window": "context_length"}
    # Parts of `SMTTeacherBlock` that the published block does not have.
    conv_kernel, rotary_values = 1, False

    context_length: int = 64

    own_sizes = ("context_length",)


class SMTWindowedTeacherBlock(SMTTeacherBlock):
    def forward(self, states, places, visible, num_queries=None):
        """One block with bidirectional attention over the tokens of a window and its registers.

        Args:
            states: `(N, W + K, E)`, tokens and then registers.
            places: `(W + K,)`, rotary positions.
            visible: `(N, 1, 1, W + K)` bool, false where a window has no token.
            num_queries: only the last so many are computed; `None`: all.

        Returns:
            `(N, num_queries, E)`.
        """
        first = 0 if num_queries is None else states.shape[1] - num_queries
        queries, keys, values = (heads.transpose(1, 2) for heads in self.heads_of(self.attention_norm(states), places))
        mixed = F.scaled_dot_product_attention(queries[:, :, first:], keys, values, visible)
        return self.after_attention(states[:, first:], mixed.transpose(1, 2), places[first:])


@register_teacher
class SMTWindowedTeacher(SMTTeacher):
    """`m_t = E(x_{t-T_c}, .., x_{t-1})`: K learned registers behind the window become the memory [Sec. 3.1].

    Every position of every row has a window of its own, `S * (context_length + K)` tokens per row: supervise few
    positions. A prefix shorter than the window is encoded as it is, and the label of the empty prefix is the student's
    learned `initial_memory`; in the paper all windows are full. Rotary positions are relative, so that a label does not
    depend on where in the text its window stands.
    """

    config_class = SMTWindowedTeacherConfig
    config: SMTWindowedTeacherConfig
    _no_split_modules = ["SMTWindowedTeacherBlock"]
    has_next_token_head = False
    labels_all_positions = False

    def __init__(self, config: SMTWindowedTeacherConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.registers = nn.Parameter(torch.empty(config.num_memory_tokens, config.hidden_size))
        self.layers = nn.ModuleList([SMTWindowedTeacherBlock(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.memory_proj = nn.Linear(config.hidden_size, config.memory_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self:
            init.normal_(module.registers, std=0.5)

    def encode(self, input_ids, positions, document_ids, with_states):
        """As in [`SMTTeacher`]: one bidirectional pass per position over the window that ends there.

        Padding takes no place in a window, and no window reaches into an earlier document of the row.
        """
        width, num_registers = min(self.config.context_length, input_ids.shape[1]), self.config.num_memory_tokens
        # The window of every position, (B, S, W); a number below 0 is before the text.
        numbers = positions[..., None] + torch.arange(-width, 0, device=input_ids.device)
        visible = numbers >= 0
        index = numbers.clamp(min=0).flatten(1)
        if document_ids is not None:
            documents = document_ids.gather(1, index).view(numbers.shape)
            visible = visible & (documents == documents[..., -1:])
        tokens = self.embed_tokens(input_ids.gather(1, index).view(numbers.shape)).flatten(0, 1)
        states = torch.cat([tokens, self.registers.expand(len(tokens), -1, -1)], dim=1)
        visible = F.pad(visible.flatten(0, 1), (0, num_registers), value=True)[:, None, None]
        # At least float32: bfloat16 does not tell the places past 256 apart.
        precision = torch.promote_types(states.dtype, torch.float32)
        places = torch.arange(width + num_registers, device=states.device, dtype=precision)
        for layer in self.layers[:-1]:
            states = layer(states, places, visible)
        states = self.layers[-1](states, places, visible, num_registers)
        return self.memory_proj(self.norm(states)), None


__all__ = ["SMTWindowedTeacher", "SMTWindowedTeacherConfig"]

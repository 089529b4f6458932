"""The updaters `f`, one class each; a new one in a file of its own is imported here.

Shapes: N sequences or chunks side by side, K memory tokens, D width. Equations: arXiv:2606.06479.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import initialization as init

from .layers_smt_recurrent import UPDATERS, SMTRecurrentBlock, SMTRecurrentMLP, SMTRecurrentUpdater, register_updater

if TYPE_CHECKING:  # the configuration asks the updaters for their names
    from .configuration_smt_recurrent import SMTRecurrentConfig


@register_updater
class SMTRecurrentTransformerUpdater(SMTRecurrentUpdater):
    """Attention over the new token and the memory tokens, told apart by learned slot embeddings."""

    updater_type = "transformer"

    def __init__(self, config: "SMTRecurrentConfig"):
        super().__init__(config)
        self.slot_embeddings = nn.Parameter(torch.empty(1 + config.num_memory_tokens, config.hidden_size))
        self.layers = nn.ModuleList([SMTRecurrentBlock(config) for _ in range(config.num_hidden_layers)])

    @classmethod
    def stream_width(cls, config: "SMTRecurrentConfig") -> int:
        return config.hidden_size

    @classmethod
    def multiply_adds(cls, config: "SMTRecurrentConfig") -> int:
        tokens, width = config.num_memory_tokens, config.hidden_size
        inner = (config.num_hidden_layers - 1) * SMTRecurrentBlock.multiply_adds(config, 1 + tokens, 1 + tokens)
        return inner + SMTRecurrentBlock.multiply_adds(config, 1 + tokens, tokens) + tokens * width**2

    @classmethod
    def saved_numbers(cls, config: "SMTRecurrentConfig") -> int:
        tokens, width = config.num_memory_tokens, config.hidden_size
        inner = (config.num_hidden_layers - 1) * SMTRecurrentBlock.saved_numbers(config, 1 + tokens, 1 + tokens)
        return inner + SMTRecurrentBlock.saved_numbers(config, 1 + tokens, tokens) + 4 * tokens * width

    def init_own_weights(self) -> None:
        init.normal_(self.slot_embeddings, std=0.5)

    def layers_of(self, memory, embeds):
        stream = torch.cat([embeds[:, None], memory], dim=1) + self.slot_embeddings
        *inner, last = self.layers  # a slice would build a ModuleList at every token
        for layer in inner:
            stream = layer(stream)
            yield stream
        yield last(stream, num_queries=memory.shape[1])


@register_updater
class SMTRecurrentMLPUpdater(SMTRecurrentUpdater):
    """Residual feed-forward layers on the whole memory as one vector."""

    updater_type = "mlp"

    def __init__(self, config: "SMTRecurrentConfig"):
        super().__init__(config)
        width = self.stream_width(config)
        self.token_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.norms = nn.ModuleList(
            [nn.RMSNorm(width, eps=config.rms_norm_eps) for _ in range(config.num_hidden_layers)]
        )
        self.layers = nn.ModuleList([SMTRecurrentMLP(config, width) for _ in range(config.num_hidden_layers)])

    @classmethod
    def multiply_adds(cls, config: "SMTRecurrentConfig") -> int:
        width = cls.stream_width(config)
        layers = config.num_hidden_layers * 2 * width * SMTRecurrentMLP.inner_width(config)
        return config.hidden_size * width + layers + width**2

    @classmethod
    def saved_numbers(cls, config: "SMTRecurrentConfig") -> int:
        width = cls.stream_width(config)
        layers = config.num_hidden_layers * (2 * width + 2 * SMTRecurrentMLP.inner_width(config))
        return layers + 4 * width + config.hidden_size

    def layers_of(self, memory, embeds):
        stream = memory.flatten(1) + self.token_proj(embeds)
        for norm, layer in zip(self.norms, self.layers):
            stream = stream + layer(norm(stream))
            yield stream


@register_updater
class SMTRecurrentGRUUpdater(SMTRecurrentUpdater):
    """GRU cells (Cho et al. 2014) on the whole memory as one vector, one after the other within a transition."""

    updater_type = "gru"
    renamed_weights = {
        r"input_projs\.(\d+)\.": r"input_projs.input_proj_\1.",
        r"state_projs\.(\d+)\.": r"state_projs.state_proj_\1.",
    }

    def __init__(self, config: "SMTRecurrentConfig"):
        super().__init__(config)
        width = self.stream_width(config)
        # By names that tools can pick out, as LoRA does by the last part of a name; a ModuleList's are "0" and "1".
        layers = range(config.num_hidden_layers)
        self.input_projs = nn.ModuleDict(
            {f"input_proj_{layer}": nn.Linear(config.hidden_size, 3 * width) for layer in layers}
        )
        self.state_projs = nn.ModuleDict({f"state_proj_{layer}": nn.Linear(width, 3 * width) for layer in layers})

    @classmethod
    def multiply_adds(cls, config: "SMTRecurrentConfig") -> int:
        width = cls.stream_width(config)
        return config.num_hidden_layers * 3 * width * (config.hidden_size + width) + width**2

    @classmethod
    def saved_numbers(cls, config: "SMTRecurrentConfig") -> int:
        width = cls.stream_width(config)
        return config.num_hidden_layers * 9 * width + 4 * width + config.hidden_size

    def layers_of(self, memory, embeds):
        stream = memory.flatten(1)
        for input_proj, state_proj in zip(self.input_projs.values(), self.state_projs.values()):
            input_reset, input_update, input_new = input_proj(embeds).chunk(3, dim=-1)
            state_reset, state_update, state_new = state_proj(stream).chunk(3, dim=-1)
            candidate = torch.tanh(input_new + torch.sigmoid(input_reset + state_reset) * state_new)
            kept = torch.sigmoid(input_update + state_update)
            # Under autocast the projections are of half precision, the stream is not.
            stream = torch.lerp(candidate.to(stream.dtype), stream, kept.to(stream.dtype))
            yield stream


# Last, as it is registered last.
from .fast_weight_smt_recurrent import SMTRecurrentFastWeightUpdater  # noqa: E402

__all__ = ["UPDATERS", "SMTRecurrentFastWeightUpdater"]

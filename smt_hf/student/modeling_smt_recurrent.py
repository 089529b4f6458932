"""The recurrent student: `m_{t+1} = f(m_t, x_{t+1})`, `p(x_{t+1} | x_{<=t}) = softmax(g(m_t))`.

Shapes: B sequences, T tokens, N = B or B x chunks (whatever is rolled out side by side), K memory tokens, D width,
F future tokens, H heads, V vocabulary. Symbols and equations: arXiv:2606.06479.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .cache_smt_recurrent import SMTRecurrentCache
from .configuration_smt_recurrent import SMTRecurrentConfig

# transformers 5.24 renamed the state's field from `past_key_values` to `cache`; both names are understood here.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


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


class SMTRecurrentAttention(nn.Module):
    """Multi-head attention in which only the last `num_queries` positions ask, or those at `places`."""

    def __init__(self, config: SMTRecurrentConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.kv_proj = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, states, num_queries: int, is_causal: bool, rotary=None, places=None):
        """`(N, S, D)` -> `(N, num_queries, D)`; with `places` `(N, num_queries)`, the positions that ask."""
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
    def __init__(self, config: SMTRecurrentConfig, width: int):
        super().__init__()
        assert config.intermediate_size is not None  # filled in by the configuration
        self.up_proj = nn.Linear(width, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, width, bias=False)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, states):
        return self.down_proj(self.activation(self.up_proj(states)))


class SMTRecurrentBlock(nn.Module):
    """Pre-norm Transformer block over a handful of positions."""

    def __init__(self, config: SMTRecurrentConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = SMTRecurrentAttention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SMTRecurrentMLP(config, config.hidden_size)

    def forward(self, states, num_queries: int | None = None, is_causal: bool = False, rotary=None, places=None):
        """`(N, S, D)` -> `(N, num_queries, D)`, the last positions (`None`: all), or those at `places` `(N, M)`."""
        num_queries = states.shape[1] if num_queries is None else num_queries
        num_queries = num_queries if places is None else places.shape[1]
        mixed = self.attention(self.attention_norm(states), num_queries, is_causal, rotary, places)
        states = positions_of(states, places) if places is not None else states[:, states.shape[1] - num_queries :]
        states = states + mixed
        return states + self.mlp(self.mlp_norm(states))


class SMTRecurrentOutProjection(nn.Linear):
    """`W_out` of the updater: a class of its own because it is zero at birth."""


class SMTRecurrentUpdater(nn.Module, ABC):
    """`f(m, x) = RMSNorm(m + W_out h(m, x))` [Eq. 1]; subclasses compute `h`.

    `W_out` is zero at birth, so that the first update keeps all information over any number of steps: without it,
    gradients through eight steps learned nothing on retrieval.
    """

    def __init__(self, config: SMTRecurrentConfig, width: int):
        super().__init__()
        self.config = config
        self.out_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.out_proj = SMTRecurrentOutProjection(width, width, bias=False)

    @abstractmethod
    def layers_of(self, memory, embeds):
        """Yield the stream after every layer, `(N, K, D)` or `(N, K * D)`."""

    def forward(self, memory, embeds, layer_outputs: list | None = None):
        """One transition: `(N, K, D)`, `(N, D)` -> `(N, K, D)`.

        `layer_outputs`, if given, receives the stream of the last memory token after every layer but the last,
        each `(N, D)`.
        """
        stream = None
        for index, stream in enumerate(self.layers_of(memory, embeds)):
            if layer_outputs is not None and index < self.config.num_hidden_layers - 1:
                layer_outputs.append(stream.reshape(memory.shape[0], -1, memory.shape[-1])[:, -1])
        change = self.out_proj(self.out_norm(stream)).view(memory.shape)
        return F.rms_norm(memory + change, memory.shape[-1:], eps=self.config.rms_norm_eps)


class SMTRecurrentTransformerUpdater(SMTRecurrentUpdater):
    """Attention over the new token and the memory tokens, told apart by learned slot embeddings."""

    def __init__(self, config: SMTRecurrentConfig):
        super().__init__(config, config.hidden_size)
        self.slot_embeddings = nn.Parameter(torch.empty(1 + config.num_memory_tokens, config.hidden_size))
        self.layers = nn.ModuleList([SMTRecurrentBlock(config) for _ in range(config.num_hidden_layers)])

    def layers_of(self, memory, embeds):
        stream = torch.cat([embeds[:, None], memory], dim=1) + self.slot_embeddings
        *inner, last = self.layers  # a slice would build a ModuleList at every token
        for layer in inner:
            stream = layer(stream)
            yield stream
        yield last(stream, num_queries=memory.shape[1])


class SMTRecurrentMLPUpdater(SMTRecurrentUpdater):
    """Residual feed-forward layers on the whole memory as one vector."""

    def __init__(self, config: SMTRecurrentConfig):
        width = config.num_memory_tokens * config.hidden_size
        super().__init__(config, width)
        self.token_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.norms = nn.ModuleList(
            [nn.RMSNorm(width, eps=config.rms_norm_eps) for _ in range(config.num_hidden_layers)]
        )
        self.layers = nn.ModuleList([SMTRecurrentMLP(config, width) for _ in range(config.num_hidden_layers)])

    def layers_of(self, memory, embeds):
        stream = memory.flatten(1) + self.token_proj(embeds)
        for norm, layer in zip(self.norms, self.layers):
            stream = stream + layer(norm(stream))
            yield stream


class SMTRecurrentGRUUpdater(SMTRecurrentUpdater):
    """GRU cells (Cho et al. 2014) on the whole memory as one vector, one after the other within a transition."""

    def __init__(self, config: SMTRecurrentConfig):
        width = config.num_memory_tokens * config.hidden_size
        super().__init__(config, width)
        self.input_projs = nn.ModuleList(
            [nn.Linear(config.hidden_size, 3 * width) for _ in range(config.num_hidden_layers)]
        )
        self.state_projs = nn.ModuleList([nn.Linear(width, 3 * width) for _ in range(config.num_hidden_layers)])

    def layers_of(self, memory, embeds):
        stream = memory.flatten(1)
        for input_proj, state_proj in zip(self.input_projs, self.state_projs):
            input_reset, input_update, input_new = input_proj(embeds).chunk(3, dim=-1)
            state_reset, state_update, state_new = state_proj(stream).chunk(3, dim=-1)
            candidate = torch.tanh(input_new + torch.sigmoid(input_reset + state_reset) * state_new)
            stream = torch.lerp(candidate, stream, torch.sigmoid(input_update + state_update))
            yield stream


UPDATERS: dict[str, Callable[[SMTRecurrentConfig], SMTRecurrentUpdater]] = {
    "transformer": SMTRecurrentTransformerUpdater,
    "mlp": SMTRecurrentMLPUpdater,
    "gru": SMTRecurrentGRUUpdater,
}


class SMTRecurrentReadout(nn.Module):
    """The decoder `g`: a causal Transformer over `[memory tokens, future tokens]` [Sec. 3.1].

    The last memory position predicts the next token; fed with the true future tokens, the positions after it predict
    the tokens further on (the predictive state loss, Eq. 2).
    """

    def __init__(self, config: SMTRecurrentConfig):
        super().__init__()
        self.config = config
        self.slot_embeddings = nn.Parameter(torch.empty(config.num_memory_tokens, config.hidden_size))
        self.layers = nn.ModuleList([SMTRecurrentBlock(config) for _ in range(config.num_readout_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, memories, future_embeds=None, wanted=None):
        """`(N, K, D)`, `(N, F, D)` -> `(N, 1 + F, D)`: the states that predict the next token and the F after it.

        `wanted`, `(N, M)` in 0 .. F: only those of them, `(N, M, D)`; the last layer then does no more than that.
        """
        states = memories + self.slot_embeddings
        if future_embeds is not None:
            states = torch.cat([states, future_embeds], dim=1)
        num_memory_tokens, length = memories.shape[1], states.shape[1]
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        rotary = rotary_angles(length, head_dim, self.config.rope_theta, states.device)
        *inner, last = self.layers
        for layer in inner:
            states = layer(states, is_causal=True, rotary=rotary)
        places = None if wanted is None else wanted + num_memory_tokens - 1
        states = last(states, length - num_memory_tokens + 1, is_causal=True, rotary=rotary, places=places)
        return self.norm(states)


class SMTRecurrentPreTrainedModel(PreTrainedModel):
    config_class = SMTRecurrentConfig
    config: SMTRecurrentConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _no_split_modules = [
        "SMTRecurrentTransformerUpdater",
        "SMTRecurrentMLPUpdater",
        "SMTRecurrentGRUUpdater",
        "SMTRecurrentReadout",
    ]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    # The state cannot be exchanged between the ranks of a split sequence.
    _supports_context_parallel = False

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, SMTRecurrentOutProjection):
            init.zeros_(module.weight)
        elif isinstance(module, nn.Linear):
            fan_in = module.in_features / self.config.hidden_size
            init.normal_(module.weight, std=self.config.initializer_range * fan_in**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.16)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        if hasattr(module, "slot_embeddings"):
            init.normal_(module.slot_embeddings, std=0.5)
        if isinstance(module, SMTRecurrentModel):
            init.normal_(module.initial_memory)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers, with all three Auto classes in `auto_map`: any of them loads the checkpoint by
        `trust_remote_code=True` where `smt_hf` is not installed."""
        self.config.auto_map = {
            "AutoConfig": "configuration_smt_recurrent.SMTRecurrentConfig",
            "AutoModel": "modeling_smt_recurrent.SMTRecurrentModel",
            "AutoModelForCausalLM": "modeling_smt_recurrent.SMTRecurrentForCausalLM",
        }
        super().save_pretrained(save_directory, *args, **kwargs)


class SMTRecurrentModel(SMTRecurrentPreTrainedModel):
    """Embeddings, updater and readout: from tokens to the states that predict the next token."""

    def __init__(self, config: SMTRecurrentConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.initial_memory = nn.Parameter(torch.empty(config.num_memory_tokens, config.hidden_size))
        self.updater = UPDATERS[config.updater_type](config)
        self.readout = SMTRecurrentReadout(config)
        self.post_init()

    def start_memory(self) -> torch.Tensor:
        """`m_0`, the memory of the empty prefix, `(K, D)`: learned, RMS-normalised like every memory."""
        return F.rms_norm(self.initial_memory, self.initial_memory.shape[-1:], eps=self.config.rms_norm_eps)

    def unroll(self, memory, embeds, attention_mask=None, starts_document=None, layer_outputs: list | None = None):
        """The recurrence: the only loop over time.

        Args:
            memory: `(N, K, D)` before the first token.
            embeds: `(N, T, D)`, the embedded tokens.
            attention_mask: `(N, T)`, false where a token is padding and leaves the memory as it is; `None`: no padding.
            starts_document: `(N, T)` bool, true where the memory goes back to `m_0` before the token is read.
            layer_outputs: if a list, it receives one list per token: see `SMTRecurrentUpdater.forward`.

        Returns:
            `(N, T, K, D)`: the memory after each token.
        """
        keep = None if attention_mask is None else attention_mask.bool()[:, :, None, None].unbind(1)
        reset = None if starts_document is None else starts_document[:, :, None, None].unbind(1)
        start = None if reset is None else self.start_memory()
        memories = []
        for index, token in enumerate(embeds.unbind(1)):
            if reset is not None and start is not None:
                memory = torch.where(reset[index], start, memory)
            collected: list | None = None if layer_outputs is None else []
            updated = self.updater(memory, token, collected)
            memory = updated if keep is None else torch.where(keep[index], updated, memory)
            memories.append(memory)
            if layer_outputs is not None:
                layer_outputs.append(collected)
        return torch.stack(memories, dim=1)

    def read(self, memories: torch.Tensor) -> torch.Tensor:
        """States that predict the next token: `(..., K, D)` -> `(..., D)`."""
        return self.readout(memories.flatten(0, -3)).view(*memories.shape[:-2], memories.shape[-1])

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: `(B, T)`.
            attention_mask: `(B, T)` or `(B, tokens so far + T)`; a token with 0 leaves the memory unchanged.
            past_key_values: an [`SMTRecurrentCache`] to go on from; `None` or an empty cache starts from the learned
                `initial_memory`. It is updated in place.
            inputs_embeds: `(B, T, D)` instead of `input_ids`.
            logits_to_keep: read out only the last so many positions, or the positions of a 1D index tensor; 0 is all.
            cache: the name that transformers 5.24 and newer give `past_key_values`.

        Returns:
            `last_hidden_state` `(B, T or kept, D)`, the readout's state that predicts the next token;
            `past_key_values`; `hidden_states`: the embeddings, the stream of the last memory token after each layer
            of the updater but the last, and `last_hidden_state`: `num_hidden_layers + 1` tensors `(B, T, D)`.

        Raises:
            ValueError: both or none of `input_ids` and `inputs_embeds`; a cache of another kind that already holds
                tokens, or of another batch size; attentions asked for; a mask that is not 2D.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("A recurrent model has no attentions over the text: do not ask for `output_attentions`.")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        use_cache = self.config.use_cache if use_cache is None else use_cache
        state = _own_cache(past_key_values if past_key_values is not None else cache)
        if state is None and use_cache:
            state = SMTRecurrentCache()
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = embeds.shape[:2]
        if not length:
            raise ValueError(
                "The input has no tokens: give at least one, the beginning-of-text token for an empty prompt."
            )
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                raise ValueError(f"`attention_mask` must be (batch, tokens), got {tuple(attention_mask.shape)}.")
            attention_mask = attention_mask[:, -length:].to(embeds.device)
        memory = None if state is None else state.layers[0].memory
        if memory is None:
            memory = self.start_memory().expand(batch, -1, -1).to(embeds.dtype)
        elif memory.shape[0] != batch:
            raise ValueError(
                f"The state in `past_key_values` is of {memory.shape[0]} sequences, the input of {batch}: call "
                "`past_key_values.batch_repeat_interleave(n)` or `.batch_select_indices(indices)` first."
            )
        layer_outputs: list | None = [] if output_hidden_states else None
        memories = self.unroll(memory.to(embeds.device), embeds, attention_mask, layer_outputs=layer_outputs)
        if state is not None:
            state.layers[0].update_memory(memories)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        last_hidden_state = self.read(memories[:, kept] if not isinstance(kept, int) else memories)
        hidden_states = None
        if layer_outputs is not None:
            middle = [torch.stack(layer, dim=1) for layer in zip(*layer_outputs)]
            hidden_states = (embeds, *middle, last_hidden_state)
        return BaseModelOutputWithPast(
            last_hidden_state=last_hidden_state,
            hidden_states=hidden_states,
            **{CACHE_NAME: state if use_cache else None},
        )


class SMTRecurrentForCausalLM(SMTRecurrentPreTrainedModel, GenerationMixin):
    """The student with a head over the vocabulary: what is trained, exported and generates."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SMTRecurrentConfig):
        super().__init__(config)
        self.model = SMTRecurrentModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def read_logits(self, memories: torch.Tensor) -> torch.Tensor:
        """Next-token logits of memories: `(..., K, D)` -> `(..., V)`."""
        return self.lm_head(self.model.read(memories))

    def decode_logits(
        self, memories: torch.Tensor, future_ids: torch.Tensor, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of the next F tokens given all but the last of them [Eq. 2]: `(N, K, D)`, `(N, F)` -> `(N, F, V)`.

        `wanted`, `(N, M)` in 0 .. F - 1: only those of them, `(N, M, V)`.
        """
        future = self.model.embed_tokens(future_ids[:, :-1]) if future_ids.shape[1] > 1 else None
        return self.lm_head(self.model.readout(memories, future, wanted))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As [`SMTRecurrentModel.forward`], with logits and a loss.

        `logits[:, i]` is read out of the memory after `input_ids[:, : i + 1]` and predicts `input_ids[:, i + 1]`.

        Args:
            labels: `(B, T)`, usually the `input_ids`: shifted inside, -100 is ignored.

        Returns:
            `loss` (nats a token) if there are labels, `logits` `(B, T or kept, V)`, `past_key_values`,
            `hidden_states`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            logits_to_keep=logits_to_keep,
            cache=cache,
            return_dict=True,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Hands `generate()` an [`SMTRecurrentCache`] where it would make a cache of keys and values."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"`cache_implementation={generation_config.cache_implementation!r}` is for attention models. The state "
                "of this model has a fixed size: leave `cache_implementation` out and an SMTRecurrentCache is used."
            )
        given = model_kwargs.get(CACHE_NAME)
        if given is not None:
            model_kwargs[CACHE_NAME] = _own_cache(given)
            model_kwargs[CACHE_NAME]._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = SMTRecurrentCache()
            if generation_config.is_assistant:
                model_kwargs[CACHE_NAME].activate_past_recording()


def _own_cache(cache) -> SMTRecurrentCache | None:
    """The cache itself, a new one for an empty foreign cache, an error for a foreign cache that holds tokens."""
    # By name: a checkpoint loaded as remote code has its own copy of the class.
    if cache is None or type(cache).__name__ == SMTRecurrentCache.__name__:
        return cache
    if isinstance(cache, Cache) and cache.get_seq_length() == 0:
        return SMTRecurrentCache()
    raise ValueError(
        f"`past_key_values` is a {type(cache).__name__} that another model has filled; pass an SMTRecurrentCache "
        "as returned by this model, or none."
    )


SMTRecurrentConfig.register_for_auto_class()
SMTRecurrentModel.register_for_auto_class("AutoModel")
SMTRecurrentForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["SMTRecurrentForCausalLM", "SMTRecurrentModel"]

"""The recurrent student: `m_{t+1} = f(m_t, x_{t+1})`, `p(x_{t+1} | x_{<=t}) = softmax(g(m_t))`.

Shapes: B sequences, T tokens, N = B or B x chunks (whatever is rolled out side by side), K memory tokens, D width,
E width of the embeddings, F future tokens, V vocabulary. Symbols and equations: arXiv:2606.06479.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.utils import can_return_tuple

from .cache_smt_recurrent import SMTRecurrentCache, own_cache
from .configuration_smt_recurrent import SMTRecurrentConfig
from .layers_smt_recurrent import SMTRecurrentReadout, init_projection, projection
from .recurrence_smt_recurrent import SMTRecurrentStretch, document_starts, state_dtype, unrolled
from .updaters_smt_recurrent import UPDATERS
from .weights_smt_recurrent import SMTRecurrentPreTrainedModel

# transformers 5.24 renamed the state's field from `past_key_values` to `cache`; both names are understood here.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class SMTRecurrentModel(SMTRecurrentPreTrainedModel):
    """Embeddings, updater and readout: from tokens to the states that predict the next token."""

    def __init__(self, config: SMTRecurrentConfig):
        super().__init__(config)
        width = config.embedding_size or config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.embed_proj = projection(width, config.hidden_size)
        self.initial_memory = nn.Parameter(torch.empty(config.num_memory_tokens, config.hidden_size))
        self.updater = UPDATERS[config.updater_type](config)
        self.readout = SMTRecurrentReadout(config)
        self.stretch = SMTRecurrentStretch()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        if any(module is getattr(self.updater, name) for name in self.updater.zero_at_birth):
            init.zeros_(module.weight)
        elif module is self:
            init.normal_(self.initial_memory)
        elif module is self.embed_proj:
            init_projection(module)
        else:
            super()._init_weights(module)

    def start_memory(self) -> torch.Tensor:
        """`m_0`, the memory of the empty prefix, `(K, D)`: learned, in the form that the updater gives it."""
        return self.updater.start(self.initial_memory)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Tokens as the updater takes them: `(...)` -> `(..., D)`."""
        return self.embed_proj(self.embed_tokens(input_ids))

    def unroll(
        self,
        memory,
        embeds,
        attention_mask=None,
        starts_document=None,
        layer_outputs: list | None = None,
        num_kept: int | None = None,
    ):
        """The recurrence over the tokens.

        Args:
            memory: `(N, K, D)` before the first token.
            embeds: `(N, T, D)`, the embedded tokens.
            attention_mask: `(N, T)`, false where a token is padding and leaves the memory as it is; `None`: no padding.
            starts_document: `(N, T)` bool, true where the memory goes back to `m_0` before the token is read.
            layer_outputs: if a list, it receives one list per token: see `SMTRecurrentUpdater.forward`.
            num_kept: return the last so many memories only, and hold no others; `None`: all.

        Returns:
            `(N, T or num_kept, K, D)`: the memory after each token.
        """
        start = None if starts_document is None else self.start_memory()
        inputs = (memory, embeds, attention_mask, starts_document, start)
        # `output_hidden_states` is for inspection: the streams of the layers are held, not computed again.
        checkpoints = self.stretch.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if not checkpoints or layer_outputs is not None:
            return unrolled(*inputs, updater=self.updater, layer_outputs=layer_outputs, num_kept=num_kept)
        memories = self.stretch.checkpointed(*inputs, updater=self.updater)
        return memories if num_kept is None else memories[:, -num_kept:]

    def read(self, memories: torch.Tensor) -> torch.Tensor:
        """States that predict the next token: `(..., K, D)` -> `(..., D)`."""
        return self.readout(memories.flatten(0, -3)).view(*memories.shape[:-2], memories.shape[-1])

    def final_memory(self, input_ids=None, attention_mask=None, inputs_embeds=None) -> torch.Tensor:
        """The memory after the last token of every sequence, `(B, K, D)`: an embedding of the text.

        Padding, `attention_mask` 0, changes nothing on either side.
        """
        outputs = self(input_ids, attention_mask, inputs_embeds=inputs_embeds, use_cache=True, logits_to_keep=1)
        return getattr(outputs, CACHE_NAME).layers[0].memory

    @staticmethod
    def _mask_of(embeds: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        """The part of a mask that covers the embedded tokens, `(B, T)`; refuses what does not cover them."""
        length = embeds.shape[1]
        if not length:
            raise ValueError(
                "The input has no tokens: give at least one, the beginning-of-text token for an empty prompt."
            )
        if attention_mask is None:
            return None
        if attention_mask.dim() != 2:
            raise ValueError(f"`attention_mask` must be (batch, tokens), got {tuple(attention_mask.shape)}.")
        if attention_mask.shape[1] < length:
            raise ValueError(
                f"`attention_mask` covers {attention_mask.shape[1]} tokens, the input has {length}: give as many, "
                "or those of all tokens so far."
            )
        return attention_mask[:, -length:].to(embeds.device)

    def _memory_before(self, embeds: torch.Tensor, state: SMTRecurrentCache | None) -> torch.Tensor:
        """The memory before the first of the embedded tokens, `(B, K, D)`."""
        batch = embeds.shape[0]
        memory = None if state is None else state.layers[0].memory
        if memory is None:
            memory = self.start_memory().expand(batch, -1, -1)
        elif memory.shape[0] != batch:
            raise ValueError(
                f"The state in `past_key_values` is of {memory.shape[0]} sequences, the input of {batch}: call "
                "`past_key_values.batch_repeat_interleave(n)` or `.batch_select_indices(indices)` first."
            )
        return memory.to(embeds.device, state_dtype(embeds.dtype))

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
        document_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Read the tokens and return what predicts the next one after each of them.

        Args:
            input_ids: `(B, T)`.
            attention_mask: `(B, T)` or `(B, tokens so far + T)`; a token with 0 leaves the memory unchanged.
            past_key_values: an [`SMTRecurrentCache`] to go on from; `None` or an empty cache starts from the learned
                `initial_memory`. It is updated in place.
            inputs_embeds: `(B, T, E)` instead of `input_ids`, as `embed_tokens` makes them.
            logits_to_keep: read out only the last so many positions, or the positions of a 1D index tensor; 0 is all.
            cache: the name that transformers 5.24 and newer give `past_key_values`.
            document_ids: `(B, T)`, of packed rows: where it changes inside the row, the memory goes back to `m_0`.

        Returns:
            `last_hidden_state` `(B, T or kept, D)`, the readout's state that predicts the next token;
            `past_key_values`; `hidden_states`: embedded tokens, the stream of the last memory token after each layer
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
        state = own_cache(past_key_values if past_key_values is not None else cache)
        if state is None and use_cache:
            state = SMTRecurrentCache()
        embeds = self.embed_proj(self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds)
        length = embeds.shape[1]
        attention_mask = self._mask_of(embeds, attention_mask)
        memory = self._memory_before(embeds, state)
        layer_outputs: list | None = [] if output_hidden_states else None
        # Only the memories that are read out are held, except for a state that may be cropped.
        num_kept = logits_to_keep if isinstance(logits_to_keep, int) and 0 < logits_to_keep < length else None
        if output_hidden_states or (state is not None and state.layers[0].record_past):
            num_kept = None
        starts_document = None if document_ids is None else document_starts(document_ids)
        memories = self.unroll(memory, embeds, attention_mask, starts_document, layer_outputs, num_kept)
        if state is not None:
            state.layers[0].update_memory(memories, num_tokens=length)
        kept: torch.Tensor | slice
        if isinstance(logits_to_keep, int):
            kept = slice(-logits_to_keep if logits_to_keep else None, None)
        else:
            kept = logits_to_keep
        hidden_states = None
        if layer_outputs is None:
            last_hidden_state = self.read(memories[:, kept])
        else:
            middle = [torch.stack(layer, dim=1) for layer in zip(*layer_outputs)]
            hidden_states = (embeds, *middle, self.read(memories))
            last_hidden_state = hidden_states[-1][:, kept]
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
        width = config.embedding_size or config.hidden_size
        self.head_proj = projection(config.hidden_size, width)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        init_projection(module) if module is self.head_proj else super()._init_weights(module)

    def head(self, states: torch.Tensor) -> torch.Tensor:
        """Next-token logits of what was read out: `(..., D)` -> `(..., V)`."""
        return self.lm_head(self.head_proj(states))

    def read_logits(self, memories: torch.Tensor) -> torch.Tensor:
        """Next-token logits of memories: `(..., K, D)` -> `(..., V)`."""
        return self.head(self.model.read(memories))

    def decode_logits(
        self, memories: torch.Tensor, future_ids: torch.Tensor, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of the next F tokens given all but the last of them [Eq. 2]: `(N, K, D)`, `(N, F)` -> `(N, F, V)`.

        `wanted`, `(N, M)` in 0 .. F - 1: only those of them, `(N, M, V)`.
        """
        future = self.model.embed(future_ids[:, :-1]) if future_ids.shape[1] > 1 else None
        return self.head(self.model.readout(memories, future, wanted))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        document_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As [`SMTRecurrentModel.forward`], whose other arguments are taken as well, with logits and a loss.

        `logits[:, i]` is read out of the memory after `input_ids[:, : i + 1]` and predicts `input_ids[:, i + 1]`.

        Args:
            labels: `(B, T)`, usually the `input_ids`: shifted inside, -100 is ignored. Label smoothing of a plain
                `transformers.Trainer` takes the labels before they get here and does not shift them; the Trainers of
                this package refuse it.

        Returns:
            `loss` (nats per token) if there are labels, `logits` `(B, T or kept, V)`, `past_key_values`,
            `hidden_states`.
        """
        more = {"logits_to_keep": logits_to_keep, "cache": cache, "document_ids": document_ids, "return_dict": True}
        outputs = self.model(input_ids, attention_mask, past_key_values, inputs_embeds, **more, **kwargs)
        logits = self.head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return with_logits(CausalLMOutputWithPast, outputs, logits, loss)

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: continuous batching, `cache_implementation="paged"`, pages keys and values.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "Continuous batching (`cache_implementation='paged'`) is for attention models: a recurrent state needs no "
            "pages. Call `generate()` on a left-padded batch."
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Hands `generate()` an [`SMTRecurrentCache`] where it would make a cache of keys and values."""
        # "offloaded" moves keys and values off the device between layers. One small state needs no offloading.
        if generation_config.cache_implementation not in (None, "dynamic", "offloaded"):
            raise ValueError(
                f"`cache_implementation={generation_config.cache_implementation!r}` is for attention models. The state "
                "of this model has a fixed size: leave `cache_implementation` out and an SMTRecurrentCache is used."
            )
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                "`assistant_early_exit` drafts with the first layers of a model; a transition of this one takes all "
                "of them. Leave it out, or draft with `prompt_lookup_num_tokens` or an `assistant_model`."
            )
        given = model_kwargs.get(CACHE_NAME)
        if given is not None:
            model_kwargs[CACHE_NAME] = own_cache(given)
            model_kwargs[CACHE_NAME]._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = SMTRecurrentCache()
            if generation_config.is_assistant:
                model_kwargs[CACHE_NAME].activate_past_recording()


class SMTRecurrentStep(nn.Module):
    """One token of generation as a function of tensors alone, for `torch.compile`, `torch.export` and servers.

    Args:
        student: an [`SMTRecurrentForCausalLM`]; its weights are shared, not copied.
    """

    def __init__(self, student: SMTRecurrentForCausalLM):
        super().__init__()
        self.student = student

    def start(self, batch_size: int) -> torch.Tensor:
        """The memory before the first token, `(B, K, D)`, at least float32."""
        memory = self.student.model.start_memory()
        return memory.expand(batch_size, -1, -1).to(state_dtype(memory.dtype))

    def forward(self, token_ids: torch.LongTensor, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B,)`, `(B, K, D)` -> logits of the next token `(B, V)`, the memory after this one `(B, K, D)`."""
        memory = self.student.model.updater(memory, self.student.model.embed(token_ids))
        return self.student.read_logits(memory), memory


class SMTRecurrentForSequenceClassification(SMTRecurrentPreTrainedModel):
    """Classification or regression of texts: a linear layer on what is read out of the memory after the last token."""

    def __init__(self, config: SMTRecurrentConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = SMTRecurrentModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """As [`SMTRecurrentModel.forward`], whose other arguments are taken as well; one row of logits per sequence.

        Args:
            attention_mask: as there; without one, trailing `pad_token_id`s of `input_ids` are taken for padding.
            labels: `(B,)` classes, `(B,)` or `(B, num_labels)` floats for a regression, `(B, num_labels)` floats for
                several classes at once; `config.problem_type` says which, or is inferred.

        Returns:
            `loss` if there are labels, `logits` `(B, num_labels)`, `past_key_values`, `hidden_states`.
        """
        pad = self.config.pad_token_id
        if attention_mask is None and input_ids is not None and pad is not None:
            attention_mask = (input_ids != pad).flip(1).cumsum(1).flip(1) > 0  # from the last other token on
        more = {**kwargs, "logits_to_keep": 1, "return_dict": True}
        outputs = self.model(input_ids, attention_mask, past_key_values, inputs_embeds, **more)
        logits = self.score(outputs.last_hidden_state[:, -1])
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, logits=logits, **kwargs)
        return with_logits(SequenceClassifierOutputWithPast, outputs, logits, loss)


def with_logits(kind, outputs: BaseModelOutputWithPast, logits: torch.Tensor, loss: torch.Tensor | None):
    """The outputs of [`SMTRecurrentModel`] as those of a model with a head, of the class `kind`."""
    state = {CACHE_NAME: getattr(outputs, CACHE_NAME)}
    return kind(loss=loss, logits=logits, hidden_states=outputs.hidden_states, **state)


SMTRecurrentConfig.register_for_auto_class()
SMTRecurrentModel.register_for_auto_class("AutoModel")
SMTRecurrentForCausalLM.register_for_auto_class("AutoModelForCausalLM")
SMTRecurrentForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = [
    "SMTRecurrentForCausalLM",
    "SMTRecurrentForSequenceClassification",
    "SMTRecurrentModel",
    "SMTRecurrentStep",
]

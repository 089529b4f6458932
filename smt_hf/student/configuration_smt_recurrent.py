"""Sizes of the recurrent student."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

UPDATER_TYPES = ("transformer", "mlp", "gru")


@strict
class SMTRecurrentConfig(PreTrainedConfig):
    """Configuration of [`SMTRecurrentModel`] and [`SMTRecurrentForCausalLM`].

    The state of the model is `num_memory_tokens` vectors of `hidden_size` numbers, whatever the length of the text.
    Symbols in brackets are those of arXiv:2606.06479.

    Args:
        vocab_size: number of tokens [V].
        hidden_size: width of a memory token and of the embeddings [D, the paper's d_model].
        intermediate_size: width of the feed-forward layers; `None` means `4 * hidden_size`.
        num_hidden_layers: blocks of the updater [f].
        num_readout_layers: blocks of the readout [g, the paper's decoder].
        num_attention_heads: heads of every attention; must divide `hidden_size` into even head widths (RoPE).
        num_memory_tokens: memory tokens [K], at least 1.
        updater_type: `"transformer"` (attention over the new token and the memory), `"mlp"` or `"gru"` (both work on
            the memory as one vector of `K * D`).
        hidden_act: activation of the feed-forward layers, a name known to `transformers.activations.ACT2FN`.
        max_position_embeddings: window that evaluation tools use when they ask for one. It is **not** a limit: the
            model has no positions in time.
        rope_theta: base of the rotary positions inside the readout.
        rms_norm_eps: epsilon of every RMS normalisation.
        initializer_range: standard deviation, at birth, of linear layers with `hidden_size` inputs (wider inputs get
            less, by the square root); `None` means `(3 * hidden_size) ** -0.5`, which is 0.02 at 768.
        tie_word_embeddings: whether `lm_head` shares the weight of the embeddings.
        use_cache: whether `forward` returns the state.

    Raises:
        ValueError: a size is out of range, a name unknown, or `num_attention_heads` does not divide `hidden_size`.
    """

    model_type = "smt_recurrent"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = 258
    hidden_size: int = 64
    intermediate_size: int | None = None
    num_hidden_layers: int = 2
    num_readout_layers: int = 1
    num_attention_heads: int = 4
    num_memory_tokens: int = 4
    updater_type: str = "transformer"
    hidden_act: str = "gelu"
    max_position_embeddings: int = 8192
    rope_theta: float | int = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float | int | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.initializer_range is None:
            self.initializer_range = (3 * self.hidden_size) ** -0.5
        # Here as well as in `validate()`, whose errors are no ValueError.
        self.validate_sizes()
        super().__post_init__(**kwargs)

    def validate_sizes(self):
        """Part of `validate()`: refuses sizes that no model can be built from."""
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_readout_layers",
            "num_attention_heads",
            "num_memory_tokens",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.hidden_size % self.num_attention_heads or (self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must divide `hidden_size` ({self.hidden_size}) "
                "into heads of an even width (the readout uses rotary positions)."
            )
        if self.updater_type not in UPDATER_TYPES:
            raise ValueError(f"unknown `updater_type` {self.updater_type!r}: choose one of {', '.join(UPDATER_TYPES)}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"unknown `hidden_act` {self.hidden_act!r}: choose one of {', '.join(sorted(ACT2FN))}.")


__all__ = ["SMTRecurrentConfig"]

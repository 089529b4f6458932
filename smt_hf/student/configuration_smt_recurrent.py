"""Sizes of the recurrent student, and what every saved model of this package needs."""

import glob
import os
import stat

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .updaters_smt_recurrent import UPDATERS


@strict
class SMTRecurrentConfig(PreTrainedConfig):
    """Configuration of [`SMTRecurrentModel`] and [`SMTRecurrentForCausalLM`].

    The state of the model is `num_memory_tokens` vectors of `hidden_size` numbers, whatever the length of the text.
    Symbols in brackets are those of arXiv:2606.06479.

    Args:
        vocab_size: number of tokens [V].
        hidden_size: width of a memory token and of the updater's inputs [D, the paper's d_model].
        embedding_size: width of the embeddings and of the head [E]. Where it is not `hidden_size`, a linear map leads
            from one to the other on either side, which saves parameters where the vocabulary is large. `None` means
            `hidden_size`.
        intermediate_size: width of the feed-forward layers; `None` means `4 * hidden_size`.
        num_hidden_layers: layers of the updater [f].
        num_readout_layers: layers of the readout [g, the paper's decoder].
        num_attention_heads: heads of every attention; must divide `hidden_size` into even head widths (RoPE).
        num_memory_tokens: memory tokens [K], at least 1.
        updater_type: `"transformer"` (attention over the new token and the memory), `"mlp"` or `"gru"` (both work on
            the memory as one vector of `K * D`), or `"fast_weight"` (looks things up; see
            [`SMTRecurrentFastWeightUpdater`], at least 3 memory tokens).
        num_matrix_heads: `fast_weight`: heads of the matrix in the memory. At birth those with even numbers (from 0)
            look up by distance too, the others by content alone, and these are born as induction heads.
        matrix_key_size: `fast_weight`: width of a head's keys, even; `None` means four times as wide as the
            values, or a little more.
        hidden_act: activation of the feed-forward layers, a name known to `transformers.activations.ACT2FN`.
        max_position_embeddings: window for evaluation tools that ask for one. It is **not** a limit: the model has no
            positions in time.
        rope_theta: base of the rotary positions inside the readout.
        rms_norm_eps: epsilon of every RMS normalisation.
        initializer_range: standard deviation of the initial weights of linear layers with `hidden_size` inputs. It is
            divided by the square root of how many times wider an input is. `None` means `(3 * hidden_size) ** -0.5`,
            which is 0.02 at 768.
        tie_word_embeddings: whether `lm_head` shares the weight of the embeddings.
        use_cache: whether `forward` returns the state.

    Raises:
        ValueError: a size is out of range, a name unknown, or `num_attention_heads` does not divide `hidden_size`.
    """

    model_type = "smt_recurrent"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = 258
    hidden_size: int = 64
    embedding_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int = 2
    num_readout_layers: int = 1
    num_attention_heads: int = 4
    num_memory_tokens: int = 4
    updater_type: str = "transformer"
    num_matrix_heads: int = 1
    matrix_key_size: int | None = None
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
        # Here as well as in `validate()`, whose errors are no ValueError.
        self.validate_sizes()
        derive_sizes(self)
        super().__post_init__(**kwargs)

    def validate_sizes(self):
        """Part of `validate()`: refuses sizes that no model can be built from."""
        check_layer_sizes(self, ("num_hidden_layers", "num_readout_layers", "embedding_size"))
        if self.updater_type not in UPDATERS:
            raise ValueError(f"unknown `updater_type` {self.updater_type!r}: choose one of {', '.join(UPDATERS)}.")
        UPDATERS[self.updater_type].check_config(self)


def check_layer_sizes(config: PreTrainedConfig, own_sizes: tuple[str, ...]) -> None:
    """Refuse sizes that no attention and feed-forward layers can be built from; `None` is still to be derived.

    Args:
        own_sizes: names of the configuration's further fields that must be at least 1.

    Raises:
        ValueError: a size is out of range, or the heads do not divide the width.
    """
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_memory_tokens")
    lower_limits = dict.fromkeys((*sizes, *own_sizes), 1) | {"rms_norm_eps": 0, "initializer_range": 0}
    for name, limit in lower_limits.items():
        value = getattr(config, name)
        if value is not None and not limit <= value < float("inf"):
            raise ValueError(f"`{name}` must be at least {limit}, got {value}.")
    if not 0 < config.rope_theta < float("inf"):
        raise ValueError(f"`rope_theta` must be a number above 0, got {config.rope_theta}.")
    if config.hidden_size % config.num_attention_heads or (config.hidden_size // config.num_attention_heads) % 2:
        raise ValueError(
            f"`num_attention_heads` ({config.num_attention_heads}) must divide `hidden_size` ({config.hidden_size}) "
            "into heads of an even width (rotary positions)."
        )
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"`hidden_act` {config.hidden_act!r} is unknown: choose one of {', '.join(sorted(ACT2FN))}.")


def derive_sizes(config: PreTrainedConfig) -> None:
    """Fill in the two values that follow from `hidden_size` where they are `None`."""
    if config.intermediate_size is None:
        config.intermediate_size = 4 * config.hidden_size
    if config.initializer_range is None:
        config.initializer_range = (3 * config.hidden_size) ** -0.5


def share_weights(folder: str | os.PathLike) -> None:
    """Give the safetensors files of a saved model or adapter the permissions of its configuration file.

    safetensors makes them readable by their owner alone, whatever the umask is.
    """
    inside = glob.escape(os.fspath(folder))
    for configuration in glob.glob(os.path.join(inside, "*config.json"))[:1]:  # one process of several has written it
        for path in glob.glob(os.path.join(inside, "*.safetensors")):
            os.chmod(path, stat.S_IMODE(os.stat(configuration).st_mode))


__all__ = ["SMTRecurrentConfig"]

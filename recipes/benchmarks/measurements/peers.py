"""The student and models of transformers with about as many parameters.

A peer has the student's vocabulary, as many layers as the student has blocks (updater and readout), untied embeddings
where the student's are, and the width that brings its number of parameters closest.

Shapes: B sequences, D width, L layers.
"""

import bisect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    set_seed,
)
from transformers.utils import logging

from smt_hf.errors import InputError
from smt_hf.student import SMTRecurrentConfig, SMTRecurrentForCausalLM

from .arguments import BenchmarkArguments

_WIDTH_STEP = 4
_RECORDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_readout_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_memory_tokens",
    "updater_type",
    "state_size",
)
# What models call their state; newer versions of transformers answer to older names too, so the first one counts.
STATE_NAMES = ("cache", "past_key_values", "cache_params", "state")


def load_student(arguments: BenchmarkArguments) -> SMTRecurrentForCausalLM:
    """The student in `model`, or a fresh one of the given sizes, in float32, for evaluation.

    Raises:
        InputError: there is no folder `model`, or a size is out of range.
    """
    set_seed(arguments.seed)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if arguments.model is None:
        try:
            config = SMTRecurrentConfig(**arguments.sizes())
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise InputError(str(error)) from error
        student = SMTRecurrentForCausalLM(config).eval()
        # Zero initially: no token would change the memory, and all ways to generate would agree whatever they do.
        torch.nn.init.normal_(student.model.updater.out_proj.weight, std=0.3)
        return student
    if not Path(arguments.model).is_dir():
        raise InputError(f"there is no folder {arguments.model!r}: give one that `save_pretrained` has written.")
    return SMTRecurrentForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()


def count_parameters(model) -> int:
    """Parameters of a module, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def num_blocks(config: SMTRecurrentConfig) -> int:
    """Layers that a token passes in the student."""
    return config.num_hidden_layers + config.num_readout_layers


def closest(configure: Callable[[int], Any], model_class, sizes: range, num_parameters: int):
    """The configuration whose model has the number of parameters closest to `num_parameters`.

    Args:
        configure: size -> configuration; parameters grow with the size.
        sizes: those to choose from.
    """

    def count(size: int) -> int:
        with torch.device("meta"):
            return count_parameters(model_class(configure(size)))

    index = bisect.bisect_left(sizes, num_parameters, key=count)
    candidates = sizes[max(index - 1, 0) : index + 1]
    return configure(min(candidates, key=lambda size: abs(count(size) - num_parameters)))


def _shared(config: SMTRecurrentConfig, num_layers: int | None) -> dict:
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    sizes = {"vocab_size": config.vocab_size, "num_hidden_layers": num_layers or num_blocks(config)}
    return {**tokens, **sizes, "tie_word_embeddings": config.tie_word_embeddings}


def _widths(num_parameters: int) -> range:
    return range(_WIDTH_STEP, math.isqrt(num_parameters) + _WIDTH_STEP, _WIDTH_STEP)


def mamba_like(student: SMTRecurrentForCausalLM, num_layers: int | None = None) -> MambaForCausalLM:
    """A fresh Mamba, for evaluation. Without its kernels transformers runs it as plain PyTorch."""
    shared, target = _shared(student.config, num_layers), count_parameters(student)
    config = closest(lambda d: MambaConfig(hidden_size=d, **shared), MambaForCausalLM, _widths(target), target)
    return MambaForCausalLM(config).eval()


def rwkv_like(student: SMTRecurrentForCausalLM, num_layers: int | None = None) -> RwkvForCausalLM:
    """A fresh RWKV-4, for evaluation. It has no fewer than 2 layers: its initialisation divides by `L - 1`."""
    num_layers = max(num_layers or num_blocks(student.config), 2)
    shared, target = _shared(student.config, num_layers), count_parameters(student)
    config = closest(lambda d: RwkvConfig(hidden_size=d, **shared), RwkvForCausalLM, _widths(target), target)
    return RwkvForCausalLM(config).eval()


def llama_config_like(
    student: SMTRecurrentForCausalLM,
    max_position_embeddings: int,
    num_key_value_heads: int | None = None,
    num_layers: int | None = None,
) -> LlamaConfig:
    """A Transformer of the student's width, heads and, without `num_layers`, depth, whose feed-forward width is what is
    solved for."""
    sizes = {
        "hidden_size": student.config.hidden_size,
        "num_attention_heads": student.config.num_attention_heads,
        "num_key_value_heads": num_key_value_heads or student.config.num_attention_heads,
        "max_position_embeddings": max_position_embeddings,
    }
    shared, target = _shared(student.config, num_layers), count_parameters(student)
    return closest(
        lambda width: LlamaConfig(intermediate_size=width, **sizes, **shared),
        LlamaForCausalLM,
        range(1, target // (3 * student.config.hidden_size) + 2),
        target,
    )


class _ShiftedTokens:
    """State `(B, D, L)` of RWKV's token shift, read with a time axis: `(B, 1, D)` per layer.

    transformers (seen in 5.24) reads it as `(B, D)`, which broadcasts a one-token step of B sequences to B x B: wrong
    logits and B times the work as soon as B > 1.
    """

    def __init__(self, states: torch.Tensor):
        self.states = states

    def __getitem__(self, index) -> torch.Tensor:
        return self.states[index][:, None]

    def __setitem__(self, index, value: torch.Tensor) -> None:
        self.states[index] = value


def start_state(model, batch_size: int) -> dict:
    """Arguments of `forward` or `generate()` for "nothing read yet": RWKV's mended state, nothing for other models."""
    if not isinstance(model, RwkvForCausalLM):
        return {}
    config = model.config
    shape = (batch_size, config.hidden_size, config.num_hidden_layers)
    shifted = [_ShiftedTokens(torch.zeros(shape)) for _ in range(2)]
    sums = [torch.zeros(batch_size, config.attention_hidden_size, config.num_hidden_layers) for _ in range(3)]
    return {"state": [*shifted, sums[0], sums[1], sums[2] - 1e30]}


def describe(config) -> dict:
    """The sizes of a model that a result line records, those that it has."""
    known = config.to_dict()
    return {name: known[name] for name in _RECORDED if name in known}

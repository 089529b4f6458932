"""Language models of transformers as the lower part of a teacher: how they are found, loaded and checked.

A teacher needs hidden states of a model, and its language-model head only where a student is distilled from it.
`describe` reads the configuration and the tokenizer, `load_model` and `empty_model` make the model with or without its
head, `trunk_of` is the part that makes the states, and `check_trunk` refuses models whose states are no states of
prefixes. Every refusal names what to use instead.
"""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from smt_hf.errors import InputError

from .weight_files import SILENTLY, read_tensor, weight_map

_DTYPES = ("auto", "float32", "bfloat16", "float16")
# Entries of a configuration that say where it came from, not what it is: a resumed run may have others.
_OF_ITS_ORIGIN = ("transformers_version", "_name_or_path")
# One of them is there if a folder has a tokenizer. transformers would make one without any text from the configuration.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt",
)  # fmt: skip
_INSTEAD = (
    "name a causal language model (Llama, Qwen, GPT-2, Mamba, ...), or leave `teacher_model_name_or_path` out and let "
    "a teacher be trained from scratch (`teacher_model_type smt_windowed_teacher` is a bidirectional one)"
)


def _where(name: str, revision: str | None, gguf_file: str | None) -> dict[str, Any]:
    """The arguments of `from_pretrained` that say which model is meant."""
    given = {"revision": revision, "gguf_file": gguf_file}
    return {"pretrained_model_name_or_path": name, **{key: value for key, value in given.items() if value is not None}}


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Errors of transformers about what it was asked to load, as errors that a user can mend.

    Raises:
        InputError: a package is missing, or there is no such model.
    """
    try:
        yield
    except InputError:
        raise
    except ImportError as error:
        message = str(error).strip()
        if "gguf" in message.lower():
            raise InputError('`teacher_gguf_file` needs the package gguf: `pip install "smt_hf[gguf]"`.') from error
        raise InputError(f"{name} needs a package that is missing: {message}") from error
    except Exception as error:  # whatever transformers meets in a damaged file
        raise InputError(
            f"no causal language model could be loaded from {name!r}: {str(error).strip()} Otherwise: {_INSTEAD}."
        ) from error


def describe(name: str, revision: str | None = None, gguf_file: str | None = None) -> dict[str, Any]:
    """The configuration of a model as JSON can hold it, which [`empty_model`] rebuilds the model from.

    Args:
        name: a folder or a repository of the Hub.
        revision: of the repository.
        gguf_file: name of a GGUF file in it.

    Raises:
        InputError: there is none, or it is of a model that makes no next-token predictions.
    """
    with _explained(name):
        config = AutoConfig.from_pretrained(**_where(name, revision, gguf_file))
    _check_class(config, name)
    fields = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in fields.items() if key not in _OF_ITS_ORIGIN}


def _check_class(config: PreTrainedConfig, name: str) -> None:
    if config.is_encoder_decoder:
        raise InputError(
            f"{name} is a {config.model_type}, an encoder with a decoder; a teacher reads prefixes of one text: "
            f"{_INSTEAD}."
        )
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise InputError(f"{name} is a {config.model_type}, which is no causal language model: {_INSTEAD}.")


def config_of(fields: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of a model from what [`describe`] has returned."""
    own = dict(fields)
    return AutoConfig.for_model(own.pop("model_type"), **own)


def tokenizer_of(name: str, revision: str | None = None, gguf_file: str | None = None):
    """The tokenizer that a model comes with, or `None`."""
    try:
        if gguf_file is None and not any(
            cached_file(name, file, revision=revision, **SILENTLY) for file in _TOKENIZER_FILES
        ):
            return None
        return AutoTokenizer.from_pretrained(**_where(name, revision, gguf_file))
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError):
        return None


def vocabulary_size(tokenizer) -> int:
    """How many embeddings the tokens of a tokenizer need. Numbers may be left out, so that they are not its length."""
    return max(tokenizer.get_vocab().values()) + 1


def start_token_of(tokenizer) -> int | None:
    """The token that a tokenizer puts in front of every text (Llama's `<s>`), or `None`."""
    if tokenizer is None:
        return None
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return int(full[0]) if len(full) > len(plain) and full[: len(plain)] != plain else None


def check_dtype(name: str) -> None:
    """Raises:
    InputError: it is no precision that models are loaded in.
    """
    if name not in _DTYPES:
        raise InputError(f"unknown `model_dtype` {name!r} of the teacher: choose one of {', '.join(_DTYPES)}.")


def trunk_of(model: PreTrainedModel) -> PreTrainedModel:
    """A causal language model without its head."""
    trunk = model.get_decoder()
    return trunk if isinstance(trunk, PreTrainedModel) else model.base_model


def load_model(
    name: str,
    revision: str | None,
    gguf_file: str | None,
    dtype: str,
    device_map: str | dict[str, Any] | None,
    bits: int | None,
    with_head: bool,
) -> PreTrainedModel:
    """The model with its weights.

    Args:
        name, revision, gguf_file: as in `describe`.
        dtype: precision of its weights; `auto`: that of the file.
        device_map: as in transformers; `None`: the CPU, from where the Trainer moves it.
        bits: 4 or 8: quantise the weights by bitsandbytes as they are loaded.
        with_head: a causal language model that makes logits, too, rather than its trunk.

    Raises:
        InputError: it cannot be loaded.
    """
    words: dict[str, Any] = _where(name, revision, gguf_file) | {"dtype": dtype}
    if device_map is not None:
        words["device_map"] = device_map
    with _explained(name), whole_weights():
        if bits is not None:
            from transformers import BitsAndBytesConfig  # which may ask for a package

            words["quantization_config"] = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
        model = AutoModelForCausalLM.from_pretrained(**words)
    return model if with_head else trunk_of(model)


def load_tables(
    name: str, revision: str | None = None, gguf_file: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of the model's embeddings and of its head, `(V, E)` each, in the precision of their file; those of the
    embeddings twice if it has no head.

    The two are read from safetensors files alone where they are there; else the whole model is loaded.

    Raises:
        InputError: the model cannot be loaded.
    """
    with _explained(name):
        found = None if gguf_file else _tables_in_files(name, revision)
    if found is not None:
        return found
    with _explained(name), whole_weights():
        model = AutoModelForCausalLM.from_pretrained(**_where(name, revision, gguf_file), dtype="auto")
    embeddings = model.get_input_embeddings()
    head = model.get_output_embeddings() or embeddings
    return embeddings.weight.detach(), head.weight.detach()


def _tables_in_files(name: str, revision: str | None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """As `load_tables`, or `None` where the files do not hold the two under the names and in the shapes of the model's
    class, as those of models that transformers converts as it loads them."""
    fields = describe(name, revision)
    if fields.get("quantization_config") or fields.get("transformers_weights"):  # the latter are in a file of this name
        return None
    held = weight_map(name, revision)
    if not held:
        return None
    with torch.device("meta"):
        model = empty_model(fields, with_head=True)
    parameters = list(model.named_parameters(remove_duplicate=False))
    tables: list[torch.Tensor] = []
    for layer in (model.get_input_embeddings(), model.get_output_embeddings() or model.get_input_embeddings()):
        names = [own for own, parameter in parameters if parameter is layer.weight]
        if tables:  # of a tied table that is there twice, transformers takes each layer's own
            names.reverse()
        names += [own.removeprefix(f"{model.base_model_prefix}.") for own in names]  # saved without a head
        own = next((own for own in names if own in held), None)
        if own is None:
            return None
        table = read_tensor(name, revision, held[own], own)
        if table.shape != layer.weight.shape or not table.is_floating_point():
            return None
        tables.append(table)
    return tables[0], tables[1]


def empty_model(fields: dict[str, Any], with_head: bool) -> PreTrainedModel:
    """The model of a configuration from `describe` with random weights, or none on the meta device."""
    with whole_weights():
        model = AutoModelForCausalLM.from_config(config_of(fields))
    return model if with_head else trunk_of(model)


def is_in_shards(model: nn.Module) -> bool:
    """Whether weights of the model are split between processes (FSDP, ZeRO-3), which every call of it gathers."""
    return any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in model.parameters())


def further_calls(model: nn.Module, number: int) -> int:
    """Where a process calls the model `number` times, how many more calls another process makes. Weights in shards are
    gathered from all processes, each of which must therefore make as many. A collective call there, else 0."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized() and is_in_shards(model)):
        return 0
    most = torch.tensor(number, device=next(model.parameters()).device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most) - number


@contextlib.contextmanager
def whole_weights() -> Iterator[None]:
    """transformers makes models whole inside, under ZeRO-3 as well: the engine splits the composite as one model
    later, and would find the weights of this part split already."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


def add_lora(trunk: PreTrainedModel, rank: int, alpha: int) -> None:
    """Put LoRA layers into the linear layers of the model, in place. At birth they change nothing.

    Raises:
        InputError: peft has no LoRA for one of them.
    """
    from peft import LoraConfig, inject_adapter_in_model  # slow to import, and few runs need it

    # Mamba reads the weights of these past the layers that hold them.
    is_mamba = any("mamba" in type(module).__name__.lower() for module in trunk.modules())
    left_out = ("out_proj", "dt_proj") if is_mamba else ()
    targets = [
        name
        for name, module in trunk.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not name.endswith(left_out)
    ]
    try:
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), trunk)
        for name, parameter in trunk.named_parameters():
            if "lora_" in name:  # what is trained is of full precision, whatever the model is
                parameter.data = parameter.data.float()
    except ValueError as error:
        raise InputError(f"no LoRA layers fit the teacher's model: {error} Leave `teacher_lora_r` out.") from error


def hidden_states(model: PreTrainedModel, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All hidden states, each `(N, L, E)`, of rows that begin at their first column: of the embeddings, then after
    every layer.

    Raises:
        InputError: the model returns none.
    """
    return states_and_logits(model, input_ids)[0]


def states_and_logits(
    model: PreTrainedModel, input_ids: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """`hidden_states`, and of a model with its head the logits `(N, L, V)` of the same pass, else `None`.

    There is no mask. Whatever stands behind the tokens that count changes nothing about a causal model's states, and
    some models (Mamba) take none.

    Raises:
        InputError: the model returns no states.
    """
    outputs = model(input_ids=input_ids, output_hidden_states=True, use_cache=False, return_dict=True)
    states = getattr(outputs, "hidden_states", None)
    if not states or any(state is None or state.shape[:2] != input_ids.shape for state in states):
        raise InputError(
            f"{type(model).__name__} returns no hidden states of its tokens, which memories are made of: {_INSTEAD}."
        )
    return tuple(states), getattr(outputs, "logits", None)


def _few_tokens(trunk: PreTrainedModel) -> torch.Tensor:
    """Two rows of four tokens that differ in the last one, `(2, 4)`."""
    embeddings: nn.Module = trunk.get_input_embeddings()
    weight = embeddings.weight
    assert isinstance(weight, torch.Tensor)
    return torch.tensor([[0, 1, 2, 3], [0, 1, 2, 0]], device=weight.device) % weight.shape[0]


@torch.enable_grad()
def unreached_lora(trunk: PreTrainedModel, layers: list[int]) -> set[str]:
    """Names of the parameters of LoRA layers that no gradient of the given hidden states reaches: those of layers above
    the last one that is read, say. DDP would wait for their gradients."""
    lora = {name: parameter for name, parameter in trunk.named_parameters() if "lora_" in name}
    before = {name: parameter.requires_grad for name, parameter in lora.items()}
    for parameter in lora.values():
        parameter.requires_grad_(True)
    gradients: list[torch.Tensor | None]
    states = hidden_states(trunk, _few_tokens(trunk))
    total = sum(states[number].float().sum() for number in layers)
    if isinstance(total, torch.Tensor) and total.requires_grad:
        gradients = list(torch.autograd.grad(total, list(lora.values()), allow_unused=True))
    else:  # of the embeddings alone
        gradients = [None] * len(lora)
    for name, parameter in lora.items():
        parameter.requires_grad_(before[name])
    return {name for name, gradient in zip(lora, gradients) if gradient is None}


@torch.no_grad()
def check_trunk(trunk: PreTrainedModel, num_layers: int) -> None:
    """Read four tokens twice, with another last one: the states of the first three must not change.

    Args:
        num_layers: that `describe` said the model has.

    Raises:
        InputError: they do (the model is an encoder), or there are no hidden states, or not as many as layers.
    """
    states = hidden_states(trunk, _few_tokens(trunk))
    if len(states) != num_layers + 1:
        raise InputError(
            f"{type(trunk).__name__} has {num_layers} layers and returns {len(states)} hidden states, where one more "
            f"than layers is expected: {_INSTEAD}."
        )
    last = states[-1].float()
    rounding = 8 * torch.finfo(states[-1].dtype).eps * last.abs().max()
    if (last[0, :3] - last[1, :3]).abs().max() > rounding:
        raise InputError(
            f"{type(trunk).__name__} is an encoder: its state at a token depends on later tokens, so that it is no "
            f"state of a prefix. Please {_INSTEAD}."
        )

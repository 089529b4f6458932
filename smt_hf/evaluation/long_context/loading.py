"""A checkpoint as a model, a tokenizer and what results have to say of both."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from smt_hf.errors import InputError
from smt_hf.evaluation.text import is_byte_tokenizer
from smt_hf.student import SMTRecurrentConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# Models whose configuration names a number of positions that does not limit them: it is a window for evaluation tools,
# or of a single forward of training.
_WITHOUT_LIMIT = (SMTRecurrentConfig.model_type, "rwkv")
# What configurations call the number of positions that a model has.
_LIMITS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
_SENTENCE = "The number of the box is 48127."
_VALUES_HASHED = 4096  # of a tensor
_CHARACTERS_BEFORE = 200  # of a prompt, with which a text after it is split into tokens


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model in evaluation mode, with its tokenizer."""

    name: str  # folder or Hub repository
    model: Any
    tokenizer: PreTrainedTokenizerBase

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.encoded(text))

    def encoded(self, text: str) -> list[int]:
        """A text as tokens, without special ones in front of it."""
        plain = {"add_special_tokens": False, "return_attention_mask": False}
        return self.tokenizer(text, verbose=False, **plain)["input_ids"]

    def prompt(self, text: str) -> list[int]:
        """A prompt as tokens, behind the token of the beginning if the tokenizer puts one there."""
        ids = self.tokenizer(text, verbose=False, return_attention_mask=False)["input_ids"]
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def continuation(self, prompt: str, text: str) -> tuple[list[int], int]:
        """A text as the tokens that follow a prompt.

        Returns:
            The tokens, and how many at their beginning are white space alone: knowing them is knowing nothing.
        """
        end = prompt[-_CHARACTERS_BEFORE:]
        before, whole = self.encoded(end), self.encoded(end + text)
        ids = whole[len(before) :] if whole[: len(before)] == before else self.encoded(text)
        num_spaces = 0
        while num_spaces < len(ids) - 1 and self.tokenizer.decode(ids[num_spaces]).isspace():
            num_spaces += 1
        return ids, num_spaces

    @property
    def length_unit(self) -> str:
        """What lengths are counted in."""
        return "bytes" if is_byte_tokenizer(self.tokenizer) else "tokens"

    @property
    def ends(self) -> set[int]:
        """The tokens that end a text."""
        ids: set[int] = set()
        for source in (self.tokenizer, self.model.generation_config):
            found = getattr(source, "eos_token_id", None)
            ids |= set(found) if isinstance(found, list) else {found} if found is not None else set()
        return ids

    @property
    def most_tokens(self) -> int | None:
        """As many positions as the model has; `None` where nothing limits them, as in a student of ours."""
        config = self.model.config.get_text_config()
        if config.model_type in _WITHOUT_LIMIT:
            return None
        return next((getattr(config, name) for name in _LIMITS if isinstance(getattr(config, name, None), int)), None)

    def check_length(self, num_tokens: int) -> None:
        """Refuse what the model has no positions for: a prompt is never cut.

        Raises:
            InputError: prompt and answer have more tokens than the model has positions.
        """
        if self.most_tokens is not None and num_tokens > self.most_tokens:
            raise InputError(
                f"{self.name} has {self.most_tokens:,} positions, and prompt and answer have {num_tokens:,} tokens. "
                "Prompts are not cut: leave out the length, or take a model with more positions."
            )

    def weights_digest(self) -> str:
        """A hash that tells the weights from others of the same shapes: of some values of every tensor."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            values = tensor.detach().flatten()
            values = values[:: max(len(values) // _VALUES_HASHED, 1)].float().cpu().numpy()
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + values.tobytes())
        return digest.hexdigest()[:16]


def load_language_model(
    checkpoint: str, tokenizer_name: str | None = None, device: str | None = None, dtype: str = "float32"
) -> LanguageModel:
    """Load what `AutoModelForCausalLM` and `AutoTokenizer` load. Students need no remote code.

    Args:
        checkpoint: folder or Hub repository.
        tokenizer_name: likewise; default: the checkpoint.
        device: default: cuda if there is one.
        dtype: name of a floating-point type of torch.

    Raises:
        InputError: there is none, it is damaged or lacks weights, or the tokenizer is missing or of another model.
    """
    if dtype not in _DTYPES:
        raise InputError(f"unknown `dtype` {dtype!r}: choose one of {', '.join(_DTYPES)}.")
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"there is no `device` {device!r} here: {str(error).splitlines()[0]}") from error
    try:
        model, report = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=_DTYPES[dtype], output_loading_info=True)
    except Exception as error:  # the readers of JSON and safetensors raise their own
        raise InputError(
            f"no causal language model could be loaded from {checkpoint!r}: give a folder that `save_pretrained` has "
            f"written (the `student` folder of a run), or a Hub repository. ({_first_line(error)})"
        ) from error
    if report["missing_keys"] or report["mismatched_keys"]:
        wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise InputError(f"{checkpoint!r} lacks weights of its configuration: {', '.join(wrong[:5])}.")
    tokenizer = _tokenizer(tokenizer_name or checkpoint, model.get_input_embeddings().num_embeddings)
    return LanguageModel(checkpoint, model.to(place).eval(), tokenizer)


def _tokenizer(name: str, num_embeddings: int) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise InputError(
            f"no tokenizer could be loaded from {name!r}: save the model's there, or name one by `--tokenizer_name`. "
            f"({_first_line(error)})"
        ) from error
    ids = tokenizer(_SENTENCE)["input_ids"]
    if "48127" not in tokenizer.decode(ids):  # of a folder without its files, transformers makes one of no words
        raise InputError(
            f"the tokenizer of {name!r} cannot write text (it makes {len(ids)} tokens of {_SENTENCE!r} and loses the "
            "number): give a model of text, or name its tokenizer by `--tokenizer_name`."
        )
    if len(tokenizer) > num_embeddings:
        raise InputError(
            f"the tokenizer of {name!r} has {len(tokenizer):,} tokens, the model {num_embeddings:,} embeddings: they "
            "do not belong together. Name the model's tokenizer by `--tokenizer_name`."
        )
    return tokenizer


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

"""The language that a teacher's model speaks already: its tokenizer, whether another one has the same tokens, and the
tokens that end its texts."""

import contextlib
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from smt_hf.errors import InputError
from smt_hf.teachers import SMTPretrainedTeacherConfig, teacher_type
from smt_hf.teachers.loading import describe, tokenizer_of

_SHOWN = 3  # tokens that a message names


def _model_of(teacher: Mapping[str, Any]) -> tuple[str, str | None, str | None] | None:
    """Name, revision and GGUF file of the model that fields of a teacher name, if they do."""
    name = teacher.get("model_name_or_path")
    if name is None or teacher_type(teacher) != SMTPretrainedTeacherConfig.model_type:
        return None
    return name, teacher.get("revision"), teacher.get("gguf_file")


def teacher_tokenizer(teacher: Mapping[str, Any]):
    """The tokenizer of the model that fields of a teacher name; `None` if they name no model.

    Raises:
        InputError: there is no such model, or it comes without a tokenizer.
    """
    model = _model_of(teacher)
    if model is None:
        return None
    tokenizer = tokenizer_of(*model)
    if tokenizer is None:
        describe(*model)  # says what is wrong with the model itself
        raise InputError(
            f"the teacher's model {model[0]} comes without a tokenizer that loads: name the one that it was trained "
            "with by `tokenizer_name`."
        )
    return tokenizer


def check_tokenizer(tokenizer, teacher: PreTrainedConfig | None) -> None:
    """Refuse a tokenizer whose tokens are others to the teacher's model.

    Tokens behind the last one of the model's own tokenizer, as a padding token that was added, may be anything that the
    model has an embedding for. A model without a tokenizer is believed.

    Raises:
        InputError: with some of the tokens, and what to pass.
    """
    model = _model_of(teacher.to_dict()) if isinstance(teacher, SMTPretrainedTeacherConfig) else None
    known = None if model is None else tokenizer_of(*model)
    if model is None or known is None:
        return
    theirs = {number: token for token, number in known.get_vocab().items()}
    given = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    others = [(number, token) for number, token in given if theirs.get(number, token) != token]
    if others:
        shown = ", ".join(f"{number} is {token!r}, not {theirs[number]!r}" for number, token in others[:_SHOWN])
        raise InputError(
            f"the tokenizer does not match the vocabulary of the teacher's model {model[0]}: {len(others)} of "
            f"{len(given)} tokens differ ({shown}). Leave `tokenizer_name` and `task` out, so that the text is read by "
            "the model's own tokenizer."
        )


def end_tokens(tokenizer, teacher: PreTrainedConfig | None) -> int | list[int] | None:
    """What ends a generated text: the tokenizer's end-of-text token; where the teacher's model has several that it is
    one of, as a chat model that also ends at the end of a turn, all of them."""
    if not isinstance(teacher, SMTPretrainedTeacherConfig):
        return tokenizer.eos_token_id
    theirs = (teacher.base_config or {}).get("eos_token_id")
    with contextlib.suppress(OSError, ValueError):  # it has no generation settings
        theirs = GenerationConfig.from_pretrained(teacher.model_name_or_path, revision=teacher.revision).eos_token_id
    if not isinstance(theirs, list) or tokenizer.eos_token_id not in theirs:  # a class's default, of another tokenizer
        return tokenizer.eos_token_id
    known = set(tokenizer.get_vocab().values())
    ends = [token for token in theirs if token in known]
    return ends if len(ends) > 1 else ends[0]

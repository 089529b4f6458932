"""Conversations, and prompts with completions, to rows of tokens whose answers alone are labelled."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError

from smt_hf.errors import InputError

from .packing import token_ids

# Columns of other conventions, and what to make of them.
_CONVERSIONS = {
    ("conversations",): "they look like ShareGPT's, so write each entry of `conversations` with `role` (`user` for "
    "`human`, `assistant` for `gpt`) and `content`, and name the column `messages`",
    ("instruction", "output"): "they look like Alpaca's, so join `instruction` and `input` in a column `prompt`, and "
    "name `output` `completion`",
}
_Tokens = tuple[list[int], list[int]]  # `input_ids` and `labels`


@dataclass(frozen=True)
class Instructions:
    """Rows of `input_ids` and `labels` (-100 where nothing is to be learned), one per example, and those left out."""

    rows: Dataset
    digest: str  # SHA-256 over all examples in order, the first 16 hex digits
    without_answer: list[str]  # places of examples that were left out
    too_long: list[str]  # likewise


def holds_instructions(column_names: Iterable[str]) -> bool:
    """Whether a table is one of `messages`, or of `prompt` and `completion`."""
    return "messages" in column_names or {"prompt", "completion"} <= set(column_names)


def check_columns(column_names: Iterable[str], text_column: str) -> None:
    """Refuse a table that is neither text nor instructions.

    Raises:
        InputError: which columns to make of those that are there.
    """
    names = list(column_names)
    if text_column in names or holds_instructions(names):
        return
    advices = [advice for columns, advice in _CONVERSIONS.items() if set(columns) <= set(names)]
    raise InputError(
        f"a table needs a column {text_column!r}, or `messages`, or `prompt` and `completion`; there are "
        f"{', '.join(names)}: {(advices or ['rename or convert yours'])[0]}."
    )


def tokenize_instructions(examples: Iterable[tuple[str, dict]], tokenizer, max_tokens: int) -> Instructions:
    """Rows of `messages` (a list of `role` and `content`), or of `prompt` and `completion` (each a text, or a list of
    messages), with `tools` where the chat template is to write them.

    Messages are written by the tokenizer's chat template, and so are prompts and completions where it has one, as a
    user's and an assistant's; the answers of the assistant are labelled, but for those in a prompt. Without a template
    a completion follows its prompt as it is, and the end-of-text token follows the completion.

    Args:
        examples: rows with the places where they stand.
        max_tokens: longer rows are left out, not cut: a cut answer has no end to learn.

    Raises:
        InputError: columns or a row of another form (named), messages or tools that the tokenizer has no chat template
            for, a row that the template refuses, or nothing left.
    """
    if tokenizer.chat_template is None and tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no `eos_token`, which ends a completion: set one before training.")
    rows, without_answer, too_long = [], [], []
    digest = hashlib.sha256()
    for place, example in examples:
        try:
            digest.update(json.dumps(example, sort_keys=True, ensure_ascii=False, default=str).encode())
        except UnicodeEncodeError as error:
            raise InputError(f"{place} holds half a character ({error.reason}).") from error
        ids, labels = _tokenized(place, example, tokenizer)
        if all(label == -100 for label in labels[1:]):
            without_answer.append(place)
        elif len(ids) > max_tokens:
            too_long.append(place)
        else:
            rows.append({"input_ids": ids, "labels": labels})
    if not rows:
        raise InputError(
            f"no example is left to learn: {len(without_answer)} have no answer, {len(too_long)} are longer than "
            f"{max_tokens} tokens (see `context_length`)."
        )
    return Instructions(Dataset.from_list(rows), digest.hexdigest()[:16], without_answer, too_long)


def _tokenized(place: str, example: dict, tokenizer) -> _Tokens:
    tools = _tools(place, example.get("tools"))
    if "messages" in example:
        prompt, completion = [], _messages(place, example, "messages")
    elif not holds_instructions(example):
        raise InputError(
            f"{place} has neither `messages` nor `prompt` and `completion`, but {', '.join(map(str, example))}."
        )
    elif all(isinstance(example[name], str | None) for name in ("prompt", "completion")):
        question, answer = example["prompt"], example["completion"]
        if question is None:
            raise InputError(f"{place}: `prompt` is null. Give an empty text where there is no prompt.")
        if not _says_something(answer):
            return [], []
        if tokenizer.chat_template is None:
            if tools is not None:
                raise InputError(f"{place} has `tools`, which a chat template writes, and the tokenizer has none.")
            (*before, _), after = token_ids([question, answer], tokenizer)["input_ids"]  # no end after the prompt
            return before + after, [-100] * len(before) + after
        prompt, completion = [{"role": "user", "content": question}], [{"role": "assistant", "content": answer}]
    else:
        prompt, completion = (_messages(place, example, name) for name in ("prompt", "completion"))
    if tokenizer.chat_template is None:
        raise InputError(
            f"{place} holds messages, which a chat template writes, and the tokenizer has none: set "
            "`tokenizer.chat_template` and save it with the checkpoint, or give `prompt` and `completion` as texts."
        )
    return _from_messages(place, prompt, completion, tools, tokenizer)


def _messages(place: str, example: dict, column: str) -> list[dict]:
    """The messages of a row, checked."""
    messages = example[column] or []
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        others = "" if column == "messages" else ", or both `prompt` and `completion` texts"
        raise InputError(f"{place}: `{column}` must be a list of messages with `role` and `content`{others}.")
    checked = []
    for number, message in enumerate(messages, start=1):
        known = _known(message)
        if not isinstance(known.get("role"), str):
            raise InputError(f"{place}: message {number} of `{column}` has no `role`, but {', '.join(known)}.")
        if "content" not in known and "tool_calls" not in known and known["role"] != "assistant":
            raise InputError(f"{place}: message {number} of `{column}` has no `content`.")
        checked.append({"content": "", **known})
    return checked


def _known(value: Any) -> Any:
    """Without keys that hold null, with which parquet fills what one row lacks and another has."""
    if isinstance(value, dict):
        return {key: _known(entry) for key, entry in value.items() if entry is not None}
    return [_known(entry) for entry in value] if isinstance(value, list) else value


def _tools(place: str, tools: Any) -> list | None:
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools or None
    except ValueError as error:
        raise InputError(f"{place}: `tools` is not valid JSON: {error}.") from error
    if tools is not None and not isinstance(tools, list):
        raise InputError(f"{place}: `tools` must be a list of functions, as JSON schema describes them.")
    return _known(tools)


def _from_messages(place: str, prompt: list, completion: list, tools: list | None, tokenizer) -> _Tokens:
    """Turn by turn: what the template adds for an assistant's message after its opening is what is learned.

    Pieces are told apart as text and tokenised one by one, so that what is read never depends on the answer. Special
    tokens in the text are taken for the template's own, as `apply_chat_template` does.
    """
    messages = prompt + completion
    ids: list[int] = []
    labels: list[int] = []
    written = ""
    for number, message in enumerate(completion, start=len(prompt)):
        if message["role"] != "assistant" or not (_says_something(message["content"]) or message.get("tool_calls")):
            continue
        opened = _written(place, messages[:number], tools, tokenizer, add_generation_prompt=True)
        closed = _written(place, messages[: number + 1], tools, tokenizer)
        if not closed.startswith(opened) or not opened.startswith(written):
            raise InputError(
                f"{place}: the chat template writes earlier turns otherwise once later ones follow, so that answers "
                "cannot be told apart. Give `prompt` and `completion`, one row per answer."
            )
        pieces = [opened[len(written) :], closed[len(opened) :]]
        read, learned = tokenizer(pieces, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        ids += read + learned
        labels += [-100] * len(read) + learned
        written = closed
    return ids, labels


def _says_something(content: Any) -> bool:
    return bool(content.strip() if isinstance(content, str) else content)


def _written(place: str, messages: list[dict], tools: list | None, tokenizer, **settings) -> str:
    try:
        writes_tools = not tools or "tools" in tokenizer.get_chat_template(tools=tools)
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **settings)
    except (TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:  # whatever a template raises
        raise InputError(f"{place}: the chat template refuses it: {error}") from error
    if not writes_tools:
        raise InputError(f"{place} has `tools`, and the chat template does not write them: leave the column out.")
    return text

"""Conversations, and prompts with completions, to rows of tokens whose answers alone are labelled."""

from dataclasses import dataclass

import numpy as np
from datasets import Dataset


@dataclass(frozen=True)
class Instructions:
    """Rows of `input_ids` and `labels` (-100 where nothing is to be learned), and what was left out.

    Args:
        rows: a row an example.
        num_too_long: examples left out because they are longer than asked for.
    """

    rows: Dataset
    num_too_long: int


def holds_instructions(column_names: list[str]) -> bool:
    """Whether a table is one of `messages`, or of `prompt` and `completion`."""
    return "messages" in column_names or {"prompt", "completion"} <= set(column_names)


def tokenize_instructions(examples: Dataset, tokenizer, max_tokens: int) -> Instructions:
    """Rows of `messages` (a list of `role` and `content`), or of `prompt` and `completion`.

    Messages are written by the tokenizer's chat template, and so are prompts and completions where it has one, as a
    user's and an assistant's; the answers of the assistant are labelled. Without a template a completion follows its
    prompt as it is, and the end-of-text token follows the completion.

    Args:
        examples: the table.
        max_tokens: longer rows are left out, not cut: half an answer is a wrong one.

    Raises:
        ValueError: no such columns, messages without a chat template, an example without an answer, or nothing left.
    """
    names = examples.column_names
    if not holds_instructions(names):
        raise ValueError(f"instructions need `messages`, or `prompt` and `completion`; there are {', '.join(names)}.")
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if "messages" in names and not has_template:
        raise ValueError(
            "`messages` are written by a chat template and the tokenizer has none: set `tokenizer.chat_template` and "
            "save it with the checkpoint, or give `prompt` and `completion`."
        )
    if not has_template and tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no `eos_token`, which ends a completion: set one before training.")
    rows, num_too_long = [], 0
    for number, example in enumerate(examples):
        if has_template:
            messages = example["messages"] if "messages" in names else _as_messages(example)
            ids, labels = _from_messages(messages, tokenizer, number)
        else:
            ids, labels = _from_pair(example["prompt"], example["completion"], tokenizer)
        if all(label == -100 for label in labels[1:]):
            raise ValueError(f"example {number} has no answer to learn: take it out.")
        if len(ids) > max_tokens:
            num_too_long += 1
        else:
            rows.append({"input_ids": ids, "labels": labels})
    if not rows:
        raise ValueError(
            f"every example is longer than {max_tokens} tokens: raise `context_length`, or give shorter ones."
        )
    return Instructions(Dataset.from_list(rows), num_too_long)


def _as_messages(example: dict) -> list[dict]:
    pair = (("user", example["prompt"]), ("assistant", example["completion"]))
    return [{"role": role, "content": content} for role, content in pair]


def _from_pair(prompt: str, completion: str, tokenizer) -> tuple[list[int], list[int]]:
    plain = {"add_special_tokens": False, "return_attention_mask": False, "split_special_tokens": True}
    before, after = (tokenizer(text, **plain)["input_ids"] for text in (prompt, completion))
    after = after + [tokenizer.eos_token_id]
    return before + after, [-100] * len(before) + after


def _from_messages(messages: list[dict], tokenizer, number: int) -> tuple[list[int], list[int]]:
    """Turn by turn: what the template adds for an assistant's message after its opening is what is learned.

    Pieces are told apart as text and tokenised one by one, so that what is read never depends on the answer. Special
    tokens in the text are taken for the template's own, as `apply_chat_template` does.
    """
    ids: list[int] = []
    labels: list[int] = []
    written = ""
    for end, message in enumerate(messages, start=1):
        if message["role"] != "assistant":
            continue
        opened = tokenizer.apply_chat_template(messages[: end - 1], tokenize=False, add_generation_prompt=True)
        closed = tokenizer.apply_chat_template(messages[:end], tokenize=False)
        if not closed.startswith(opened) or not opened.startswith(written):
            raise ValueError(
                f"example {number}: the chat template writes earlier turns otherwise once later ones follow, so that "
                "answers cannot be told apart. Give `prompt` and `completion`, a row an answer."
            )
        read, learned = (
            tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"]
            for text in (opened[len(written) :], closed[len(opened) :])
        )
        ids += read + learned
        labels += [-100] * len(read) + learned
        written = closed
    return ids, labels


def padded(rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """`input_ids` and `labels` `(N, longest)`, filled up at the end with 0 and -100."""
    longest = max(len(ids) for ids in rows["input_ids"])
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    labels = np.full_like(ids, -100)
    for number, row in enumerate(rows):
        ids[number, : len(row["input_ids"])] = row["input_ids"]
        labels[number, : len(row["labels"])] = row["labels"]
    return ids, labels

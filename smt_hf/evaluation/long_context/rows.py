"""Samples as rows of tokens to train on: a prompt, and what a model that knows the answer writes after it."""

import functools
from typing import Any

from smt_hf.evaluation.text import is_byte_tokenizer

from .sample import Count, Sample, Task
from .sizing import TooShort

_TRIES = 200  # samples, of which a row is the first that fits


def sample_row(task: Task, tokenizer: Any, num_tokens: int, index: int, seed: int) -> tuple[list[int], int] | None:
    """A row of a task's sample: its prompt, its completion and the end-of-text token.

    The haystack fills the row as far as its units allow. A task whose shortest prompt is longer than the row gives the
    end of that prompt, if all needles are in it.

    Args:
        num_tokens: most tokens of the row.
        index: of the row; another index gives another sample.

    Returns:
        The tokens, and how many of them are prompt; `None` if no sample was found that fits.

    Raises:
        InputError: of the task.
    """
    count = _counter(tokenizer)
    for number in range(index * _TRIES, (index + 1) * _TRIES):
        try:
            room = num_tokens - 1 + task.num_generated  # without the completion, whose length is not known yet
            completion = count(task.sample(room, number, seed, count).completion)
            sample = task.sample(room - completion, number, seed, count)
        except TooShort as short:
            sample = task.sample(short.smallest, number, seed, count)
        row = _row(sample, tokenizer, num_tokens)
        if row is not None:
            return row
    return None


def _row(sample: Sample, tokenizer: Any, num_tokens: int) -> tuple[list[int], int] | None:
    prompt, whole = _tokens(tokenizer, sample.prompt), _tokens(tokenizer, sample.prompt + sample.completion)
    # A tokenizer may join the last letters of the prompt and the first of the completion.
    num_shared = next((at for at, pair in enumerate(zip(prompt, whole)) if pair[0] != pair[1]), len(prompt))
    ids = [*whole, tokenizer.eos_token_id]
    surplus = len(ids) - num_tokens
    if surplus <= 0:
        return ids, num_shared
    if not sample.needles or _counter(tokenizer)(sample.prompt[: sample.needles[0].start]) < surplus:
        return None
    return ids[surplus:], num_shared - surplus


def _counter(tokenizer: Any) -> Count:
    if _is_byte_tokenizer(tokenizer):
        return lambda text: len(text.encode())
    return lambda text: len(_tokens(tokenizer, text))


_is_byte_tokenizer = functools.lru_cache(maxsize=1)(is_byte_tokenizer)  # asked for every row


def _tokens(tokenizer: Any, text: str) -> list[int]:
    # A text that spells a special token is text.
    plain = {"add_special_tokens": False, "return_attention_mask": False, "split_special_tokens": True}
    return tokenizer(text, verbose=False, **plain)["input_ids"]

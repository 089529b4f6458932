"""Instructions: what is read, what is learned, what is refused."""

import numpy as np
import pytest
from datasets import Dataset

from smt_hf.data import byte_tokenizer, padded, tokenize_instructions

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def learned(rows, tokenizer, number=0):
    """What is read, and the pieces that are learned."""
    row = rows[number]
    pieces = [[]]
    for label in row["labels"]:
        pieces[-1].append(label) if label != -100 else pieces.append([])
    return tokenizer.decode(row["input_ids"]), [tokenizer.decode(piece) for piece in pieces if piece]


def test_prompt_and_completion():
    tokenizer = byte_tokenizer()
    table = Dataset.from_list([{"prompt": "2+2=", "completion": "4"}, {"prompt": "", "completion": "hé"}])
    made = tokenize_instructions(table, tokenizer, 20)
    assert made.num_too_long == 0
    assert learned(made.rows, tokenizer) == ("2+2=4<|endoftext|>", ["4<|endoftext|>"])
    assert learned(made.rows, tokenizer, 1) == ("hé<|endoftext|>", ["hé<|endoftext|>"])
    ids, labels = padded(made.rows)
    assert ids.shape == labels.shape == (2, 6) and (labels[1, 4:] == -100).all() and (ids[1, 4:] == 0).all()
    assert np.array_equal(ids[labels != -100], labels[labels != -100])


def test_special_tokens_in_a_text_are_text():
    tokenizer = byte_tokenizer()
    table = Dataset.from_list([{"prompt": "<|endoftext|>", "completion": "x"}])
    ids = tokenize_instructions(table, tokenizer, 99).rows[0]["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1 and len(ids) == 13 + 1 + 1


def test_messages_by_the_chat_template():
    """Two answers of one conversation are learned, with their end; questions are not."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    turns = [("user", "a?"), ("assistant", "b"), ("user", "c?"), ("assistant", "d"), ("user", "e?")]
    table = Dataset.from_list([{"messages": [{"role": role, "content": content} for role, content in turns]}])
    text, pieces = learned(tokenize_instructions(table, tokenizer, 99).rows, tokenizer)
    assert text == "<user>a?</>\n<assistant>b</>\n<user>c?</>\n<assistant>d</>\n"
    assert pieces == ["b</>\n", "d</>\n"]
    pairs = Dataset.from_list([{"prompt": "a?", "completion": "b"}])
    assert learned(tokenize_instructions(pairs, tokenizer, 99).rows, tokenizer) == (
        "<user>a?</>\n<assistant>b</>\n",
        ["b</>\n"],
    )


def test_long_examples_are_left_out_whole():
    table = Dataset.from_list([{"prompt": "x" * size, "completion": "y"} for size in (3, 30, 5)])
    made = tokenize_instructions(table, byte_tokenizer(), 10)
    assert [len(row["input_ids"]) for row in made.rows] == [5, 7] and made.num_too_long == 1


@pytest.mark.parametrize(
    "rows, word",
    [
        ([{"question": "a"}], "there are question"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "chat template"),
        ([{"prompt": "x" * 40, "completion": "y"}], "context_length"),
    ],
)
def test_refusals(rows, word):
    with pytest.raises(ValueError, match=word):
        tokenize_instructions(Dataset.from_list(rows), byte_tokenizer(), 20)


def test_conversations_without_an_answer_and_templates_that_rewrite():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(ValueError, match="no answer"):
        tokenize_instructions(Dataset.from_list([{"messages": [{"role": "user", "content": "a"}]}]), tokenizer, 99)
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(ValueError, match="told apart"):
        tokenize_instructions(Dataset.from_list([{"prompt": "a", "completion": "b"}]), tokenizer, 99)

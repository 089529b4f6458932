"""Instructions: what is read, what is learned, what is refused."""

import json

import numpy as np
import pytest

from smt_hf.data import byte_tokenizer, collate
from smt_hf.data.instructions import check_columns, tokenize_instructions
from smt_hf.errors import InputError

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


TOOL_TEMPLATE = "{% if tools %}[{{ tools[0]['name'] }}]{% endif %}" + TEMPLATE


def made_of(*examples, template=None, max_tokens=99):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    placed = [(f"a.jsonl, line {number}", example) for number, example in enumerate(examples, start=1)]
    return tokenize_instructions(placed, tokenizer, max_tokens)


def conversation(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def learned(made, number=0):
    """What is read, and the pieces that are learned."""
    tokenizer, row = byte_tokenizer(), made.rows[number]
    pieces = [[]]
    for label in row["labels"]:
        pieces[-1].append(label) if label != -100 else pieces.append([])
    return tokenizer.decode(row["input_ids"]), [tokenizer.decode(piece) for piece in pieces if piece]


def test_prompt_and_completion():
    made = made_of({"prompt": "2+2=", "completion": "4"}, {"prompt": "", "completion": "h\xe9"})
    assert made.too_long == made.without_answer == []
    assert learned(made) == ("2+2=4<|endoftext|>", ["4<|endoftext|>"])
    assert learned(made, 1) == ("h\xe9<|endoftext|>", ["h\xe9<|endoftext|>"])
    batch = collate(list(made.rows))
    ids, labels = batch["input_ids"].numpy(), batch["labels"].numpy()
    assert ids.shape == labels.shape == (2, 6) and (labels[1, 4:] == -100).all() and (ids[1, 4:] == 0).all()
    assert np.array_equal(ids[labels != -100], labels[labels != -100])


def test_special_tokens_in_a_text_are_text():
    ids = made_of({"prompt": "<|endoftext|>", "completion": "x"}).rows[0]["input_ids"]
    assert ids.count(byte_tokenizer().eos_token_id) == 1 and len(ids) == 13 + 1 + 1


def test_messages_by_the_chat_template():
    """Two answers of one conversation are learned, with their end; questions, and answers in a prompt, are not."""
    turns = conversation(("user", "a?"), ("assistant", "b"), ("user", "c?"), ("assistant", "d"), ("user", "e?"))
    text = "<user>a?</>\n<assistant>b</>\n<user>c?</>\n<assistant>d</>\n"
    assert learned(made_of({"messages": turns}, template=TEMPLATE)) == (text, ["b</>\n", "d</>\n"])
    pair = {"prompt": turns[:3], "completion": turns[3:4]}
    assert learned(made_of(pair, template=TEMPLATE)) == (text, ["d</>\n"])
    texts = {"prompt": "a?", "completion": "b"}
    assert learned(made_of(texts, template=TEMPLATE)) == ("<user>a?</>\n<assistant>b</>\n", ["b</>\n"])


@pytest.mark.parametrize("as_json", [False, True])
def test_tools(as_json):
    tools = [{"name": "f", "parameters": {}}]
    example = {"messages": conversation(("user", "a?"), ("assistant", "b"))}
    example["tools"] = json.dumps(tools) if as_json else tools
    text, pieces = learned(made_of(example, {**example, "tools": None}, template=TOOL_TEMPLATE))
    assert text == "[f]<user>a?</>\n<assistant>b</>\n" and pieces == ["b</>\n"]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "id": None}], "name": None}
    written = "{{ message.content }}{{ message.tool_calls | tojson if 'tool_calls' in message }}"
    template = TOOL_TEMPLATE.replace("{{ message.content }}", written)
    answer = learned(made_of({"messages": [*example["messages"][:1], call]}, template=template))[1]
    assert answer == ['[{"name": "f"}]</>\n']


def test_long_examples_are_left_out_whole():
    made = made_of(*({"prompt": "x" * size, "completion": "y"} for size in (3, 30, 5)), max_tokens=10)
    assert [len(row["input_ids"]) for row in made.rows] == [5, 7] and made.too_long == ["a.jsonl, line 2"]


def test_examples_without_an_answer_are_left_out():
    made = made_of(
        {"prompt": "a", "completion": ""},
        {"prompt": "a", "completion": None},
        {"prompt": "a", "completion": " \n"},
        {"prompt": conversation(("user", "a")), "completion": []},
        {"messages": conversation(("user", "a"))},
        {"messages": conversation(("user", "a"), ("assistant", ""))},
        {"messages": None},
        {"messages": conversation(("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "c"))},
        template=TEMPLATE,
    )
    assert made.without_answer == [f"a.jsonl, line {number}" for number in range(1, 8)]
    assert learned(made)[1] == ["c</>\n"]


@pytest.mark.parametrize(
    "example, template, word",
    [
        ({"question": "a"}, None, "line 2 has neither `messages` nor .* but question"),
        ({"messages": conversation(("assistant", "a"))}, None, "line 2 holds messages.*chat_template"),
        (
            {"prompt": conversation(("user", "a")), "completion": conversation(("assistant", "a"))},
            None,
            "chat_template",
        ),
        (
            {"prompt": "a", "completion": conversation(("assistant", "a"))},
            TEMPLATE,
            "`prompt` must be a list of.*texts",
        ),
        ({"prompt": "a", "completion": 3}, None, "`prompt` must be a list"),
        ({"prompt": None, "completion": "a"}, None, "line 2: `prompt` is null"),
        ({"messages": "a"}, TEMPLATE, "line 2: `messages` must be a list"),
        ({"messages": [{"content": "a"}]}, TEMPLATE, "line 2: message 1 of `messages` has no `role`, but content"),
        ({"messages": [{"role": "user"}]}, TEMPLATE, "line 2: message 1 of `messages` has no `content`"),
        ({"prompt": "a", "completion": "b", "tools": [{}]}, None, "line 2 has `tools`, .* none"),
        ({"prompt": "a", "completion": "b", "tools": [{}]}, TEMPLATE, "does not write them"),
        ({"prompt": "a", "completion": "b", "tools": "{"}, TOOL_TEMPLATE, "`tools` is not valid JSON"),
        ({"prompt": "a", "completion": "b", "tools": {"a": 1}}, TOOL_TEMPLATE, "`tools` must be a list"),
        (
            {"prompt": "a", "completion": "b"},
            "{{ raise_exception('only pirates') }}",
            "line 1: .* refuses it: only pirates",
        ),
        ({"prompt": "a", "completion": "b"}, "{{ messages[0].content + 1 }}", "line 1: the chat template refuses it"),
        ({"prompt": "a", "completion": "b"}, "{{ messages | length }}" + TEMPLATE, "line 1: .* told apart"),
        ({"prompt": "a", "completion": "\ud800"}, None, "line 2 holds half a character"),
    ],
)
def test_a_faulty_row_is_named(example, template, word):
    with pytest.raises(InputError, match=word):
        made_of({"prompt": "a", "completion": "b"}, example, template=template)


def test_nothing_left():
    with pytest.raises(InputError, match=r"1 have no answer, 1 are longer than 20 tokens \(see `context_length`\)"):
        made_of({"prompt": "x" * 40, "completion": "y"}, {"prompt": "x", "completion": ""}, max_tokens=20)


def test_columns_of_other_conventions():
    for columns in (["text"], ["messages", "id"], ["completion", "prompt"]):
        check_columns(columns, "text")
    for columns, word in (
        (["id", "conversations"], "ShareGPT.*`human`.*`messages`"),
        (["instruction", "input", "output"], "Alpaca.*`prompt`.*`completion`"),
        (["question", "answer"], "`messages`, or `prompt` and `completion`; there are question, answer"),
    ):
        with pytest.raises(InputError, match=word):
            check_columns(columns, "text")

"""Samples as rows to train on."""

import copy

import pytest

from smt_hf.data import byte_tokenizer
from smt_hf.evaluation.long_context import LongContextSettings, sample_row, tasks_of
from smt_hf.evaluation.long_context.haystack import NOISE, _sentences

pytest.importorskip("wonderwords")
nltk = pytest.importorskip("nltk")


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe_tokenizer):
    if request.param == "bytes":
        return byte_tokenizer()
    tokenizer = copy.deepcopy(bpe_tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    return tokenizer


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2", "niah_multivalue", "qa1"])
def test_a_row_is_a_prompt_and_its_answer(name, book, tokenizer):
    suite = "babilong" if name == "qa1" else "ruler"
    (task,) = tasks_of(suite, [name], LongContextSettings("train", [str(book)]))
    num_tokens = 1500
    for index in range(4):
        ids, num_read = sample_row(task, tokenizer, num_tokens, index, seed=3)
        assert ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[:-1]
        prompt, answer = tokenizer.decode(ids[:num_read]), tokenizer.decode(ids[num_read:-1])
        unit = len(tokenizer(NOISE)["input_ids"]) + 1 if name == "niah_single_1" else 40
        assert num_tokens - unit < len(ids) <= num_tokens  # as full as units of haystack allow
        sample = task.sample(num_tokens + 200, index * 200, 3, lambda text: len(tokenizer(text)["input_ids"]))
        if suite == "ruler":  # the same needles at every length; stories are chosen by the length
            assert answer == sample.completion
            assert all(value in prompt for value in sample.answers)
        else:
            assert f"to the {answer.strip()}" in prompt and prompt.splitlines()[-1].startswith("Where is")


def test_a_short_row_is_the_end_of_a_prompt_and_has_its_needle():
    (task,) = tasks_of("ruler", ["niah_single_1"], LongContextSettings("train"))
    tokenizer = byte_tokenizer()
    ids, num_read = sample_row(task, tokenizer, 385, 0, seed=0)
    text = tokenizer.decode(ids)
    assert len(ids) == 385 and not text.startswith("A special magic number")
    answer = tokenizer.decode(ids[num_read:-1]).strip()
    assert f" is: {answer}." in text and text.endswith(f"is {answer}<|endoftext|>")
    assert sample_row(task, tokenizer, 200, 0, seed=0) is None  # needle and question alone are longer
    (chain,) = tasks_of("ruler", ["vt"], LongContextSettings("train"))
    assert sample_row(chain, tokenizer, 513, 0, seed=0) is None


def test_rows_differ_by_index_seed_and_split(book):
    tokenizer, rows = byte_tokenizer(), set()
    for split in ("train", "test"):
        (task,) = tasks_of("ruler", ["niah_single_2"], LongContextSettings(split, [str(book)]))
        for index, seed in ((0, 0), (1, 0), (0, 1)):
            rows.add(tuple(sample_row(task, tokenizer, 600, index, seed)[0]))
            assert sample_row(task, tokenizer, 600, index, seed) == sample_row(task, tokenizer, 600, index, seed)
    assert len(rows) == 6


def test_a_haystack_that_spells_a_special_token_is_text(tmp_path, tokenizer):
    (tmp_path / "book.txt").write_text("It ends with <|endoftext|> and goes on after that. " * 100)
    (task,) = tasks_of("ruler", ["niah_single_2"], LongContextSettings("train", [str(tmp_path / "book.txt")]))
    ids, _ = sample_row(task, tokenizer, 700, 0, seed=0)
    assert ids.index(tokenizer.eos_token_id) == len(ids) - 1 and 640 < len(ids) <= 700


@pytest.mark.parametrize("size", [1, 50, 777])
def test_sentences_are_the_same_piece_by_piece(book, size):
    cut = nltk.PunktSentenceTokenizer().tokenize
    text = " ".join(book.read_text().split())[: 20_000 if size > 1 else 300] + ' "Yes?" he said. No end'
    assert _sentences(text, cut, size) == cut(text)

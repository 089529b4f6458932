"""A made-up book, and two units of length: bytes, and the tokens of a small BPE tokenizer."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from smt_hf.data import byte_tokenizer
from smt_hf.evaluation.long_context import LongContextSettings
from smt_hf.evaluation.long_context.haystack import NOISE

SYLLABLES = ["ka", "lo", "mi", "ren", "sto", "tu", "va", "wel", "xi", "zan"]


def make_book(seed: int = 0, num_sentences: int = 300) -> str:
    """Sentences of 3 to 20 words, several in a line."""
    rng = random.Random(seed)
    sentences = []
    for _ in range(num_sentences):
        words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(rng.randint(3, 20))]
        sentences.append(" ".join(words).capitalize() + ".")
    return "\n".join(" ".join(sentences[start : start + 3]) for start in range(0, num_sentences, 3))


@pytest.fixture(scope="session")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("books") / "book.txt"
    path.write_text(make_book())
    return path


@pytest.fixture
def settings(book):
    return LongContextSettings(haystack=[str(book)])


@pytest.fixture(scope="session")
def bpe_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    question = "What is the special magic number mentioned in the provided text? One of the special magic numbers is:"
    tokenizer.train_from_iterator([make_book(), NOISE, question], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="session")
def count_bytes():
    tokenizer = byte_tokenizer()
    return lambda text: len(tokenizer(text)["input_ids"])


@pytest.fixture(scope="session")
def count_bpe(bpe_tokenizer):
    return lambda text: len(bpe_tokenizer(text)["input_ids"])


@pytest.fixture(params=["bytes", "bpe"])
def count(request, count_bytes, count_bpe):
    return count_bytes if request.param == "bytes" else count_bpe

"""Texts to hide needles in: books and essays of the caller, cut into sentences, and RULER's line of noise."""

import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

from smt_hf.data.files import find_files, rows_of, text_in
from smt_hf.errors import InputError

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

_PIECE = 200_000  # characters
# What Project Gutenberg puts around its books.
_GUTENBERG = re.compile(r"\*\*\* ?START OF TH[^\n]*\n(.*)\*\*\* ?END OF TH", re.DOTALL)


@dataclass(frozen=True)
class Haystack:
    """Sentences of all texts, in order; after the last comes the first again, so that a haystack has no end."""

    digest: str  # SHA-256 over the sentences, the first 16 hex digits
    sentences: tuple[str, ...] = field(repr=False)  # without line breaks; words are separated by single spaces

    def passage(self, start: int, num_words: int, keeps: Callable[[str], bool] = bool) -> list[str]:
        """Sentences from one on; the last is cut where `num_words` words are reached.

        Args:
            start: number of the first sentence.
            keeps: which sentences are taken.

        Raises:
            InputError: it takes no sentence.
        """
        chosen: list[str] = []
        missing = num_words
        for number in count(start):
            if missing <= 0:
                return chosen
            if number - start == len(self.sentences) and not chosen:
                raise InputError("the haystack has no sentence that is long enough: give `--haystack` another text.")
            sentence = self.sentences[number % len(self.sentences)]
            if keeps(sentence):
                chosen.append(" ".join(sentence.split(" ")[:missing]))
                missing -= sentence.count(" ") + 1
        raise AssertionError

    def filler(self, start: int, num_characters: int) -> str:
        """Exactly so many characters, from the beginning of a sentence on."""
        return " ".join(self.passage(start, num_characters))[:num_characters]


def noise_filler(num_characters: int) -> str:
    """Exactly so many characters of noise."""
    return ((NOISE + " ") * (num_characters // len(NOISE) + 1))[:num_characters]


def read_haystack(files: Sequence[str]) -> Haystack:
    """The sentences of text files, or of the column `text` of tables.

    Sentences end where NLTK's Punkt without a trained model says, which is BABILong's way. What Project Gutenberg
    writes before and after a book is left out.

    Raises:
        InputError: nothing found, or no text in it; NLTK is not installed.
    """
    return _haystack(tuple(files))


@functools.lru_cache(maxsize=4)
def _haystack(files: tuple[str, ...]) -> Haystack:
    try:
        from nltk import PunktSentenceTokenizer
    except ImportError as error:
        message = 'a haystack is cut into sentences by the package `nltk`: pip install "smt_hf[eval]".'
        raise InputError(message) from error
    paths, table_format = find_files(files)
    splitter = PunktSentenceTokenizer()
    sentences: list[str] = []
    for path in paths:
        for place, row in rows_of(path, table_format, "text"):
            text = text_in(place, row, "text")
            book = _GUTENBERG.search(text)
            sentences += _sentences(" ".join((book[1] if book else text).split()), splitter.tokenize)
    if not sentences:
        raise InputError(f"there is no text in {', '.join(files)}, which `--haystack` names.")
    return Haystack(hashlib.sha256("\n".join(sentences).encode()).hexdigest()[:16], tuple(sentences))


def _sentences(text: str, cut: Callable[[str], list[str]], size: int = _PIECE) -> list[str]:
    """What `cut` makes of the text, piece by piece: NLTK gives up on a text that takes it longer than some seconds.

    The last sentence of a piece may go on in the next piece, so it is cut again with it.
    """
    sentences: list[str] = []
    begin = 0  # of what is not cut yet
    end = size
    while end < len(text):
        found = cut(text[begin:end])
        if len(found) > 1:
            sentences += found[:-1]
            begin = text.rindex(found[-1], begin, end)
        end += size
    return sentences + cut(text[begin:])

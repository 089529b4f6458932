"""What keys and values are made of, in two halves: what is of the half `train` never occurs in a test.

A hash of each word, name, number and story says of which half it is, so the halves need no lists. Words are those of
the package `wonderwords`, as in RULER.
"""

import functools
import hashlib
import random
import string
import uuid
from collections.abc import Callable, Collection

from smt_hf.errors import InputError

SPLITS = ("train", "test", "all")


def generator(*parts) -> random.Random:
    """A random generator whose draws depend on the parts and on nothing else."""
    return random.Random("\n".join(map(str, parts)))


@functools.lru_cache(maxsize=8)
def shuffled(number: int, seed: int) -> tuple[int, ...]:
    """The numbers below `number` in an order that depends on the seed."""
    return tuple(generator("order", seed).sample(range(number), number))


def belongs(text: str, split: str) -> bool:
    """Whether a text is of a split; every text is of `all`, and of either `train` or `test`."""
    if split == "all":
        return True
    is_train = hashlib.sha256(text.encode()).digest()[0] % 2 == 0
    return is_train == (split == "train")


def drawn(draw: Callable[[], str], split: str, apart_from: Collection[str] = ()) -> str:
    """The first draw that is of the split and not among some other texts."""
    while True:
        text = draw()
        if belongs(text, split) and text not in apart_from:
            return text


@functools.cache
def words(split: str, *kinds: str) -> tuple[str, ...]:
    """The words of a split, sorted.

    Args:
        kinds: of `nouns`, `adjectives` and `verbs`.

    Raises:
        InputError: `wonderwords` is not installed.
    """
    try:
        from wonderwords import Defaults, RandomWord
    except ImportError as error:
        message = 'the words of RULER come from the package `wonderwords`: pip install "smt_hf[eval]".'
        raise InputError(message) from error
    lists = {kind: Defaults[kind.upper()] for kind in kinds}
    return tuple(sorted(word for word in set(RandomWord(**lists).filter()) if belongs(word, split)))


def draw_key(rng: random.Random, split: str, apart_from: Collection[str] = ()) -> str:
    """`adjective-noun`, both of the split."""
    adjectives, nouns = words(split, "adjectives"), words(split, "nouns")
    return drawn(lambda: f"{rng.choice(adjectives)}-{rng.choice(nouns)}", "all", apart_from)


def draw_number(rng: random.Random, split: str, apart_from: Collection[str] = ()) -> str:
    """A number of seven digits."""
    return drawn(lambda: str(rng.randint(1_000_000, 9_999_999)), split, apart_from)


def draw_uuid(rng: random.Random, split: str, apart_from: Collection[str] = ()) -> str:
    """A UUID of version 4."""
    return drawn(lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4)), split, apart_from)


def draw_name(rng: random.Random, split: str, num_letters: int, apart_from: Collection[str] = ()) -> str:
    """A name of capitals."""
    return drawn(lambda: "".join(rng.choices(string.ascii_uppercase, k=num_letters)), split, apart_from)


def draw_coded_word(rng: random.Random, split: str, apart_from: Collection[str] = ()) -> str:
    """A word of six small letters."""
    return drawn(lambda: "".join(rng.choices(string.ascii_lowercase, k=6)), split, apart_from)

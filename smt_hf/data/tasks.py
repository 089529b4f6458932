"""Synthetic probes of what a memory holds: retrieval, copying, a stack, key-value pairs, modular arithmetic, parity.

All rows of one (task, difficulty) have the same number of tokens. A row's tokens are random except for its answers,
which follow from the tokens before them. Only the answers are labelled, so that accuracy on the labels is accuracy on
the task. Answers are independent and uniform over the admissible ones, so that a guess made without reading the row
reaches `chance` and no more.
"""

import difflib
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Sequence, Value

from smt_hf.errors import InputError

_LABELLED_TOKENS = Features({"input_ids": Sequence(Value("int32")), "labels": Sequence(Value("int32"))})
_NUM_VALUES = 8
_NUM_KEYS = 32
_NUM_EXAMPLES = 8  # pairs per row of modular arithmetic

_Rows = tuple[np.ndarray, np.ndarray]  # tokens, and where they are answers: both (num_rows, T + 1)


def labelled_rows(input_ids: np.ndarray, labels: np.ndarray) -> Dataset:
    """Rows of equal length as a dataset of `input_ids` and `labels`, int32, in numpy format.

    Args:
        input_ids: `(num_rows, T + 1)` tokens.
        labels: `(num_rows, T + 1)`, aligned with the tokens and not shifted; -100 where nothing is to be predicted.
    """
    ends = np.arange(len(input_ids) + 1, dtype=np.int32) * input_ids.shape[1]
    flat = {"input_ids": input_ids.astype(np.int32).ravel(), "labels": labels.astype(np.int32).ravel()}
    columns = {name: pa.ListArray.from_arrays(ends, pa.array(tokens)) for name, tokens in flat.items()}
    return Dataset.from_dict(columns, features=_LABELLED_TOKENS).with_format("numpy")


def retrieval_rows(length: int, num_rows: int, rng: np.random.Generator) -> _Rows:
    """Values 1..8 with one needle (marker 0 and the value after it) in the first half. The row ends with the marker
    and, as its answer, the needle's value.

    The two tokens of the needle lie at any place of the first `length // 2` tokens with equal probability.
    """
    ids = rng.integers(1, _NUM_VALUES + 1, (num_rows, length + 1))
    rows, needle = np.arange(num_rows), rng.integers(0, length // 2 - 1, num_rows)
    ids[rows, needle] = 0
    ids[:, -2] = 0
    ids[:, -1] = ids[rows, needle + 1]
    return ids, _at(ids, [-1])


def string_copy_rows(length: int, num_rows: int, rng: np.random.Generator) -> _Rows:
    """A string of symbols 0..7, followed in half of the rows by 8 and the same string, and in the others by 9 and the
    reversed string."""
    string = rng.integers(0, _NUM_VALUES, (num_rows, length))
    is_reversed = rng.permutation(np.arange(num_rows) % 2)[:, None]
    ids = np.hstack([string, _NUM_VALUES + is_reversed, np.where(is_reversed, string[:, ::-1], string)])
    return ids, _at(ids, slice(length + 1, None))


def stack_rows(depth: int, num_rows: int, rng: np.random.Generator) -> _Rows:
    """Operations on a stack that is empty at the start and at the end. Tokens 0..7 push that value. Token 8 pops, and
    the popped value follows it as an answer.

    A row pushes and pops `3 * depth` values. Their order is drawn uniformly from the orders whose largest stack height
    is exactly `depth`.
    """
    num_moves = 6 * depth
    rows = np.arange(num_rows)
    ids = np.zeros((num_rows, 9 * depth), dtype=np.int64)
    is_answer = np.zeros(ids.shape, dtype=bool)
    values = rng.integers(0, _NUM_VALUES, (num_moves, num_rows))
    chances = rng.random((num_moves, num_rows))
    push_probabilities = _push_probabilities(depth, num_moves)
    stack = np.zeros((num_rows, depth), dtype=np.int64)
    height, place, has_been_full = (np.zeros(num_rows, dtype=np.int64) for _ in range(3))
    for move in range(num_moves):
        is_push = chances[move] < push_probabilities[move, has_been_full, height]
        pushing, popping = rows[is_push], rows[~is_push]
        stack[pushing, height[pushing]] = ids[pushing, place[pushing]] = values[move, pushing]
        ids[popping, place[popping]] = _NUM_VALUES
        ids[popping, place[popping] + 1] = stack[popping, height[popping] - 1]
        is_answer[popping, place[popping] + 1] = True
        height += np.where(is_push, 1, -1)
        place += np.where(is_push, 1, 2)
        has_been_full |= height == depth
    return ids, is_answer


def _push_probabilities(depth: int, num_moves: int) -> np.ndarray:
    """Among the admissible continuations of a row, the share that starts with a push: `(num_moves, 2, depth + 1)`.

    The indices are the number of moves made, whether the stack has been full before, and its height. Rows drawn move by
    move with these probabilities are uniform among the admissible rows, and none has to be rejected.
    """
    ways = np.zeros((2, depth + 1))  # admissible continuations, up to a factor: their number outgrows floats
    ways[1, 0] = 1
    shares = np.zeros((num_moves, 2, depth + 1))
    for move in reversed(range(num_moves)):
        after_push, after_pop = np.zeros_like(ways), np.zeros_like(ways)
        after_push[:, :-1] = ways[:, 1:]
        after_push[0, -2] = ways[1, -1]  # this push fills the stack
        after_pop[:, 1:] = ways[:, :-1]
        ways = after_push + after_pop
        shares[move] = np.divide(after_push, ways, out=np.zeros_like(ways), where=ways > 0)
        ways /= ways.max()
    return shares


def keys_values_rows(num_pairs: int, num_rows: int, rng: np.random.Generator) -> _Rows:
    """Pairs of a distinct key 8..39 and a value 0..7, followed by all keys again in random order, each with its value
    as the answer."""
    keys = np.argsort(rng.random((num_rows, _NUM_KEYS)), axis=1)[:, :num_pairs] + _NUM_VALUES
    pairs = np.stack([keys, rng.integers(0, _NUM_VALUES, keys.shape)], axis=2)
    order = np.argsort(rng.random(keys.shape), axis=1)
    asked = np.take_along_axis(pairs, order[:, :, None], axis=1)
    ids = np.hstack([pairs.reshape(num_rows, -1), asked.reshape(num_rows, -1)])
    return ids, _at(ids, slice(2 * num_pairs + 1, None, 2))


def modular_arithmetic_rows(modulus: int, num_rows: int, rng: np.random.Generator) -> _Rows:
    """Eight pairs of a number and its product with the row's hidden multiplier, modulo `modulus`; one token each.

    The first pair determines the multiplier, so that the seven products after it are answers. With a small modulus many
    numbers repeat, and their products can then be looked up instead of computed.
    """
    multiplier = rng.integers(1, modulus, (num_rows, 1))
    numbers = rng.integers(1, modulus, (num_rows, _NUM_EXAMPLES))
    ids = np.stack([numbers, multiplier * numbers % modulus], axis=2).reshape(num_rows, -1)
    return ids, _at(ids, slice(3, None, 2))


def parity_rows(length: int, num_rows: int, rng: np.random.Generator) -> _Rows:
    """Bits 0 and 1, the query 2, and as the answer 1 if the number of ones is odd, else 0."""
    bits = rng.integers(0, 2, (num_rows, length))
    ids = np.hstack([bits, np.full((num_rows, 1), 2), bits.sum(axis=1, keepdims=True) % 2])
    return ids, _at(ids, [-1])


def _at(ids: np.ndarray, places) -> np.ndarray:
    is_answer = np.zeros(ids.shape, dtype=bool)
    is_answer[:, places] = True
    return is_answer


@dataclass(frozen=True)
class TaskFamily:
    """A task at every difficulty."""

    # (difficulty, num_rows, rng) -> tokens and where they are answers, both (num_rows, T + 1).
    draw: Callable[[int, int, np.random.Generator], _Rows]
    meaning: str  # what the difficulty counts
    difficulties: tuple[int, int, int]  # the three standard ones
    vocab_size: int  # the same at every difficulty, so that a model can move from one to the next
    num_transitions: Callable[[int], int]  # T, given the difficulty
    num_answers: Callable[[int], int] = lambda difficulty: _NUM_VALUES  # admissible answers, given the difficulty
    smallest: int = 1  # valid difficulty; no largest one where it is `None`
    largest: int | None = None
    allowed: tuple[int, ...] | None = None  # all valid difficulties, if they are no range


TASKS: dict[str, TaskFamily] = {
    "retrieval": TaskFamily(
        retrieval_rows, "transitions", (32, 64, 128), _NUM_VALUES + 1, lambda length: length, smallest=4
    ),
    "string_copy": TaskFamily(
        string_copy_rows, "string length", (12, 24, 48), _NUM_VALUES + 2, lambda length: 2 * length, smallest=2
    ),
    "stack": TaskFamily(stack_rows, "depth", (4, 8, 12), _NUM_VALUES + 1, lambda depth: 9 * depth - 1),
    "keys_values": TaskFamily(
        keys_values_rows, "pairs", (4, 8, 16), _NUM_VALUES + _NUM_KEYS, lambda pairs: 4 * pairs - 1, largest=_NUM_KEYS
    ),
    "modular_arithmetic": TaskFamily(
        modular_arithmetic_rows,
        "modulus",
        (5, 7, 11),
        11,
        lambda modulus: 2 * _NUM_EXAMPLES - 1,
        lambda modulus: modulus - 1,
        allowed=(3, 5, 7, 11),  # modulo a prime no product is 0, and every multiplier has an inverse
    ),
    "parity": TaskFamily(parity_rows, "bits", (16, 32, 64), 3, lambda length: length + 1, lambda length: 2),
}


@dataclass(frozen=True)
class TaskFacts:
    """What holds for all rows of a task at one difficulty.

    Attributes:
        vocab_size: the same at every difficulty.
        num_transitions: T; rows have T + 1 tokens.
        chance: accuracy of guessing uniformly among the admissible answers.
    """

    vocab_size: int
    num_transitions: int
    chance: float


def task_facts(name: str, difficulty: int) -> TaskFacts:
    """The facts of a task that do not depend on its rows.

    Raises:
        InputError: no task of this name, or a difficulty it does not have.
    """
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1, cutoff=0)[0]
        raise InputError(f"there is no task {name!r}: did you mean {close!r}? There are {', '.join(TASKS)}.")
    family = TASKS[name]
    bounds = f"{family.smallest} or more" if family.largest is None else f"{family.smallest} to {family.largest}"
    valid: Collection[int] = range(family.smallest, (family.largest or difficulty) + 1)
    if family.allowed is not None:
        bounds, valid = f"one of {', '.join(map(str, family.allowed))}", family.allowed
    if difficulty not in valid:
        raise InputError(
            f"the task {name!r} has no {family.meaning} {difficulty}: set `difficulty` to {bounds}. "
            f"{', '.join(map(str, family.difficulties))} are standard."
        )
    return TaskFacts(family.vocab_size, family.num_transitions(difficulty), 1 / family.num_answers(difficulty))


def load_task(name: str, difficulty: int, num_rows: int, seed: int) -> Dataset:
    """Rows of the task `TASKS[name]`: `input_ids` and `labels` of `T + 1` tokens each, int32, in numpy format.

    `labels[t] == input_ids[t]` where token `t` is an answer, to be predicted from the memory after `t` tokens, and -100
    elsewhere. Rows are a function of the arguments. Different seeds give independent rows, so that training and
    held-out rows only need different seeds. Where a difficulty has few distinct rows, as parity of 16 bits has, some
    rows are drawn under both seeds.

    Raises:
        InputError: no such task or difficulty, no rows, or a negative seed.
    """
    task_facts(name, difficulty)
    if num_rows < 1:
        raise InputError(f"cannot draw {num_rows} rows of the task {name!r}: set `num_rows` to 1 or more.")
    if seed < 0:
        raise InputError(f"cannot draw from the seed {seed}: set `seed` to 0 or more.")
    rng = np.random.default_rng([zlib.crc32(name.encode()), difficulty, seed])
    ids, is_answer = TASKS[name].draw(difficulty, num_rows, rng)
    return labelled_rows(ids, np.where(is_answer, ids, -100))

"""Exercises: rows of many short statements and questions about them, filled up with other text.

A document of a long-context suite has one question at its end. A training step then sees few answers, and all of them
are as hard as the task: students trained on such documents alone stayed at the accuracy of guessing
(model_cards/evidence). A row of an exercise has questions all over, easy and hard ones. The answers follow from the row
and are what is labelled.
"""

import string
from collections.abc import Callable
from random import Random

import numpy as np

from smt_hf.evaluation.long_context.stories import PEOPLE, World
from smt_hf.evaluation.long_context.variables import NUM_NAMES, TEMPLATE, assignments
from smt_hf.evaluation.long_context.vocabulary import belongs, draw_name, drawn, generator

Fill = Callable[[Random, int], str]  # so many characters of a text without statements

# What stands before and after the value of a key. A row has one way to say it, and one way to ask for it.
_STATEMENTS = (
    ("{key}: ", "."),
    ("{key} is: ", "."),
    ("{key}=", "."),
    ("{key} is ", "."),
    ("the code of {key} is: ", "."),
    ("One of the words for {key} is: ", "."),
)
_QUESTIONS = (
    ("{key}? ", "\n"),
    ("What is {key}? ", "\n"),
    ("What is the code of {key}? ", "\n"),
    ("the word for {key} mentioned in the text is ", "\n"),
    ("{key}: ", "\n"),
    ("{key} is ", "\n"),
    ("{key} is: ", "."),
)
_ASKED_AS_SAID = 0.3  # of the rows
_CHAIN_QUESTIONS = ("= {value}:", "{number} variables:", TEMPLATE[TEMPLATE.index("{number}") :].rstrip())
_LONGEST_NAME, _VALUE_DIGITS = 5, 5  # as in RULER
_MOST_KEYS, _LONGEST_KEY, _LONGEST_VALUE = 6, 8, 7  # of a row; letters
_LEAST_FILL = 20  # characters between two sentences
SHORT_ROW = 129  # tokens, of a level of 128 transitions; such rows are rarely filled up
# From these lengths on, random texts are of the half for training. Shorter ones are too few to divide.
_DIVIDED_NAMES, _DIVIDED_TEXTS = 3, 5
LEAST_TOKENS = 64  # of a row, in which every exercise has room for an answer
_ASKED_THINGS, _HANDLED = 0.7, 1 / 3  # of the questions and facts of a world with objects
_ELSEWHERE = 0.7  # of the questions, at least, are not about the room told last, if there is another to ask for
# Share of the short rows of `rooms` with brief facts: of people alone, nothing between them. Rows without a question
# are drawn again, which leaves about 0.7.
_BRIEF = 0.5
_BRIEF_FACTS = (("{name}: {room}. ", "{name}? "), ("{name} {room}. ", "{name}: "))


class _Row:
    """Bytes of a row, and which of them are answers."""

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens
        self.tokens: list[int] = []
        self.is_answer: list[bool] = []

    @property
    def is_full(self) -> bool:
        return len(self.tokens) >= self.num_tokens

    def add(self, text: str, is_answer: bool = False) -> None:
        encoded = text.encode()
        self.tokens += encoded
        self.is_answer += [is_answer] * len(encoded)


def recall(row: _Row, rng: Random, fill: Fill) -> None:
    """Keys of random letters with values of random digits or letters; some keys get another value later on.

    Number and lengths of keys and values, and the words around them, differ from row to row. The character after a
    value is labelled too, since it tells that the value has ended.
    """
    values: dict[str, str] = {}
    key_size, value_size = rng.randint(1, _LONGEST_KEY), rng.randint(1, _LONGEST_VALUE)
    num_keys, replaced = rng.randint(1, _MOST_KEYS), rng.choice((0.0, 0.0, 0.3))
    alphabet = rng.choice((string.digits, string.digits, string.ascii_lowercase))
    statement, question = rng.choice(_STATEMENTS), rng.choice(_QUESTIONS)
    if rng.random() < _ASKED_AS_SAID:
        question = statement
    filled = rng.choice((0.0, 0.0, 0.3, 0.6) if row.num_tokens <= SHORT_ROW else (0.3, 0.6, 0.9))
    while not row.is_full:
        if rng.random() < filled:
            row.add(fill(rng, _between(row, rng)) + "\n")
            continue
        has_room = len(values) < num_keys
        is_said = not values or (rng.random() < 0.5 and (has_room or replaced > 0))
        is_new = is_said and has_room and not (values and rng.random() < replaced)
        key = _text(rng, string.ascii_lowercase, key_size) if is_new else rng.choice(list(values))
        if is_new and key in values:
            continue
        if is_said:
            values[key] = _text(rng, alphabet, value_size)
        before, after = statement if is_said else question
        row.add(before.format(key=key))
        row.add(values[key] + after, is_answer=not is_said)
        if after != "\n":
            row.add("\n")


def rooms(row: _Row, rng: Random, fill: Fill) -> None:
    """A world of bAbI's tasks 1 and 2 with questions between its facts: where people are, and where objects are.

    A question may be asked again at once: easy ones are learned first. Most questions are not about the room that was
    told last: a student that always answers with that room has little to gain from looking up. Short rows hold more
    facts if these are brief.
    """
    world = World(rng)
    has_objects, asked = rng.random() < 0.5, rng.choice((0.3, 0.5, 0.7))
    is_short = row.num_tokens <= SHORT_ROW
    filled = rng.choice((0.0, 0.0, 0.3) if is_short else (0.0, 0.3, 0.6))
    fact, question = None, "Where is {name}? "
    if is_short and rng.random() < _BRIEF:
        has_objects, filled = False, 0.0
        fact, question = rng.choice(_BRIEF_FACTS)
    while not row.is_full:
        if rng.random() < filled:
            row.add(fill(rng, _between(row, rng)) + " ")
            continue
        if world.told and rng.random() < asked:
            things = [(f"the {thing}", found[0]) for thing, found in world.known_things().items()]
            if not (has_objects and things and rng.random() < _ASKED_THINGS):
                things = [(person, world.room_of[person]) for person in PEOPLE if person in world.told]
            if rng.random() < _ELSEWHERE:
                things = [(name, room) for name, room in things if room != _told_last(world)[1]]
            name, room = rng.choice(things) if things else ("", "")
            if name and belongs(" ".join([*world.facts, f"Where is {name}?"]), "train"):  # no story of a test
                row.add("\n" + question.format(name=name))
                row.add(room, is_answer=True)
                row.add("\n")
                continue
        if not (has_objects and rng.random() < _HANDLED and world.handle()):
            world.move()
        person, room = _told_last(world)
        row.add(fact.format(name=person, room=room) if fact else world.facts[-1] + " ")


def _told_last(world: World) -> tuple[str, str]:
    """Who is where, of the last fact about a person's room; empty before it."""
    person = max(world.told, key=lambda person: world.told[person], default="")
    return person, world.room_of.get(person, "")


def chains(row: _Row, rng: Random, fill: Fill) -> None:
    """Chains of assignments, as in RULER's variable tracking, each followed by the names that it gave its value to."""
    filled = rng.choice((0.0, 0.0, 0.3) if row.num_tokens <= SHORT_ROW else (0.0, 0.3, 0.6))
    question = rng.choice(_CHAIN_QUESTIONS)
    longest, most = rng.randint(1, _LONGEST_NAME), rng.randint(1, NUM_NAMES)
    split = "train" if longest >= _DIVIDED_NAMES else "all"
    values: list[str] = []
    while not row.is_full:
        names: list[str] = []
        for _ in range(rng.randint(1, most)):
            names.append(draw_name(rng, split, longest, names))
        # No two chains of a row have one value: the names of both would be right.
        value = drawn(lambda: _letters(rng, string.digits, _VALUE_DIGITS), "train", values)
        values.append(value)
        for assignment in assignments(names, value):
            while rng.random() < filled:
                row.add(fill(rng, _between(row, rng)) + "\n")
            row.add(assignment + "\n")
        row.add(question.format(value=value, number=len(names)) + " ")
        row.add(" " + " ".join(names) + "\n", is_answer=True)
        row.add("\n")


EXERCISES: dict[str, Callable[[_Row, Random, Fill], None]] = {"recall": recall, "rooms": rooms, "chains": chains}


def exercise_rows(name: str, num_tokens: int, num_rows: int, seed: int, fill: Fill) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels of an exercise, both `(num_rows, num_tokens)`; -100 where nothing is to be predicted.

    Every row has a label. A byte is a token.

    Args:
        name: out of `EXERCISES`.
        num_tokens: at least `LEAST_TOKENS`; one more than the transitions of a row.
        num_rows, seed: of the rows; another seed gives other rows.
        fill: text between statements.
    """
    ids = np.zeros((num_rows, num_tokens), dtype=np.int32)
    labels = np.full_like(ids, -100)
    for number in range(num_rows):
        rng = generator(name, seed, num_tokens, number)
        while not (labels[number] != -100).any():
            row = _Row(num_tokens)
            EXERCISES[name](row, rng, fill)
            ids[number] = row.tokens[:num_tokens]
            labels[number] = np.where(row.is_answer[:num_tokens], ids[number], -100)
    return ids, labels


def _between(row: _Row, rng: Random) -> int:
    """Characters between two sentences."""
    return rng.randint(_LEAST_FILL, max(_LEAST_FILL, row.num_tokens // 4))


def _text(rng: Random, alphabet: str, number: int) -> str:
    """So many random letters, of the half for training."""
    return drawn(lambda: _letters(rng, alphabet, number), "train" if number >= _DIVIDED_TEXTS else "all")


def _letters(rng: Random, alphabet: str, number: int) -> str:
    return "".join(rng.choices(alphabet, k=number))

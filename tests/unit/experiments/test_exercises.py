"""Rows of questions that follow from the row."""

import re
from random import Random

import numpy as np
import pytest

from smt_hf.evaluation.long_context.vocabulary import belongs
from smt_hf.experiments.subjects.exercises import EXERCISES, LEAST_TOKENS, exercise_rows

LENGTHS = (LEAST_TOKENS, 129, 700)


def fill(rng: Random, num_characters: int) -> str:
    return ("Nothing here matters. " * 100)[:num_characters]


def answers(ids: np.ndarray, labels: np.ndarray) -> list[tuple[str, str]]:
    """What stands before each answer of a row, and the answer."""
    is_answer = labels != -100
    starts = np.flatnonzero(is_answer & ~np.r_[False, is_answer[:-1]])
    ends = np.flatnonzero(is_answer & ~np.r_[is_answer[1:], False]) + 1
    text = bytes(ids.astype(np.uint8)).decode()
    return [(text[:start], text[start:end]) for start, end in zip(starts, ends)]


@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize("name", EXERCISES)
def test_rows(name, num_tokens):
    ids, labels = exercise_rows(name, num_tokens, 50, 3, fill)
    assert ids.shape == labels.shape == (50, num_tokens) and ids.max() < 256
    assert (labels != -100).any(axis=1).all()
    assert (labels[labels != -100] == ids[labels != -100]).all()
    again, other = exercise_rows(name, num_tokens, 50, 3, fill)[0], exercise_rows(name, num_tokens, 50, 4, fill)[0]
    assert (again == ids).all() and (other != ids).any(axis=1).all()


@pytest.mark.parametrize("name", EXERCISES)
def test_longer_rows_are_filled_up(name):
    def filled(num_tokens):
        ids, _ = exercise_rows(name, num_tokens, 200, 3, fill)
        return sum(b"Nothing here" in bytes(row.astype(np.uint8)) for row in ids)

    assert 5 < filled(129) < filled(130) - 10  # the longest of the short rows


def test_recall_asks_for_what_was_said_last():
    num_replaced = num_asked = 0
    for number in range(200):
        ids, labels = exercise_rows("recall", 400, 1, number, fill)
        for before, answer in answers(ids[0], labels[0]):
            if len(before) + len(answer) == 400:
                continue  # cut off at the end of the row
            key = re.findall(r"(?:^|[\s=])([a-z]{1,8})(?: is: | is |: |=|\? | mentioned in the text is )$", before)[-1]
            value = re.escape(answer.rstrip(".\n"))
            said = re.findall(rf"(?:^|[ \n]){key}(?: is: | is |: |=)([0-9a-z]+)\.", before)
            assert said and re.fullmatch(value, said[-1]), (before, answer)
            assert answer[-1] in ".\n"
            num_asked += 1
            num_replaced += len(set(said)) > 1
            assert all(belongs(text, "train") for text in (key, said[-1]) if len(text) >= 5)
    assert num_asked > 500 and num_replaced > 20


def test_chains_asks_for_all_names_of_the_last_chain():
    longest = 0
    for number in range(100):
        ids, labels = exercise_rows("chains", 400, 1, number, fill)
        for before, answer in answers(ids[0], labels[0]):
            since = before.rsplit("\n\n", 1)[-1]
            names = re.findall(r"VAR ([A-Z]+) = ", since)
            (value,) = re.findall(r"VAR [A-Z]+ = (\d+)\n", since)
            assert re.findall(r"= VAR ([A-Z]+) \n", since) == names[:-1]
            assert f" {' '.join(names)}\n".startswith(answer) and re.search(rf"{value}|{len(names)} variables:", since)
            assert belongs(value, "train") and all(belongs(name, "train") for name in names if len(name) >= 3)
            assert before.count(f"= {value}\n") == 1
            longest = max(longest, len(names))
    assert longest == 5


def test_rooms_asks_where_people_and_objects_are():
    things = 0
    for number in range(200):
        ids, labels = exercise_rows("rooms", 500, 1, number, fill)
        for before, answer in answers(ids[0], labels[0]):
            name = re.findall(r"\nWhere is (?:the )?(\w+)\? $", before)[0]
            facts = re.sub(r"\nWhere is [^\n]*\n", "", before.rsplit("\n", 1)[0] + "\n")
            story = re.findall(r"(?:John|Mary|Sandra|Daniel) [a-z ]+?\.", facts)
            thing = "the " if name.islower() else ""
            assert belongs(" ".join([*story, f"Where is {thing}{name}?"]), "train")
            told = re.findall(r"(John|Mary|Sandra|Daniel) [a-z ]+? the (\w+?)(?: there)?\.", facts)
            room_of, carried, dropped = {}, {}, {}
            for person, where in told:
                if where in ("apple", "football", "milk"):
                    carried[where] = None if carried.get(where) == person else person
                    dropped[where] = room_of.get(person)
                else:
                    room_of[person] = where
            if name in room_of:
                room = room_of[name]
            else:
                things += 1
                room = room_of[carried[name]] if carried[name] else dropped[name]
            assert room.startswith(answer), before
    assert things > 50


def test_brief_facts_of_rooms():
    """Half of the short rows have them, and more of those that have a question; no longer row has them."""
    brief = {number: exercise_rows("rooms", number, 200, 3, fill) for number in (129, 130)}
    found = {}
    for number, (ids, labels) in brief.items():
        found[number] = 0
        for row, row_labels in zip(ids, labels):
            pairs = answers(row, row_labels)
            if not re.match(r"(?:John|Mary|Sandra|Daniel):? \w+\. ", pairs[0][0]):
                continue
            found[number] += 1
            for before, answer in pairs:
                (name,) = re.findall(r"\n(\w+)[?:] $", before)
                told = re.findall(rf"{name}:? (\w+)\. ", before)
                assert told[-1].startswith(answer), before
    assert 100 < found[129] < 170 and not found[130]


def test_most_questions_of_rooms_are_not_about_the_room_told_last():
    last = []
    for number in range(200):
        ids, labels = exercise_rows("rooms", 400, 1, number, fill)
        for before, answer in answers(ids[0], labels[0]):
            rooms = re.findall(r"(?:John|Mary|Sandra|Daniel) [a-z ]+? the (?!apple|football|milk)(\w+)\.", before)
            last.append(rooms[-1].startswith(answer))
    assert len(last) > 500 and 0.1 < sum(last) / len(last) < 0.3

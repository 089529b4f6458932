"""Synthetic tasks against solvers that read a row token by token."""

import itertools

import numpy as np
import pytest

from smt_hf.data import TASKS, load_task, task_facts
from smt_hf.data.tasks import stack_rows

SETTINGS = [(name, difficulty) for name, family in TASKS.items() for difficulty in family.difficulties]
EXTREMES = [
    ("retrieval", 4),
    ("retrieval", 7),
    ("string_copy", 2),
    ("stack", 1),
    ("stack", 2),
    ("keys_values", 1),
    ("keys_values", 32),
    ("modular_arithmetic", 3),
    ("parity", 1),
]


def arrays(name, difficulty, num_rows=400, seed=0):
    rows = load_task(name, difficulty, num_rows, seed)[:]
    return np.stack(rows["input_ids"]), np.stack(rows["labels"])


def solve_retrieval(seen, difficulty):
    return seen[seen.index(0) + 1] if len(seen) == difficulty else None


def solve_string_copy(seen, difficulty):
    markers = [place for place, token in enumerate(seen) if token in (8, 9)]
    if not markers:
        return None
    string, done = seen[: markers[0]], len(seen) - markers[0] - 1
    return (string if seen[markers[0]] == 8 else string[::-1])[done]


def solve_stack(seen, difficulty):
    stack, tokens, popped = [], iter(seen), None
    for token in tokens:
        if token == 8:
            popped = stack.pop()
            if next(tokens, None) is None:
                return popped
        else:
            stack.append(token)
    return None


def solve_keys_values(seen, difficulty):
    if len(seen) % 2 == 0:
        return None
    return dict(zip(seen[:-1:2], seen[1::2])).get(seen[-1])


def solve_modular_arithmetic(seen, difficulty):
    if len(seen) < 3 or len(seen) % 2 == 0:
        return None
    (multiplier,) = (u for u in range(1, difficulty) if u * seen[0] % difficulty == seen[1])
    return multiplier * seen[-1] % difficulty


def solve_parity(seen, difficulty):
    return seen.count(1) % 2 if seen[-1:] == [2] else None


@pytest.mark.parametrize("name, difficulty", SETTINGS + EXTREMES)
def test_the_solver_is_always_right(name, difficulty):
    """And has an answer exactly where there is a label."""
    solve = globals()[f"solve_{name}"]
    for ids, labels in zip(*arrays(name, difficulty, num_rows=60)):
        answers = [solve(ids[:t].tolist(), difficulty) for t in range(len(ids))]
        assert [-100 if answer is None else answer for answer in answers] == labels.tolist()


@pytest.mark.parametrize("name, difficulty", SETTINGS + EXTREMES)
def test_shapes_and_labels(name, difficulty):
    facts = task_facts(name, difficulty)
    rows = load_task(name, difficulty, 50, seed=1)
    assert rows.column_names == ["input_ids", "labels"] and rows.format["type"] == "numpy"
    assert all(feature.feature.dtype == "int32" for feature in rows.features.values())
    ids, labels = arrays(name, difficulty)
    assert ids.shape == labels.shape == (400, facts.num_transitions + 1)
    assert ids.min() >= 0 and ids.max() < facts.vocab_size
    is_answer = labels != -100
    assert is_answer.any(axis=1).all() and (labels[is_answer] == ids[is_answer]).all()


@pytest.mark.parametrize("name, difficulty", SETTINGS)
def test_guessing_is_at_chance(name, difficulty):
    facts = task_facts(name, difficulty)
    _, labels = arrays(name, difficulty, num_rows=2000)
    answers = labels[labels != -100]
    admissible = np.unique(answers)
    assert facts.chance == 1 / len(admissible)
    guesses = np.random.default_rng(1).choice(admissible, answers.shape)
    error = np.sqrt(facts.chance * (1 - facts.chance) / len(answers))
    for guess in (guesses, *admissible):
        assert abs(np.mean(answers == guess) - facts.chance) < 4.5 * error


@pytest.mark.parametrize("name", TASKS)
def test_seeds(name):
    difficulty = TASKS[name].difficulties[1]
    first, again = arrays(name, difficulty, seed=3), arrays(name, difficulty, seed=3)
    assert all((a == b).all() for a, b in zip(first, again))
    other = arrays(name, difficulty, seed=4)[0]
    assert not {tuple(row) for row in first[0].tolist()} & {tuple(row) for row in other.tolist()}
    sizes = {task_facts(name, difficulty).vocab_size for difficulty in TASKS[name].difficulties}
    assert len(sizes) == 1


def test_needles_are_uniform_in_the_first_half():
    ids, _ = arrays("retrieval", 32, num_rows=6000)
    assert ((ids == 0).sum(axis=1) == 2).all() and (ids[:, 31] == 0).all()
    counts = np.bincount((ids == 0).argmax(axis=1), minlength=15)
    assert len(counts) == 15  # the value after the last of them is token 15 of 0..31
    assert np.abs(counts - 400).max() < 4.5 * np.sqrt(400)


def test_half_of_the_strings_are_reversed():
    ids, _ = arrays("string_copy", 12, num_rows=400)
    assert (ids[:, 12] == 9).sum() == (ids[:, 12] == 8).sum() == 200
    assert 60 < (ids[:200, 12] == 9).sum() < 140  # in no order


@pytest.mark.parametrize("depth", [1, 4, 8, 12])
def test_stacks_fill_and_empty(depth):
    ids, labels = arrays("stack", depth)
    steps = np.where(ids == 8, -1, np.where(labels == -100, 1, 0))
    heights = steps.cumsum(axis=1)
    assert (heights.max(axis=1) == depth).all() and heights.min() == 0 and (heights[:, -1] == 0).all()
    assert ((steps == 1).sum(axis=1) == 3 * depth).all() and ((steps == -1).sum(axis=1) == 3 * depth).all()


def test_stack_walks_are_uniform():
    admissible = set()
    for walk in itertools.product((1, -1), repeat=12):
        heights = np.cumsum(walk)
        if heights[-1] == 0 and heights.min() == 0 and heights.max() == 2:
            admissible.add(walk)
    ids, is_answer = stack_rows(2, 100 * len(admissible), np.random.default_rng(0))
    walks = np.where(ids == 8, -1, 1)[~is_answer].reshape(len(ids), 12)
    drawn, counts = np.unique(walks, axis=0, return_counts=True)
    assert {tuple(walk) for walk in drawn.tolist()} == admissible
    assert np.abs(counts - 100).max() < 45


@pytest.mark.parametrize("pairs", [4, 16, 32])
def test_keys_are_distinct_and_asked_in_another_order(pairs):
    ids, _ = arrays("keys_values", pairs)
    given, asked = ids[:, : 2 * pairs : 2], ids[:, 2 * pairs :: 2]
    assert given.min() == 8 and given.max() == 39 and ids[:, 1::2].max() == 7
    assert (np.diff(np.sort(given), axis=1) > 0).all() and (np.sort(given) == np.sort(asked)).all()
    same_place = (given == asked).mean()
    assert abs(same_place - 1 / pairs) < 0.05


def test_errors():
    with pytest.raises(ValueError, match="did you mean 'retrieval'"):
        load_task("retreival", 32, 1, 0)
    for name, difficulty, word in [
        ("retrieval", 3, "4 or more"),
        ("string_copy", 1, "2 or more"),
        ("stack", 0, "1 or more"),
        ("keys_values", 33, "1 to 32"),
        ("modular_arithmetic", 2, "one of 3, 5, 7, 11"),
        ("modular_arithmetic", 9, "one of 3, 5, 7, 11"),
    ]:
        with pytest.raises(ValueError, match=f"has no .* {difficulty}: set `difficulty` to {word}"):
            load_task(name, difficulty, 1, 0)
    with pytest.raises(ValueError, match="num_rows"):
        load_task("parity", 16, 0, 0)
    with pytest.raises(ValueError, match="seed"):
        load_task("parity", 16, 1, -1)

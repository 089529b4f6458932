"""The chunked rollout, own states and the per-example random numbers against naive twins."""

import copy

import pytest
import torch

from smt_hf.training.rollout import (
    example_uniforms,
    parallel_starts,
    rollout,
    sequential_starts,
    truncated_rollout,
)
from tests.conftest import make_student


def naive_rollout(student, starts, input_ids, mask=None, documents=None):
    """A row, a chunk and a token at a time."""
    batch, length = input_ids.shape
    steps = length // starts.shape[1]
    rows = []
    for row in range(batch):
        memories = []
        for index in range(length):
            if index % steps == 0:
                memory = starts[row, index // steps]
            if documents is not None and index and documents[row, index] != documents[row, index - 1]:
                memory = student.model.start_memory()
            if mask is None or mask[row, index]:
                embeds = student.model.embed_tokens(input_ids[row, index])
                memory = student.model.updater(memory[None], embeds[None])[0]
            memories.append(memory)
        rows.append(torch.stack(memories))
    return torch.stack(rows)


@pytest.mark.parametrize("steps", [1, 3, 12])
@pytest.mark.parametrize("ragged", [False, True])
def test_rollout_equals_naive_twin(student, tokens, steps, ragged):
    twin = copy.deepcopy(student)
    starts = torch.randn(3, 12 // steps, 3, 16)
    mask = torch.rand(3, 12) > 0.3 if ragged else None
    documents = (torch.rand(3, 12) > 0.7).long().cumsum(1) if ragged else None
    own_starts, twin_starts = starts.clone().requires_grad_(), starts.clone().requires_grad_()
    memories = rollout(student, own_starts, tokens, mask, documents)
    expected = naive_rollout(twin, twin_starts, tokens, mask, documents)
    torch.testing.assert_close(memories, expected, atol=1e-5, rtol=1e-4)
    weights = torch.randn_like(memories)
    (memories * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(own_starts.grad, twin_starts.grad, atol=1e-4, rtol=1e-3)
    for own, theirs in zip(student.model.updater.parameters(), twin.model.updater.parameters()):
        torch.testing.assert_close(own.grad, theirs.grad, atol=2e-4, rtol=1e-3)


def test_gradient_stops_at_the_chunk(tokens):
    """What happens in a chunk does not reach the start of another."""
    student = make_student()
    starts = torch.randn(3, 4, 3, 16, requires_grad=True)
    rollout(student, starts, tokens)[:, 3:6].sum().backward()
    touched = starts.grad.abs().sum((0, 2, 3)) > 0
    assert touched.tolist() == [False, True, False, False]


def test_chunks_must_divide(tokens):
    with pytest.raises(ValueError, match="divide"):
        rollout(make_student(), torch.zeros(3, 5, 3, 16), tokens)


# Documents that start inside a window and exactly with one, for windows of 5 (and 1, 3): 5 and 10 are borders.
DOCUMENTS = torch.tensor(
    [[0] * 5 + [1] * 7, [0] * 2 + [1] * 3 + [2] * 2 + [3] * 5, [0] * 10 + [1] * 2],
)


def naive_truncated_rollout(student, start, window, input_ids, mask=None, documents=None):
    """A row and a token at a time, detached at every border of two windows."""
    rows = []
    for row in range(len(input_ids)):
        memory, memories = start[row], []
        for index in range(input_ids.shape[1]):
            if index and index % window == 0:
                memory = memory.detach()
            if documents is not None and index and documents[row, index] != documents[row, index - 1]:
                memory = student.model.start_memory()
            if mask is None or mask[row, index]:
                embeds = student.model.embed_tokens(input_ids[row, index])
                memory = student.model.updater(memory[None], embeds[None])[0]
            memories.append(memory)
        rows.append(torch.stack(memories))
    return torch.stack(rows)


@pytest.mark.parametrize("window", [1, 3, 5, 12, 40])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_truncated_rollout_equals_naive_twin(tokens, window, masked, documents):
    """Values are those of the whole rollout, gradients those of a loop that detaches at the borders."""
    student = make_student()
    twin = copy.deepcopy(student)
    start = torch.randn(3, 3, 16)
    mask = None
    if masked:
        mask = torch.rand(3, 12) > 0.3
        mask[0, 5] = mask[1, 4] = False  # padding where a window or a document begins
    own_start, twin_start = start.clone().requires_grad_(), start.clone().requires_grad_()
    memories = truncated_rollout(student, own_start, window, tokens, mask, documents)
    whole = rollout(student, start[:, None], tokens, mask, documents)
    torch.testing.assert_close(memories, whole, atol=1e-5, rtol=1e-4)
    expected = naive_truncated_rollout(twin, twin_start, window, tokens, mask, documents)
    torch.testing.assert_close(memories, expected, atol=1e-5, rtol=1e-4)
    weights = torch.randn_like(memories)
    (memories * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(own_start.grad, twin_start.grad, atol=1e-4, rtol=1e-3)
    theirs = dict(twin.named_parameters())
    for name, parameter in student.named_parameters():
        if theirs[name].grad is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=2e-4, rtol=1e-3, msg=name)
    assert (student.model.initial_memory.grad is not None) == (documents is not None)


def test_truncated_rollout_cuts_the_gradient(tokens):
    student = make_student()
    start = torch.randn(3, 3, 16, requires_grad=True)
    for position, reaches in ((4, True), (5, False), (11, False)):
        start.grad = None
        truncated_rollout(student, start, 5, tokens)[:, position].sum().backward()
        assert (start.grad is not None and bool(start.grad.any())) == reaches


def test_sequential_starts(tokens):
    student = make_student()
    starts = sequential_starts(student, 4, tokens)
    whole = naive_rollout(student, student.model.start_memory().expand(3, 1, -1, -1), tokens)
    torch.testing.assert_close(starts[:, 0], student.model.start_memory().expand(3, -1, -1))
    torch.testing.assert_close(starts[:, 1:], whole[:, [2, 5, 8]], atol=1e-5, rtol=1e-4)
    assert not starts.requires_grad


def test_parallel_starts(tokens):
    """After a sweeps a chunk starts where a rollout of a chunks from the given start arrives."""
    student = make_student()
    given = torch.randn(3, 4, 3, 16)
    ages = torch.tensor([[1, 0, 1, 2], [2, 2, 2, 2], [3, 1, 3, 3]])
    starts = parallel_starts(student, given, ages, tokens)
    for row in range(3):
        for chunk in range(4):
            age = min(int(ages[row, chunk]), chunk)  # nothing is older than the row
            begin = chunk - age
            expected = given[row, begin]
            if age:
                part = tokens[row : row + 1, begin * 3 : chunk * 3]
                expected = naive_rollout(student, given[row : row + 1, begin : begin + 1], part)[0, -1]
            torch.testing.assert_close(starts[row, chunk], expected, atol=1e-5, rtol=1e-4)


def test_example_uniforms():
    numbers = torch.arange(4000)
    values = example_uniforms(numbers, 50, seed=3, stream=1)
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean().item() - 0.5) < 0.01 and abs(values.var().item() - 1 / 12) < 0.002
    for other in (
        example_uniforms(numbers, 50, 4, 1),
        example_uniforms(numbers, 50, 3, 2),
        values.roll(1, 0),
        values.roll(1, 1),
    ):
        assert abs(torch.corrcoef(torch.stack([values.flatten(), other.flatten()]))[0, 1]) < 0.01
    # An example's numbers do not depend on its company.
    assert torch.equal(example_uniforms(numbers[[7, 2]], 50, 3, 1), values[[7, 2]])


@pytest.mark.parametrize("forcing", [0.3, 1.0])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("steps", [1, 4, 5])
def test_forced_rollouts_equal_naive_twin(tokens, steps, documents, forcing):
    """A row and a token at a time: pulled towards the label where a chunk begins, unless a document begins there."""
    student = make_student()
    twin = copy.deepcopy(student)
    num_chunks = -(-12 // steps)
    labels = torch.randn(3, num_chunks, 3, 16, requires_grad=True)
    start = student.model.start_memory().expand(3, -1, -1).detach()
    rows, starts = [], []
    for row in range(3):
        memory, memories, own = start[row], [], [start[row]]
        for index in range(12):
            if index and index % steps == 0:
                memory = (1 - forcing) * memory.detach() + forcing * labels[row, index // steps].detach()
                own.append(memory)
            if documents is not None and index and documents[row, index] != documents[row, index - 1]:
                memory = twin.model.start_memory()
            memory = twin.model.updater(memory[None], twin.model.embed_tokens(tokens[row, index])[None])[0]
            memories.append(memory)
        rows.append(torch.stack(memories))
        starts.append(torch.stack(own))
    expected, starts = torch.stack(rows), torch.stack(starts)
    memories = truncated_rollout(student, start, steps, tokens, None, documents, labels=labels, forcing=forcing)
    torch.testing.assert_close(memories, expected, atol=1e-5, rtol=1e-4)
    weights = torch.randn_like(memories)
    (memories * weights).sum().backward()
    (expected * weights).sum().backward()
    assert labels.grad is None
    for own, theirs in zip(student.model.updater.parameters(), twin.model.updater.parameters()):
        torch.testing.assert_close(own.grad, theirs.grad, atol=2e-4, rtol=1e-3)
    if 12 % steps == 0:
        own = sequential_starts(student, num_chunks, tokens, None, documents, labels=labels, forcing=forcing)
        torch.testing.assert_close(own, starts, atol=1e-5, rtol=1e-4)
        assert not own.requires_grad
    free = truncated_rollout(student, start, steps, tokens, None, documents)
    assert not torch.allclose(free[:, steps:], memories[:, steps:])


def test_forced_parallel_starts(tokens):
    """Every sweep pulls the starts towards the given ones."""
    student = make_student()
    given = torch.randn(3, 4, 3, 16)
    ages = torch.tensor([[1, 1, 1, 2], [2, 2, 2, 2], [3, 1, 3, 3]])
    starts = parallel_starts(student, given, ages, tokens, forcing=0.25)
    for row in range(3):
        for chunk in range(4):
            begin = chunk - min(int(ages[row, chunk]), chunk)
            memory = given[row, begin]
            for at in range(begin, chunk):
                part = tokens[row : row + 1, at * 3 : (at + 1) * 3]
                memory = naive_rollout(student, memory[None, None], part)[0, -1]
                memory = memory + 0.25 * (given[row, at + 1] - memory)
            torch.testing.assert_close(starts[row, chunk], memory, atol=1e-5, rtol=1e-4)

"""Scores of labelled rows against a loop that reads one token and one memory at a time."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from smt_hf.evaluation import score_student, score_teacher
from smt_hf.evaluation.memories import own_memories, teacher_memories
from smt_hf.evaluation.text import stream_labels
from tests.conftest import VOCAB, make_composite, make_student

ROWS, LENGTH = 7, 13


@pytest.fixture
def rows():
    """Labels at a few positions, other ones in each row, some at `m_0` and at the end; the last row has none."""
    generator = np.random.default_rng(0)
    input_ids = generator.integers(0, VOCAB, (ROWS, LENGTH + 1))
    labels = np.where(generator.random(input_ids.shape) < 0.2, generator.integers(0, VOCAB, input_ids.shape), -100)
    labels[0, 0], labels[1, LENGTH], labels[-1] = 3, 4, -100
    return input_ids, labels


def naive_scores(memory_at, read_logits, labels):
    """`memory_at(row, t) -> (K, D)`; right answers planted by the caller."""
    hits, losses = [], []
    for row, t in zip(*np.nonzero(labels != -100)):
        logits = read_logits(memory_at(row, t)[None, None])[0, 0].double()
        hits.append(float(logits.argmax() == labels[row, t]))
        losses.append(-logits.log_softmax(-1)[labels[row, t]].item())
    return hits, losses, np.nonzero(labels != -100)[1]


def plant_hits(memory_at, read_logits, labels):
    """Make every other label the right answer: accuracies that are neither 0 nor 1."""
    for number, (row, t) in enumerate(zip(*np.nonzero(labels != -100))):
        if number % 2:
            labels[row, t] = int(read_logits(memory_at(row, t)[None, None])[0, 0].argmax())


def agrees(scores, expected):
    hits, losses, places = expected
    assert scores.accuracy == pytest.approx(np.mean(hits)) and 0 < scores.accuracy < 1
    assert scores.loss == pytest.approx(np.mean(losses), rel=1e-4)
    assert scores.bits_per(7) == pytest.approx(np.sum(losses) / math.log(2) / 7, rel=1e-4)
    assert scores.n == len(hits)
    for sums, values in ((scores.counts, None), (scores.hits, hits), (scores.nats, losses)):
        np.testing.assert_allclose(sums, np.bincount(places, values, LENGTH + 1), rtol=1e-4)


def stepwise(student, input_ids):
    """The memory after t tokens, one transition at a time."""

    def memory_at(row, t):
        memory = student.model.start_memory()[None]
        for token in input_ids[row, :t]:
            memory = student.model.updater(memory, student.model.embed_tokens(torch.tensor([token])))
        return memory[0]

    return memory_at


def ranks_of(monkeypatch, score, num_processes):
    """What every rank returns where the sums of all ranks are gathered."""
    parts = []
    monkeypatch.setattr("smt_hf.evaluation.scores.gather_object", lambda own: parts.extend(own) or own * num_processes)
    for rank in range(num_processes):
        score(process_index=rank, num_processes=num_processes)
    monkeypatch.setattr("smt_hf.evaluation.scores.gather_object", lambda own: parts)
    return [score(process_index=rank, num_processes=num_processes) for rank in range(num_processes)]


@torch.no_grad()
def test_the_student_equals_its_naive_twin(student, rows, monkeypatch):
    """Whatever the batches, the windows and the number of processes."""
    input_ids, labels = rows
    memory_at = stepwise(student, input_ids)
    plant_hits(memory_at, student.read_logits, labels)
    expected = naive_scores(memory_at, student.read_logits, labels)
    for batch_size, window in ((1, 5), (3, 1), (512, 64)):
        agrees(score_student(student, input_ids, labels, batch_size, window), expected)
    for num_processes in (2, 3, ROWS + 1):  # the last: some processes have no row
        for scores in ranks_of(monkeypatch, partial(score_student, student, input_ids, labels, 2), num_processes):
            agrees(scores, expected)


@pytest.mark.parametrize("memory_readout", ["projection", "registers"])
@torch.no_grad()
def test_the_teacher_equals_its_naive_twin(rows, memory_readout, monkeypatch):
    model = make_composite(memory_readout=memory_readout)
    input_ids, labels = rows
    m_0 = model.student.model.start_memory()

    def memory_at(row, t):
        prefix = torch.from_numpy(input_ids[row : row + 1, : max(t, 1)])
        return model.teacher(prefix, torch.tensor([t]), m_0)[0, 0]

    plant_hits(memory_at, model.student.read_logits, labels)
    expected = naive_scores(memory_at, model.student.read_logits, labels)
    for batch_size, memories in ((1, 4096), (3, 5), (None, 4096)):  # 5: several passes of registers
        monkeypatch.setattr("smt_hf.evaluation.memories._MEMORIES_PER_PASS", memories)
        agrees(score_teacher(model, input_ids, labels, batch_size), expected)
    for scores in ranks_of(monkeypatch, partial(score_teacher, model, input_ids, labels), 3):
        agrees(scores, expected)


def test_streams(student):
    """All tokens but the first are labels; the logits are those of one pass over the whole stream."""
    streams = np.random.default_rng(0).integers(0, VOCAB, (4, 21))
    scores = score_student(student, streams, stream_labels(streams), window=7)
    tokens = torch.from_numpy(streams)
    logits = student(tokens[:, :-1]).logits.detach()
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(4, 20)
    np.testing.assert_allclose(scores.nats, [0, *losses.sum(0)], rtol=1e-4)
    assert scores.accuracy == pytest.approx((logits.argmax(-1) == tokens[:, 1:]).float().mean().item())
    assert scores.n == 80


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_perplexity_does_not_depend_on_the_batch(batch_size):
    """Rows of different lengths, some with one label and some with all: labels count the same, rows do not."""
    model = make_composite()
    input_ids = np.random.default_rng(1).integers(0, VOCAB, (5, 12))
    labels = np.where(np.arange(12) <= [[1], [11], [4], [11], [2]], input_ids, -100)
    for score, scored in ((score_student, model.student), (score_teacher, model)):
        together = score(scored, input_ids, labels, 5)
        assert math.exp(score(scored, input_ids, labels, batch_size).loss) == pytest.approx(math.exp(together.loss))


def test_only_labelled_memories_are_read(rows, monkeypatch):
    model = make_composite()
    input_ids, labels = rows
    num_labels, read = int((labels != -100).sum()), []
    monkeypatch.setattr(
        model.student, "read_logits", lambda memories: read.append(memories) or torch.zeros(len(memories), VOCAB)
    )
    assert score_student(model.student, input_ids, labels).loss == pytest.approx(math.log(VOCAB))
    assert sum(len(memories) for memories in read) == num_labels
    read.clear()
    assert score_teacher(model, input_ids, labels).n == num_labels
    assert sum(len(memories) for memories in read) == num_labels


def test_the_walk_ends_at_the_last_label(monkeypatch):
    """Tokens after it, padding among them, are not read."""
    student = make_student()
    labels = np.full((2, LENGTH + 1), -100)
    labels[:, 4] = 1
    seen = []
    updater = student.model.updater.forward
    monkeypatch.setattr(student.model.updater, "forward", lambda *args: seen.append(1) or updater(*args))
    score_student(student, np.ones_like(labels), labels)
    assert len(seen) == 4


def test_a_window_holds_no_more_memories_than_asked():
    student = make_student()
    tokens = torch.zeros(2, 10, dtype=torch.long)
    places = [(first, memories.shape[1]) for first, memories in own_memories(student, tokens, window=4)]
    assert places == [(0, 1), (1, 4), (5, 4), (9, 2)]


@torch.no_grad()
def test_a_teacher_that_pays_for_memories_gets_few_at_a_time(monkeypatch):
    model = make_composite(memory_readout="registers")
    monkeypatch.setattr("smt_hf.evaluation.memories._MEMORIES_PER_PASS", 8)
    spans = []
    model.teacher.register_forward_pre_hook(lambda module, args: spans.append(args[1].shape[-1]))
    teacher_memories(model, torch.zeros(2, 10, dtype=torch.long), torch.arange(11))
    assert spans == [4, 4, 3]


def test_no_labels_and_unaligned_labels_are_refused(rows):
    model = make_composite()
    input_ids, labels = rows
    for score, scored in ((score_student, model.student), (score_teacher, model)):
        with pytest.raises(ValueError, match="nothing to score"):
            score(scored, input_ids, np.full_like(labels, -100))
        with pytest.raises(ValueError, match="aligned"):
            score(scored, input_ids, labels[:, 1:])

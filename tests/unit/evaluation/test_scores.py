"""Scores of labelled rows against a loop that reads one token and one memory at a time."""

import math

import numpy as np
import pytest
import torch

from smt_hf.evaluation import score_student_probe, score_teacher_probe
from smt_hf.evaluation.probes import own_memories, teacher_memories
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
    hits, losses, places = [], [], []
    for row, t in zip(*np.nonzero(labels != -100)):
        logits = read_logits(memory_at(row, t)[None, None])[0, 0].double()
        hits.append(float(logits.argmax() == labels[row, t]))
        losses.append(-logits.log_softmax(-1)[labels[row, t]].item())
        places.append(int(t))
    by_position = {t: np.mean([hit for hit, at in zip(hits, places) if at == t]) for t in sorted(set(places))}
    return np.mean(hits), np.mean(losses), len(hits), by_position


def plant_hits(memory_at, read_logits, labels):
    """Make every other label the right answer: accuracies that are neither 0 nor 1."""
    for number, (row, t) in enumerate(zip(*np.nonzero(labels != -100))):
        if number % 2:
            labels[row, t] = int(read_logits(memory_at(row, t)[None, None])[0, 0].argmax())


def agrees(scores, expected):
    accuracy, loss, n, by_position = expected
    assert scores.accuracy == pytest.approx(accuracy) and 0 < accuracy < 1
    assert scores.loss == pytest.approx(loss, rel=1e-4)
    assert scores.n == n
    assert scores.by_position == pytest.approx(by_position)


def stepwise(student, input_ids):
    """The memory after t tokens, one transition at a time."""

    def memory_at(row, t):
        memory = student.model.start_memory()[None]
        for token in input_ids[row, :t]:
            memory = student.model.updater(memory, student.model.embed_tokens(torch.tensor([token])))
        return memory[0]

    return memory_at


@pytest.mark.parametrize("batch_size", [1, 3, 512])
@pytest.mark.parametrize("window", [1, 5, 64])
@torch.no_grad()
def test_student_probe_equals_naive_twin(rows, batch_size, window):
    student = make_student()
    input_ids, labels = rows
    memory_at = stepwise(student, input_ids)
    plant_hits(memory_at, student.read_logits, labels)
    expected = naive_scores(memory_at, student.read_logits, labels)
    for keep_only_labelled in (True, False):
        agrees(score_student_probe(student, input_ids, labels, batch_size, keep_only_labelled, window), expected)


@torch.no_grad()
def test_student_probe_of_every_updater(student, rows):
    input_ids, labels = rows
    memory_at = stepwise(student, input_ids)
    plant_hits(memory_at, student.read_logits, labels)
    agrees(score_student_probe(student, input_ids, labels), naive_scores(memory_at, student.read_logits, labels))


@pytest.mark.parametrize("memory_readout", ["projection", "registers"])
@torch.no_grad()
def test_teacher_probe_equals_naive_twin(rows, memory_readout, monkeypatch):
    model = make_composite(memory_readout=memory_readout)
    input_ids, labels = rows
    m_0 = model.student.model.start_memory()

    def memory_at(row, t):
        prefix = torch.from_numpy(input_ids[row : row + 1, : max(t, 1)])
        return model.teacher(prefix, torch.tensor([t]), m_0)[0, 0]

    plant_hits(memory_at, model.student.read_logits, labels)
    expected = naive_scores(memory_at, model.student.read_logits, labels)
    for batch_size, memories in ((1, 4096), (3, 5), (64, 4096)):  # 5: several passes of registers
        monkeypatch.setattr("smt_hf.evaluation.probes._MEMORIES_A_PASS", memories)
        agrees(score_teacher_probe(model, input_ids, labels, batch_size), expected)


def test_only_labelled_memories_are_read(rows, monkeypatch):
    model = make_composite()
    input_ids, labels = rows
    num_labels, read = int((labels != -100).sum()), []
    monkeypatch.setattr(
        model.student, "read_logits", lambda memories: read.append(memories) or torch.zeros(len(memories), VOCAB)
    )
    assert score_student_probe(model.student, input_ids, labels).loss == pytest.approx(math.log(VOCAB))
    assert sum(len(memories) for memories in read) == num_labels
    read.clear()
    assert score_teacher_probe(model, input_ids, labels).n == num_labels
    assert sum(len(memories) for memories in read) == num_labels


def test_the_walk_ends_at_the_last_label(monkeypatch):
    """Tokens after it, padding among them, are not read."""
    student = make_student()
    labels = np.full((2, LENGTH + 1), -100)
    labels[:, 4] = 1
    seen = []
    updater = student.model.updater.forward
    monkeypatch.setattr(student.model.updater, "forward", lambda *args: seen.append(1) or updater(*args))
    score_student_probe(student, np.ones_like(labels), labels)
    assert len(seen) == 4


def test_a_window_holds_no_more_memories_than_asked():
    student = make_student()
    tokens = torch.zeros(2, 10, dtype=torch.long)
    places = [(first, memories.shape[1]) for first, memories in own_memories(student, tokens, window=4)]
    assert places == [(0, 1), (1, 4), (5, 4), (9, 2)]


@torch.no_grad()
def test_a_teacher_that_pays_for_memories_gets_few_at_a_time(monkeypatch):
    model = make_composite(memory_readout="registers")
    monkeypatch.setattr("smt_hf.evaluation.probes._MEMORIES_A_PASS", 8)
    spans = []
    model.teacher.register_forward_pre_hook(lambda module, args: spans.append(args[1].shape[-1]))
    teacher_memories(model, torch.zeros(2, 10, dtype=torch.long), torch.arange(11))
    assert spans == [4, 4, 3]


def test_no_labels_and_unaligned_labels_are_refused(rows):
    model = make_composite()
    input_ids, labels = rows
    for score, scored in ((score_student_probe, model.student), (score_teacher_probe, model)):
        with pytest.raises(ValueError, match="nothing to score"):
            score(scored, input_ids, np.full_like(labels, -100))
        with pytest.raises(ValueError, match="aligned"):
            score(scored, input_ids, labels[:, 1:])

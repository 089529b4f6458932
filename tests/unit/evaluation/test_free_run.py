"""Losses by age against a naive twin; exponents of known maps and from products of Jacobians."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from smt_hf import SMTForPreTraining
from smt_hf.evaluation import largest_lyapunov, loss_by_age
from smt_hf.evaluation.free_run import free_run_sums, means_of
from smt_hf.training import SMTPreTrainingConfig
from tests.conftest import UPDATERS, VOCAB, make_composite, make_student, student_config, teacher_config, wake


def composite_of(updater_type):
    torch.manual_seed(0)
    return wake(
        SMTForPreTraining(
            SMTPreTrainingConfig(student=student_config(updater_type=updater_type), teacher=teacher_config())
        )
    ).eval()


def random_rows(num_rows, length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, (num_rows, length + 1))


def nats_of(student, memory, target):
    return F.cross_entropy(student.read_logits(memory[None]), torch.tensor([int(target)])).item()


@torch.no_grad()
def naive_losses(model, input_ids, labels):
    """Token by token and label by label: age -> differences, and the lists of teacher-forced and free losses."""
    model_of, tokens = model.student.model, torch.from_numpy(input_ids)
    m_0 = model_of.start_memory()

    def rolled(memory, row, begin, end):
        for t in range(begin, end):
            memory = model_of.updater(memory[None], model_of.embed_tokens(tokens[row, t : t + 1]))[0]
        return memory

    def label(row, t):
        return model.teacher(tokens[row : row + 1, : max(t, 1)], torch.tensor([t]), m_0)[0, 0]

    by_age, forced, free = {}, [], []
    for row in range(len(input_ids)):
        places = [t for t in np.flatnonzero(labels[row] != -100) if t > 0]
        for t in places:
            forced.append(nats_of(model.student, label(row, t), labels[row, t]))
            free.append(nats_of(model.student, rolled(m_0, row, 0, t), labels[row, t]))
            for a in (2**power for power in range(10)):
                # Chunks of a transitions that end at the row's last label; the first may be shorter.
                begin = max(t - 1 - (t - 1 - places[-1]) % a, 0)
                if a // 2 < t - begin <= a:
                    own = nats_of(model.student, rolled(label(row, begin), row, begin, t), labels[row, t])
                    by_age.setdefault(a, []).append(own - forced[-1])
    return by_age, forced, free


@pytest.mark.parametrize("updater_type", UPDATERS)
def test_losses_by_age_equal_naive_twin(updater_type):
    model = composite_of(updater_type)
    input_ids = random_rows(4, 11)
    labels = input_ids.copy()
    labels[1, 8:], labels[2, :5], labels[3, 1:] = -100, -100, -100  # rows that end early, begin late, have m_0 alone
    by_age, forced, free = naive_losses(model, input_ids, labels)
    assert set(by_age) == {1, 2, 4, 8, 16}
    for batch_size in (1, 3, 64):
        means = loss_by_age(model, input_ids, labels, batch_size)
        assert means["teacher_forced"] == pytest.approx(np.mean(forced), rel=1e-5)
        assert means["free_run"] == pytest.approx(np.mean(free), rel=1e-5)
        assert means["drift_by_age"] == pytest.approx({a: np.mean(own) for a, own in by_age.items()}, abs=1e-5)
    assert max(abs(value) for value in means["drift_by_age"].values()) > 0.01


def test_one_label_per_row_counts_for_every_age():
    model = make_composite()
    input_ids = random_rows(3, 11)
    labels = np.full_like(input_ids, -100)
    labels[:, 10] = input_ids[:, 3]
    by_age, *_ = naive_losses(model, input_ids, labels)
    assert [len(own) for own in by_age.values()] == [3] * 5
    expected = {a: np.mean(own) for a, own in by_age.items()}
    assert loss_by_age(model, input_ids, labels)["drift_by_age"] == pytest.approx(expected, abs=1e-5)


def test_a_student_on_the_memories_of_its_teacher_loses_nothing(monkeypatch):
    model = make_composite()
    input_ids = random_rows(4, 16)
    exact = lambda memory, embeds, *others: memory[:, None].expand(-1, embeds.shape[1], -1, -1)  # noqa: E731
    monkeypatch.setattr(model.student.model, "unroll", exact)
    monkeypatch.setattr(
        model.teacher, "forward", lambda ids, positions, m_0, *others: m_0.expand(len(ids), len(positions), -1, -1)
    )
    means = loss_by_age(model, input_ids, input_ids)
    assert means["drift_by_age"] == pytest.approx(dict.fromkeys((1, 2, 4, 8, 16), 0.0), abs=1e-6)
    assert means["free_run"] == pytest.approx(means["teacher_forced"])


def test_padding_and_documents_change_nothing():
    """A row after padding, and two documents in one row, equal the rows by themselves."""
    model = make_composite()
    tokens = torch.from_numpy(random_rows(2, 7))
    apart = means_of(two_sums(model, tokens, tokens))
    padded = F.pad(tokens, (3, 2))
    goals = F.pad(tokens, (3, 2), value=-100)
    mask = F.pad(torch.ones_like(tokens), (3, 2))
    assert_close(means_of(two_sums(model, padded, goals, mask)), apart, lyapunov=False)

    # Chunks begin elsewhere, so that what is compared are losses that do not depend on chunks.
    joined = tokens.reshape(1, -1)
    goals = joined.clone()
    goals[0, 8] = -100  # predicted by the first document's memory
    documents = torch.arange(2).repeat_interleave(8)[None]
    one_row = means_of(two_sums(model, joined, goals, None, documents))
    for name in ("free_run", "teacher_forced"):
        assert one_row[name] == pytest.approx(apart[name], rel=1e-5)
    # No memory is older than its document.
    assert max(one_row["drift_by_age"]) == 8


def two_sums(model, tokens, goals, mask=None, documents=None):
    args = [None if part is None else part[:, :-1] for part in (mask, documents)]
    m_0 = model.student.model.start_memory()
    labels = model.teacher(tokens[:, :-1], torch.arange(tokens.shape[1]), m_0, *args)
    return free_run_sums(model.student, tokens, goals, labels, mask, documents)


def assert_close(means, expected, lyapunov):
    assert means["drift_by_age"] == pytest.approx(expected["drift_by_age"], abs=1e-5)
    for name in ("free_run", "teacher_forced", *(("lyapunov",) if lyapunov else ())):
        assert means[name] == pytest.approx(expected[name], rel=1e-4)


def test_models_whose_ages_are_left_out():
    model = make_composite()
    rows = random_rows(2, 5)
    assert loss_by_age(model, rows, np.full_like(rows, -100)) is None
    with pytest.raises(ValueError, match="aligned"):
        loss_by_age(model, rows, rows[:, 1:])
    model.teacher.labels_all_positions = False
    assert loss_by_age(model, rows, rows) is None
    model.teacher = None
    assert loss_by_age(model, rows, rows) is None


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("rate", [0.5, 1.0, 1.5])
def test_exponent_of_a_linear_map(rate, scale, monkeypatch):
    """`diag(rate, 0.3 rate, ..)` in a rotated basis, plus what the token adds: ln(rate), however large memories are."""
    student = make_student()
    size = 3 * 16
    rotation = torch.linalg.qr(torch.randn(size, size))[0]
    factors = torch.full((size,), 0.3 * rate)
    factors[0] = rate
    matrix = rotation @ torch.diag(factors) @ rotation.T

    def unroll(memory, embeds, *others):
        memories = []
        for token in embeds.unbind(1):
            memory = (memory.flatten(1) @ matrix.T).view(memory.shape) + scale * token[:, None]
            memories.append(memory)
        return torch.stack(memories, dim=1)

    monkeypatch.setattr(student.model, "unroll", unroll)
    assert largest_lyapunov(student, random_rows(4, 24), burn_in=8) == pytest.approx(math.log(rate), abs=5e-3)


def test_exponent_of_rest_and_of_oblivion(monkeypatch):
    student = make_student()
    rest = lambda memory, embeds, *others: memory[:, None].expand(-1, embeds.shape[1], -1, -1)  # noqa: E731
    monkeypatch.setattr(student.model, "unroll", rest)
    assert largest_lyapunov(student, random_rows(2, 8)) == pytest.approx(0.0, abs=1e-3)
    forgets = lambda memory, embeds, *others: embeds[:, :, None].expand(-1, -1, 3, -1)  # noqa: E731
    monkeypatch.setattr(student.model, "unroll", forgets)
    floor = math.log(10 * torch.finfo(torch.float32).eps ** 0.5)
    assert largest_lyapunov(student, random_rows(2, 8)) == pytest.approx(floor)


@pytest.mark.parametrize("updater_type", UPDATERS)
def test_exponent_equals_products_of_jacobians(updater_type):
    """The growth of a direction under the product of the Jacobians, as QR of one column, and for long rows the growth
    of the product itself."""
    student = make_student(updater_type=updater_type).double()
    input_ids = random_rows(3, 40)
    model, burn_in, logs, norms = student.model, 10, [], []
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(3, 16, generator=generator).double().flatten()
    for row in torch.from_numpy(input_ids):
        memory, direction = model.start_memory().detach(), first / first.norm()
        product = torch.eye(len(first), dtype=torch.float64)
        for t, token in enumerate(row[:-1]):
            embed = model.embed_tokens(token[None]).detach()
            step = lambda memory, embed=embed: model.updater(memory[None], embed)[0]  # noqa: E731
            jacobian = torch.autograd.functional.jacobian(step, memory).view(len(first), len(first))
            direction, growth = torch.linalg.qr((jacobian @ direction)[:, None])
            direction = direction[:, 0]
            logs += [growth.abs().log().item()] if t >= burn_in else []
            product = jacobian @ product
            memory = step(memory).detach()
        norms.append(torch.linalg.matrix_norm(product, 2).log().item() / 40)
    exponent = largest_lyapunov(student, input_ids)
    assert exponent == pytest.approx(np.mean(logs), abs=1e-4)
    assert exponent == pytest.approx(np.mean(norms), abs=0.15)
    single = largest_lyapunov(student.float(), input_ids)
    assert single == pytest.approx(np.mean(logs), abs=0.02)
    for batch_size in (1, 2):
        assert largest_lyapunov(student, input_ids, batch_size=batch_size) == pytest.approx(single, abs=1e-3)
    assert largest_lyapunov(student, input_ids, burn_in=40) is None

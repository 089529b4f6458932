"""Drift, gradients and geometry against naive twins, finite differences and constructed memories."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from smt_hf import SMTForPreTraining
from smt_hf.evaluation import (
    EVALUATIONS,
    drift_by_position,
    evaluate_rows,
    geometry_of,
    gradient_norm_by_distance,
    memory_geometry,
    teacher_gradient_norm,
)
from smt_hf.evaluation.drift import _uniformity
from smt_hf.evaluation.memories import own_memories
from smt_hf.training import SMTPreTrainingConfig
from tests.conftest import UPDATERS, VOCAB, make_composite, student_config, wake

TINY = {"hidden_size": 4, "num_attention_heads": 2, "num_memory_tokens": 2}


def tiny_composite(updater_type="transformer", **teacher_fields):
    """Small enough for finite differences, in double precision."""
    torch.manual_seed(0)
    sizes = {**TINY, "num_memory_tokens": 3} if updater_type == "fast_weight" else TINY  # its smallest
    teacher = {"model_type": "smt_teacher", "vocab_size": VOCAB, "memory_size": 4, **sizes, **teacher_fields}
    config = SMTPreTrainingConfig(student=student_config(updater_type=updater_type, **sizes), teacher=teacher)
    return wake(SMTForPreTraining(config)).double().eval()


def random_rows(num_rows, length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, (num_rows, length + 1))


@pytest.fixture
def labelled_rows():
    """Last labels at 6, 3, 0, 5 of T = 6, none in the last row; tokens of a row are all different."""
    input_ids = np.stack([np.random.default_rng(row).permutation(VOCAB)[:7] for row in range(5)])
    labels = np.full_like(input_ids, -100)
    labels[0, [2, 6]], labels[1, 3], labels[2, 0], labels[3, [0, 5]] = 5, 6, 7, 8
    return input_ids, labels


@torch.no_grad()
@pytest.mark.parametrize("memory_readout", ["projection", "registers"])
def test_drift_equals_naive_twin(memory_readout):
    model = make_composite(memory_readout=memory_readout)
    input_ids = random_rows(5, 9)
    tokens = torch.from_numpy(input_ids)
    own, labels = torch.empty(2, 5, 9, 3, 16)
    for row in range(5):
        memory = model.student.model.start_memory()[None]
        for t in range(9):
            memory = model.student.model.updater(memory, model.student.model.embed_tokens(tokens[row, t : t + 1]))
            own[row, t] = memory[0]
            labels[row, t] = model.teacher(tokens[row : row + 1, : t + 1], torch.tensor([t + 1]), memory[0])[0, 0]
    errors = (own - labels).square().sum((-2, -1)).mean(0)
    to_other_row = [
        (labels[a, t] - labels[b, t]).square().sum() for t in range(9) for a in range(5) for b in range(5) if a != b
    ]
    expected = (errors / torch.stack(to_other_row).mean()).numpy()
    for batch_size in (1, 2, 64):
        drift = drift_by_position(model, input_ids, batch_size)
        assert drift.shape == (9,)
        np.testing.assert_allclose(drift, expected, rtol=1e-4)


def test_drift_of_a_perfect_student_and_of_another_row(monkeypatch):
    model = make_composite()
    input_ids = random_rows(300, 6)

    def imitates(shift):
        def walk(student, tokens, window=32):
            labels = model.teacher(tokens, torch.arange(7), student.model.start_memory())
            yield 0, labels[:, :1].roll(shift, 0)
            yield 1, labels[:, 1:].roll(shift, 0)

        return walk

    monkeypatch.setattr("smt_hf.evaluation.drift.own_memories", imitates(0))
    np.testing.assert_allclose(drift_by_position(model, input_ids, 300), 0, atol=1e-9)
    monkeypatch.setattr("smt_hf.evaluation.drift.own_memories", imitates(1))
    np.testing.assert_allclose(drift_by_position(model, input_ids, 300), 1, atol=0.3)


def test_drift_is_finite_where_all_rows_begin_alike():
    input_ids = random_rows(6, 5)
    input_ids[:, :2] = 1
    assert np.isfinite(drift_by_position(make_composite(), input_ids)).all()
    assert np.isfinite(drift_by_position(make_composite(), np.ones_like(input_ids))).all()


def test_drift_needs_two_rows():
    with pytest.raises(ValueError, match="at least two"):
        drift_by_position(make_composite(), random_rows(1, 5))


def finite_difference_norm(loss_of, point, step=1e-5):
    """`|d loss / d point|`, two-sided; `loss_of` takes a tensor of the shape of `point`."""
    gradient = []
    for index in range(point.numel()):
        change = torch.zeros_like(point).view(-1)
        change[index] = step
        change = change.view(point.shape)
        gradient.append((loss_of(point + change) - loss_of(point - change)) / (2 * step))
    return torch.stack(gradient).norm().item()


def by_distance(norm_of, labels):
    """Mean of `norm_of(row, t)` at each distance of t from the row's last label."""
    collected = {distance: [] for distance in range(labels.shape[1] - 1)}
    for row in range(len(labels)):
        last = max(np.flatnonzero(labels[row] != -100), default=0)
        for t in range(1, last + 1):
            collected[last - t].append(norm_of(row, t))
    return np.array([np.mean(norms) if norms else np.nan for norms in collected.values()])


@pytest.mark.parametrize("updater_type", UPDATERS)
@torch.no_grad()
def test_student_gradients_equal_finite_differences(updater_type, labelled_rows):
    student = tiny_composite(updater_type).student
    input_ids, labels = labelled_rows
    tokens = torch.from_numpy(input_ids)

    def norm_of(row, t):
        last = np.flatnonzero(labels[row] != -100)[-1]
        memories = torch.cat([part for _, part in own_memories(student, tokens[row : row + 1])], dim=1)

        def loss_of(memory):
            memory = memory[None]
            if last > t:
                memory = student.model.unroll(memory, student.model.embed_tokens(tokens[row : row + 1, t:last]))[:, -1]
            return F.cross_entropy(student.read_logits(memory), torch.from_numpy(labels[row, last : last + 1]))

        return finite_difference_norm(loss_of, memories[0, t])

    expected = by_distance(norm_of, labels)
    for batch_size in (1, 2, 64):
        norms = gradient_norm_by_distance(student, input_ids, labels, batch_size)
        assert norms.shape == (6,)
        # Keys of two coordinates that are normalised curve strongly: the differences are less exact.
        np.testing.assert_allclose(norms, expected, rtol=1e-4 if updater_type == "fast_weight" else 1e-6)
    assert all(parameter.grad is None for parameter in student.parameters())


@pytest.mark.parametrize(
    "fields",
    [
        {"memory_readout": "projection", "sliding_window": 2},
        {"memory_readout": "registers", "sliding_window": 8},
        {"model_type": "smt_windowed_teacher", "context_length": 3},
    ],
    ids=["projection", "registers", "windowed"],
)
@torch.no_grad()
def test_teacher_gradients_equal_finite_differences(fields, labelled_rows):
    model = tiny_composite(**fields)
    input_ids, labels = labelled_rows
    tokens = torch.from_numpy(input_ids)
    weight = model.teacher.embed_tokens.weight

    def norm_of(row, t):
        last = np.flatnonzero(labels[row] != -100)[-1]
        token = tokens[row, t - 1]  # once in its row: moving its embedding moves this place alone
        before = weight[token].clone()

        def loss_of(embedding):
            weight[token] = embedding
            memories = model.teacher(
                tokens[row : row + 1, :-1], torch.tensor([last]), model.student.model.start_memory()
            )
            weight[token] = before
            logits = model.student.read_logits(memories[:, 0])
            return F.cross_entropy(logits, torch.from_numpy(labels[row, last : last + 1]))

        return finite_difference_norm(loss_of, before)

    expected = by_distance(norm_of, labels)
    before = weight.clone()
    for batch_size in (1, 2, 64):
        norms = teacher_gradient_norm(model, input_ids, labels, batch_size)
        np.testing.assert_allclose(norms, expected, rtol=1e-5, atol=1e-9)
    assert torch.equal(weight, before) and all(parameter.grad is None for parameter in model.parameters())
    reach = {"smt_windowed_teacher": 3}.get(fields.get("model_type"), 6 if fields.get("sliding_window") == 8 else 3)
    assert (norms[:reach] > 1e-6).all() and (norms[reach:] == 0).all()


def test_frozen_models_have_gradient_norms(labelled_rows):
    model = tiny_composite()
    expected = gradient_norm_by_distance(model.student, *labelled_rows), teacher_gradient_norm(model, *labelled_rows)
    model.requires_grad_(False)
    with torch.no_grad():
        np.testing.assert_allclose(gradient_norm_by_distance(model.student, *labelled_rows), expected[0])
        np.testing.assert_allclose(teacher_gradient_norm(model, *labelled_rows), expected[1])


def test_distances_that_no_row_reaches_are_nan(labelled_rows):
    model = tiny_composite()
    input_ids, labels = (part[1:2] for part in labelled_rows)  # last label after 3 of 6 tokens
    for norms in (
        gradient_norm_by_distance(model.student, input_ids, labels),
        teacher_gradient_norm(model, input_ids, labels),
    ):
        assert np.isfinite(norms[:3]).all() and np.isnan(norms[3:]).all()


def test_gradients_need_a_label_after_a_token(labelled_rows):
    model = tiny_composite()
    input_ids, labels = (part[2:3] for part in labelled_rows)
    for norms_of, part in ((gradient_norm_by_distance, model.student), (teacher_gradient_norm, model)):
        with pytest.raises(ValueError, match="no row has a label"):
            norms_of(part, input_ids, labels)
        with pytest.raises(ValueError, match="aligned"):
            norms_of(part, input_ids, labels[:, 1:])


def test_geometry_of_one_direction():
    direction = torch.randn(2, 3)
    memories = torch.linspace(-1, 1, 9)[:, None, None] * direction + 5  # far from the origin: centred away
    geometry = memory_geometry(memories)
    assert geometry["effective_rank"] == pytest.approx(1, abs=1e-3)
    assert geometry["participation_ratio"] == pytest.approx(1, abs=1e-3)
    assert geometry["spread"] == pytest.approx(memories.var(0).mean().item(), rel=1e-4)
    assert geometry["n"] == 9


def test_geometry_of_isotropic_memories():
    geometry = memory_geometry(torch.randn(20000, 2, 4))
    assert geometry["effective_rank"] == pytest.approx(8, rel=0.01)
    assert geometry["participation_ratio"] == pytest.approx(8, rel=0.01)
    assert geometry["spread"] == pytest.approx(1, rel=0.02)
    # One axis of variance 100 among seven of 1: by hand.
    scales = torch.tensor([10.0, *[1.0] * 7]).view(2, 4)
    geometry = memory_geometry(torch.randn(20000, 2, 4) * scales)
    entropy = -(10 / 17 * math.log(10 / 17) + 7 / 17 * math.log(1 / 17))
    assert geometry["effective_rank"] == pytest.approx(math.exp(entropy), rel=0.02)
    assert geometry["participation_ratio"] == pytest.approx(107**2 / (100**2 + 7), rel=0.02)


def test_geometry_of_collapsed_memories():
    memory = F.rms_norm(torch.randn(3, 4), (4,))
    rounding = 1 + 6e-8 * torch.randn(50, 3, 4)
    geometry = memory_geometry(memory * rounding)
    assert geometry["effective_rank"] == geometry["participation_ratio"] == 0
    assert geometry["spread"] == pytest.approx(0, abs=1e-12)
    same_tokens = memory_geometry(torch.ones(50, 3, 4))
    assert same_tokens["uniformity"] == pytest.approx(0, abs=1e-6)


def test_uniformity_equals_naive_twin():
    directions = F.normalize(torch.randn(11, 5, dtype=torch.float64), dim=-1)
    pairs = [(directions[a] - directions[b]).square().sum() for a in range(11) for b in range(11) if a != b]
    expected = torch.stack(pairs).mul(-2).exp().mean().log().item()
    assert _uniformity(directions) == pytest.approx(expected)
    assert _uniformity(torch.eye(4, dtype=torch.float64)) == pytest.approx(-4)
    many = F.normalize(torch.randn(4000, 5, dtype=torch.float64), dim=-1)
    assert _uniformity(many, most=2000) == pytest.approx(_uniformity(many, most=4000), abs=0.02)
    memories = torch.randn(4, 3, 5)
    tokens = F.normalize(memories.flatten(0, 1), dim=-1).double()
    assert memory_geometry(memories)["uniformity"] == pytest.approx(_uniformity(tokens), rel=1e-5)


@torch.no_grad()
def test_geometry_of_a_model():
    model = make_composite()
    input_ids = random_rows(5, 40)
    tokens = torch.from_numpy(input_ids[:, :-1])
    own = torch.cat([part for _, part in own_memories(model.student, tokens)], dim=1)
    labels = model.teacher(tokens, torch.arange(41), model.student.model.start_memory())
    taken = [10, 20, 30, 40]
    expected = {"student": memory_geometry(own[:, taken].flatten(0, 1))}
    expected["teacher"] = memory_geometry(labels[:, taken].flatten(0, 1))
    for batch_size in (2, 64):
        geometry = geometry_of(model, input_ids, num_positions=4, batch_size=batch_size)
        assert geometry.keys() == expected.keys()
        for name, values in expected.items():
            assert geometry[name] == pytest.approx(values, rel=1e-4)
            assert geometry[name]["n"] == 20


def test_geometry_without_a_teacher_and_of_short_rows():
    model = make_composite()
    model.teacher = None
    geometry = geometry_of(model, random_rows(5, 3))
    assert geometry.keys() == {"student"} and geometry["student"]["n"] == 15
    with pytest.raises(ValueError, match="at least two"):
        memory_geometry(torch.ones(1, 2, 4))


def test_the_table_of_evaluations(labelled_rows):
    """Values that JSON can hold, by every line of it; without a teacher, by those that need none."""
    model = make_composite()
    values = evaluate_rows(model, *labelled_rows)
    assert values.keys() == EVALUATIONS.keys() and json.loads(json.dumps(values, allow_nan=False)) == values
    assert [at for at, _ in values["gradient_norm"]] == [0, 1, 2, 3, 4, 5]
    assert [at for at, _ in values["drift"]] == [1, 2, 3, 4, 5]  # tokens read
    model.teacher = None
    alone = evaluate_rows(model, *labelled_rows)
    assert alone.keys() == {name for name, value in EVALUATIONS.items() if value(model, *labelled_rows) is not None}
    assert "gradient_norm" in alone and "drift" not in alone
    assert alone["geometry"].keys() == {"student"}

"""Every phase, generation and evaluation with tensors on another device: same values and gradients as on the CPU."""

import numpy as np
import pytest
import torch

from smt_hf.evaluation import (
    drift_by_position,
    geometry_of,
    gradient_norm_by_distance,
    score_student,
    score_teacher,
)
from tests.conftest import UPDATERS, VOCAB, make_composite, make_student
from tests.pretended_device import DEVICE, moved, pretended, to_cpu, to_device
from tests.unit.training.test_composite import EVERYTHING, make_windowed_composite, objective, rows

DOCUMENTS = {"document_ids": (torch.arange(13) // 5).expand(6, 13).contiguous()}


def losses_of(model, inputs, setting, training=True):
    model.train(training)
    outputs = model(**inputs, objective=setting, progress=0.5)
    if training:
        outputs.loss.backward()
    values = {name: float(value) for name, value in outputs.term_sums.items()}
    values["loss"] = float(outputs.loss.detach())
    return values, {name: to_cpu(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def assert_same_on_the_device(make, inputs, phase, setting, training=True):
    here = make()
    here.freeze_for(phase)
    expected, gradients = losses_of(here, inputs, setting, training)
    with pretended():
        away = moved(make())
        away.freeze_for(phase)
        inputs = {name: to_device(value) for name, value in inputs.items()}
        values, found = losses_of(away, inputs, setting, training)
    assert values == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_tensor_left_on_the_cpu_is_found():
    with pretended(), pytest.raises(RuntimeError, match="on the CPU"):
        torch.zeros(3, device=DEVICE) + torch.ones(3)


@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
@pytest.mark.parametrize("phase, settings", EVERYTHING)
def test_every_phase(phase, settings, kind):
    inputs = rows(ragged=kind == "padded") | (DOCUMENTS if kind == "packed" else {})
    assert_same_on_the_device(make_composite, inputs, phase, objective(phase, **settings))


@pytest.mark.parametrize("phase", ["smt", "bptt"])
def test_evaluation_inside_a_phase(phase):
    assert_same_on_the_device(make_composite, rows(ragged=True), phase, objective(phase), training=False)


def test_the_windowed_teacher():
    setting = objective("smt", num_supervised_transitions=2, teacher_weight=0.0)
    assert_same_on_the_device(make_windowed_composite, rows(), "smt", setting)


@pytest.mark.parametrize("updater_type", UPDATERS)
def test_generate(updater_type):
    prompt = torch.randint(1, VOCAB, (2, 5), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = make_student(updater_type=updater_type).generate(prompt, attention_mask=mask, **settings)
    with pretended():
        student = moved(make_student(updater_type=updater_type))
        found = student.generate(to_device(prompt), attention_mask=to_device(mask), **settings)
    assert torch.equal(to_cpu(found), expected)


def test_scores():
    streams = np.random.default_rng(0).integers(1, VOCAB, (4, 33))

    def scores(model):
        return [
            score_student(model.student, streams, streams).loss,
            score_teacher(model, streams, streams).loss,
            *drift_by_position(model, streams[:, :-1]),
            *gradient_norm_by_distance(model.student, streams, streams),
            *(part["spread"] for part in geometry_of(model, streams[:, :-1]).values()),
        ]

    expected = scores(make_composite())
    with pretended():
        found = scores(moved(make_composite()))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)

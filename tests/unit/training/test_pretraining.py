"""The composite: how terms are put together, and that a step may be cut in any way."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from smt_hf import (
    BPTTTrainingArguments,
    DMTTrainingArguments,
    SMTForPreTraining,
    SMTTrainingArguments,
)
from smt_hf.data import collate
from smt_hf.training import SMTPreTrainingConfig
from smt_hf.training.rollout import rollout
from tests.conftest import VOCAB, make_composite, make_student, student_config, teacher_config

SMALL = {"context_length": 12, "transition_steps": 4, "use_cpu": True}
ROWS = {"num_predictive_positions": 3, "future_length": 4}


def objective(phase, **settings):
    kind, more = {
        "smt": (SMTTrainingArguments, ROWS),
        "dmt": (DMTTrainingArguments, ROWS),
        "bptt": (BPTTTrainingArguments, {}),
    }[phase]
    return kind(output_dir="unused", **{**SMALL, **more, **settings}).objective()


def rows(batch=6, seed=0, ragged=False):
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(VOCAB, (batch, 13), generator=generator)
    inputs = {"input_ids": input_ids, "example_ids": torch.arange(batch) + 100}
    labels = input_ids.clone()
    if ragged:
        mask = torch.ones_like(input_ids)
        for row in range(batch):
            mask[row, 13 - row :] = 0
        labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
        inputs["attention_mask"] = mask
        labels = labels.masked_fill(mask == 0, -100)
    return {**inputs, "labels": labels}


EVERYTHING = [
    ("smt", {"on_policy_warmup_ratio": 0.0, "dynamics_warmup_ratio": 0.5}),
    ("smt", {"transition_steps": 1, "on_policy_fraction": 0.0}),
    ("smt", {"on_policy_mode": "sequential", "on_policy_warmup_ratio": 0.0}),
    ("dmt", {"transition_steps": 1}),
    ("dmt", {"on_policy_mode": "parallel", "on_policy_sweeps": 3}),
    ("bptt", {}),
]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("phase, settings", EVERYTHING)
def test_accumulation_invariance(phase, settings, ragged):
    """Loss, every term and all gradients: one batch of six == three of one, two and three."""
    inputs, setting = rows(ragged=ragged), objective(phase, **settings)
    results = []
    for cut in ([6], [1, 2, 3]):
        model = make_composite().train()
        model.freeze_for(phase)
        num_items = (inputs["labels"] != -100).sum()
        loss, sums, items = 0.0, {}, 0
        for part in zip(*(value.split(cut) for value in inputs.values())):
            outputs = model(**dict(zip(inputs, part)), objective=setting, progress=0.25, num_items_in_batch=num_items)
            outputs.loss.backward()
            loss += outputs.loss.item()
            items += outputs.num_items
            sums = {name: sums.get(name, 0.0) + value for name, value in outputs.term_sums.items()}
        assert items == num_items
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((loss, sums, gradients))
    (loss, sums, gradients), (other_loss, other_sums, other_gradients) = results
    assert loss == pytest.approx(other_loss, rel=1e-5)
    assert sums.keys() == other_sums.keys() and gradients.keys() == other_gradients.keys()
    for name in sums:
        torch.testing.assert_close(sums[name], other_sums[name], rtol=1e-4, atol=1e-4, msg=name)
    for name in gradients:
        torch.testing.assert_close(gradients[name], other_gradients[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("future_length", [2, 4, 8, 12])
@pytest.mark.parametrize("num_predictive_positions", [6, 9])
def test_nothing_depends_on_the_width_of_the_batch(future_length, num_predictive_positions):
    """Rows of 13, 9, 5 and 3 tokens: in one padded batch or each alone, the terms add up to the same."""
    examples = [{"input_ids": list(range(2, 2 + length)), "example_ids": 50 + length} for length in (13, 9, 5, 3)]
    setting = objective(
        "smt",
        on_policy_warmup_ratio=0.0,
        context_length=16,
        future_length=future_length,
        num_predictive_positions=num_predictive_positions,
    )
    together = make_composite().train()(**collate(examples), objective=setting)
    alone = [make_composite().train()(**collate([example]), objective=setting) for example in examples]
    assert together.num_items == sum(outputs.num_items for outputs in alone) == 30
    for name, value in together.term_sums.items():
        expected = sum(outputs.term_sums[name] for outputs in alone)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4, msg=name)


def test_future_longer_than_the_row():
    outputs = make_composite().train()(
        input_ids=torch.randint(VOCAB, (2, 4)), objective=objective("smt", future_length=9)
    )
    assert torch.isfinite(outputs.loss) and outputs.term_sums["predictive"] > 0


def test_a_lone_term_in_its_warm_up_has_a_gradient():
    model = make_composite().train()
    outputs = model(**rows(), objective=objective("bptt", readout_warmup_ratio=0.5), progress=0.0)
    outputs.loss.backward()
    assert outputs.loss == 0.0 and not model.student.lm_head.weight.grad.any()


def test_padding_counts_nowhere():
    """A short row alone == the same row padded, terms and loss."""
    model = make_composite().train()
    setting = objective("smt", predictive_weight=0.0, uniformity_weight=0.0, on_policy_fraction=0.0)
    short = torch.randint(1, VOCAB, (1, 9))
    alone = model(input_ids=short, objective=setting)
    mask = F.pad(torch.ones_like(short), (0, 4))
    padded = model(input_ids=F.pad(short, (0, 4)), attention_mask=mask, objective=setting)
    assert padded.num_items == alone.num_items == 9
    for name, value in alone.term_sums.items():
        torch.testing.assert_close(padded.term_sums[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_terms_by_hand():
    """k = 1 SMT without own states: each term from its definition."""
    model = make_composite().train()
    inputs = rows(batch=2)
    ids = inputs["input_ids"]
    setting = objective("smt", transition_steps=1, on_policy_fraction=0.0)
    outputs = model(**inputs, objective=setting)
    start = model.student.model.start_memory()
    labels, teacher_logits = model.teacher(ids[:, :-1], torch.arange(13), start, return_logits=True)
    moved = model.student.model.updater(
        labels[:, :-1].flatten(0, 1), model.student.model.embed_tokens(ids[:, :-1]).flatten(0, 1)
    ).view(2, 12, 3, 16)
    means = {name: value / outputs.num_items for name, value in outputs.term_sums.items()}
    torch.testing.assert_close(means["dynamics"], (moved - labels[:, 1:]).square().mean())
    read = torch.cat([start.expand(2, 1, -1, -1), moved], 1)
    logits = model.student.read_logits(read)
    torch.testing.assert_close(means["readout"], F.cross_entropy(logits.flatten(0, 1), ids.flatten()))
    expected = F.cross_entropy(teacher_logits[:, 1:].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(means["teacher"], expected)
    weights = {"readout": 1.0, "dynamics": 0.1, "predictive": 1.0, "uniformity": 0.001, "teacher": 1.0}
    torch.testing.assert_close(outputs.loss, sum(weights[name] * means[name] for name in weights))
    assert outputs.sequential_steps == 1


def test_predictive_decodes_the_future():
    """With one position there is, its loss is that of the decoder fed with the true tokens."""
    model = make_composite().train()
    ids = torch.randint(VOCAB, (2, 13))
    setting = objective("smt", num_predictive_positions=1, future_length=11, on_policy_fraction=0.0)
    outputs = model(input_ids=ids, objective=setting, example_ids=torch.tensor([5, 9]))
    losses = []
    labels = model.teacher(ids[:, :-1], torch.arange(13), model.student.model.start_memory())
    for row in range(2):
        options = []
        for position in range(3):
            future = ids[row, position : position + 11]
            longhand = []
            for ahead in range(11):
                embeds = model.student.model.embed_tokens(future[:ahead])[None] if ahead else None
                states = model.student.model.readout(labels[row, position][None], embeds)
                longhand.append(F.cross_entropy(model.student.lm_head(states[0, -1]), future[ahead]))
            options.append(torch.stack(longhand).mean())
        losses.append(options)
    got = outputs.term_sums["predictive"] / outputs.num_items
    sums = [(first + second) / 2 for first in losses[0] for second in losses[1]]
    assert min(abs(got.item() - value.item()) for value in sums) < 1e-5


def test_what_each_phase_trains():
    inputs = rows()
    for phase in ("smt", "dmt", "bptt"):
        model = make_composite().train()
        model.freeze_for(phase)
        model(**inputs, objective=objective(phase)).loss.backward()
        has_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert all(name.startswith("student.") for name in has_gradient) or phase == "smt"
        assert "student.model.initial_memory" in has_gradient, phase
        assert ("teacher.memory_proj.weight" in has_gradient) == (phase == "smt")
        assert "student.model.readout.norm.weight" in has_gradient
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert frozen == (
            set() if phase == "smt" else {n for n, _ in model.named_parameters() if n.startswith("teacher.")}
        )


def test_dmt_readout_stops_at_the_memory():
    model = make_composite().train()
    model.freeze_for("dmt")
    for trains_updater in (False, True):
        model.zero_grad()
        setting = objective("dmt", dynamics_weight=0.0, readout_trains_updater=trains_updater)
        model(**rows(), objective=setting).loss.backward()
        gradient = model.student.model.updater.out_proj.weight.grad
        assert (gradient is not None and bool(gradient.any())) == trains_updater


def test_bptt_carries_and_cuts():
    """A row in one window == two windows with the memory handed over, except for the gradient."""
    model = make_composite().train()
    ids = rows()["input_ids"]
    setting = objective("bptt")
    whole = model(input_ids=ids, objective=setting)
    first = model(input_ids=ids[:, :7], objective=setting)
    labels = ids[:, 6:].clone()
    labels[:, 0] = -100
    second = model(input_ids=ids[:, 6:], labels=labels, memory=first.memory, objective=setting)
    torch.testing.assert_close(second.memory, whole.memory, rtol=1e-4, atol=1e-5)
    total = first.term_sums["readout"] + second.term_sums["readout"]
    torch.testing.assert_close(total, whole.term_sums["readout"], rtol=1e-4, atol=1e-4)
    assert not first.memory.requires_grad
    fresh = model(input_ids=ids[:, :7], memory=torch.full_like(first.memory, float("nan")), objective=setting)
    torch.testing.assert_close(fresh.loss, first.loss)


def test_evaluation_scores_the_rollout_from_m_0():
    model = make_composite().eval()
    ids = rows()["input_ids"]
    outputs = model(input_ids=ids, objective=objective("smt"))
    start = model.student.model.start_memory().expand(6, 1, -1, -1)
    memories = rollout(model.student, start, ids[:, :-1])
    logits = model.student.read_logits(torch.cat([start, memories], 1))
    expected = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
    torch.testing.assert_close(outputs.term_sums["rollout"] / outputs.num_items, expected)
    assert outputs.term_sums["drift"] > 0


def test_from_student_and_refusals(tokens):
    student = make_student()
    model = SMTForPreTraining.from_student(student)
    assert model.student is student and model(input_ids=tokens, objective=objective("bptt")).loss.requires_grad
    with pytest.raises(ValueError, match="teacher"):
        model.freeze_for("smt")
    with pytest.raises(ValueError, match="unknown phase"):
        model.freeze_for("rlhf")
    with pytest.raises(ValueError, match="num_memory_tokens"):
        SMTPreTrainingConfig(student=student_config(), teacher=teacher_config(num_memory_tokens=2))


@pytest.mark.parametrize(
    "phase, settings, word",
    [
        ("smt", {"transition_steps": 5}, "transition_steps"),
        ("smt", {"future_length": 12}, "future_length"),
        ("smt", {"on_policy_fraction": 1.5}, "on_policy_fraction"),
        ("smt", {"on_policy_mode": "sideways"}, "on_policy_mode"),
        ("smt", {"on_policy_mode": "aggregate"}, "frozen teacher"),
        ("smt", {"dynamics_weight": -1.0}, "dynamics_weight"),
        ("bptt", {"readout_weight": 0.0}, "nothing to train"),
        ("dmt", {"on_policy_mode": "aggregate", "on_policy_fraction": 0.5}, "on_policy_fraction"),
        ("bptt", {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}, "do not fit"),
        ("dmt", {"label_smoothing_factor": 0.1}, "label_smoothing"),
        ("bptt", {"transition_steps": 0}, "transition_steps"),
    ],
)
def test_arguments_refuse(phase, settings, word):
    with pytest.raises(ValueError, match=word):
        objective(phase, **settings)


def test_other_schedules():
    for name in ("linear", "cosine", "constant"):
        arguments = SMTTrainingArguments(output_dir="unused", use_cpu=True, lr_scheduler_type=name)
        assert not arguments.lr_scheduler_kwargs
    assert SMTTrainingArguments(output_dir="unused", use_cpu=True).lr_scheduler_kwargs == {"min_lr_rate": 0.1}


def test_every_default_has_a_help_text():
    for kind in (SMTTrainingArguments, DMTTrainingArguments, BPTTTrainingArguments):
        for entry in dataclasses.fields(kind):
            own = any(
                entry.name in vars(base).get("__annotations__", {})
                for base in kind.__mro__
                if "smt_hf" in base.__module__
            )
            assert not own or entry.metadata.get("help"), entry.name

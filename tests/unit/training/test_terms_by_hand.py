"""Losses and starts that are off by default, a row and a transition at a time."""

import math

import pytest
import torch
import torch.nn.functional as F

from smt_hf.training import supervision
from smt_hf.training.positions import STREAM_AGES, STREAM_CHUNKS, STREAM_ON_POLICY, STREAM_TRANSITIONS
from smt_hf.training.rollout import example_uniforms, rollout
from tests.conftest import make_composite
from tests.unit.training.test_composite import (
    NOTHING,
    labels_of,
    make_windowed_composite,
    objective,
    ragged_rows,
    rows,
)

LENGTHS = (13, 12, 9, 6, 5, 3, 2)


def per_label(inputs, values):
    """The sum over rows that a composite reports for a term with the given value in each row."""
    counts = (inputs["labels"] != -100).sum(1)
    return sum(count * value for count, value in zip(counts, values))


def mean(values):
    return torch.stack(values).mean() if values else torch.zeros(())


def stepped(model, memory, token):
    return model.student.model.updater(memory[None], model.student.model.embed_tokens(token)[None])[0]


def future_of(model, inputs, row, length, memory, at, future_length):
    """Losses of the labelled ones of the next tokens of a row, decoded from a memory after `at` of its tokens."""
    ids, losses = inputs["input_ids"][row], []
    for ahead in range(min(future_length, length - at)):
        embeds = model.student.model.embed_tokens(ids[at : at + ahead])[None] if ahead else None
        logits = model.student.lm_head(model.student.model.readout(memory[None], embeds))[0, -1]
        if inputs["labels"][row, at + ahead] != -100:
            losses.append(F.cross_entropy(logits, inputs["labels"][row, at + ahead]))
    return losses


def divergence_of(model, memory, label):
    """KL(label || student) of the next-token distributions."""
    with torch.no_grad():
        wanted = model.student.read_logits(label[None])[0].softmax(-1)
    own = model.student.read_logits(memory[None])[0].softmax(-1)
    return (wanted * (wanted.log() - own.log())).sum()


def normalized(model, memory, label):
    return ((memory - label.detach()).square() / (model.label_variance() + 1e-3)).mean()


def hard_mean(values, errors, fraction):
    """A share of the weight goes to the sixteenth of the transitions with the largest errors."""
    hardest = sorted(range(len(errors)), key=lambda at: -errors[at].item())[: math.ceil(len(errors) / 16)]
    return (1 - fraction) * mean(values) + fraction * mean([values[at] for at in hardest])


def composite(make=make_composite):
    """Some of its normalised errors are above their bound."""
    model = make().train()
    model.label_square *= 0.02 + 0.2 * torch.rand(3, 16, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("phase, stride", [("smt", 1), ("dmt", 1), ("dmt", 3)])
@pytest.mark.parametrize("fraction", [0.0, 0.6])
def test_readout_match_and_hard_transitions(phase, stride, fraction):
    """All three errors of transitions, at the positions that count; the label's side is a constant."""
    model, inputs = composite(), ragged_rows(*LENGTHS)
    torch.nn.init.normal_(model.student.model.updater.out_proj.weight, std=3.0)
    settings = {"readout_match_weight": 1.5, "hard_transition_fraction": fraction}
    settings |= {"label_stride": stride, "on_policy_fraction": 1.0} if phase == "dmt" else {"on_policy_fraction": 0.0}
    model.freeze_for(phase)
    if fraction:
        settings["normalized_dynamics_weight"] = 1.0
    only = {**NOTHING, **({"dynamics_weight": 0.5} if fraction else {})}
    outputs = model(**inputs, objective=objective(phase, **{**only, **settings}))
    sums = {"readout_match": [], "dynamics": [], "normalized_dynamics": []}
    for row, length in enumerate(LENGTHS):
        labels = labels_of(model, inputs, row, range(length))
        memory, found = labels[0], {name: [] for name in (*sums, "error")}
        for at in range(length - 1):
            # m_0 is the label after no token.
            memory = labels[at] if phase == "smt" and at % 4 == 0 else memory
            memory = stepped(model, memory, inputs["input_ids"][row, at])
            if (at + 1) % stride == 0:
                found["readout_match"].append(divergence_of(model, memory, labels[at + 1]))
                found["dynamics"].append((memory - labels[at + 1]).square().mean())
                found["error"].append(normalized(model, memory, labels[at + 1]))
                found["normalized_dynamics"].append(found["error"][-1].clamp(max=20.0))
        for name, values in sums.items():
            values.append(hard_mean(found[name], found["error"], fraction))
    assert outputs.term_sums.keys() == (sums.keys() if fraction else {"dynamics", "readout_match"})
    for name in outputs.term_sums:
        torch.testing.assert_close(outputs.term_sums[name], per_label(inputs, sums[name]), rtol=1e-4, atol=1e-4)
    weights = {"readout_match": 1.5, "dynamics": 0.5 * bool(fraction), "normalized_dynamics": bool(fraction)}
    expected = sum(weights[name] * per_label(inputs, sums[name]) for name in outputs.term_sums) / outputs.num_items
    torch.testing.assert_close(outputs.loss, expected, rtol=1e-4, atol=1e-4)
    assert (outputs.label_moments is not None) == bool(fraction)
    got, wanted = (
        torch.autograd.grad(loss, model.student.lm_head.weight, retain_graph=True) for loss in (outputs.loss, expected)
    )
    assert got[0].any()
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-3, atol=1e-5)


def test_equal_memories_match():
    """The divergence is 0 where the student is at the label, and nothing pulls the readout there."""
    model = composite()
    seen = supervision.Supervision(None, 1, 1)
    seen.reached = torch.randn(2, 4, 3, 16, requires_grad=True)
    seen.reached_labels = seen.reached.detach().clone().requires_grad_()
    losses = seen.readout_match(model.student)
    losses.sum().backward()
    assert losses.abs().max() < 1e-6 and seen.reached_labels.grad is None
    assert seen.reached.grad.abs().max() < 1e-6 and model.student.lm_head.weight.grad.abs().max() < 1e-6


@pytest.mark.parametrize("fraction", [0.5, 1.0])
@pytest.mark.parametrize("phase", ["smt", "dmt"])
@pytest.mark.parametrize("progress, share", [(0.0, 0.8), (0.2, 0.4), (0.4, 0.0), (0.9, 0.0)])
def test_teacher_forcing(phase, fraction, progress, share):
    """Rows that start from own memories: every chunk starts part of the way from its own start to the label."""
    model, inputs = composite(), ragged_rows(*LENGTHS)
    model.freeze_for(phase)
    settings = {"on_policy_mode": "sequential", "on_policy_fraction": fraction, "on_policy_warmup_ratio": 0.0}
    settings |= {**NOTHING, "dynamics_weight": 1.0, "readout_weight": 1.0, "transition_steps": 4}
    forced = {"teacher_forcing": 0.8, "teacher_forcing_ratio": 0.4}
    setting = objective(phase, **settings, **forced)
    outputs = model(**inputs, objective=setting, progress=progress)
    is_own = example_uniforms(inputs["example_ids"], 1, setting.seed, STREAM_ON_POLICY)[:, 0] < fraction
    assert is_own.any() and (fraction == 1 or not is_own.all())
    errors = []
    for row, length in enumerate(LENGTHS):
        labels = labels_of(model, inputs, row, range(length))
        memory, own = labels[0], []
        for at in range(length - 1):
            if at and at % 4 == 0:
                pulled = memory.detach() + share * (labels[at].detach() - memory.detach())
                memory = pulled if is_own[row] else labels[at]
            memory = stepped(model, memory, inputs["input_ids"][row, at])
            own.append((memory - labels[at + 1]).square().mean())
        errors.append(mean(own))
    expected = per_label(inputs, errors)
    torch.testing.assert_close(outputs.term_sums["dynamics"], expected, rtol=1e-4, atol=1e-4)
    # A row that labels have pulled is no rollout of the student's own.
    short = inputs["attention_mask"].sum(1) - 1 <= 4
    counts = (inputs["labels"] != -100).sum(1)
    assert outputs.own_sums[1] == counts[short if share else is_own | short].sum()
    free = model(**inputs, objective=objective(phase, **settings), progress=progress)
    if not share:  # exactly the path without the setting
        assert torch.equal(free.loss, outputs.loss)
        assert torch.equal(free.own_sums, outputs.own_sums)
        return
    assert not torch.isclose(free.term_sums["dynamics"], outputs.term_sums["dynamics"], rtol=1e-3)
    alone = model(
        **inputs, objective=objective(phase, **{**settings, **forced, "readout_weight": 0.0}), progress=progress
    )
    alone.loss.backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad()
    (expected / outputs.num_items).backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert got.keys() == wanted.keys() and any(name.startswith("teacher.") for name in got) == (phase == "smt")
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=2e-5, msg=name)


def test_forced_sweeps():
    """In the `parallel` mode: as many chunks as the start is old, each pulled when it ends."""
    model, inputs = composite(), rows()
    settings = {**NOTHING, "dynamics_weight": 1.0, "on_policy_mode": "parallel", "on_policy_sweeps": 2}
    setting = objective("dmt", **settings, transition_steps=3, teacher_forcing=0.5)
    outputs = model(**inputs, objective=setting, progress=0.2)
    share = 0.5 * 0.8
    ages = 1 + (example_uniforms(inputs["example_ids"], 4, setting.seed, STREAM_AGES) * 2).long()
    errors = []
    for row in range(6):
        labels = labels_of(model, inputs, row, range(13))
        for chunk in range(4):
            begin = chunk - min(int(ages[row, chunk]), chunk)
            memory = labels[begin * 3]
            for at in range(begin * 3, chunk * 3 + 3):
                if at % 3 == 0 and at > begin * 3:
                    memory = memory + share * (labels[at] - memory)
                memory = stepped(model, memory, inputs["input_ids"][row, at])
                if at >= chunk * 3:
                    errors.append((memory - labels[at + 1]).square().mean())
    torch.testing.assert_close(outputs.term_sums["dynamics"] / outputs.num_items, mean(errors), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "padded", "documents"])
@pytest.mark.parametrize("transition_steps", [1, 5])
def test_one_forced_pass_is_starts_and_chunks(transition_steps, kind, monkeypatch):
    """As without forcing: one pass that is cut == own memories first, then all chunks."""
    inputs = ragged_rows(13, 9, 6) if kind == "padded" else rows()
    if kind == "documents":
        inputs["document_ids"] = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3]).expand(6, -1)
    setting = objective("dmt", transition_steps=transition_steps, teacher_forcing=0.5)
    results = []
    for is_one_pass in (True, False):
        if not is_one_pass:
            monkeypatch.setattr(supervision, "_is_one_pass", lambda *_: False)
        model = make_composite().train()
        model.freeze_for("dmt")
        outputs = model(**inputs, objective=setting, progress=0.3)
        assert (outputs.starts is None) == is_one_pass
        outputs.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((outputs, gradients))
    (first, gradients), (second, naive) = results
    for name in first.term_sums:
        torch.testing.assert_close(first.term_sums[name], second.term_sums[name], rtol=1e-4, atol=1e-4, msg=name)
    torch.testing.assert_close(first.own_sums, second.own_sums, rtol=1e-4, atol=1e-4)
    assert first.sequential_steps == second.sequential_steps
    assert gradients.keys() == naive.keys()
    for name in naive:
        torch.testing.assert_close(gradients[name], naive[name], rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("make", [make_composite, make_windowed_composite])
def test_sparse_chunks(steps, make):
    """A few chunks a row, each from a label at a random place, with every loss; shorter rows have one start."""
    model, inputs = composite(make), ragged_rows(*LENGTHS)
    torch.nn.init.normal_(model.student.model.updater.out_proj.weight, std=3.0)
    terms = ("dynamics", "normalized_dynamics", "readout_match", "readout", "consistency", "teacher_readout")
    terms = (*terms, "predictive")
    settings = {f"{name}_weight": 1.0 for name in terms} | {"teacher_weight": 0.0, "uniformity_weight": 0.0}
    settings |= {"num_supervised_transitions": 4, "supervised_chunk_steps": steps, "hard_transition_fraction": 0.5}
    settings |= {"num_consistency_chunks": 3, "hard_chunk_fraction": 0.4}
    setting = objective("smt", **settings)
    outputs = model(**inputs, objective=setting)
    places = example_uniforms(inputs["example_ids"], 4, setting.seed, STREAM_TRANSITIONS)
    draws = example_uniforms(inputs["example_ids"], 6, setting.seed, STREAM_CHUNKS)
    sums, transitions = {name: [] for name in terms}, 0
    for row, length in enumerate(LENGTHS):
        ids, targets = inputs["input_ids"][row], inputs["labels"][row]
        found, errors, ends = {name: [] for name in terms}, [], []
        for place in places[row].tolist():
            before = int(place * max(length - steps, 1))
            labels = labels_of(model, inputs, row, range(before, min(before + steps, length - 1) + 1))
            found["predictive"] += future_of(model, inputs, row, length, labels[0], before, 4)
            memory = labels[0]
            for at, label in enumerate(labels):
                if targets[before + at] != -100:
                    read = model.student.read_logits(label[None])[0]
                    found["teacher_readout"].append(F.cross_entropy(read, targets[before + at]))
            for at, label in enumerate(labels[1:], start=before):
                memory = stepped(model, memory, ids[at])
                transitions += 1
                found["dynamics"].append((memory - label).square().mean())
                errors.append(normalized(model, memory, label))
                found["normalized_dynamics"].append(errors[-1].clamp(max=20.0))
                found["readout_match"].append(divergence_of(model, memory, label))
                if targets[at + 1] != -100:
                    read = model.student.read_logits(memory[None])[0]
                    found["readout"].append(F.cross_entropy(read, targets[at + 1]))
            if len(labels) == steps + 1:
                ends.append((max(errors[-steps:]).clamp(max=20.0), memory, before + steps))
        for draw in range(3 if ends else 0):
            _, memory, at = (
                max(ends, key=lambda end: end[0].item())
                if draws[row, 3 + draw] < 0.4
                else ends[int(draws[row, draw] * len(ends))]
            )
            found["consistency"] += future_of(model, inputs, row, length, memory, at, 4)
        for name, values in found.items():
            is_error = name in ("dynamics", "normalized_dynamics", "readout_match")
            sums[name].append(hard_mean(values, errors, 0.5) if is_error else mean(values))
    assert outputs.term_sums.keys() == sums.keys()
    for name, values in sums.items():
        expected = per_label(inputs, values)
        assert expected > 0
        torch.testing.assert_close(outputs.term_sums[name], expected, rtol=1e-3, atol=1e-3, msg=name)
    assert outputs.sequential_steps == steps and outputs.transitions == transitions
    assert outputs.label_moments[0, 0] == transitions


def test_a_sparse_chunk_starts_documents_from_m_0():
    """Anywhere inside a chunk, as in the dense rollout."""
    model, ids = composite(make_windowed_composite), torch.randint(1, 30, (1, 9))
    documents = torch.tensor([[0, 0, 1, 1, 2, 2, 2, 3, 3]])
    settings = {**NOTHING, "dynamics_weight": 1.0, "num_supervised_transitions": 1, "supervised_chunk_steps": 4}
    setting, seen = objective("smt", **settings), set()
    for number in range(20):
        numbers = torch.tensor([number])
        before = int(example_uniforms(numbers, 1, setting.seed, STREAM_TRANSITIONS) * 5)
        outputs = model(ids, setting, document_ids=documents, example_ids=numbers)
        start = model.student.model.start_memory()
        labels = model.teacher(ids[:, :-1], torch.arange(9), start, None, documents[:, :-1])[0]
        memory, errors = labels[before], []
        for at in range(before, before + 4):
            if at and documents[0, at] != documents[0, at - 1]:
                memory = start
            memory = stepped(model, memory, ids[0, at])
            errors.append((memory - labels[at + 1]).square().mean())
        torch.testing.assert_close(outputs.term_sums["dynamics"] / 9, mean(errors), rtol=1e-4, atol=1e-5)
        seen.add(before)
    assert seen == set(range(5))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("hard_chunk_fraction", [0.0, 1.0])
def test_consistency_of_dmt(hard_chunk_fraction, stride):
    """At the ends of chunks of the student's own rollout."""
    lengths = (13, 12, 13, 11, 13, 10, 13, *LENGTHS)
    model, inputs = make_composite().train(), ragged_rows(*lengths)
    model.freeze_for("dmt")
    torch.nn.init.normal_(model.student.model.updater.out_proj.weight, std=3.0)
    settings = {**NOTHING, "consistency_weight": 1.0, "hard_chunk_fraction": hard_chunk_fraction, "future_length": 5}
    setting = objective("dmt", **settings, num_consistency_chunks=4, transition_steps=3, label_stride=stride)
    outputs = model(**inputs, objective=setting)
    noise = example_uniforms(inputs["example_ids"], 8, setting.seed, STREAM_CHUNKS)
    values = []
    for row, length in enumerate(lengths):
        labels, losses = labels_of(model, inputs, row, range(length)), []
        memories = rollout(model.student, labels[None, :1], inputs["input_ids"][row : row + 1, : length - 1])[0]
        ends = [end for end in (3, 6, 9, 12) if end < length]

        def error(end, memories=memories, labels=labels):
            read = [at for at in range(end - 2, end + 1) if at % stride == 0]
            return max(normalized(model, memories[at - 1], labels[at]).clamp(max=20.0).item() for at in read)

        for draw in range(4 if ends else 0):
            end = max(ends, key=error) if hard_chunk_fraction else ends[int(noise[row, draw] * len(ends))]
            losses += future_of(model, inputs, row, length, memories[end - 1], end, 5)
        values.append(mean(losses))
    torch.testing.assert_close(outputs.term_sums["consistency"], per_label(inputs, values), rtol=1e-4, atol=1e-4)
    outputs.loss.backward()
    for part in ("updater.out_proj", "readout.norm", "embed_tokens"):
        (weight,) = [p for name, p in model.student.named_parameters() if f"{part}.weight" in name]
        assert weight.grad.any(), part
    assert not any(p.grad is not None and p.grad.any() for p in model.teacher.parameters())


@pytest.mark.parametrize("carries_memory", [False, True])
def test_consistency_of_bptt(carries_memory):
    """At ends of windows inside a row; in a window of a stream, wherever the whole future is inside it."""
    model, inputs = composite(), ragged_rows(*LENGTHS)
    settings = {**NOTHING, "consistency_weight": 1.0, "future_length": 4, "num_consistency_chunks": 5}
    settings |= {"transition_steps": 4, "carries_memory": carries_memory}
    setting = objective("bptt", **settings)
    carried = torch.randn(len(LENGTHS), 3, 16) if carries_memory else None
    outputs = model(**inputs, objective=setting, memory=carried)
    noise = example_uniforms(inputs["example_ids"], 10, setting.seed, STREAM_CHUNKS)
    values, seen = [], set()
    for row, length in enumerate(LENGTHS):
        memory = carried[row] if carries_memory else model.student.model.start_memory()
        memories, losses = [], []
        for at in range(length - 1):
            memory = memory.detach() if not carries_memory and at and at % 4 == 0 else memory
            memory = stepped(model, memory, inputs["input_ids"][row, at])
            memories.append(memory)
        ends = [end for end in (4, 8, 12) if end < length]
        if carries_memory:
            ends = [end for end in range(1, length) if end + 4 <= length]
        for draw in range(5 if ends else 0):
            end = ends[int(noise[row, draw] * len(ends))]
            seen.add((row, end))
            losses += future_of(model, inputs, row, length, memories[end - 1], end, 4)
        values.append(mean(losses))
    assert len(seen) > 6 and outputs.own_sums is None
    expected = per_label(inputs, values)
    torch.testing.assert_close(outputs.term_sums["consistency"], expected, rtol=1e-4, atol=1e-4)
    outputs.loss.backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad()
    (expected / outputs.num_items).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=2e-5, msg=name)
    assert {"student.model.updater.out_proj.weight", "student.lm_head.weight"} <= got.keys()


def test_rows_without_a_place_for_the_future():
    """No window ends inside the rows, or no whole future fits: the term is 0, whatever the batch."""
    for settings in (
        {"carries_memory": False, "transition_steps": 8, "context_length": 12},
        {"future_length": 8, "transition_steps": 12},
    ):
        setting = objective("bptt", consistency_weight=1.0, **settings)
        outputs = make_composite().train()(input_ids=torch.randint(30, (2, 7)), objective=setting)
        assert outputs.term_sums["consistency"] == 0 and outputs.loss.isfinite() and outputs.loss.requires_grad


def taught_nats(model, memory, logits, top_k, temperature):
    """T^2 KL(teacher || student) of two distributions over k tokens and all others together."""
    wanted, own = (
        (logits / temperature).softmax(-1),
        (model.student.read_logits(memory[None])[0] / temperature).softmax(-1),
    )
    likeliest = sorted(range(len(wanted)), key=lambda token: -wanted[token].item())
    groups = [[token] for token in likeliest[:top_k]] + [likeliest[top_k:]]
    wanted, own = (torch.stack([part[group].sum() for group in groups if group]) for part in (wanted, own))
    return temperature**2 * (wanted * (wanted.log() - own.log())).sum()


@pytest.mark.parametrize("top_k", [4, 37])
@pytest.mark.parametrize("way", ["smt", "dmt", "stride", "alone", "sparse"])
def test_distillation(way, top_k):
    """The readout at labelled positions against the teacher's own head there; after no token it has no opinion."""
    model, inputs = composite(), ragged_rows(*LENGTHS)
    torch.nn.init.normal_(model.teacher.lm_head.weight, std=0.5)
    phase = "dmt" if way in ("dmt", "stride") else "smt"
    settings = {"distillation_weight": 1.5, "distillation_top_k": top_k, "distillation_temperature": 1.7}
    settings |= {
        "smt": {"on_policy_fraction": 0.0},
        "dmt": {},
        "stride": {"label_stride": 3},
        "alone": {"trains_updater": False},
        "sparse": {"num_supervised_transitions": 3},
    }[way]
    setting = objective(phase, **{**NOTHING, **settings})
    model.freeze_for(phase, trains_updater=way != "alone", objective=setting)
    outputs = model(**inputs, objective=setting)
    noise = example_uniforms(inputs["example_ids"], 3, setting.seed, STREAM_TRANSITIONS)
    values = []
    for row, length in enumerate(LENGTHS):
        ids, targets = inputs["input_ids"][row], inputs["labels"][row]
        labels, memory, found = labels_of(model, inputs, row, range(length)), None, {}
        logits = model.teacher(ids[None, : length - 1], torch.arange(length), labels[0], return_logits=True)[1][0]
        for at in range(length):
            if at and (way == "sparse" or (way == "smt" and at % 4 == 1)):
                memory = labels[at - 1]
            memory = labels[at] if at == 0 or way == "alone" else stepped(model, memory, ids[at - 1])
            if at and targets[at] != -100:
                found[at] = taught_nats(model, memory, logits[at].detach(), top_k, 1.7)
        if way == "sparse":
            places = [1 + int(draw * (length - 1)) for draw in noise[row]]
            values.append(mean([found[at] for at in places if at in found]))
        else:
            values.append(mean(list(found.values())))
    expected = per_label(inputs, values)
    torch.testing.assert_close(outputs.term_sums["distillation"], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.loss, 1.5 * expected / outputs.num_items, rtol=1e-4, atol=1e-4)
    outputs.loss.backward()
    assert model.student.lm_head.weight.grad.any() and model.teacher.lm_head.weight.grad is None

"""The composite: how terms are put together, and that a step may be cut in any way."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from smt_hf import (
    BPTTTrainingArguments,
    DMTTrainingArguments,
    SMTForPreTraining,
    SMTTrainingArguments,
)
from smt_hf.data import collate
from smt_hf.errors import InputError
from smt_hf.teachers import SMTTeacherConfig, SMTTeacherEncoder, SMTWindowedTeacher, SMTWindowedTeacherConfig
from smt_hf.training import SMTPreTrainingConfig, supervision
from smt_hf.training.losses import next_token_loss, uniformity_loss
from smt_hf.training.objective import LOSS_TERMS, part_of
from smt_hf.training.positions import STREAM_CHUNKS, STREAM_ON_POLICY, STREAM_TRANSITIONS
from smt_hf.training.rollout import example_uniforms, rollout
from smt_hf.training.supervision import TransitionBatch
from tests.conftest import VOCAB, make_composite, make_student, student_config, teacher_config, wake

SMALL = {"context_length": 12, "transition_steps": 4, "use_cpu": True}
ROWS = {"num_predictive_positions": 3, "future_length": 4}
WINDOWED = {
    "model_type": "smt_windowed_teacher",
    "hidden_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "context_length": 5,
}
# Every term that is off by default.
OURS = {
    "on_policy_warmup_ratio": 0.0,
    "normalized_dynamics_weight": 0.5,
    "consistency_weight": 0.7,
    "teacher_readout_weight": 0.3,
}
FORCED = {"teacher_forcing": 0.6, "teacher_forcing_ratio": 0.8, "on_policy_warmup_ratio": 0.0}
SPARSE = {**OURS, "num_supervised_transitions": 3, "readout_match_weight": 0.4, "hard_transition_fraction": 0.5}
DISTILLED = {"distillation_weight": 0.6, "distillation_temperature": 1.5, "distillation_top_k": 5}
# Of the terms alone: all of them, or what is named.
NOTHING = {f"{name}_weight": 0.0 for name in LOSS_TERMS}


def objective(phase, **settings):
    kind, more = {
        "smt": (SMTTrainingArguments, ROWS),
        "dmt": (DMTTrainingArguments, {}),
        "bptt": (BPTTTrainingArguments, {}),
    }[phase]
    own = {entry.name for entry in dataclasses.fields(kind)}
    settings = {name: value for name, value in settings.items() if name in own or name not in NOTHING}
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
    ("smt", OURS),
    ("smt", {**OURS, "on_policy_mode": "sequential", "readout_trains_updater": False}),
    ("smt", {"num_supervised_transitions": 3}),
    ("dmt", {"normalized_dynamics_weight": 0.5}),
    ("dmt", {"label_stride": 3, "transition_steps": 2, "normalized_dynamics_weight": 0.5}),
    ("bptt", {"carries_memory": False, "transition_steps": 5}),
    ("smt", {"trains_updater": False, "teacher_readout_weight": 0.3}),
    ("smt", {**OURS, "readout_match_weight": 0.4, "hard_transition_fraction": 0.5, "transition_steps": 1}),
    ("smt", {**OURS, **FORCED, "on_policy_mode": "sequential"}),
    ("smt", {**OURS, **FORCED, "on_policy_mode": "parallel", "on_policy_sweeps": 2}),
    ("smt", {**SPARSE, "num_supervised_transitions": 5}),
    ("smt", {**SPARSE, "supervised_chunk_steps": 3}),
    ("dmt", {**FORCED, "transition_steps": 3, "readout_match_weight": 0.4, "hard_transition_fraction": 0.5}),
    ("dmt", {**FORCED, "on_policy_fraction": 0.5, "transition_steps": 2}),
    ("dmt", {"consistency_weight": 0.7, "future_length": 4, "transition_steps": 3}),
    ("bptt", {"consistency_weight": 0.7, "future_length": 3}),
    ("bptt", {"consistency_weight": 0.7, "carries_memory": False, "transition_steps": 5}),
    ("smt", {**OURS, **DISTILLED}),
    ("smt", {**DISTILLED, "trains_updater": False}),
    ("smt", {**SPARSE, **DISTILLED, "supervised_chunk_steps": 3}),
    ("dmt", {**DISTILLED, "transition_steps": 3}),
    ("dmt", {**DISTILLED, "label_stride": 3, "distillation_top_k": 100}),
]
# Those that the variance of the labels goes into.
NORMALIZED = ("normalized_dynamics_weight", "hard_transition_fraction")


def make_windowed_composite():
    torch.manual_seed(0)
    return wake(SMTForPreTraining(SMTPreTrainingConfig(student=student_config(), teacher=WINDOWED)))


def ragged_rows(*lengths, document_ids=False):
    """Rows of the given lengths, padded, with some labels left out."""
    generator = torch.Generator().manual_seed(3)
    examples = []
    for length in lengths:
        input_ids = torch.randint(VOCAB, (length,), generator=generator)
        labels = input_ids.masked_fill(torch.rand(length, generator=generator) < 0.25, -100)
        examples.append({"input_ids": input_ids.numpy(), "labels": labels.numpy(), "example_ids": 70 + length})
    return collate(examples)


def labels_of(model, inputs, row, positions):
    """The teacher's memories after so many tokens of a row, from the row alone without its padding."""
    length = int(inputs["attention_mask"][row].sum()) if "attention_mask" in inputs else inputs["input_ids"].shape[1]
    ids = inputs["input_ids"][row : row + 1, : length - 1]
    return model.teacher(ids, torch.tensor(positions), model.student.model.start_memory())[0]


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
        loss, sums, items, pace = 0.0, {}, 0, {}
        for part in zip(*(value.split(cut) for value in inputs.values())):
            outputs = model(**dict(zip(inputs, part)), objective=setting, progress=0.25, num_items_in_batch=num_items)
            outputs.loss.backward()
            loss += outputs.loss.item()
            items += outputs.num_items
            sums = {name: sums.get(name, 0.0) + value for name, value in outputs.term_sums.items()}
            for name in ("own_sums", "label_moments"):
                if getattr(outputs, name) is not None:
                    pace[name] = pace.get(name, 0.0) + getattr(outputs, name)
        assert items == num_items
        has_moments = phase != "bptt" and any(name in settings for name in (*NORMALIZED, "consistency_weight"))
        assert ("label_moments" in pace) == has_moments
        sums |= pace
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


@pytest.mark.parametrize(
    "phase, settings",
    [
        (
            "smt",
            {
                **OURS,
                "predictive_weight": 0.0,
                "uniformity_weight": 0.0,
                "num_consistency_chunks": 5,
                "hard_chunk_fraction": 0.5,
            },
        ),
        (
            "smt",
            {
                **OURS,
                "predictive_weight": 0.0,
                "uniformity_weight": 0.0,
                "on_policy_mode": "sequential",
                "future_length": 9,
            },
        ),
        ("smt", {"num_supervised_transitions": 4}),
        ("smt", {**SPARSE, "predictive_weight": 0.0, "supervised_chunk_steps": 3}),
        ("smt", {**SPARSE, "predictive_weight": 0.0, "supervised_chunk_steps": 1}),
        ("smt", {**NOTHING, **FORCED, "readout_match_weight": 1.0, "hard_transition_fraction": 0.7}),
        ("dmt", {**FORCED, "transition_steps": 3, "readout_match_weight": 1.0, "hard_transition_fraction": 0.7}),
        ("dmt", {"consistency_weight": 1.0, "future_length": 3, "transition_steps": 3}),
        ("dmt", {"consistency_weight": 1.0, "label_stride": 2, "transition_steps": 3}),
        ("bptt", {"consistency_weight": 1.0, "future_length": 4, "context_length": 16}),
        ("bptt", {"consistency_weight": 1.0, "carries_memory": False, "transition_steps": 5}),
        ("dmt", {"label_stride": 4, "normalized_dynamics_weight": 1.0}),
        ("bptt", {"carries_memory": False, "transition_steps": 5}),
        ("smt", {**NOTHING, **DISTILLED}),
        ("smt", {**NOTHING, **DISTILLED, "trains_updater": False}),
        ("smt", {**NOTHING, **DISTILLED, "num_supervised_transitions": 4, "supervised_chunk_steps": 3}),
        ("dmt", {**NOTHING, **DISTILLED, "label_stride": 2}),
    ],
)
@pytest.mark.parametrize("companions", [(), (16,)])
def test_new_terms_do_not_depend_on_the_width_of_the_batch(phase, settings, companions):
    """Rows of 13 to 2 tokens, each alone or together, or each beside a longer row."""
    setting = objective(phase, **{"context_length": 16, **settings})
    progress = 0.3 if "teacher_forcing" in settings else 1.0
    examples = [{"input_ids": list(range(2, 2 + length)), "example_ids": 50 + length} for length in (13, 9, 6, 5, 4, 2)]
    more = [{"input_ids": list(range(5, 5 + length)), "example_ids": 90} for length in companions]

    def sums(*examples):
        outputs = make_composite().train()(**collate(list(examples)), objective=setting, progress=progress)
        sums = dict(outputs.term_sums)
        for name in ("own_sums", "label_moments"):
            if getattr(outputs, name) is not None:
                sums[name] = getattr(outputs, name)
        return sums

    beside = sums(*more) if more else {}
    together = sums(*examples, *more)
    alone = [sums(example, *more) for example in examples]
    for name, value in together.items():
        expected = sum(one[name] for one in alone) - (len(examples) - 1) * beside.get(name, 0.0)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-3, msg=name)


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


@pytest.mark.parametrize("labelled", ["some", "none", "all"])
def test_readout_of_labelled_memories_only(labelled):
    """Values and gradients are those of reading everything; a row, or a batch, without a label is worth 0."""
    targets = torch.randint(VOCAB, (4, 7))
    if labelled != "all":
        targets[torch.rand(4, 7) < 0.6] = -100
        targets[2] = -100
    if labelled == "none":
        targets[:] = -100
    given = torch.randn(4, 7, 3, 16)
    results = []
    for is_dense in (False, True):
        model, memories = make_composite(), given.clone().requires_grad_()
        if is_dense:
            losses = next_token_loss(model.student.read_logits(memories), targets)
        else:
            seen = supervision.Supervision(None, 1, 1, read=memories, read_targets=targets)
            losses = seen.readout_loss(model.student, "read")
        (losses * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        results.append((losses, memories.grad, gradients))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)
    assert results[0][2].keys() == results[1][2].keys() and bool(results[0][2]) == (labelled != "none")
    for name, gradient in results[0][2].items():
        torch.testing.assert_close(gradient, results[1][2][name], rtol=1e-4, atol=1e-5, msg=name)


def test_only_what_has_a_label_is_read():
    model, sizes = make_composite().train(), []
    original = model.student.read_logits
    model.student.read_logits = lambda memories: (sizes.append(memories.shape[:-2].numel()), original(memories))[1]
    inputs = rows(ragged=True)
    model(**inputs, objective=objective("bptt"))
    assert sizes == [(inputs["labels"] != -100).sum()]


def naive_dynamics(model, inputs, transition_steps, variance):
    """Raw and normalised error of every real transition, a list a row; chunks start at the teacher's memories."""
    raw, normalized = [], []
    for row in range(len(inputs["input_ids"])):
        length = int(inputs["attention_mask"][row].sum())
        labels, memory = labels_of(model, inputs, row, range(length)), None
        raw.append([])
        normalized.append([])
        for index in range(length - 1):
            start = labels[index] if index % transition_steps == 0 else memory
            embeds = model.student.model.embed_tokens(inputs["input_ids"][row, index])
            memory = model.student.model.updater(start[None], embeds[None])[0]
            squares = (memory - labels[index + 1]).square()
            raw[-1].append(squares.mean())
            normalized[-1].append((squares / (variance + 1e-3)).mean().clamp(max=20.0))
    return raw, normalized


def test_normalized_dynamics_by_hand():
    """With the running variance of two earlier steps; the gradient that reaches the labels comes from the starts."""
    model = make_composite().train()
    inputs = ragged_rows(13, 9, 6, 3)
    setting = objective("smt", **{**NOTHING, "on_policy_fraction": 0.0, "normalized_dynamics_weight": 2.0})
    for _ in range(2):
        model.update_label_moments(model(**ragged_rows(11, 13), objective=setting).label_moments)
    model.label_square += 0.01 * torch.rand(3, 16)
    variance = model.label_square - model.label_mean**2
    assert 0 < variance.min() < variance.max() < 3 and variance.std() > 0.01
    outputs = model(**inputs, objective=setting)
    raw, normalized = naive_dynamics(model, inputs, 4, variance)
    counts = (inputs["labels"] != -100).sum(1)
    for name, errors in (("dynamics", raw), ("normalized_dynamics", normalized)):
        expected = sum(count * torch.stack(own).mean() for count, own in zip(counts, errors))
        torch.testing.assert_close(outputs.term_sums[name], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.loss, 2.0 * outputs.term_sums["normalized_dynamics"] / counts.sum())
    # k = 12: the only start is m_0, so that nothing is left for the teacher.
    setting = dataclasses.replace(setting, transition_steps=12)
    model(**inputs, objective=setting).loss.backward()
    assert not any(p.grad is not None and p.grad.any() for p in model.teacher.parameters())
    assert model.student.model.updater.out_proj.weight.grad.any()


@pytest.mark.parametrize("phase, stride", [("smt", 1), ("dmt", 1), ("dmt", 5)])
def test_label_moments(phase, stride):
    """Number, sums and squares of the labels of real transitions, and the running estimate, against numpy."""
    model = make_composite().train()
    settings = {"transition_steps": 1, "on_policy_fraction": 1.0}
    settings |= {"label_stride": stride} if phase == "dmt" else {}
    settings["normalized_dynamics_weight"] = 1.0
    setting = objective(phase, **settings)
    assert torch.equal(model.label_variance(), torch.ones(3, 16))
    mean = square = None
    for step, lengths in enumerate(((13, 7), (9, 13, 6), (8, 4))):
        inputs = ragged_rows(*lengths)
        labels = np.concatenate(
            [
                labels_of(model, inputs, row, range(stride, length, stride)).detach().numpy()
                for row, length in enumerate(lengths)
                if length > stride
            ]
        )
        moments = model(**inputs, objective=setting).label_moments
        assert not moments.requires_grad and (moments[0] == len(labels)).all()
        np.testing.assert_allclose(moments[1:4], labels.sum(0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(moments[4:], (labels**2).sum(0), rtol=1e-4, atol=1e-4)
        model.update_label_moments(moments)
        own = labels.mean(0), (labels**2).mean(0)
        mean, square = own if step == 0 else (0.9 * mean + 0.1 * own[0], 0.9 * square + 0.1 * own[1])
        np.testing.assert_allclose(model.label_variance(), np.maximum(square - mean**2, 0), rtol=1e-4, atol=1e-4)
    assert model.label_updates == 3
    dense = model(**rows(), objective=setting).label_moments  # no padding, no mask
    assert (dense[0] == 6 * (12 // stride)).all()
    assert model(**rows(), objective=objective(phase)).label_moments is None


@pytest.mark.parametrize("hard_chunk_fraction", [0.0, 0.5, 1.0])
def test_consistency_by_hand(hard_chunk_fraction):
    """Which chunk ends are decoded, and the mean over everything predicted there."""
    model = make_composite().train()
    inputs = ragged_rows(13, 12, 9, 6, 5, 4)  # chunk ends before the last token: 3, 2, 2, 1, 1 and none
    settings = {"on_policy_fraction": 0.0, "consistency_weight": 1.0, "hard_chunk_fraction": hard_chunk_fraction}
    setting = objective("smt", **{**NOTHING, **settings, "num_consistency_chunks": 4})
    model.label_square += torch.rand(3, 16)
    torch.nn.init.normal_(model.student.model.updater.out_proj.weight, std=3.0)  # any chunk may be the hardest
    outputs = model(**inputs, objective=setting)
    _, errors = naive_dynamics(model, inputs, 4, model.label_variance())
    noise = example_uniforms(inputs["example_ids"], 8, setting.seed, STREAM_CHUNKS)
    expected, seen = torch.zeros(6), set()
    for row, length in enumerate((13, 12, 9, 6, 5, 4)):
        ends = [end for end in (4, 8, 12) if end < length]
        losses = []
        for draw in range(4 if ends else 0):
            if noise[row, 4 + draw] < hard_chunk_fraction:
                end = max(ends, key=lambda end: max(errors[row][end - 4 : end]))
            else:
                end = ends[int(noise[row, draw] * len(ends))]
            seen.add((row, end))
            start = labels_of(model, inputs, row, [end - 4])[:, None]
            ids = inputs["input_ids"][row]
            memory = rollout(model.student, start, ids[None, end - 4 : end])[0, -1]
            future = ids[end : min(end + 4, length)]
            for ahead, token in enumerate(inputs["labels"][row, end : min(end + 4, length)]):
                embeds = model.student.model.embed_tokens(future[:ahead])[None] if ahead else None
                logits = model.student.lm_head(model.student.model.readout(memory[None], embeds))[0, -1]
                losses += [F.cross_entropy(logits, token)] if token != -100 else []
        expected[row] = torch.stack(losses).mean() if losses else 0.0
    assert len({end for _, end in seen}) > 1 and (len(seen) == 5) == (hard_chunk_fraction == 1.0)
    counts = (inputs["labels"] != -100).sum(1)
    torch.testing.assert_close(outputs.term_sums["consistency"], (expected * counts).sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.loss, (expected * counts).sum() / counts.sum(), rtol=1e-4, atol=1e-4)
    outputs.loss.backward()
    assert model.student.model.updater.out_proj.weight.grad.any()
    assert model.teacher.memory_proj.weight.grad.any()  # through the chunks' starts


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("future_length", [1, 4, 12])
def test_future_loss_by_hand(share, future_length):
    """However few of the tokens have a label: value and gradients are those of decoding everything."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(VOCAB, (3, 13), generator=generator)
    targets = ids.masked_fill(torch.rand(ids.shape, generator=generator) >= share, -100)
    if share == 0.1:
        targets[0, 3] = ids[0, 3]  # one at least, in the middle of a future
    positions = torch.tensor([[0, 2, 5, 9], [12, 1, 3, 3], [4, 7, 8, 11]])
    is_real = torch.ones_like(positions, dtype=torch.bool)
    is_real[1, 2] = is_real[2, 0] = False
    given = torch.randn(3, 4, 3, 16, generator=generator)
    results = []
    for is_naive in (False, True):
        model, memories = make_composite(), given.clone().requires_grad_()
        if is_naive:
            losses = []
            for row in range(3):
                own = []
                for place, begin in enumerate(positions[row].tolist()):
                    for at in range(begin, min(begin + future_length, 13)):
                        embeds = model.student.model.embed_tokens(ids[row : row + 1, begin:at]) if at > begin else None
                        states = model.student.model.readout(memories[row, place][None], embeds)
                        if is_real[row, place] and targets[row, at] != -100:
                            own.append(F.cross_entropy(model.student.lm_head(states[0, -1]), targets[row, at]))
                losses.append(torch.stack(own).mean() if own else torch.zeros(()))
            losses = torch.stack(losses)
        else:
            batch = TransitionBatch(ids, None, targets, None, None, 4)
            decoded = supervision.Supervision(batch, 1, 1)
            losses = decoded.future_loss(model.student, (memories, positions, is_real), future_length)
        if share:
            (losses * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        results.append((losses, memories.grad, model.student.lm_head.weight.grad))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert bool(results[0][0].any()) == (share > 0)


def test_teacher_readout():
    """The student's readout on all the teacher's memories; it trains the teacher."""
    model = make_composite().train()
    inputs = ragged_rows(13, 9, 3)
    outputs = model(**inputs, objective=objective("smt", **{**NOTHING, "teacher_readout_weight": 0.5}))
    expected = 0.0
    for row, length in enumerate((13, 9, 3)):
        logits = model.student.read_logits(labels_of(model, inputs, row, range(length)))
        expected += F.cross_entropy(logits, inputs["labels"][row, :length], reduction="sum", ignore_index=-100)
    torch.testing.assert_close(outputs.term_sums["teacher_readout"], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.loss, 0.5 * expected / outputs.num_items, rtol=1e-4, atol=1e-4)
    outputs.loss.backward()
    assert model.teacher.memory_proj.weight.grad.any() and model.student.lm_head.weight.grad.any()


def test_sparse_transitions_by_hand():
    """SMT as published: a few transitions a row, each from a windowed label to the next one."""
    model = make_windowed_composite().train()
    assert isinstance(model.teacher, SMTWindowedTeacher)
    lengths = (13, 9, 4, 2)
    inputs = ragged_rows(*lengths)
    settings = {"num_supervised_transitions": 3, "teacher_weight": 0.0, "uniformity_weight": 0.2}
    setting = objective("smt", **settings)
    outputs = model(**inputs, objective=setting)
    noise = example_uniforms(inputs["example_ids"], 3, setting.seed, STREAM_TRANSITIONS)
    student, start = model.student, model.student.model.start_memory()
    sums = dict.fromkeys(("dynamics", "readout", "predictive", "uniformity"), 0.0)
    for row, length in enumerate(lengths):
        ids, targets = inputs["input_ids"][row], inputs["labels"][row]

        def label(position, ids=ids):
            window = ids[None, max(position - 5, 0) : position]
            return model.teacher(window, torch.tensor([window.shape[1]]), start)[0, 0] if position else start

        dynamics, readout, predictive, starts = [], [], [], []
        for draw in range(3):
            before = int(noise[row, draw] * (length - 1))
            starts.append(label(before))
            reached = student.model.updater(starts[-1][None], student.model.embed_tokens(ids[before])[None])[0]
            dynamics.append((reached - label(before + 1)).square().mean())
            if targets[before + 1] != -100:
                readout.append(F.cross_entropy(student.read_logits(reached[None])[0], targets[before + 1]))
            for ahead in range(min(4, length - before)):
                embeds = student.model.embed_tokens(ids[before : before + ahead])[None] if ahead else None
                logits = student.lm_head(student.model.readout(starts[-1][None], embeds))[0, -1]
                if targets[before + ahead] != -100:
                    predictive.append(F.cross_entropy(logits, targets[before + ahead]))
        count = (targets != -100).sum()
        for name, losses in (("dynamics", dynamics), ("readout", readout), ("predictive", predictive)):
            sums[name] += count * (torch.stack(losses).mean() if losses else 0.0)
        sums["uniformity"] += count * uniformity_loss(torch.stack(starts)[None])[0]
    assert outputs.term_sums.keys() == sums.keys()
    for name, value in sums.items():
        torch.testing.assert_close(outputs.term_sums[name], value, rtol=1e-4, atol=1e-4, msg=name)
    weights = {"dynamics": 0.1, "readout": 1.0, "predictive": 1.0, "uniformity": 0.2}
    expected = sum(weights[name] * value for name, value in sums.items()) / outputs.num_items
    torch.testing.assert_close(outputs.loss, expected, rtol=1e-4, atol=1e-4)
    assert outputs.sequential_steps == 1 and outputs.transitions == 4 * 3 and outputs.own_sums is None
    outputs.loss.backward()
    assert model.teacher.memory_proj.weight.grad.any() and student.model.updater.out_proj.weight.grad.any()
    more = [dataclasses.replace(setting, seed=seed) for seed in range(1, 6)]
    sums = {float(model(**inputs, objective=other).term_sums["dynamics"]) for other in more}
    assert len(sums) == 5  # drawn from the seed


def test_a_sparse_transition_starts_a_document_from_m_0():
    """As in the dense rollout: a document's first token is read by m_0, not by the document before it."""
    model = make_windowed_composite().train()
    ids = torch.randint(VOCAB, (1, 3))
    setting = objective(
        "smt", **{**NOTHING, "dynamics_weight": 1.0, "num_supervised_transitions": 1, "transition_steps": 2}
    )
    start, losses = model.student.model.start_memory(), {}
    for number in range(20):
        numbers = torch.tensor([number])
        before = int(example_uniforms(numbers, 1, setting.seed, STREAM_TRANSITIONS) * 2)
        outputs = model(ids, setting, document_ids=torch.tensor([[0, 1, 1]]), example_ids=numbers)
        losses[before] = outputs.term_sums["dynamics"] / outputs.num_items
    assert losses.keys() == {0, 1}
    for before in (0, 1):  # either token is the first of its document
        reached = model.student.model.updater(start[None], model.student.model.embed_tokens(ids[:, before]))[0]
        label = model.teacher(ids[:, before : before + 1], torch.tensor([1]), start)[0, 0]
        torch.testing.assert_close(losses[before], (reached - label).square().mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transition_steps", [1, 3])
@pytest.mark.parametrize("stride", [1, 2, 4, 5])
def test_label_stride_by_hand(transition_steps, stride):
    """DMT: own memories against labels `stride` tokens apart; everything else is as with all labels."""
    model = make_composite().train()
    model.freeze_for("dmt")
    lengths = (13, 9, 6, 3)
    inputs = ragged_rows(*lengths)
    settings = {"transition_steps": transition_steps, "normalized_dynamics_weight": 0.5}
    setting = objective("dmt", label_stride=stride, **settings)
    model.label_square += torch.rand(3, 16)
    outputs = model(**inputs, objective=setting)
    start = model.student.model.start_memory()
    sums = {"dynamics": 0.0, "normalized_dynamics": 0.0}
    for row, length in enumerate(lengths):
        memories = rollout(model.student, start[None, None], inputs["input_ids"][row : row + 1, : length - 1])[0]
        positions = list(range(stride, length, stride))
        if not positions:
            continue
        errors = (memories[[at - 1 for at in positions]] - labels_of(model, inputs, row, positions)).square()
        count = (inputs["labels"][row] != -100).sum()
        sums["dynamics"] += count * errors.mean()
        normalized = (errors / (model.label_variance() + 1e-3)).mean((-2, -1)).clamp(max=20.0)
        sums["normalized_dynamics"] += count * normalized.mean()
    for name, value in sums.items():
        torch.testing.assert_close(outputs.term_sums[name], value, rtol=1e-4, atol=1e-4, msg=name)
    dense = make_composite().train()(**inputs, objective=objective("dmt", **settings))
    torch.testing.assert_close(outputs.term_sums["readout"], dense.term_sums["readout"], rtol=1e-5, atol=1e-5)
    assert outputs.transitions == sum(length - 1 for length in lengths)  # padding is none
    outputs.loss.backward()
    assert model.student.model.updater.out_proj.weight.grad.any()


def test_truncated_rows_are_one_row():
    """bptt without a carried memory: the loss of the whole row, the gradient of its windows alone."""
    inputs = ragged_rows(13, 9, 6)
    results = []
    for settings in ({"transition_steps": 5, "carries_memory": False}, {"transition_steps": 12}):
        model = make_composite().train()
        outputs = model(**inputs, objective=objective("bptt", **settings))
        outputs.loss.backward()
        assert outputs.sequential_steps == 12 and outputs.transitions == 12 + 8 + 5
        results.append((outputs.loss, outputs.memory, model.student.model.embed_tokens.weight.grad))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
    assert not torch.allclose(results[0][2], results[1][2], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", ["plain", "padded", "documents"])
@pytest.mark.parametrize("transition_steps", [1, 5])
def test_one_pass_is_starts_and_chunks(transition_steps, kind, stride, monkeypatch):
    """Where all chunks start from own memories: one pass that is cut == own memories first, then all chunks."""
    inputs = ragged_rows(13, 9, 6) if kind == "padded" else rows()
    if kind == "documents":
        inputs["document_ids"] = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3]).expand(6, -1)
    settings = {"transition_steps": transition_steps, "label_stride": stride, "normalized_dynamics_weight": 0.5}
    results = []
    for is_one_pass in (True, False):
        if not is_one_pass:
            monkeypatch.setattr(supervision, "_is_one_pass", lambda *_: False)
        model = make_composite().train()
        model.freeze_for("dmt")
        outputs = model(**inputs, objective=objective("dmt", **settings))
        outputs.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((outputs, gradients))
    (first, gradients), (second, naive) = results
    for name in first.term_sums:
        torch.testing.assert_close(first.term_sums[name], second.term_sums[name], rtol=1e-4, atol=1e-4, msg=name)
    torch.testing.assert_close(first.own_sums, second.own_sums, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first.memory, second.memory, rtol=1e-4, atol=1e-5)
    assert first.sequential_steps == second.sequential_steps == (15 if transition_steps == 5 else 12)
    assert gradients.keys() == naive.keys()
    for name in naive:
        torch.testing.assert_close(gradients[name], naive[name], rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_every_batch_calls_the_modules_as_often(mode):
    """With weights in shards a call is a collective operation: a rank with no own row makes it, too."""
    model = make_composite()
    setting = objective("smt", **OURS, on_policy_mode=mode, on_policy_fraction=0.5, on_policy_sweeps=2)
    calls: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    orders = set()
    for example in range(12):
        inputs = {"input_ids": rows(1)["input_ids"], "example_ids": torch.tensor([example])}
        calls.clear()
        model(**inputs, objective=setting, progress=0.5)
        orders.add(tuple(calls))
    assert len(orders) == 1
    draws = example_uniforms(torch.arange(12), 1, setting.seed, STREAM_ON_POLICY)
    assert (draws < 0.5).any() and (draws >= 0.5).any()


def test_teacher_alone():
    """Before the updater is trained: the terms of the teacher's memories, and no transition."""
    model, inputs = make_composite().train(), rows()
    setting = objective("smt", trains_updater=False, teacher_readout_weight=1.0)
    model.freeze_for("smt", trains_updater=False)
    outputs = model(**inputs, objective=setting)
    whole = model(**inputs, objective=objective("smt", teacher_readout_weight=1.0))
    assert set(outputs.term_sums) == {"teacher", "teacher_readout", "predictive", "uniformity"}
    for name, value in outputs.term_sums.items():
        torch.testing.assert_close(value, whole.term_sums[name], msg=name)
    torch.testing.assert_close(outputs.own_sums[0], outputs.term_sums["teacher_readout"])
    outputs.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".updater." not in name), name
        # DDP waits for the gradient of every parameter that wants one.
        assert (parameter.grad is not None) == parameter.requires_grad, name
    model.freeze_for("dmt")
    assert all(parameter.requires_grad for parameter in model.student.parameters())


def test_own_sums():
    """What a curriculum is gated by: rows that the student rolled out from m_0 by itself, and no other."""
    inputs = ragged_rows(13, 12, 11, 9, 6, 5, 4, 3)
    counts = (inputs["labels"] != -100).sum(1)
    alone = []
    for row, length in enumerate((13, 12, 11, 9, 6, 5, 4, 3)):
        model = make_composite().train()
        ids, targets = inputs["input_ids"][row : row + 1, :length], inputs["labels"][row : row + 1, :length]
        outputs = model(input_ids=ids, labels=targets, objective=objective("bptt", transition_steps=12))
        alone.append(outputs.term_sums["readout"])
    alone = torch.stack(alone)
    setting = objective("smt", on_policy_mode="sequential", on_policy_warmup_ratio=0.2, on_policy_fraction=0.5)
    own = example_uniforms(inputs["example_ids"], 1, setting.seed, STREAM_ON_POLICY)[:, 0] < 0.5
    assert 2 <= own.sum() <= 6
    # A row of one chunk starts at m_0 anyway.
    short = torch.tensor([13, 12, 11, 9, 6, 5, 4, 3]) - 1 <= setting.transition_steps
    assert (own & ~short).sum() > 0 and (short & ~own).sum() > 0

    def of(rows):
        return torch.stack([alone[rows].sum(), counts[rows].sum().float()])

    model = make_composite().train()
    sums = model(**inputs, objective=setting).own_sums
    torch.testing.assert_close(sums, of(own | short), rtol=1e-4, atol=1e-4)
    sums = model(**inputs, objective=setting, progress=0.1).own_sums
    torch.testing.assert_close(sums, of(short), rtol=1e-4, atol=1e-4)
    for phase, settings in (
        ("smt", {"on_policy_mode": "parallel", "on_policy_warmup_ratio": 0.0}),
        ("smt", {"on_policy_fraction": 0.0}),
        ("dmt", {"on_policy_mode": "aggregate"}),
    ):
        setting = objective(phase, **settings)
        expected = of(short if setting.transition_steps == 4 else torch.zeros_like(short))
        torch.testing.assert_close(model(**inputs, objective=setting).own_sums, expected, rtol=1e-4, atol=1e-4)
    assert model(**inputs, objective=dataclasses.replace(setting, weights={"dynamics": 1.0})).own_sums is None
    everything = of(torch.ones_like(short))
    for phase in ("dmt", "bptt"):
        sums = model(**inputs, objective=objective(phase)).own_sums
        torch.testing.assert_close(sums, everything, rtol=1e-4, atol=1e-4)
        assert not sums.requires_grad


@pytest.mark.parametrize("settings", [OURS, {"num_supervised_transitions": 2}])
def test_dynamics_scale(settings):
    """Holds back the dynamics terms and nothing else."""
    model, inputs = make_composite().train(), rows()
    setting = objective("smt", **settings)
    full = model(**inputs, objective=setting)
    held = model(**inputs, objective=setting, dynamics_scale=0.05)
    terms = {name: value / full.num_items for name, value in full.term_sums.items()}
    less = 0.1 * terms["dynamics"] + settings.get("normalized_dynamics_weight", 0.0) * terms.get(
        "normalized_dynamics", 0.0
    )
    assert less > 0
    torch.testing.assert_close(held.loss, full.loss - 0.95 * less, rtol=1e-5, atol=1e-6)
    for name, value in full.term_sums.items():
        torch.testing.assert_close(held.term_sums[name], value)


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


def test_kinds_of_teacher(tmp_path):
    """`model_type` names the kind; the shape of a memory follows the student, also after saving and loading."""
    kinds = {
        "smt_teacher": (SMTTeacherConfig, SMTTeacherEncoder, {"sliding_window": 5}),
        "smt_windowed_teacher": (SMTWindowedTeacherConfig, SMTWindowedTeacher, {"context_length": 7}),
    }
    for name, (config_class, teacher_class, fields) in kinds.items():
        fields = {"hidden_size": 24, "num_attention_heads": 2, **fields}
        for given in ({"model_type": name, **fields}, config_class(**fields, vocab_size=VOCAB, num_memory_tokens=3,
                                                                    memory_size=16)):  # fmt: skip
            torch.manual_seed(0)
            model = wake(SMTForPreTraining(SMTPreTrainingConfig(student=student_config(), teacher=given)))
            assert type(model.config.teacher) is config_class and type(model.teacher) is teacher_class
            for own, value in {**fields, "vocab_size": VOCAB, "num_memory_tokens": 3, "memory_size": 16}.items():
                assert getattr(model.config.teacher, own) == value
            model.update_label_moments(torch.arange(7.0)[:, None].expand(7, 16) + 1)
            model.save_pretrained(tmp_path / name)
            loaded = SMTForPreTraining.from_pretrained(tmp_path / name)
            assert type(loaded.config.teacher) is config_class
            for part in ("student", "teacher"):
                ours, theirs = (getattr(one.config, part).to_dict() for one in (model, loaded))
                assert {**theirs, "dtype": None} == {**ours, "dtype": None}
            assert type(AutoConfig.from_pretrained(tmp_path / name).teacher) is config_class
            theirs = loaded.state_dict()
            assert {"label_mean", "label_square", "label_updates"} < theirs.keys() == model.state_dict().keys()
            for own, value in model.state_dict().items():
                assert torch.equal(theirs[own], value), own
    assert type(SMTPreTrainingConfig(student=student_config(), teacher={}).teacher) is SMTTeacherConfig
    with pytest.raises(ValueError, match="unknown teacher `model_type` 'smt_wondowed_teacher'"):
        SMTPreTrainingConfig(student=student_config(), teacher={"model_type": "smt_wondowed_teacher"})
    with pytest.raises(ValueError, match="num_memory_tokens"):
        SMTPreTrainingConfig(student=student_config(), teacher={**WINDOWED, "num_memory_tokens": 2})


def test_windowed_teacher_in_all_phases():
    """Dense labels work too; the windowed teacher has no next-token loss of its own."""
    for phase, settings in (("smt", {**OURS, "teacher_weight": 0.0}), ("dmt", {}), ("dmt", {"label_stride": 4})):
        model = make_windowed_composite().train()
        model.freeze_for(phase)
        outputs = model(**rows(ragged=True), objective=objective(phase, **settings))
        outputs.loss.backward()
        assert outputs.loss.isfinite() and model.student.lm_head.weight.grad.any()
        assert (model.teacher.memory_proj.weight.grad is not None) == (phase == "smt")
        evaluated = model.eval()(**rows(), objective=objective(phase, **settings))
        assert "rollout" in evaluated.term_sums and "drift" not in evaluated.term_sums
    with pytest.raises(ValueError, match="teacher_weight"):
        make_windowed_composite().train()(**rows(), objective=objective("smt"))


@pytest.mark.parametrize(
    "phase, settings, word",
    [
        ("smt", {"future_length": 0}, "future_length"),
        ("smt", {"num_consistency_chunks": 0}, "num_consistency_chunks"),
        ("smt", {"hard_chunk_fraction": 1.5}, "hard_chunk_fraction"),
        ("smt", {"consistency_weight": -1.0}, "consistency_weight"),
        ("smt", {"dynamics_starts_below": 1.0}, "dynamics_full_below"),
        ("smt", {"dynamics_full_below": 1.0}, "dynamics_starts_below"),
        ("dmt", {"label_stride": 2, "on_policy_fraction": 0.5}, "on_policy_fraction"),
        ("dmt", {"label_stride": 2, "on_policy_mode": "parallel"}, "label_stride"),
        ("dmt", {"label_stride": 2, "on_policy_warmup_ratio": 0.5}, "label_stride"),
        ("dmt", {"label_stride": 0}, "label_stride"),
        ("smt", {"num_supervised_transitions": -1}, "num_supervised_transitions"),
        ("smt", {"curriculum_threshold": 1.0}, "sequential"),
        ("dmt", {"curriculum_threshold": 1.0, "readout_weight": 0.0}, "readout_weight"),
        ("smt", {"curriculum_threshold": 1.0, "on_policy_mode": "sequential", "on_policy_fraction": 0.0}, "above 0"),
        (
            "smt",
            {"curriculum_threshold": 1.0, "on_policy_mode": "sequential", "num_supervised_transitions": 1},
            "num_supervised_transitions",
        ),
        ("smt", {"trains_updater": False, "num_supervised_transitions": 1}, "trains_updater"),
        ("smt", {"trains_updater": False, "predictive_weight": 0.0, "teacher_weight": 0.0}, "needs a"),
        ("smt", {"trains_updater": False, "curriculum_threshold": 0.3}, "teacher_readout_weight"),
        ("smt", {"trains_updater": False, "consistency_weight": 1.0}, "consistency_weight"),
        ("smt", {"trains_updater": False, "readout_match_weight": 1.0}, "readout_match_weight"),
        ("smt", {"trains_updater": False, "hard_transition_fraction": 0.5}, "hard_transition_fraction"),
        ("smt", {"trains_updater": False, "teacher_forcing": 0.5}, "teacher_forcing"),
        ("smt", {"num_supervised_transitions": 1, "teacher_forcing": 0.5}, "from labels alone"),
        ("smt", {"num_supervised_transitions": 1, "supervised_chunk_steps": 0}, "supervised_chunk_steps"),
        ("smt", {"supervised_chunk_steps": 2}, "set `num_supervised_transitions`"),
        ("smt", {"teacher_forcing": 1.5}, "teacher_forcing"),
        ("dmt", {"teacher_forcing": 0.5, "teacher_forcing_ratio": -0.5}, "teacher_forcing_ratio"),
        ("dmt", {"teacher_forcing": 0.5, "teacher_forcing_ratio": 0.0}, "teacher_forcing_ratio"),
        ("smt", {"teacher_forcing": 0.5, "on_policy_fraction": 0.0}, "`on_policy_fraction` above 0"),
        ("smt", {"teacher_forcing": 0.5, "teacher_forcing_ratio": 0.1}, "on_policy_warmup_ratio"),
        ("dmt", {"teacher_forcing": 0.5, "on_policy_mode": "aggregate"}, "pulled again"),
        ("dmt", {"teacher_forcing": 0.5, "label_stride": 2}, "set `label_stride` to 1"),
        ("dmt", {"teacher_forcing": 0.5, "curriculum_threshold": 1.0}, "`teacher_forcing_ratio` below 1"),
        ("dmt", {"hard_transition_fraction": 1.5}, "hard_transition_fraction"),
        ("dmt", {"hard_transition_fraction": 0.5, "dynamics_weight": 0.0}, "readout_match_weight"),
        ("bptt", {"consistency_weight": 1.0, "future_length": 5}, "to 4 or less"),
        (
            "bptt",
            {"consistency_weight": 1.0, "carries_memory": False, "transition_steps": 12},
            "below `context_length`",
        ),
        ("bptt", {"future_length": 0}, "future_length"),
        (
            "bptt",
            {"consistency_weight": 1.0, "future_length": 4, "readout_weight": 0.0, "curriculum_threshold": 1.0},
            "set `readout_weight` above 0",
        ),
        ("bptt", {"max_seconds": 0.0}, "max_seconds"),
        ("bptt", {"max_seconds": 5.0, "warmup_steps": 10}, "warmup_steps"),
        ("bptt", {"transition_steps": 5}, "transition_steps"),
        ("smt", {"distillation_temperature": 0.0}, "distillation_temperature"),
        ("dmt", {"distillation_top_k": 0}, "distillation_top_k"),
        ("dmt", {"distillation_weight": 1.0, "label_cache_dir": "x"}, "keeps memories alone"),
        ("smt", {"on_policy_fraction": 1.5}, "on_policy_fraction"),
        ("smt", {"on_policy_mode": "sideways"}, "on_policy_mode"),
        ("smt", {"on_policy_mode": "aggregate"}, "frozen teacher"),
        ("smt", {"dynamics_weight": -1.0}, "dynamics_weight"),
        ("bptt", {"readout_weight": 0.0}, "has weight 0"),
        ("dmt", {"on_policy_mode": "aggregate", "on_policy_fraction": 0.5}, "on_policy_fraction"),
        ("bptt", {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}, "do not fit"),
        ("dmt", {"label_smoothing_factor": 0.1}, "label_smoothing"),
        ("bptt", {"transition_steps": 0}, "transition_steps"),
        ("smt", {"learning_rate": float("nan")}, "learning_rate"),
        ("smt", {"learning_rate": -1e-3}, "learning_rate"),
        ("smt", {"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ("dmt", {"per_device_train_batch_size": 0}, "per_device_train_batch_size"),
        ("dmt", {"dynamics_weight": 0.0, "readout_weight": 0.0}, "has weight 0"),
        ("smt", {"adam_beta1": 1.5}, "adam_beta1"),
    ],
)
def test_arguments_refuse(phase, settings, word):
    with pytest.raises(InputError, match=word):
        objective(phase, **settings)


@pytest.mark.parametrize("kind", [DMTTrainingArguments, BPTTTrainingArguments])
def test_a_phase_has_no_argument_that_it_never_computes(kind):
    names = {entry.name for entry in dataclasses.fields(kind)}
    foreign = {"predictive_weight", "teacher_weight", "trains_updater", "num_supervised_transitions"}
    if kind is BPTTTrainingArguments:
        foreign |= {"hard_chunk_fraction", "hard_transition_fraction", "teacher_forcing", "readout_match_weight"}
        foreign |= {"distillation_weight", "distillation_top_k"}
    assert not names & foreign


def test_what_a_term_trains():
    """The table's `trains` against gradients: each term alone, in smt from the teacher's memories."""
    for name, term in LOSS_TERMS.items():
        model = make_composite().train()
        phase = "smt" if "smt" in term.weights else next(iter(term.weights))
        alone = {**NOTHING, f"{name}_weight": 1.0} | ({"on_policy_fraction": 0.0} if phase == "smt" else {})
        outputs = model(**rows(), objective=objective(phase, **alone))
        assert outputs.term_sums.keys() == {name} | {other for other, row in LOSS_TERMS.items() if row.is_always_logged}
        outputs.loss.backward()
        reached = {part_of(entry) for entry, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert reached == set(term.trains), name


@pytest.mark.parametrize(
    "name", ["normalized_dynamics", "readout_match", "consistency", "teacher_readout", "distillation"]
)
@pytest.mark.parametrize("steps", [1, 3])
def test_what_a_sparse_term_trains(name, steps):
    """As in the dense phase, and no part is frozen that its gradient would reach."""
    model = make_composite().train()
    alone = {**NOTHING, f"{name}_weight": 1.0, "num_supervised_transitions": 4, "supervised_chunk_steps": steps}
    setting = objective("smt", **alone)
    model.freeze_for("smt", objective=setting)
    outputs = model(**rows(), objective=setting)
    assert outputs.term_sums.keys() == {name, "dynamics"}
    outputs.loss.backward()
    reached = {part_of(entry) for entry, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == set(LOSS_TERMS[name].trains)
    assert not any(p.requires_grad for p in model.teacher.get_output_embeddings().parameters())
    readout = [p for entry, p in model.named_parameters() if part_of(entry) == "readout"]
    assert all(p.requires_grad == ("readout" in LOSS_TERMS[name].trains) for p in readout)


def test_arguments_allow():
    """What the refusals above are close to."""
    assert objective("bptt", transition_steps=5, carries_memory=False).carries_memory is False
    assert objective("smt", transition_steps=5).transition_steps == 5  # rows are padded to a multiple
    assert objective("smt", future_length=12).future_length == 12
    sequential = {"curriculum_threshold": 1.0, "on_policy_mode": "sequential"}
    assert objective("smt", **sequential).on_policy_fraction == 0.5
    assert objective("dmt", label_stride=5).label_stride == 5
    alone = {"trains_updater": False, "teacher_readout_weight": 1.0, "curriculum_threshold": 0.3}
    assert not objective("smt", **alone).trains_updater  # a curriculum without the student's own rollout
    assert objective("smt", dynamics_starts_below=2.0, dynamics_full_below=1.0)
    forced = objective("dmt", teacher_forcing=0.5, curriculum_threshold=1.0, teacher_forcing_ratio=0.9)
    assert forced.teacher_forcing == 0.5
    assert objective("smt", num_supervised_transitions=1, consistency_weight=1.0).weight("consistency") == 1.0
    assert objective("bptt", consistency_weight=1.0, future_length=4).future_length == 4
    assert objective("bptt").future_length == 8  # unused
    assert objective("dmt", hard_transition_fraction=0.5, dynamics_weight=0.0, readout_match_weight=1.0)
    arguments = BPTTTrainingArguments(output_dir="unused", use_cpu=True, max_seconds=2.5, max_steps=7)
    assert arguments.max_seconds == 2.5 and arguments.max_steps > 1_000_000


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


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Numbers of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return made


@pytest.mark.parametrize("packed", [False, True])
def test_cost_is_linear_up_to_32k_tokens(packed):
    """FLOPs and the largest tensor double with the row: no mask or score of T x T, no own state computed twice."""
    model = make_composite(sliding_window=64)
    setting = objective("smt", transition_steps=8, on_policy_fraction=0.5, on_policy_mode="parallel")
    found = {}
    for length in (8192, 16384, 32768):
        tokens = torch.randint(1, VOCAB, (1, length + 1), generator=torch.Generator().manual_seed(0))
        documents = (torch.arange(length + 1) // 1000)[None] if packed else None
        with torch.no_grad(), FlopCounterMode(display=False) as flops, LargestTensor() as tensors:
            model.train()(tokens, setting, document_ids=documents)
        found[length] = (flops.get_total_flops(), tensors.largest)
    for shorter, longer in ((8192, 16384), (16384, 32768)):
        assert found[longer][0] < 2.01 * found[shorter][0] and found[longer][1] < 2.01 * found[shorter][1]

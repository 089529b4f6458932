"""`gradient_checkpointing`: the gradients of the plain pass, with less held; in phases, Trainers, DDP, compiled."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import smt_hf.student.recurrence_smt_recurrent as recurrence
from smt_hf import SMTForPreTraining
from smt_hf.errors import InputError
from smt_hf.training import SMTPreTrainingConfig, long_rows
from smt_hf.training.long_rows import check_checkpointing
from tests.conftest import UPDATERS, VOCAB, make_student, student_config, teacher_config, wake
from tests.unit.training.test_composite import objective
from tests.unit.training.test_trainers import assert_same, make_trainer, some_rows, weights_of

LENGTH = 71
AT_ONCE = {"on_policy_warmup_ratio": 0.0}
# Name -> phase, and what it is to compute.
SETTINGS = {
    "smt": ("smt", {"transition_steps": 4, "on_policy_fraction": 0.5, "teacher_readout_weight": 0.5, **AT_ONCE}),
    "dmt": (
        "dmt",
        {
            "transition_steps": 5,
            "on_policy_mode": "sequential",
            "on_policy_fraction": 1.0,
            "readout_match_weight": 0.5,
            **AT_ONCE,
        },
    ),
    "dmt_forced": (
        "dmt",
        {
            "transition_steps": 40,
            "on_policy_mode": "sequential",
            "on_policy_fraction": 1.0,
            "teacher_forcing": 0.5,
            "distillation_weight": 0.5,
            "normalized_dynamics_weight": 0.5,
            **AT_ONCE,
        },
    ),
    "bptt": ("bptt", {"transition_steps": LENGTH, "consistency_weight": 0.5}),
    "bptt_rows": ("bptt", {"transition_steps": 9, "carries_memory": False}),
}


def composite(updater_type: str) -> SMTForPreTraining:
    torch.manual_seed(0)
    student = student_config(updater_type=updater_type)
    return wake(SMTForPreTraining(SMTPreTrainingConfig(student=student, teacher=teacher_config()))).train()


def long_row_batch() -> dict:
    """Padding inside and at the end, packed documents, and places without a label."""
    ids = torch.randint(1, VOCAB, (3, LENGTH + 1))
    mask = torch.ones_like(ids)
    mask[0, 60:] = 0
    documents = (torch.rand(ids.shape) > 0.9).long().cumsum(1)
    labels = ids.masked_fill((torch.rand(ids.shape) < 0.3) | (mask == 0), -100)
    return {"input_ids": ids, "attention_mask": mask, "document_ids": documents, "labels": labels}


def result_of(model, inputs, settings) -> tuple[dict, dict, int]:
    """Terms, gradients, and numbers held for the backward pass."""
    model.zero_grad()
    held = []
    keep = lambda tensor: (held.append(tensor.numel()), tensor)[1]  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(**inputs, objective=settings, progress=0.5)
    outputs.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": outputs.loss.detach(), **outputs.term_sums}, gradients, sum(held)


@pytest.mark.parametrize("updater_type", UPDATERS)
@pytest.mark.parametrize("kind", list(SETTINGS))
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_are_those_of_the_plain_pass(use_reentrant, kind, updater_type, monkeypatch):
    """With one stretch or piece for everything, and with bounds that cut rows, chunks and readouts."""
    phase, settings = SETTINGS[kind]
    settings = objective(phase, context_length=LENGTH, **settings)
    model, inputs = composite(updater_type), long_row_batch()
    terms, expected, plain = result_of(model, inputs, settings)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for most_recomputed, most_read in ((4096, 4096), (24, 16)):
        monkeypatch.setattr(recurrence, "MOST_RECOMPUTED", most_recomputed)
        monkeypatch.setattr(long_rows, "_MOST_READ", most_read)
        own_terms, own, held = result_of(model, inputs, settings)
        assert_same(own_terms, terms)
        assert own.keys() == expected.keys()
        assert_same(own, expected)
        assert held < (0.6 if phase == "smt" else 0.5) * plain  # what the trained teacher holds stays
    model.gradient_checkpointing_disable()
    assert result_of(model, inputs, settings)[2] == plain


def test_no_more_positions_than_a_piece_are_read_out_at_once(monkeypatch):
    """In training and evaluation: the logits of a long row of a large vocabulary would not fit."""
    monkeypatch.setattr(long_rows, "MOST_COMPARED", 11 * VOCAB)
    model, inputs = composite("mlp"), long_row_batch()
    read, head = [], model.student.head
    model.student.head = lambda states: (read.append(states.shape[:-1].numel()), head(states))[1]
    settings = objective("bptt", context_length=LENGTH, transition_steps=LENGTH)
    model(**inputs, objective=settings)
    assert max(read) > 100
    model.gradient_checkpointing_enable()
    for mode in (True, False):
        read.clear()
        model.train(mode)
        with torch.set_grad_enabled(mode):
            model(**inputs, objective=settings)
        assert len(read) > 10 and max(read) == 11


def test_a_stretch_recomputes_no_more_than_it_may(monkeypatch):
    """Of chunks side by side, too, which are shorter than a stretch."""
    monkeypatch.setattr(recurrence, "MOST_RECOMPUTED", 12)
    model = composite("mlp")
    sizes, unrolled = [], recurrence.unrolled

    def counted(memory, embeds, *others, **more):
        sizes.append(embeds.shape[:2].numel())
        return unrolled(memory, embeds, *others, **more)

    monkeypatch.setattr(recurrence, "unrolled", counted)
    model.gradient_checkpointing_enable()
    memories = model.student.model.unroll(torch.randn(4, 3, 16), torch.randn(4, 8, 16))
    assert memories.shape == (4, 8, 3, 16) and sizes == [12, 12, 8]
    sizes.clear()
    model.student.model.unroll(torch.randn(30, 3, 16), torch.randn(30, 2, 16))
    assert sizes == [12] * 5  # of 12, 12 and 6 rows


@pytest.mark.parametrize("kind", ["smt_ours", "dmt", "bptt_full"])
def test_a_phase_trains_the_same(kind, tmp_path):
    """Under accumulation; the phase after it, which does not ask for it, has none."""
    runs, counts = [], []
    for is_checkpointed in (False, True):
        trainer = make_trainer(
            kind,
            tmp_path,
            optim="sgd",
            learning_rate=0.05,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            gradient_checkpointing=is_checkpointed,
        )
        stretch = trainer.model.student.model.stretch
        calls, run = [], stretch.checkpointed
        stretch.checkpointed = lambda *args, run=run, calls=calls, **more: (calls.append(1), run(*args, **more))[1]
        trainer.train()
        runs.append(weights_of(trainer))
        counts.append(len(calls))
    assert_same(runs[1], runs[0])
    assert counts[0] == 0 and counts[1] >= 12
    assert stretch.gradient_checkpointing
    make_trainer("bptt_full", tmp_path, model=trainer.model)
    assert not stretch.gradient_checkpointing


def test_every_second_stretch(tmp_path):
    kwargs = {"every_n_layers": 2}
    trainer = make_trainer(
        "bptt_full", tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs, max_steps=1
    )
    if hasattr(trainer.model, "activation_checkpointing_disable"):  # transformers 5.17 has no such argument
        trainer.train()
        assert trainer.model.student.model.stretch.every_n == 2


def test_ddp(tmp_path):
    """DDP hears of every gradient once, and of parameters that a batch does not use."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        phase, settings = SETTINGS["dmt"]
        settings = objective(phase, context_length=LENGTH, **settings)
        model, inputs = composite("fast_weight"), long_row_batch()
        model.freeze_for("dmt", objective=settings)
        expected = result_of(model, inputs, settings)[1]
        model.gradient_checkpointing_enable()
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        for _ in range(2):
            model.zero_grad()
            wrapped(**inputs, objective=settings, progress=0.5).loss.backward()
            own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and name in expected}
            assert own.keys() == expected.keys()
            assert_same(own, expected)
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_updater():
    settings = objective("bptt", context_length=LENGTH, transition_steps=LENGTH)
    model, inputs = composite("mlp"), long_row_batch()
    expected = result_of(model, inputs, settings)[1]
    model.student.model.updater.compile(backend="aot_eager", dynamic=True)
    model.gradient_checkpointing_enable()
    assert_same(result_of(model, inputs, settings)[1], expected)


def test_a_plain_trainer(tmp_path):
    """The student alone, as it is exported, in transformers' own Trainer."""
    rows = [{"input_ids": torch.as_tensor(row["input_ids"]), "labels": torch.as_tensor(row["input_ids"])}
            for row in some_rows(8, length=LENGTH)]  # fmt: skip
    runs = []
    for is_checkpointed in (False, True):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=2, optim="sgd", learning_rate=0.05, per_device_train_batch_size=4, use_cpu=True,
            gradient_checkpointing=is_checkpointed, report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(make_student(updater_type="fast_weight"), arguments, train_dataset=copy.deepcopy(rows))
        trainer.train()
        assert trainer.model.model.stretch.gradient_checkpointing == is_checkpointed
        runs.append(weights_of(trainer))
    assert_same(runs[1], runs[0])


def test_reentrant_where_no_input_has_a_gradient():
    """As with LoRA: embeddings and the initial memory are frozen."""
    settings = objective("bptt", context_length=LENGTH, transition_steps=LENGTH)
    model, inputs = composite("mlp"), long_row_batch()
    for name, parameter in model.student.named_parameters():
        parameter.requires_grad_("embed" not in name and "initial_memory" not in name)
    expected = result_of(model, inputs, settings)[1]
    model.gradient_checkpointing_enable({"use_reentrant": True})
    own = result_of(model, inputs, settings)[1]
    assert own.keys() == expected.keys() and any("updater" in name for name in own)
    assert_same(own, expected)


def test_refusals():
    asked = SimpleNamespace(
        phase="dmt",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs=None,
        ddp_find_unused_parameters=None,
        world_size=1,
    )
    with pytest.raises(InputError, match="FSDP"):
        check_checkpointing(asked, is_sharded=True)
    check_checkpointing(asked, is_sharded=False)
    assert asked.ddp_find_unused_parameters and asked.gradient_checkpointing_kwargs == {"use_reentrant": True}
    asked.world_size = 2
    with pytest.raises(InputError, match="use_reentrant"):
        check_checkpointing(asked, is_sharded=False)
    asked.gradient_checkpointing_kwargs = None
    check_checkpointing(asked, is_sharded=False)
    assert asked.gradient_checkpointing_kwargs == {"use_reentrant": False}
    asked.gradient_checkpointing = False
    check_checkpointing(asked, is_sharded=True)

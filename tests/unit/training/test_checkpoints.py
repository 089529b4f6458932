"""Checkpoints are complete or absent; signals and numbers that are not finite end a run without losing one."""

import json
import os
import resource
import signal
import warnings
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from smt_hf import BPTTTrainer, BPTTTrainingArguments, SMTForPreTraining
from smt_hf.errors import InputError
from smt_hf.training import arguments as argument_module
from smt_hf.training import stopping
from smt_hf.training.checkpoints import newest_checkpoint, what_is_missing
from smt_hf.training.phases import run_phases
from smt_hf.training.stopping import Interrupted, StopOnSignal, check_finite
from tests.conftest import make_composite
from tests.unit.training.test_phases import lay_out, phase
from tests.unit.training.test_trainers import KINDS, assert_same, make_trainer, some_rows, weights_of

EVERY = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


def test_what_is_written_is_listed(tmp_path):
    trainer = make_trainer("smt", tmp_path, **EVERY, save_total_limit=2)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert not list(tmp_path.glob(".*")) and newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    listed = (tmp_path / "checkpoint-6" / "contents.json").read_text()
    for name in ("model.safetensors", "student/model.safetensors", "optimizer.pt", "trainer_state.json"):
        assert f'"{name}"' in listed


@pytest.mark.parametrize("damage", ["shortened", "changed", "removed", "without its list"])
def test_a_damaged_checkpoint_is_named_and_skipped(tmp_path, damage):
    trainer = make_trainer("smt", tmp_path, **EVERY)
    trainer.train()
    newest = tmp_path / "checkpoint-6"
    name = {"removed": "model.safetensors", "without its list": "contents.json"}.get(damage, "optimizer.pt")
    victim = newest / name
    if damage == "shortened":
        os.truncate(victim, victim.stat().st_size - 1)
    elif damage == "changed":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    else:
        victim.unlink()
    with pytest.warns(UserWarning, match=f"checkpoint-6.*{victim.name}"):
        assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    again = make_trainer("smt", tmp_path, **EVERY)
    with pytest.raises(ValueError, match=victim.name):
        again.train(resume_from_checkpoint=str(newest))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again.train(resume_from_checkpoint=True)
    assert_same(weights_of(trainer), weights_of(again), rtol=0, atol=0)


def test_a_list_of_sizes_alone_is_read(tmp_path):
    """As checkpoints were written before they had hashes."""
    make_trainer("smt", tmp_path, **EVERY).train()
    path = tmp_path / "checkpoint-6" / "contents.json"
    path.write_text(json.dumps({name: size for name, (size, _) in json.loads(path.read_text()).items()}))
    assert what_is_missing(path.parent) is None


def test_rotation_spares_what_is_newer_than_a_damaged_one(tmp_path):
    """A damaged checkpoint of a later step does not push out what is saved after it."""
    trainer = make_trainer("smt", tmp_path, **EVERY, save_total_limit=1)
    (tmp_path / "checkpoint-9").mkdir()
    os.utime(tmp_path / "checkpoint-9", (1, 1))
    trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint"):
        make_trainer("smt", tmp_path).train(resume_from_checkpoint=True)


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    """A limit on the size of files stands in for the disk: writing fails in the middle of one."""
    trainer = make_trainer("smt", tmp_path, **EVERY)
    size = {}

    class Fill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                size["before"] = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, size["before"][1]))

    trainer.add_callback(Fill())
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(
            RuntimeError, match=r"checkpoint-4 could not be saved.*complete checkpoint is .*checkpoint-2"
        ):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, size["before"])
        signal.signal(signal.SIGXFSZ, ignored)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-2"]
    assert what_is_missing(tmp_path / "checkpoint-2") is None


def test_the_best_checkpoint_stays(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "eval_rollout"}
    trainer = make_trainer(
        "smt", tmp_path, **EVERY, **settings, load_best_model_at_end=True, save_total_limit=1, learning_rate=0.5
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path and best.name == f"checkpoint-{trainer.state.best_global_step}" and best.exists()
    reloaded = SMTForPreTraining.from_pretrained(best)
    assert_same(weights_of(trainer), reloaded.state_dict(), rtol=0, atol=0)


class SignalAt(TrainerCallback):
    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            signal.raise_signal(self.number)


def pipeline(folder, resume=None, at=None, number=signal.SIGTERM):
    phases = [
        phase(KINDS["smt"][1], max_steps=4, logging_steps=1),
        phase(max_steps=4, logging_steps=1, continue_previous_phase=True),
    ]
    lay_out(phases, str(folder))
    model, made = make_composite(), []

    class Watched(BPTTTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)
            if at is not None:
                self.add_callback(SignalAt(at, number))

    rows = some_rows()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("smt_hf.training.phases", fromlist=["TRAINERS"]).TRAINERS, "bptt", Watched)
        results = list(run_phases(model, phases, lambda _: rows, rows[:8], resume_from_checkpoint=resume))
    return model, results


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path, number):
    whole, _ = pipeline(tmp_path / "whole")
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Interrupted, match=f"{number.name}.*checkpoint-3.*--resume_from_checkpoint") as stopped:
        pipeline(tmp_path / "cut", at=2, number=number)
    assert stopped.value.signal_number == number and what_is_missing(stopped.value.checkpoint) is None
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    again, _ = pipeline(tmp_path / "cut", resume=True)
    assert_same(whole.state_dict(), again.state_dict(), rtol=0, atol=0)


def test_a_second_ctrl_c_ends_it_at_once():
    with StopOnSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the launcher's copy of the first
        stop._first -= 5
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("kind", ["smt", "dmt", "bptt"])
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, kind):
    rows = some_rows()
    trainer = make_trainer(kind, tmp_path, rows=rows, **EVERY)

    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    trainer.model.student.lm_head.weight[0] = float("inf")

    trainer.add_callback(Spoil())
    with pytest.raises(
        FloatingPointError, match=rf"readout.* of the {kind} phase is not finite at step 4, in the batch"
    ):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path):
    trainer = make_trainer("bptt", tmp_path, **EVERY)
    trainer.model.student.lm_head.weight.register_hook(lambda gradient: gradient * float("nan"))
    before = weights_of(trainer)
    with pytest.raises(FloatingPointError, match="the gradient of the bptt phase is not finite at step 1"):
        trainer.train()
    assert_same(before, weights_of(trainer), rtol=0, atol=0)


class Overflows:
    """Gradients of a weight that are not finite in the optimiser steps `steps`, counted from 1."""

    def __init__(self, trainer, steps):
        self.trainer, self.steps = trainer, steps
        trainer.model.student.lm_head.weight.register_hook(self.spoiled)

    def spoiled(self, gradient):
        return gradient * float("inf") if self.trainer.state.global_step + 1 in self.steps else gradient


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_that_overflow_are_left_out(tmp_path, optimizer):
    trainer = make_trainer("bptt", tmp_path, **EVERY, max_skipped_steps=2, matrix_optimizer=optimizer)
    Overflows(trainer, {2, 3})
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(weights_of(trainer))

    trainer.add_callback(Watch())
    trainer.train()
    assert_same(seen[0], seen[1], rtol=0, atol=0)
    assert_same(seen[0], seen[2], rtol=0, atol=0)
    assert any(not torch.equal(seen[2][name], seen[3][name]) for name in seen[2])
    assert trainer.cost.skipped_steps == 2
    logged = [line["skipped_steps"] for line in trainer.state.log_history if "skipped_steps" in line]
    assert logged and max(logged) == 2


def test_too_many_steps_in_a_row_that_overflow_end_the_run(tmp_path):
    trainer = make_trainer("bptt", tmp_path, **EVERY, max_skipped_steps=1)
    Overflows(trainer, {1, 3, 4})
    message = (
        r"the gradient of the bptt phase is not finite at step 4\..* Raise `max_skipped_steps` of the phase, which is 1"
    )
    with pytest.raises(
        FloatingPointError, match=message + r".*left out so far: 2, in a row: 1\), or start over with a low"
    ):
        trainer.train()


def test_one_warning_says_that_steps_are_left_out(tmp_path, monkeypatch):
    trainer, said = make_trainer("bptt", tmp_path, **EVERY, max_skipped_steps=2), []
    Overflows(trainer, {2, 3, 5})
    monkeypatch.setattr(stopping.logger, "warning", said.append)
    trainer.train()
    assert len(said) == 1 and "bptt: the gradient is not finite at step 2" in said[0]


def test_no_advice_that_deepspeed_refuses(monkeypatch, tmp_path):
    trainer = make_trainer("bptt", tmp_path, **EVERY)
    Overflows(trainer, {1})
    monkeypatch.setattr(stopping, "launched_with_deepspeed", lambda: True)
    with pytest.raises(FloatingPointError, match=r"Look at the data, or start over") as caught:
        trainer.train()
    assert "max_skipped_steps" not in str(caught.value)


def test_steps_left_out_in_a_row_are_counted_over_a_resume(tmp_path):
    trainer = make_trainer("bptt", tmp_path, **EVERY, max_skipped_steps=2)
    Overflows(trainer, {2, 3, 4})
    with pytest.raises(FloatingPointError, match="step 4"):
        trainer.train()
    again = make_trainer("bptt", tmp_path, **EVERY, max_skipped_steps=2)
    Overflows(again, {3, 4})
    with pytest.raises(FloatingPointError, match=r"step 4.*left out so far: 2, in a row: 2"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_deepspeed_leaves_no_step_out(tmp_path, monkeypatch):
    monkeypatch.setattr(argument_module, "launched_with_deepspeed", lambda: True)
    with pytest.raises(InputError, match="`max_skipped_steps` of the bptt phase cannot be used with DeepSpeed"):
        BPTTTrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_skipped_steps=3)


def test_the_terms_are_named():
    terms = {
        "readout": torch.tensor(1.0),
        "dynamics": torch.tensor(float("nan")),
        "teacher": torch.tensor(float("inf")),
    }
    check_finite({"readout": terms["readout"]}, 1, "smt", None)
    with pytest.raises(FloatingPointError, match=r"^dynamics, teacher of the smt phase .* step 7, .* \[4, 5\]"):
        check_finite(terms, 7, "smt", torch.tensor([4, 5]))

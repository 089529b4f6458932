"""The Trainers: named terms in the log, invariance to accumulation, resumption, carried memories, schedules."""

import json

import pytest
import torch
from transformers import TrainingArguments

from smt_hf import (
    BPTTTrainer,
    BPTTTrainingArguments,
    DMTTrainer,
    DMTTrainingArguments,
    SMTRecurrentForCausalLM,
    SMTTrainer,
    SMTTrainingArguments,
)
from smt_hf.data import EpochSampler
from smt_hf.training.phases import arm_name, lay_out
from smt_hf.training.trainers import load_student_optimizer
from tests.conftest import VOCAB, make_composite, make_student

KINDS = {
    "smt": (SMTTrainer, SMTTrainingArguments, {"transition_steps": 4, "future_length": 4, "context_length": 12}),
    "dmt": (DMTTrainer, DMTTrainingArguments, {"future_length": 4, "context_length": 12}),
    "dmt_aggregate": (
        DMTTrainer,
        DMTTrainingArguments,
        {"future_length": 4, "context_length": 12, "on_policy_mode": "aggregate", "aggregate_capacity": 16},
    ),
    "bptt": (BPTTTrainer, BPTTTrainingArguments, {"transition_steps": 4, "context_length": 12}),
    "bptt_full": (BPTTTrainer, BPTTTrainingArguments, {"transition_steps": 12, "context_length": 12}),
}


def some_rows(num=40, length=13, seed=0):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(VOCAB, (num, 1), generator=generator)
    rows = (start + 3 * torch.arange(length)) % VOCAB  # learnable
    return [{"input_ids": row} for row in rows.numpy()]


def make_trainer(kind, tmp_path, model=None, **settings):
    trainer_class, arguments_class, more = KINDS[kind]
    defaults = {"per_device_train_batch_size": 8, "max_steps": 6, "logging_steps": 2, "disable_tqdm": True}
    arguments = arguments_class(
        output_dir=str(tmp_path), **{**defaults, "save_strategy": "no", "use_cpu": True, **more, **settings}
    )
    model = make_composite() if model is None else model
    return trainer_class(model=model, args=arguments, train_dataset=some_rows(), eval_dataset=some_rows(10, seed=1))


def weights_of(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same(first, second, rtol=1e-4, atol=2e-5):
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("kind", list(KINDS))
def test_terms_in_the_log(kind, tmp_path):
    trainer = make_trainer(kind, tmp_path, eval_strategy="steps", eval_steps=3, logging_steps=3)
    trainer.train()
    trainer.save_state()
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    train = [line for line in history if "loss" in line]
    evaluation = [line for line in history if "eval_loss" in line]
    assert len(train) == len(evaluation) == 2
    terms = {"smt": {"readout", "dynamics", "predictive", "uniformity", "teacher"}, "dmt": {"readout", "dynamics"}}
    expected = terms.get(kind.split("_")[0], {"readout"})
    assert expected <= set(train[0]) and {f"eval_{name}" for name in expected} <= set(evaluation[0])
    assert "eval_rollout" in evaluation[0] and ("eval_drift" in evaluation[0]) == (not kind.startswith("bptt"))
    # The loss in the log is the weighted sum of the terms in the log.
    arguments = trainer.args
    for line in train[:1]:
        total = sum(getattr(arguments, f"{name}_weight") * line[name] for name in expected)
        assert line["loss"] == pytest.approx(total, rel=5e-3)
    metrics = trainer.evaluate()
    assert metrics["eval_rollout"] == pytest.approx(evaluation[-1]["eval_rollout"], rel=1e-4)


@pytest.mark.parametrize("kind", list(KINDS))
def test_accumulation(kind, tmp_path):
    """8 x 1 == 1 x 8: final weights and the terms in the log."""
    runs = []
    for batch, accumulation in ((8, 1), (1, 8)):
        trainer = make_trainer(
            kind,
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.0,
            optim="sgd",
            learning_rate=0.05,
        )
        trainer.train()
        runs.append((weights_of(trainer), [line for line in trainer.state.log_history if "loss" in line]))
    assert_same(runs[0][0], runs[1][0])
    for first, second in zip(runs[0][1], runs[1][1]):
        for name in set(first) - {"epoch", "learning_rate", "step", "grad_norm"}:
            assert first[name] == pytest.approx(second[name], rel=2e-3, abs=1e-5), name


@pytest.mark.parametrize("kind", list(KINDS))
def test_resume_equals_uninterrupted(kind, tmp_path):
    """Six steps == three, a new process's worth of objects, three more: weights, losses, cost."""
    whole = make_trainer(kind, tmp_path / "whole", save_strategy="steps", save_steps=3, logging_steps=1)
    whole.train()
    resumed = make_trainer(kind, tmp_path / "again", logging_steps=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert_same(weights_of(whole), weights_of(resumed), rtol=1e-6, atol=1e-6)
    losses = [[line["loss"] for line in run.state.log_history if "loss" in line] for run in (whole, resumed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert resumed.cost.tokens == whole.cost.tokens and resumed.cost.sequential_steps == whole.cost.sequential_steps


def test_checkpoint_holds_a_student(tmp_path):
    trainer = make_trainer("smt", tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    loaded = SMTRecurrentForCausalLM.from_pretrained(tmp_path / "checkpoint-6" / "student").eval()
    tokens = torch.randint(VOCAB, (2, 5))
    assert torch.equal(loaded(tokens).logits, trainer.model.student.eval()(tokens).logits)
    assert loaded.config.use_cache


def test_training_lowers_the_loss(tmp_path):
    trainer = make_trainer("smt", tmp_path, max_steps=120, logging_steps=10, learning_rate=1e-2)
    before = trainer.evaluate()["eval_rollout"]
    trainer.train()
    assert trainer.evaluate()["eval_rollout"] < before - 1.0


def test_epochs_have_different_numbers(tmp_path):
    trainer = make_trainer("smt", tmp_path, max_steps=-1, num_train_epochs=2)
    seen = []
    original = trainer._before_forward

    def spy(inputs):
        if trainer.model.training:
            seen.extend(inputs["example_ids"].tolist())
        return original(inputs)

    trainer._before_forward = spy
    trainer.train()
    assert len(seen) == 80 and sorted(seen) == list(range(80))


def test_a_shared_schedule_is_one_schedule(tmp_path):
    """The learning rates of two phases with parts of one schedule == those of one long phase."""
    rates = []
    for offset, steps, total in ((0, 6, 0), (0, 2, 6), (2, 4, 6)):
        settings = {"schedule_offset": offset, "schedule_steps": total} if total else {}
        trainer = make_trainer("smt", tmp_path, max_steps=steps, logging_steps=1, warmup_steps=2, **settings)
        trainer.train()
        rates.append([line["learning_rate"] for line in trainer.state.log_history if "loss" in line])
    assert rates[1] + rates[2] == pytest.approx(rates[0])
    assert rates[0][0] < max(rates[0])


def test_optimiser_state_is_handed_over(tmp_path):
    """Two half phases with the state handed over == one phase."""
    settings = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    whole = make_trainer("bptt_full", tmp_path, max_steps=5, **settings)
    whole.train()
    first = make_trainer("bptt_full", tmp_path / "first", max_steps=3, save_strategy="steps", **settings)
    first.train()
    state = load_student_optimizer(str(tmp_path / "first" / "checkpoint-3"))
    assert all(int(entry["step"]) == 3 for entry in state.values())
    second = make_trainer("bptt_full", tmp_path, model=first.model, max_steps=2, **settings)
    left = list(EpochSampler(40, seed=42))[24:]  # the rows of the fourth and fifth step
    second._get_train_sampler = lambda *_: left
    second._student_optimizer_state = state
    second.train()
    assert_same(weights_of(whole), weights_of(second), rtol=1e-5, atol=1e-6)


def test_weight_decay_is_for_linear_weights(tmp_path):
    trainer = make_trainer("smt", tmp_path)
    names = set(trainer.get_decay_parameter_names(trainer.model))
    assert "student.lm_head.weight" in names and "student.model.updater.out_proj.weight" in names
    for name in ("model.embed_tokens.weight", "model.initial_memory", "model.readout.slot_embeddings"):
        assert f"student.{name}" not in names


def test_bptt_takes_a_bare_student(tmp_path):
    student = make_student()
    arguments = BPTTTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        context_length=12,
        transition_steps=4,
        save_strategy="no",
        use_cpu=True,
        per_device_train_batch_size=4,
        disable_tqdm=True,
    )
    trainer = BPTTTrainer(student, arguments, train_dataset=some_rows())
    trainer.train()
    assert type(trainer.model.student) is SMTRecurrentForCausalLM


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="SMTForPreTraining"):
        SMTTrainer(make_student(), SMTTrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="SMTTrainingArguments"):
        SMTTrainer(make_composite(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="DMTTrainingArguments"):
        DMTTrainer(make_composite(), SMTTrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="multiple of 5"):
        make_trainer("bptt", tmp_path, transition_steps=5, context_length=10)


def test_arm_names(tmp_path):
    def arguments(phase, **settings):
        kind = {"smt": SMTTrainingArguments, "dmt": DMTTrainingArguments, "bptt": BPTTTrainingArguments}[phase]
        return kind(output_dir=str(tmp_path), use_cpu=True, **settings)

    smt8, dmt4, bptt = arguments("smt"), arguments("dmt", transition_steps=4), arguments("bptt")
    pure = [arguments("smt", transition_steps=1), arguments("dmt", transition_steps=1)]
    assert arm_name(pure) == "smt_dmt" and arm_name(pure[:1]) == "smt"
    assert arm_name([smt8, dmt4, bptt]) == "smt8_dmt4_bptt"
    assert arm_name([bptt]) == "bptt_truncated"
    assert arm_name([arguments("bptt", context_length=16, transition_steps=16)]) == "bptt"


def test_phases_share_what_they_continue(tmp_path):
    def arguments(steps, continued):
        return SMTTrainingArguments(output_dir="x", use_cpu=True, max_steps=steps, continue_previous_phase=continued)

    phases = [arguments(10, False), arguments(5, True), arguments(7, False), arguments(3, True), arguments(2, True)]
    lay_out(phases, str(tmp_path))
    assert [(phase.schedule_offset, phase.schedule_steps) for phase in phases] == [
        (0, 15), (10, 15), (0, 12), (7, 12), (10, 12),
    ]  # fmt: skip
    names = [phase.output_dir.removeprefix(str(tmp_path) + "/") for phase in phases]
    assert names == ["smt", "smt_2", "smt_3", "smt_4", "smt_5"]
    alone = [arguments(10, True)]
    lay_out(alone, str(tmp_path))
    assert (alone[0].schedule_offset, alone[0].schedule_steps) == (0, 0)


def test_bptt_hands_the_memory_on(tmp_path):
    """The next window of a stream starts where the last one ended; a new row starts from m_0."""
    trainer = make_trainer("bptt", tmp_path, max_steps=7)
    seen, ends = [], []
    before, after = trainer._before_forward, trainer._after_forward

    def spy_before(inputs):
        fresh = inputs["is_fresh"]
        carried = before(inputs)
        seen.append((fresh, inputs.get("memory")))
        return carried

    def spy_after(inputs, outputs, carried):
        ends.append(outputs.memory.clone())
        after(inputs, outputs, carried)

    trainer._before_forward, trainer._after_forward = spy_before, spy_after
    trainer.train()
    assert seen[0][0].all() and seen[0][1] is None
    for step in range(1, 7):
        fresh, memory = seen[step]
        assert 0 < fresh.sum() < len(fresh)
        assert torch.equal(memory[~fresh], ends[step - 1][~fresh]) and memory[fresh].isnan().all()

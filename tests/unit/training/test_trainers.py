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
from smt_hf.data import EpochSampler, Levels
from smt_hf.errors import InputError
from smt_hf.training.phases import arm_name, lay_out
from smt_hf.training.sharding import load_student_optimizer
from tests.conftest import VOCAB, make_composite, make_fast_weight_composite, make_student

KINDS = {
    "smt": (SMTTrainer, SMTTrainingArguments, {"transition_steps": 4, "future_length": 4, "context_length": 12}),
    "dmt": (DMTTrainer, DMTTrainingArguments, {"context_length": 12}),
    "dmt_aggregate": (
        DMTTrainer,
        DMTTrainingArguments,
        {"context_length": 12, "on_policy_mode": "aggregate", "aggregate_capacity": 16},
    ),
    "bptt": (BPTTTrainer, BPTTTrainingArguments, {"transition_steps": 4, "context_length": 12}),
    "bptt_full": (BPTTTrainer, BPTTTrainingArguments, {"transition_steps": 12, "context_length": 12}),
    "bptt_rows": (
        BPTTTrainer,
        BPTTTrainingArguments,
        {"transition_steps": 5, "context_length": 12, "carries_memory": False},
    ),
    "smt_ours": (
        SMTTrainer,
        SMTTrainingArguments,
        {
            "transition_steps": 4,
            "future_length": 4,
            "context_length": 12,
            "on_policy_mode": "sequential",
            "normalized_dynamics_weight": 0.5,
            "consistency_weight": 0.5,
            "teacher_readout_weight": 0.5,
            "dynamics_starts_below": 5.0,
            "dynamics_full_below": 2.0,
        },
    ),
    "smt_sparse": (
        SMTTrainer,
        SMTTrainingArguments,
        {"future_length": 4, "context_length": 12, "num_supervised_transitions": 2},
    ),
    "smt_teacher": (
        SMTTrainer,
        SMTTrainingArguments,
        {"future_length": 4, "context_length": 12, "trains_updater": False, "teacher_readout_weight": 0.5},
    ),
    "smt_carried": (
        SMTTrainer,
        SMTTrainingArguments,
        {
            "transition_steps": 4,
            "context_length": 12,
            "trains_updater": False,
            "carries_teacher_memory": True,
            "teacher_readout_weight": 1.0,
            **dict.fromkeys(("teacher_weight", "predictive_weight", "uniformity_weight"), 0.0),
        },
    ),
    "smt_chunks": (
        SMTTrainer,
        SMTTrainingArguments,
        {
            "future_length": 4,
            "context_length": 12,
            "num_supervised_transitions": 2,
            "supervised_chunk_steps": 3,
            "normalized_dynamics_weight": 0.5,
            "readout_match_weight": 0.5,
            "consistency_weight": 0.5,
            "teacher_readout_weight": 0.5,
            "hard_transition_fraction": 0.5,
        },
    ),
    "dmt_forced": (
        DMTTrainer,
        DMTTrainingArguments,
        {
            "transition_steps": 3,
            "future_length": 4,
            "context_length": 12,
            "teacher_forcing": 0.5,
            "readout_match_weight": 0.5,
            "consistency_weight": 0.5,
            "hard_transition_fraction": 0.5,
        },
    ),
    "bptt_future": (
        BPTTTrainer,
        BPTTTrainingArguments,
        {"transition_steps": 4, "context_length": 12, "future_length": 3, "consistency_weight": 0.5},
    ),
    "bptt_muon": (
        BPTTTrainer,
        BPTTTrainingArguments,
        {"transition_steps": 12, "context_length": 12, "matrix_optimizer": "muon"},
    ),
    "dmt_stride": (
        DMTTrainer,
        DMTTrainingArguments,
        {"context_length": 12, "label_stride": 4, "normalized_dynamics_weight": 0.5},
    ),
}

# Steps in proportion to the gradient show a wrong scale, which those of AdamW and Muon hide.
PLAIN_STEPS = {"bptt_muon": {"learning_rate": 0.005}}
# Muon orthogonalises in bfloat16: the last bits of a gradient decide how it rounds.
TOLERANCES = {"bptt_muon": {"rtol": 0.0, "atol": 1e-3}}


def some_rows(num=40, length=13, seed=0):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(VOCAB, (num, 1), generator=generator)
    rows = (start + 3 * torch.arange(length)) % VOCAB  # learnable
    return [{"input_ids": row} for row in rows.numpy()]


def some_levels(*lengths, num=40):
    """Rows of the same number at every level, told apart by their length."""
    return Levels([some_rows(num, length, seed) for seed, length in enumerate(lengths)])


def make_trainer(kind, tmp_path, model=None, rows=None, before=None, **settings):
    trainer_class, arguments_class, more = KINDS[kind]
    defaults = {"per_device_train_batch_size": 8, "max_steps": 6, "logging_steps": 2, "disable_tqdm": True}
    arguments = arguments_class(
        output_dir=str(tmp_path), **{**defaults, "save_strategy": "no", "use_cpu": True, **more, **settings}
    )
    if before is not None:
        before(arguments)
    if model is None:
        model = make_fast_weight_composite() if kind == "smt_carried" else make_composite()
    rows = some_rows() if rows is None else rows
    return trainer_class(model=model, args=arguments, train_dataset=rows, eval_dataset=some_rows(10, seed=1))


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
    expected = expected - {"teacher"} if kind in ("smt_sparse", "smt_chunks") else expected
    if kind == "smt_carried":
        expected = {"teacher_readout"}
    if kind == "smt_teacher":
        expected = expected - {"readout", "dynamics"} | {"teacher_readout"}
    if kind == "smt_ours":
        expected = expected | {"consistency", "teacher_readout"}
    if kind in ("smt_chunks", "dmt_forced", "bptt_future"):
        expected = expected | {"consistency"}
    if kind in ("smt_chunks", "dmt_forced"):
        expected = expected | {"readout_match"}
    if kind == "smt_chunks":
        expected = expected | {"teacher_readout"}
    if kind in ("smt_ours", "smt_chunks", "dmt_stride"):
        expected = expected | {"normalized_dynamics"}
    assert expected <= set(train[0]) and {f"eval_{name}" for name in expected} <= set(evaluation[0])
    assert "eval_rollout" in evaluation[0] and ("eval_drift" in evaluation[0]) == (not kind.startswith("bptt"))
    # The loss in the log is the weighted sum of the terms in the log.
    arguments = trainer.args
    for line in train[:1] if kind != "smt_ours" else ():  # there, the dynamics follow the teacher
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
            **PLAIN_STEPS.get(kind, {"optim": "sgd", "learning_rate": 0.05}),
        )
        trainer.train()
        runs.append((weights_of(trainer), [line for line in trainer.state.log_history if "loss" in line]))
    assert_same(runs[0][0], runs[1][0], **TOLERANCES.get(kind, {}))
    for first, second in zip(runs[0][1], runs[1][1]):
        for name in set(first) - {"epoch", "learning_rate", "step", "grad_norm", "seconds", "sequential_steps"}:
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


def levels_of_steps(trainer):
    """Filled as the trainer trains: the transitions of a row at every step, and the numbers of its rows."""
    seen: dict[int, set] = {}
    numbers: dict[int, list] = {}
    before_forward = trainer._before_forward

    def spy(inputs):
        if trainer.model.training:
            seen.setdefault(trainer.state.global_step, set()).add(inputs["input_ids"].shape[1] - 1)
            numbers.setdefault(trainer.state.global_step, []).extend(inputs["example_ids"].tolist())
        return before_forward(inputs)

    trainer._before_forward = spy
    return seen, numbers


CURRICULA = {
    "smt": {"on_policy_mode": "sequential", "on_policy_warmup_ratio": 0.0},
    "smt_ours": {"on_policy_warmup_ratio": 0.0},
    "dmt": {},
    "bptt_full": {},
    "bptt_rows": {},
}


@pytest.mark.parametrize("kind", list(CURRICULA))
@pytest.mark.parametrize("accumulation", [1, 4])
def test_batches_come_from_the_current_level(kind, accumulation, tmp_path):
    """With a threshold that every loss is below, a level a step; all micro-batches of a step are of one level."""
    trainer = make_trainer(
        kind,
        tmp_path,
        rows=some_levels(5, 9, 13),
        curriculum_threshold=100.0,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        **CURRICULA[kind],
    )
    seen, numbers = levels_of_steps(trainer)
    trainer.train()
    assert seen == {0: {4}, 1: {8}, 2: {12}, 3: {12}, 4: {12}, 5: {12}}
    assert [line["level"] for line in trainer.state.log_history if "loss" in line] == [1, 2, 2, 2, 2, 2]
    assert [number for step in range(5) for number in numbers[step]] == list(EpochSampler(40, seed=42))
    assert [line["step"] for line in trainer.state.log_history if "eval_rollout" in line] == [2, 4, 6]


def test_without_a_threshold_the_first_level_stays(tmp_path):
    trainer = make_trainer("bptt_full", tmp_path, rows=some_levels(5, 9), logging_steps=1)
    seen, _ = levels_of_steps(trainer)
    trainer.train()
    assert set().union(*seen.values()) == {4} and trainer.pace.own_loss > 0
    one = make_trainer("bptt_full", tmp_path, curriculum_threshold=100.0)  # data without levels
    one.train()
    assert one.pace.level == 0 and not any("level" in line for line in one.state.log_history)


@pytest.mark.parametrize("kind", ["smt_ours", "bptt_full", "bptt_rows"])
def test_accumulation_with_levels(kind, tmp_path):
    """8 x 1 == 1 x 8: weights, running spread of the labels, terms and pace, over two changes of the level."""
    runs = []
    for batch, accumulation in ((8, 1), (1, 8)):
        trainer = make_trainer(
            kind,
            tmp_path,
            rows=some_levels(5, 9, 13),
            curriculum_threshold=100.0,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.0,
            optim="sgd",
            learning_rate=0.05,
            logging_steps=1,
            **CURRICULA[kind],
        )
        trainer.train()
        lines = [line for line in trainer.state.log_history if "loss" in line]
        runs.append((weights_of(trainer), lines, trainer.pace.state()["attributes"]))
    assert_same(runs[0][0], runs[1][0])
    assert runs[0][2]["level"] == 2
    for first, second in [*zip(runs[0][1], runs[1][1]), (runs[0][2], runs[1][2])]:
        assert first.keys() == second.keys()
        for name in set(first) - {"epoch", "learning_rate", "step", "grad_norm", "seconds", "sequential_steps"}:
            expected = None if second[name] is None else pytest.approx(second[name], rel=2e-3, abs=1e-5)
            assert first[name] == expected, name


@pytest.mark.parametrize("kind", list(CURRICULA))
@pytest.mark.parametrize("after", [-1, 0, 1])
def test_resume_across_a_change_of_the_level(kind, after, tmp_path):
    """A checkpoint a step before the level changes, exactly there, or a step after leads to the same run."""
    settings = {"logging_steps": 1, "learning_rate": 0.01, "warmup_steps": 0, "max_steps": 8, **CURRICULA[kind]}
    settings |= {"rows": some_levels(5, 9, 13)}
    probe, losses = make_trainer(kind, tmp_path / "probe", **settings), []
    after_step = probe.after_step
    probe.after_step = lambda: (after_step(), losses.append(probe.pace.own_loss))
    probe.train()
    # The first step whose running loss is the lowest so far; the threshold is such that the level changes there.
    change = next(step for step in range(1, 6) if losses[step] < min(losses[:step]) - 1e-4) + 1
    settings["curriculum_threshold"] = (losses[change - 1] + min(losses[: change - 1])) / 2
    whole = make_trainer(kind, tmp_path / "whole", save_strategy="steps", save_steps=1, save_total_limit=9, **settings)
    seen, _ = levels_of_steps(whole)
    whole.train()
    assert [seen[step] for step in range(change + 1)] == [{4}] * change + [{8}]
    resumed = make_trainer(kind, tmp_path / "again", **settings)
    again, _ = levels_of_steps(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{change + after}"))
    assert again == {step: seen[step] for step in range(change + after, 8)}
    assert_same(weights_of(whole), weights_of(resumed), rtol=1e-6, atol=1e-6)
    assert resumed.pace.state() == whole.pace.state()
    ours, theirs = ([line["loss"] for line in run.state.log_history if "loss" in line] for run in (whole, resumed))
    assert ours == pytest.approx(theirs, rel=1e-6) and len(ours) == 8


def test_dynamics_wait_for_the_teacher(tmp_path):
    """The scale of a step follows the running loss of the readout on the teacher's memories of the steps before."""
    trainer = make_trainer("smt_ours", tmp_path, logging_steps=1, max_steps=5)
    scales, original = [], trainer.model.forward

    def spy(*args, dynamics_scale=1.0, **kwargs):
        scales.append(dynamics_scale)
        return original(*args, dynamics_scale=dynamics_scale, **kwargs)

    trainer.model.forward = spy
    trainer.train()
    running, expected = None, [0.05]
    lines = [line for line in trainer.state.log_history if "loss" in line]
    for line in lines:
        running = 0.9 * (line["teacher_readout"] if running is None else running) + 0.1 * line["teacher_readout"]
        expected.append(min(max((5.0 - running) / 3.0, 0.05), 1.0))
    assert scales == pytest.approx(expected[:5], rel=1e-4) and 0.05 < scales[-1] < 1.0
    assert trainer.pace.teacher_loss == pytest.approx(running, rel=1e-4)
    for scale, line in zip(scales, lines):
        weights = {"readout": 1, "predictive": 1, "uniformity": 0.001, "teacher": 1, "consistency": 0.5}
        weights |= {"teacher_readout": 0.5, "dynamics": 0.1 * scale, "normalized_dynamics": 0.5 * scale}
        assert line["loss"] == pytest.approx(sum(weight * line[name] for name, weight in weights.items()), rel=1e-3)
    without = make_trainer(  # no readout on the teacher's memories: the predictive loss stands in
        "smt", tmp_path, dynamics_starts_below=5.0, dynamics_full_below=2.0, max_steps=1, logging_steps=1
    )
    without.train()
    (line,) = [line for line in without.state.log_history if "loss" in line]
    assert without.pace.teacher_loss == pytest.approx(line["predictive"], rel=1e-4)


def test_the_spread_of_the_labels_is_kept(tmp_path):
    """Once an optimiser step, whatever the number of its micro-batches; evaluation leaves it as it is."""
    trainer = make_trainer(
        "dmt_stride", tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=3
    )
    model, numbers = trainer.model, []
    update = model.update_label_moments
    model.update_label_moments = lambda moments: (numbers.append(int(moments[0, 0])), update(moments))
    trainer.train()
    assert model.label_updates == 3 and numbers == [8 * 3] * 3  # every step its own labels, of all micro-batches
    before = weights_of(trainer)
    trainer.evaluate()
    assert_same(before, weights_of(trainer), rtol=0, atol=0)
    # A frozen teacher: what every step has seen is an estimate of one spread.
    expected = [model.teacher(torch.tensor(row["input_ids"])[None, :-1], torch.tensor([4, 8, 12]),
                              model.student.model.start_memory())[0] for row in some_rows()]  # fmt: skip
    spread = torch.cat(expected).var(0, unbiased=False)
    correlation = torch.corrcoef(torch.stack([spread.flatten(), model.label_variance().flatten()]))[0, 1]
    assert correlation > 0.8


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


@pytest.mark.parametrize("kind", ["bptt_full", "bptt_muon"])
def test_optimiser_state_is_handed_over(kind, tmp_path):
    """Two half phases with the state handed over == one phase."""
    settings = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    whole = make_trainer(kind, tmp_path, max_steps=5, **settings)
    whole.train()
    first = make_trainer(kind, tmp_path / "first", max_steps=3, save_strategy="steps", **settings)
    first.train()
    state = load_student_optimizer(str(tmp_path / "first" / "checkpoint-3"))
    assert all(int(entry["step"]) == 3 for entry in state.values() if "step" in entry)
    assert any("momentum_buffer" in entry for entry in state.values()) == (kind == "bptt_muon")
    second = make_trainer(kind, tmp_path, model=first.model, max_steps=2, **settings)
    left = list(EpochSampler(40, seed=42))[24:]  # the rows of the fourth and fifth step
    second._get_train_sampler = lambda *_: left
    second._student_optimizer_state = state
    second.train()
    assert_same(weights_of(whole), weights_of(second), rtol=1e-5, atol=1e-6)


def test_resume_with_the_other_optimizer(tmp_path):
    make_trainer("bptt_muon", tmp_path, save_strategy="steps", save_steps=3).train()
    resumed = make_trainer("bptt_full", tmp_path)
    with pytest.raises(ValueError, match="resume with the `matrix_optimizer`"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_muon_and_adamw_side_by_side(tmp_path):
    """One optimiser for both == torch's two, each on its own parameters."""
    settings = {"lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0.0, "max_steps": 1}
    trainer = make_trainer("bptt_muon", tmp_path, **settings)
    optimizer = trainer.create_optimizer()
    model = trainer.model
    model(torch.stack([torch.as_tensor(row["input_ids"]) for row in some_rows(8)]), trainer.objective).loss.backward()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad
                 and parameter.grad is not None}  # fmt: skip
    for _ in range(3):
        optimizer.step()
    linear = set(trainer.get_decay_parameter_names(model))
    for name, gradient in gradients.items():
        twin = torch.nn.Parameter(before[name].clone())
        twin.grad = gradient
        decay = trainer.args.weight_decay if name in linear else 0.0
        if name in linear and not name.endswith("lm_head.weight"):
            own = torch.optim.Muon([twin], lr=4e-3, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        else:
            own = torch.optim.AdamW([twin], lr=4e-3, betas=(0.9, 0.95), weight_decay=decay)
        for _ in range(3):
            own.step()
        torch.testing.assert_close(dict(model.named_parameters())[name], twin, rtol=1e-5, atol=1e-6, msg=name)
    assert any("momentum_buffer" in state for state in optimizer.state.values())


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
    with pytest.raises(ValueError, match="matrix_optimizer"):
        make_trainer("bptt", tmp_path, matrix_optimizer="sgd")
    with pytest.raises(ValueError, match="no use for `optim"):
        make_trainer("bptt_muon", tmp_path, optim="sgd")
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
    alone = arguments("smt", trains_updater=False)
    assert arm_name([alone, dmt4]) == "smt_dmt4" and arm_name([alone, smt8, dmt4]) == "smt8_dmt4"
    assert arm_name([alone]) == "teacher" and arm_name([alone, bptt]) == "smt_bptt"
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
    phases[1].matrix_optimizer = "muon"
    with pytest.raises(ValueError, match="same `matrix_optimizer`"):
        lay_out(phases, str(tmp_path))
    alone = [arguments(10, True)]
    lay_out(alone, str(tmp_path))
    assert (alone[0].schedule_offset, alone[0].schedule_steps) == (0, 0)


@pytest.mark.parametrize("kind", ["bptt", "smt_carried"])
def test_a_window_hands_the_memory_on(kind, tmp_path):
    """The next window of a stream starts where the last one ended; a new row starts from m_0."""
    trainer = make_trainer(kind, tmp_path, max_steps=7)
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


def test_memories_that_cannot_be_carried(tmp_path):
    words = {
        "trains_updater": False,
        "carries_teacher_memory": True,
        "context_length": 12,
        "teacher_readout_weight": 1.0,
    }
    zero = dict.fromkeys(("teacher_weight", "predictive_weight", "uniformity_weight"), 0.0)
    for changed, message in (
        ({"trains_updater": True}, "for a teacher that is trained alone"),
        ({"predictive_weight": 1.0}, "set `predictive_weight` to 0"),
        ({"transition_steps": 5}, "must divide its `context_length`"),
    ):
        with pytest.raises(InputError, match=message):
            SMTTrainingArguments(output_dir=str(tmp_path), **{**words, **zero, "transition_steps": 4, **changed})
    arguments = SMTTrainingArguments(output_dir=str(tmp_path), use_cpu=True, transition_steps=4, **words, **zero)
    with pytest.raises(InputError, match="cannot go on from a memory"):
        SMTTrainer(model=make_composite(), args=arguments, train_dataset=some_rows())


def test_a_global_batch_is_cut_for_the_processes(tmp_path):
    arguments = make_trainer("smt", tmp_path, global_batch_size=12, gradient_accumulation_steps=3).args
    assert (arguments.per_device_train_batch_size, arguments.train_batch_size) == (4, 4)
    with pytest.raises(ValueError, match=r"`global_batch_size` \(10\) of the smt phase must be a multiple of 3"):
        make_trainer("smt", tmp_path, global_batch_size=10, gradient_accumulation_steps=3)


@pytest.mark.parametrize("kind", ["dmt", "dmt_stride"])
def test_cached_labels_are_the_teachers(kind, tmp_path, monkeypatch):
    """Three epochs of 40 rows: the teacher runs in the first alone, and the weights are those of a run without."""
    settings = {"max_steps": 15, "optim": "sgd", "learning_rate": 0.05}
    plain = make_trainer(kind, tmp_path / "plain", **settings)
    plain.train()
    cached = make_trainer(kind, tmp_path / "cached", label_cache_dir=str(tmp_path / "labels"), **settings)
    calls = []
    cached.model.teacher.register_forward_hook(lambda *call: calls.append(1))
    cached.train()
    assert len(calls) == 5
    assert_same(weights_of(plain), weights_of(cached), rtol=0, atol=0)
    again = make_trainer(kind, tmp_path / "again", label_cache_dir=str(tmp_path / "labels"), **settings)
    again.model.teacher.register_forward_hook(lambda *call: calls.append(1))
    again.train()
    assert len(calls) == 5 and len(list((tmp_path / "labels").iterdir())) == 2
    assert_same(weights_of(plain), weights_of(again), rtol=0, atol=0)


def test_another_teacher_or_other_rows_have_labels_of_their_own(tmp_path):
    words = {"label_cache_dir": str(tmp_path / "labels"), "max_steps": 1}
    make_trainer("dmt", tmp_path / "a", **words).train()
    make_trainer("dmt", tmp_path / "b", rows=some_rows(seed=5), **words).train()
    model = make_composite()
    with torch.no_grad():
        model.teacher.norm.weight += 0.1
    make_trainer("dmt", tmp_path / "c", model=model, **words).train()
    make_trainer("dmt", tmp_path / "d", label_stride=5, **words).train()
    make_trainer("dmt", tmp_path / "e", label_stride=6, **words).train()  # as many labels a row, elsewhere
    assert len(list((tmp_path / "labels").iterdir())) == 10


def test_labels_that_cannot_be_cached(tmp_path):
    words = {"label_cache_dir": str(tmp_path / "labels")}
    with pytest.raises(ValueError, match="exchanges rows"):
        make_trainer("dmt_aggregate", tmp_path, **words)
    with pytest.raises(ValueError, match="without levels"):
        make_trainer("dmt", tmp_path, rows=some_levels(7, 13), **words)
    rows = [{**row, "document_ids": row["input_ids"] * 0} for row in some_rows()]
    with pytest.raises(ValueError, match="without padding"):
        make_trainer("dmt", tmp_path, rows=rows, **words)


@pytest.mark.parametrize("kind", ["smt", "dmt", "bptt_rows"])
def test_scores_do_not_depend_on_the_evaluation_batch(kind, tmp_path):
    uneven = [row for length in (13, 5, 9, 13, 7) for row in some_rows(2, length, length)]
    scores = []
    for size in (1, 4, 16):
        trainer = make_trainer(kind, tmp_path, per_device_eval_batch_size=size)
        metrics = trainer.evaluate(uneven)
        metrics |= metrics.pop("eval_drift_by_age", {})
        scores.append(
            {name: value for name, value in metrics.items() if "per_second" not in name and "time" not in name}
        )
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], rel=1e-5)


def test_rows_that_are_served_twice_count_once(tmp_path, monkeypatch):
    """accelerate fills the last batches of an evaluation with rows from its beginning."""
    trainer = make_trainer("bptt_rows", tmp_path)
    batches = [torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4, 0])]
    labels = torch.ones(2, 13, dtype=torch.long)
    counted = [trainer._counted_once({"row_ids": ids, "labels": labels})["labels"] for ids in batches]
    assert [int((part != -100).any(1).sum()) for part in counted] == [2, 2, 1]
    assert (counted[2][1] == -100).all() and (counted[2][0] == 1).all()
    # On the second of two processes, the rows that the first one has in the same step come before its own.
    trainer._scored_rows = set()
    monkeypatch.setattr(type(trainer.args), "process_index", property(lambda self: 1))
    monkeypatch.setattr(trainer.accelerator, "gather", lambda own: torch.cat([torch.tensor([7, 5]), own]))
    second = trainer._counted_once({"row_ids": torch.tensor([7, 6]), "labels": labels})["labels"]
    assert (second[0] == -100).all() and (second[1] == 1).all()

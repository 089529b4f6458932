"""What sets the pace: running losses and levels, dynamics that wait, budgets of seconds by a clock that is made up."""

import json

import pytest
import torch
from transformers import TrainerControl, TrainerState, get_scheduler

from smt_hf.training import pacing
from smt_hf.training.pacing import VIRTUAL_STEPS_PER_SECOND, Pace, TrainingCost
from tests.unit.training.test_trainers import assert_same, make_trainer, weights_of

STEP_SECONDS = 0.25


@pytest.fixture
def clock(monkeypatch):
    """Every look at the clock comes a quarter of a second after the last: a step takes that long, and so does what
    lies between two steps."""
    looks = iter(range(1_000_000))
    monkeypatch.setattr(pacing, "now", lambda: next(looks) * STEP_SECONDS)


def test_running_losses():
    pace = Pace(3, threshold=0.5)
    assert (pace.level, pace.own_loss, pace.teacher_loss) == (0, None, None)
    pace.update(3.0, None)
    assert pace.own_loss == pytest.approx(3.0) and pace.teacher_loss is None
    pace.update(None, 2.0)
    assert pace.own_loss == pytest.approx(3.0) and pace.teacher_loss == pytest.approx(2.0)
    pace.update(1.0, 0.0)
    assert pace.own_loss == pytest.approx(0.9 * 3.0 + 0.1 * 1.0) and pace.teacher_loss == pytest.approx(1.8)
    assert pace.level == 0


def test_levels():
    """A level ends when the running loss is below the threshold, never by one lucky first step, and not the last."""
    pace = Pace(3, threshold=0.5)
    losses, levels = [0.1] * 12 + [2.0, 0.1] + [0.1] * 30, []
    running = None
    for loss in losses:
        pace.update(loss, 1.0)
        running = 0.9 * (max(loss, 1.0) if running is None else running) + 0.1 * loss
        if running < 0.5 and len(levels) and levels[-1] < 2:
            running = None
        levels.append(pace.level)
        assert pace.own_loss == (None if running is None else pytest.approx(running))
    first = next(step for step in range(50) if 0.9 ** (step + 1) * 0.9 + 0.1 < 0.5)  # 1 -> 0.1 by a tenth a step
    assert levels.index(1) == first == 7
    assert levels.index(2) > 14 and set(levels) == {0, 1, 2} and levels == sorted(levels)
    assert pace.own_loss < 0.5 and pace.level == 2  # nothing comes after the last
    assert pace.teacher_loss == pytest.approx(1.0)  # goes on through all levels
    without = Pace(3, threshold=None)
    for loss in losses:
        without.update(loss, None)
    assert without.level == 0


@pytest.mark.parametrize(
    "teacher_loss, expected", [(None, 0.05), (9.0, 0.05), (2.0, 0.05), (1.95, 0.05), (1.5, 0.5), (1.0, 1.0), (0.1, 1.0)]
)
def test_dynamics_scale(teacher_loss, expected):
    pace = Pace()
    pace.teacher_loss = teacher_loss
    assert pace.dynamics_scale(2.0, 1.0) == pytest.approx(expected)
    assert pace.dynamics_scale(None, None) == 1.0


def test_dynamics_scale_may_be_a_step():
    pace = Pace()
    for teacher_loss, expected in ((1.01, 0.05), (0.99, 1.0)):
        pace.teacher_loss = teacher_loss
        assert pace.dynamics_scale(1.0, 1.0) == expected


@pytest.mark.parametrize("kind", [Pace, TrainingCost])
def test_state_survives_a_checkpoint(kind, tmp_path):
    """Through `trainer_state.json`, with whatever is in it."""
    first = kind()
    if kind is Pace:
        first.level, first.own_loss, first.teacher_loss = 2, 0.75, None
    else:
        first.seconds, first.sequential_steps, first.tokens = 1.5, 7, 11
        first.skipped_steps, first.skipped_in_a_row = 3, 2
    state = TrainerState(stateful_callbacks=[first])
    state.save_to_json(str(tmp_path / "state.json"))
    assert set(json.loads((tmp_path / "state.json").read_text())["stateful_callbacks"]) == {kind.__name__}
    second = kind()
    second.on_train_begin(None, TrainerState.load_from_json(str(tmp_path / "state.json")), TrainerControl())
    assert second.state() == first.state() != kind().state()
    if kind is TrainingCost:
        assert (second.skipped_steps, second.skipped_in_a_row) == (3, 2)
    untouched = kind()
    untouched.on_train_begin(None, TrainerState(), TrainerControl())
    assert untouched.state() == kind().state()


def seconds_before(trainer):
    """A line a step: the seconds used before it."""
    return [round((line["step"] - 1) * STEP_SECONDS, 6) for line in trainer.state.log_history if "loss" in line]


BY_SECONDS = {
    "max_seconds": 5.0,
    "logging_steps": 1,
    "warmup_steps": 0.2,
    "max_steps": 3,  # does not count
}


def expected_rate(trainer, seconds):
    """The learning rate of a schedule that has a step a millisecond."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    total = int(5.0 * VIRTUAL_STEPS_PER_SECOND)
    name, kwargs = trainer.args.lr_scheduler_type, trainer.args.lr_scheduler_kwargs
    schedule = get_scheduler(name, optimizer, total // 5, total, kwargs)
    return trainer.args.learning_rate * schedule.lr_lambdas[0](int(seconds * VIRTUAL_STEPS_PER_SECOND))


def assert_follows_the_seconds(trainer):
    """The rate is that of the seconds before the step; the scheduler is asked before the step before has ended."""
    lines = [line for line in trainer.state.log_history if "loss" in line]
    for seconds, line in zip(seconds_before(trainer), lines):
        options = [expected_rate(trainer, max(seconds - late * STEP_SECONDS, 0.0)) for late in (0, 1)]
        assert any(line["learning_rate"] == pytest.approx(option) for option in options), line
    rates = [line["learning_rate"] for line in lines]
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0.9 * trainer.args.learning_rate < max(rates) and rates[-1] < 0.2 * max(rates)


@pytest.mark.parametrize("kind", ["bptt", "bptt_full", "smt"])
def test_a_budget_of_seconds(kind, tmp_path, clock):
    """5 seconds at a quarter of a second a step: 20 steps, an evaluation every other step."""
    trainer = make_trainer(kind, tmp_path, **BY_SECONDS)
    trainer.train()
    assert trainer.state.global_step == 20 and trainer.cost.seconds == 5.0
    assert trainer.cost.step_seconds == [STEP_SECONDS] * 20
    evaluated = [line["step"] for line in trainer.state.log_history if "eval_rollout" in line]
    assert evaluated == list(range(2, 21, 2))
    shown = [line["seconds"] for line in trainer.state.log_history if "loss" in line]
    assert shown == [STEP_SECONDS * step for step in range(1, 21)]
    assert_follows_the_seconds(trainer)


def test_warm_ups_go_by_seconds(tmp_path, clock):
    trainer = make_trainer("smt", tmp_path, **BY_SECONDS)
    seen = []
    compute_loss = trainer.compute_loss

    def spy(model, *args, **kwargs):
        seen.append((trainer._progress(), model.training))
        return compute_loss(model, *args, **kwargs)

    trainer.compute_loss = spy
    trainer.train()
    assert [progress for progress, trains in seen if trains] == pytest.approx([step / 20 for step in range(20)])


def test_no_evaluation_on_the_way(tmp_path, clock):
    """What the strategy asks for stays."""
    settings = {**BY_SECONDS, "max_seconds": 1.1, "evaluates_by_seconds": False}
    for more, expected in (({}, []), ({"eval_strategy": "steps", "eval_steps": 2}, [2, 4])):
        trainer = make_trainer("bptt", tmp_path, **settings, **more)
        trainer.train()
        assert trainer.state.global_step == 5  # the step that uses the last tenth of a second up
        assert [line["step"] for line in trainer.state.log_history if "eval_rollout" in line] == expected


def test_resumed_seconds(tmp_path, clock):
    """Seven steps, a new process's worth of objects, thirteen more: the same run."""
    settings = {**BY_SECONDS, "save_strategy": "steps", "save_steps": 7, "save_total_limit": 9}
    whole = make_trainer("bptt", tmp_path / "whole", **settings)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-7"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["TrainingCost"]["attributes"]["seconds"] == 7 * STEP_SECONDS
    resumed = make_trainer("bptt", tmp_path / "again", **BY_SECONDS)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 20 and resumed.cost.seconds == 5.0 and len(resumed.cost.step_seconds) == 13
    assert_same(weights_of(whole), weights_of(resumed), rtol=1e-6, atol=1e-6)
    assert_follows_the_seconds(resumed)
    for name in ("loss", "learning_rate", "eval_rollout", "seconds"):
        ours, theirs = (
            {line["step"]: line[name] for line in run.state.log_history if name in line} for run in (whole, resumed)
        )
        assert ours == pytest.approx(theirs, rel=1e-6), name


def test_a_schedule_by_seconds_that_spans_phases(tmp_path, clock):
    """The second of two phases of one schedule goes on where the first one ends, and ends where it ends."""
    rates = []
    for offset, seconds in ((0, 2.0), (2000, 3.0)):
        settings = {**BY_SECONDS, "max_seconds": seconds, "schedule_offset": offset, "schedule_steps": 5000}
        trainer = make_trainer("bptt", tmp_path, **settings)
        trainer.train()
        rates.append([line["learning_rate"] for line in trainer.state.log_history if "loss" in line])
    assert [len(part) for part in rates] == [8, 12]
    assert rates[1][0] == pytest.approx(expected_rate(trainer, 2.0))
    at_the_end = [expected_rate(trainer, seconds) for seconds in (5.0 - STEP_SECONDS, 5.0 - 2 * STEP_SECONDS)]
    assert any(rates[1][-1] == pytest.approx(rate) for rate in at_the_end)
    assert rates[0][-1] > rates[1][0] > rates[1][-1]

"""Pipelines: what phases share, and when a phase is over; with a clock that is made up."""

import json
import shutil

import pytest

from smt_hf import BPTTTrainingArguments, SMTTrainingArguments
from smt_hf.data import Levels
from smt_hf.training import pacing
from smt_hf.training.pacing import Pace
from smt_hf.training.phases import lay_out, newest_checkpoint, run_phases
from tests.conftest import make_composite
from tests.unit.training.test_trainers import assert_same, some_rows

STEP_SECONDS = 0.25


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    looks = iter(range(1_000_000))
    monkeypatch.setattr(pacing, "now", lambda: next(looks) * STEP_SECONDS)


def phase(kind=BPTTTrainingArguments, **settings):
    defaults = {"context_length": 12, "transition_steps": 4, "per_device_train_batch_size": 8, "disable_tqdm": True}
    more = {"future_length": 4} if kind is SMTTrainingArguments else {}
    return kind(**{"output_dir": "x", "use_cpu": True, "save_strategy": "no", **defaults, **more, **settings})


def laid_out(*settings):
    phases = [phase(**own) for own in settings]
    lay_out(phases, "out")
    return [(own.schedule_offset, own.schedule_steps) for own in phases]


def test_a_schedule_of_seconds_is_laid_out_in_milliseconds():
    alone, going_on = {"continue_previous_phase": False}, {"continue_previous_phase": True}
    seconds = [{"max_seconds": 1.5, **alone}, {"max_seconds": 0.25, **going_on}, {"max_seconds": 2.0, **going_on}]
    assert laid_out(*seconds) == [(0, 3750), (1500, 3750), (1750, 3750)]
    assert laid_out(seconds[0]) == [(0, 0)]
    # A group of seconds beside a group of steps is fine.
    steps = [{"max_steps": 10, **alone}, {"max_steps": 5, **going_on}]
    assert laid_out(*seconds[:2], *steps) == [(0, 1750), (1500, 1750), (0, 15), (10, 15)]


@pytest.mark.parametrize("is_first", [False, True])
def test_seconds_and_steps_share_no_schedule(is_first):
    settings = [{"max_seconds": 1.5}, {"max_steps": 10}]
    with pytest.raises(ValueError, match="max_seconds"):
        laid_out(*(settings if is_first else settings[::-1]))


def run(folder, *settings, resume=None, scored=None):
    phases = [phase(**own) for own in settings]
    lay_out(phases, str(folder))
    model = make_composite()

    def evaluate(model, arguments):
        if scored is not None:
            scored.append(arguments.output_dir)
        return {"student": {"accuracy": 0.5}}

    rows = some_rows()
    results = list(
        run_phases(model, phases, lambda _: rows, rows[:8], evaluate=evaluate, resume_from_checkpoint=resume)
    )
    return model, results


def test_a_phase_is_complete_by_its_seconds(tmp_path):
    """Not by its steps: it is found complete, or gone on with where it has been given more."""
    scored = []
    settings = [{"kind": SMTTrainingArguments, "max_seconds": 1.0}, {"max_seconds": 0.5}]
    model, (smt, bptt) = run(tmp_path, *settings, scored=scored)
    assert (smt.seconds, bptt.seconds, smt.is_new, bptt.is_new) == (1.0, 0.5, True, True)
    assert newest_checkpoint(tmp_path / "smt").endswith("checkpoint-4")
    assert newest_checkpoint(tmp_path / "bptt").endswith("checkpoint-2")
    assert smt.tokens == 4 * 8 * 12 and bptt.tokens == 2 * 8 * 4 and (smt.arm, bptt.arm) == ("smt4", "smt4_bptt")
    again, (smt, bptt) = run(tmp_path, *settings, resume=True, scored=scored)
    assert (smt.seconds, bptt.seconds, smt.is_new, bptt.is_new) == (1.0, 0.5, False, False)
    assert_same(model.state_dict(), again.state_dict(), rtol=0, atol=0)
    assert len(scored) == 2 and smt.scores == {"student": {"accuracy": 0.5}}
    _, (smt, bptt) = run(tmp_path, settings[0], {"max_seconds": 1.0}, resume=True, scored=scored)
    assert (smt.seconds, bptt.seconds, smt.is_new, bptt.is_new) == (1.0, 1.0, False, True)
    assert newest_checkpoint(tmp_path / "bptt").endswith("checkpoint-4") and len(scored) == 3


def test_a_phase_cut_off_in_its_seconds(tmp_path):
    """Its checkpoint is complete, the phase is not."""
    settings = {"max_seconds": 1.0, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 9}
    whole, (result,) = run(tmp_path, settings)
    for step in (3, 4):
        for path in (tmp_path / "bptt" / f"checkpoint-{step}").iterdir():
            path.unlink() if path.is_file() else None
    assert newest_checkpoint(tmp_path / "bptt").endswith("checkpoint-2")
    again, (resumed,) = run(tmp_path, settings, resume=True)
    assert resumed.is_new and resumed.seconds == result.seconds == 1.0 and resumed.tokens == result.tokens
    assert_same(whole.state_dict(), again.state_dict(), rtol=1e-6, atol=1e-6)
    state = json.loads((tmp_path / "bptt" / "trainer_state.json").read_text())
    assert state["global_step"] == 4


def test_a_phase_of_steps_is_complete_by_its_steps(tmp_path):
    _, (first,) = run(tmp_path, {"max_steps": 2})
    _, (second,) = run(tmp_path, {"max_steps": 2}, resume=True)
    _, (third,) = run(tmp_path, {"max_steps": 3}, resume=True)
    assert (first.is_new, second.is_new, third.is_new) == (True, False, True)
    assert (first.seconds, second.seconds, third.seconds) == (0.5, 0.5, 0.75)


def test_the_teacher_alone_has_no_name_and_hands_on_no_level(tmp_path, monkeypatch):
    """Its curriculum goes by its own loss; the student begins with the easiest rows, and dmt where smt has stopped."""
    levels = []
    monkeypatch.setattr(Pace, "on_train_begin", lambda self, *_, **__: levels.append(self.level))
    rows = some_rows()
    smt = {"kind": SMTTrainingArguments, "max_steps": 2, "teacher_readout_weight": 1.0}
    settings = {
        **smt,
        "on_policy_mode": "sequential",
        "curriculum_threshold": 99.0,
        "on_policy_warmup_ratio": 0.0,
        "on_policy_fraction": 1.0,
    }
    phases = [phase(**settings, trains_updater=False), phase(**settings), phase(max_steps=2, carries_memory=False)]
    lay_out(phases, str(tmp_path))
    model = make_composite()
    before = {name: value.clone() for name, value in model.student.model.updater.state_dict().items()}
    after = []
    for result in run_phases(model, phases, lambda _: Levels([rows, rows, rows, rows]), rows[:8]):
        after.append((result.arm, {**model.student.model.updater.state_dict()}))
        if result.arm == "teacher":
            assert_same(before, after[0][1], rtol=0, atol=0)
    assert [arm for arm, _ in after] == ["teacher", "smt4", "smt4_bptt"]
    assert levels == [0, 0, 2]


def test_a_phase_with_levels_of_its_own_begins_where_the_student_is(tmp_path, monkeypatch):
    """Levels are told by their difficulties then, not by their numbers; the hardest that was reached counts."""
    levels = []
    monkeypatch.setattr(Pace, "on_train_begin", lambda self, *_, **__: levels.append(self.level))
    rows = some_rows()
    level_rows = lambda arguments: Levels([rows] * len(arguments.levels))  # noqa: E731

    def go(resume):
        own = ("4,8,12,16", "8,12,16", "2,4", "4,8,16")  # two steps lead from 4 to 12, and from 12 to 16
        settings = {"max_steps": 2, "carries_memory": False, "curriculum_threshold": 99.0}
        phases = [phase(**settings, curriculum_levels=each) for each in own]
        lay_out(phases, str(tmp_path))
        for _ in run_phases(make_composite(), phases, level_rows, rows[:8], resume_from_checkpoint=resume):
            pass
        return phases

    phases = go(False)
    assert levels == [0, 1, 1, 2]
    shutil.rmtree(phases[-1].output_dir)  # the others are read, not trained
    go(True)
    assert levels == [0, 1, 1, 2, 2]


def test_the_teacher_alone_is_no_pipeline():
    with pytest.raises(ValueError, match="trains_updater"):
        lay_out([phase(kind=SMTTrainingArguments, max_steps=2, trains_updater=False)], "out")

"""Drift by age and the exponent in the Trainers' metrics, what trackers get of them, and the warning."""

import json
import warnings

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from smt_hf.evaluation import largest_lyapunov, loss_by_age
from smt_hf.training.phases import lay_out
from tests.conftest import make_composite, make_student
from tests.unit.training.test_trainers import KINDS, make_trainer, some_rows


def evaluated(trainer):
    """Metrics, and the messages of warnings about drift."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metrics = trainer.evaluate()
    return metrics, [str(entry.message) for entry in caught if "drifts from its teacher" in str(entry.message)]


@pytest.mark.parametrize("kind", ["smt", "dmt", "bptt"])
def test_metrics_are_those_of_the_evaluation(kind, tmp_path):
    trainer = make_trainer(kind, tmp_path, drift_rows=6)
    metrics, _ = evaluated(trainer)
    rows = np.stack([row["input_ids"] for row in some_rows(10, seed=1)[:6]])
    expected = loss_by_age(trainer.model, rows, rows)
    assert metrics["eval_lyapunov"] == pytest.approx(largest_lyapunov(trainer.model.student, rows), abs=1e-5)
    if kind == "bptt":
        assert not {"eval_drift_by_age", "eval_teacher_forced", "eval_free_run"} & set(metrics)
        return
    by_age = {str(age): value for age, value in expected["drift_by_age"].items()}
    assert list(by_age) == ["1", "2", "4", "8", "16"]
    assert metrics["eval_drift_by_age"] == pytest.approx(by_age, abs=1e-5)
    for name in ("teacher_forced", "free_run"):
        assert metrics[f"eval_{name}"] == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 32])
def test_metrics_do_not_depend_on_the_evaluation_batch(batch_size, tmp_path):
    expected, _ = evaluated(make_trainer("smt", tmp_path, per_device_eval_batch_size=3))
    metrics, _ = evaluated(make_trainer("smt", tmp_path, per_device_eval_batch_size=batch_size))
    for name in ("eval_drift_by_age", "eval_lyapunov", "eval_free_run"):
        assert metrics[name] == expected[name]


def test_what_is_left_out(tmp_path):
    names = {"eval_drift_by_age", "eval_lyapunov", "eval_free_run"}
    for trainer, there in (
        (make_trainer("smt", tmp_path, drift_rows=0), set()),
        (make_trainer("smt_teacher", tmp_path), set()),
        (make_trainer("smt_sparse", tmp_path), names),
        (make_trainer("bptt", tmp_path, make_student()), {"eval_lyapunov"}),
    ):
        assert names & set(evaluated(trainer)[0]) == there
    slow = make_trainer("smt", tmp_path)
    slow.model.teacher.labels_all_positions = False
    assert names & set(evaluated(slow)[0]) == {"eval_lyapunov"}
    stream = make_trainer("smt", tmp_path)
    assert not names & set(stream.evaluate(Stream(some_rows(4))))


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_trackers_get_numbers_and_the_log_a_dict(tmp_path):
    class Tracker(TrainerCallback):
        lines: list = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.lines.append(dict(logs))

    trainer = make_trainer("dmt", tmp_path, eval_strategy="steps", eval_steps=3, max_steps=3)
    trainer.add_callback(Tracker())
    trainer.train()
    trainer.save_state()
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    (kept,) = [line for line in history if "eval_loss" in line]
    (given,) = [line for line in Tracker.lines if "eval_loss" in line]
    assert all(isinstance(value, int | float) for line in Tracker.lines for value in line.values())
    assert {f"eval_drift_by_age/{age}": value for age, value in kept["eval_drift_by_age"].items()} == {
        name: value for name, value in given.items() if name.startswith("eval_drift_by_age")
    }
    assert kept["eval_drift_by_age"].keys() == {"1", "2", "4", "8", "16"} and kept["step"] == 3
    assert not any("/" in name for name in kept)


@pytest.mark.parametrize("device_batches", [{}, {"bf16": True}])
def test_the_exponent_is_of_single_precision(device_batches, tmp_path):
    """Under autocast, a difference of a few parts in ten thousand would drown in bfloat16."""
    trainer = make_trainer("dmt", tmp_path, **device_batches)
    rows = np.stack([row["input_ids"] for row in some_rows(10, seed=1)])
    metrics, _ = evaluated(trainer)
    assert metrics["eval_lyapunov"] == pytest.approx(largest_lyapunov(trainer.model.student, rows), abs=0.02)


def drifting_trainer(kind, tmp_path, progress=1.0, **settings):
    """A trainer whose student's own rollout is worse than its teacher's memories by what it says."""
    trainer = make_trainer(kind, tmp_path, **settings)
    means = {"drift_by_age": {1: 0.125, 2: 0.5}, "teacher_forced": 1.0, "free_run": 1.5, "lyapunov": 0.25}
    trainer._measured = lambda model, rows: {**means, "drift_by_age": dict(means["drift_by_age"])}
    trainer._progress = lambda: progress
    return trainer


@pytest.mark.parametrize(
    ("kind", "remedies"),
    [
        ("smt", ["`dmt` phase", "smt_on_policy_fraction"]),
        ("dmt", ["dmt_max_steps", "dmt_transition_steps", "dmt_on_policy_mode"]),
    ],
)
def test_the_warning_names_numbers_and_remedies(kind, remedies, tmp_path):
    trainer = drifting_trainer(kind, tmp_path, drift_warning=0.4)
    (message,) = evaluated(trainer)[1]
    for part in (
        f"in the {kind} phase",
        "1.500",
        "1.000",
        "0.4",
        "0.125 at age 1",
        "0.500 at age 2",
        "0.250",
        *remedies,
    ):
        assert part in message, part
    assert evaluated(trainer)[1] == []  # once per phase


@pytest.mark.parametrize(
    "words", [{"drift_warning": 0.6}, {"drift_warning": None}, {"progress": 0.4}, {"trainable": ["readout"]}]
)
def test_no_warning(words, tmp_path):
    assert evaluated(drifting_trainer("dmt", tmp_path, **words))[1] == []
    assert len(evaluated(drifting_trainer("dmt", tmp_path))[1]) == 1


def test_a_later_phase_that_mends_drift_silences_the_warning(tmp_path):
    def arguments_of(*kinds):
        made = [KINDS[kind][1](output_dir=str(tmp_path), use_cpu=True, **KINDS[kind][2]) for kind in kinds]
        lay_out(made, str(tmp_path))
        return [arguments.drift_is_mended for arguments in made]

    assert arguments_of("smt") == [False]
    assert arguments_of("smt", "smt") == [False, False]
    assert arguments_of("smt", "dmt") == [True, False]
    assert arguments_of("smt", "dmt", "bptt") == [True, True, False]
    trainer = drifting_trainer("smt", tmp_path)
    trainer.args.drift_is_mended = True
    assert evaluated(trainer)[1] == []


@pytest.mark.parametrize(
    ("name", "value"), [("drift_rows", -1), ("drift_warning", -0.1), ("drift_warning", float("nan"))]
)
def test_numbers_out_of_range_are_refused(name, value, tmp_path):
    with pytest.raises(ValueError, match=name):
        make_trainer("smt", tmp_path, model=make_composite(), **{name: value})

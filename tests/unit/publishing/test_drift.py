"""Drift in the results of a run: what is taken from the log, the picture, and the table of the card."""

import json

import matplotlib.figure
import pytest

from smt_hf.publishing.figures import plot_drift_by_age
from smt_hf.publishing.model_card import student_card
from smt_hf.publishing.scores import drift_of
from tests.conftest import make_student
from tests.unit.publishing.test_cards import CARDS

SMT = {"eval_loss": 1.0, "eval_teacher_forced": 1.0, "eval_free_run": 1.4, "eval_lyapunov": -0.1}
SMT |= {"eval_drift_by_age": {"1": 0.05, "2": 0.1, "16": 0.4}, "step": 60}
BPTT = {"eval_loss": 1.0, "eval_lyapunov": 0.02, "step": 280}
DRIFT = [
    {"phase": "smt", "by_age": SMT["eval_drift_by_age"], "teacher_forced": 1.0, "free_run": 1.4, "lyapunov": -0.1},
    {"phase": "bptt", "lyapunov": 0.02},
]


def test_the_last_evaluation_of_each_phase_counts():
    earlier = {**SMT, "eval_lyapunov": 3.0, "eval_drift_by_age": {"1": 9.0}}
    histories = [("smt", [earlier, SMT, {"loss": 1.0}]), ("bptt", [BPTT]), ("smt", [{"eval_loss": 1.0}]), ("dmt", [])]
    assert drift_of(histories) == DRIFT
    diverged = {**SMT, "eval_lyapunov": float("nan"), "eval_drift_by_age": {"1": float("inf"), "2": 0.1}}
    (entry,) = drift_of([("smt", [diverged])])
    assert entry["by_age"] == {"2": 0.1} and "lyapunov" not in entry
    json.dumps(entry, allow_nan=False)


@pytest.mark.parametrize(("drift", "points"), [(DRIFT, [[1, 1.05], [2, 1.1], [16, 1.4]]), ([], None)])
def test_the_picture(drift, points, tmp_path, monkeypatch):
    drawn = []
    savefig = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda self, *args, **words: (drawn.append(self), savefig(self, *args, **words)),
    )
    plot_drift_by_age(drift, tmp_path / "drift_by_age.png")
    assert (tmp_path / "drift_by_age.png").read_bytes().startswith(b"\x89PNG")
    (axis,) = drawn[0].axes
    if points is None:
        assert "not measured" in axis.texts[0].get_text() and not axis.get_lines()
        return
    by_age, forced, free = axis.get_lines()  # bptt has no teacher to compare with
    assert by_age.get_xydata().tolist() == [pytest.approx(point) for point in points]
    assert set(forced.get_ydata()) == {1.0} and set(free.get_ydata()) == {1.4}


def test_the_table_of_the_card():
    results = json.loads((CARDS[0] / "eval_results.json").read_text())
    without = student_card(make_student(), results).content
    card = student_card(make_student(), {**results, "drift": DRIFT}).content
    assert "### Drift" not in without and "### Drift" in card
    assert "| phase | forced | free | 1 | 2 | 16 | exponent |\n|---|---|---|---|---|---|---|\n" in card
    assert "| smt | 1.000 | 1.400 | +0.050 | +0.100 | +0.400 | -0.100 |\n| bptt |  |  |  |  |  | +0.020 |\n" in card
    head, tail = without.split("\n## Limits")
    assert card.startswith(head.rstrip()) and card.endswith("\n\n## Limits" + tail)

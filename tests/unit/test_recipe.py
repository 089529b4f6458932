"""How the program of a recipe ends."""

import signal

import pytest

from smt_hf import recipe
from smt_hf.errors import InputError
from smt_hf.recipe import run_to_end
from smt_hf.training.stopping import Interrupted


def raised(error):
    def main():
        raise error

    return main


def test_bad_input_is_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        run_to_end(raised(InputError("no file:\n- a.txt\n- b.txt")))
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: no file: - a.txt - b.txt\n")


def test_other_processes_wait_for_the_first_to_say_it(capsys, monkeypatch):
    """Under a launcher they are ended while they wait; one that is alone in its error says so in the end."""
    slept = []
    monkeypatch.setattr(recipe.time, "sleep", slept.append)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit):
        run_to_end(raised(InputError("no file")))
    assert capsys.readouterr().err == "error: process 3: no file\n" and slept == [recipe._HEAD_START]


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ValueError, match="torch says no"):
        run_to_end(raised(ValueError("torch says no")))


def test_a_signal_is_a_status(capsys):
    with pytest.raises(SystemExit) as caught:
        run_to_end(raised(Interrupted(signal.SIGTERM, "x/checkpoint-3")))
    assert caught.value.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after saving x/checkpoint-3" in capsys.readouterr().out


def test_nothing_wrong():
    run_to_end(lambda: None)

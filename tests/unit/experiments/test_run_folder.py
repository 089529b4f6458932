"""Who may write in the folder of a run, and what a resumed run must have in common with the first."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from smt_hf.errors import InputError
from smt_hf.experiments.run_folder import LOCK, RUN, check_output_dir, locked, same_run, writing

HOLDER = """
import sys, time
from pathlib import Path
from smt_hf.experiments.run_folder import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def a_run(folder, overwrite=False, resume=None):
    return SimpleNamespace(output_dir=str(folder), overwrite_output_dir=overwrite, resume_from_checkpoint=resume)


def test_a_lock_keeps_others_out_and_dies_with_its_process(tmp_path):
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        for act in (lambda: check_output_dir(a_run(folder)), lambda: locked(folder).__enter__()):
            with pytest.raises(InputError, match=rf"run is in use by PID {holder.pid} since \d{{4}}-"):
                act()
        with pytest.raises(InputError, match="in use"), writing(a_run(folder, overwrite=True), {}):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    check_output_dir(a_run(folder))  # what a killed run has left of its lock is nothing
    with locked(folder):
        assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
    assert list(folder.iterdir()) == []


def test_a_child_does_not_keep_the_lock(tmp_path):
    """A worker that reads data may outlive the process that started it."""
    with locked(tmp_path):
        child = os.fork()
        if not child:
            signal.pause()
    try:
        with locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_lock_on_one_file(tmp_path):
    lines = ".lines.jsonl.lock"
    with locked(tmp_path, lines), locked(tmp_path, ".others.jsonl.lock"), pytest.raises(InputError) as caught:
        locked(tmp_path, lines).__enter__()
    assert "lines.jsonl is in use" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_bad_input_leaves_no_folder_behind(tmp_path):
    folder = tmp_path / "runs" / "new"
    with pytest.raises(InputError), writing(a_run(folder), {"seed": 0}):
        (folder / "smt").mkdir()
        raise InputError("found late")
    assert not folder.exists()
    check_output_dir(a_run(folder))  # the mended command does not meet "not empty"
    with pytest.raises(InputError), writing(a_run(folder), {"seed": 0}):
        (folder / "smt" / "checkpoint-3").mkdir(parents=True)
        raise InputError("found after training")
    assert (folder / "smt" / "checkpoint-3").exists()
    with pytest.raises(InputError), writing(a_run(folder, resume="True"), {"seed": 0}):
        raise InputError("of another kind")
    assert (folder / RUN).exists()


def test_overwriting_spares_what_is_not_ours(tmp_path):
    for name in ("notes.txt", "run.json", "curves.png"):
        (tmp_path / name).write_text("old")
    for name in ("smt", "dmt_2", "student", "smtp"):
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match="is not empty"):
        check_output_dir(a_run(tmp_path))
    check_output_dir(a_run(tmp_path, overwrite=True))
    with writing(a_run(tmp_path, overwrite=True), {"seed": 1}):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "smtp", "run.json"}
    assert json.loads((tmp_path / RUN).read_text()) == {"seed": 1}


def test_folders_that_are_refused(tmp_path):
    for overwrite, message in ((True, "not both"), (False, "no run to resume")):
        with pytest.raises(InputError, match=message):
            check_output_dir(a_run(tmp_path / "new", overwrite, resume="True"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        check_output_dir(a_run(tmp_path / "file" / "run"))


def test_a_resumed_run_is_the_same(tmp_path):
    settings = {"phases": [{"phase": "smt", "adam_beta1": 0.8}], "tokenizer_hash": "a", "world_size": 1}
    path = tmp_path / RUN
    with pytest.raises(InputError, match=r"run\.json is missing"):
        same_run(path, settings)
    path.write_text(json.dumps(settings))
    assert same_run(path, {**settings, "compare_bptt": {"max_steps": 3}})["compare_bptt"] == {"max_steps": 3}
    other = {"phases": [{"phase": "smt"}], "tokenizer_hash": "b", "world_size": 2}
    with pytest.raises(InputError) as caught:
        same_run(path, other)
    for difference in (
        "phases.0.adam_beta1: 0.8 then, default now",
        "tokenizer_hash: a then, b now",
        "world_size: 1 then, 2 now",
    ):
        assert difference in str(caught.value)
    path.write_text(json.dumps({**settings, "compare_bptt": {"max_steps": 3}}))
    assert same_run(path, settings)["compare_bptt"] == {"max_steps": 3}
    with pytest.raises(InputError, match=r"compare_bptt\.max_steps: 3 then, 4 now"):
        same_run(path, {**settings, "compare_bptt": {"max_steps": 4}})


def test_a_resumed_run_may_leave_more_steps_out(tmp_path):
    path = tmp_path / RUN
    for earlier in ({"phase": "bptt", "max_skipped_steps": 0}, {"phase": "bptt"}):
        path.write_text(json.dumps({"phases": [earlier]}))
        now = {"phases": [{"phase": "bptt", "max_skipped_steps": 20}]}
        assert same_run(path, now) == now
        with pytest.raises(InputError, match="phase: bptt then, dmt now"):
            same_run(path, {"phases": [{"phase": "dmt", "max_skipped_steps": 20}]})


def test_a_damaged_note_of_the_run_is_named(tmp_path):
    (tmp_path / "run.json").write_text('{"seed": 0, "pha')
    with pytest.raises(InputError, match=r"run\.json is damaged"):
        same_run(tmp_path / "run.json", {"seed": 0})

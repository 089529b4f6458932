"""`recipes/evaluate.py` on tiny checkpoints: lines, resuming, reports, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from smt_hf.data import byte_tokenizer
from smt_hf.errors import InputError
from smt_hf.evaluation.long_context import LongContextSettings
from smt_hf.evaluation.long_context.sizing import TooShort
from smt_hf.experiments import long_context
from smt_hf.experiments.long_context import evaluate, parse_evaluate
from smt_hf.publishing.evidence import read_lines
from smt_hf.publishing.long_context_report import render_long_context
from tests.language_models import HandTask, make_llama, make_mamba, make_ours

ROOT = Path(__file__).parents[2]


class FittingTask(HandTask):
    """Says that a length is too short as the suites do."""

    def sample(self, length, index, seed, count):
        if length < 40:
            raise TooShort(super().sample(40, index, seed, count), 40)
        return super().sample(length, index, seed, count)


@pytest.fixture(autouse=True)
def suites(monkeypatch):
    """A suite of tasks made by hand beside the real ones."""
    tasks = {name: FittingTask(name) for name in ("hand", "other")}
    real = long_context.tasks_of

    def tasks_of(suite, names, settings):
        return [tasks[name] for name in names or tasks] if suite == "hand" else real(suite, names, settings)

    monkeypatch.setattr(long_context, "tasks_of", tasks_of)
    monkeypatch.setattr(long_context, "SUITES", {**long_context.SUITES, "hand": tasks})


@pytest.fixture(scope="module", params=[make_ours, make_llama, make_mamba], ids=["ours", "llama", "mamba"])
def any_checkpoint(request, tmp_path_factory):
    return saved(request.param(), tmp_path_factory.mktemp("any"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return saved(make_ours(), tmp_path_factory.mktemp("ours") / "student")


def saved(model, folder):
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def run(checkpoint, output, *words):
    """The lines that a command adds."""
    given = ["--checkpoint", str(checkpoint), "--suite", "hand", "--lengths", "48,96", "--num_samples", "4"]
    given += ["--output", str(output), "--device", "cpu", "--window", "30", "--chunk_size", "16", *words]
    return list(evaluate(*parse_evaluate(given)))


def test_lines_hold_what_a_report_needs(any_checkpoint, tmp_path):
    lines = run(any_checkpoint, tmp_path / "new" / "out.jsonl", "--trained_on", "nothing", "--name", "tiny")
    assert lines == read_lines(tmp_path / "new" / "out.jsonl")
    assert [(line["task"], line["length"]) for line in lines] == [
        ("hand", 48),
        ("other", 48),
        ("hand", 96),
        ("other", 96),
    ]
    line = lines[0]
    assert (line["suite"], line["metric"], line["n"], line["num_samples"], line["seed"]) == (
        *("hand", "string_match_all"),
        *(4, 4, 0),
    )
    assert line["length_unit"] == "bytes" and line["chance"] == 0.001 and len(line["interval"]) == 2
    assert set(line["controls"]) == {"needle_removed", "last_window", "last_mentioned"}
    assert set(line["graded"]) == {"tokens_right", "nats_per_token"} and len(line["by_depth"]) == 10
    assert line["name"] == "tiny" and line["trained_on"] == "nothing" and line["checkpoint"] == str(any_checkpoint)
    assert line["seconds"] > 0 and line["tokens_per_second"] > 0 and line["peak_memory_bytes"] > 10**7
    assert line["state_bytes"] > 0
    assert line["num_parameters"] > 0 and "versions" in line and "commit" in line and "chunks of" not in line["name"]
    first_chunk = "a first chunk of 16 tokens, then" if line["model_type"] == "mamba" else "chunks of 16 tokens;"
    assert line["reading"].startswith(first_chunk)
    path, *figures = render_long_context(lines, "out", tmp_path)
    assert "hand" in path.read_text() and len(figures) == 3  # score, depth, distance


def test_what_is_done_is_not_done_again(checkpoint, tmp_path):
    output = tmp_path / "out.jsonl"
    first = run(checkpoint, output, "--tasks", "hand")
    assert [line["task"] for line in first] == ["hand", "hand"] and first[0]["name"] == checkpoint.parent.name
    assert run(checkpoint, output, "--tasks", "hand", "--batch_size", "2", "--chunk_size", "8") == []
    assert [line["task"] for line in run(checkpoint, output, "--tasks", "hand,other")] == ["other", "other"]
    for words in (
        ["--seed", "1"],
        ["--num_samples", "3"],
        ["--controls", "false"],
        ["--control_samples", "2"],
        ["--window", "20"],
        ["--dtype", "bfloat16"],
        ["--lengths", "60"],
    ):
        before = output.read_text()
        lines = run(checkpoint, output, "--tasks", "hand", *words)
        assert len(lines) == (1 if words[0] == "--lengths" else 2)
        assert output.read_text().startswith(before)
        assert run(checkpoint, output, "--tasks", "hand", *words) == []


def test_controls_of_fewer_samples(checkpoint, tmp_path):
    (line, *_) = run(checkpoint, tmp_path / "out.jsonl", "--tasks", "hand", "--control_samples", "2")
    assert line["n"] > 2 and {line["controls"][name]["n"] for name in ("needle_removed", "last_mentioned")} == {2}
    none = ["--tasks", "hand", "--controls", "false"]
    assert run(checkpoint, tmp_path / "none.jsonl", *none, "--control_samples", "2")[0]["settings"]["controls"] is False
    assert run(checkpoint, tmp_path / "none.jsonl", *none) == []  # the number says nothing without controls


def test_other_weights_in_the_same_folder_are_examined_again(tmp_path):
    folder, output = tmp_path / "student", tmp_path / "out.jsonl"
    saved(make_ours(), folder)
    assert len(run(folder, output)) == 4 and run(folder, output) == []
    saved(make_ours(updater_type="mlp"), folder)
    assert len(run(folder, output)) == 4


def test_results_do_not_depend_on_batches_and_chunks(any_checkpoint, tmp_path):
    names = ("value", "interval", "graded", "controls", "by_depth", "by_distance", "examples")
    first, second = (
        [
            {name: line[name] for name in names}
            for line in run(any_checkpoint, tmp_path / f"{size}.jsonl", "--batch_size", size, "--chunk_size", chunk)
        ]
        for size, chunk in (("1", "64"), ("3", "7"))
    )
    assert rounded(first) == rounded(second)


def rounded(value):
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return pytest.approx(value, abs=2e-3) if isinstance(value, float) else value


def test_a_killed_run_loses_the_running_cell_alone(checkpoint, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    examine, calls = long_context.Examiner.examine, []

    def killed(self, samples, num_controlled):
        calls.append(samples)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return examine(self, samples, num_controlled)

    monkeypatch.setattr(long_context.Examiner, "examine", killed)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, output)
    assert len(read_lines(output)) == 2
    lines = run(checkpoint, output)
    assert [(line["task"], line["length"]) for line in lines] == [("hand", 96), ("other", 96)]
    assert len(read_lines(output)) == 4
    assert not list(tmp_path.glob(".*lock"))


def test_a_length_that_is_too_short_is_left_out(checkpoint, tmp_path, capsys):
    lines = run(checkpoint, tmp_path / "out.jsonl", "--lengths", "20", "48")
    assert [line["length"] for line in lines] == [48, 48]
    assert "left out: `hand` does not fit in a length of 40: the smallest" in capsys.readouterr().out
    with pytest.raises(InputError, match="the smallest"):
        run(checkpoint, tmp_path / "out.jsonl", "--lengths", "20")


def test_samples_are_kept(checkpoint, tmp_path, monkeypatch):
    """And come out of the folder as they went in."""
    cache = ["--sample_cache", str(tmp_path / "samples"), "--tasks", "hand"]
    first = run(checkpoint, tmp_path / "a.jsonl", *cache)
    monkeypatch.setattr(FittingTask, "sample", None)
    second = run(checkpoint, tmp_path / "b.jsonl", *cache)
    assert [line["graded"] for line in first] == [line["graded"] for line in second]


def test_text_by_position(any_checkpoint, tmp_path, text_file):
    words = ["--checkpoint", str(any_checkpoint), "--suite", "text", "--files", str(text_file), "--lengths", "64,200"]
    words += ["--num_samples", "3", "--device", "cpu", "--output", str(tmp_path / "out.jsonl")]
    lines = list(evaluate(*parse_evaluate(words)))
    assert [(line["task"], line["length"], line["n"]) for line in lines] == [("text.txt", 64, 3), ("text.txt", 200, 3)]
    assert lines[1]["metric"] == "bits_per_byte" and 6 < lines[1]["value"] < 20
    assert [entry["position"] for entry in lines[1]["by_position"]] == [1, 2, 4, 8, 16, 32, 64, 128, 200]
    assert list(evaluate(*parse_evaluate(words))) == []
    text_file.write_text(text_file.read_text()[5:])
    assert len(list(evaluate(*parse_evaluate(words)))) == 2


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--suite", "rulr"], "unknown suite 'rulr': did you mean 'ruler'"),
        (["--suite", "ruler", "--tasks", "niah_singel_1"], "unknown task 'niah_singel_1'"),
        (["--checkpoint", "nowhere"], "could be loaded from 'nowhere'"),
        (["--lengths", "1k"], "`lengths` must be a whole number"),
        (["--lengths", "1"], "2 or more"),
        (["--num_samples", "0"], "`num_samples` must be 1 or more"),
        (["--suite", "text"], "name held-out text by `--files`"),
        (["--suite", "text", "--files", "nowhere.txt"], "no file found"),
        (["--files", "x.txt"], "`files` goes with `--suite text`"),
        (["--split", "tests"], "`split` must be one of"),
        (["--lenghts", "48"], "unknown argument 'lenghts': did you mean 'lengths'"),
    ],
)
def test_what_is_wrong_is_told(checkpoint, tmp_path, words, reason):
    with pytest.raises(InputError, match=reason):
        run(checkpoint, tmp_path / "out.jsonl", *words)
    assert not (tmp_path / "out.jsonl").exists()


def test_what_is_missing_is_told(checkpoint):
    with pytest.raises(InputError, match="--output"):
        parse_evaluate(["--checkpoint", str(checkpoint), "--suite", "hand"])
    with pytest.raises(InputError, match="name a checkpoint and a suite"):
        parse_evaluate(["--output", "x.jsonl"])
    assert parse_evaluate(["--output", "x.jsonl", "--report"])[0].report


def test_all_is_checked_before_the_first_cell(tmp_path):
    folder = saved(make_llama(max_position_embeddings=80), tmp_path / "llama")
    with pytest.raises(InputError, match="80 positions"):
        run(folder, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    assert len(run(folder, tmp_path / "out.jsonl", "--lengths", "48")) == 2


def test_settings_of_the_suites_are_flags(capsys):
    arguments, settings = parse_evaluate(
        ["--suite", "ruler", "--checkpoint", "x", "--output", "y", "--haystack", "a", "b", "--lengths", "96", "48,200"]
    )
    assert settings == LongContextSettings(haystack=["a", "b"])
    assert arguments.all_lengths() == [48, 96, 200] and arguments.asked == 400
    with pytest.raises(SystemExit):
        parse_evaluate(["--help"])
    shown = capsys.readouterr().out
    assert "--haystack" in shown and "--chunk_size (default: 512)" in shown


@pytest.mark.processes
def test_the_program(checkpoint, text_file, tmp_path):
    words = ["--checkpoint", checkpoint, "--suite", "text", "--files", text_file, "--lengths", "64", "--device", "cpu"]
    output = ["--output", tmp_path / "out.jsonl"]

    def started(*more):
        command = [sys.executable, ROOT / "recipes" / "evaluate.py", *more]
        return subprocess.run([str(word) for word in command], capture_output=True, text=True, env={**os.environ})

    done = started(*words, *output)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.jsonl").read_text())["suite"] == "text"
    report = started("--report", *output)
    assert report.returncode == 0 and report.stdout.splitlines()[0] == str(tmp_path / "out.md")
    wrong = started("--suite", "text", *output)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: name a checkpoint")

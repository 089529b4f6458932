"""Flags and YAML into dataclasses."""

import pytest

from smt_hf.command_line import help_text, parse_run


def write(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    return str(path)


def test_defaults():
    parsed = parse_run([])
    assert [phase.phase for phase in parsed.phases] == parsed.run.phases.split(",")
    assert parsed.student == {} and parsed.teacher == {} and parsed.run.output_dir == "runs/pretrain"


def test_flags_for_all_phases_and_for_one():
    words = (
        "--phases smt,dmt,bptt --save_steps 15 --smt_max_steps 7 --dmt_learning_rate 2e-4 --bptt_transition_steps 32"
    )
    smt, dmt, bptt = parse_run(words.split()).phases
    assert (smt.save_steps, dmt.save_steps, bptt.save_steps) == (15, 15, 15)
    assert smt.max_steps == 7 != dmt.max_steps
    assert dmt.learning_rate == 2e-4 != smt.learning_rate
    assert bptt.transition_steps == 32


def test_flags_of_an_absent_phase_are_accepted():
    (smt,) = parse_run(["--phases", "smt", "--bptt_max_steps", "3", "--dmt_max_steps", "4"]).phases
    assert smt.phase == "smt"
    words = ["--phases", "smt", "--bptt_learning_rate", "1e-2"]
    assert parse_run(words).rival is None
    assert parse_run([*words, "--compare_bptt"]).rival.learning_rate == 1e-2
    (smt,) = parse_run(["--phases", "smt", "--context_length", "24"]).phases  # 16, of bptt, does not divide it
    assert smt.context_length == 24


def test_configurations():
    parsed = parse_run(
        ["--updater_type", "gru", "--hidden_size=32", "--teacher_hidden_size", "8", "--tie_word_embeddings"]
    )
    assert parsed.student == {"updater_type": "gru", "hidden_size": 32, "tie_word_embeddings": True}
    assert parsed.teacher == {"hidden_size": 8}


def test_yaml_and_precedence(tmp_path):
    path = write(
        tmp_path,
        "phases:\n  - smt: {max_steps: 11, learning_rate: 1.0e-3}\n  - bptt\nmax_steps: 9\nlogging_steps: 3\n"
        "seed: 5\nhidden_size: 32\nlr_scheduler_kwargs: {min_lr_rate: 0.5}\n",
    )
    parsed = parse_run(["--config", path])
    smt, bptt = parsed.phases
    assert (smt.max_steps, bptt.max_steps, smt.logging_steps) == (11, 9, 3)
    assert smt.seed == bptt.seed == 5 and parsed.student == {"hidden_size": 32}
    assert smt.lr_scheduler_kwargs == {"min_lr_rate": 0.5}
    smt, bptt = parse_run(["--config", path, "--max_steps", "4", "--hidden_size", "64"]).phases
    assert smt.max_steps == bptt.max_steps == 4  # flags beat YAML
    (dmt,) = parse_run(["--config", path, "--phases", "dmt"]).phases
    assert dmt.phase == "dmt" and dmt.max_steps == 9


def test_booleans_and_bare_flags():
    parsed = parse_run(["--compare_bptt", "--resume_from_checkpoint", "--continue_previous_phase", "false"])
    assert parsed.run.compare_bptt is True and parsed.run.resume_from_checkpoint == "True"
    assert not parsed.phases[-1].continue_previous_phase


@pytest.mark.parametrize(
    "words, message",
    [
        ("--lerning_rate 1", "did you mean 'learning_rate'"),
        ("--smt_max_stepz 1", "did you mean 'smt_max_steps'"),
        ("--hiden_size 1", "did you mean 'hidden_size'"),
        ("--phases smt,ppo", "unknown phase 'ppo'"),
        ("--max_steps many", "max_steps"),
        ("--hidden_size big", "hidden_size"),
        ("--transition_steps 7 --phases smt", "transition_steps"),
        ("stray", "unexpected argument"),
        ("--config missing.yaml", "cannot read"),
    ],
)
def test_refusals(words, message):
    with pytest.raises(ValueError, match=message):
        parse_run(words.split())


@pytest.mark.parametrize(
    "content, message",
    [
        ("a: [1", "not valid YAML"),
        ("- a\n- b\n", "name: value"),
        ("phases: [smt: {max_stepz: 3}]\n", "did you mean 'max_steps'"),
        ("phases: 3\n", "must be a list"),
        ("phases: [{smt: {}, dmt: {}}]\n", "one-key mapping"),
        ("outputdir: x\n", "did you mean 'output_dir'"),
    ],
)
def test_yaml_refusals(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        parse_run(["--config", write(tmp_path, content)])


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_run(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.strip() == help_text().strip()
    for name in ("--phases", "--updater_type", "--teacher_sliding_window", "--transition_steps", "--on_policy_mode"):
        assert name in text

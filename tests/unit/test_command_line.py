"""Flags and YAML into dataclasses."""

from dataclasses import dataclass

import pytest

from smt_hf import command_line
from smt_hf.command_line import argument, parse
from smt_hf.errors import InputError
from smt_hf.experiments.grid_file import parse_grid
from smt_hf.experiments.run_arguments import help_text, parse_run


@dataclass
class Arguments:
    config: str | None = argument(None, "YAML file.")
    output_dir: str = argument("here", "Folder.")
    files: list[str] | None = argument(None, "Several words.")
    prompt: str | None = argument(None, "Any text.", is_text=True)
    count: int | None = argument(3, "A number.")
    bold: bool = argument(True, "A switch.")
    more: dict | str | None = argument(None, "Pairs.")


def write(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    return str(path)


@pytest.mark.parametrize(
    "words, name, value",
    [
        (["--count", "-4"], "count", -4),
        (["--count=4"], "count", 4),
        (["--bold", "false"], "bold", False),
        (["--bold"], "bold", True),
        (["--files", "a.txt", "b.txt"], "files", ["a.txt", "b.txt"]),
        (["--files", "a.txt"], "files", ["a.txt"]),
        (["--prompt", "--count"], "prompt", "--count"),
        (["--prompt", ""], "prompt", ""),
        (["--prompt=a $NOWHERE ~"], "prompt", "a $NOWHERE ~"),
        (["--output_dir", "~/runs"], "output_dir", "/home/me/runs"),
        (["--output-dir", "${PLACE}/x"], "output_dir", "/data/x"),
        (["--files", "~/a", "$PLACE/b"], "files", ["/home/me/a", "/data/b"]),
    ],
)
def test_one_flag(words, name, value, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("PLACE", "/data")
    assert getattr(parse(Arguments, words, "usage"), name) == value


@pytest.mark.parametrize(
    "words, message",
    [
        ("--cuont 3", "unknown argument 'cuont': did you mean 'count'"),
        ("--count many", "`--count`: invalid int value: 'many'"),
        ("--count", "`--count` needs a value"),
        ("--output_dir a b c d", r"takes one value, got 4 \(a, b, c, ...\)"),
        ("--output_dir $NOWHERE/x", "the environment variable NOWHERE is not set"),
        ("--output_dir=", "`output_dir` is empty"),
        ("--prompt a b", "unexpected argument 'b'"),
        ("--bold perhaps", "bold"),
        ("stray", "unexpected argument 'stray'"),
    ],
)
def test_one_flag_is_refused(words, message):
    with pytest.raises(InputError, match=message):
        parse(Arguments, words.split(), "usage")


def test_yaml_below_flags(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    path = write(tmp_path, "count: null\noutput_dir: ~/runs\nmore: {a: 1}\nbold: no\nfiles: [no, 2]\n")
    arguments = parse(Arguments, ["--config", path], "usage")
    assert arguments.count is None and arguments.output_dir == "/home/me/runs" and not arguments.bold
    assert arguments.more == '{"a": 1}' and arguments.files == ["no", "2"]  # YAML 1.2: `no` is a word
    assert parse(Arguments, ["--config", path, "--count", "5"], "usage").count == 5


@pytest.mark.parametrize(
    "content, message",
    [
        ("count: 1\nbold: true\ncount: 2\n", r"`count` is given twice \(lines 1 and 3\)"),
        ("more:\n  a: 1\n  a: 2\n", "`a` is given twice"),
        ("output_dir: null\n", "`output_dir` needs a value, got null"),
        ("output_dir: ''\n", "`output_dir` is empty"),
        ("output_dir: {a: 1}\n", "takes one value"),
    ],
)
def test_yaml_is_refused(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        parse(Arguments, ["--config", write(tmp_path, content)], "usage")


def test_a_renamed_flag_works_with_a_warning(monkeypatch):
    monkeypatch.setattr(command_line, "RENAMED", {"number": "count"})
    with pytest.warns(FutureWarning, match="`number` is called `count` now"):
        assert parse(Arguments, ["--number", "7"], "usage").count == 7
    with pytest.raises(InputError, match="both are given"):
        parse(Arguments, ["--number", "7", "--count", "7"], "usage")


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


def test_the_other_kind_of_teacher():
    words = "--teacher_model_type smt_windowed_teacher --teacher_context_length 16 --teacher_hidden_size 8"
    assert parse_run(words.split()).teacher == {
        "model_type": "smt_windowed_teacher",
        "context_length": 16,
        "hidden_size": 8,
    }


def test_the_published_teacher_has_no_loss_of_its_own():
    """The README's flags work as they stand, and say what follows from them."""
    words = ["--teacher_model_type", "smt_windowed_teacher", "--smt_num_supervised_transitions", "1"]
    parsed = parse_run(words)
    assert parsed.phases[0].teacher_weight == 0.0
    assert parsed.notes == ["smt: teacher_weight 1.0 -> 0.0 (smt_windowed_teacher has no next-token head)"]
    assert parse_run([*words, "--teacher_weight", "0"]).notes == []


@pytest.mark.parametrize(
    "words, noted",
    [
        ("--phases bptt --predictive_weight 1", "`predictive_weight` does nothing here: no phase of bptt has it"),
        ("--phases bptt --teacher_hidden_size 8", "`teacher_hidden_size` does nothing here"),
        ("--lora_r 4", "`lora_r` does nothing here: it needs `use_peft`"),
        ("--phases smt --bptt_max_steps 5", "`bptt_max_steps` does nothing here: the run has no phase bptt"),
        ("--phases smt --compare_bptt --carries_memory true", None),
    ],
)
def test_what_does_nothing_is_said(words, noted):
    notes = parse_run(words.split()).notes
    assert notes == [] if noted is None else noted in notes[0]


def test_when_a_phase_is_evaluated():
    """Ten times, unless the user says otherwise."""

    def evaluation(words):
        smt = parse_run(["--phases", "smt", "--max_steps", "50", *words.split()]).phases[0]
        return smt.eval_strategy.value, smt.eval_steps, smt.evaluates_by_seconds

    assert evaluation("") == ("steps", 5, True)
    assert evaluation("--eval_steps 7") == ("steps", 7, True)
    assert evaluation("--eval_strategy no")[0] == "no" and not evaluation("--eval_strategy no --max_seconds 3")[2]
    assert evaluation("--eval_strategy steps --eval_steps 9")[:2] == ("steps", 9)
    assert evaluation("--max_seconds 3")[2]
    assert parse_run(["--compare_bptt"]).rival.eval_strategy.value == "no"


def test_null_is_none(tmp_path):
    (smt,) = parse_run(["--phases", "smt", "--config", write(tmp_path, "save_total_limit: null\n")]).phases
    assert smt.save_total_limit is None


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
    assert parsed.run.compare_bptt is True and parsed.run.resume is True
    assert parse_run(["--resume_from_checkpoint", "x/checkpoint-3"]).run.resume == "x/checkpoint-3"
    assert parse_run([]).run.resume is False is parse_run(["--resume_from_checkpoint", "False"]).run.resume
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
        ("--transition_steps 7 --phases bptt", "transition_steps"),
        ("--transition_steps 0 --phases smt", "transition_steps"),
        ("--teacher_kontext_length 7", "did you mean 'teacher_context_length'"),
        ("stray", "unexpected argument"),
        ("--config missing.yaml", "cannot read"),
        ("--dmt_predictive_weight 1", "the dmt phase has no `predictive_weight`, only smt"),
        ("--teacher_model_type windowed", "unknown teacher `model_type` 'windowed'"),
        ("--teacher_model_type smt_windowed_teacher --teacher_weight 0.5", "has no next-token head"),
        ("--optim sgdd", "optim"),
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
    first = "\n".join(text.splitlines()[:15])
    for name in ("--train_file", "--output_dir", "--phases", "--max_steps", "--hidden_size", "--compare_bptt"):
        assert name in first
    for name in ("--predictive_weight", "--aggregate_capacity", "--carries_memory", "--teacher_context_length"):
        assert text.count(name + " ") == 1  # what is a phase's own is said once
    for name in ("--phases", "--updater_type", "--teacher_sliding_window", "--transition_steps", "--on_policy_mode"):
        assert name in text


GRID = """
jobs: 3
num_threads: 2
seeds: [0, 1]
num_heldout: 512
student: {hidden_size: 32, num_attention_heads: 2}
teacher: {hidden_size: 24, sliding_window: 9}
tasks:
  retrieval:
    difficulties: [8, 16]
    seconds: {8: 20, 16: 60}
    curriculum: [2, 4]
    arms:
      smt: {smt: {learning_rate: 3.0e-3}, dmt: {on_policy_fraction: 1.0}}
  parity:
    difficulties: [10]
    seconds: 30
  text:
arms:
  smt:
    phases:
      - smt: {share: 0.75, learning_rate: 1.0e-3, context_length: 24, readout_trains_updater: false}
      - dmt
  bptt:
    group: search
    phases: [{bptt: {carries_memory: false, weight_decay: 0.5}}]
    sweep: {bptt: {learning_rate: [1.0e-3, 2.0e-3], transition_steps: [8, 16]}}
    only: {retrieval: [8]}
  published:
    student: {hidden_size: 64}
    teacher: {model_type: smt_windowed_teacher, context_length: 16, hidden_size: 48}
    phases: [{smt: {num_supervised_transitions: 1, teacher_weight: 0}}]
    only: {retrieval: [16], parity: [10]}
  ablation:
    group: ablation
    phases: [{smt: {max_steps: 40, readout_weight: 2}}]
    variants:
      full:
      unread: {smt: {readout_weight: 0}}
      small: {student: {hidden_size: 16}, teacher: {sliding_window: 3}}
    only: {parity: [10]}
"""


def grid(tmp_path, *words, content=GRID):
    return parse_grid(["--config", write(tmp_path, content), *words])


def test_grid(tmp_path):
    """Every task at every difficulty by every arm and variant under every seed."""
    parsed = grid(tmp_path)
    assert (str(parsed.output), parsed.jobs, parsed.report) == ("runs/run.jsonl", 3, False)
    names = ["learning_rate=0.001, transition_steps=8", "learning_rate=0.001, transition_steps=16",
             "learning_rate=0.002, transition_steps=8", "learning_rate=0.002, transition_steps=16"]  # fmt: skip
    cells = {
        *[("retrieval", difficulty, "smt", None, None) for difficulty in (8, 16)],
        *[("retrieval", 8, "bptt", "search", name) for name in names],
        ("retrieval", 16, "published", None, None),
        ("parity", 10, "smt", None, None),
        ("parity", 10, "published", None, None),
        *[("parity", 10, "ablation", "ablation", name) for name in ("full", "unread", "small")],
        ("text", None, "smt", None, None),
    }
    keys = [run.key() for run in parsed.runs]
    assert len(keys) == len(set(keys))
    assert set(keys) == {
        (*cell[:3], seed, *cell[3:])
        for cell in cells
        for seed in ((0,) if cell[2] == "bptt" else (0, 1))  # settings are chosen under one seed
    }
    assert len(grid(tmp_path, "--only", "arm=bptt", "seed=1").runs) == len(names)
    assert all((run.num_threads, run.num_heldout, run.sources) == (2, 512, {}) for run in parsed.runs)
    assert {run.curriculum for run in parsed.runs if run.task == "retrieval"} == {(2, 4)}
    assert {run.curriculum for run in parsed.runs if run.task != "retrieval"} == {()}
    others = grid(tmp_path, "--output", "o.jsonl", "--jobs", "5", "--report", "--mnist_dir", "m", "--train_file", "t")
    assert (str(others.output), others.jobs, others.report) == ("o.jsonl", 5, True)
    assert others.runs[0].sources == {"mnist_dir": "m", "train_file": "t"}


def of(tmp_path, task, arm, *more, content=GRID):
    """The only run of a task, arm and seed 0, and what else is named."""
    (run,) = grid(tmp_path, "--only", f"task={task}", f"arm={arm}", "seed=0", *more, content=content).runs
    return run


def test_grid_phases(tmp_path):
    """Seconds by share, what a task says for an arm, values of the right type."""
    (smt, of_smt), (dmt, of_dmt) = of(tmp_path, "retrieval", "smt", "difficulty=16").phases
    assert (smt, dmt) == ("smt", "dmt")
    assert of_smt == {
        "learning_rate": 3e-3,  # the task beats the arm
        "context_length": 24,
        "readout_trains_updater": False,
        "max_seconds": 45.0,
    }
    assert type(of_smt["context_length"]) is int and type(of_smt["learning_rate"]) is float
    assert of_dmt == {"on_policy_fraction": 1.0, "max_seconds": 15.0}
    (_, of_smt), (_, of_dmt) = of(tmp_path, "parity", "smt").phases
    assert of_smt["learning_rate"] == 1e-3 and (of_smt["max_seconds"], of_dmt["max_seconds"]) == (22.5, 7.5)
    (_, of_smt), (_, of_dmt) = of(tmp_path, "text", "smt").phases
    assert "max_seconds" not in of_smt and of_dmt == {}  # no seconds: the phases' own number of steps
    thirds = GRID.replace("- dmt", "- dmt\n      - bptt")
    shares = [settings["max_seconds"] for _, settings in of(tmp_path, "parity", "smt", content=thirds).phases]
    assert shares == [22.5, 3.75, 3.75]  # what is left, evenly
    fixed = GRID.replace("share: 0.75", "max_steps: 40")
    (_, of_smt), (_, of_dmt) = of(tmp_path, "parity", "smt", content=fixed).phases
    assert of_smt["max_steps"] == 40 and "max_seconds" not in of_smt


def test_grid_sweep_and_variants(tmp_path):
    variant = "variant=learning_rate=0.002, transition_steps=8"
    ((name, settings),) = of(tmp_path, "retrieval", "bptt", "difficulty=8", variant).phases
    assert (name, settings) == ("bptt", {
        "carries_memory": False,
        "weight_decay": 0.5,
        "learning_rate": 2e-3,
        "transition_steps": 8,
        "max_seconds": 20.0,
    })  # fmt: skip
    full, unread, small = (
        of(tmp_path, "parity", "ablation", f"variant={name}") for name in ("full", "unread", "small")
    )
    assert full.phases == small.phases == (("smt", {"max_steps": 40, "readout_weight": 2.0}),)
    assert unread.phases == (("smt", {"max_steps": 40, "readout_weight": 0.0}),)
    assert full.student == unread.student == {"hidden_size": 32, "num_attention_heads": 2}
    assert small.student == {"hidden_size": 16, "num_attention_heads": 2}
    assert full.teacher == {"hidden_size": 24, "sliding_window": 9}
    assert small.teacher == {"hidden_size": 24, "sliding_window": 3}


def test_grid_teachers(tmp_path):
    """The windowed one has fields of its own; the grid's are those of the other kind."""
    run = of(tmp_path, "parity", "published")
    assert run.teacher == {"model_type": "smt_windowed_teacher", "context_length": 16, "hidden_size": 48}
    assert run.student == {"hidden_size": 64, "num_attention_heads": 2}
    windowed = GRID.replace(
        "{hidden_size: 24, sliding", "{model_type: smt_windowed_teacher, num_hidden_layers: 3, sliding"
    )
    windowed = windowed.replace("sliding_window: 9", "hidden_act: silu").replace(
        "sliding_window: 3", "context_length: 3"
    )
    run = of(tmp_path, "parity", "published", content=windowed)
    assert run.teacher == {
        "model_type": "smt_windowed_teacher",
        "num_hidden_layers": 3,
        "hidden_act": "silu",
        "context_length": 16,
        "hidden_size": 48,
    }
    named = GRID.replace("teacher: {sliding_window: 3}", "teacher: {model_type: smt_teacher, sliding_window: 3}")
    run = of(tmp_path, "parity", "ablation", "variant=small", content=named)
    assert run.teacher == {"model_type": "smt_teacher", "hidden_size": 24, "sliding_window": 3}


def test_only(tmp_path):
    assert len(grid(tmp_path, "--only", "task=parity").runs) == 2 * (1 + 1 + 3)
    assert {
        run.key()[:4] for run in grid(tmp_path, "--only", "arm=smt", "difficulty=8", "seed=1", "task=retrieval").runs
    } == {("retrieval", 8, "smt", 1)}
    # A seed or a difficulty that the grid does not list.
    run = of(tmp_path, "retrieval", "smt", "difficulty=32", "seed=7")
    assert (run.difficulty, run.seed) == (32, 7)
    assert run.phases[0][1]["max_seconds"] == 45.0  # the longest there is
    runs = grid(tmp_path, "--only", "task=retrieval", "difficulty=32", "seed=7").runs
    assert [run.arm for run in runs] == ["smt"]  # arms that are for other difficulties are not meant...
    runs = grid(tmp_path, "--only", "task=retrieval", "difficulty=32", "arm=bptt", "seed=7").runs
    assert len(runs) == 4  # ...but where they are named


@pytest.mark.parametrize(
    "words, message",
    [
        ("--outptu x", "did you mean 'output'"),
        ("--only colour=red", "`--only` takes"),
        ("--only parity", "`--only` takes"),
        ("--only task=sorting", "no task 'sorting'"),
        ("--only arm=smt variant=full", "nothing"),
        ("--only seed=first", "seed"),
        ("--only", "`--only` needs a value"),
        ("--jobs many", "jobs"),
    ],
)
def test_grid_flags_are_refused(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        grid(tmp_path, *words.split())
    with pytest.raises(ValueError, match="name the grid"):
        parse_grid([])


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("seeds:", "seed:", "did you mean 'seeds'"),
        ("difficulties: [10]", "dificulties: [10]", "did you mean 'difficulties'"),
        ("variants:", "variant:", "did you mean 'variants'"),
        ("- dmt", "- dtm", "unknown phase 'dtm'"),
        ("weight_decay: 0.5", "wait_decay: 0.5", "did you mean 'weight_decay'"),
        ("share: 0.75", "share: 0.75, num_train_epoch: 3", "did you mean"),
        ("{hidden_size: 32,", "{hiden_size: 32,", "did you mean 'hidden_size'"),
        ("context_length: 16,", "sliding_window: 16,", "'sliding_window'"),
        ("sliding_window: 9", "context_length: 9", "'context_length'"),
        ("hidden_size: 48}", "num_memory_tokens: 48}", "'num_memory_tokens'"),  # follows from the student
        ("weight_decay: 0.5", "weight_decay: much", "weight_decay"),
        ("{hidden_size: 32,", "{hidden_size: large,", "hidden_size"),
        ("sweep: {bptt: {", "sweep: {smt: {learning_rate: [1]}, bptt: {", "unknown phase in `sweep`"),
        ("phases: [{smt: {num_supervised_transitions: 1, teacher_weight: 0}}]", "phases:", "needs `phases`"),
        ("share: 0.75", "dynamics_weight: -1", "dynamics_weight"),
        ("share: 0.75", "share: much", "`share` of a phase"),
        ("difficulties: [10]", "difficulties: ['10']", "list of whole numbers"),
        ("difficulties: [10]", "difficulties: 10", "list of whole numbers"),
        ("sweep: {bptt: {", "sweep: {bptt: {max_steps: 3, ", "`sweep` takes one phase"),
        ("[1.0e-3, 2.0e-3], transition", "[1.0e-3, 2.0e-3], tranzition", "did you mean 'transition_steps'"),
    ],
)
def test_grid_refusals(tmp_path, old, new, message):
    assert GRID.count(old) == 1
    with pytest.raises(ValueError, match=message):
        grid(tmp_path, content=GRID.replace(old, new))


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("unread: {smt:", "unread: {smtt:", "smtt"),  # a part that the arm does not have
        ("unread: {smt:", "unread: {dmt:", "dmt"),
        ("sweep: {bptt:", "sweep: {smt:", "smt"),
        ("smt: {smt: {learning_rate: 3.0e-3},", "smtt: {smt: {learning_rate: 3.0e-3},", "smtt"),  # no such arm
        ("{smt: {learning_rate: 3.0e-3}, dmt:", "{smt: {learning_rate: 3.0e-3}, bptt:", "bptt"),  # no such phase of it
        ("only: {retrieval: [8]}", "only: {retreival: [8]}", "retreival"),
        ("model_type: smt_windowed_teacher, context_length: 16,", "model_type: windowed,", "windowed"),
        ("      - dmt", "        dmt:", "one-key mapping"),
    ],
)
def test_a_grid_ignores_nothing(tmp_path, old, new, message):
    """A name that is spelled right but belongs to nothing would leave a run as it is, unseen."""
    assert GRID.count(old) == 1
    with pytest.raises(ValueError, match=message):
        grid(tmp_path, content=GRID.replace(old, new))


@pytest.mark.parametrize("word", ["false", "False"])
def test_not_resuming_is_not_resuming(word):
    run = parse_run(["--resume_from_checkpoint", word]).run
    assert run.resume is False and not run.resume_from_checkpoint


def test_several_trackers():
    assert parse_run(["--report_to", "tensorboard", "wandb"]).phases[0].report_to == ["tensorboard", "wandb"]


def test_a_renamed_flag_warns():
    with pytest.warns(FutureWarning, match="`warmup_ratio` is called `warmup_steps` now"):
        assert parse_run(["--warmup_ratio", "0.1"]).phases[0].warmup_steps == 0.1


def test_the_default_set():
    """Its parts come together, and none of them where another updater or teacher is named."""
    parsed = parse_run([])
    assert parsed.is_default and parsed.student_fields["updater_type"] == "fast_weight"
    assert parsed.teacher_fields == {"model_type": "smt_fast_weight_teacher"} and parsed.notes == []
    smt, dmt = parsed.phases
    assert not smt.trains_updater and smt.matrix_optimizer == dmt.matrix_optimizer == "muon"
    assert smt.teacher_readout_weight == 1.0 and smt.teacher_weight == 0.0
    for words in (["--updater_type", "mlp"], ["--teacher_hidden_size", "24"], ["--teacher_model_type", "smt_teacher"]):
        classic = parse_run(words)
        assert not classic.is_default and "updater_type" not in classic.student_fields.keys() - classic.student.keys()
        assert [phase.phase for phase in classic.phases] == ["smt", "bptt"] and classic.phases[0].trains_updater
        assert all(phase.matrix_optimizer == "adamw" for phase in classic.phases)


def test_the_default_set_gives_way():
    """To what is given, wherever it is given; the teacher is trained alone only where a phase follows."""
    smt, dmt, bptt = parse_run(
        ["--phases", "smt,dmt,bptt", "--max_steps", "5", "--smt_learning_rate", "1e-3", "--hidden_size", "32"]
    ).phases
    assert (smt.max_steps, dmt.max_steps, bptt.max_steps, smt.learning_rate) == (5, 5, 5, 1e-3)
    (smt,) = parse_run(["--phases", "smt"]).phases
    assert smt.trains_updater
    first, second, _ = parse_run(["--phases", "smt,smt,dmt"]).phases
    assert not first.trains_updater and second.trains_updater
    (smt, _) = parse_run(["--smt_trains_updater", "true"]).phases
    assert smt.trains_updater


def test_settings_of_transitions_in_the_default_set():
    """Meant for smt, they make it train the student too; meant for all phases, they are for those with transitions."""
    parsed = parse_run(["--smt_transition_steps", "1"])
    assert parsed.phases[0].trains_updater and parsed.phases[0].transition_steps == 1
    assert parsed.notes == ["smt: trains the student too, since transition_steps is given"]
    smt, dmt = parse_run(
        ["--transition_steps", "16", "--readout_match_weight", "0.5", "--consistency_weight", "1"]
    ).phases
    assert not smt.trains_updater and smt.readout_match_weight == smt.consistency_weight == 0.0
    assert (dmt.transition_steps, dmt.readout_match_weight, dmt.consistency_weight) == (16, 0.5, 1.0)
    with pytest.raises(InputError, match="has no use for `consistency_weight`"):
        parse_run(["--smt_trains_updater", "false", "--smt_consistency_weight", "1"])


def test_seconds_in_the_place_of_steps_in_the_default_set(tmp_path):
    assert parse_run(["--max_seconds", "9"]).phases[0].max_steps > 1_000_000
    nothing = parse_run(["--config", write(tmp_path, "max_seconds: null\n")]).phases
    assert [phase.max_steps for phase in nothing] == [phase.max_steps for phase in parse_run([]).phases]


def test_help_shows_the_default_set():
    text = help_text()
    for flag in (
        "--updater_type fast_weight",
        "--smt_max_steps 3000",
        "--smt_trains_updater False",
        "--phases smt,dmt",
    ):
        assert flag in text


@pytest.mark.parametrize("words, why", [(["--optim", "sgd"], "`optim` is sgd"), (["--fsdp", "full_shard"], "FSDP")])
def test_adamw_where_muon_cannot_run(words, why):
    """Said before training, with the flag; a Muon that was asked for is refused."""
    parsed = parse_run(words)
    assert [phase.matrix_optimizer for phase in parsed.phases] == ["adamw", "adamw"]
    assert len(parsed.notes) == 2 and all(why in note and "--matrix_optimizer adamw" in note for note in parsed.notes)
    with pytest.raises(InputError, match="muon"):
        parse_run([*words, "--matrix_optimizer", "muon"])

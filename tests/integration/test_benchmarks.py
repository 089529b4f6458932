"""The benchmark scripts on tiny models: what their lines say and that pictures are written. No time is asserted."""

import json
import pickle
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from measurements import (
    AttentionArguments,
    GenerationArguments,
    MemoryWallArguments,
    measure_generation,
    train_step,
)
from measurements.generation import by_forward, by_generate
from measurements.long_context import needles
from measurements.memory_wall import filled_cache
from measurements.peers import (
    STATE_NAMES,
    count_parameters,
    llama_config_like,
    mamba_like,
    num_blocks,
    rwkv_like,
    start_state,
)
from measurements.time_to_loss import heldout_losses
from measurements.train_step import Stepper, measure_train_step
from measurements.training_arms import ARMS, PUBLISHED, TrainStepArguments, build
from transformers import LlamaForCausalLM

from smt_hf.command_line import parse
from smt_hf.errors import InputError
from smt_hf.evaluation.long_context.loading import load_language_model
from smt_hf.student.modeling_smt_recurrent import CACHE_NAME
from tests.conftest import make_student

SCRIPTS = Path(__file__).parents[2] / "recipes" / "benchmarks"
SMALL = """
    --vocab_size 37 --hidden_size 16 --num_attention_heads 2 --num_memory_tokens 3 --num_threads 1
""".split()  # noqa: SIM905
SMALL_STEP = """
    --context_length 16 --bptt_window 8 --batch_size 4 --future_length 4 --teacher_hidden_size 16 --teacher_layers 1
    --teacher_heads 2 --device cpu --warmup_steps 1 --steps 1 --repeats 2
""".split()  # noqa: SIM905
FACTS = {"benchmark", "arm", "batch_size", "parameters", "commit", "hardware", "device", "num_threads", "versions"}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a script as from the command line; returns the lines that it appended to a file that held one already."""

    def run_script(name, *words):
        output = tmp_path / "lines.jsonl"
        output.write_text('{"benchmark": "earlier"}\n')
        monkeypatch.setattr(sys, "argv", [name, "--output", str(output), *SMALL, *map(str, words)])
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        earlier, *lines = [json.loads(line) for line in output.read_text().splitlines()]
        assert earlier == {"benchmark": "earlier"}
        assert all(set(line) >= FACTS and line["benchmark"] == name.removesuffix(".py") for line in lines)
        return lines

    return run_script


def test_generate(run, capsys):
    arms = ["student_generate", "student_loop", "mamba_generate", "mamba_loop", "rwkv_generate", "rwkv_loop"]
    lines = run("generate.py", "--arms", *arms, "--batch_sizes", 1, 3, "--new_tokens", 5, "--repeats", 3)
    assert [(line["batch_size"], line["arm"]) for line in lines] == [(size, arm) for size in (1, 3) for arm in arms]
    for line in lines:
        assert line["tokens_per_second"] == pytest.approx(line["batch_size"] * 5 / line["seconds"])
        assert len(line["all_seconds"]) == line["repeats"] == 3 and line["error"] is None
        assert line["parameters"] == pytest.approx(lines[0]["parameters"], rel=0.25)  # widths go in steps of 4
        assert line["num_threads"] == 1 and line["device"] == "cpu" and "transformers" in line["versions"]
    printed = capsys.readouterr().out
    assert all(f"{name}: {count:,} parameters" in printed for name, count in
               ((line["arm"].partition("_")[0], line["parameters"]) for line in lines))  # fmt: skip


@pytest.mark.processes
def test_memory_wall(run, tmp_path, capsys):
    figure = tmp_path / "pictures" / "wall.png"
    far = 3_200_000  # tokens that nobody reads in a second
    words = ["--min_tokens", 32, "--max_tokens", far, "--growth_factor", 100_000, "--chunk_tokens", 16, "--steps", 2]
    words += ["--arms", "student", "transformer_preallocated", "--seconds_limit", 1, "--memory_limit_gb", 0.1]
    lines = run("memory_wall.py", *words, "--figure", figure)
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert [(line["arm"], line["context"], line["measured"]) for line in lines] == [
        (arm, context, context == 32) for arm in ("student", "transformer_preallocated") for context in (32, far)
    ]
    student, transformer = lines[:2], lines[2:]
    assert all(line["state_bytes"] == 4 * 3 * 16 and line["fits"] for line in student)
    assert student[1]["seconds_per_token"] == student[0]["seconds_per_token"] > 0
    per_token = 2 * 4 * 16 * transformer[0]["sizes"]["num_hidden_layers"]
    assert transformer[0]["fits"] and transformer[0]["seconds_per_token"] > 0
    assert transformer[0]["state_bytes"] == per_token * (32 + 1 + 2)
    assert not transformer[1]["fits"] and transformer[1]["error"] is None
    assert transformer[1]["state_bytes"] == per_token * far and transformer[1]["seconds_per_token"] is None
    assert 32 < transformer[0]["tokens_at_limit"] < far
    for line in lines:
        assert (line["peak_growth_bytes"] is None) or line["measured"]
    assert f"{transformer[0]['tokens_at_limit']:,} tokens" in capsys.readouterr().out


def test_train_step(run, capsys):
    arms = [arm for arm in ARMS if not arm.endswith("compiled")]
    lines = run("train_step.py", *SMALL_STEP, "--memory_steps", 0, "--arms", *arms)
    assert [line["arm"] for line in lines] == arms
    transitions = {PUBLISHED: 4 * 1, "smt": 4 * 16, "smt8": 4 * 16, "bptt_truncated": 4 * 8, "bptt": 4 * 16}
    for line in lines:
        assert line["transitions_per_step"] == transitions[line["arm"]]
        speeds = sorted(transitions[line["arm"]] / seconds for seconds in line["all_seconds_per_step"])
        assert len(speeds) == 2 and line["transitions_per_second"] == pytest.approx(sum(speeds) / 2)
        assert line["milliseconds_per_step"] == pytest.approx(500 * sum(line["all_seconds_per_step"]))
        assert (line["teacher_parameters"] is None) == line["arm"].startswith("bptt") and line["error"] is None
        assert line["parameters"] == lines[0]["parameters"] and line["peak_memory_mb"] is None
        assert line["seconds_to_loss"] is None and line["loss"] is None and line["device"] == "cpu"
    assert lines[0]["ratio_to_published"] == 1 and all(line["ratio_to_published"] > 0 for line in lines)
    published, smt8 = lines[0]["objective"], lines[2]["objective"]
    assert published["num_supervised_transitions"] == 1 and published["weights"]["readout"] == 0
    assert smt8["num_supervised_transitions"] == 0 and smt8["transition_steps"] == 8
    assert f"teacher {lines[0]['teacher_parameters']:,}" in capsys.readouterr().out


def test_peak_memory_and_seconds_to_loss(run, text_file, monkeypatch):
    def in_this_process(function, *rest):  # one process per arm takes seconds to start
        return pickle.loads(pickle.dumps(function))(*pickle.loads(pickle.dumps(rest)))

    monkeypatch.setattr(train_step, "in_a_fresh_process", in_this_process)
    words = ["--vocab_size", 258, "--arms", PUBLISHED, "smt", "--memory_steps", 1, "--train_file", text_file]
    words += ["--reach_seconds", 0.4, "--reach_interval", 0.2, "--heldout_rows", 32]
    published, smt = run("train_step.py", *SMALL_STEP, *words, "--published_learning_rates", 0.004, 0.001)
    for line in (published, smt):
        # In this process, whose peak other tests have set; a fresh one is measured in test_memory_wall.
        assert line["peak_memory_mb"] is None or line["peak_memory_mb"] >= 0
        assert line["reach_seconds"] == 0.4 and line["data_hash"] and np.isfinite(line["student_loss"])
        assert line["curve"][-1]["loss"] == line["loss"]
    assert published["seconds_to_loss"] >= 0.4 and published["transitions_to_loss"] == 4 * published["steps_to_loss"]
    by_rate = dict(published["loss_by_learning_rate"])
    assert published["loss"] == min(by_rate.values()) == by_rate[published["learning_rate"]] and len(by_rate) == 2
    assert (smt["seconds_to_loss"] is not None) == (smt["loss"] <= published["loss"])
    assert all(point["loss"] > published["loss"] for point in smt["curve"][:-1])


def test_steps_train_as_the_trainers_do(tmp_path):
    """Every part that a phase trains moves, and a carried memory starts anew where a row does."""
    arguments = parse(TrainStepArguments, [*SMALL, *SMALL_STEP], "")
    config = make_student().config
    for arm in (PUBLISHED, "smt", "bptt_truncated"):
        stepper = Stepper(arguments, arm, config, str(tmp_path))
        before = {name: value.clone() for name, value in stepper.model.named_parameters()}
        for _ in range(3):
            stepper.step()
        still = {name for name, value in stepper.model.named_parameters() if torch.equal(value, before[name])}
        # The windowed teacher predicts nothing; m_0 is a label of the causal one, and rarely one of the published.
        assert still <= ({"student.model.initial_memory"} if arm == PUBLISHED else set())
        assert (stepper.memory is not None) == (arm == "bptt_truncated")
    fresh = [batch["is_fresh"].tolist() for batch in stepper.batches]
    assert fresh[:3] == [[True] * 4, [False, False, True, True], [True, True, False, False]]


@torch.no_grad()
def test_heldout_losses_are_those_of_the_last_position():
    arguments = parse(TrainStepArguments, [*SMALL, *SMALL_STEP], "")
    rows = torch.randint(37, (5, 17), generator=torch.Generator().manual_seed(2))
    for arm in (PUBLISHED, "smt"):
        model = build(arguments, arm, make_student().config)
        torch.nn.init.normal_(model.student.model.updater.out_proj.weight, std=0.3)
        of_teacher, of_student = heldout_losses(model, rows)
        logits = model.student(input_ids=rows[:, :-1], use_cache=False).logits[:, -1]
        assert of_student == pytest.approx(float(torch.nn.functional.cross_entropy(logits, rows[:, -1])), rel=1e-4)
        assert of_teacher != pytest.approx(of_student, rel=1e-3)
        memory = model.teacher(rows[:, :-1], torch.arange(1, 17), model.student.model.start_memory())[:, -1]
        logits = model.student.read_logits(memory)
        assert of_teacher == pytest.approx(float(torch.nn.functional.cross_entropy(logits, rows[:, -1])), rel=1e-4)


def test_peers_are_about_as_large():
    student = make_student(hidden_size=32)
    count = count_parameters(student)
    config = llama_config_like(student, 100)
    llama = LlamaForCausalLM(config)
    assert abs(count_parameters(llama) - count) <= 3 * 32 * config.num_hidden_layers / 2
    assert config.hidden_size == 32 and config.num_attention_heads == 2
    for peer in (mamba_like(student), rwkv_like(student)):
        assert abs(count_parameters(peer) - count) < 0.15 * count
        assert peer.config.num_hidden_layers == num_blocks(student.config)
    assert mamba_like(student, 5).config.num_hidden_layers == 5


@torch.no_grad()
def test_steps_of_the_peers_equal_the_whole_sequence(tokens):
    """Also for several sequences, which transformers' own state of RWKV does not get right."""
    for peer in (mamba_like(make_student()), rwkv_like(make_student())):
        for parameter in peer.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.3)
        state, logits = start_state(peer, tokens.shape[0]), []
        for token in tokens.split(1, dim=1):
            outputs = peer(input_ids=token, use_cache=True, **state)
            name = next(name for name in STATE_NAMES if name in outputs)
            state = {name: outputs[name]}
            logits.append(outputs.logits)
        whole = peer(input_ids=tokens, use_cache=False).logits
        torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=1e-4, atol=1e-5)
        start = tokens[:, :1]
        assert torch.equal(by_generate(peer)(start, 6), by_forward(peer)(start, 6))


@torch.no_grad()
def test_preallocated_cache_equals_the_growing_one():
    config = llama_config_like(make_student(), 64, num_key_value_heads=1)
    model = LlamaForCausalLM(config).eval()
    growing, preallocated = (filled_cache(config, 2, 20, room) for room in (None, 4))
    for layer, other in zip(growing.layers, preallocated.layers):
        other.keys.copy_(layer.keys)
        other.values.copy_(layer.values)
    for token in torch.tensor([[3, 7], [1, 2], [9, 9], [0, 36]]):
        logits = [
            model(input_ids=token[:, None], use_cache=True, **{CACHE_NAME: cache}).logits
            for cache in (growing, preallocated)
        ]
        torch.testing.assert_close(*logits)
    assert growing.get_seq_length() == preallocated.get_seq_length() == 24


def test_a_compiler_that_fails_is_recorded(monkeypatch):
    def no_compiler(step, **options):
        def fail(*args):
            raise OSError("no compiler\nhere")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    words = ["--arms", "student_loop", "student_compiled", "--batch_sizes", "1", "--new_tokens", "2", "--repeats", "1"]
    loop, compiled = measure_generation(parse(GenerationArguments, [*SMALL, *words], ""))
    assert loop["error"] is None and compiled["error"] == "OSError: no compiler here"
    assert compiled["tokens_per_second"] is None and compiled["all_seconds"] == []
    words = [*SMALL_STEP, "--memory_steps", "0", "--arms", PUBLISHED, "smt8_compiled"]
    published, compiled = measure_train_step(parse(TrainStepArguments, [*SMALL, *words], ""))
    assert published["error"] is None and compiled["error"] == "OSError: no compiler here"
    assert compiled["transitions_per_second"] is compiled["ratio_to_published"] is None
    assert compiled["all_seconds_per_step"] == []


def test_a_checkpoint(tmp_path):
    make_student().save_pretrained(tmp_path)
    words = ["--model", str(tmp_path), "--arms", "student_generate", "student_loop", "--new_tokens", "3"]
    arguments = parse(GenerationArguments, [*words, "--repeats", "1", "--batch_sizes", "2"], "")
    assert {line["model"] for line in measure_generation(arguments)} == {str(tmp_path)}


@pytest.mark.parametrize(
    ("dataclass", "words", "message"),
    [
        (GenerationArguments, ["--batch_size", "1"], "did you mean 'batch_sizes'"),
        (GenerationArguments, ["--arms", "student"], "choose from student_generate"),
        (GenerationArguments, ["--repeats", "0"], "`repeats` must be at least 1"),
        (GenerationArguments, ["--model", "x", "--hidden_size", "8"], "leave out hidden_size"),
        (MemoryWallArguments, ["--growth_factor", "1"], "growth_factor"),
        (MemoryWallArguments, ["--memory_limit_gb", "0"], "must be positive"),
        (MemoryWallArguments, ["--figure", "x.gif"], "ends in .png"),
        (TrainStepArguments, ["--arms", "smt"], "must contain published"),
        (TrainStepArguments, ["--bptt_window", "48"], "must divide"),
        (TrainStepArguments, ["--reach_seconds", "0"], "must be positive"),
        (TrainStepArguments, ["--device", "tpu"], "must be cpu, or cuda"),
        (TrainStepArguments, ["--learning_rate", "nan"], "`learning_rate` must be positive"),
        (TrainStepArguments, ["--published_learning_rates", "0.1", "0"], "`published_learning_rates` must be positive"),
    ],
)
def test_bad_flags(dataclass, words, message):
    with pytest.raises(InputError, match=message):
        parse(dataclass, words, "")


def test_no_such_model():
    with pytest.raises(InputError, match="no folder 'nowhere'"):
        measure_generation(parse(GenerationArguments, ["--model", "nowhere"], ""))


def test_a_vocabulary_smaller_than_the_texts(text_file):
    words = [*SMALL, *SMALL_STEP, "--reach_seconds", "1", "--train_file", str(text_file)]
    with pytest.raises(InputError, match="`vocab_size` must be at least 258"):
        measure_train_step(parse(TrainStepArguments, words, ""))


def test_long_context(run, tmp_path):
    student = make_student(vocab_size=258)
    student.save_pretrained(tmp_path / "text")
    make_student(vocab_size=9).save_pretrained(tmp_path / "retrieval")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {number}: a quick brown fox\n" for number in range(900)))
    figure = tmp_path / "figure.png"
    lines = run(
        "long_context.py", "--text_students", f"ours={tmp_path / 'text'}", "--retrieval_students",
        f"a={tmp_path / 'retrieval'}", f"b={tmp_path / 'retrieval'}", "--lengths", "16", "48", "--num_streams", "2",
        "--num_rows", "20", "--train_file", text, "--num_threads", "1", "--figure", figure,
    )  # fmt: skip
    cells = [(line["task"], line["arm"], line["position"]) for line in lines]
    assert cells == [("text", "ours", 16), ("text", "ours", 48), *(("retrieval", a, n) for a in "ab" for n in (16, 48))]
    assert all(6 < line["bits_per_byte"] < 11 for line in lines[:2])
    assert [line["n"] for line in lines[:2]] == [2 * 16, 2 * (48 - 16)]
    assert all(0 <= line["accuracy"] <= 0.6 and line["n"] == 20 for line in lines[2:])
    assert [line["accuracy"] for line in lines[2:4]] == [line["accuracy"] for line in lines[4:]]
    assert figure.stat().st_size


def test_needles_are_as_far_back_as_the_row_is_long():
    ids, labels = needles(64, 0)(48)
    assert (ids[:, 0] == 0).all() and (ids[:, -2] == 0).all() and ((ids == 0).sum(1) == 2).all()
    assert (labels[:, -1] == ids[:, 1]).all() and (labels[:, :-1] == -100).all() and (ids[:, -1] == ids[:, 1]).all()


@pytest.mark.parametrize("window", [None, 64])
def test_a_transformer_trained_on_documents(window, run, tmp_path):
    """It is exported with what it scored, read by evaluate.py, and not replaced unasked."""
    pytest.importorskip("wonderwords")
    folder = tmp_path / "transformer"
    words = ["--documents", "niah_single_1", "--difficulty", "384", "--seconds", "1", "--folder", folder]
    words += ["--batch_size", "2", "--num_layers", "4"] + ([] if window is None else ["--window", window])
    (line,) = run("train_transformer.py", *words, "--vocab_size", "258")
    assert line.keys() >= FACTS and 0 <= line["accuracy"] <= 1 and line["steps"] >= 1 and line["seconds"] >= 1
    language_model = load_language_model(str(folder))
    assert type(language_model.model).__name__ == ("LlamaForCausalLM" if window is None else "MistralForCausalLM")
    assert getattr(language_model.model.config, "sliding_window", None) == window
    assert language_model.length_unit == "bytes" and language_model.ends == {256}
    assert count_parameters(language_model.model) == line["parameters"]
    assert language_model.model.config.num_hidden_layers == line["layers"] == 4  # the student has 3
    with pytest.raises(InputError, match="exists"):
        parse(AttentionArguments, [str(word) for word in words], "")


@pytest.mark.processes
def test_long_rows(run, tmp_path):
    """Cells that are there are not measured again; one that would not fit is calculated."""
    figure = tmp_path / "rows.png"
    sizes = ["--num_hidden_layers", 1, "--updater_type", "mlp", "--window", 8, "--ratio_tokens", 16, "--repeats", 1]
    words = [*sizes, "--min_tokens", 512, "--phases", "dmt", "--memory_limit_gb", 1e-6]
    first = run("long_rows.py", *words, "--max_tokens", 512)
    assert [(line["arm"], line["tokens"]) for line in first] == [("dmt, checkpointed", 512), ("dmt", 512)]
    for line in first:
        assert line["measured"] and line["peak_growth_bytes"] > 1e3 and line["seconds"] > 0 and line["window"] == 8
    assert first[0]["seconds_ratio"] > 0 and "seconds_ratio" not in first[1]
    output = tmp_path / "more.jsonl"
    output.write_text("".join(json.dumps(line) + "\n" for line in first))
    more = run("long_rows.py", *words, "--max_tokens", 2048, "--output", output, "--figure", figure)
    assert more == []  # not in the file that the fixture reads
    lines = [json.loads(text) for text in output.read_text().splitlines()]
    assert lines[:2] == first and figure.read_bytes().startswith(b"\x89PNG")
    assert [(line["tokens"], line["measured"]) for line in lines[2:]] == [(1024, False)] * 2 + [(2048, False)] * 2
    assert lines[4]["needs_bytes"] == 2 * lines[2]["needs_bytes"] == 4 * first[0]["peak_growth_bytes"]

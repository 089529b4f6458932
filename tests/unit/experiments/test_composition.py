"""Threads, recorded arguments and the hash of a tokenizer."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from smt_hf.data import byte_tokenizer, number_tokenizer
from smt_hf.errors import InputError
from smt_hf.experiments.composition import cost_of, model_config, phase_settings, set_threads, tokenizer_hash
from smt_hf.publishing.scores import results_table
from smt_hf.training import DMTTrainingArguments, SMTTrainingArguments

THREADS = "from smt_hf.experiments.composition import set_threads; print('threads', set_threads(None))"


def settings_of(**given):
    return phase_settings(SMTTrainingArguments(output_dir="unused", **given))


@pytest.mark.parametrize(
    "changed",
    [
        {"gradient_accumulation_steps": 2}, {"adam_beta1": 0.8}, {"adam_epsilon": 1e-7}, {"bf16": True},
        {"data_seed": 0}, {"optim": "sgd"}, {"full_determinism": True}, {"per_device_train_batch_size": 3},
        {"learning_rate": 1.0},
        {"dataloader_drop_last": True}, {"neftune_noise_alpha": 0.0}, {"accelerator_config": {"even_batches": False}},
        {"max_grad_norm": 0.5}, {"lr_scheduler_kwargs": {"min_lr_rate": 0.2}}, {"on_policy_fraction": 0.25},
    ],
)  # fmt: skip
def test_what_changes_the_result_is_recorded(changed):
    assert settings_of(**changed) != settings_of()


@pytest.mark.parametrize(
    "changed",
    [
        {"logging_steps": 3}, {"save_steps": 3}, {"save_total_limit": 9}, {"eval_strategy": "steps"},
        {"disable_tqdm": True},
        {"per_device_eval_batch_size": 2}, {"dataloader_num_workers": 1}, {"output_dir": "x"}, {"hub_model_id": "a/b"},
        {"seed": 9},  # of the run, which has it itself
    ],
)  # fmt: skip
def test_what_is_written_down_may_change(changed):
    assert phase_settings(SMTTrainingArguments(**{"output_dir": "unused", **changed})) == settings_of()
    caches = DMTTrainingArguments(output_dir="unused", label_cache_dir="x")
    assert phase_settings(caches) == phase_settings(DMTTrainingArguments(output_dir="unused"))


def test_what_is_recorded_is_short():
    settings = settings_of()
    assert settings["learning_rate"] == 4e-3 and settings["predictive_weight"] == 1.0  # ours, whatever the value
    assert not {"adam_beta1", "bf16", "precision", "accelerator_config", "output_dir", "report_to"} & settings.keys()
    assert settings_of(bf16=True)["precision"] == "bf16"


def test_steps_that_were_left_out_are_in_the_table():
    costs = {
        arm: cost_of(SimpleNamespace(seconds=2.0, sequential_steps=30, tokens=400, skipped_steps=skipped))
        for arm, skipped in (("smt", 0), ("bptt", 5))
    }
    assert costs["smt"] == {"wall_clock_s": 2.0, "sequential_steps": 30, "tokens": 400}
    assert costs["bptt"] == {**costs["smt"], "skipped_steps": 5}
    results = {
        **{"metric": "accuracy", "student_arm": "smt", "data": {"heldout_streams": 8}},
        "task": {"name": "retrieval", "difficulty": 16, "chance": 0.1},
        "arms": {arm: {"accuracy": 0.5, **cost} for arm, cost in costs.items()},
    }
    assert results_table(results).endswith("gradient was not finite, those of earlier phases included: bptt 5")
    del results["arms"]["bptt"]
    assert "left out" not in results_table(results)


def test_the_hash_of_a_tokenizer(tmp_path):
    """Two of one size differ; what a call leaves in a tokenizer, and a way over the disk, change nothing."""
    tokenizer = byte_tokenizer()
    before = tokenizer_hash(tokenizer)
    tokenizer(["some", "text of another length"], padding=True, truncation=True, max_length=3)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(tokenizer) == before == tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path))
    content = (tmp_path / "tokenizer.json").read_text()
    assert '"a": 97' in content and '"b": 98' in content
    (tmp_path / "tokenizer.json").write_text(content.replace('"a": 97', '"a": 98').replace('"b": 98', '"b": 97', 1))
    other = AutoTokenizer.from_pretrained(tmp_path)
    assert len(other) == len(tokenizer) and tokenizer_hash(other) != before
    assert tokenizer_hash(number_tokenizer(4)) != tokenizer_hash(number_tokenizer(5))


@pytest.mark.processes
@pytest.mark.parametrize(
    "exported, launcher, threads",
    [
        ({"OMP_NUM_THREADS": "1"}, [], 1),
        ({"OMP_NUM_THREADS": "1"}, ["accelerate"], 1),
        ({}, ["accelerate"], None),  # accelerate exports 1
        ({"OMP_NUM_THREADS": "3"}, ["accelerate"], 3),
        ({}, [], None),
    ],
)
def test_threads_of_the_environment(exported, launcher, threads, tmp_path):
    (tmp_path / "threads.py").write_text(THREADS)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    words = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"] if launcher else []
    done = subprocess.run(
        [sys.executable, *words, "threads.py"],
        cwd=tmp_path, env={**environment, **exported}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    cores = len(os.sched_getaffinity(0))
    assert f"threads {threads or cores}\n" in done.stdout, done.stderr[-2000:]


def test_threads_that_are_refused():
    with pytest.raises(InputError, match="num_threads"):
        set_threads(0)


@pytest.mark.parametrize(
    "student, teacher",
    [
        ({"hidden_size": 0}, {}), ({"hidden_size": -8}, {}), ({"updater_type": "lstm"}, {}), ({"vocab_size": 3}, {}),
        ({"num_attention_heads": 3}, {}), ({}, {"num_attention_heads": 5}), ({}, {"model_type": "nothing"}),
        ({"hidden_size": None}, {}), ({}, {"sliding_window": 0}),
    ],
)  # fmt: skip
def test_sizes_that_are_refused(student, teacher):
    tokenizer = byte_tokenizer()
    subject = SimpleNamespace(tokenizer=tokenizer, vocab_size=len(tokenizer))
    with pytest.raises(InputError):
        model_config(subject, [SMTTrainingArguments(output_dir="unused")], student, teacher)

"""A language model's states and next tokens on disk: what is kept, who shares it, and training without the model."""

import json
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from smt_hf import (
    DMTTrainer,
    DMTTrainingArguments,
    SMTForPreTraining,
    SMTTrainer,
    SMTTrainingArguments,
)
from smt_hf.data import Levels
from smt_hf.errors import InputError
from smt_hf.evaluation import evaluate_rows
from smt_hf.teachers import NextTokens, SMTPretrainedTeacher
from smt_hf.training import SMTPreTrainingConfig
from smt_hf.training.cached_teacher import fill_teacher_caches
from smt_hf.training.teacher_cache import TeacherCache
from tests.conftest import make_composite

VOCAB, WIDTH = 11, 16
SIZES = {
    "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
WAYS = {
    "smt": (SMTTrainer, SMTTrainingArguments, {"teacher_weight": 0.0, "future_length": 4, "on_policy_warmup_ratio": 0}),
    "sparse": (SMTTrainer, SMTTrainingArguments, {"teacher_weight": 0.0, "future_length": 4,
                                                  "num_supervised_transitions": 3}),
    "alone": (SMTTrainer, SMTTrainingArguments, {"teacher_weight": 0.0, "future_length": 4, "trains_updater": False,
                                                 "teacher_readout_weight": 1.0}),
    "dmt": (DMTTrainer, DMTTrainingArguments, {}),
    "stride": (DMTTrainer, DMTTrainingArguments, {"label_stride": 4}),
}  # fmt: skip


def saved_model(path, seed=1):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=VOCAB + 2, **SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("llama"))


def some_rows(num=12, length=17, seed=0, **columns):
    tokens = np.random.default_rng(seed).integers(VOCAB, size=(num, length))
    return Dataset.from_dict({"input_ids": tokens.tolist(), **columns})


def make(folder, **fields):
    torch.manual_seed(0)
    student = {"hidden_size": 8, "num_attention_heads": 2, "vocab_size": VOCAB}
    teacher = {"model_name_or_path": folder, "keeps_head": True, **fields}
    return SMTForPreTraining(SMTPreTrainingConfig(student=student, teacher=teacher))


def make_trainer(way, output_dir, model, rows=None, **settings):
    trainer, arguments, more = WAYS[way]
    usual = {"use_cpu": True, "context_length": 16, "max_steps": 6, "per_device_train_batch_size": 4, "report_to": []}
    usual |= {"disable_tqdm": True, "save_strategy": "no", "distillation_weight": 1.0, "distillation_top_k": 4}
    args = arguments(output_dir=str(output_dir), **{**usual, **more, **settings})
    rows = some_rows() if rows is None else rows
    return trainer(model=model, args=args, train_dataset=rows, eval_dataset=some_rows(5, seed=9))


def calls_of(model):
    """Filled as the model of the teacher reads: the number of rows of each pass."""
    calls = []
    model.teacher.model.register_forward_pre_hook(
        lambda _, arguments, words: calls.append(len(words["input_ids"])), with_kwargs=True
    )
    return calls


def filled(folder, config, rows, likeliest, teacher, batch_size=5):
    cache = TeacherCache(folder, config, rows, likeliest)
    cache.create()
    cache.open()
    cache.fill(teacher, batch_size, cache.missing())
    return cache


@pytest.mark.parametrize("top_k", [None, 4, 20])
@pytest.mark.parametrize("start_token", [-1, 12])
def test_what_is_kept_is_what_the_teacher_says(top_k, start_token, folder, tmp_path):
    """Of padded rows with several documents, some of them twice; every number is rounded to bfloat16 once."""
    generator = np.random.default_rng(1)
    masks = (generator.random((12, 17)) > 0.2).astype(int)
    rows = some_rows(attention_mask=masks.tolist(), document_ids=(np.arange(17) // 6 + 0 * masks).tolist())
    rows = rows.select([*range(12), 3, 0])
    teacher = make(folder, start_token=start_token).teacher.eval()
    likeliest = None if top_k is None else {"top_k": top_k, "temperature": 1.5}
    cache = filled(tmp_path, teacher.config, rows, likeliest, teacher)
    assert len(list(tmp_path.iterdir())) == (1 if top_k is None else 2) and cache.parts[0].num_rows == 12
    numbers = torch.tensor([5, 14 + 12, 0, 3])  # rows 5, 12 (as 3), 0 and 3
    found = cache.get(numbers)
    read = [torch.tensor(rows[name])[numbers % 14, :-1] for name in ("input_ids", "attention_mask", "document_ids")]
    positions, start = torch.arange(17).expand(4, -1), torch.randn(4, 8)
    states, expected = teacher.read(read[0], positions, read[1], read[2], likeliest and (top_k, 1.5))
    assert torch.equal(found.states, states.bfloat16())
    labels = found.labels(teacher, torch.arange(17), start, read[1], with_next_tokens=top_k is not None)
    given = teacher(read[0], torch.arange(17), start, read[1], read[2])
    torch.testing.assert_close(labels.memories, given, atol=0.03, rtol=0.03)
    assert torch.equal(labels.memories[:, 0], start.expand(4, -1, -1))
    if top_k is None:
        assert found.next_tokens is None
        return
    assert (found.next_tokens.tokens is None) == (top_k == 20)
    assert torch.equal(found.next_tokens.is_known, expected.is_known)
    assert expected.is_known[:, 0].all() == (start_token != -1)
    torch.testing.assert_close(found.next_tokens.probabilities, expected.probabilities, rtol=0.01, atol=1e-6)
    known = found.next_tokens.probabilities.sum(-1)[expected.is_known]
    torch.testing.assert_close(known, torch.ones_like(known))
    if top_k == 4:
        assert torch.equal(found.next_tokens.tokens[expected.is_known], expected.tokens[expected.is_known])


@pytest.mark.parametrize("way", WAYS)
def test_training_from_the_cache_is_training_with_the_model(way, folder, tmp_path, monkeypatch):
    """Weights and evaluations, of a model whose states and probabilities are rounded as those on disk are."""
    model = make(folder)
    calls = calls_of(model)
    cached = make_trainer(way, tmp_path / "cached", model, teacher_cache_dir=str(tmp_path / "cache"))
    cached.train()
    assert sum(calls) == 12
    metrics = cached.evaluate()
    assert sum(calls) == 12 + 5
    cached.evaluate()
    assert sum(calls) == 12 + 5

    original = SMTPretrainedTeacher._read

    def rounded(*arguments, **words):
        states, next_tokens = original(*arguments, **words)
        states = states.bfloat16().to(states.dtype)
        if next_tokens is None:
            return states, None
        probabilities = next_tokens.probabilities.bfloat16().float()
        total = probabilities.sum(-1, keepdim=True).clamp(min=1e-30)
        return states, NextTokens(probabilities / total, next_tokens.tokens)

    monkeypatch.setattr(SMTPretrainedTeacher, "_read", rounded)
    plain = make_trainer(way, tmp_path / "plain", make(folder))
    plain.train()
    own, other = cached.model.state_dict(), plain.model.state_dict()
    for name, value in own.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-5, msg=name)
    expected = plain.evaluate()
    for name in (
        "eval_loss",
        "eval_rollout",
        "eval_drift",
        "eval_distillation",
        "eval_free_run",
        "eval_teacher_forced",
    ):
        assert (name in metrics) == (name in expected)
        assert metrics.get(name, 0.0) == pytest.approx(expected.get(name, 0.0), rel=1e-4), name
    assert {"eval_drift", "eval_distillation"} < metrics.keys()
    # A wrong row would show.
    wrong = make_trainer(way, tmp_path / "wrong", make(folder), teacher_cache_dir=str(tmp_path / "cache"))
    get = TeacherCache.get
    monkeypatch.setattr(TeacherCache, "get", lambda self, numbers, *rest: get(self, numbers + 1, *rest))
    wrong.train()
    difference = max((value - wrong.model.state_dict()[name]).abs().max() for name, value in own.items())
    assert difference > 1e-3


def test_a_killed_fill_goes_on_where_it_stopped(folder, tmp_path, monkeypatch):
    teacher, likeliest = make(folder).teacher.eval(), {"top_k": 4, "temperature": 1.0}
    whole = filled(tmp_path / "whole", teacher.config, some_rows(), likeliest, teacher)
    read, calls = teacher.read, []

    def dying(*arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(arguments[0]))
        return read(*arguments)

    monkeypatch.setattr(teacher, "read", dying)
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path / "killed", teacher.config, some_rows(), likeliest, teacher, batch_size=4)
    killed = TeacherCache(tmp_path / "killed", teacher.config, some_rows(), likeliest)
    killed.create()
    killed.open()
    assert len(killed.missing()) == 4
    with pytest.raises(InputError, match="rows are missing"):
        killed.get(torch.arange(12))
    calls.clear()
    killed.fill(teacher, 4, killed.missing())
    assert calls == [4] and not len(killed.missing())
    for part, other in zip(whole.parts, killed.parts):
        for name, array in part.arrays.items():
            # The size of a batch changes the last bits that the model computes.
            values = [torch.from_numpy(one.astype(np.int32)) for one in (array, other.arrays[name])]
            assert (values[0] - values[1]).abs().max() <= (0 if name == "tokens" else 1)


def test_a_row_is_present_after_its_data_are_on_disk(folder, tmp_path, monkeypatch):
    teacher = make(folder).teacher.eval()
    cache = TeacherCache(tmp_path, teacher.config, some_rows())
    cache.create()
    cache.open()

    def full(self):
        raise OSError("no space left")

    monkeypatch.setattr(np.memmap, "flush", full)
    with pytest.raises(OSError, match="no space left"):
        cache.fill(teacher, 4, cache.missing())
    assert len(cache.missing()) == 12


def test_processes_fill_their_shares(folder, tmp_path):
    """Each has looked before any of them writes: nothing is left, and nothing is done twice."""
    teacher = make(folder).teacher.eval()
    caches = [TeacherCache(tmp_path, teacher.config, some_rows()) for _ in range(3)]
    caches[0].create()
    for cache in caches:
        cache.open()
    missing = [cache.missing() for cache in caches[:2]]
    caches[0].fill(teacher, 4, missing[0][0::2])
    assert caches[2].missing().tolist() == list(range(1, 12, 2))
    caches[1].fill(teacher, 4, missing[1][1::2], shows=False)
    assert not len(caches[2].missing())


def test_phases_and_seeds_share_what_is_there(folder, tmp_path):
    """Another seed, another order of the rows, another head, another phase: the model reads nothing again."""
    words = {"teacher_cache_dir": str(tmp_path / "cache"), "max_steps": 2}
    make_trainer("smt", tmp_path / "a", make(folder), **words).train()
    model = make(folder)
    with torch.no_grad():
        model.teacher.memory_proj.weight.mul_(2.0)
    calls = calls_of(model)
    rows = some_rows().shuffle(seed=3)
    make_trainer("dmt", tmp_path / "b", model, rows=rows.select([*range(12), 5, 5]), seed=7, **words).train()
    make_trainer("smt", tmp_path / "c", model, rows=rows, **words, distillation_weight=0.0, dynamics_weight=2.0).train()
    assert not calls and len(list((tmp_path / "cache").iterdir())) == 2


def test_another_model_other_data_and_other_settings_have_files_of_their_own(folder, tmp_path):
    own = make(folder).config.teacher

    def names(config=own, rows=None, top_k=4, temperature=1.0):
        likeliest = {"top_k": top_k, "temperature": temperature}
        cache = TeacherCache(tmp_path, config, some_rows() if rows is None else rows, likeliest)
        return [part.folder.name for part in cache.parts]

    states, tokens = names()
    assert names(rows=some_rows().shuffle(seed=1)) == [states, tokens]
    for changed in (
        {"config": make(saved_model(tmp_path / "other", seed=2)).config.teacher},
        {"config": make(folder, start_token=5).config.teacher},
        {"config": make(folder, model_context_length=9).config.teacher},
        {"config": make(folder, model_dtype="bfloat16").config.teacher},
        {"rows": some_rows(seed=5)},
        {"rows": some_rows(13)},
        {"rows": some_rows(attention_mask=[[1] * 16 + [0]] * 12)},
    ):
        assert not {states, tokens} & set(names(**changed)), changed
    assert names(config=make(folder, layers="1").config.teacher)[1] == tokens
    assert names(config=make(folder, layers="1").config.teacher)[0] != states
    for changed in ({"top_k": 3}, {"temperature": 2.0}):
        assert names(**changed)[0] == states and names(**changed)[1] != tokens
    copied = shutil.copytree(folder, tmp_path / "copied")
    assert names(config=make(str(copied)).config.teacher) == [states, tokens]


def test_a_precision_has_one_cache_whether_it_is_written_or_not(folder, tmp_path):
    """In the configuration of the model, in the flag, or by a teacher that has loaded the model."""

    def names(path, **fields):
        cache = TeacherCache(tmp_path / "cache", make(str(path), **fields).config.teacher, some_rows())
        return [part.folder.name for part in cache.parts]

    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(half, max_shard_size="8KB")
    assert len(list(half.glob("*.safetensors"))) > 1
    found = {}
    for path, dtype, other in ((folder, "float32", "bfloat16"), (half, "bfloat16", "float32")):
        unsaid = shutil.copytree(path, tmp_path / f"unsaid_{dtype}")
        config = json.loads((unsaid / "config.json").read_text())
        assert config.pop("dtype") == dtype
        (unsaid / "config.json").write_text(json.dumps(config))
        (found[dtype],) = names(path)
        same = [names(unsaid), names(unsaid, holds_model=False), names(path, holds_model=False)]
        same += [names(unsaid, model_dtype=dtype), names(path, model_dtype=dtype)]
        assert same == [[found[dtype]]] * 5
        assert names(path, model_dtype=other) != [found[dtype]] and names(unsaid, model_dtype=other) != [found[dtype]]
    assert found["float32"] != found["bfloat16"]
    (unsaid / "training_args.bin").write_bytes(b"of no model")  # as a checkpoint has it
    assert names(unsaid) == [found["bfloat16"]]


def test_all_files_are_there_before_a_row_is_read(folder, tmp_path, monkeypatch):
    """A later phase whose data cannot be kept, or a disk that is too small, is found before the first forward."""
    words = {"teacher_cache_dir": str(tmp_path / "cache"), "max_steps": 2}
    model = make(folder, holds_model=False)
    phases = [make_trainer(way, tmp_path / way, model, **words).args for way in ("smt", "dmt")]

    def fill(dmt_rows):
        rows = {"smt": some_rows(), "dmt": dmt_rows}
        fill_teacher_caches(model.config.teacher, phases, lambda phase: rows[phase.phase], some_rows(5, seed=9))

    def refused(*arguments, **words):
        raise AssertionError("a row has been read")

    monkeypatch.setattr(TeacherCache, "fill", refused)
    with pytest.raises(InputError, match="some of 3 and of 2 tokens"):
        fill([{"input_ids": [1, 2, 3]}, {"input_ids": [1, 2]}])
    usage, room = namedtuple("usage", ["total", "used", "free"]), 10**6
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, room))
    with pytest.raises(InputError, match="make room"):
        fill(some_rows(2000, seed=3))
    with pytest.raises(AssertionError, match="a row has been read"):
        fill(some_rows(seed=3))


def test_random_numbers_do_not_depend_on_what_is_there(folder, tmp_path):
    words = {"teacher_cache_dir": str(tmp_path / "cache"), "max_steps": 2}
    model = make(folder, holds_model=False)
    phases, drawn = [make_trainer("smt", tmp_path / "smt", model, **words).args], []
    for _ in range(2):
        torch.manual_seed(3)
        fill_teacher_caches(model.config.teacher, phases, lambda _: some_rows(), some_rows(5, seed=9))
        drawn.append(torch.rand(4))
    assert torch.equal(*drawn)


def test_a_model_in_shards_reads_no_rows(folder, tmp_path):
    trainer = make_trainer("smt", tmp_path, make(folder), teacher_cache_dir=str(tmp_path / "cache"))
    next(trainer.model.teacher.model.parameters()).ds_id = 3  # as ZeRO-3 marks what it has split
    with pytest.raises(InputError, match=r"ZeRO-3 has split the model .*`fill_teacher_caches` before the training"):
        trainer.train()


def test_the_levels_of_a_curriculum_have_rows_of_their_own(folder, tmp_path):
    levels = Levels([some_rows(length=9, seed=1), some_rows(length=17, seed=2)])
    model = make(folder)
    calls = calls_of(model)
    words = {
        "curriculum_threshold": 100.0,
        "on_policy_mode": "sequential",
        "teacher_cache_dir": str(tmp_path / "cache"),
    }
    trainer = make_trainer("smt", tmp_path / "run", model, rows=levels, **words)
    trainer.train()
    assert sum(calls) == 24 and trainer.pace.level == 1
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_a_run_from_a_complete_cache_holds_no_model(folder, tmp_path, monkeypatch):
    """The composite and its checkpoints have the head of the teacher alone, which says so if it is to read a row."""
    source = str(shutil.copytree(folder, tmp_path / "model"))
    torch.manual_seed(0)
    model = make(source, holds_model=False)
    assert model.teacher.model is None
    words = {"teacher_cache_dir": str(tmp_path / "cache"), "max_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer("smt", tmp_path / "run", model, **words)
    with pytest.raises(InputError, match="lacks rows, and the teacher holds no model"):
        trainer.train()
    phases = [trainer.args, make_trainer("dmt", tmp_path / "dmt", model, **words).args]
    fill_teacher_caches(model.config.teacher, phases, lambda _: some_rows(), trainer.eval_dataset)
    assert not model.config.teacher.holds_model

    def refused(*arguments, **words):
        raise AssertionError("the model has been loaded")

    with monkeypatch.context() as patch:
        patch.setattr("smt_hf.teachers.pretrained.load_model", refused)
        patch.setattr("smt_hf.teachers.pretrained.empty_model", refused)
        fill_teacher_caches(model.config.teacher, phases, lambda _: some_rows(), trainer.eval_dataset)
        for way in ("smt", "dmt"):
            trainer = make_trainer(way, tmp_path / way, model, **words)
            trainer.train()
            assert {"eval_drift", "eval_distillation", "eval_teacher_forced"} < trainer.evaluate().keys()
        rows = np.array(some_rows(4, seed=8)["input_ids"])
        found = evaluate_rows(model, rows, rows)
        assert "drift" not in found and "teacher" not in found["geometry"] and "loss_by_age" not in found
        trainer.save_model(str(tmp_path / "saved"))
        held = load_file(tmp_path / "saved" / "model.safetensors")
        assert {name for name in held if name.startswith("teacher.")} == {
            "teacher.memory_proj.weight", "teacher.norms.0.weight", "teacher.norms.1.weight"
        }  # fmt: skip
        again = SMTForPreTraining.from_pretrained(tmp_path / "saved")
    arguments = (torch.randint(VOCAB, (2, 6)), torch.arange(7), torch.zeros(4, 8))
    with pytest.raises(InputError, match=r"trained from a cache and holds no model.*`attach_model\(\)`.*model"):
        again.teacher(*arguments)
    again.teacher.attach_model()
    whole = make(source)
    whole.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(again.teacher(*arguments), whole.teacher(*arguments))
    again.save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(
        SMTForPreTraining.from_pretrained(tmp_path / "whole").teacher(*arguments), whole.teacher(*arguments)
    )


def test_too_little_room(folder, tmp_path, monkeypatch, capsys):
    """The size is said before anything is written, and nothing is left behind."""
    config = make(folder).config.teacher
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 12 * 17 * 2 * WIDTH * 2 - 1))
    cache = TeacherCache(tmp_path, config, some_rows(), {"top_k": 4, "temperature": 1.0})
    assert [part.num_bytes for part in cache.parts] == [12 * 17 * 2 * WIDTH * 2, 12 * 17 * (5 * 2 + 4 * 2)]
    with pytest.raises(InputError, match=r"needs 0.000 GB in .*: make room"):
        cache.create()
    assert "12 rows of 16 tokens, 0.000 GB" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "way, settings, rows, message",
    [
        ("smt", {}, [{"input_ids": [1, 2, 3]}, {"input_ids": [1, 2]}], "some of 3 and of 2 tokens"),
        ("dmt", {"label_cache_dir": "x", "distillation_weight": 0.0}, None, "leave `label_cache_dir` out"),
        ("dmt", {"on_policy_mode": "aggregate"}, None, "exchanges rows"),
    ],
)
def test_what_cannot_be_cached(way, settings, rows, message, folder, tmp_path):
    with pytest.raises(InputError, match=message):
        make_trainer(way, tmp_path, make(folder), rows, teacher_cache_dir=str(tmp_path / "cache"), **settings).train()


def test_teachers_that_change_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match=r"leave `teacher_lora_r` out.*`label_cache_dir`"):
        TeacherCache(tmp_path, make(folder, lora_r=2).config.teacher, some_rows())
    with pytest.raises(InputError, match=r"\(smt_teacher\) is trained.*`label_cache_dir`"):
        TeacherCache(tmp_path, make_composite().config.teacher, some_rows())
    stream = some_rows().to_iterable_dataset()
    with pytest.raises(InputError, match="leave it out with a stream"):
        make_trainer("dmt", tmp_path, make(folder), stream, teacher_cache_dir=str(tmp_path / "cache")).train()

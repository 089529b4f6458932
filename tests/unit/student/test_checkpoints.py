"""Checkpoints: what is written, what loads, as which class, in which precision."""

import json
import os
import re
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import smt_hf
from smt_hf import (
    SMTRecurrentConfig,
    SMTRecurrentForCausalLM,
    SMTRecurrentForSequenceClassification,
    SMTRecurrentModel,
)
from smt_hf.student.modeling_smt_recurrent import CACHE_NAME
from tests.conftest import VOCAB, make_student

CODE = {path.name for path in (Path(smt_hf.student.__file__).parent).glob("*_smt_recurrent.py")}


def test_save_and_load(student, tokens, tmp_path):
    student.save_pretrained(tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"config.json", "generation_config.json", "model.safetensors", *CODE}
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path), SMTRecurrentForCausalLM.from_pretrained(tmp_path)):
        assert type(loaded) is SMTRecurrentForCausalLM
        assert torch.equal(loaded(tokens).logits, student(tokens).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is SMTRecurrentModel
    assert torch.equal(base(tokens).last_hidden_state, student.model(tokens).last_hidden_state)
    assert type(AutoConfig.from_pretrained(tmp_path)) is SMTRecurrentConfig
    names = {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"}
    assert set(json.loads((tmp_path / "config.json").read_text())["auto_map"]) == names


def test_a_loaded_model_saves_the_code_again(student, tmp_path):
    student.save_pretrained(tmp_path / "first")
    AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert {path.name for path in (tmp_path / "second").iterdir()} >= CODE


def test_shards(student, tokens, tmp_path):
    student.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1 and (tmp_path / "model.safetensors.index.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, student(tokens).logits)
    shards[0].unlink()
    with pytest.raises(OSError):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_files_have_the_permissions_of_the_user(student, tokens, tmp_path):
    """safetensors makes files that their owner alone can read; servers and colleagues read them, too."""
    before = os.umask(0o027)
    try:
        student.save_pretrained(tmp_path / "whole")
        student.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
        getattr(student(tokens, use_cache=True), CACHE_NAME).save(tmp_path / "state.safetensors")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".safetensors"]) > 3
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in files} == {path.name: 0o640 for path in files}


def test_weights_of_an_earlier_release(tokens, tmp_path):
    """The projections of the GRU were once numbered by their lists."""
    student = make_student(updater_type="gru")
    student.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    old = {re.sub(r"\.(input|state)_proj_(\d)", r".\2", name): value for name, value in weights.items()}
    assert old.keys() != weights.keys() and "model.updater.input_projs.0.weight" in old
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(loaded(tokens).logits, student(tokens).logits)
    other = SMTRecurrentForCausalLM(student.config)
    other.load_state_dict(old)
    assert torch.equal(other(tokens).logits, student(tokens).logits)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(tokens).logits, student(tokens).logits)


def test_bfloat16(student, tokens, tmp_path):
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    outputs = loaded(tokens, use_cache=True)
    assert outputs.logits.dtype == torch.bfloat16 and getattr(outputs, CACHE_NAME).memory.dtype == torch.float32
    agree = (outputs.logits.argmax(-1) == student(tokens).logits.argmax(-1)).float().mean()
    assert agree > 0.7
    assert loaded.generate(tokens, max_new_tokens=3, pad_token_id=0).shape == (3, 15)


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_device_map(student, tokens, tmp_path, device_map):
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        loaded.generate(tokens.to(loaded.device), **settings).cpu(), student.generate(tokens, **settings)
    )


def test_from_config(student, tokens):
    classes = {
        AutoModelForCausalLM: SMTRecurrentForCausalLM,
        AutoModel: SMTRecurrentModel,
        AutoModelForSequenceClassification: SMTRecurrentForSequenceClassification,
    }
    for auto, own in classes.items():
        models = []
        for build in (auto.from_config, own):
            torch.manual_seed(5)
            models.append(build(student.config))
        assert type(models[0]) is own
        for name, value in models[0].state_dict().items():
            assert torch.equal(value, models[1].state_dict()[name]), name


def test_missing_and_unexpected_weights(student, tokens, tmp_path):
    student.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.initial_memory"]
    save_file({**weights, "model.more": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {"model.initial_memory"}
    assert set(report["unexpected_keys"]) == {"model.more"}
    born = loaded.model.initial_memory
    assert born.isfinite().all() and 0.5 < born.std() < 1.5
    assert loaded(tokens).logits.isfinite().all()


def test_tied_embeddings(tokens, tmp_path):
    tied = make_student(tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    tied.save_pretrained(tmp_path)
    loaded = SMTRecurrentForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, tied(tokens).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [VOCAB + 11, VOCAB - 5])
def test_resize_token_embeddings(tokens, tmp_path, tied, size):
    student = make_student(tie_word_embeddings=tied)
    tokens = tokens % (VOCAB - 5)
    before = student(tokens).logits
    student.resize_token_embeddings(size)
    assert student.config.vocab_size == student.get_output_embeddings().weight.shape[0] == size
    kept = min(size, VOCAB)
    torch.testing.assert_close(student(tokens).logits[..., :kept], before[..., :kept])
    assert (student.lm_head.weight is student.get_input_embeddings().weight) == tied
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, student(tokens).logits)
    labels = tokens.clone()
    assert student(tokens, labels=labels).loss.isfinite()


def test_a_classifier_from_a_language_model(student, tokens, tmp_path):
    student.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(loaded) is SMTRecurrentForSequenceClassification
    for name, value in student.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name
    loaded.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier").eval()
    assert again.config.num_labels == 3
    assert torch.equal(again(tokens).logits, loaded.eval()(tokens).logits)

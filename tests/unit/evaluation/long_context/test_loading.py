"""Checkpoints, tokenizers, and what is refused of both."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from smt_hf.data import byte_tokenizer, number_tokenizer
from smt_hf.errors import InputError
from smt_hf.evaluation.long_context.loading import LanguageModel, load_language_model
from tests.language_models import language_model, make_gpt2, make_llama, make_mamba, make_ours, make_rwkv


@pytest.fixture(params=[make_ours, make_llama, make_mamba], ids=["ours", "llama", "mamba"])
def checkpoint(request, tmp_path):
    request.param().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_any_causal_model_is_loaded(checkpoint):
    loaded = load_language_model(str(checkpoint), device="cpu")
    assert not loaded.model.training and loaded.model.dtype == torch.float32
    assert loaded.count("abc é") == 6 and loaded.length_unit == "bytes"
    assert load_language_model(str(checkpoint), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_what_cannot_be_loaded_is_told(tmp_path, checkpoint):
    with pytest.raises(InputError, match="no causal language model could be loaded from 'nowhere'"):
        load_language_model("nowhere")
    with pytest.raises(InputError, match="unknown `dtype` 'int8'"):
        load_language_model(str(checkpoint), dtype="int8")
    with pytest.raises(InputError, match="no `device` 'tpu7'"):
        load_language_model(str(checkpoint), device="tpu7")
    with pytest.raises(InputError, match=r"no tokenizer could be loaded from 'nowhere': .*--tokenizer_name"):
        load_language_model(str(checkpoint), "nowhere")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(InputError, match="lacks weights of its configuration"):
        load_language_model(str(checkpoint))


def test_a_missing_tokenizer_is_told(tmp_path):
    make_llama().save_pretrained(tmp_path)  # for which transformers would make a tokenizer without words
    with pytest.raises(InputError, match="tokenizer"):
        load_language_model(str(tmp_path), device="cpu")


def test_a_tokenizer_that_does_not_belong_is_told(tmp_path):
    make_ours().save_pretrained(tmp_path / "model")
    number_tokenizer(30).save_pretrained(tmp_path / "numbers")
    with pytest.raises(InputError, match="cannot write text"):
        load_language_model(str(tmp_path / "model"), str(tmp_path / "numbers"), device="cpu")
    larger = byte_tokenizer()
    larger.add_tokens(["more"])
    larger.save_pretrained(tmp_path / "larger")
    with pytest.raises(InputError, match="259 tokens, the model 258 embeddings"):
        load_language_model(str(tmp_path / "model"), str(tmp_path / "larger"), device="cpu")


def test_positions_limit_what_is_read():
    language_model(make_ours()).check_length(10**6)
    language_model(make_mamba()).check_length(10**6)
    language_model(make_rwkv()).check_length(10**6)
    for model in (make_llama(), make_gpt2()):
        language_model(model).check_length(512)
        with pytest.raises(InputError, match="tiny has 512 positions, and prompt and answer have 513 tokens"):
            language_model(model).check_length(513)


def words_tokenizer():
    """A word with the space before it is one token."""
    words = ["<s>", "</s>", " ", "is", "it", "red", " red"]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="it"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" red", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def test_continuations_are_the_tokens_after_the_prompt():
    loaded = language_model(make_ours())
    assert loaded.continuation("The number is", " 42") == ([32, 52, 50], 1)
    assert loaded.continuation("The number is ", "42") == ([52, 50], 0)
    assert loaded.continuation("x", "  ") == ([32, 32], 1)  # something is left to score
    assert loaded.continuation("x" * 5000, "ab") == ([97, 98], 0)
    of_words = LanguageModel("tiny", make_ours(), words_tokenizer())
    assert of_words.continuation("is", " red") == ([6], 0)  # one token, not a space and a word


def test_prompts_keep_the_beginning_and_lose_the_end():
    tokenizer = byte_tokenizer()
    loaded = LanguageModel("tiny", make_ours(), tokenizer)
    assert loaded.prompt("ab") == [97, 98]
    special = [("<|endoftext|>", 256)]
    tokenizer._tokenizer.post_processor = TemplateProcessing("<|endoftext|> $A <|endoftext|>", special_tokens=special)
    assert loaded.prompt("ab") == [256, 97, 98] and loaded.encoded("ab") == [97, 98]


def test_ends():
    loaded = language_model(make_ours())
    assert loaded.ends == {256}
    loaded.model.generation_config.eos_token_id = [7, 256]
    assert loaded.ends == {7, 256}


def test_the_digest_tells_weights_apart():
    first, second = language_model(make_ours()), language_model(make_ours())
    assert first.weights_digest() == second.weights_digest()
    with torch.no_grad():
        second.model.lm_head.weight[0, 0] += 1e-3
    assert first.weights_digest() != second.weights_digest()

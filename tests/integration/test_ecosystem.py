"""A checkpoint in the hands of transformers: pipelines, streamers, chat, the continuation script."""

import json
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from smt_hf import SMTRecurrentCache
from smt_hf.data import byte_tokenizer
from smt_hf.errors import InputError
from smt_hf.experiments import continue_text
from smt_hf.experiments.continuation import parse_generate
from smt_hf.experiments.finetuning import load_checkpoint
from tests.conftest import UPDATERS, make_student

ROOT = Path(__file__).parents[2]
CHAT = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(params=UPDATERS)
def checkpoint(request, tmp_path):
    folder = tmp_path / "checkpoint"
    make_student(vocab_size=258, updater_type=request.param, eos_token_id=256, pad_token_id=257).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


def continued(model, tokenizer, prompt):
    inputs = tokenizer(prompt, return_tensors="pt")
    return tokenizer.decode(model.generate(**inputs, **GREEDY)[0], skip_special_tokens=True)


def test_text_generation_pipeline(checkpoint):
    """One prompt, several of unequal length in a batch, a conversation."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    generator = pipeline("text-generation", model=str(checkpoint))
    prompts = ["def main(", "a", "return self.value"]
    expected = [continued(model, tokenizer, prompt) for prompt in prompts]
    assert generator(prompts[0], **GREEDY)[0]["generated_text"] == expected[0]
    together = generator(prompts, batch_size=3, **GREEDY)
    assert [entry[0]["generated_text"] for entry in together] == expected
    (answer,) = generator([[{"role": "user", "content": "hi"}]], **GREEDY)
    written = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    whole = continued(model, tokenizer, written)
    assert answer[0]["generated_text"][-1] == {"role": "assistant", "content": whole[len(written) :]}


def test_text_classification_pipeline(checkpoint):
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=2)
    classifier = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(checkpoint))
    texts = ["a short one", "x", "one that is quite a bit longer"]
    alone = [classifier(text)[0]["score"] for text in texts]
    together = [entry["score"] for entry in classifier(texts, batch_size=3)]
    assert together == pytest.approx(alone, abs=1e-5) and {"LABEL_0", "LABEL_1"} >= {classifier("a")[0]["label"]}


def test_feature_extraction_pipeline(checkpoint):
    extractor = pipeline("feature-extraction", model=str(checkpoint))
    assert torch.tensor(extractor("abc")).shape == (1, 3, 16)


def test_streamers(checkpoint, capsys):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    inputs = tokenizer("def main(", return_tensors="pt")
    expected = tokenizer.decode(model.generate(**inputs, **GREEDY)[0])
    model.generate(**inputs, **GREEDY, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out == expected + "\n"
    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    thread = Thread(target=model.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


def test_continuation(checkpoint, tmp_path, capsys):
    """The printed text is what generate() makes; in two halves with a saved state it is the same text."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    words = ["--checkpoint", str(checkpoint), "--temperature", "0", "--prompt", "def main("]
    state = tmp_path / "state.safetensors"
    first = continue_text(parse_generate([*words, "--max_new_tokens", "6", "--save_state", str(state)]))
    assert capsys.readouterr().out.startswith("def main(")
    ids = model.generate(**tokenizer("def main(", return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert first == tokenizer.decode(ids[0, 9:])
    assert SMTRecurrentCache.load(state).get_seq_length() == 9 + 6
    ids = torch.cat([ids, tokenizer("x = ", return_tensors="pt")["input_ids"]], 1)
    expected = tokenizer.decode(model.generate(ids, **GREEDY)[0, ids.shape[1] :])
    rest = continue_text(parse_generate([*words[:-1], "x = ", "--max_new_tokens", "8", "--load_state", str(state)]))
    assert rest == expected
    with pytest.raises(InputError, match="overwrite"):
        continue_text(parse_generate([*words, "--save_state", str(state)]))


def test_continuation_refuses(tmp_path, capsys):
    folder = tmp_path / "checkpoint"
    make_student(vocab_size=258).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    other = SMTRecurrentCache()
    other.layers[0].update_memory(torch.zeros(1, 1, 5, 7))
    other.save(tmp_path / "other.safetensors")
    given = ["--checkpoint", str(folder), "--prompt", "a"]
    for words, message in (
        ([], "name a checkpoint"),
        (["--checkpoint", str(tmp_path), "--prompt", "a"], "no checkpoint"),
        ([*given[:3], "a\udce9"], "not text in UTF-8"),
        ([*given, "--temperature", "-1"], "`temperature` must be a number of 0 or more, got -1"),
        ([*given, "--temperature", "nan"], "`temperature`"),
        ([*given, "--top_p", "0"], "`top_p` must be above 0"),
        ([*given, "--top_p", "1.5"], "`top_p`"),
        ([*given, "--max_new_tokens", "0"], "`max_new_tokens` must be 1 or more"),
        ([*given, "--seed", "-1"], "`seed`"),
        ([*given, "--save_state", str(tmp_path / "none" / "state")], "`save_state` .* cannot be written"),
        ([*given, "--save_state", str(tmp_path)], "`save_state` .* cannot be written"),
        ([*given, "--load_state", str(tmp_path / "none")], "`load_state` .* cannot be read"),
        ([*given, "--load_state", str(folder / "config.json")], "`load_state` .* not a safetensors file"),
        ([*given, "--load_state", str(tmp_path / "other.safetensors")], "5 memory tokens of width 7"),
    ):
        with pytest.raises(InputError, match=message):
            continue_text(parse_generate(words))
    assert capsys.readouterr().out == ""  # all of it before a token is generated


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_truncated_checkpoint_is_named(tmp_path, name):
    make_student(vocab_size=258).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"no checkpoint could be loaded from .*complete"):
        load_checkpoint(str(tmp_path))


def test_the_prompt_is_any_text(capsys):
    given = ["--checkpoint", "x"]
    for words in (["--prompt", "--x = 3"], ["--prompt=--x = 3"]):
        assert parse_generate([*given, *words, "--seed", "3"]).prompt == "--x = 3"
    assert parse_generate(["--prompt", "--help", *given]).prompt == "--help"
    assert parse_generate([*given, "--prompt=hello"]).prompt == "hello" and parse_generate(["--prompt="]).prompt == ""
    for words, message in (
        (["--prompt"], "needs a value"),
        (["--prompt", "hello", "world"], "unexpected argument 'world'"),
        (["--promt", "a"], "did you mean 'prompt'"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_generate(words)
    with pytest.raises(SystemExit):
        parse_generate(["--help"])
    assert "--save_state" in capsys.readouterr().out


@pytest.mark.processes
def test_the_script_streams(tmp_path):
    folder = tmp_path / "checkpoint"
    make_student(vocab_size=258).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    words = [sys.executable, str(ROOT / "recipes" / "generate.py"), "--checkpoint", str(folder), "--prompt", "-"]
    done = subprocess.run([*words, "--max_new_tokens", "5"], input="from here", capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("from here"), done.stderr
    assert json.loads((folder / "config.json").read_text())["model_type"] == "smt_recurrent"

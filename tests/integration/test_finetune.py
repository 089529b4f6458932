"""Fine-tuning as a user runs it, on small checkpoints and files."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from smt_hf.data import byte_tokenizer
from smt_hf.experiments import finetune
from smt_hf.experiments.finetuning import parse_finetune
from tests.conftest import make_composite, make_student

QUICK = ["--max_steps", "30", "--learning_rate", "0.01", "--disable_tqdm", "true", "--num_threads", "1"]


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    make_student(vocab_size=258, updater_type="mlp").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def run(*words, cwd, monkeypatch, quick=QUICK):
    monkeypatch.chdir(cwd)
    return finetune(*parse_finetune([*map(str, words), *quick]))


def sums(path, num=60):
    rows = [{"prompt": f"{n % 7}+{n % 5}=", "completion": str(n % 7 + n % 5)} for n in range(num)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("use_peft", [False, True])
def test_instructions(checkpoint, tmp_path, monkeypatch, capsys, use_peft):
    words = ["--checkpoint", checkpoint, "--train_file", sums(tmp_path / "sums.jsonl"), "--output_dir", "out"]
    words += ["--use_peft", "--lora_r", "4"] if use_peft else []
    results = run(*words, cwd=tmp_path, monkeypatch=monkeypatch)
    before, after = (results["arms"][arm]["bits_per_byte"] for arm in ("checkpoint", "finetuned"))
    assert after < before - 0.5 and results["base_model"] == "checkpoint"
    printed = capsys.readouterr().out
    assert "54 examples, 6 held out" in printed and f"{after:.3f}" in printed and "teacher" not in printed
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "student")
    tokens = torch.randint(0, 258, (2, 9))
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "student").eos_token_id == 256
    card = ModelCard.load(tmp_path / "out" / "student" / "README.md")
    assert "fine-tuned" in card.text and "`checkpoint`" in card.text and str(tmp_path) not in card.content
    assert ("LoRA of rank 4" in card.text) == use_peft == (tmp_path / "out" / "adapter").exists()
    if use_peft:
        base = AutoModelForCausalLM.from_pretrained(checkpoint)
        adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
        torch.testing.assert_close(adapted(input_ids=tokens).logits, student(tokens).logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="not empty"):
        run(*words, cwd=tmp_path, monkeypatch=monkeypatch)
    if use_peft:
        shutil.rmtree(tmp_path / "out" / "adapter")
        shutil.rmtree(tmp_path / "out" / "bptt" / "adapter")  # cut off between the last checkpoint and the adapter
    again = run(*words, "--resume_from_checkpoint", cwd=tmp_path, monkeypatch=monkeypatch)
    assert again["arms"]["finetuned"]["bits_per_byte"] == pytest.approx(after, rel=1e-6)
    assert use_peft == (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
    with pytest.raises(ValueError, match="lora.alpha" if use_peft else "learning_rate"):
        more = ["--lora_alpha", "3"] if use_peft else ["--weight_decay", "0.3", "--learning_rate", "0.02"]
        run(*words, "--resume_from_checkpoint", *more, cwd=tmp_path, monkeypatch=monkeypatch, quick=QUICK[:2])


def test_examples_left_out_are_named(checkpoint, tmp_path, monkeypatch, capsys):
    """Before the split, by their lines in the file; `--train_file` takes the names that a shell makes of a glob."""
    path = sums(tmp_path / "sums.jsonl", 20)
    lines = path.read_text().splitlines()
    lines[2] = json.dumps({"prompt": "1+1=", "completion": ""})
    lines[4:4] = ["", json.dumps({"prompt": "x" * 600, "completion": "y"})]
    path.write_text("\n".join(lines))
    words = ["--checkpoint", checkpoint, "--train_file", path, sums(tmp_path / "more.jsonl", 20), "--output_dir", "out"]
    results = run(*words, cwd=tmp_path, monkeypatch=monkeypatch, quick=["--max_steps", "1", *QUICK[4:]])
    printed = capsys.readouterr().out
    assert "35 examples, 4 held out" in printed and results["data"]["name"] == "sums.jsonl and 1 more"
    assert f"left out 1 with no answer: {path}, line 3\n" in printed
    assert f"left out 1 with too many tokens: {path}, line 6\n" in printed


def test_text(checkpoint, text_file, tmp_path, monkeypatch):
    words = ["--checkpoint", checkpoint, "--train_file", text_file, "--output_dir", "out", "--context_length", "64"]
    results = run(*words, cwd=tmp_path, monkeypatch=monkeypatch)
    arms = results["arms"]
    assert arms["finetuned"]["bits_per_byte"] < arms["checkpoint"]["bits_per_byte"] - 0.5
    assert results["task"]["name"] == "text"
    assert {"student", "bptt", "eval_results.json", "curves.png", "run.json"} == {
        path.name for path in (tmp_path / "out").iterdir()
    }


def test_a_tied_checkpoint_of_bfloat16(tmp_path, monkeypatch):
    """It is read whole, and trained and exported in full precision."""
    student = make_student(vocab_size=258, updater_type="mlp", tie_word_embeddings=True)
    student.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    byte_tokenizer().save_pretrained(tmp_path / "half")
    words = ["--checkpoint", tmp_path / "half", "--train_file", sums(tmp_path / "sums.jsonl"), "--output_dir", "out"]
    arms = run(*words, cwd=tmp_path, monkeypatch=monkeypatch)["arms"]
    assert arms["finetuned"]["bits_per_byte"] < arms["checkpoint"]["bits_per_byte"] - 0.5
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "student")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_steps_that_divide(checkpoint):
    arguments = parse_finetune(["--checkpoint", "x", "--train_file", "y", "--context_length", "100"])[1]
    assert arguments.context_length == 100 and arguments.transition_steps == 50


def test_bad_input(checkpoint, tmp_path, monkeypatch):
    few = sums(tmp_path / "few.jsonl", 4)
    small = tmp_path / "small"
    make_student(vocab_size=40).save_pretrained(small)
    byte_tokenizer().save_pretrained(small)
    llama, composite, broken = (tmp_path / name for name in ("llama", "composite", "broken"))
    sizes = {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1)).save_pretrained(llama)
    make_composite().save_pretrained(composite)
    shutil.copytree(checkpoint, broken)
    weights = load_file(broken / "model.safetensors")
    del weights["model.initial_memory"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    files = {
        "sharegpt": {"conversations": [{"from": "human", "value": "a"}]},
        "alpaca": {"instruction": "a", "input": "", "output": "b"},
        "role": {"messages": [{"content": "a"}]},
        "empty": {"prompt": "a", "completion": ""},
        "both": {"text": "a", "body": "b"},
    }
    for name, row in files.items():
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 12)
    of = lambda name: ["--checkpoint", checkpoint, "--train_file", tmp_path / f"{name}.jsonl"]  # noqa: E731
    cases = [
        (of("sharegpt"), "ShareGPT"),
        (of("alpaca"), "Alpaca"),
        (of("role"), r"role\.jsonl, line 1: message 1 of `messages` has no `role`"),
        (of("empty"), "12 have no answer"),
        ([*of("both"), "--text_column", "boddy"], "needs a column 'boddy'"),
        ([*of("few"), "--validation_file", tmp_path / "both.jsonl"], r"both\.jsonl, line 1 has neither `messages`"),
        ([*of("few"), "--lora_r", "2"], "`lora_r` has no effect without `use_peft`"),
        ([], "--checkpoint DIR_OR_REPO"),
        (["--checkpoint", tmp_path / "missing", "--train_file", few], "no checkpoint"),
        (["--checkpoint", checkpoint, "--train_file", few], "ten or more"),
        (["--checkpoint", small, "--train_file", sums(tmp_path / "sums.jsonl")], "resize_token_embeddings"),
        (["--checkpoint", checkpoint, "--train_file", few, "--lora_q", "3"], "did you mean 'lora_r'"),
        (["--checkpoint", checkpoint, "--train_file", few, "--use_peft", "--lora_r", "0"], "rank"),
        (["--checkpoint"], "needs a value"),
        (["--checkpoint", llama, "--train_file", few], "it is a llama"),
        (["--checkpoint", composite, "--train_file", few], "`student` folder inside"),
        (["--checkpoint", broken, "--train_file", few], "does not hold the weights"),
        (["--checkpoint", checkpoint, "--train_file", few, "--num_train_epochs", "3"], "max_steps"),
        (["--checkpoint", checkpoint, "--train_file", few, "--push_to_hub"], "hub_model_id"),
    ]
    for words, message in cases:
        with pytest.raises(ValueError, match=message):
            run(*words, "--output_dir", "none", cwd=tmp_path, monkeypatch=monkeypatch)
    assert not (tmp_path / "none").exists()

"""What a run leaves behind is complete or absent, and says where it comes from."""

import json
import re
import subprocess

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

from smt_hf.data import byte_tokenizer
from smt_hf.publishing import provenance
from smt_hf.publishing.export import export_student, write_json
from tests.conftest import make_student


def test_json_is_complete_or_absent(tmp_path):
    path = tmp_path / "results.json"
    write_json({"a": 1}, path)
    with pytest.raises(ValueError):
        write_json({"a": float("nan")}, path)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def test_a_student_is_exported_whole_before_there_are_results(tmp_path, monkeypatch):
    """An export that fails leaves no folder, or the earlier one; a later one takes its place."""
    folder, tokenizer = tmp_path / "student", byte_tokenizer()

    def fail(*_):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "save_pretrained", fail, raising=False)
        with pytest.raises(OSError, match="disk is full"):
            export_student(make_student(vocab_size=258), tokenizer, folder)
        assert not folder.exists()
    export_student(make_student(vocab_size=258), tokenizer, folder)
    (folder / "stale.txt").write_text("x")
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "save_pretrained", fail, raising=False)
        with pytest.raises(OSError, match="disk is full"):
            export_student(make_student(vocab_size=260), tokenizer, folder)
        assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == 258
    export_student(make_student(vocab_size=260), tokenizer, folder)
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == 260
    assert [entry.name for entry in tmp_path.iterdir()] == ["student"] and not (folder / "stale.txt").exists()


def test_several_tokens_that_end_a_text_are_kept(tmp_path):
    """Those of a chat model, through a second export of the loaded student; others than the tokenizer's are not."""
    tokenizer, student = byte_tokenizer(), make_student(vocab_size=258)
    for given, expected in (([256, 10], [256, 10]), ([7, 10], 256), (7, 256)):
        student.generation_config.eos_token_id = given
        export_student(student, tokenizer, tmp_path / "first")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
        export_student(loaded, tokenizer, tmp_path / "second")
        assert GenerationConfig.from_pretrained(tmp_path / "second").eos_token_id == expected


def test_provenance(tmp_path, monkeypatch):
    """The commit is that of our own checkout, not of one that an installed package lies in."""
    assert re.fullmatch(r"[0-9a-f]{12}\+?|unknown", provenance.commit())
    assert set(provenance.run_facts(3)) == {"commit", "hardware", "versions", "num_threads"}
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    (tmp_path / "provenance.py").write_text("")
    assert provenance.commit() == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "another project"]):
        subprocess.run([*git, *words], check=True)
    assert provenance.commit() == "unknown"

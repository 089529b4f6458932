"""Corpora from the standard library, files and local datasets; what is refused."""

import json

import pytest

from smt_hf.data import load_corpus
from smt_hf.data.sources import standard_library_files


def test_standard_library():
    files = standard_library_files()
    assert files == standard_library_files() and len(files) > 200
    assert not any(part in path.as_posix() for path in files for part in ("/idlelib/", "/encodings/", "/test/"))
    corpus = load_corpus()
    assert len(corpus.train) + len(corpus.heldout) == len(files)
    assert corpus.digest == load_corpus().digest
    assert corpus.heldout[0]["text"] == files[3].read_bytes().decode()


def test_one_file_is_cut(text_file):
    corpus = load_corpus(str(text_file))
    text = text_file.read_text()
    assert corpus.train["text"][0] + corpus.heldout["text"][0] == text
    assert abs(len(corpus.heldout["text"][0]) - len(text) / 10) < 2


def test_folder_glob_and_validation_file(tmp_path):
    for number in range(12):
        (tmp_path / f"{number:02}.txt").write_text(f"text {number}")
    folder, pattern = load_corpus(str(tmp_path)), load_corpus(str(tmp_path / "*.txt"))
    assert folder.heldout["text"][:] == ["text 3"] and folder.digest == pattern.digest
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "index").write_bytes(bytes([128, 0]))
    (tmp_path / "__init__.py").write_text("")
    assert load_corpus(str(tmp_path)).digest == folder.digest  # hidden and empty files do not count
    both = load_corpus(str(tmp_path / "0*.txt"), str(tmp_path / "1*.txt"))
    assert both.heldout["text"][:] == ["text 10", "text 11"]


def test_jsonl_and_column(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": f"text {number}"}) + "\n" for number in range(20)))
    corpus = load_corpus(str(path), text_column="body")
    assert len(corpus.train) == 18 and corpus.heldout["text"][:] == ["text 3", "text 13"]
    with pytest.raises(ValueError, match=r"--text_column.*body"):
        load_corpus(str(path))


def test_refusals(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\x80\x81\xff")
    (tmp_path / "zeros.txt").write_bytes(b"a\0b")
    for name, word in (
        ("missing.txt", "no file found"),
        ("empty.txt", "empty"),
        ("binary.txt", "not text"),
        ("zeros.txt", "not text"),
    ):
        with pytest.raises(ValueError, match=word):
            load_corpus(str(tmp_path / name))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    (tmp_path / "numbers.csv").write_text("text\n1\n2\n")
    for name in ("empty.jsonl", "broken.jsonl"):
        with pytest.raises(ValueError, match=name):
            load_corpus(str(tmp_path / name))
    with pytest.raises(ValueError, match="not text"):
        load_corpus(str(tmp_path / "numbers.csv"))
    with pytest.raises(ValueError, match="nobody/nothing"):
        load_corpus(dataset_name="nobody/nothing")
    with pytest.raises(ValueError, match="not both"):
        load_corpus("a", dataset_name="b")

"""Corpora from the standard library, files and local datasets; what is refused."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from smt_hf.data import load_corpus, stream_corpus
from smt_hf.data.sources import standard_library_files
from smt_hf.errors import InputError


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


def rows(num=20, column="text"):
    return "".join(json.dumps({column: f"text {number}"}) + "\n" for number in range(num)).encode()


@pytest.mark.parametrize(
    "name, content",
    [
        ("rows.jsonl.gz", gzip.compress(rows(), mtime=0)),
        ("rows.json.bz2", bz2.compress(rows())),
        ("rows.ndjson.xz", lzma.compress(rows())),
        ("rows.jsonl", b"\xef\xbb\xbf" + rows()),  # a byte order mark is no text
        ("rows.json", json.dumps([{"text": f"text {number}"} for number in range(20)], indent=1).encode()),
        ("rows.csv", b"\xef\xbb\xbftext,id\r\n" + b"".join(b'"text %d",0\r\n' % number for number in range(20))),
        ("rows.tsv", b"id\ttext\n" + b"".join(b"0\ttext %d\n" % number for number in range(20))),
        ("[2024] rows.jsonl", rows()),  # a name, not a glob
        ("blank.jsonl", b'{"text": " "}\n' + rows()),
    ],
)
@pytest.mark.filterwarnings("ignore:.*1 of 21 documents:UserWarning")
def test_formats_and_names(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    corpus = load_corpus(str(tmp_path / name))
    assert corpus.heldout["text"][:] == ["text 3", "text 13"] and len(corpus.train) == 18
    assert corpus.heldout_bytes == len("text 3text 13")
    streamed = stream_corpus(str(tmp_path / name), num_heldout=3)
    assert [row["text"] for row in streamed.train] == [f"text {number}" for number in range(3, 20)]


def test_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"body": [f"text {n}" for n in range(20)], "id": [None] * 20}), path)
    assert load_corpus(str(path), text_column="body").heldout["text"][:] == ["text 3", "text 13"]


def test_several_files_and_a_changed_one(tmp_path):
    names = [tmp_path / f"{number}.txt" for number in range(11)]
    for name in names:
        name.write_text(f"\ufeffin {name.name}")
    corpus = load_corpus([str(name) for name in names])  # as a shell gives them
    assert corpus.heldout["text"][:] == ["in 3.txt"] and corpus.name == "0.txt and 10 more"
    names[3].write_text("IN 3.txt")
    assert load_corpus([str(name) for name in names]).heldout["text"][:] == ["IN 3.txt"]


@pytest.mark.parametrize(
    "line, word",
    [
        ('{"text": ', r"a\.jsonl, line 21 is not valid JSON"),
        ('{"text": 3}', r"a\.jsonl, line 21: column 'text' holds '3' \(int\), not text"),
        ('{"text": null}', r"a\.jsonl, line 21: column 'text' holds null"),
        ('{"body": "a"}', r"a\.jsonl, line 21 has no column 'text'.*body"),
        ('["a"]', r"a\.jsonl, line 21 holds a list, not an object"),
        ('{"text": "\\ud800"}', r"a\.jsonl, line 21: column 'text' holds half a character"),
        ('{"text": "\xe9"}'.encode("latin1"), r"a\.jsonl, line 21 is not valid JSON.*utf-8"),
    ],
)
def test_a_faulty_row_is_named(tmp_path, line, word):
    """Loading ends with its file and line; a stream goes on without it."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(rows() + (line if isinstance(line, bytes) else line.encode()) + b"\n" + rows(2))
    with pytest.raises(InputError, match=word):
        load_corpus(str(path))
    with pytest.warns(UserWarning, match=word):
        corpus = stream_corpus(str(path), num_heldout=2)
        assert len(list(corpus.train)) == 18


@pytest.mark.parametrize(
    "name, content, word",
    [
        ("missing.txt", None, "no file found"),
        ("empty.txt", b"", "empty"),
        ("blank.txt", b" \n", "blank"),
        ("latin.txt", b"caf\xe9", r"latin.txt is not text in UTF-8 \(byte 3"),
        ("zeros.txt", b"a\0b", "zero bytes"),
        ("empty.jsonl", b"\n", "empty.jsonl has no rows"),
        ("broken.json", b"[{]", "broken.json is not valid JSON"),
        ("numbers.jsonl", b'{"text": 1}\n', "line 1: column 'text' holds '1'"),
        ("short.csv", b"id,text\n1,a\n\n2\n", "short.csv, line 4 has 1 cells"),
        ("quote.csv", b'text\na\n"b\nc\n', "quote.csv, line 3 is not valid csv"),
        ("latin.csv", b"text\ncaf\xe9\n", "latin.csv, line 1 or .* UTF-8"),
        ("column.csv", b"id;text\n1;a\n", "--text_column.*id;text"),
        ("broken.parquet", b"PAR1", "broken.parquet cannot be read"),
        ("nulls.parquet", pa.table({"text": ["a", None]}), "nulls.parquet, row 2: column 'text' holds null"),
        ("plain.txt.gz", b"plain", "plain.txt.gz cannot be read"),
        ("cut.txt.gz", gzip.compress(bytes(range(256)) * 20, mtime=0)[:100], "cut.txt.gz cannot be read"),
        ("cut.txt.xz", lzma.compress(bytes(range(256)))[:40], "cut.txt.xz cannot be read"),
        ("packed.jsonl.zst", b"x", "unpack it first"),
        ("packed.tar.gz", b"x", "unpack it first"),
    ],
)
def test_a_faulty_file_is_named(tmp_path, name, content, word):
    if isinstance(content, pa.Table):
        pq.write_table(content, tmp_path / name)
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=word):
        load_corpus(str(tmp_path / name))


def test_a_folder_of_mixed_files(tmp_path):
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "a.jsonl").write_bytes(rows())
    with pytest.raises(InputError, match=r"mixes formats \(.jsonl, .md\)"):
        load_corpus(str(tmp_path))
    assert len(load_corpus(str(tmp_path / "*.jsonl")).train) == 18


def test_a_dataset_of_rows_without_text(tmp_path):
    for name, values, word in (("nulls", ["a", None], "row 2.*20 of 40"), ("numbers", [1, 2], "int64, not text")):
        Dataset.from_dict({"text": values * 20}).to_parquet(tmp_path / name / "train.parquet")
        with pytest.raises(InputError, match=word):
            load_corpus(dataset_name=str(tmp_path / name))


def test_validation_text_that_is_trained_on(tmp_path):
    paths = {name: str(tmp_path / name) for name in ("a.jsonl", "half.jsonl", "a.txt", "part.txt")}
    contents = (rows(), rows(2) + b'{"text": "new"}\n', b"one two three four", b"two three\n")
    for path, content in zip(paths.values(), contents):
        Path(path).write_bytes(content)
    for train, heldout in (("a.jsonl", "a.jsonl"), ("a.txt", "part.txt")):
        with pytest.raises(InputError, match="all text of `validation_file`"):
            load_corpus(paths[train], paths[heldout])
    with pytest.warns(UserWarning, match="2 of 3 documents"):
        load_corpus(paths["a.jsonl"], paths["half.jsonl"])


def test_arguments_that_exclude_each_other(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for arguments, word in (
        ({"train_file": "a", "dataset_name": "b"}, "not both"),
        ({"validation_file": "a"}, "goes with `train_file`"),
        ({"dataset_config_name": "a"}, "goes with `dataset_name`"),
        ({"text_column": "a"}, "`text_column` goes with"),
        ({"train_file": str(tmp_path / "a.txt"), "text_column": "body"}, "plain text, which has no columns"),
        ({"dataset_name": "nobody/nothing"}, "nobody/nothing"),
    ):
        with pytest.raises(InputError, match=word):
            load_corpus(**arguments)

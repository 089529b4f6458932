"""Streams of documents: every document once a pass, by one rank; an exact position; no memory across documents."""

import copy
import json

import numpy as np
import pytest
from datasets import IterableDataset

from smt_hf.data import StreamedRows, byte_tokenizer, stream_corpus
from smt_hf.errors import InputError

NUM = 24


def documents(num=NUM, shards=4):
    def read(places):
        for place in places:
            for index in range(place, num, shards):
                yield {"text": f"document {index} " * (1 + index % 5)}

    return IterableDataset.from_generator(read, gen_kwargs={"places": list(range(shards))})


def stream(rank=0, num_ranks=1, length=10, buffer_size=5, **settings):
    return StreamedRows(documents(), byte_tokenizer(), length, buffer_size, rank=rank, num_ranks=num_ranks, **settings)


def taken(rows, num):
    iterator = iter(rows)
    return [next(iterator) for _ in range(num)]


def text_of(rows):
    """What the rows say, without the token that neighbours share."""
    tokens = np.concatenate([row["input_ids"][:-1] for row in rows])
    return "".join("|" if token == 256 else chr(token) for token in tokens)


def test_every_document_once_a_pass():
    total = sum(len(f"document {index} " * (1 + index % 5)) + 1 for index in range(NUM))
    said = text_of(taken(stream(), 2 * total // 10)).split("|")
    first, second = said[:NUM], said[NUM : 2 * NUM - 1]
    expected = sorted(f"document {index} " * (1 + index % 5) for index in range(NUM))
    assert sorted(first) == expected and set(second) < set(expected) and len(set(second)) == NUM - 1
    assert first[: NUM - 1] != second and first != expected  # another order each time


def test_rows_and_their_documents():
    for row in taken(stream(), 40):
        starts = np.flatnonzero(np.diff(row["document_ids"])) + 1
        assert all(row["input_ids"][starts - 1] == 256)
        assert (row["labels"][starts] == -100).all() and (row["labels"] == -100).sum() == len(starts)
    numbers = [row["example_ids"] for row in taken(stream(1, 3), 5)]
    assert numbers == [1, 4, 7, 10, 13]


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_ranks_share_the_documents(num_ranks):
    said = [text_of(taken(stream(rank, num_ranks), 30)).split("|")[:5] for rank in range(num_ranks)]
    assert all(len(own) == 5 for own in said)
    everything = [text for own in said for text in own]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("cut", [1, 7, 33, 61, 90, 140])
def test_the_position_is_exact(cut):
    """Cut anywhere: while the buffer fills, inside a document, in the last documents of a pass, in later passes."""
    whole = taken(stream(), cut + 60)
    rows = stream()
    taken(rows, cut)
    state = json.loads(json.dumps(rows.state_dict()))
    again = stream()
    again.load_state_dict(state)
    for own, other in zip(whole[cut:], taken(again, 60)):
        for name in own:
            np.testing.assert_array_equal(own[name], other[name])


def test_an_order_of_its_own_for_every_seed():
    assert text_of(taken(stream(seed=1), 20)) != text_of(taken(stream(seed=2), 20))
    in_order = text_of(taken(stream(buffer_size=1), 20)).split("|")
    assert in_order[:3] == ["document 0 ", "document 4 " * 5, "document 8 " * 4]


def test_bad_streams():
    with pytest.raises(ValueError, match="saved by 2 process"):
        stream().load_state_dict(stream(0, 2).state_dict())
    with pytest.raises(ValueError, match="buffer_size"):
        stream(buffer_size=0)
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos_token"):
        StreamedRows(documents(), tokenizer, 10)
    with pytest.raises(ValueError, match=r"too few documents.* each of 4"):
        StreamedRows(documents(3, 1), byte_tokenizer(), 4, rank=3, num_ranks=4)


def test_all_ranks_hear_of_one_without_a_document(monkeypatch):
    """Else the error of the one would be hidden by those of the others, which lose their connection."""
    monkeypatch.setattr("smt_hf.data.packing.gather_object", lambda own: [*own, False])
    with pytest.raises(InputError, match="too few documents"):
        stream(rank=0, num_ranks=2)


def test_a_later_phase_reads_from_the_first_document(tmp_path):
    """Streams made one after the other from shallow copies of one dataset, as the phases of a run make them."""
    for number in range(150):
        (tmp_path / f"{number:03}.txt").write_text(f"document {number} " * 3)
    shared, counts = stream_corpus(str(tmp_path)).train, []
    for _ in range(3):
        rows = StreamedRows(copy.copy(shared), byte_tokenizer(), 10, 1)
        counts.append([row["input_ids"].tolist() for row in taken(rows, 400)])  # more than one pass
    assert counts[0] == counts[1] == counts[2]


def test_resumed_twice():
    """The position of a resumed stream is as good as that of a fresh one, also before it has given a row."""
    whole = taken(stream(), 90)
    state = None
    given = []
    for num in (37, 0, 29, 24):
        rows = stream()
        if state is not None:
            rows.load_state_dict(state)
        given += taken(rows, num) if num else []
        state = json.loads(json.dumps(rows.state_dict()))
    assert len(given) == 90
    for own, other in zip(whole, given):
        np.testing.assert_array_equal(own["input_ids"], other["input_ids"])
        assert own["example_ids"] == other["example_ids"]


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_files(tmp_path, kind):
    texts = [f"text number {index}\n" * 5 for index in range(30)]
    if kind == "text":
        for index, text in enumerate(texts):
            (tmp_path / f"{index:02}.txt").write_text(text)
        corpus = stream_corpus(str(tmp_path), num_heldout=4)
    else:
        for part in (0, 1):
            lines = [json.dumps({"body": text}) for text in [*texts[part::2], texts[0]]]
            (tmp_path / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
        corpus = stream_corpus(str(tmp_path / "*.jsonl"), text_column="body", num_heldout=4)
    train = [row["text"] for row in corpus.train]
    assert len(corpus.heldout) == 4 and not set(train) & set(corpus.heldout["text"])
    assert sorted({*train, *corpus.heldout["text"]}) == sorted(texts)


def test_a_faulty_file_is_left_out(tmp_path):
    """Hours into a run, one bad file is no reason to end it."""
    for name, content in (("a", b"first"), ("b", b"\xff\xfe\x00"), ("c", b"  \n"), ("d", b"last"), ("e", b"")):
        (tmp_path / f"{name}.txt").write_bytes(content)
    with pytest.warns(UserWarning, match=r"left out a file of the stream.*b\.txt is not text"):
        corpus = stream_corpus(str(tmp_path), num_heldout=1)
        assert [row["text"] for row in corpus.train] == ["last"]


def test_bad_sources(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    with pytest.raises(ValueError, match="too few to stream"):
        stream_corpus(str(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match=r"has 0 document.* besides the 2"):
        stream_corpus(str(tmp_path / "a.jsonl"), num_heldout=2)
    with pytest.raises(ValueError, match=r"has 1 document.* and 2 process"):
        stream_corpus(str(tmp_path / "a.jsonl"), num_heldout=1, num_ranks=2)
    with pytest.raises(ValueError, match="no column 'body'"):
        stream_corpus(str(tmp_path / "a.jsonl"), text_column="body")
    with pytest.raises(ValueError, match="one of the two"):
        stream_corpus()

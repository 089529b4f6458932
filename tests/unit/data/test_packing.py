"""Tokens, rows, windows and batches against naive twins."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from smt_hf.data import (
    CarriedWindows,
    EpochSampler,
    IndexedExamples,
    Levels,
    byte_tokenizer,
    collate,
    first_tokens,
    heldout_streams,
    pack,
    tokenize,
)


def documents(*lengths):
    start, rows = 0, []
    for length in lengths:
        rows.append({"input_ids": list(range(start, start + length))})
        start += length
    return Dataset.from_list(rows)


def test_the_first_tokens_of_documents():
    """Whole documents, and the beginning of the one in which the number is reached."""
    documents = Dataset.from_dict({"input_ids": [[1, 2, 3], [4], [5, 6, 7]]})
    expected = {
        1: [[1]],
        3: [[1, 2, 3]],
        4: [[1, 2, 3], [4]],
        6: [[1, 2, 3], [4], [5, 6]],
        9: documents["input_ids"][:],
    }
    assert {most: first_tokens(documents, most)["input_ids"][:] for most in expected} == expected


def test_byte_tokenizer(tmp_path):
    tokenizer = byte_tokenizer()
    everything = bytes(range(256)).decode("latin-1") + "é 漢字\n\t  x"
    encoded = tokenizer(everything)
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert encoded["input_ids"] == list(everything.encode())
    assert tokenizer.decode(encoded["input_ids"]) == everything
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (256, 257, 258)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(everything)["input_ids"] == encoded["input_ids"] and set(loaded("a")) == set(encoded)
    assert not any(path.suffix == ".py" for path in tmp_path.iterdir())


@pytest.mark.parametrize("lengths", [(50,), (7, 1, 30), (3, 3, 3, 3, 3, 3)])
@pytest.mark.parametrize("context_length", [1, 4, 10])
def test_pack(lengths, context_length):
    rows = pack(documents(*lengths), context_length)
    stream = np.arange(sum(lengths))
    expected = [
        stream[begin : begin + context_length + 1] for begin in range(0, len(stream) - context_length, context_length)
    ]
    assert len(rows) == len(expected)
    for row, window in zip(rows, expected):
        assert row["input_ids"].tolist() == window.tolist()


def test_pack_adds_document_starts():
    plain, mixed = pack(documents(*[20] * 50), 6), pack(documents(*[20] * 50), 6, document_start_fraction=0.3, seed=1)
    starts = [row["input_ids"][0] % 20 == 0 for row in mixed]
    assert np.mean([row["input_ids"][0] % 20 == 0 for row in plain]) < 0.15
    assert 0.25 < np.mean(starts) < 0.5
    assert {row["input_ids"][0] for row in plain} <= {row["input_ids"][0] for row in mixed}


def test_pack_refuses_short_text():
    with pytest.raises(ValueError, match="shorter than one training row"):
        pack(documents(5), 5)


def test_heldout_streams():
    streams = heldout_streams(documents(40, 60), 4, 10)
    assert streams.tolist() == [list(range(begin, begin + 11)) for begin in (0, 29, 59, 89)]
    assert heldout_streams(documents(6), 4, 10).tolist() == [list(range(6))]
    with pytest.raises(ValueError, match="two tokens"):
        heldout_streams(documents(1), 4, 10)


def test_epochs():
    rows = IndexedExamples([{"input_ids": [i]} for i in range(5)])
    sampler = EpochSampler(5, seed=3)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first == again and sorted(first) == list(range(5)) and sorted(second) == list(range(5, 10))
    assert [index % 5 for index in second] != first
    assert rows[7] == {"input_ids": [2], "example_ids": 7}


def test_carried_windows():
    """Every stream reads rows from first to last token, windows in order, each token predicted once."""
    rows = [{"input_ids": np.arange(13) + 100 * row} for row in range(6)]
    windows = CarriedWindows(rows, num_streams=3, window=4, num_steps=12, seed=0)
    assert len(windows) == 36
    for stream in range(3):
        previous = None
        for step in range(12):
            example = windows[step * 3 + stream]
            ids, first = example["input_ids"].tolist(), int(example["input_ids"][0])
            assert ids == list(range(first, first + 5)) and example["stream_ids"] == stream
            assert example["is_fresh"] == (first % 100 == 0 or step == 0)
            if not example["is_fresh"]:
                assert first == previous[-1] and example["labels"][0] == -100
            assert example["labels"][1:].tolist() == ids[1:]
            previous = ids
    fresh = [sum(windows[step * 3 + stream]["is_fresh"] for stream in range(3)) for step in range(1, 12)]
    assert max(fresh) == 1  # staggered
    again = CarriedWindows(rows, num_streams=3, window=4, num_steps=12, seed=0)
    assert again[20]["input_ids"].tolist() == windows[20]["input_ids"].tolist()  # from any place on
    with pytest.raises(ValueError, match="multiple of 5"):
        CarriedWindows(rows, 3, 5, 12, 0)
    with pytest.raises(ValueError, match="attention_mask"):
        CarriedWindows([{**row, "attention_mask": np.ones(13)} for row in rows], 3, 4, 12, 0)
    labelled = CarriedWindows([{**row, "labels": -row["input_ids"]} for row in rows], 3, 4, 12, 0)
    example = labelled[20]
    assert example["labels"][1:].tolist() == [-token for token in example["input_ids"][1:].tolist()]


def test_collate():
    batch = collate([{"input_ids": [1, 2, 3], "example_ids": 9}, {"input_ids": [4, 5], "example_ids": 3}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, 5, -100]]
    assert batch["example_ids"].tolist() == [9, 3]
    equal = collate([{"input_ids": [1, 2]}, {"input_ids": [3, 4]}, {"input_ids": [1, 2]}])
    assert "attention_mask" not in equal and torch.equal(equal["labels"], equal["input_ids"])
    numbers = equal["example_ids"].tolist()
    assert numbers[0] == numbers[2] != numbers[1]
    with pytest.raises(ValueError, match="two tokens"):
        collate([{"input_ids": [1]}])


def test_levels():
    easy, hard = [{"input_ids": [1, 2]}, {"input_ids": [3, 4, 5]}], [{"input_ids": [6, 7, 8, 9]}, {"input_ids": [7, 8]}]
    levels = Levels([easy, hard])
    assert len(levels) == 2 and levels[1] == {"levels": [easy[1], hard[1]]}
    numbered = IndexedExamples(levels)
    assert numbered[3] == {"levels": [easy[1], hard[1]], "example_ids": 3}  # the second row of the second epoch
    for unequal in ([], [easy, hard[:1]], [easy, hard, [*hard, *hard]]):
        with pytest.raises(ValueError, match="of one size"):
            Levels(unequal)
    with pytest.raises(ValueError, match="carries_memory"):
        CarriedWindows(levels, num_streams=1, window=1, num_steps=1, seed=0)


def test_collate_levels():
    """A batch a level, each as if it were alone, under the same numbers."""
    easy = [{"input_ids": [1, 2]}, {"input_ids": [3, 4, 5]}, {"input_ids": [1, 2]}]
    hard = [{"input_ids": [6, 7, 8, 9], "labels": [-100, 7, -100, 9]}, *[{"input_ids": [1] * 4, "labels": [1] * 4}] * 2]
    numbered = IndexedExamples(Levels([easy, hard]))
    batch = collate([numbered[number] for number in (4, 0, 5)])
    assert set(batch) == {"levels"} and len(batch["levels"]) == 2
    for rows, got in zip((easy, hard), batch["levels"]):
        expected = collate([{**rows[number % 3], "example_ids": number} for number in (4, 0, 5)])
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(got[name], value), name
        assert got["example_ids"].tolist() == [4, 0, 5]
    assert batch["levels"][0]["input_ids"].shape == (3, 3) and "attention_mask" not in batch["levels"][1]
    without = collate([Levels([easy, hard])[index] for index in range(3)])["levels"][0]["example_ids"].tolist()
    assert without[0] == without[2] != without[1]  # from their content


def test_a_batch_is_read_in_one_go():
    """Rows of a batch, by any level and number == the rows one by one; a dataset is asked once a level."""
    rows = [documents(*[length] * 6).with_format("numpy") for length in (3, 5)]
    numbered = IndexedExamples(Levels(rows))
    indices = [4, 0, 13, 7, 0]
    for together, index in zip(numbered.__getitems__(indices), indices):
        alone = numbered[index]
        assert together["example_ids"] == alone["example_ids"] == index
        for level, (first, second) in enumerate(zip(together["levels"], alone["levels"])):
            expected = list(range((index % 6) * (3, 5)[level], (index % 6 + 1) * (3, 5)[level]))
            assert first["input_ids"].tolist() == second["input_ids"].tolist() == expected
    assert IndexedExamples([{"input_ids": [1, 2]}])[3] == {"input_ids": [1, 2], "example_ids": 3}


def test_a_text_that_spells_a_special_token_is_text():
    rows = tokenize(Dataset.from_dict({"text": ["a<|endoftext|>"]}), byte_tokenizer())
    assert rows[0]["input_ids"] == [*b"a<|endoftext|>", 256]

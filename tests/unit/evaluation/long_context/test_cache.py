"""Samples on disk."""

import json
from dataclasses import replace

import pytest

from smt_hf.data import byte_tokenizer
from smt_hf.evaluation.long_context import LongContextSettings, SampleCache, tasks_of, tokenizer_fingerprint

pytest.importorskip("wonderwords")
pytest.importorskip("nltk")


@pytest.fixture
def task(settings):
    return tasks_of("ruler", ["niah_single_2"], settings)[0]


@pytest.fixture
def cache(tmp_path):
    return SampleCache(tmp_path / "samples")


class Counted:
    """A count of characters that knows how often it was asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self, text):
        self.calls += 1
        return len(text)


def test_samples_are_made_once(cache, task):
    count = Counted()
    made = cache.samples(task, 800, 30, 0, count, "characters")
    calls = count.calls
    assert made == [task.sample(800, index, 0, len) for index in range(30)]
    assert cache.samples(task, 800, 30, 0, count, "characters") == made
    assert cache.samples(task, 800, 4, 0, count, "characters") == made[:4]
    assert count.calls == calls
    (path,) = cache.folder.iterdir()
    assert path == cache.path(task, 800, 0, "characters") and path.name.startswith("ruler_niah_single_2_800_")
    assert len(path.read_text().splitlines()) == 30


def test_an_interrupted_run_goes_on(cache, task):
    def stops(text):
        if stops.left == 0:
            raise KeyboardInterrupt
        stops.left -= 1
        return len(text)

    stops.left = 500
    with pytest.raises(KeyboardInterrupt):
        cache.samples(task, 800, 100, 0, stops, "characters")
    (path,) = cache.folder.iterdir()  # nothing half written is left
    kept = len(path.read_text().splitlines())
    assert kept and kept % 25 == 0
    count = Counted()
    samples = cache.samples(task, 800, kept + 1, 0, count, "characters")
    assert samples[-1] == task.sample(800, kept, 0, len) and count.calls < 60


def test_a_damaged_file_is_used_up_to_its_first_damaged_line(cache, task):
    made = cache.samples(task, 800, 5, 0, len, "characters")
    path = cache.path(task, 800, 0, "characters")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:50], *lines[3:]]))
    assert cache.samples(task, 800, 5, 0, len, "characters") == made
    assert path.read_text().splitlines() == lines


def test_everything_that_changes_samples_changes_the_file(cache, task, book, tmp_path):
    other_book = tmp_path / "other.txt"
    other_book.write_text(book.read_text().replace("ka", "ko"))

    def of(name="niah_single_2", **changes):
        return tasks_of("ruler", [name], LongContextSettings(**{"haystack": [str(book)], **changes}))[0]

    paths = [
        cache.path(of(), 800, 0, "characters"),
        cache.path(of(), 801, 0, "characters"),
        cache.path(of(), 800, 1, "characters"),
        cache.path(of(), 800, 0, "bytes"),
        cache.path(of("niah_single_3"), 800, 0, "characters"),
        cache.path(of("niah_single_1"), 800, 0, "characters"),
        cache.path(of(split="train"), 800, 0, "characters"),
        cache.path(of(haystack=[str(other_book)]), 800, 0, "characters"),
    ]
    stories = {"haystack": [str(book)]}
    for changes in ({}, {"babilong_fact_share": 0.5}, {"babilong_instruction": True}):
        (babilong,) = tasks_of("babilong", ["qa1"], LongContextSettings(**stories, **changes))
        paths.append(cache.path(babilong, 800, 0, "characters"))
    assert len(set(paths)) == len(paths)
    copied = tmp_path / "copied.txt"
    copied.write_text(book.read_text())
    assert cache.path(of(haystack=[str(copied)]), 800, 0, "characters") == paths[0]  # the same text elsewhere


def test_a_task_with_few_samples(cache, tmp_path):
    file = tmp_path / "file.jsonl"
    file.write_text(
        "".join(json.dumps({"id": i, "input": f"Who?\n\nText {i}.", "output": "x"}) + "\n" for i in range(3))
    )
    (task,) = tasks_of("scrolls", ["qasper"], LongContextSettings(scrolls=str(file)))
    assert len(cache.samples(task, 400, 10, 0, len, "characters")) == 3
    file.write_text(file.read_text().replace("Text 1", "Other text"))
    (changed,) = tasks_of("scrolls", ["qasper"], LongContextSettings(scrolls=str(file)))
    contexts = [sample.context for sample in cache.samples(changed, 400, 10, 0, len, "characters")]
    assert "Other text." in contexts


def test_samples_of_all_kinds_come_back_as_they_were(cache, settings):
    for suite, name in (("ruler", "fwe"), ("ruler", "niah_multiquery"), ("babilong", "qa3")):
        (task,) = tasks_of(suite, [name], settings)
        made = cache.samples(task, 2000, 2, 0, len, "characters")
        again = cache.samples(task, 2000, 2, 0, len, "characters")
        assert made == again and task.without_needles(made[0]) == task.without_needles(again[0])
        assert again[0] == replace(made[0])


def test_fingerprints_of_tokenizers(bpe_tokenizer):
    fingerprint = tokenizer_fingerprint(byte_tokenizer())
    assert fingerprint == tokenizer_fingerprint(byte_tokenizer()) != tokenizer_fingerprint(bpe_tokenizer)
    changed = byte_tokenizer()
    changed.add_tokens(["needle"])
    assert tokenizer_fingerprint(changed) != fingerprint

"""The registry, the settings, words and books."""

import random
import sys

import pytest

from smt_hf.command_line import parse
from smt_hf.errors import InputError
from smt_hf.evaluation.long_context import SUITES, LongContextSettings, tasks_of
from smt_hf.evaluation.long_context.haystack import noise_filler, read_haystack
from smt_hf.evaluation.long_context.vocabulary import belongs, draw_key, words


def test_all_tasks_have_a_place():
    assert {suite: len(makers) for suite, makers in SUITES.items()} == {"ruler": 13, "babilong": 3, "scrolls": 7}


def test_unknown_names_are_told_with_the_known_ones():
    with pytest.raises(
        InputError, match=r"unknown suite 'rulr': did you mean 'ruler'. There are ruler, babilong, scrolls"
    ):
        tasks_of("rulr")
    with pytest.raises(
        InputError, match=r"unknown task 'niah_single' of ruler: did you mean 'niah_single_.'. There are niah_s"
    ):
        tasks_of("ruler", ["vt", "niah_single"])


def test_tasks_come_once_and_in_order(settings):
    pytest.importorskip("nltk")
    assert [task.name for task in tasks_of("ruler", ["vt", "niah_single_2", "vt"], settings)] == ["vt", "niah_single_2"]
    tasks = tasks_of("babilong", None, settings)
    assert [(task.name, task.suite, task.metric, task.num_samples) for task in tasks] == [
        (name, "babilong", "accuracy", None) for name in ("qa1", "qa2", "qa3")
    ]


def test_settings_are_flags():
    words = ["--haystack", "a.txt", "b.txt", "--split", "train", "--babilong_fact_share", "0.5", "--scrolls", "data"]
    settings = parse(LongContextSettings, words, "usage")
    assert settings == LongContextSettings("train", ["a.txt", "b.txt"], babilong_fact_share=0.5, scrolls="data")
    with pytest.raises(InputError, match="`split` must be one of train, test, all, got 'dev'"):
        parse(LongContextSettings, ["--split", "dev"], "usage")
    with pytest.raises(InputError, match="`babilong_fact_share` must lie above 0"):
        LongContextSettings(babilong_fact_share=0.0)


def test_halves():
    texts = [str(number) for number in range(4000)]
    train = [text for text in texts if belongs(text, "train")]
    assert 1800 < len(train) < 2200
    assert [text for text in texts if not belongs(text, "test")] == train
    assert all(belongs(text, "all") for text in texts)
    assert belongs("1000000", "train") and belongs("office", "train")  # for ever the same


def test_words():
    pytest.importorskip("wonderwords")
    halves = {split: set(words(split, "nouns", "adjectives", "verbs")) for split in ("train", "test", "all")}
    assert not halves["train"] & halves["test"] and halves["train"] | halves["test"] == halves["all"]
    assert len(halves["all"]) > 8000
    key = draw_key(random.Random(0), "train")
    assert any(
        key == f"{first}-{key[len(first) + 1 :]}" for first in words("train", "adjectives") if key.startswith(first)
    )


def test_packages_that_are_missing(monkeypatch, tmp_path):
    for name in ("wonderwords", "nltk"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r'`wonderwords`: pip install "smt_hf\[eval\]"'):
        words("all", "verbs", "nouns")
    with pytest.raises(InputError, match=r'`nltk`: pip install "smt_hf\[eval\]"'):
        read_haystack([str(tmp_path)])


def test_a_book_of_project_gutenberg(tmp_path):
    pytest.importorskip("nltk")
    (tmp_path / "one.txt").write_text(
        "Licence. Header.\n*** START OF THIS PROJECT GUTENBERG EBOOK ONE ***\n\nIt was\nnight. All  slept.\n"
        "*** END OF THIS PROJECT GUTENBERG EBOOK ONE ***\nMore licence."
    )
    (tmp_path / "two.jsonl").write_text('{"text": "He came. He saw."}\n')
    book = read_haystack([str(tmp_path / "one.txt")])
    assert book.sentences == ("It was night.", "All slept.") and book.digest in repr(book)
    assert read_haystack([str(tmp_path / "two.jsonl")]).sentences == ("He came.", "He saw.")
    assert book.passage(0, 4) == ["It was night.", "All"]
    assert book.passage(1, 4) == ["All slept.", "It was"] and book.passage(0, 0) == []
    assert book.passage(0, 4, keeps=lambda sentence: len(sentence) > 10) == ["It was night.", "It"]
    assert book.filler(1, 20) == "All slept. It was ni"
    (tmp_path / "empty.txt").write_text("  \n")
    with pytest.raises(InputError, match="there is no text in"):
        read_haystack([str(tmp_path / "empty.txt")])


def test_noise_of_any_length():
    assert [len(noise_filler(length)) for length in (0, 1, 89, 90, 500)] == [0, 1, 89, 90, 500]
    assert noise_filler(100).endswith("There and back again. The grass ")

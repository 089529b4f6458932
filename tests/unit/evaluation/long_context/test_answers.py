"""Scores, each by hand."""

import pytest

from smt_hf.evaluation.long_context.answers import any_matched, exact_match, f1, only_label, rouge, share_matched

ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")


def test_matches_of_ruler():
    assert share_matched("It is ABC and 12.", ["abc", "12", "13", "14"]) == 0.5
    assert share_matched("", ["abc"]) == 0
    assert any_matched("It is ABC.", ["abc", "12"]) == 1 and any_matched("It is ABD.", ["abc", "12"]) == 0


@pytest.mark.parametrize(
    ("written", "question", "expected"),
    [
        (" garden", "Where is Mary?", 1),
        ("The most recent location of Mary is the Garden. Not the office.", "Where is Mary?", 1),
        ("garden or office", "Where is Mary?", 0),
        ("office. garden", "Where is Mary?", 0),
        ("garden<context>office", "Where is Mary?", 1),
        ("garden <example> office", "Where is Mary?", 1),
        ("", "Where is Mary?", 0),
        ("Before the office the apple was in the garden.", "Where was the apple before the office?", 1),
        ("Before the office the apple was in the garden.", "Where was the apple before the kitchen?", 0),
    ],
)
def test_accuracy_of_babilong(written, question, expected):
    assert only_label(written, "garden", ROOMS, question) == expected


def test_scores_of_squad():
    assert exact_match("  The Entailment. ", ["Entailment"]) == 1
    assert exact_match("Not an entailment", ["Entailment", "Contradiction"]) == 0
    assert exact_match("a dog", ["cat", "the dog!"]) == 1
    assert f1("the big red dog", ["a red dog", "cat"]) == pytest.approx(0.8)  # 2 of 3 and 2 of 2
    assert f1("dog dog", ["dog"]) == pytest.approx(2 / 3)
    assert f1("", ["dog"]) == 0 and f1("the", ["a"]) == 0


def test_rouge():
    pytest.importorskip("rouge_score")
    scores = rouge("the cat sat", ["the cat slept", "nothing"])
    assert scores["rouge1"] == pytest.approx(2 / 3) and scores["rouge2"] == pytest.approx(1 / 2)
    assert scores["rougeL"] == pytest.approx(2 / 3)
    best = rouge("a b c d", ["a b", "d c b a"])  # each ROUGE takes the reference that is best for it
    assert best["rouge1"] == 1 and best["rouge2"] == pytest.approx(0.5)
    assert rouge("cats", ["cat"])["rouge1"] == 0  # no stemming

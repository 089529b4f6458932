"""Scores of what a model has written, each 0 to 1, as the benchmarks define them."""

import re
import string
from collections import Counter
from collections.abc import Collection, Sequence

from smt_hf.errors import InputError


def share_matched(written: str, answers: Sequence[str]) -> float:
    """RULER's `string_match_all`: the share of the answers that occur in the text, in any case of letters."""
    return sum(answer.lower() in written.lower() for answer in answers) / len(answers)


def any_matched(written: str, answers: Sequence[str]) -> float:
    """RULER's `string_match_part`: whether any answer occurs in the text, in any case of letters."""
    return float(any(answer.lower() in written.lower() for answer in answers))


def only_label(written: str, answer: str, labels: Collection[str], question: str) -> float:
    """BABILong's accuracy: whether the first sentence names the right label and no other.

    Labels that occur in the question do not count.
    """
    sentence = re.split(r"\.|<context>|<example>", written.lower())[0]
    named = {label.lower() for label in labels if label.lower() in sentence and label.lower() not in question.lower()}
    return float(named == {answer.lower()})


def plain_words(text: str) -> list[str]:
    """The words that SQuAD's scores compare: in small letters, without punctuation and articles."""
    letters = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", letters).split()


def exact_match(written: str, answers: Sequence[str]) -> float:
    """SQuAD's exact match: whether the words are those of any answer."""
    return float(any(plain_words(written) == plain_words(answer) for answer in answers))


def f1(written: str, answers: Sequence[str]) -> float:
    """SQuAD's F1: harmonic mean of precision and recall of words, with the best of the answers."""

    def of(answer: str) -> float:
        found, expected = plain_words(written), plain_words(answer)
        num_shared = (Counter(found) & Counter(expected)).total()
        return 2 * num_shared / (len(found) + len(expected)) if num_shared else 0.0

    return max(map(of, answers))


def rouge(written: str, answers: Sequence[str]) -> dict[str, float]:
    """F of ROUGE-1, -2 and -L without stemming, each with the answer that is best for it.

    Raises:
        InputError: `rouge_score` is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        message = 'summaries are scored by the package `rouge_score`: pip install "smt_hf[eval]".'
        raise InputError(message) from error
    scores = RougeScorer(["rouge1", "rouge2", "rougeL"]).score_multi(list(answers), written)
    return {name: float(score.fmeasure) for name, score in scores.items()}

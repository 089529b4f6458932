"""RULER's questions about documents: SQuAD's paragraphs or HotpotQA's articles, those of the answer among others."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from smt_hf.errors import InputError

from .answers import any_matched
from .ruler import RulerTask, in_template
from .sample import Count, Sample, joined, needles_at
from .sizing import largest_sample
from .vocabulary import generator, shuffled

TEMPLATE = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give me "
    "the answer and do not output any other words.\n\nQuestion: "
)


@dataclass(frozen=True)
class Question:
    """A question and the numbers of documents around it."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]  # documents that hold the answer
    near: tuple[int, ...]  # documents that are always there: of HotpotQA, those of the question
    akin: tuple[int, ...]  # documents that are added first: of SQuAD, other paragraphs of the article


@dataclass(frozen=True)
class Questions:
    """All questions of a file, and its documents."""

    digest: str  # SHA-256 of the file, the first 16 hex digits
    documents: tuple[str, ...] = field(repr=False)
    questions: tuple[Question, ...] = field(repr=False)


@dataclass(frozen=True)
class DocumentTask(RulerTask):
    """A question about the documents before it. `split` changes nothing: the caller gives other files."""

    source: Questions
    num_generated: ClassVar[int] = 32
    metric: ClassVar[str] = "string_match_part"

    @property
    def num_samples(self) -> int | None:
        return len(self.source.questions)

    def sample(self, length: int, index: int, seed: int, count: Count) -> Sample:
        documents, questions = self.source.documents, self.source.questions
        if index >= len(questions):
            raise InputError(f"`{self.name}` has {len(questions)} samples: ask for fewer.")
        question = questions[shuffled(len(questions), seed)[index]]
        rng = generator(self.name, seed, index)
        needed = list(dict.fromkeys([*question.gold, *question.near]))
        akin = [number for number in question.akin if number not in needed]
        taken = {*needed, *akin}
        others = [number for number in rng.sample(range(len(documents)), len(documents)) if number not in taken]
        order = [*needed, *rng.sample(akin, len(akin)), *others]
        shuffle_seed = rng.random()

        def build(units: int) -> Sample:
            chosen = order[:units]
            generator(shuffle_seed).shuffle(chosen)
            headings = (f"Document {place}:\n" for place in range(1, units + 1))
            pieces = [
                piece for pair in zip(headings, (documents[number] + "\n\n" for number in chosen)) for piece in pair
            ]
            marked = [2 * place + 1 for place, number in enumerate(chosen) if number in question.gold]
            context, spans = joined(pieces, "", marked)
            prompt, place_of_context = in_template(TEMPLATE, context)
            prompt += question.text + " Answer:"
            facts: dict[str, Any] = {"context": list(place_of_context)}
            facts["replacements"] = [self._filler(order[::-1], end - start) for start, end in spans]
            facts["completion"] = " " + question.answers[0]
            needles = needles_at(spans, place_of_context)
            return Sample(self.name, length, index, prompt, question.answers, needles, facts=facts)

        return largest_sample(build, count, self.num_generated, len(needed), len(order))

    def _filler(self, order: list[int], num_characters: int) -> str:
        """Exactly so many characters of documents."""
        text = ""
        for number in order:
            text += self.source.documents[number] + " "
            if len(text) >= num_characters:
                break
        return text[:num_characters].ljust(num_characters)

    def score(self, sample: Sample, written: str) -> float:
        return any_matched(written, sample.answers)

    def chance(self, sample: Sample) -> float:
        return 0.0

    def shortcut(self, sample: Sample) -> str | None:
        return None


def read_squad(path: str) -> Questions:
    """The answerable questions of SQuAD 2.0.

    Raises:
        InputError: no such file, or not of this format.
    """
    return _read(path, _squad, "SQuAD 2.0 (dev-v2.0.json)")


def read_hotpot(path: str) -> Questions:
    """The questions of HotpotQA, with the ten articles of each.

    Raises:
        InputError: no such file, or not of this format.
    """
    return _read(path, _hotpot, "HotpotQA (hotpot_dev_distractor_v1.json)")


def _read(path: str, parse: Callable[[Any], tuple[list[str], list[Question]]], name: str) -> Questions:
    try:
        content = Path(path).read_bytes()
        documents, questions = parse(json.loads(content))
    except OSError as error:
        raise InputError(f"cannot read {path!r}: {error.strerror}.") from error
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise InputError(f"{path} is not a JSON file in the format of {name}.") from error
    if not questions:
        raise InputError(f"{path} has no question.")
    return Questions(hashlib.sha256(content).hexdigest()[:16], tuple(documents), tuple(questions))


def _squad(content: Any) -> tuple[list[str], list[Question]]:
    articles = [[paragraph["context"] for paragraph in article["paragraphs"]] for article in content["data"]]
    documents = sorted({text for article in articles for text in article})
    number = {text: place for place, text in enumerate(documents)}
    questions = []
    for article, texts in zip(content["data"], articles):
        akin = tuple(number[text] for text in texts)
        for paragraph in article["paragraphs"]:
            gold = (number[paragraph["context"]],)
            for question in paragraph["qas"]:
                if not question["is_impossible"]:
                    answers = tuple(answer["text"] for answer in question["answers"])
                    questions.append(Question(question["question"], answers, gold, (), akin))
    return documents, questions


def _hotpot(content: Any) -> tuple[list[str], list[Question]]:
    def document(title: str, sentences: list[str]) -> str:
        return f"{title}\n{''.join(sentences)}"

    documents = sorted({document(*article) for row in content for article in row["context"]})
    number = {text: place for place, text in enumerate(documents)}
    questions = []
    for row in content:
        of_title = {title: number[document(title, sentences)] for title, sentences in row["context"]}
        told = {title for title, _ in row.get("supporting_facts", [])}
        gold = tuple(place for title, place in of_title.items() if title in told or not told)
        questions.append(Question(row["question"], (row["answer"],), gold, tuple(of_title.values()), ()))
    return documents, questions

"""SCROLLS: seven tasks over long documents, from files that the caller brings.

SCROLLS is Shaham et al. 2022 (https://arxiv.org/abs/2201.03533). Its data sets put the question before the document;
the prompts here put it after the document, as lm-eval's do. The official test set has no answers: the split `test`
reads the validation set.
"""

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

from smt_hf.errors import InputError

from .answers import exact_match, f1, rouge
from .sample import Count, Needle, Sample, replaced
from .sizing import largest_sample
from .vocabulary import shuffled

RELATIONS = ("Not mentioned", "Entailment", "Contradiction")  # labels of ContractNLI
_CHOICE = re.compile(r" *\([A-D]\) *")


@dataclass(frozen=True)
class Document:
    """A text, what is asked about it, and all references."""

    text: str
    question: str  # empty: a summary
    choices: str  # of QuALITY, `(A) ... (D) ...`
    answers: tuple[str, ...]

    @property
    def options(self) -> tuple[str, ...]:
        """The four choices, each on one line."""
        return tuple(" ".join(choice.split()) for choice in _CHOICE.split(self.choices)[1:])


@dataclass(frozen=True)
class Documents:
    """The examples of a task."""

    digest: str  # SHA-256 over the examples, the first 16 hex digits
    examples: tuple[Document, ...] = field(repr=False)


@dataclass(frozen=True)
class ScrollsTask:
    """A task over documents. A document that is longer than the length is cut after its last word that fits.

    The order of the examples is drawn by the seed, so that the first of them are a fair part of all. The needle is the
    whole document; in the control there is another one in its place, as much of it as the first had characters.
    """

    name: str
    documents: Documents
    metric: str
    num_generated: int  # ours; SCROLLS leaves it to the model
    suite: ClassVar[str] = "scrolls"

    @property
    def num_samples(self) -> int | None:
        return len(self.documents.examples)

    def sample(self, length: int, index: int, seed: int, count: Count) -> Sample:
        examples = self.documents.examples
        if index >= len(examples):
            raise InputError(f"`{self.name}` has {len(examples)} samples: ask for fewer.")
        number = shuffled(len(examples), seed)[index]
        document = examples[number]
        ends = [match.end() for match in re.finditer(r"\S+", document.text)]
        labels = RELATIONS if self.name == "contract_nli" else document.options

        def build(units: int) -> Sample:
            text = document.text[: ends[units - 1]]
            needles = (Needle(0, len(text), 0.0),)
            facts = {"context": [0, len(text)], "document": number, "is_whole": units == len(ends)}
            facts["completion"] = " " + document.answers[0]
            prompt = text + self._after(document)
            return Sample(self.name, length, index, prompt, document.answers, needles, labels, facts)

        return largest_sample(build, count, self.num_generated, 1, len(ends), may_be_short=True)

    def _after(self, document: Document) -> str:
        if self.name == "contract_nli":
            return f"\n\nHypothesis: {document.question}\nConclusion:"
        question = document.question or "What is a summary of the preceding text?"
        choices = f"\n{document.choices}" if document.choices else ""
        return f"\n\nQuestion: {question}{choices}\nAnswer:"

    def without_needles(self, sample: Sample) -> Sample:
        needle, number = sample.needles[0], sample.facts["document"]
        examples = self.documents.examples
        others = (examples[(number + step) % len(examples)].text for step in range(1, len(examples)))
        other = next((text for text in others if text != examples[number].text), "")
        size = needle.end - needle.start
        text = (other + "\n") * (size // (len(other) + 1) + 1)
        return replaced(sample, [text[:size]])

    def score(self, sample: Sample, written: str) -> float:
        """Of one sample. For summaries, the mean over samples is not SCROLLS' number: `official` is."""
        return official([self.parts(sample, written)])

    def parts(self, sample: Sample, written: str) -> dict[str, float]:
        """The scores of one sample that `official` takes the means of."""
        if self.metric == "rouge":
            return rouge(written, sample.answers)
        scores: dict[str, Callable[[str, Sequence[str]], float]] = {"f1": f1, "exact_match": exact_match}
        return {self.metric: scores[self.metric](written, sample.answers)}

    def chance(self, sample: Sample) -> float:
        """Of one of the labels, if there are any."""
        return 1 / len(sample.labels) if sample.labels else 0.0

    def shortcut(self, sample: Sample) -> str | None:
        return None


def official(parts: Sequence[dict[str, float]]) -> float:
    """SCROLLS' number for a task, 0 to 1: the geometric mean over the parts of their means over samples."""
    product = 1.0
    for name in parts[0]:
        product *= sum(part[name] for part in parts) / len(parts)
    return product ** (1 / len(parts[0]))


def read_documents(path: str, task: str, split: str) -> Documents:
    """The examples of a task.

    Args:
        path: a folder with `TASK/{train,validation}.jsonl` or `TASK.zip`, or one jsonl file. Of `qmsum`, a file may
            have the rows that QMSum's authors publish, one per meeting.
        split: `train`, or anything else for the validation set.

    Raises:
        InputError: no such file, or rows of another format.
    """
    outputs: dict[str, list[str]] = {}
    inputs: dict[str, str] = {}
    for place, row in _rows(Path(path), task, "train" if split == "train" else "validation"):
        try:
            is_meeting = task == "qmsum" and "meeting_transcripts" in row
            queries = _queries(place, row) if is_meeting else [(row["id"], row["input"], row["output"])]
            for name, text, answer in queries:
                inputs.setdefault(name, text)
                outputs.setdefault(name, []).append(answer.strip())
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{place} is no row of SCROLLS, which has `id`, `input` and `output`.") from error
    examples = tuple(_document(task, inputs[name], tuple(outputs[name])) for name in inputs)
    for name, example in zip(inputs, examples):
        if not example.text:
            raise InputError(f"{path}: the example {name!r} of `{task}` has no document after its question.")
    if not examples:
        raise InputError(f"{path} has no example of `{task}`.")
    return Documents(sha256(repr(examples).encode()).hexdigest()[:16], examples)


def _rows(path: Path, task: str, part: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a task's file, each with its place."""
    inside = f"{task}/{part}.jsonl"
    try:
        if path.is_dir() and not (path / inside).is_file():
            path = path / f"{task}.zip"
            with zipfile.ZipFile(path) as archive, archive.open(inside) as lines:
                yield from _parsed(f"{path}/{inside}", lines)
            return
        path = path / inside if path.is_dir() else path
        with path.open("rb") as lines:
            yield from _parsed(str(path), lines)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise InputError(
            f"cannot read {path}: {error}. `--scrolls` takes a folder with {inside} or {task}.zip, or a jsonl file."
        ) from error


def _parsed(name: str, lines: Iterable[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{name}, line {number} is not valid JSON.") from error
            yield f"{name}, line {number}", row


def _queries(place: str, meeting: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Of a meeting of QMSum: names, inputs as SCROLLS writes them, and outputs."""
    text = "\n".join(f"{turn['speaker']}: {turn['content']}" for turn in meeting["meeting_transcripts"])
    for kind in ("specific", "general"):
        for number, query in enumerate(meeting[f"{kind}_query_list"]):
            yield f"{place}, {kind} {number}", f"{query['query']}\n\n{text}", query["answer"]


def _document(task: str, text: str, answers: tuple[str, ...]) -> Document:
    question = choices = ""
    if task not in ("gov_report", "summ_screen_fd"):
        question, _, text = text.partition("\n\n")
    if task == "quality":
        end = text.find("\n\n", text.find("(D)"))
        choices, text = text[:end].strip("\n"), text[end:]
    return Document(text.strip(), question, choices, answers)

"""What a long-context task is made of: samples, and the tasks that make and score them."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

Count = Callable[[str], int]  # tokens of a text, in the caller's unit


@dataclass(frozen=True)
class Needle:
    """A piece of the prompt that holds a part of the answer."""

    start: int  # of its characters in the prompt
    end: int
    depth: float  # 0 (the beginning of the haystack) to 1 (its end)


@dataclass(frozen=True)
class Sample:
    """A prompt and its answers.

    Args:
        task: name, as `niah_single_1`.
        length: the budget in the unit of the caller's `count`, the tokens to generate included.
        index: number of the sample in its task; the same seed, index and settings make the same sample. Samples of
            one index have the same needles at every length that holds them.
        prompt: all that is read before the model writes.
        answers: references.
        needles: in order of their place.
        labels: what an answer is chosen from, if it is.
        facts: of the sample that a task's score or controls need; what JSON can hold. `context` is the place
            `[start, end]` of the haystack in the prompt, in characters.
    """

    task: str
    length: int
    index: int
    prompt: str
    answers: tuple[str, ...]
    needles: tuple[Needle, ...] = ()
    labels: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def completion(self) -> str:
        """What is written right after the prompt by a model that knows the answer, the space before it included."""
        return self.facts.get("completion", " " + ", ".join(self.answers))

    @property
    def context(self) -> str:
        """The haystack, needles included."""
        start, end = self.facts["context"]
        return self.prompt[start:end]


class Task(Protocol):
    """How samples are made and scored. `repr` tells all that the samples depend on besides length, index and seed."""

    @property
    def name(self) -> str:
        """As it is asked for."""

    @property
    def suite(self) -> str:
        """The name of the benchmark."""

    @property
    def num_generated(self) -> int:
        """Tokens that a model may write."""

    @property
    def metric(self) -> str:
        """Name of the score."""

    @property
    def num_samples(self) -> int | None:
        """How many different samples there are; `None` for a generator, which has any number."""

    def sample(self, length: int, index: int, seed: int, count: Count) -> Sample:
        """Make one; `count` tells the tokens of a text. Raises `InputError` with the smallest length that fits."""

    def without_needles(self, sample: Sample) -> Sample:
        """The control: the same prompt, of the same length or nearly so, its needles replaced by haystack."""

    def score(self, sample: Sample, written: str) -> float:
        """0 to 1 of what a model has written."""

    def chance(self, sample: Sample) -> float:
        """The score of a guess."""

    def shortcut(self, sample: Sample) -> str | None:
        """What a reader without memory would answer (the label mentioned last); `None` where there is no such thing."""


def joined(pieces: Sequence[str], separator: str, marked: Collection[int]) -> tuple[str, list[tuple[int, int]]]:
    """A text of pieces, and the spans of the marked pieces in it.

    Args:
        marked: numbers of pieces.
    """
    spans, end = [], 0
    for number, piece in enumerate(pieces):
        if number in marked:
            spans.append((end, end + len(piece)))
        end += len(piece) + len(separator)
    return separator.join(pieces), spans


def needles_at(spans: Sequence[tuple[int, int]], context: tuple[int, int]) -> tuple[Needle, ...]:
    """Needles of a prompt.

    Args:
        spans: in the context.
        context: place of the context in the prompt.
    """
    start, length = context[0], context[1] - context[0]
    return tuple(Needle(start + a, start + b, a / max(length - (b - a), 1)) for a, b in spans)


def replaced(sample: Sample, texts: Sequence[str]) -> Sample:
    """The sample with other texts in the places of its needles, and thus without needles."""
    pieces, end = [], 0
    for needle, text in zip(sample.needles, texts):
        pieces += [sample.prompt[end : needle.start], text]
        end = needle.end
    prompt = "".join([*pieces, sample.prompt[end:]])
    start, old_end = sample.facts["context"]
    facts = {**sample.facts, "context": [start, old_end + len(prompt) - len(sample.prompt)]}
    return replace(sample, prompt=prompt, needles=(), facts=facts)

"""A model examined on the samples of one task at one length: its answers, what it expects, and the controls.

| score | what it asks |
|---|---|
| `value` | the task's own score of what the model writes |
| `graded.tokens_right` | share of the answer's tokens that are the most likely ones after the true ones before them |
| `graded.nats_per_token` | loss of the answer's tokens, each after the true ones before it |
| `graded.ranking` | is the most likely of the sample's labels a right answer? |

| control | what it asks |
|---|---|
| `needle_removed` | the same prompt, its needles replaced by haystack: what is known without them |
| `last_window` | the last tokens of the prompt alone: what needs no memory |
| `last_mentioned` | the task's shortcut, for which no model is asked |

Where the needle is the whole text, as in SCROLLS, `needle_removed` has the text of another sample instead: a shuffled
context. `more_nats` of that control says by how much the loss of the same answers is higher without their needles.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from .estimates import estimate
from .loading import LanguageModel
from .reading import Reader, Reading
from .sample import Sample, Task
from .scrolls import official

_NUM_DEPTHS = 10
_NUM_EXAMPLES, _EXAMPLE_LENGTH = 2, 200


@dataclass(frozen=True)
class Outcome:
    """What a model made of one sample.

    Args:
        score: of the task, for what was written.
        written: after the prompt, without the token that ended it.
        tokens_right: share of the answer's tokens.
        nats: loss per token of the answer.
        ranked: whether the most likely label is a right answer; `None` without labels.
    """

    score: float
    written: str
    tokens_right: float
    nats: float
    ranked: bool | None


def choices_of(sample: Sample) -> list[str]:
    """The labels as they would follow the prompt, with the space that the sample's completion begins with."""
    space = sample.completion[: len(sample.completion) - len(sample.completion.lstrip())]
    return [space + label for label in sample.labels]


class Examiner:
    """Asks a model the samples of one task.

    Args:
        language_model: model and tokenizer.
        reader: of the model.
        batch_size: most prompts side by side; changes memory use and speed alone.
        window: tokens of the control `last_window`.
        advance: told the number of prompts that were read.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        reader: Reader,
        task: Task,
        batch_size: int = 8,
        window: int = 512,
        advance: Callable[[int], object] = lambda number: None,
    ):
        self.language_model, self.reader, self.task = language_model, reader, task
        self.batch_size, self.window, self.advance = batch_size, window, advance

    def examine(self, samples: Sequence[Sample], num_controlled: int | None = None) -> dict[str, Any]:
        """All scores of the samples, by the names of a line of results.

        Args:
            samples: of one length.
            num_controlled: samples that the controls are examined on, the first ones; `None`: all.

        Raises:
            InputError: a prompt is longer than the model's positions.
        """
        prompts = [self.language_model.prompt(sample.prompt) for sample in samples]
        self._check_lengths(samples, prompts)
        outcomes = self.ask(prompts, samples)
        parts = zip(outcomes[:_NUM_EXAMPLES], samples)
        found = {
            **self._scores(outcomes, samples),
            **self._official(outcomes, samples),
            "chance": round(fmean(self.task.chance(sample) for sample in samples), 6),
            "by_depth": _by_depth(outcomes, samples),
            "by_distance": _by_distance(outcomes, samples, prompts),
            "controls": self._controls(samples[:num_controlled], prompts[:num_controlled], outcomes),
            "examples": [
                {"written": outcome.written[:_EXAMPLE_LENGTH], "answers": list(sample.answers)}
                for outcome, sample in parts
            ],
        }
        return {name: value for name, value in found.items() if value not in (None, [])}

    def ask(self, prompts: Sequence[list[int]], samples: Sequence[Sample]) -> list[Outcome]:
        """Read a prompt for each sample, which may be another than the sample's own, and take its outcome."""
        found: dict[int, Outcome] = {}
        for batch, reading in self._readings(prompts):
            own = [samples[index] for index in batch]
            ranked = self._ranked(reading, own)
            losses = self._losses(reading, own)
            written = self._written(reading)
            for index, sample, text, rank, (nats, right) in zip(batch, own, written, ranked, losses):
                found[index] = Outcome(self.task.score(sample, text), text, right, nats, rank)
        return [found[index] for index in range(len(prompts))]

    def _readings(self, prompts: Sequence[list[int]]):
        """Batches of indices, and the prompts of each when they were read."""
        for batch in self.reader.batches([len(prompt) for prompt in prompts], self.batch_size):
            reading = self.reader.read([prompts[index] for index in batch])
            yield batch, reading
            self.advance(len(batch))

    def _written(self, reading: Reading) -> list[str]:
        tokenizer, stops = self.language_model.tokenizer, tuple(getattr(self.task, "stops", ()))
        decoded: Callable[[list[int]], str] = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
        is_done = (lambda ids: any(stop in decoded(ids) for stop in stops)) if stops else None
        written = reading.write(self.task.num_generated, self.language_model.ends, is_done)
        return [decoded(ids) for ids in written]

    def _losses(self, reading: Reading, samples: Sequence[Sample]) -> list[tuple[float, float]]:
        """Per sample the nats per token of the answer and the share of its tokens that are the most likely ones."""
        answers = [self.language_model.continuation(sample.prompt, sample.completion) for sample in samples]
        losses = reading.copy().losses([ids for ids, _ in answers])
        return [
            (float(nats[first:].mean()), float(hits[first:].mean()))
            for (nats, hits), (_, first) in zip(losses, answers)
        ]

    def _ranked(self, reading: Reading, samples: Sequence[Sample]) -> list[bool | None]:
        """Whether the label of the highest likelihood (the product over its tokens) is a right answer."""
        choices = [choices_of(sample) or [sample.completion] for sample in samples]
        nats: list[list[float]] = [[] for _ in samples]
        for number in range(max(len(sample.labels) for sample in samples)):
            some = [texts[min(number, len(texts) - 1)] for texts in choices]
            tokens = [self.language_model.continuation(sample.prompt, text) for sample, text in zip(samples, some)]
            for row, (losses, _) in enumerate(reading.copy().losses([ids for ids, _ in tokens])):
                nats[row].append(float(losses[tokens[row][1] :].sum()))
        return [
            sample.labels[int(np.argmin(of_labels[: len(sample.labels)]))] in sample.answers if sample.labels else None
            for sample, of_labels in zip(samples, nats)
        ]

    def _scores(self, outcomes: Sequence[Outcome], samples: Sequence[Sample]) -> dict[str, Any]:
        graded = {
            "tokens_right": estimate([outcome.tokens_right for outcome in outcomes]),
            "nats_per_token": estimate([outcome.nats for outcome in outcomes], is_share=False),
        }
        ranked = [(outcome.ranked, sample) for outcome, sample in zip(outcomes, samples) if sample.labels]
        if ranked:
            chance = fmean(1 / len(sample.labels) for _, sample in ranked)
            graded["ranking"] = {**estimate([float(bool(rank)) for rank, _ in ranked]), "chance": round(chance, 6)}
        return {**estimate([outcome.score for outcome in outcomes]), "graded": graded}

    def _official(self, outcomes: Sequence[Outcome], samples: Sequence[Sample]) -> dict[str, float]:
        """SCROLLS' own number, which is no mean over samples."""
        parts = getattr(self.task, "parts", None)
        if parts is None:
            return {}
        each = [parts(sample, outcome.written) for sample, outcome in zip(samples, outcomes)]
        return {"official": round(official(each), 6)}

    def _controls(
        self, samples: Sequence[Sample], prompts: Sequence[list[int]], outcomes: Sequence[Outcome]
    ) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if not samples:
            return found
        places = [place for place, sample in enumerate(samples) if sample.needles]
        if places:
            own = [samples[place] for place in places]
            without = [self.language_model.prompt(self.task.without_needles(sample).prompt) for sample in own]
            self._check_lengths(own, without)
            removed = self.ask(without, own)
            more = [outcome.nats - outcomes[place].nats for place, outcome in zip(places, removed)]
            found["needle_removed"] = {**self._scores(removed, own), "more_nats": estimate(more, is_share=False)}
        if any(len(prompt) > self.window for prompt in prompts):
            last = self.ask([prompt[-self.window :] for prompt in prompts], samples)
            found["last_window"] = {**self._scores(last, samples), "window": self.window}
        shortcuts = [(sample, self.task.shortcut(sample)) for sample in samples]
        scores = [self.task.score(sample, answer) for sample, answer in shortcuts if answer is not None]
        if scores:
            found["last_mentioned"] = estimate(scores)
        return found

    def _check_lengths(self, samples: Sequence[Sample], prompts: Sequence[list[int]]) -> None:
        for sample, prompt in zip(samples, prompts):
            texts = (sample.completion, *choices_of(sample))
            longest = max(len(self.language_model.continuation(sample.prompt, text)[0]) for text in texts)
            self.language_model.check_length(len(prompt) + max(longest, self.task.num_generated))


def _has_place(sample: Sample) -> bool:
    """Whether the needles are pieces of the haystack, not all of it."""
    return not any([needle.start, needle.end] == sample.facts.get("context") for needle in sample.needles)


def _by_depth(outcomes: Sequence[Outcome], samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Scores by the depth of a needle, in ten bins that are named by their middle. A sample of several needles counts
    at each."""
    bins: list[list[Outcome]] = [[] for _ in range(_NUM_DEPTHS)]
    for outcome, sample in zip(outcomes, samples):
        for needle in sample.needles if _has_place(sample) else ():
            bins[min(int(needle.depth * _NUM_DEPTHS), _NUM_DEPTHS - 1)].append(outcome)
    if not any(bins):
        return []
    return [{"depth": round((place + 0.5) / _NUM_DEPTHS, 3), **_means(some)} for place, some in enumerate(bins)]


def _by_distance(
    outcomes: Sequence[Outcome], samples: Sequence[Sample], prompts: Sequence[list[int]]
) -> list[dict[str, Any]]:
    """Scores by the tokens between a needle and the end of the prompt, up to each power of two.

    A sample may have hundreds of needles. So distances are counted in characters, and a token taken for as many of them
    as it has on average in the prompt.
    """
    bins: dict[int, list[Outcome]] = {}
    for outcome, sample, prompt in zip(outcomes, samples, prompts):
        for needle in sample.needles if _has_place(sample) else ():
            num_characters = len(sample.prompt) - needle.end
            distance = max(round(num_characters * len(prompt) / len(sample.prompt)), 1)
            bins.setdefault(1 << (distance - 1).bit_length(), []).append(outcome)
    return [{"distance": distance, **_means(bins[distance])} for distance in sorted(bins)]


def _means(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    if not outcomes:
        return {"n": 0, "value": None, "tokens_right": None, "nats_per_token": None}
    means = {
        "value": fmean(outcome.score for outcome in outcomes),
        "tokens_right": fmean(outcome.tokens_right for outcome in outcomes),
        "nats_per_token": fmean(outcome.nats for outcome in outcomes),
    }
    return {"n": len(outcomes), **{name: round(mean, 6) for name, mean in means.items()}}

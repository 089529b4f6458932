"""BABILong: the facts of a bAbI story, in their order, between the sentences of a book.

BABILong is Kuratov et al. 2024 (https://arxiv.org/abs/2406.10149), repository booydar/babilong. Its lengths are tokens
of GPT-2, of which it keeps 300 for the prompt: its "8k" has about 37,000 bytes. Here a length is in tokens of the
tokenizer in use and holds the whole prompt and the tokens to generate.
"""

import functools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from smt_hf.errors import InputError

from .answers import only_label
from .haystack import Haystack
from .instructions import INSTRUCTIONS
from .sample import Count, Sample, joined, needles_at, replaced
from .sizing import TooShort, largest_sample
from .stories import ROOMS, Story, made_up, read_stories
from .vocabulary import belongs, generator, shuffled

LEAST_TOKENS = 10  # of a sentence of the book
NUM_CANDIDATES = 100  # stories, among which a sample takes the first that fits


@dataclass(frozen=True)
class StoryFile:
    """The stories of a bAbI file."""

    digest: str  # SHA-256 over the stories, the first 16 hex digits
    stories: tuple[Story, ...] = field(repr=False)


@dataclass(frozen=True)
class BabilongTask:
    """One of bAbI's tasks 1 to 3.

    The gap of each fact among the sentences is drawn with equal chances, several facts may share one. The last
    sentence is cut where the length is reached. Pieces are joined by spaces; BABILong joins tokens. A story whose
    facts take up too much of the length is left out for another one, so short lengths have short stories.

    Needles are the facts that the answer follows from; other facts stay in the control. The score is BABILong's own;
    lm-eval's is looser, and right wherever the answer holds the label.

    Args:
        stories: of a file; `None`: made up. Half of these are for training, the others for tests; a file is taken as it
            stands.
        fact_share: of the length that the facts may take up at most.
    """

    name: str
    split: str
    haystack: Haystack
    stories: StoryFile | None
    fact_share: float
    has_instruction: bool
    suite: ClassVar[str] = "babilong"
    metric: ClassVar[str] = "accuracy"
    num_generated: ClassVar[int] = 20

    @property
    def num_samples(self) -> int | None:
        return None

    @property
    def labels(self) -> tuple[str, ...]:
        """All answers, sorted."""
        return ROOMS if self.stories is None else tuple(sorted({story.answer for story in self.stories.stories}))

    def sample(self, length: int, index: int, seed: int, count: Count) -> Sample:
        rng = generator(self.name, self.split, seed, index)
        start, gap_seed, story_rng = rng.randrange(len(self.haystack.sentences)), rng.random(), generator(rng.random())
        keeps = functools.cache(lambda sentence: count(sentence) >= LEAST_TOKENS)

        def build(story: Story, units: int) -> Sample:
            sentences = self.haystack.passage(start, units, keeps)
            gap_rng = generator(gap_seed)
            gaps = sorted(int(gap_rng.random() * (len(sentences) + 1)) for _ in story.facts)
            pieces = list(sentences)
            places = [gap + number for number, gap in enumerate(gaps)]
            for place, fact in zip(places, story.facts):
                pieces.insert(place, fact)
            context, spans = joined(pieces, " ", [places[number] for number in story.support])
            before, after = self._around(story)
            around = (len(before), len(before) + len(context))
            labels = tuple(label for label in self.labels if label.lower() not in story.question.lower())
            facts: dict[str, Any] = {"context": list(around), "question": story.question, "story": list(story.facts)}
            facts["replacements"] = [
                self.haystack.filler(start + len(sentences) + 10 * number, end - begin)
                for number, (begin, end) in enumerate(spans)
            ]
            prompt = before + context + after
            needles = needles_at(spans, around)
            return Sample(self.name, length, index, prompt, (story.answer,), needles, labels, facts)

        def least_length(story: Story) -> int:
            whole = count(build(story, 0).prompt) + self.num_generated
            return max(whole, -int(-count(" ".join(story.facts)) // self.fact_share))

        least: list[tuple[int, int, Story]] = []  # length, order, story
        for story in islice(self._candidates(index, seed, story_rng), NUM_CANDIDATES):
            least.append((least_length(story), len(least), story))
            if least[-1][0] <= length:
                return largest_sample(functools.partial(build, story), count, self.num_generated, 0)
        smallest, _, story = min(least)
        raise TooShort(build(story, 0), smallest)

    def _candidates(self, index: int, seed: int, rng: random.Random) -> Iterator[Story]:
        """Of a file: first the story whose turn it is, then random ones."""
        if self.stories is not None:
            stories = self.stories.stories
            yield stories[shuffled(len(stories), seed)[index % len(stories)]]
            while True:
                yield rng.choice(stories)
        while True:
            story = rng.choice(made_up(self.name, rng))
            if belongs(" ".join([*story.facts, story.question]), self.split):
                yield story

    def _around(self, story: Story) -> tuple[str, str]:
        """What comes before and after the context."""
        if self.has_instruction:
            return INSTRUCTIONS[self.name] + "\n<context>\n", f"\n</context>\nQuestion: {story.question}"
        return "", f"\n{story.question}"

    def without_needles(self, sample: Sample) -> Sample:
        return replaced(sample, sample.facts["replacements"])

    def score(self, sample: Sample, written: str) -> float:
        return only_label(written, sample.answers[0], self.labels, sample.facts["question"])

    def chance(self, sample: Sample) -> float:
        """Of one of the labels that the question leaves."""
        return 1 / len(sample.labels)

    def shortcut(self, sample: Sample) -> str | None:
        """The label that the facts mention last."""
        return last_label(sample.facts["story"], self.labels)


def last_label(facts: list[str], labels: tuple[str, ...]) -> str | None:
    """The label that some facts mention last; `None` if they mention none."""
    text = " ".join(facts)
    found = max(labels, key=text.rfind)
    return found if found in text else None


def read_story_file(path: str, task: str, split: str) -> StoryFile:
    """The stories of a task from a bAbI file, or from the file of a folder that has the task in its name.

    Args:
        split: where several files of a folder are of the task, the one with the split in its name is meant.

    Raises:
        InputError: no such file, several, or one of another task.
    """
    file = Path(path)
    if file.is_dir():
        files = sorted(entry for entry in file.rglob("*.txt") if _task_of(entry) == task)
        files = [entry for entry in files if split in entry.stem] if len(files) > 1 else files
        if len(files) != 1:
            raise InputError(
                f"{path}, which `--babi` names, has {len(files)} files of `{task}` for the split {split}: name one."
            )
        file = files[0]
    elif _task_of(file) not in (task, None):
        raise InputError(f"{path} holds {_task_of(file)}: ask for this task alone, or give `--babi` a folder.")
    stories = read_stories(file)
    return StoryFile(sha256(repr(stories).encode()).hexdigest()[:16], tuple(stories))


def _task_of(path: Path) -> str | None:
    match = re.search(r"qa\d+", path.name)
    return match and match[0]

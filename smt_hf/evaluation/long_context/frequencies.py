"""RULER's frequent words: the ten most common of a numbered list, and the three most common of a coded text.

Both can be answered from the end of the text alone, because it is shuffled. `shortcut` is that answer, and a score
that is no higher shows no memory.
"""

import functools
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

from .ruler import RulerTask, in_template, window
from .sample import Count, Sample, joined, needles_at
from .sizing import TooShort, largest_sample
from .vocabulary import draw_coded_word, generator, words

COMMON_TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 "
    "words that appear most often in the list are:"
)
CODED_TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text? Answer: According to the coded text above, the "
    "three most frequently appeared words are:"
)
NUM_COMMON = 10
LEAST_WORDS = 2 * NUM_COMMON  # different ones in a list, ours: NVIDIA's search may end without other words
ALPHA = 2.0  # of Zipf's law
DOTS = "..."


@dataclass(frozen=True)
class _Repeats:
    """How often the words of a list and of the example before it occur."""

    common: int
    other: int
    num_in_example: int  # different words
    common_in_example: int
    other_in_example: int


SHORT = _Repeats(6, 1, 20, 3, 1)
LONG = _Repeats(30, 3, 40, 10, 3)  # from a length of `FIRST_LONG` on
FIRST_LONG = 4096


@dataclass(frozen=True)
class CommonWordsTask(RulerTask):
    """A numbered list of words, after a worked example.

    From 4,096 tokens on, NVIDIA's lists repeat words 30 and 3 times. The shortest of them takes 6,800 bytes or more:
    with one token per byte, lm-eval's generator is left without words and divides by zero, and NVIDIA's tries for ever.
    Here a length that cannot hold such a list has one with the repeats of shorter lengths, 6 and 1.

    Example and list share no word, which is ours. A length that needs more words than there are is refused; NVIDIA
    takes another list of words. The 120 tokens to generate hold the ten numbered words of most samples even where a
    token is a byte, and 98 % of all such words.
    """

    num_generated: ClassVar[int] = 120

    def sample(self, length: int, index: int, seed: int, count: Count) -> Sample:
        if length >= FIRST_LONG:
            try:
                return self._sample(length, index, seed, count, LONG)
            except TooShort:
                pass
        return self._sample(length, index, seed, count, SHORT)

    def _sample(self, length: int, index: int, seed: int, count: Count, repeats: _Repeats) -> Sample:
        rng = generator(self.name, self.split, seed, index)
        vocabulary = words(self.split, "nouns", "adjectives", "verbs")
        order = rng.sample(vocabulary, len(vocabulary))
        spare, order = order[:200], order[200:]
        example, order = order[: repeats.num_in_example], order[repeats.num_in_example :]
        shuffle_seed = rng.random()
        answers = order[:NUM_COMMON]

        def listed(chosen: list[str], common: int, other: int) -> list[str]:
            repeated = chosen[:NUM_COMMON] * common + chosen[NUM_COMMON:] * other
            generator(shuffle_seed).shuffle(repeated)
            return [piece for number, word in enumerate(repeated, start=1) for piece in (f"{number}.", word)]

        shown = " ".join(listed(example, repeats.common_in_example, repeats.other_in_example))
        template = in_template(COMMON_TEMPLATE, shown)[0] + _numbered(example[:NUM_COMMON]) + "\n" + COMMON_TEMPLATE
        first = template.rindex("{context}")
        head, tail = template[:first], template[first + len("{context}") :]
        stand_in = {word: _alike(word, spare) for word in answers}

        def build(units: int) -> Sample:
            pieces = listed(order[:units], repeats.common, repeats.other)
            marked = [number for number in range(1, len(pieces), 2) if pieces[number] in answers]
            context, spans = joined(pieces, " ", marked)
            place = (len(head), len(head) + len(context))
            facts: dict[str, Any] = {"context": list(place), "num_different": units}
            facts["replacements"] = [stand_in[pieces[number]] for number in marked]
            facts["completion"] = _numbered(answers)
            prompt = head + context + tail
            return Sample(self.name, length, index, prompt, tuple(answers), needles_at(spans, place), facts=facts)

        return largest_sample(build, count, self.num_generated, LEAST_WORDS, len(order))

    def chance(self, sample: Sample) -> float:
        """Of ten words of the list."""
        return NUM_COMMON / sample.facts["num_different"]

    def shortcut(self, sample: Sample) -> str | None:
        """The ten most common words in the last characters of the list."""
        entries = re.findall(r"\d+\. (.+?)(?= \d+\. |$)", window(sample))
        return ", ".join(word for word, _ in Counter(entries).most_common(NUM_COMMON))


def _numbered(chosen: list[str]) -> str:
    return " " + " ".join(f"{number}. {word}" for number, word in enumerate(chosen, start=1))


def _alike(word: str, others: list[str]) -> str:
    """A word of as many letters, or of nearly as many."""
    return min(others, key=lambda other: abs(len(other) - len(word)))


@dataclass(frozen=True)
class CodedWordsTask(RulerTask):
    """A shuffled text of words of six letters, whose frequencies follow Zipf's law.

    Word k of the vocabulary occurs N k^-2 / zeta(2) times, rounded down; the first is printed as dots, and the answers
    are the words 2 to 4. The vocabulary has a fiftieth of the length. The tokens to generate are part of the length;
    NVIDIA's text leaves no room for them. N leaves out the numbers, all below 53, with which the words 4 and 5 are
    equally frequent.
    """

    num_generated: ClassVar[int] = 50

    def sample(self, length: int, index: int, seed: int, count: Count) -> Sample:
        rng = generator(self.name, self.split, seed, index)
        shuffle_seed = rng.random()
        vocabulary: list[str] = []
        for _ in range(3 + max(length // 50, 5) - 1):
            vocabulary.append(draw_coded_word(rng, self.split, vocabulary))
        spare, coded = vocabulary[:3], [DOTS, *vocabulary[3:]]
        answers = coded[1:4]

        def build(units: int) -> Sample:
            frequencies = zipf(units, len(coded))
            pieces = [word for word, times in zip(coded, frequencies) for _ in range(times)]
            generator(shuffle_seed).shuffle(pieces)
            marked = [number for number, word in enumerate(pieces) if word in answers]
            context, spans = joined(pieces, " ", marked)
            prompt, place = in_template(CODED_TEMPLATE, context)
            facts: dict[str, Any] = {"context": list(place), "num_different": sum(times > 0 for times in frequencies)}
            facts["replacements"] = [spare[answers.index(pieces[number])] for number in marked]
            facts["completion"] = " " + " ".join(answers)
            return Sample(self.name, length, index, prompt, tuple(answers), needles_at(spans, place), facts=facts)

        return largest_sample(build, count, self.num_generated, 27)  # with fewer, word 4 does not occur

    def chance(self, sample: Sample) -> float:
        """Of three words of the text."""
        return min(3 / (sample.facts["num_different"] - 1), 1.0)

    def shortcut(self, sample: Sample) -> str | None:
        """The three most common words in the last characters of the text."""
        seen = Counter(word for word in window(sample).split(" ") if len(word) == 6)
        return " ".join(word for word, _ in seen.most_common(3))


@functools.lru_cache(maxsize=64)
def zipf(number: int, vocabulary: int) -> tuple[int, ...]:
    """How often each word of a text of about `number` words (27 or more) occurs, the most frequent first."""
    zeta = math.pi**2 / 6  # of ALPHA
    while True:
        times = tuple(int(number * rank**-ALPHA / zeta) for rank in range(1, vocabulary + 1))
        if times[3] > times[4]:
            return times
        number -= 1

"""RULER's needles in a haystack: sentences that give a key its value, hidden in noise, essays or among their like."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from .haystack import NOISE, Haystack, noise_filler
from .ruler import WINDOW, RulerTask, in_template
from .sample import Count, Sample, joined, needles_at
from .sizing import largest_sample
from .vocabulary import draw_key, draw_number, draw_uuid, generator

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
MANY = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{{context}}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text? The special magic {kind} for {query} mentioned in the provided text are"
)
ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{{context}}\nWhat is the special magic {kind} for {query} mentioned in the provided "
    "text? The special magic {kind} for {query} mentioned in the provided text is"
)
DEPTHS = tuple(round(100 * step / 39) for step in range(40))  # per cent of the sentences of an essay

_DRAW = {"words": draw_key, "numbers": draw_number, "uuids": draw_uuid}
_CHANCE = {"numbers": 1 / 9_000_000, "uuids": 2.0**-122}


@dataclass(frozen=True)
class _Hidden:
    """A haystack with needles."""

    pieces: Sequence[str]
    places: Sequence[int]  # of the needles among the pieces
    stand_ins: Sequence[str]  # what can stand in the place of each needle
    separator: str  # between pieces


_Hide = Callable[[int], _Hidden]  # units of haystack -> haystack with needles


@dataclass(frozen=True)
class NeedleTask(RulerTask):
    """Keys with values; some keys are asked for.

    The haystack is cut by its unit: lines of noise, lines of other needles, or words of an essay. An essay begins at
    a random sentence of the caller's texts and goes round; NVIDIA's begins with the first word of its text in every
    sample, so that all samples have the same haystack.

    Args:
        haystack: `None`: lines.
        lines: `noise` or `needles`.
    """

    key_kind: str = "words"
    value_kind: str = "numbers"
    num_keys: int = 1
    num_values: int = 1  # of each key
    num_asked: int = 1  # keys
    lines: str = "noise"
    haystack: Haystack | None = None
    num_generated: ClassVar[int] = 128

    def sample(self, length: int, index: int, seed: int, count: Count) -> Sample:
        rng = generator(self.name, self.split, seed, index)
        keys: list[str] = []
        values: list[str] = []  # in the order of the keys
        for _ in range(self.num_keys):
            keys.append(_DRAW[self.key_kind](rng, self.split, keys))
            for _ in range(self.num_values):
                values.append(_DRAW[self.value_kind](rng, self.split, values))
        owners = [key for key in keys for _ in range(self.num_values)]
        asked = rng.sample(keys, self.num_asked)
        answers = tuple(value for key in asked for owner, value in zip(owners, values) if owner == key)
        order = rng.sample(range(len(values)), len(values))
        needles = [self._needle(owners[number], values[number]) for number in order]
        is_asked = [owners[number] in asked for number in order]
        template = self._template(asked)
        if self.haystack is not None:
            hide = self._in_essay(rng, needles, self.haystack)
        elif self.lines == "noise":
            hide = self._in_noise(rng, needles)
        else:
            hide = self._in_needles(rng, needles, keys, values)

        def build(units: int) -> Sample:
            hidden = hide(units)
            marked = [place for place, counts in zip(hidden.places, is_asked) if counts]
            context, spans = joined(hidden.pieces, hidden.separator, marked)
            prompt, place = in_template(template, context)
            facts: dict[str, Any] = {"context": list(place), "num_pieces": len(hidden.pieces)}
            facts["values"] = [values[number] for number, counts in zip(order, is_asked) if counts]
            facts["replacements"] = [text for text, counts in zip(hidden.stand_ins, is_asked) if counts]
            facts["completion"] = " " + _listed(answers)
            return Sample(self.name, length, index, prompt, answers, needles_at(spans, place), facts=facts)

        least = len(needles) if self.haystack is None else 1
        return largest_sample(build, count, self.num_generated, least)

    def _template(self, asked: list[str]) -> str:
        if self.num_asked * self.num_values == 1:
            return ONE.format(kind=self.value_kind[:-1], query=asked[0])
        return MANY.format(kind=self.value_kind, query=_listed(asked))

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.value_kind, key=key, value=value)

    def _in_noise(self, rng: random.Random, needles: list[str]) -> _Hide:
        """Each needle before one of the lines of noise, so that the last line is none."""
        place_seed = rng.random()
        stand_ins = [noise_filler(len(needle)) for needle in needles]
        return lambda units: _before_lines([NOISE] * units, needles, stand_ins, place_seed)

    def _in_needles(self, rng: random.Random, needles: list[str], keys: list[str], values: list[str]) -> _Hide:
        """Each needle before one of other needles, whose keys and values are different."""
        place_seed, stand_in_rng, line_rng = rng.random(), generator(rng.random()), generator(rng.random())

        def other(rng: random.Random) -> str:
            key = _DRAW[self.key_kind](rng, self.split, keys)
            return self._needle(key, _DRAW[self.value_kind](rng, self.split, values))

        # Of some draws, one that is as long as the needle, or nearly so.
        draws = [other(stand_in_rng) for _ in range(100)]
        stand_ins = [min(draws, key=lambda draw: abs(len(draw) - len(needle))) for needle in needles]
        lines: list[str] = []

        def hide(units: int) -> _Hidden:
            lines.extend(other(line_rng) for _ in range(units - len(lines)))
            return _before_lines(lines[:units], needles, stand_ins, place_seed)

        return hide

    def _in_essay(self, rng: random.Random, needles: list[str], haystack: Haystack) -> _Hide:
        """Each needle between sentences, at one of 40 depths."""
        start = rng.randrange(len(haystack.sentences))
        depths = sorted(rng.sample(DEPTHS, len(needles)))

        def hide(units: int) -> _Hidden:
            sentences = haystack.passage(start, units)
            cuts = [0, *(len(sentences) * depth // 100 for depth in depths), len(sentences)]
            runs = [" ".join(sentences[begin:end]) for begin, end in pairwise(cuts)]
            pieces = [runs[0], *(piece for pair in zip(needles, runs[1:]) for piece in pair)]
            after = start + len(sentences)
            stand_ins = [haystack.filler(after + 10 * number, len(needle)) for number, needle in enumerate(needles)]
            return _Hidden(pieces, range(1, len(pieces), 2), stand_ins, " ")

        return hide

    def chance(self, sample: Sample) -> float:
        """Where the prompt mentions values that are not asked for: of a guess among all that it mentions. Else of a
        guess among all values."""
        num_mentioned = sample.facts["num_pieces"] if self.lines == "needles" else self.num_keys * self.num_values
        if num_mentioned > len(sample.answers):
            return len(sample.answers) / num_mentioned
        return _CHANCE[self.value_kind]

    def shortcut(self, sample: Sample) -> str | None:
        """The asked values whose needles lie in the last characters of the haystack; empty if none does."""
        end = sample.facts["context"][1]
        near = [needle.start >= end - WINDOW for needle in sample.needles]
        return " ".join(value for value, is_near in zip(sample.facts["values"], near) if is_near)


def _listed(texts) -> str:
    """`a`, or `a, b, and c`."""
    return texts[0] if len(texts) == 1 else ", ".join(texts[:-1]) + ", and " + texts[-1]


def _before_lines(lines: list[str], needles: list[str], stand_ins: list[str], place_seed: float) -> _Hidden:
    """Lines with each needle before another of them."""
    before = sorted(generator(place_seed).sample(range(len(lines)), len(needles)))
    places = [line + number for number, line in enumerate(before)]
    for place, needle in zip(places, needles):
        lines.insert(place, needle)
    return _Hidden(lines, places, stand_ins, "\n")

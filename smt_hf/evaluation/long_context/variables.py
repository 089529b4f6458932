"""RULER's variable tracking: which variables have a value, through a chain of assignments."""

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from .haystack import NOISE, noise_filler
from .ruler import RulerTask, in_template, window
from .sample import Count, Sample, joined, needles_at
from .sizing import largest_sample
from .vocabulary import draw_name, drawn, generator

TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{{context}}\nQuestion: "
    "Find all variables that are assigned the value {value} in the text above. Answer: According to the chain(s) of "
    "variable assignment in the text above, {number} variables are assgined the value {value}, they are: "
)
NUM_NAMES = 5  # one chain of four hops
EXAMPLE_TOKENS = 500  # of the worked example, if so few can hold it
LEAST_LINES = NUM_NAMES  # of noise: each assignment comes before another line


@dataclass(frozen=True)
class VariableTask(RulerTask):
    """A chain of assignments in noise, after a worked example with shorter names.

    NVIDIA's generator makes the example at most 500 tokens long and tries for ever where none is: with one token per
    byte, the template and five lines have about 900. Here the example has as many lines of noise as fit in 500
    tokens, and five if that is not possible. Five are the fewest that five assignments can be put before.
    """

    num_generated: ClassVar[int] = 30

    def sample(self, length: int, index: int, seed: int, count: Count) -> Sample:
        rng = generator(self.name, self.split, seed, index)
        example = self._example(rng, count)
        names, value = self._chain(rng, 5)
        place_seed = rng.random()
        template = example + "\n\n" + TEMPLATE.format(value=value, number=NUM_NAMES)

        def build(units: int) -> Sample:
            context, spans = _hidden(assignments(names, value), units, place_seed)
            prompt, place = in_template(template, context)
            facts: dict[str, Any] = {"context": list(place), "value": value}
            facts["replacements"] = [noise_filler(end - start) for start, end in spans]
            facts["completion"] = " " + " ".join(names)  # with its space, as in the example
            return Sample(self.name, length, index, prompt, tuple(names), needles_at(spans, place), facts=facts)

        return largest_sample(build, count, self.num_generated, LEAST_LINES)

    def _example(self, rng: random.Random, count: Count) -> str:
        names, value = self._chain(rng, 3)
        place_seed = rng.random()
        template = TEMPLATE.format(value=value, number=NUM_NAMES)

        def prompt(units: int) -> str:
            return in_template(template, _hidden(assignments(names, value), units, place_seed)[0])[0]

        units = LEAST_LINES
        while units < EXAMPLE_TOKENS and count(prompt(units + 1)) <= EXAMPLE_TOKENS:
            units += 1
        return prompt(units) + " " + " ".join(names)

    def _chain(self, rng: random.Random, num_letters: int) -> tuple[list[str], str]:
        names: list[str] = []
        for _ in range(NUM_NAMES):
            names.append(draw_name(rng, self.split, num_letters, names))
        return names, drawn(lambda: str(rng.randint(10_000, 99_998)), self.split)

    def chance(self, sample: Sample) -> float:
        """Of a guess among all names."""
        return 26.0**-5

    def shortcut(self, sample: Sample) -> str | None:
        """The names in the last characters of the haystack; empty if there are none."""
        return " ".join(name for name in sample.answers if name in window(sample))


def assignments(names: list[str], value: str) -> list[str]:
    """`VAR A = 12345`, `VAR B = VAR A `, with the space at the end that NVIDIA's lines have."""
    return [f"VAR {names[0]} = {value}", *(f"VAR {name} = VAR {last} " for last, name in pairwise(names))]


def _hidden(assignments: list[str], num_lines: int, place_seed: float) -> tuple[str, list[tuple[int, int]]]:
    """Lines of noise with the assignments in their order, and the spans of these."""
    lines = [NOISE] * num_lines
    before = sorted(generator(place_seed).sample(range(num_lines), len(assignments)))
    places = [line + number for number, line in enumerate(before)]
    for place, assignment in zip(places, assignments):
        lines.insert(place, assignment)
    return joined(lines, "\n", places)

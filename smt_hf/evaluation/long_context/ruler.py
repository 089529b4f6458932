"""What the tasks of RULER have in common.

RULER is Hsieh et al. 2024 (https://arxiv.org/abs/2404.06654). Prompts are those of NVIDIA's repository
(`scripts/data/synthetic/constants.py`). A length holds the prompt, its answer prefix and the tokens to generate.
"""

from dataclasses import dataclass
from typing import ClassVar

from .answers import share_matched
from .sample import Sample, replaced

WINDOW = 512  # characters of the haystack's end that a reader without memory still sees


@dataclass(frozen=True)
class RulerTask:
    """The part of a task that is the same for all; subclasses make samples.

    `facts["replacements"]` of a sample has one text of haystack per needle, of its length.
    """

    name: str
    split: str  # of the words, names and numbers
    suite: ClassVar[str] = "ruler"
    metric: ClassVar[str] = "string_match_all"

    @property
    def num_samples(self) -> int | None:
        return None

    def without_needles(self, sample: Sample) -> Sample:
        return replaced(sample, sample.facts["replacements"])

    def score(self, sample: Sample, written: str) -> float:
        return share_matched(written, sample.answers)


def in_template(template: str, context: str) -> tuple[str, tuple[int, int]]:
    """A prompt, and the place of the context in it.

    Args:
        template: with `{context}`, and no other field before it.
    """
    before, _, after = template.partition("{context}")
    return before + context + after, (len(before), len(before) + len(context))


def window(sample: Sample) -> str:
    """The end of the haystack, `WINDOW` characters at most."""
    return sample.context[-WINDOW:]

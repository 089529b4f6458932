"""Samples of the suites as documents of lm-eval's tasks.

The YAML files in `tasks/` name `documents` and `process_results`. A sample is the one that `recipes/evaluate.py` makes
for the same seed, index and settings.
"""

import dataclasses
import functools
import json
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

from smt_hf.errors import InputError
from smt_hf.evaluation.long_context import LongContextSettings, tasks_of
from smt_hf.evaluation.long_context.sample import Needle, Sample, Task

_SETTINGS = {field.name for field in dataclasses.fields(LongContextSettings)}


def documents(
    suite: str,
    task: str,
    length: int = 4096,
    num_samples: int = 400,
    seed: int = 0,
    tokenizer: str | None = None,
    pretrained: str | None = None,
    **metadata: Any,
) -> dict[str, Dataset]:
    """The documents of a task: its split `test`.

    Args:
        suite, task: their names; the YAML file has them.
        length: tokens of prompt and answer. One call of lm-eval has one length, since it averages over all documents.
        num_samples: documents, fewer where there are fewer samples.
        seed: of the samples.
        tokenizer, pretrained: folder or Hub repository of the tokenizer that counts; the first that is given.
        metadata: what else lm-eval passes (`--metadata`, `--model_args`); fields of `LongContextSettings` are settings
            of the suite, others are not looked at.

    Raises:
        InputError: no tokenizer is named, or the length is too small for a sample.
    """
    name = tokenizer or pretrained
    if not name:
        raise InputError('lengths are counted in tokens: name a tokenizer, as in --metadata \'{"tokenizer": "DIR"}\'.')
    counting = AutoTokenizer.from_pretrained(name)
    settings = {key: value for key, value in metadata.items() if key in _SETTINGS}
    maker = _task(suite, task, json.dumps(settings, sort_keys=True))
    if maker.num_samples is not None:
        num_samples = min(num_samples, maker.num_samples)

    def count(text: str) -> int:
        return len(counting(text, add_special_tokens=False, verbose=False)["input_ids"])

    samples = [maker.sample(int(length), index, int(seed), count) for index in range(int(num_samples))]
    rows = [
        {
            "prompt": sample.prompt,
            "completion": sample.completion,
            "sample": json.dumps(dataclasses.asdict(sample)),
            "made_by": json.dumps([suite, task, settings]),
        }
        for sample in samples
    ]
    return {"test": Dataset.from_list(rows)}


def process_results(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The task's score of what was written after a document's prompt."""
    suite, task, settings = json.loads(document["made_by"])
    maker = _task(suite, task, json.dumps(settings, sort_keys=True))
    return {"score": maker.score(sample_of(document), results[0])}


def sample_of(document: dict[str, Any]) -> Sample:
    """The sample that a document was made of."""
    fields = json.loads(document["sample"])
    fields |= {name: tuple(fields[name]) for name in ("answers", "labels")}
    return Sample(**{**fields, "needles": tuple(Needle(**needle) for needle in fields["needles"])})


@functools.cache
def _task(suite: str, name: str, settings: str) -> Task:
    """A task of a suite.

    Args:
        settings: fields of `LongContextSettings` in JSON.
    """
    (task,) = tasks_of(suite, [name], LongContextSettings(**json.loads(settings)))
    return task

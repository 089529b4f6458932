"""Samples on disk, so that they are made once for all models that read with the same tokenizer."""

import hashlib
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .sample import Count, Needle, Sample, Task

FORMAT = 1  # of the samples: count up when a task makes others from the same settings
SAVED_AT_ONCE = 25


class SampleCache:
    """JSON lines in a folder, one file for each task, length, seed, tokenizer and settings.

    A file holds the first samples of its task, in order. It is replaced as a whole whenever some more are made, so
    that it is never half written, and the next call goes on where an interrupted one has stopped. The name has a hash
    over all that the samples depend on: other settings read another file.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def samples(self, task: Task, length: int, number: int, seed: int, count: Count, tokenizer: str) -> list[Sample]:
        """The first samples of a task, read where they are there, else made and kept.

        Args:
            number: of samples; of a task that has fewer, all are returned.
            count: tokens of a text.
            tokenizer: fingerprint of what `count` counts with.

        Raises:
            InputError: of the task.
        """
        path = self.path(task, length, seed, tokenizer)
        number = number if task.num_samples is None else min(number, task.num_samples)
        kept = _read(path)
        while len(kept) < number:
            block = range(len(kept), min(len(kept) + SAVED_AT_ONCE, number))
            kept += [task.sample(length, index, seed, count) for index in block]
            self._write(path, kept)
        return kept[:number]

    def path(self, task: Task, length: int, seed: int, tokenizer: str) -> Path:
        """The file of such samples."""
        key = repr((FORMAT, task.suite, task, length, seed, tokenizer))
        return self.folder / f"{task.suite}_{task.name}_{length}_{hashlib.sha256(key.encode()).hexdigest()[:16]}.jsonl"

    def _write(self, path: Path, samples: list[Sample]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(dir=self.folder, prefix=".", suffix=".jsonl")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(sample)) + "\n" for sample in samples)
            os.replace(aside, path)
        except BaseException:
            os.unlink(aside)
            raise


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of how a Hugging Face tokenizer cuts texts: of its vocabulary and, where it is a fast one, its rules."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else type(tokenizer).__qualname__
    content = json.dumps([rules, sorted(tokenizer.get_vocab().items())])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _read(path: Path) -> list[Sample]:
    """The samples of a file, up to the first line that is damaged."""
    samples: list[Sample] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return samples
    for line in lines:
        try:
            samples.append(_sample(json.loads(line)))
        except (ValueError, TypeError, KeyError):
            break
    return samples


def _sample(fields: dict[str, Any]) -> Sample:
    needles = tuple(Needle(**needle) for needle in fields.pop("needles"))
    answers, labels = tuple(fields.pop("answers")), tuple(fields.pop("labels"))
    return Sample(**fields, answers=answers, needles=needles, labels=labels)

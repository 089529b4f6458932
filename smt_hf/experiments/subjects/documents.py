"""Documents of the long-context suites: a haystack with needles, a question, and its answer, which alone is labelled.

Training rows are made of the half `train` of words, names and stories, held-out rows of the half `test`, from which
`recipes/evaluate.py` draws. Nothing divides the haystack: train and test on different books.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from smt_hf.data import byte_tokenizer, labelled_rows, load_corpus, pack, tokenize
from smt_hf.errors import InputError
from smt_hf.evaluation.long_context import SUITES, LongContextSettings, Task, sample_row, tasks_of

from .levelled import LevelledSubject
from .subject import HELDOUT_SEED

TEXT = "text"
_SUITE_OF = {task: suite for suite in ("ruler", "babilong") for task in SUITES[suite]}
# What rows may be made of: tasks that have any number of samples, and plain text.
DOCUMENTS = tuple(name for name in (*_SUITE_OF, TEXT) if not name.startswith("qa_"))
_ROWS, _EVAL_ROWS = 8192, 128
# Labels of a row of text, at its end. Labels everywhere would outweigh those of answers a hundred times.
_TEXT_LABELS = 32


class DocumentSubject(LevelledSubject):
    """Rows of documents of several tasks in turn; shorter rows are a curriculum.

    A row has `difficulty` + 1 tokens: the prompt of a sample, its answer and the end-of-text token, which are labelled,
    and that token again up to the end (see `sample_row` for prompts that do not fit). A task without a row that fits is
    left out of a level. Plain text is labelled in its last tokens.

    Args:
        documents: names out of `DOCUMENTS`.
        difficulty: transitions of a row at the last level.
        curriculum: shorter rows to begin with.
        haystack: files of text that needles are hidden in, and that `text` is made of.
        seed: of the training rows.
        num_heldout: labels to score at least.
        heldout_seed: of the rows to score. Settings are chosen on other rows than those of the final scores.
        name: what results call the mixture; default: its documents.

    Raises:
        InputError: no such documents, no haystack where one is needed, a level at which nothing fits, or a seed that is
            one of held-out rows.
    """

    metric = "accuracy"

    def __init__(
        self,
        documents: Sequence[str],
        difficulty: int,
        curriculum: Iterable[int] = (),
        haystack: Sequence[str] | None = None,
        seed: int = 0,
        num_heldout: int = 4096,
        heldout_seed: int = HELDOUT_SEED + 1,
        name: str | None = None,
    ):
        unknown = [word for word in documents if word not in DOCUMENTS]
        if unknown or not documents:
            raise InputError(f"`documents` must be out of {', '.join(DOCUMENTS)}, got {', '.join(unknown) or 'none'}.")
        if TEXT in documents and (not haystack or len(documents) == 1):
            raise InputError(
                "`text` among the `documents` goes with tasks and with a `haystack`, the files that it is made of. To "
                "train on text alone, set `task` to text."
            )
        if seed >= HELDOUT_SEED:
            raise InputError(f"seeds from {HELDOUT_SEED:,} on are those of held-out rows: take a smaller one.")
        if num_heldout < 1:
            raise InputError(f"`num_heldout` must be at least 1, got {num_heldout}.")
        self.documents, self.haystack = tuple(dict.fromkeys(documents)), haystack
        self.name, self.difficulty, self.num_transitions = name or "+".join(self.documents), difficulty, difficulty
        self.tokenizer = byte_tokenizer()
        self.vocab_size = len(self.tokenizer)
        self.seed, self.heldout_seed = seed, heldout_seed
        self.level_names = [*sorted(level for level in set(curriculum) if level < difficulty), difficulty]
        self.tasks = {split: self._tasks_of(split) for split in ("train", "test")}
        self.levels = {level: self._training_rows(level) for level in self.level_names}
        self.eval_rows = self._sampled(difficulty, _EVAL_ROWS, "test", HELDOUT_SEED)
        labels_per_row = float((np.stack(self.eval_rows["labels"][:]) != -100).sum(axis=1).mean())
        self.heldout = self.heldout_rows(difficulty, math.ceil(num_heldout / labels_per_row))
        self.chance = _blind_accuracy(self.levels[difficulty], self.heldout[1])

    def heldout_rows(self, difficulty: int, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """`input_ids` and `labels` `(num_rows, T + 1)` of the tasks, made of what no training row is made of."""
        rows = self._sampled(difficulty, num_rows, "test", self.heldout_seed)
        return np.stack(rows["input_ids"][:]).astype(np.int64), np.stack(rows["labels"][:]).astype(np.int64)

    def longer(self, factor: int) -> int:
        """The difficulty of rows `factor` times as long."""
        return self.difficulty * factor

    def level(self, difficulty: int) -> Dataset:
        if difficulty not in self.levels:
            self.levels[difficulty] = self._training_rows(difficulty)
        return self.levels[difficulty]

    def check_level(self, difficulty: int) -> None:
        self.level(difficulty)

    def _tasks_of(self, split: str) -> list[Task]:
        # Stories of any length fit, so that a short row may have as many facts as a long test.
        settings = LongContextSettings(split, list(self.haystack) if self.haystack else None, babilong_fact_share=1.0)
        return [tasks_of(_SUITE_OF[name], [name], settings)[0] for name in self.documents if name != TEXT]

    def _training_rows(self, difficulty: int) -> Dataset:
        num_text = round(_ROWS / len(self.documents)) if TEXT in self.documents else 0
        rows = self._sampled(difficulty, _ROWS - num_text, "train", self.seed)
        if not num_text:
            return rows
        ids, labels = (np.stack(rows[name][:]) for name in ("input_ids", "labels"))
        text = self._text_rows(difficulty, num_text)
        asked = np.full_like(text, -100)
        asked[:, -_TEXT_LABELS:] = text[:, -_TEXT_LABELS:]
        return labelled_rows(np.concatenate([ids, text]), np.concatenate([labels, asked]))

    def _text_rows(self, difficulty: int, num_rows: int) -> np.ndarray:
        packed = pack(tokenize(load_corpus(train_file=self.haystack).train, self.tokenizer), difficulty)
        order = np.random.default_rng((self.seed, difficulty)).permutation(len(packed))
        return np.stack(packed[np.resize(order, num_rows)]["input_ids"])

    def _sampled(self, difficulty: int, num_rows: int, split: str, seed: int) -> Dataset:
        """Rows of the tasks in turn."""
        tasks = [task for task in self.tasks[split] if self._row(task, difficulty, 0, seed) is not None]
        if not tasks:
            raise InputError(f"no task of {', '.join(self.documents)} fits in rows of {difficulty} transitions.")
        ids = np.full((num_rows, difficulty + 1), self.tokenizer.eos_token_id, dtype=np.int32)
        labels = np.full_like(ids, -100)
        numbers = range(num_rows)
        for number in tqdm(numbers, f"{split} rows of {difficulty}", leave=False, delay=2, dynamic_ncols=True):
            turn, place = divmod(number, len(tasks))
            tokens, num_read = self._row(tasks[place], difficulty, turn, seed) or ([], 0)
            ids[number, : len(tokens)] = tokens
            labels[number, num_read : len(tokens)] = tokens[num_read:]
        return labelled_rows(ids, labels)

    def _row(self, task: Task, difficulty: int, index: int, seed: int) -> tuple[list[int], int] | None:
        return sample_row(task, self.tokenizer, difficulty + 1, index, seed)

    def facts(self) -> dict:
        content = hashlib.sha256(repr((self.tasks["train"], self.documents, self.seed)).encode()).hexdigest()[:16]
        return {
            "name": self.name,
            "hash": f"{self.name}-{self.difficulty}-{content}",
            "training_tokens": len(self.levels[self.difficulty]) * self.num_transitions,
            **super().facts(),
        }

    def describe(self) -> str:
        levels = ", ".join(map(str, self.level_names))
        return (
            f"documents of {', '.join(self.documents)}: rows of {levels} transitions; {self.chance:.1%} of the labels "
            f"are right without reading, {len(self.heldout[0]):,} held-out rows"
        )


def _blind_accuracy(rows: Dataset, labels: np.ndarray) -> float:
    """Share of the labels `(N, T + 1)` that are what training rows have most often at that place of an answer."""
    known = _by_place(np.stack(rows["labels"][:]))
    commonest = {place: np.bincount(tokens).argmax() for place, tokens in known.items()}
    asked = _by_place(labels)
    num_right = sum(int((tokens == commonest.get(place, -1)).sum()) for place, tokens in asked.items())
    return num_right / sum(map(len, asked.values()))


def _by_place(labels: np.ndarray) -> dict[int, np.ndarray]:
    """Place in the answer -> its tokens in all rows that have as many."""
    answers = [row[row != -100] for row in labels]
    longest = max(map(len, answers))
    return {place: np.array([row[place] for row in answers if len(row) > place]) for place in range(longest)}

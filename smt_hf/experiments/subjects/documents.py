"""Documents of the long-context suites: a haystack with needles, a question, and its answer, which alone is labelled.
Exercises and plain text may be mixed in.

Training rows are made of the half `train` of words, names and stories, held-out rows of the half `test`, from which
`recipes/evaluate.py` draws. Nothing divides the haystack: train and test on different books.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from random import Random
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from smt_hf.data import byte_tokenizer, labelled_rows
from smt_hf.data.packing import token_ids
from smt_hf.errors import InputError
from smt_hf.evaluation.long_context import SUITES, LongContextSettings, Task, sample_row, tasks_of
from smt_hf.evaluation.long_context.haystack import noise_filler, read_haystack
from smt_hf.training.arguments import PhaseArguments

from .exercises import EXERCISES, LEAST_TOKENS, SHORT_ROW, exercise_rows
from .levelled import LevelledSubject
from .subject import HELDOUT_SEED

TEXT = "text"
_SUITE_OF = {task: suite for suite in ("ruler", "babilong") for task in SUITES[suite]}
# What rows may be made of: tasks that have any number of samples, exercises, and plain text.
DOCUMENTS = tuple(name for name in (*_SUITE_OF, *EXERCISES, TEXT) if not name.startswith("qa_"))
_ROWS, _EVAL_ROWS = 8192, 32  # held-out rows are read token by token, at every evaluation
_BLIND_ROWS = 4096  # whose answers are counted to guess without reading
_PROBED_ROWS = 8  # of each task and level, before any row is made for training
# Labels of a row of text, at its end. Labels everywhere would outweigh those of answers a hundred times.
_TEXT_LABELS = 32
_NOISE_SHARE = 0.3  # of what fills the rows of exercises; the rest is the haystack, if there is one


class DocumentSubject(LevelledSubject):
    """Rows of documents, as many of each kind; shorter rows are a curriculum.

    A row has `difficulty` + 1 tokens: the prompt of a sample, its answer and the end-of-text token, which are labelled,
    and that token again up to the end (see `sample_row` for prompts that do not fit). A task whose rows do not fit in a
    level of the curriculum is left out of that level. With exercises among the documents, a level of up to 128
    transitions below `difficulty` has no tasks. Exercises and plain text are for training alone. Text is labelled in
    its last tokens, and is the same text as the haystack. All rows of training and tests have the same haystack; their
    other parts differ.

    Args:
        documents: names out of `DOCUMENTS`.
        difficulty: transitions of a row that is scored, and of the last level. `curriculum_levels` of a phase may be
            longer.
        curriculum: shorter rows to begin with.
        haystack: files of text that needles are hidden in, and that `text` is made of. Exercises use it if it is there.
        seed: of the training rows.
        num_heldout: labels to score, about.
        heldout_seed: of the rows to score. Settings are chosen on other rows than those of the final scores.
        name: what results call the mixture; default: its documents.

    Raises:
        InputError: no such documents, no haystack where one is needed, a task that does not fit at `difficulty`, a
            level at which nothing fits, or a seed that is one of held-out rows.
    """

    metric = "accuracy"
    trains_beyond = True

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
        if seed >= HELDOUT_SEED:
            raise InputError(f"seeds from {HELDOUT_SEED:,} on are those of held-out rows: take a smaller one.")
        if num_heldout < 1:
            raise InputError(f"`num_heldout` must be at least 1, got {num_heldout}.")
        self.documents, self.haystack = tuple(dict.fromkeys(documents)), haystack
        self.tasks = {split: tasks_in(self.documents, haystack, split) for split in ("train", "test")}
        self.name, self.difficulty, self.num_transitions = name or "+".join(self.documents), difficulty, difficulty
        self.tokenizer = byte_tokenizer()
        self.vocab_size = len(self.tokenizer)
        self.seed, self.heldout_seed = seed, heldout_seed
        self.level_names = [*sorted(level for level in set(curriculum) if level < difficulty), difficulty]
        check_rows(self.documents, self.level_names, haystack, seed)
        self.levels = {level: self._training_rows(level) for level in self.level_names}
        self.eval_rows = self._sampled(difficulty, _EVAL_ROWS, "test", HELDOUT_SEED)
        labels_per_row = float((np.stack(self.eval_rows["labels"][:]) != -100).sum(axis=1).mean())
        self.heldout = self.heldout_rows(difficulty, math.ceil(num_heldout / labels_per_row))
        trained = self._sampled(difficulty, _BLIND_ROWS, "train", seed)["labels"][:]
        self.chance = _blind_accuracy(np.stack(trained), self.heldout[1])

    def heldout_rows(self, difficulty: int, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """`input_ids` and `labels` `(num_rows, T + 1)` of the tasks, of words and stories that no training row has."""
        rows = self._sampled(difficulty, num_rows, "test", self.heldout_seed)
        return np.stack(rows["input_ids"][:]).astype(np.int64), np.stack(rows["labels"][:]).astype(np.int64)

    @torch.inference_mode()
    def answered(self, student, num_rows: int) -> list[dict[str, str]]:
        """Held-out documents of the shortest level that has tasks, each with its answer and what the student writes.

        Returns:
            `prompt`, `answer` and `continuation` of each row. The most likely tokens are taken.
        """
        fitting = (level for level in self.level_names if self._fitting("test", level))
        samples = []
        for ids, labels in zip(*self.heldout_rows(next(fitting), num_rows)):
            asked = np.flatnonzero(labels != -100)
            prompt = torch.from_numpy(ids[None, : asked[0]]).to(student.device)
            limits = {"max_new_tokens": len(asked) + 8, "do_sample": False, "synced_gpus": False}
            written = student.generate(prompt, eos_token_id=self.tokenizer.eos_token_id, **limits)[0]
            parts = {"prompt": prompt[0], "answer": ids[asked], "continuation": written[prompt.shape[1] :]}
            decoded = {name: self.tokenizer.decode(part, skip_special_tokens=True) for name, part in parts.items()}
            samples.append(decoded)
        return samples

    def longer(self, factor: int) -> int:
        """The difficulty of rows `factor` times as long."""
        return self.difficulty * factor

    def level(self, difficulty: int) -> Dataset:
        if difficulty not in self.levels:
            self.levels[difficulty] = self._training_rows(difficulty)
        return self.levels[difficulty]

    def check_level(self, difficulty: int) -> None:
        check_rows(self.documents, [difficulty, self.difficulty], self.haystack, self.seed)
        if TEXT in self.documents:
            self._text_rows(difficulty, 0)

    def required(self, arguments: PhaseArguments) -> dict[str, Any]:
        required = super().required(arguments)
        if len(arguments.levels) > 1 and arguments.levels[-1] > self.difficulty:
            raise InputError(
                f"`curriculum_levels` of the {arguments.phase} phase go beyond the run's `difficulty` "
                f"({self.difficulty}): give rows of {arguments.levels[-1]} transitions a phase of their own."
            )
        threshold = required.get("curriculum_threshold", arguments.curriculum_threshold)
        if TEXT in self.documents and threshold is not None:
            raise InputError(
                f"`curriculum_threshold` of the {arguments.phase} phase goes by the loss of all labels, and that of "
                "`text` among the `documents` never falls so low: leave one of the two out."
            )
        return required

    def _training_rows(self, difficulty: int) -> Dataset:
        num_tasks = len(self._fitting("train", difficulty))
        # As many rows at all levels up to `difficulty`. Longer levels have fewer rows, and as many tokens.
        total = min(_ROWS, _ROWS * self.difficulty // difficulty)
        exercises = [name for name in self.documents if name in EXERCISES]
        others = [*exercises, *([TEXT] if TEXT in self.documents else [])]
        # Of each kind as many rows, but for a remainder.
        num_rows = dict.fromkeys(others, total // (num_tasks + len(others)))
        parts = []
        if num_tasks:
            rows = self._sampled(difficulty, total - sum(num_rows.values()), "train", self.seed)
            parts.append((np.stack(rows["input_ids"][:]), np.stack(rows["labels"][:])))
        else:
            num_rows[others[0]] += total - sum(num_rows.values())
        for name in exercises:
            parts.append(exercise_rows(name, difficulty + 1, num_rows[name], self.seed, self._fill))
        if TEXT in self.documents:
            ids = self._text_rows(difficulty, num_rows[TEXT])
            asked = np.full_like(ids, -100)
            asked[:, -_TEXT_LABELS:] = ids[:, -_TEXT_LABELS:]
            parts.append((ids, asked))
        return labelled_rows(*(np.concatenate(part) for part in zip(*parts)))

    def _fill(self, rng: Random, num_characters: int) -> str:
        """Text between the statements of an exercise."""
        if not self.haystack or rng.random() < _NOISE_SHARE:
            return noise_filler(num_characters)
        haystack = read_haystack(self.haystack)
        return haystack.filler(rng.randrange(len(haystack.sentences)), num_characters)

    def _fitting(self, split: str, difficulty: int) -> list[Task]:
        """The tasks that a level has. Short rows are of exercises alone, if there are any: the few facts of a task that
        fits there leave little to learn but guesses.
        """
        if difficulty >= self.difficulty:
            return self.tasks[split]
        if split == "train" and difficulty < SHORT_ROW and any(name in EXERCISES for name in self.documents):
            return []
        fitting = [_fits(task, difficulty, self.tokenizer, self.seed) for task in self.tasks["train"]]
        return [task for task, is_fitting in zip(self.tasks[split], fitting) if is_fitting]

    def _text_rows(self, difficulty: int, num_rows: int) -> np.ndarray:
        """Passages from random places."""
        (tokens,) = token_ids([" ".join(read_haystack(self.haystack or ()).sentences)], self.tokenizer)["input_ids"]
        if len(tokens) <= difficulty:
            raise InputError(f"the haystack is shorter than a row of {difficulty} transitions: give more text.")
        starts = np.random.default_rng((self.seed, difficulty)).integers(len(tokens) - difficulty, size=num_rows)
        return np.asarray(tokens)[starts[:, None] + np.arange(difficulty + 1)]

    def _sampled(self, difficulty: int, num_rows: int, split: str, seed: int) -> Dataset:
        """Rows of the tasks in turn."""
        tasks = self._fitting(split, difficulty)
        ids = np.full((num_rows, difficulty + 1), self.tokenizer.eos_token_id, dtype=np.int32)
        labels = np.full_like(ids, -100)
        numbers = range(num_rows)
        for number in tqdm(numbers, f"{split} rows of {difficulty}", leave=False, delay=2, dynamic_ncols=True):
            turn, place = divmod(number, len(tasks))
            row = sample_row(tasks[place], self.tokenizer, difficulty + 1, turn, seed)
            if row is None:
                raise InputError(
                    f"few samples of `{tasks[place].name}` fit in rows of {difficulty} transitions, and none was found "
                    f"for row {turn}: take longer rows."
                )
            tokens, num_read = row
            ids[number, : len(tokens)] = tokens
            labels[number, num_read : len(tokens)] = tokens[num_read:]
        return labelled_rows(ids, labels)

    def facts(self) -> dict:
        parts = [self.tasks["train"], self.documents, self.seed]
        reads_haystack = any(name == TEXT or name in EXERCISES for name in self.documents)
        parts += [read_haystack(self.haystack).digest] if self.haystack and reads_haystack else []
        for name in self.documents:  # another release may make other rows
            if name in EXERCISES:
                rows = exercise_rows(name, LEAST_TOKENS, 32, 0, lambda rng, number: noise_filler(number))
                parts += [hashlib.sha256(np.stack(rows).tobytes()).hexdigest()]
        return {
            "name": self.name,
            "documents": list(self.documents),
            "hash": f"{self.name}-{self.difficulty}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}",
            "training_tokens": len(self.levels[self.difficulty]) * self.num_transitions,
            **super().facts(),
        }

    def describe(self) -> str:
        levels = ", ".join(map(str, self.level_names))
        return (
            f"documents of {', '.join(self.documents)}: rows of {levels} transitions; {self.chance:.1%} of the labels "
            f"are right if only the answer before them is read; {len(self.heldout[0]):,} held-out rows"
        )


def tasks_in(documents: Sequence[str], haystack: Sequence[str] | None, split: str) -> list[Task]:
    """The tasks among the documents.

    Raises:
        InputError: no such documents, or no haystack where one is needed.
    """
    unknown = [str(word) for word in documents if word not in DOCUMENTS]
    if unknown or not documents:
        raise InputError(f"`documents` must be out of {', '.join(DOCUMENTS)}, got {', '.join(unknown) or 'none'}.")
    if not any(name in _SUITE_OF for name in documents):
        raise InputError(
            f"`documents` need a task that is tested, besides {', '.join(documents)}. To train on text alone, set "
            "`task` to text."
        )
    if TEXT in documents and not haystack:
        raise InputError("`text` among the `documents` needs a `haystack`, the files that it is made of.")
    # Stories of any length fit, so that a short row may have as many facts as a long test.
    settings = LongContextSettings(split, list(haystack) if haystack else None, babilong_fact_share=1.0)
    return [tasks_of(_SUITE_OF[name], [name], settings)[0] for name in documents if name in _SUITE_OF]


def check_rows(
    documents: Sequence[str], levels: Sequence[int], haystack: Sequence[str] | None = None, seed: int = 0
) -> None:
    """Try some rows of every task at every level.

    Args:
        levels: transitions of a row; the last is that of the subject, where all tasks must fit.

    Raises:
        InputError: a task does not fit at the last level, or nothing fits at another.
    """
    has_exercises = any(name in EXERCISES for name in documents)
    tokenizer, tasks = byte_tokenizer(), tasks_in(documents, haystack, "train")
    for level in levels:
        missing = [task.name for task in tasks if not _fits(task, level, tokenizer, seed)]
        if has_exercises and level + 1 < LEAST_TOKENS:
            raise InputError(f"exercises need rows of {LEAST_TOKENS - 1} transitions or more, got {level}.")
        if (missing and level == levels[-1]) or (len(missing) == len(tasks) and not has_exercises):
            raise InputError(
                f"{', '.join(missing)} of the `documents` {'does' if len(missing) == 1 else 'do'} not fit in rows of "
                f"{level} transitions: take longer rows."
            )


def _fits(task: Task, level: int, tokenizer, seed: int) -> bool:
    rows = (sample_row(task, tokenizer, level + 1, index, seed) for index in range(_PROBED_ROWS))
    return all(row is not None for row in rows)


def _blind_accuracy(trained: np.ndarray, labels: np.ndarray) -> float:
    """Share of the labels `(N, T + 1)` that are guessed from the labels before them in the answer.

    The guess is what follows most often in the labels `trained`, or, where these labels were never seen together, what
    is most often at that place.
    """
    following: dict[tuple, Counter] = defaultdict(Counter)
    at: dict[int, Counter] = defaultdict(Counter)
    for row in trained:
        answer = tuple(row[row != -100].tolist())
        for place, token in enumerate(answer):
            following[answer[:place]][token] += 1
            at[place][token] += 1
    num_right = num_labels = 0
    for row in labels:
        answer = tuple(row[row != -100].tolist())
        for place, token in enumerate(answer):
            known = following.get(answer[:place]) or at.get(place) or Counter([-1])
            num_right += known.most_common(1)[0][0] == token
        num_labels += len(answer)
    return num_right / num_labels

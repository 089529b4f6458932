"""What is learned: text, a synthetic task, or pixels, each as rows to train on and a score of what was learned.

A subject has `name`, `difficulty`, `chance` (the score of knowing nothing), `metric` (the score's name), `tokenizer`,
`eval_rows` for the evaluations within a phase, and the methods of [`Subject`].
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from smt_hf.data import (
    TASKS,
    Levels,
    StreamedRows,
    byte_tokenizer,
    heldout_streams,
    load_corpus,
    load_pixels,
    load_task,
    number_tokenizer,
    pack,
    stream_corpus,
    task_facts,
    tokenize,
)
from smt_hf.evaluation import (
    NGramModel,
    StreamScores,
    score_student,
    score_student_probe,
    score_teacher,
    score_teacher_probe,
)
from smt_hf.evaluation.ngram import document_symbols, stream_symbols, uniform_bits
from smt_hf.evaluation.streams import count_bytes
from smt_hf.training.arguments import PhaseArguments
from smt_hf.training.composite import SMTForPreTraining

_EVAL_ROW, _EVAL_ROWS = 128, 32
# Held-out streams are as long as 8 training rows, so that memories older than any row are scored; the upper bound keeps
# evaluation within seconds.
_STREAMS, _SHORTEST_STREAM, _LONGEST_STREAM = 64, 1024, 8192
_TASK_ROWS, _TASK_EVAL_ROWS = 30_000, 128
# Seeds of held-out rows lie above all seeds of training rows.
HELDOUT_SEED = 1_000_000


class Subject(ABC):
    """Rows to train on, and scores."""

    name: str
    difficulty: int
    chance: float
    metric: str
    tokenizer: Any
    eval_rows: Any
    vocab_size: int

    @abstractmethod
    def rows(self, arguments: PhaseArguments):
        """Training rows of a phase: a dataset, or `Levels` of them."""

    @abstractmethod
    def evaluate(self, model: SMTForPreTraining, arguments: PhaseArguments) -> dict[str, dict]:
        """Scores after a phase: of the own rollout of a `student` that it trained and, where its teacher is still in
        use, the `teacher`."""

    @abstractmethod
    def facts(self) -> dict:
        """What it is made of; goes under `data` in the results."""

    @abstractmethod
    def describe(self) -> str:
        """One line for people."""

    @abstractmethod
    def fit(self, phases: Iterable[PhaseArguments]) -> None:
        """Set what of the arguments follows from the subject, in place.

        Raises:
            ValueError: arguments that do not fit the subject's rows.
        """


def refuse_curriculum(arguments: PhaseArguments) -> None:
    """For data of one level.

    Raises:
        ValueError: the phase has `curriculum_levels`.
    """
    if arguments.curriculum_levels is not None:
        raise ValueError(
            f"`curriculum_levels` of the {arguments.phase} phase are of synthetic tasks; rows of another length are "
            "set by `context_length`."
        )


class TextSubject(Subject):
    """Documents, packed for training; held-out streams with carried memory.

    Args:
        phases: whose rows are packed.
        stream_length: tokens of a held-out stream; default: 8 times the longest row, within bounds.
        streaming: read the documents while training; rows then start anew with every document.
        buffer_size: documents that the next one of a stream is drawn from.
        others: see `smt_hf.data`.
    """

    metric = "bits_per_byte"
    name = "text"

    def __init__(
        self,
        phases: Iterable[PhaseArguments],
        seed: int = 0,
        train_file: str | None = None,
        validation_file: str | None = None,
        dataset_name: str | None = None,
        dataset_config_name: str | None = None,
        text_column: str = "text",
        tokenizer_name: str | None = None,
        document_start_fraction: float = 0.05,
        stream_length: int | None = None,
        streaming: bool = False,
        buffer_size: int = 1000,
    ):
        self.streaming, self.buffer_size, self.seed = streaming, buffer_size, seed
        self.tokenizer = byte_tokenizer() if tokenizer_name is None else _tokenizer(tokenizer_name)
        self.vocab_size = len(self.tokenizer)
        named = (train_file, validation_file, dataset_name, dataset_config_name, text_column)
        self.corpus = stream_corpus(*named) if streaming else load_corpus(*named)
        heldout = tokenize(self.corpus.heldout, self.tokenizer)
        lengths = {arguments.context_length for arguments in phases}
        self._rows: dict[int, Any] = {}
        self.num_train_tokens: int | None = None  # of a stream, nobody knows
        if not streaming:
            train = tokenize(self.corpus.train, self.tokenizer)
            self.num_train_tokens = int(sum(len(row) for row in train.with_format("numpy")["input_ids"]))
            self._rows = {length: pack(train, length, document_start_fraction, seed) for length in lengths}
        if stream_length is None:
            stream_length = min(max(_SHORTEST_STREAM, 8 * max(lengths)), _LONGEST_STREAM)
        self.streams = heldout_streams(heldout, _STREAMS, stream_length)
        self.difficulty = self.streams.shape[1] - 1
        self.chance = uniform_bits()
        self.num_bytes = count_bytes(self.tokenizer, self.streams[:, 1:])
        self.bytes_per_token = self.num_bytes / self.streams[:, 1:].size
        self.eval_rows = [{"input_ids": row} for row in heldout_streams(heldout, _EVAL_ROWS, _EVAL_ROW)]

    def fit(self, phases: Iterable[PhaseArguments]) -> None:
        for arguments in phases:
            refuse_curriculum(arguments)
            if getattr(arguments, "future_length", 0) >= arguments.context_length:
                raise ValueError(
                    f"`future_length` ({arguments.future_length}) must be shorter than `context_length` "
                    f"({arguments.context_length})."
                )
            if arguments.context_length % arguments.transition_steps:  # packed rows leave no reason for padding
                raise ValueError(
                    f"`transition_steps` ({arguments.transition_steps}) of the {arguments.phase} phase must divide its "
                    f"`context_length` ({arguments.context_length})."
                )
            if not self.streaming:
                continue
            if arguments.max_steps < 1:
                raise ValueError("a stream has no end: set `max_steps`.")
            if getattr(arguments, "label_cache_dir", None):
                raise ValueError("`label_cache_dir` needs rows that come again: leave it out with a stream.")
            if arguments.dataloader_num_workers:
                raise ValueError("a stream is read in the process that trains: leave `dataloader_num_workers` at 0.")
            if arguments.phase == "bptt":
                arguments.carries_memory = False  # the next row may be of another document
            arguments.ignore_data_skip = True  # a resumed run goes to its place, it does not read up to it

    def rows(self, arguments: PhaseArguments):
        if self.streaming:
            return StreamedRows(
                copy.copy(self.corpus.train),
                self.tokenizer,
                arguments.context_length,
                self.buffer_size,
                self.seed,
                arguments.process_index,
                arguments.world_size,
            )
        return self._rows[arguments.context_length]

    def evaluate(self, model: SMTForPreTraining, arguments: PhaseArguments) -> dict[str, dict]:
        scores = {}
        if getattr(arguments, "trains_updater", True):
            scores["student"] = _stream_scores(score_student(model.student, self.streams, self.num_bytes))
        if arguments.phase == "smt":  # later phases change the readout, or the memories it reads
            scores["teacher"] = _stream_scores(score_teacher(model, self.streams, self.num_bytes))
        return scores

    def ngram_bits(self) -> dict[str, float]:
        """Bits a byte of n-gram models of 1, 2 and 3 bytes of context; none for a stream, which is not read whole."""
        if self.streaming:
            return {}
        model = NGramModel(document_symbols(self.corpus.train["text"][:]))
        sequences = stream_symbols(self.tokenizer, self.streams)
        return {f"ngram{context}": model.bits_per_byte(sequences, context) for context in (1, 2, 3)}

    def facts(self) -> dict:
        return {
            "name": self.corpus.name,
            **({"hub_name": self.corpus.hub_name} if self.corpus.hub_name else {}),
            "hash": self.corpus.digest,
            **({"streamed": True} if self.streaming else {"training_tokens": self.num_train_tokens}),
            "heldout_tokens": int(self.streams[:, 1:].size),
            "heldout_streams": len(self.streams),
        }

    def describe(self) -> str:
        if self.streaming:
            held_out = f"{len(self.corpus.heldout)} held-out documents, hash {self.corpus.digest}"
            return f"{self.corpus.name}: streamed, {held_out}"
        return (
            f"{self.corpus.name}: {self.num_train_tokens:,} training tokens, {len(self.corpus.train)} documents, hash "
            f"{self.corpus.digest}"
        )


class TaskSubject(Subject):
    """A synthetic task, with easier levels of it as a curriculum for phases that have a `curriculum_threshold`.

    Args:
        name, difficulty: see `smt_hf.data.tasks`.
        curriculum: easier difficulties to begin with; those not below `difficulty` are left out, and so are those above
            it of a phase's own `curriculum_levels`.
        seed: of the training rows.
        num_heldout: labels to score at least.
        heldout_seed: of the rows to score; settings are chosen on others than those of the final scores.
    """

    metric = "accuracy"

    def __init__(
        self,
        name: str,
        difficulty: int,
        curriculum: Iterable[int] = (),
        seed: int = 0,
        num_heldout: int = 4096,
        heldout_seed: int = HELDOUT_SEED + 1,
    ):
        if seed >= HELDOUT_SEED:
            raise ValueError(f"seeds from {HELDOUT_SEED:,} on are those of held-out rows: take a smaller one.")
        self.heldout_seed = heldout_seed
        task = task_facts(name, difficulty)
        self.name, self.difficulty, self.chance, self.vocab_size = name, difficulty, task.chance, task.vocab_size
        self.num_transitions = task.num_transitions
        self.tokenizer = number_tokenizer(task.vocab_size)
        levels = [*sorted(level for level in set(curriculum) if level < difficulty), difficulty]
        self.seed, self.level_names = seed, levels
        self.levels = {level: load_task(name, level, _TASK_ROWS, seed) for level in levels}
        self.eval_rows = load_task(name, difficulty, _TASK_EVAL_ROWS, HELDOUT_SEED)
        labels_a_row = int((self.eval_rows[0]["labels"] != -100).sum())
        self.heldout = self.heldout_rows(difficulty, math.ceil(num_heldout / labels_a_row))

    def heldout_rows(self, difficulty: int, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """`input_ids` and `labels` `(num_rows, T + 1)` that no training seed draws."""
        rows = load_task(self.name, difficulty, num_rows, self.heldout_seed)
        return np.stack(rows["input_ids"][:]).astype(np.int64), np.stack(rows["labels"][:]).astype(np.int64)

    def longer(self, factor: int) -> int | None:
        """The difficulty of rows `factor` times as long, where the difficulty is a length of some kind."""
        family = TASKS[self.name]
        difficulty = self.difficulty * factor
        if family.allowed is not None or (family.largest is not None and difficulty > family.largest):
            return None
        return difficulty

    def fit(self, phases: Iterable[PhaseArguments]) -> None:
        phases = list(phases)
        for arguments in phases:
            if arguments.phase == "bptt" and arguments.transition_steps >= arguments.context_length:
                arguments.transition_steps = self.num_transitions
            arguments.context_length = self.num_transitions
            arguments.carries_memory = False
            arguments.transition_steps = min(arguments.transition_steps, self.num_transitions)
            if arguments.levels:
                own = [level for level in arguments.levels if level <= self.difficulty]
                if not own:
                    raise ValueError(
                        f"`curriculum_levels` of the {arguments.phase} phase are all above the run's `difficulty` "
                        f"({self.difficulty}): {arguments.levels}."
                    )
                if len(own) > 1 and arguments.curriculum_threshold is None:
                    raise ValueError(
                        f"`curriculum_levels` of the {arguments.phase} phase need a `curriculum_threshold`, which says "
                        "when the next one begins."
                    )
                for level in own:
                    self._level(level)
                arguments.curriculum_levels = list(map(str, own))
            if len(arguments.levels or self.level_names) == 1:
                arguments.curriculum_threshold = None
        if any(arguments.levels for arguments in phases):  # then the levels of all are told by their difficulties
            for arguments in phases:
                if arguments.curriculum_threshold is not None:
                    arguments.curriculum_levels = list(map(str, arguments.levels or self.level_names))

    def rows(self, arguments: PhaseArguments):
        names = arguments.levels or self.level_names
        if arguments.curriculum_threshold is None:
            return self._level(names[-1])
        return Levels([self._level(name) for name in names])

    def _level(self, difficulty: int):
        if difficulty not in self.levels:
            self.levels[difficulty] = load_task(self.name, difficulty, _TASK_ROWS, self.seed)
        return self.levels[difficulty]

    def evaluate(self, model: SMTForPreTraining, arguments: PhaseArguments) -> dict[str, dict]:
        scores = {}
        if getattr(arguments, "trains_updater", True):
            scores["student"] = _probe_scores(score_student_probe(model.student, *self.heldout))
        if arguments.phase == "smt":
            scores["teacher"] = _probe_scores(score_teacher_probe(model, *self.heldout))
        return scores

    def facts(self) -> dict:
        return {
            "name": self.name,
            "hash": f"{self.name}-{self.difficulty}",
            "training_tokens": len(self.levels[self.difficulty]) * self.num_transitions,
            "heldout_tokens": int((self.heldout[1] != -100).sum()),
            "heldout_streams": len(self.heldout[0]),
        }

    def describe(self) -> str:
        family = TASKS[self.name]
        levels = ", ".join(map(str, self.level_names))
        return (
            f"{self.name}: {family.meaning} {levels}; rows of {self.num_transitions} transitions, chance "
            f"{self.chance:.1%}, {len(self.heldout[0]):,} held-out rows"
        )


class PixelSubject(Subject):
    """Images as rows of pixels: the embedded digits, or MNIST from a folder."""

    metric = "bits_per_pixel"
    name = "pixels"

    def __init__(self, mnist_dir: str | None = None, num_heldout: int = 1000):
        self.train, heldout, self.pixels = load_pixels(mnist_dir)
        self.vocab_size, self.chance = self.pixels.vocab_size, self.pixels.uniform_bits
        self.tokenizer = number_tokenizer(self.vocab_size)
        self.num_transitions = self.pixels.height * self.pixels.width - 1
        self.difficulty = self.num_transitions + 1
        chosen = heldout.select(range(min(num_heldout, len(heldout))))
        self.heldout = np.stack(chosen["input_ids"][:]).astype(np.int64)
        self.eval_rows = heldout.select(range(min(_TASK_EVAL_ROWS, len(heldout))))

    def fit(self, phases: Iterable[PhaseArguments]) -> None:
        for arguments in phases:
            refuse_curriculum(arguments)
            if arguments.phase == "bptt" and arguments.transition_steps >= arguments.context_length:
                arguments.transition_steps = self.num_transitions
            arguments.context_length = self.num_transitions
            arguments.carries_memory = False
            arguments.curriculum_threshold = None

    def rows(self, arguments: PhaseArguments):
        return self.train

    def evaluate(self, model: SMTForPreTraining, arguments: PhaseArguments) -> dict[str, dict]:
        scores = {}
        if getattr(arguments, "trains_updater", True):
            scores["student"] = self._scores(score_student_probe(model.student, self.heldout, self.heldout))
        if arguments.phase == "smt":
            scores["teacher"] = self._scores(score_teacher_probe(model, self.heldout, self.heldout))
        return scores

    @staticmethod
    def _scores(scores) -> dict:
        return {**_probe_scores(scores), "bits_per_pixel": scores.loss / math.log(2)}

    def facts(self) -> dict:
        name = "digits" if self.pixels.height == 8 else "MNIST"
        return {
            "name": name,
            "hash": f"{name}-{len(self.train)}",
            "training_tokens": len(self.train) * self.difficulty,
            "heldout_tokens": int(self.heldout.size),
            "heldout_streams": len(self.heldout),
        }

    def describe(self) -> str:
        facts = self.facts()
        return (
            f"{facts['name']}: {len(self.train):,} images of {self.pixels.height} x {self.pixels.width} pixels in "
            f"{self.vocab_size} levels, {facts['heldout_streams']} held out"
        )

    @torch.inference_mode()
    def samples(self, student, num: int = 8, seed: int = 0) -> list[list[list[int]]]:
        """Images drawn pixel by pixel from the student's own distribution, from `m_0`: `num` lists of rows."""
        generator = torch.Generator().manual_seed(seed)
        memory = student.model.start_memory().expand(num, -1, -1)
        drawn: list[torch.Tensor] = []
        for _ in range(self.difficulty):
            weights = student.read_logits(memory).softmax(-1).cpu()
            drawn.append(torch.multinomial(weights, 1, generator=generator)[:, 0].to(memory.device))
            memory = student.model.updater(memory, student.model.embed_tokens(drawn[-1]))
        images = torch.stack(drawn, dim=1).view(num, self.pixels.height, self.pixels.width)
        return images.tolist()


def _tokenizer(name: str):
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer could be loaded from {name!r}: {error}") from error


def _stream_scores(scores: StreamScores) -> dict:
    return {
        "bits_per_byte": scores.bits_per_byte,
        "accuracy": scores.accuracy,
        "losses": [round(float(loss), 5) for loss in scores.losses],
        "n": scores.num_tokens,
    }


def _probe_scores(scores) -> dict:
    return {"accuracy": scores.accuracy, "loss": scores.loss, "n": scores.n}

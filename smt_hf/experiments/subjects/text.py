"""Documents of text: packed rows to train on, held-out streams with carried memory to score."""

import copy
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoTokenizer, TextStreamer, set_seed

from smt_hf.data import (
    StreamedRows,
    byte_tokenizer,
    first_tokens,
    heldout_streams,
    load_corpus,
    pack,
    stream_corpus,
    tokenize,
)
from smt_hf.data.sources import Files
from smt_hf.errors import InputError
from smt_hf.evaluation import NGramModel, Scores
from smt_hf.evaluation.text import count_bytes, document_symbols, stream_labels, stream_symbols, uniform_bits
from smt_hf.teachers.loading import vocabulary_size
from smt_hf.training.arguments import PhaseArguments

from .subject import Subject, refuse_curriculum

_EVAL_ROW, _EVAL_ROWS = 128, 32
# The same for every run, so that bits per byte of all pipelines compare; several times the longest row of the default
# pipeline, so that memories older than a row are scored.
_STREAMS, _STREAM_LENGTH = 64, 2048
# Bytes held out: fewer than the first are refused, fewer than the second make a warning.
_FEWEST_BYTES, _FEW_BYTES = 64, 10_000
# Shorter lines recur in any text.
_LINE = 32
# Counting takes about 30 times as many bytes of memory.
_MOST_COUNTED_BYTES = 100_000_000


class TextSubject(Subject):
    """Documents, packed for training; held-out streams with carried memory.

    The held-out streams depend on the text, the tokenizer and `stream_length` alone.

    Args:
        phases: whose rows are packed.
        stream_length: tokens per held-out stream; default: 2,048. Shorter where the held-out text is, with a warning.
        streaming: read the documents while training; rows then start anew with every document.
        buffer_size: documents that the next one of a stream is drawn from.
        train_tokens: of the training text, the first so many; default: all. The held-out text stays the same.
        tokenizer: what makes tokens of text, where `tokenizer_name` names nothing; default: one token per byte.
        train_file, validation_file, source: as `smt_hf.data.load_corpus`.

    Raises:
        InputError: no such text or tokenizer, a text shorter than a training row, or too little held-out text.
    """

    metric = "bits_per_byte"
    name = "text"

    def __init__(
        self,
        phases: Iterable[PhaseArguments],
        seed: int = 0,
        train_file: Files = None,
        validation_file: Files = None,
        tokenizer_name: str | None = None,
        document_start_fraction: float = 0.05,
        stream_length: int | None = None,
        streaming: bool = False,
        buffer_size: int = 1000,
        tokenizer: Any = None,
        train_tokens: int | None = None,
        **source: Any,
    ):
        self.streaming, self.buffer_size, self.seed = streaming, buffer_size, seed
        if tokenizer_name is not None:
            tokenizer = _tokenizer(tokenizer_name)
        self.tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
        self.vocab_size = vocabulary_size(self.tokenizer)
        phases = list(phases)
        named: dict[str, Any] = {"train_file": train_file, "validation_file": validation_file, **source}
        self.corpus = stream_corpus(num_ranks=phases[0].world_size, **named) if streaming else load_corpus(**named)
        heldout = tokenize(self.corpus.heldout, self.tokenizer)
        self._rows: dict[int, Any] = {}
        self.num_train_tokens: int | None = None  # of a stream, nobody knows
        if not streaming:
            train = tokenize(self.corpus.train, self.tokenizer)
            train = train if train_tokens is None else first_tokens(train, train_tokens)
            self.num_train_tokens = int(sum(len(row) for row in train.with_format("numpy")["input_ids"]))
            lengths = {arguments.context_length for arguments in phases}
            self._rows = {length: pack(train, length, document_start_fraction, seed) for length in lengths}
        stream_length = _STREAM_LENGTH if stream_length is None else stream_length
        if stream_length < 1:
            raise InputError(f"held-out streams of text need at least 1 token, got {stream_length}.")
        self.streams = heldout_streams(heldout, _STREAMS, stream_length)
        self.heldout = self.streams, stream_labels(self.streams)
        self.difficulty = self.streams.shape[1] - 1
        self._check_heldout(stream_length, is_named=validation_file is not None)
        self.chance = uniform_bits()
        self.num_bytes = count_bytes(self.tokenizer, self.streams[:, 1:])
        self.bytes_per_token = self.num_bytes / self.streams[:, 1:].size
        self.eval_rows = [{"input_ids": row} for row in heldout_streams(heldout, _EVAL_ROWS, _EVAL_ROW)]

    def _check_heldout(self, stream_length: int, is_named: bool) -> None:
        num_bytes = self.corpus.heldout_bytes
        if num_bytes < _FEWEST_BYTES:
            raise InputError(
                f"the held-out text has {num_bytes} bytes, too few to score anything on: bring more text, or a longer "
                "`validation_file`."
            )
        messages = []
        if num_bytes < _FEW_BYTES or self.difficulty < stream_length:
            messages.append(
                f"the held-out text has only {num_bytes:,} bytes ({len(self.streams)} stream(s) of {self.difficulty:,} "
                "tokens): bits per byte are uncertain. Bring more text, or a longer `validation_file`."
            )
        # Where the held-out text was named, it has been compared with the training text already.
        share = 0.0 if self.streaming or is_named else trained_share(self.corpus.train, self.corpus.heldout)
        if share > 0.5:
            messages.append(
                f"{share:.0%} of the held-out text is also in the training text, line by line: bits per byte include "
                "memorised text. Hold out other text by `validation_file`."
            )
        for message in messages if PartialState().is_main_process else ():
            warnings.warn(message, stacklevel=3)

    def required(self, arguments: PhaseArguments) -> dict[str, Any]:
        refuse_curriculum(arguments)
        decodes = arguments.phase == "smt" or arguments.consistency_weight
        if decodes and arguments.future_length >= arguments.context_length:
            raise InputError(
                f"`future_length` ({arguments.future_length}) must be shorter than `context_length` "
                f"({arguments.context_length})."
            )
        if arguments.context_length % arguments.transition_steps:  # packed rows leave no reason for padding
            raise InputError(
                f"`transition_steps` ({arguments.transition_steps}) of the {arguments.phase} phase must divide its "
                f"`context_length` ({arguments.context_length})."
            )
        if not self.streaming:
            return {}
        if arguments.max_steps < 1:
            raise InputError("a stream has no end: set `max_steps`.")
        if arguments.label_cache_dir:
            raise InputError("`label_cache_dir` needs rows that are read again: leave it out with a stream.")
        if arguments.dataloader_num_workers:
            raise InputError("a stream is read in the process that trains: leave `dataloader_num_workers` at 0.")
        # The next row may be of another document, and a resumed run goes to its place without reading up to it.
        return {"carries_memory": False, "ignore_data_skip": True}

    def rows(self, arguments: PhaseArguments):
        if self.streaming:
            shuffling = (self.buffer_size, self.seed, arguments.process_index, arguments.world_size)
            return StreamedRows(copy.copy(self.corpus.train), self.tokenizer, arguments.context_length, *shuffling)
        return self._rows[arguments.context_length]

    def described_scores(self, scores: Scores) -> dict[str, Any]:
        losses = [round(float(loss), 5) for loss in scores.nats[1:] / scores.counts[1:]]
        bits = scores.bits_per(self.num_bytes)
        per_token = {"bits_per_byte": bits, "nats_per_token": scores.loss, "accuracy": scores.accuracy}
        return {**per_token, "losses": losses, "n": scores.n}

    @torch.inference_mode()
    def continuation(
        self, student, prompt_tokens: int, new_tokens: int, shows: bool = False, place: int | None = None
    ) -> tuple[torch.Tensor, ...]:
        """A held-out prompt and how the student continues it, a sample under seed 0.

        Args:
            shows: print the prompt, and its continuation as it comes.
            place: number of the stream that begins with the prompt; default: one after a third of them.

        Returns:
            Tokens of the prompt, at most `(prompt_tokens,)`, and of its continuation, at most `(new_tokens,)`.
        """
        stream = self.streams[len(self.streams) // 3 if place is None else place]
        prompt = torch.from_numpy(stream[:prompt_tokens])[None].to(student.device)
        if shows:
            print(f"--- held-out prompt ---\n{self.tokenizer.decode(prompt[0])}\n--- continuation ---", flush=True)
        set_seed(0)
        settings: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": True, "temperature": 0.7}
        settings["synced_gpus"] = False  # under ZeRO-3 transformers would wait for processes that do not generate
        settings["streamer"] = TextStreamer(self.tokenizer, skip_prompt=True) if shows else None
        return prompt[0], student.generate(prompt, **settings)[0, prompt.shape[1] :]

    def ngram_bits(self) -> dict[str, float]:
        """Bits per byte of n-gram models of 1, 2 and 3 bytes of context; none for a stream, which is not read whole."""
        if self.streaming:
            return {}
        counted, num_bytes = [], 0
        for text in _texts(self.corpus.train):
            counted.append(text)
            num_bytes += len(text.encode())
            if num_bytes > _MOST_COUNTED_BYTES:
                warnings.warn(f"the n-gram models count the first {num_bytes:,} bytes of the text.", stacklevel=2)
                break
        model = NGramModel(document_symbols(counted))
        sequences = stream_symbols(self.tokenizer, self.streams)
        return {f"ngram{context}": model.bits_per_byte(sequences, context) for context in (1, 2, 3)}

    def facts(self) -> dict:
        return {
            "name": self.corpus.name,
            **({"hub_name": self.corpus.hub_name} if self.corpus.hub_name else {}),
            "hash": self.corpus.digest,
            **({"streamed": True} if self.streaming else {"training_tokens": self.num_train_tokens}),
            **super().facts(),
        }

    def describe(self) -> str:
        what = f"streamed, {len(self.corpus.heldout)} held-out documents"
        if not self.streaming:
            what = f"{self.num_train_tokens:,} training tokens, {len(self.corpus.train)} documents"
        return f"{self.corpus.name}: {what}, hash {self.corpus.digest}"


def trained_share(train: Dataset, heldout: Dataset) -> float:
    """Share of the held-out characters whose lines are also lines of the training text; 0 if no line is long enough.

    Documents that differ as a whole may still hold the same text.
    """
    lines: dict[str, int] = {}
    for line in _lines(heldout):
        lines[line] = lines.get(line, 0) + len(line)
    total = sum(lines.values())
    seen = sum(lines.pop(line, 0) for line in _lines(train))
    return seen / max(total, 1)


def _lines(documents: Dataset) -> Iterator[str]:
    for text in _texts(documents):
        yield from (line for line in map(str.strip, text.splitlines()) if len(line) >= _LINE)


def _texts(documents: Dataset) -> Iterator[str]:
    """The texts one after the other, few of them in memory at once."""
    for batch in documents.iter(batch_size=100):
        yield from batch["text"]


def _tokenizer(name: str):
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"no tokenizer could be loaded from {name!r}: {error}") from error

"""From documents to rows of tokens: the byte tokenizer, tokenisation, packing ahead of training or while it runs."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset, Features, Sequence, Value, interleave_datasets
from datasets import IterableDataset as Documents
from datasets.distributed import split_dataset_by_node
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from smt_hf.errors import InputError

_TOKENS = Features({"input_ids": Sequence(Value("int32"))})
_AT_A_TIME = 32  # documents that the tokenizer gets at once


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: token id = byte value, `<|endoftext|>` = 256, `<|pad|>` = 257.

    A plain `PreTrainedTokenizerFast`, so that `AutoTokenizer.from_pretrained` needs no custom code.
    """
    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|pad|>")


def number_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer for tasks and pixels, whose tokens are not text: token `i` is written as the number i, with spaces
    between tokens."""
    vocabulary = {str(number): number for number in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _fast(tokenizer)


def _fast(tokenizer: Tokenizer, **special_tokens: str) -> PreTrainedTokenizerFast:
    settings = {"model_input_names": ["input_ids", "attention_mask"], "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings, **special_tokens)


def tokenize(documents: Dataset, tokenizer) -> Dataset:
    """`text` -> `input_ids`, one row per document, which ends with the end-of-text token. Cached on disk by `datasets`.

    Raises:
        InputError: the tokenizer has no end-of-text token, which separates documents.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no `eos_token`, which goes between documents: set one before training.")
    settings = {"input_columns": "text", "remove_columns": documents.column_names, "features": _TOKENS}
    fixed = {"tokenizer": tokenizer}
    return documents.map(token_ids, batched=True, batch_size=100, fn_kwargs=fixed, desc="tokenizing", **settings)


def token_ids(texts: list[str], tokenizer) -> dict[str, list[list[int]]]:
    """`input_ids` of each text, the end-of-text token after it. A text that spells a special token is text."""
    plain = {"add_special_tokens": False, "return_attention_mask": False, "split_special_tokens": True}
    encoded = tokenizer(texts, verbose=False, **plain)["input_ids"]
    return {"input_ids": [ids + [tokenizer.eos_token_id] for ids in encoded]}


def first_tokens(documents: Dataset, most: int) -> Dataset:
    """The first `most` tokens: whole documents, and the beginning of the one in which the number is reached.

    Args:
        documents: as from `tokenize`.
    """
    kept: list[np.ndarray] = []
    for row in documents.with_format("numpy"):
        kept.append(row["input_ids"][:most])
        most -= len(kept[-1])
        if not most:
            break
    return Dataset.from_dict({"input_ids": kept}, features=_TOKENS)


def pack(documents: Dataset, context_length: int, document_start_fraction: float = 0.0, seed: int = 0) -> Dataset:
    """Rows of `context_length + 1` tokens, cut from the concatenated documents.

    Neighbouring rows share one token: a row only predicts its last token, and the next row reads it. Cached on disk.

    Args:
        documents: as from `tokenize`.
        context_length: transitions per row.
        document_start_fraction: share of rows that start where a document starts, mixed in by `seed`, so that the
            memory of the empty prefix is also trained on beginnings.

    Raises:
        InputError: the text is shorter than one row.
    """
    documents = documents.with_format("numpy")

    def rows(at_starts: bool) -> Dataset:
        fixed = {"context_length": context_length, "at_starts": at_starts}
        title = f"packing to {context_length} + 1 tokens"
        packed = documents.map(_pack_batch, batched=True, fn_kwargs=fixed, features=_TOKENS, desc=title)
        return packed.with_format("numpy")

    blocks = rows(at_starts=False)
    if not len(blocks):
        raise InputError(
            f"the text is shorter than one training row of {context_length + 1} tokens: bring more text or set a "
            "smaller `context_length`."
        )
    if document_start_fraction > 0:
        starts = rows(at_starts=True)
        if len(starts):
            shares = [1 - document_start_fraction, document_start_fraction]
            blocks = interleave_datasets([blocks, starts], shares, seed, stopping_strategy="all_exhausted")
    return blocks


def _pack_batch(batch, context_length: int, at_starts: bool):
    tokens = np.concatenate(batch["input_ids"])
    if at_starts:
        begins = np.cumsum([0, *(len(ids) for ids in batch["input_ids"][:-1])])
    else:
        begins = np.arange(0, len(tokens), context_length)
    begins = begins[begins + context_length < len(tokens)]
    return {"input_ids": tokens[begins[:, None] + np.arange(context_length + 1)].astype(np.int32)}


def heldout_streams(documents: Dataset, num_streams: int, length: int) -> np.ndarray:
    """Equally long, equally spaced pieces of the held-out text, `(num_streams, length + 1)` tokens, int64.

    A short text gives fewer or shorter pieces, so that neighbouring pieces overlap as little as possible.

    Raises:
        InputError: fewer than two tokens are held out.
    """
    tokens = np.concatenate(documents.with_format("numpy")["input_ids"][:])
    if len(tokens) < 2:
        raise InputError("the held-out text has fewer than two tokens: bring more text or a `validation_file`.")
    length = min(length, len(tokens) - 1)
    num_streams = max(1, min(num_streams, (len(tokens) - 1) // length))
    begins = np.linspace(0, len(tokens) - length - 1, num_streams).astype(np.int64)
    return tokens[begins[:, None] + np.arange(length + 1)].astype(np.int64)


class StreamedRows(IterableDataset):
    """Packed rows of `context_length + 1` tokens from an endless stream of documents, for one rank of several.

    Every document is read by one rank alone. Rows carry `document_ids`: the memory starts anew with every document, and
    its first token is predicted only where a row starts with it. Neighbouring rows share one token. Each pass over the
    documents has another order, drawn from a buffer.

    The position is exact: [`state_dict`] holds the place in the stream, the buffer, what is left of the last document
    and the state of the random numbers, so that a resumed run reads what an uninterrupted one would.

    All ranks make theirs at the same time: they tell each other whether there is a document for each, so that all of
    them raise, not only the one without.

    Args:
        documents: a streamed dataset with a column `text`.
        tokenizer: with an `eos_token`, which ends each document.
        context_length: transitions per row.
        buffer_size: number of documents that the next one is drawn from; 1 keeps their order.
        seed: of the order.
        rank, num_ranks: of this process.

    Raises:
        InputError: the tokenizer has no `eos_token`, `buffer_size` is below 1, or a rank gets no document.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer,
        context_length: int,
        buffer_size: int = 1000,
        seed: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
    ):
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no `eos_token`, which goes between documents: set one before training.")
        if buffer_size < 1:
            raise InputError(f"`buffer_size` must be at least 1, got {buffer_size}.")
        # Never read itself: a dataset that has been read begins where its reader was, and so do its shallow copies.
        self._unread = split_dataset_by_node(documents, rank, num_ranks) if num_ranks > 1 else documents
        if not all(gather_object([next(iter(copy.deepcopy(self._unread)), None) is not None])):
            raise InputError(
                f"the stream has too few documents, or too few files with documents, to give each of {num_ranks} "
                "process(es) one: bring more, or start fewer processes."
            )
        self.tokenizer, self.context_length, self.buffer_size = tokenizer, context_length, buffer_size
        self.seed, self.rank, self.num_ranks = seed, rank, num_ranks
        self._state: dict[str, Any] = {"num_ranks": num_ranks, "epoch": 0, "num_documents": 0, "num_rows": 0}
        # `source`: the place of `documents`; `texts`: drawn, not yet tokenised; `tokens`: of no complete row yet.
        self._state |= {"source": None, "is_drained": False, "random": None, "buffer": [], "texts": []}
        self._state |= {"tokens": [], "document_ids": []}

    def state_dict(self) -> dict[str, Any]:
        """The position after the last row that was given out, as JSON can hold it."""
        return copy.deepcopy(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises:
            InputError: it was saved by another number of ranks, whose documents were others.
        """
        if state["num_ranks"] != self.num_ranks:
            raise InputError(
                f"the position in the stream was saved by {state['num_ranks']} process(es), this run has "
                f"{self.num_ranks}: resume with as many, or start a new run from the exported student."
            )
        self._state = copy.deepcopy(state)

    def __iter__(self) -> Iterator[dict]:
        state, length, drawn = self._state, self.context_length, self._drawn()
        while True:
            while len(state["texts"]) < _AT_A_TIME:
                state["texts"].append(next(drawn))
            for ids in token_ids(state["texts"], self.tokenizer)["input_ids"]:
                del state["texts"][0]  # before its rows are given out: a position lies behind them
                state["tokens"].extend(ids)
                state["document_ids"].extend([state["num_documents"]] * len(ids))
                state["num_documents"] += 1
                while len(state["tokens"]) > length:
                    tokens = np.array(state["tokens"][: length + 1], dtype=np.int64)
                    documents = np.array(state["document_ids"][: length + 1], dtype=np.int64)
                    del state["tokens"][:length], state["document_ids"][:length]
                    labels = tokens.copy()
                    labels[1:][documents[1:] != documents[:-1]] = -100  # no memory says what the next document is
                    number = state["num_rows"] * self.num_ranks + self.rank
                    state["num_rows"] += 1
                    yield {"input_ids": tokens, "labels": labels, "document_ids": documents, "example_ids": number}

    def _drawn(self) -> Iterator[str]:
        """Documents in the order that the buffer gives them, pass after pass."""
        state = self._state
        while True:
            generator = np.random.default_rng((self.seed, state["epoch"], self.rank))
            if state["random"] is not None:
                generator.bit_generator.state = state["random"]
            found = bool(state["buffer"]) or state["is_drained"]
            if not state["is_drained"]:
                documents = copy.deepcopy(self._unread)
                if state["source"] is not None:
                    documents.load_state_dict(state["source"])
                for row in documents:
                    found = True
                    state["source"] = documents.state_dict()
                    if len(state["buffer"]) < self.buffer_size:
                        state["buffer"].append(row["text"])
                        continue
                    place = int(generator.integers(self.buffer_size))
                    state["random"] = generator.bit_generator.state
                    text, state["buffer"][place] = state["buffer"][place], row["text"]
                    yield text
                if not found:  # or this would never end
                    raise InputError("the stream gives no document any more: its files have changed while it was read.")
                state["is_drained"] = True
            while state["buffer"]:
                place = int(generator.integers(len(state["buffer"])))
                state["random"] = generator.bit_generator.state
                yield state["buffer"].pop(place)
            state |= {"epoch": state["epoch"] + 1, "source": None, "is_drained": False, "random": None}

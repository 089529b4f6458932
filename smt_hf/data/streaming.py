"""Documents that are read while the model trains: nothing is downloaded whole or tokenised before the first step."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from datasets import IterableDataset as Documents
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset

from smt_hf.errors import InputError

from .packing import token_ids

_AT_A_TIME = 32  # documents that the tokenizer gets at once


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
        self.documents = split_dataset_by_node(documents, rank, num_ranks) if num_ranks > 1 else documents
        self._start = self.documents.state_dict()
        if not all(gather_object([next(iter(self.documents), None) is not None])):
            raise InputError(
                f"the stream has too few documents, or too few files with documents, to give each of {num_ranks} "
                "process(es) one: bring more, or start fewer processes."
            )
        self.tokenizer, self.context_length, self.buffer_size = tokenizer, context_length, buffer_size
        self.seed, self.rank, self.num_ranks = seed, rank, num_ranks
        self._state: dict[str, Any] = {
            "num_ranks": num_ranks,
            "epoch": 0,
            "source": None,  # the place of `documents`
            "is_drained": False,
            "random": None,
            "buffer": [],
            "texts": [],  # drawn, not yet tokenised
            "tokens": [],  # of no complete row yet
            "document_ids": [],
            "num_documents": 0,
            "num_rows": 0,
        }

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
        state, length = self._state, self.context_length
        for text_tokens in self._tokenised():
            state["tokens"].extend(text_tokens)
            state["document_ids"].extend([state["num_documents"]] * len(text_tokens))
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

    def _tokenised(self) -> Iterator[list[int]]:
        state, drawn = self._state, self._drawn()
        while True:
            while len(state["texts"]) < _AT_A_TIME:
                state["texts"].append(next(drawn))
            for ids in token_ids(state["texts"], self.tokenizer)["input_ids"]:
                del state["texts"][0]  # before its rows are yielded: a saved position comes after them
                yield ids

    def _drawn(self) -> Iterator[str]:
        """Documents in the order that the buffer gives them, pass after pass."""
        state = self._state
        generator = np.random.default_rng((self.seed, state["epoch"], self.rank))
        if state["random"] is not None:
            generator.bit_generator.state = state["random"]
        while True:
            found = bool(state["buffer"]) or state["is_drained"]
            if not state["is_drained"]:
                if state["source"] is not None:
                    self.documents.load_state_dict(state["source"])
                for row in self.documents:
                    found = True
                    state["source"] = self.documents.state_dict()
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
            generator = np.random.default_rng((self.seed, state["epoch"], self.rank))
            self.documents.load_state_dict(self._start)  # or it would give nothing any more

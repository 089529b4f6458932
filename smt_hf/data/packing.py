"""From documents to rows of tokens: the byte tokenizer, tokenisation, packing."""

import numpy as np
from datasets import Dataset, Features, Sequence, Value, interleave_datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from smt_hf.errors import InputError

_TOKENS = Features({"input_ids": Sequence(Value("int32"))})


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


def pack(documents: Dataset, context_length: int, document_start_fraction: float = 0.0, seed: int = 0) -> Dataset:
    """Rows of `context_length + 1` tokens, cut from the concatenated documents.

    Neighbouring rows share one token: a row only predicts its last token, and the next row reads it. Cached on disk.

    Args:
        documents: as from `tokenize`.
        context_length: transitions per row.
        document_start_fraction: share of rows that start where a document starts, so that the memory of the empty
            prefix is also trained on beginnings.
        seed: seed of the mix.

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

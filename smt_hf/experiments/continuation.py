"""A prompt and its continuation, streamed: what `recipes/generate.py` runs."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TextStreamer, set_seed
from transformers.utils import logging

from smt_hf.command_line import argument, parse
from smt_hf.errors import InputError
from smt_hf.student import SMTRecurrentCache
from smt_hf.student.modeling_smt_recurrent import CACHE_NAME

from .finetuning import load_checkpoint


@dataclass
class GenerateArguments:
    """Arguments of `continue_text`."""

    checkpoint: str | None = argument(None, "Folder or Hub name of an SMTRecurrentForCausalLM.")
    prompt: str | None = argument(None, "Text to continue. `-` reads it from the standard input.", is_text=True)
    max_new_tokens: int = argument(200, "Largest number of tokens to generate.")
    temperature: float = argument(0.7, "Temperature of sampling. 0 takes the most likely token.")
    top_p: float = argument(1.0, "Sample from the smallest set of tokens whose probabilities sum to this.")
    seed: int = argument(0, "Seed of sampling.")
    load_state: str | None = argument(None, "State file to continue from: it holds what was read before the prompt.")
    save_state: str | None = argument(None, "State file to write: it will hold everything read and written so far.")
    overwrite_state: bool = argument(False, "Let `save_state` replace a file.")


def continue_text(arguments: GenerateArguments) -> str:
    """Print the prompt and, token by token, how the checkpoint continues it; return the continuation.

    Raises:
        InputError: bad input, with the way to fix it.
    """
    _check(arguments)
    try:
        prompt = sys.stdin.read() if arguments.prompt == "-" else str(arguments.prompt)
        prompt.encode()  # Python hands over bytes that are no text as lone surrogates, which no tokenizer reads
    except UnicodeError as error:
        raise InputError("the prompt is not text in UTF-8: convert it.") from error
    logging.disable_progress_bar()
    model, tokenizer = load_checkpoint(str(arguments.checkpoint))
    path = arguments.load_state
    try:
        state = SMTRecurrentCache() if path is None else SMTRecurrentCache.load(path, model.config)
    except (OSError, ValueError) as error:
        raise InputError(f"`load_state` {path} cannot be read: {error}") from error
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].long()
    if not ids.shape[1]:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise InputError("the prompt is empty and the tokenizer has no beginning-of-text token: give a prompt.")
        ids = torch.tensor([[start]])
    ids, already = ids.to(model.device), state.get_seq_length()
    set_seed(arguments.seed)
    sampling = {"temperature": arguments.temperature, "top_p": arguments.top_p} if arguments.temperature > 0 else {}
    generated = model.generate(
        ids,
        attention_mask=torch.ones(1, already + ids.shape[1], dtype=torch.long, device=model.device),
        max_new_tokens=arguments.max_new_tokens,
        do_sample=bool(sampling),
        streamer=TextStreamer(tokenizer),
        **sampling,
        **{CACHE_NAME: state},
    )
    if arguments.save_state:
        unread = generated[:, state.get_seq_length() - already :]  # the last token has been written, not read
        with torch.inference_mode():
            model(unread, past_key_values=state)
        state.save(arguments.save_state, overwrite=arguments.overwrite_state)
    return tokenizer.decode(generated[0, ids.shape[1] :])


def _check(arguments: GenerateArguments) -> None:
    if not arguments.checkpoint or arguments.prompt is None:
        raise InputError("name a checkpoint and a prompt: `--checkpoint DIR_OR_REPO --prompt 'def main('`.")
    for name, is_valid, wanted in (
        ("max_new_tokens", arguments.max_new_tokens >= 1, "1 or more"),
        ("temperature", 0 <= arguments.temperature < float("inf"), "a number of 0 or more"),
        ("top_p", 0 < arguments.top_p <= 1, "above 0 and at most 1"),
        ("seed", 0 <= arguments.seed < 2**32, "from 0 to 2^32 - 1"),
    ):
        if not is_valid:
            raise InputError(f"`{name}` must be {wanted}, got {getattr(arguments, name)}.")
    if not arguments.save_state:
        return
    path = Path(arguments.save_state)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"`save_state` {path} cannot be written: name a file in a folder that is there.")
    if path.exists() and not arguments.overwrite_state:
        raise InputError(f"`save_state` {path} exists: name another file or pass `--overwrite_state`.")


def parse_generate(argv: list[str]) -> GenerateArguments:
    """All settings of a continuation from its command line.

    Raises:
        InputError: as `parse`.
        SystemExit: after `--help`.
    """
    usage = "usage: python recipes/generate.py --checkpoint DIR_OR_REPO --prompt TEXT [--flag ...]"
    return parse(GenerateArguments, argv, usage)

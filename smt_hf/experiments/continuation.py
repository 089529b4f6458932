"""A prompt and its continuation, streamed: what `recipes/generate.py` runs."""

import os
import sys
from dataclasses import dataclass

import torch
from transformers import TextStreamer, set_seed
from transformers.utils import logging

from smt_hf.command_line import argument, built, check_keys, check_values, described, names_of, read_flags
from smt_hf.student import SMTRecurrentCache
from smt_hf.student.modeling_smt_recurrent import CACHE_NAME

from .finetuning import load_checkpoint


@dataclass
class GenerateArguments:
    """Arguments of `continue_text`."""

    checkpoint: str | None = argument(None, "Folder or Hub name of an SMTRecurrentForCausalLM.")
    prompt: str | None = argument(None, "What to go on from; `-` reads it from the standard input.")
    max_new_tokens: int = argument(200, "Tokens at most.")
    temperature: float = argument(0.7, "Of sampling; 0 takes the likeliest token.")
    top_p: float = argument(1.0, "Of sampling: the smallest set of tokens with so much probability.")
    seed: int = argument(0, "Of sampling.")
    load_state: str | None = argument(None, "State file to go on from: what was read before the prompt.")
    save_state: str | None = argument(None, "State file to write: everything read and written so far.")
    overwrite_state: bool = argument(False, "Whether `save_state` may replace a file.")


def continue_text(arguments: GenerateArguments) -> str:
    """Print the prompt and, token by token, how the checkpoint goes on.

    Returns:
        The continuation.

    Raises:
        ValueError: bad input, with the way to mend it.
    """
    if not arguments.checkpoint or arguments.prompt is None:
        raise ValueError("name a checkpoint and a prompt: `--checkpoint DIR_OR_REPO --prompt 'def main('`.")
    if arguments.save_state and os.path.exists(arguments.save_state) and not arguments.overwrite_state:
        raise FileExistsError(f"{arguments.save_state} exists: name another file or pass `--overwrite_state`.")
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    logging.disable_progress_bar()
    model, tokenizer = load_checkpoint(arguments.checkpoint)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    state = SMTRecurrentCache()
    if arguments.load_state:
        state = SMTRecurrentCache.load(arguments.load_state, model.config)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].long()
    if not ids.shape[1]:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ValueError("the prompt is empty and the tokenizer has no beginning-of-text token: give a prompt.")
        ids = torch.tensor([[start]])
    ids = ids.to(model.device)
    already = state.get_seq_length()
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


def parse_generate(argv: list[str]) -> GenerateArguments:
    """All settings of a continuation from its command line.

    Raises:
        ValueError: as `parse_run`.
        SystemExit: after `--help`.
    """
    prompt = None
    if "--prompt" in argv:  # the word after it is any text, which no parser is to read
        at = argv.index("--prompt")
        if at + 1 == len(argv):
            raise ValueError("`--prompt` needs a value.")
        prompt, argv = argv[at + 1], [*argv[:at], *argv[at + 2 :]]
    if "--help" in argv or "-h" in argv:
        lines = ["usage: python recipes/generate.py --checkpoint DIR_OR_REPO --prompt TEXT [--flag ...]", ""]
        print("\n".join([*lines, *described(GenerateArguments, "", {})]))
        raise SystemExit(0)
    flags = read_flags(argv)
    check_keys(flags, names_of(GenerateArguments), "argument")
    check_values(flags, GenerateArguments)
    arguments = built(GenerateArguments, flags)
    arguments.prompt = prompt
    return arguments

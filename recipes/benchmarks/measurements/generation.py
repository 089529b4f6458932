"""Tokens per second that models generate, greedily, from a prompt of one token.

Shapes: B sequences, N new tokens, K memory tokens, D width.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm

from smt_hf.command_line import argument
from smt_hf.student import SMTRecurrentForCausalLM, SMTRecurrentStep

from .arguments import BenchmarkArguments
from .peers import STATE_NAMES, count_parameters, describe, load_student, mamba_like, rwkv_like, start_state
from .results import facts

_NUM_WARMUP_TOKENS = 8


# (prompt (B, 1), number of new tokens N) -> new tokens (B, N)
Generate = Callable[[torch.Tensor, int], torch.Tensor]


def by_generate(model) -> Generate:
    """`generate()` as users call it; no token ends it early."""
    model.generation_config.eos_token_id = None

    def generate(prompt, num_tokens):
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            **start_state(model, prompt.shape[0]),
        )
        return tokens[:, prompt.shape[1] :]

    return generate


def by_forward(model) -> Generate:
    """A loop over `forward` with the state handed back, without `generate()`."""

    def generate(prompt, num_tokens):
        tokens = torch.empty(prompt.shape[0], num_tokens, dtype=torch.long)
        token, state = prompt, start_state(model, prompt.shape[0])
        for index in range(num_tokens):
            outputs = model(input_ids=token, use_cache=True, **state)
            name = next(name for name in STATE_NAMES if name in outputs)
            state = {name: outputs[name]}
            token = outputs.logits[:, -1].argmax(-1, keepdim=True)
            tokens[:, index : index + 1] = token
        return tokens

    return generate


def by_transition(student: SMTRecurrentForCausalLM, compiled: bool = False) -> Generate:
    """A loop over the student's parts: one transition and one readout per token, no cache object, no `forward`.

    Args:
        compiled: whether the work of one token is compiled by inductor, without Python between its kernels.
    """

    one_token = SMTRecurrentStep(student)

    def step(token, memory):
        """`(B,)`, `(B, K, D)` -> the next token and memory."""
        logits, memory = one_token(token, memory)
        return logits.argmax(-1), memory

    if compiled:
        step = torch.compile(step, fullgraph=True, dynamic=False, options={"cpp_wrapper": True})

    def generate(prompt, num_tokens):
        tokens = torch.empty(prompt.shape[0], num_tokens, dtype=torch.long)
        token, memory = prompt[:, 0], one_token.start(prompt.shape[0]).contiguous()
        for index in range(num_tokens):
            token, memory = step(token, memory)
            tokens[:, index] = token
        return tokens

    return generate


ARMS: dict[str, Callable[[Any], Generate]] = {
    "student_generate": by_generate,
    "student_loop": by_transition,
    "student_compiled": partial(by_transition, compiled=True),
    "mamba_generate": by_generate,
    "mamba_loop": by_forward,
    "rwkv_generate": by_generate,
    "rwkv_loop": by_forward,
}


@dataclass
class GenerationArguments(BenchmarkArguments):
    """The arms, and how much they generate."""

    arms: list[str] = argument(list(ARMS), "Arms to measure, side by side.")
    batch_sizes: list[int] = argument([1, 64], "Sequences side by side.")
    new_tokens: int = argument(256, "Tokens generated per sequence in a repeat.")
    repeats: int = argument(7, "Timed repeats of every arm; the median counts.")
    peer_layers: int | None = argument(None, "Layers of Mamba and RWKV; default: the student's updater + readout.")

    def __post_init__(self):
        super().__post_init__()
        self.at_least_1("batch_sizes", "new_tokens", "repeats")
        self.among("arms", tuple(ARMS))


@torch.inference_mode()
def measure_generation(arguments: GenerationArguments) -> list[dict]:
    """Measure the arms, interleaved: every repeat runs all of them, so that they share what else the machine does.

    Arms of one model must generate the same tokens in the warm-up.

    Returns:
        One line per batch size and arm: `tokens_per_second` (all sequences together), `seconds` (the median of a
        repeat), `all_seconds`, `error` (why an arm of `torch.compile` has no numbers, else `None`).

    Raises:
        RuntimeError: arms of one model disagree.
    """
    torch.set_num_threads(arguments.num_threads)
    models: dict[str, Any] = {"student": load_student(arguments)}
    for name, peer in (("mamba", mamba_like), ("rwkv", rwkv_like)):
        if any(arm.startswith(name) for arm in arguments.arms):
            models[name] = peer(models["student"], arguments.peer_layers)
    for name, model in models.items():
        print(f"{name}: {count_parameters(model):,} parameters, {describe(model.config)}")
    arms = {arm: ARMS[arm](models[arm.partition("_")[0]]) for arm in arguments.arms}

    lines = []
    shared = facts(arguments.num_threads)
    total = len(arguments.batch_sizes) * (1 + arguments.repeats) * len(arms)
    with tqdm(total=total, unit="run", dynamic_ncols=True) as bar:
        for batch_size in arguments.batch_sizes:
            prompt = torch.randint(models["student"].config.vocab_size, (batch_size, 1))
            errors = _warm_up(arms, prompt, bar)
            seconds: dict[str, list[float]] = {arm: [] for arm in arms}
            for _ in range(arguments.repeats):
                for arm, generate in arms.items():
                    bar.set_description(f"{arm}, batch {batch_size}", refresh=False)
                    if arm not in errors:
                        begin = time.perf_counter()
                        tokens = generate(prompt, arguments.new_tokens)
                        seconds[arm].append(time.perf_counter() - begin)
                        assert tokens.shape == (batch_size, arguments.new_tokens)
                    bar.update()
            for arm in arms:
                model = models[arm.partition("_")[0]]
                median = statistics.median(seconds[arm]) if seconds[arm] else None
                lines.append(
                    {
                        "benchmark": "generate",
                        "arm": arm,
                        "batch_size": batch_size,
                        "tokens_per_second": median and batch_size * arguments.new_tokens / median,
                        "parameters": count_parameters(model),
                        "seconds": median,
                        "all_seconds": seconds[arm],
                        "new_tokens": arguments.new_tokens,
                        "repeats": arguments.repeats,
                        "error": errors.get(arm),
                        "sizes": describe(model.config),
                        "model": arguments.model if arm.startswith("student") else None,
                        **shared,
                    }
                )
    return lines


def _warm_up(arms: dict[str, Generate], prompt: torch.Tensor, bar: tqdm) -> dict[str, str]:
    """Run every arm once. Returns arm -> error of the arms that cannot be compiled here."""
    errors: dict[str, str] = {}
    expected: dict[str, torch.Tensor] = {}
    for arm, generate in arms.items():
        bar.set_description(f"warm-up of {arm}", refresh=False)
        bar.update()
        try:
            tokens = generate(prompt, _NUM_WARMUP_TOKENS)
        except Exception as error:
            if not arm.endswith("compiled"):
                raise
            # What goes wrong depends on the compiler: none, an old one, missing headers.
            errors[arm] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            continue
        reference = expected.setdefault(arm.partition("_")[0], tokens)
        if not torch.equal(tokens, reference):
            raise RuntimeError(f"{arm} generates other tokens than another arm of the same model: nothing to compare.")
    return errors

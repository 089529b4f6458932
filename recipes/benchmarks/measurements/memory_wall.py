"""What a context of n tokens costs: bytes that must be kept, and seconds for one token more.

The student's state is the same tensor after any number of tokens; a Transformer keeps keys and values of all of them.

- **Student**: streams random tokens, in chunks, through its state. A context is measured when it has really been read.
  One fresh process reads all contexts one after the other: its peak at a context is what a process that stopped there
  would show.
- **Transformer** (`LlamaForCausalLM` with as many parameters): one token after a cache of n random keys and values,
  which costs as much as after n tokens that were really read; a fresh process for every context. `transformer` has the
  `DynamicCache` that `generate()` uses, which copies all keys and values of a layer for every token;
  `transformer_preallocated` writes into buffers of full length instead.

Seconds per token are those of one step of `forward` with logits: one token for each of B sequences.

Shapes: B sequences, H key-value heads, S head width.
"""

import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer

from smt_hf.command_line import argument
from smt_hf.errors import InputError
from smt_hf.student import SMTRecurrentCache
from smt_hf.student.modeling_smt_recurrent import CACHE_NAME

from .arguments import BenchmarkArguments
from .peers import count_parameters, describe, llama_config_like, load_student
from .results import facts

ARMS = ("student", "transformer", "transformer_preallocated")
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class MemoryWallArguments(BenchmarkArguments):
    """The arms, the contexts, and when to stop."""

    arms: list[str] = argument(list(ARMS), "Arms to measure.")
    min_tokens: int = argument(1024, "Shortest context.")
    max_tokens: int = argument(1024**2, "Longest context.")
    growth_factor: int = argument(4, "Ratio of each context to the one before it.")
    batch_size: int = argument(1, "Sequences side by side.")
    steps: int = argument(16, "Timed one-token steps at every context; the median counts.")
    chunk_tokens: int = argument(256, "Tokens that the student reads in one forward between contexts.")
    num_key_value_heads: int | None = argument(None, "Key-value heads of the Transformer; default: as many as heads.")
    memory_limit_gb: float = argument(8.0, "Limit of parameters and state together, in 1e9 bytes.")
    seconds_limit: float = argument(
        300.0,
        "Seconds after which the student stops reading; the Transformer stops after a context that took longer.",
    )
    figure: str | None = argument(None, "Picture of the result, a file that ends in .png.")

    def __post_init__(self):
        super().__post_init__()
        self.at_least_1("min_tokens", "batch_size", "steps", "chunk_tokens")
        self.among("arms", ARMS)
        if self.growth_factor < 2 or self.max_tokens < self.min_tokens:
            raise InputError("`growth_factor` must be at least 2 and `max_tokens` at least `min_tokens`.")
        self.positive("memory_limit_gb", "seconds_limit")
        if self.figure is not None and not self.figure.endswith(".png"):
            raise InputError(f"`figure` must be a file that ends in .png, got {self.figure!r}.")

    def contexts(self) -> list[int]:
        """`min_tokens`, times `growth_factor` again and again up to `max_tokens`, which is always the last."""
        lengths = [self.min_tokens]
        while lengths[-1] * self.growth_factor < self.max_tokens:
            lengths.append(lengths[-1] * self.growth_factor)
        return [*lengths, self.max_tokens] if lengths[-1] < self.max_tokens else lengths


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer, `(B, H, tokens, S)`, written into buffers of full length.

    What `update` returns are views of what is filled: no copies, no mask.
    """

    def __init__(self, key_buffer: torch.Tensor, value_buffer: torch.Tensor, length: int):
        super().__init__()
        self.key_buffer, self.value_buffer = key_buffer, value_buffer
        self.dtype, self.device = key_buffer.dtype, key_buffer.device
        self.keys, self.values = key_buffer[:, :, :length], value_buffer[:, :, :length]
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        begin = self.keys.shape[2]
        end = begin + key_states.shape[2]
        self.key_buffer[:, :, begin:end] = key_states
        self.value_buffer[:, :, begin:end] = value_states
        self.keys, self.values = self.key_buffer[:, :, :end], self.value_buffer[:, :, :end]
        return self.keys, self.values


def filled_cache(config: LlamaConfig, batch_size: int, context: int, room: int | None) -> DynamicCache:
    """A cache of `context` random keys and values in every layer.

    Args:
        room: tokens for which there is a buffer beyond the context; `None`: no buffer, the cache grows by copying.
    """
    cache = DynamicCache(config=config)
    shape = (batch_size, config.num_key_value_heads, context + (room or 0), config.head_dim)
    for index in range(config.num_hidden_layers):
        keys, values = torch.empty(shape).normal_(), torch.empty(shape).normal_()
        if room is not None:
            cache.layers[index] = PreallocatedLayer(keys, values, context)
        else:
            layer = cache.layers[index]
            layer.lazy_initialization(keys, values)
            # Not through `update`, whose copy would count as peak memory.
            layer.keys, layer.values = keys, values
    return cache


def bytes_per_token(config: LlamaConfig, batch_size: int) -> int:
    """Bytes of keys and values, float32, that the Transformer keeps for one token of each sequence."""
    return 2 * 4 * config.num_hidden_layers * batch_size * config.num_key_value_heads * config.head_dim


class PeakMemory:
    """Growth of this process's resident memory since the object was made, in bytes; `None` where Linux cannot say."""

    def __init__(self):
        try:
            _CLEAR_REFS.write_text("5")  # the peak starts anew
            self.start = self._read("VmRSS")
        except OSError:
            self.start = None

    @staticmethod
    def _read(name: str) -> int:
        (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(name + ":"))
        return 1024 * int(line.split()[1])

    def peak_growth(self) -> int | None:
        return None if self.start is None else max(self._read("VmHWM") - self.start, 0)


def _storage_bytes(tensors) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _seconds_per_token(model, state, arguments: MemoryWallArguments, deadline: float | None = None) -> float:
    """Median of one-token steps; after the deadline no further step begins."""
    seconds: list[float] = []
    for _ in range(arguments.steps):
        token = torch.randint(model.config.vocab_size, (arguments.batch_size, 1))
        begin = time.perf_counter()
        model(input_ids=token, use_cache=True, **{CACHE_NAME: state})
        seconds.append(time.perf_counter() - begin)
        if deadline is not None and time.perf_counter() > deadline:
            break
    return statistics.median(seconds)


@torch.inference_mode()
def stream_student(arguments: MemoryWallArguments) -> list[dict]:
    """Read random tokens and measure at every context that is reached within the limit of seconds."""
    torch.set_num_threads(arguments.num_threads)
    model = load_student(arguments)
    shape = (arguments.batch_size, arguments.chunk_tokens)
    _first_forward(model)
    memory, cache = PeakMemory(), SMTRecurrentCache()
    points: list[dict] = []
    (layer,) = cache.layers
    begin = time.perf_counter()
    with tqdm(total=arguments.max_tokens, unit="token", desc="student reads", dynamic_ncols=True) as bar:
        for context in arguments.contexts():
            while (num_missing := context - layer.cumulative_length) > 0:
                if time.perf_counter() - begin > arguments.seconds_limit:
                    return points
                tokens = torch.randint(model.config.vocab_size, shape)[:, :num_missing]
                model(input_ids=tokens, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})
                bar.update(tokens.shape[1])
            seconds = _seconds_per_token(model, cache, arguments)
            state_bytes = _storage_bytes([layer.memory])
            spent = time.perf_counter() - begin
            points.append(_point(context, seconds, state_bytes, memory.peak_growth(), spent, True))
    return points


@torch.inference_mode()
def measure_transformer(arguments: MemoryWallArguments, config: LlamaConfig, context: int, preallocated: bool) -> dict:
    """One token after a cache of `context` random keys and values."""
    torch.set_num_threads(arguments.num_threads)
    model = LlamaForCausalLM(config).eval()
    _first_forward(model)
    begin = time.perf_counter()
    memory = PeakMemory()
    cache = filled_cache(config, arguments.batch_size, context, 1 + arguments.steps if preallocated else None)
    buffers = [
        (layer.key_buffer, layer.value_buffer) if preallocated else (layer.keys, layer.values) for layer in cache.layers
    ]
    state_bytes = _storage_bytes([buffer for pair in buffers for buffer in pair])
    del buffers
    model(input_ids=torch.zeros(arguments.batch_size, 1, dtype=torch.long), use_cache=True, **{CACHE_NAME: cache})
    seconds = _seconds_per_token(model, cache, arguments, begin + arguments.seconds_limit)
    return _point(context, seconds, state_bytes, memory.peak_growth(), time.perf_counter() - begin, True)


def _first_forward(model) -> None:
    """What torch loads and allocates once is not counted."""
    model(input_ids=torch.zeros(1, 1, dtype=torch.long))


def _point(
    context: int,
    seconds: float | None,
    state_bytes: int,
    peak: int | None = None,
    spent: float | None = None,
    measured: bool = False,
) -> dict:
    return {
        "context": context,
        "seconds_per_token": seconds,
        "state_bytes": state_bytes,
        "peak_growth_bytes": peak,
        "measuring_seconds": spent,
        "measured": measured,
        "error": None,
    }


def _needed(point: dict) -> int:
    return max(point["state_bytes"], point["peak_growth_bytes"] or 0)


def in_a_fresh_process(function, *arguments):
    """`function(*arguments)`, computed by a process that has done nothing else: its memory is that of the function."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure_memory_wall(arguments: MemoryWallArguments) -> list[dict]:
    """Measure all arms at all contexts.

    Returns:
        One line per arm and context: `state_bytes` (exactly the tensors that must be kept), `peak_growth_bytes` (of
        the process's resident memory, beyond the model), `seconds_per_token`, `fits` (parameters and the larger of the
        two are within the limit), `measuring_seconds` (until the context was measured), `measured`, `error` (why a
        context that should have fitted did not, else `None`).

        Not measured are contexts that the student did not reach in time (its state keeps its size, its seconds are
        those of the last context reached), and the first context at which the Transformer's cache alone is larger than
        the limit (no seconds); longer ones are left out.
    """
    student = load_student(arguments)
    config = llama_config_like(student, arguments.max_tokens + 1 + arguments.steps, arguments.num_key_value_heads)
    with torch.device("meta"):
        num_parameters = count_parameters(LlamaForCausalLM(config))
    models = {"student": (count_parameters(student), student.config), "transformer": (num_parameters, config)}
    for name, (count, its_config) in models.items():
        print(f"{name}: {count:,} parameters, {describe(its_config)}")
    limit = arguments.memory_limit_gb * 1e9
    tokens_at_limit = max(int(limit - 4 * num_parameters), 0) // bytes_per_token(config, arguments.batch_size)
    print(f"the Transformer's cache reaches {arguments.memory_limit_gb:g} GB at {tokens_at_limit:,} tokens")

    shared = facts(arguments.num_threads)
    lines: list[dict] = []
    for arm in arguments.arms:
        count, its_config = models["student" if arm == "student" else "transformer"]
        points = (
            _student_points(arguments, student)
            if arm == "student"
            else _transformer_points(arguments, config, arm, limit - 4 * count)
        )
        for point in points:
            lines.append(
                {
                    "benchmark": "memory_wall",
                    "arm": arm,
                    **point,
                    "fits": point["error"] is None and 4 * count + _needed(point) <= limit,
                    "batch_size": arguments.batch_size,
                    "parameters": count,
                    "parameter_bytes": 4 * count,
                    "tokens_at_limit": None if arm == "student" else tokens_at_limit,
                    "memory_limit_gb": arguments.memory_limit_gb,
                    "seconds_limit": arguments.seconds_limit,
                    "steps": arguments.steps,
                    "sizes": describe(its_config),
                    "model": arguments.model if arm == "student" else None,
                    **shared,
                }
            )
    return lines


def _student_points(arguments: MemoryWallArguments, student) -> list[dict]:
    points = in_a_fresh_process(stream_student, arguments)
    config = student.config
    state_bytes = 4 * arguments.batch_size * config.num_memory_tokens * config.hidden_size
    seconds = points[-1]["seconds_per_token"] if points else None
    not_reached = arguments.contexts()[len(points) :]
    return points + [_point(context, seconds, state_bytes) for context in not_reached]


def _transformer_points(
    arguments: MemoryWallArguments, config: LlamaConfig, arm: str, state_limit: float
) -> list[dict]:
    """Contexts up to the first that does not fit into `state_limit` bytes, or takes too long."""
    points = []
    for context in tqdm(arguments.contexts(), unit="context", desc=arm, dynamic_ncols=True):
        state_bytes = context * bytes_per_token(config, arguments.batch_size)
        point = _point(context, None, state_bytes)
        if state_bytes <= state_limit:
            try:
                preallocated = arm == "transformer_preallocated"
                point = in_a_fresh_process(measure_transformer, arguments, config, context, preallocated)
            except RuntimeError as error:
                # Killed by the system, or refused by torch's allocator. Anything else is no matter of memory.
                if not isinstance(error, BrokenProcessPool) and "allocate memory" not in str(error):
                    raise
                point["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        points.append(point)
        too_long = (point["measuring_seconds"] or 0) > arguments.seconds_limit
        if too_long or point["error"] is not None or _needed(point) > state_limit:
            break
    return points

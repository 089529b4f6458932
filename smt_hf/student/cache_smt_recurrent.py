"""The state of the recurrent student, in the form that `generate()` passes around as `past_key_values`.

Shapes: B sequences, K memory tokens, D width, T tokens of one forward.
"""

import copy
import os

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers.cache_utils import Cache, CacheLayerMixin

# Of the files that `SMTRecurrentCache.save` writes.
_VERSION_KEY, _VERSION = "smt_recurrent_state", "1"


class SMTRecurrentStateLayer(CacheLayerMixin):
    """One memory per sequence and the number of tokens that made it.

    `memory` is `(B, K, D)`, or `None` before the first token: the model then starts from its learned
    `initial_memory`. Updates are out of place, so gradients flow through a cache that is handed from one forward to
    the next; call `SMTRecurrentCache.detach_()` to cut them.
    """

    # Not compileable: generate() would otherwise build 4D attention masks and compile every forward on a GPU.
    is_compileable = False
    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self):
        super().__init__()
        self.memory: torch.Tensor | None = None
        self.cumulative_length = 0
        self.record_past = False
        # Memories before and after every token since the last crop, oldest first; None stands for a start from
        # `initial_memory`. Only filled while `record_past`.
        self._history: list[torch.Tensor | None] = []

    def lazy_initialization(self, key_states, value_states):
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        raise ValueError("A recurrent state has no keys and values to update; use `update_memory`.")

    def update_memory(self, memories: torch.Tensor, num_tokens: int | None = None) -> None:
        """Move the state past T tokens.

        Args:
            memories: `(B, T, K, D)`, the memory after each of the new tokens, padding included; or only after the last
                of them, where nothing is recorded.
            num_tokens: T, if `memories` does not hold all.
        """
        if self.record_past:
            if not self._history:
                self._history.append(self.memory)
            self._history.extend(memories.unbind(1))
        # A copy: a view would keep the memories of the whole prompt alive.
        self.memory = memories[:, -1].clone() if memories.shape[1] > 1 else memories[:, 0]
        self.cumulative_length += memories.shape[1] if num_tokens is None else num_tokens
        self.is_initialized = True

    @property
    def batch_size(self) -> int:
        return -1 if self.memory is None else self.memory.shape[0]

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: generate() slices its inputs by this number."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; 0 only drops the recorded history.

        Raises:
            ValueError: more tokens than were recorded since `activate_past_recording()` or the last crop.
        """
        num_tokens = abs(tokens_to_remove)
        if num_tokens:
            if num_tokens >= len(self._history):
                raise ValueError(
                    f"Cannot remove {num_tokens} tokens from a recurrent state: {max(len(self._history) - 1, 0)} "
                    "are on record. Call `cache.activate_past_recording()` before tokens that may have to be removed."
                )
            self.memory = self._history[-1 - num_tokens]
            self.cumulative_length -= num_tokens
        self._history = []

    def reset(self) -> None:
        self.memory, self.cumulative_length, self._history, self.is_initialized = None, 0, [], False

    def _map(self, function) -> None:
        if self.memory is not None:
            self.memory = function(self.memory)
        self._history = [memory if memory is None else function(memory) for memory in self._history]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map(lambda memory: memory.index_select(0, beam_idx.to(memory.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda memory: memory.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda memory: memory[indices.to(memory.device)])

    def offload(self) -> None:
        self._map(lambda memory: memory.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Nothing to do: the model moves the memory to its own device when it is used."""

    def detach_(self) -> None:
        self._map(torch.Tensor.detach)

    def __deepcopy__(self, memo):
        # copy.deepcopy refuses tensors that carry a gradient.
        other = type(self)()
        other.__dict__.update({key: value for key, value in self.__dict__.items() if key not in ("memory", "_history")})
        clone = lambda memory: memory if memory is None else memory.detach().clone()  # noqa: E731
        other.memory, other._history = clone(self.memory), [clone(memory) for memory in self._history]
        memo[id(self)] = other
        return other


class SMTRecurrentCache(Cache):
    """State of a batch: `layers[0].memory` is `(B, K, D)`, whatever the number of tokens read.

    A new cache stands for "nothing read yet". `reorder`, `repeat`, `select` and `crop` change it in place, as the
    methods with longer names do that `generate()` calls.
    """

    def __init__(self):
        super().__init__(layers=[SMTRecurrentStateLayer()])

    @property
    def memory(self) -> torch.Tensor | None:
        """`(B, K, D)`, with its gradient; `None` before the first token."""
        return self.layers[0].memory

    def detach_(self) -> "SMTRecurrentCache":
        """Cut the gradient between the tokens read so far and later ones. Returns the cache itself."""
        for layer in self.layers:
            layer.detach_()
        return self

    def detach(self) -> "SMTRecurrentCache":
        """A copy without gradient. Tokens read with the copy do not change this cache."""
        return copy.deepcopy(self)

    def reorder(self, indices: torch.LongTensor) -> None:
        """Row i becomes the former row `indices[i]`, `(B,)`."""
        self.reorder_cache(indices)

    def repeat(self, repeats: int) -> None:
        """Repeat every row `repeats` times, side by side: the state of one prompt for several continuations."""
        self.batch_repeat_interleave(repeats)

    def select(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in their order."""
        self.batch_select_indices(indices)

    def save(self, path: str | os.PathLike, overwrite: bool = False) -> None:
        """Write the state to a safetensors file. The file appears only when it is complete.

        Raises:
            ValueError: nothing has been read yet.
            FileExistsError: there is such a file, and `overwrite` is false.
        """
        if self.memory is None:
            raise ValueError("The state is empty, there is nothing to save: read a text first.")
        if os.path.exists(path) and not overwrite:
            raise FileExistsError(f"{path} exists: name another file or pass `overwrite=True`.")
        facts = {"format": "pt", _VERSION_KEY: _VERSION, "num_tokens": str(self.get_seq_length())}
        written = f"{os.fspath(path)}.{os.getpid()}.part"
        try:
            # `safetensors.torch.save_file` would make a file that only its owner can read.
            with open(written, "wb") as file:
                file.write(save({"memory": self.memory.detach().cpu().contiguous()}, metadata=facts))
            os.replace(written, path)
        finally:
            if os.path.exists(written):
                os.remove(written)

    @classmethod
    def load(cls, path: str | os.PathLike, config=None) -> "SMTRecurrentCache":
        """The state that `save` wrote, on the CPU; the model moves it to its own device.

        Args:
            config: configuration of the model that is to continue from the state; the sizes are then compared.

        Raises:
            ValueError: not such a file, of another version, or of another size than `config` says.
        """
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                memory = file.get_tensor("memory") if "memory" in file.keys() else None  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file, or is cut off: {error}.") from error
        if facts.get(_VERSION_KEY) != _VERSION or memory is None or memory.dim() != 3:
            raise ValueError(
                f"{path} holds no recurrent state of version {_VERSION} (found {facts.get(_VERSION_KEY)}): write it by "
                "`SMTRecurrentCache.save` of this release."
            )
        if config is not None and tuple(memory.shape[1:]) != (config.num_memory_tokens, config.hidden_size):
            raise ValueError(
                f"{path} holds {memory.shape[1]} memory tokens of width {memory.shape[2]}; the model has "
                f"{config.num_memory_tokens} of {config.hidden_size}: it was saved from another model."
            )
        cache = cls()
        cache.layers[0].update_memory(memory[:, None], num_tokens=int(facts["num_tokens"]))
        return cache

    def __deepcopy__(self, memo):
        other = type(self)()
        other.layers = copy.deepcopy(self.layers, memo)
        return other


def own_cache(cache) -> SMTRecurrentCache | None:
    """The cache itself, a new one for an empty foreign cache, an error for a foreign cache that holds tokens."""
    # By name: a checkpoint loaded as remote code has its own copy of the class.
    if cache is None or type(cache).__name__ == SMTRecurrentCache.__name__:
        return cache
    if isinstance(cache, Cache) and cache.get_seq_length() == 0:
        return SMTRecurrentCache()
    raise ValueError(
        f"`past_key_values` is a {type(cache).__name__} with keys and values; pass an SMTRecurrentCache as "
        "returned by this model, or none. (Prefix tuning makes such a cache: use LoRA or prompt tuning instead.)"
    )


__all__ = ["SMTRecurrentCache"]

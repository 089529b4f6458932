"""A Trainer whose rows are read window by window, the memory carried from one optimiser step to the next."""

import torch
from torch.utils.data import SequentialSampler

from smt_hf.data.batching import CarriedWindows

from .phase_trainer import PhaseTrainer


class CarryingTrainer(PhaseTrainer):
    """Reads rows as parallel streams, a window of `transition_steps` per step, from the memory that the step before has
    reached; no gradient crosses a window.

    A subclass says by `carries_memory` whether it does so.
    """

    def __init__(self, *args, **kwargs):
        self._memories: torch.Tensor | None = None  # (streams, K, D), NaN where another rank has it
        super().__init__(*args, **kwargs)

    @property
    def carries_memory(self) -> bool:
        raise NotImplementedError

    def _numbered(self, rows, column: str = "example_ids"):
        if not self.carries_memory or column != "example_ids":
            return super()._numbered(rows, column)
        args = self.args
        streams = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        num_steps = args.max_steps
        if num_steps < 1:
            windows = len(rows) * (len(rows[0]["input_ids"]) - 1) // args.transition_steps
            num_steps = max(windows // streams, 1)  # of one epoch
        return CarriedWindows(rows, streams, args.transition_steps, num_steps, self._data_seed)

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(rows) if isinstance(rows, CarriedWindows) else super()._get_train_sampler(rows)

    def _before_forward(self, inputs: dict) -> dict:
        streams, is_fresh = inputs.get("stream_ids"), inputs.get("is_fresh")
        super()._before_forward(inputs)
        if streams is None:
            return {}
        if self._memories is not None and is_fresh is not None:
            memory = self._memories[streams]
            inputs["memory"] = memory.masked_fill(is_fresh[:, None, None], float("nan"))
        return {"streams": streams}

    def _after_forward(self, inputs: dict, outputs, carried: dict) -> None:
        if not carried:
            return
        if self._memories is None:
            shape = (self.train_dataset.num_streams, *outputs.memory.shape[1:])
            self._memories = torch.full(shape, float("nan"), dtype=outputs.memory.dtype, device=outputs.memory.device)
        self._memories[carried["streams"]] = outputs.memory

    def _carried_tensors(self) -> dict[str, torch.Tensor]:
        if self._memories is None:
            return {}
        # Every stream lives on one rank; the others hold NaN for it.
        owned = self.accelerator.reduce((~self._memories.isnan()).to(self._memories.dtype), reduction="sum")
        memories = self.accelerator.reduce(self._memories.nan_to_num(0.0), reduction="sum")
        return {"memories": memories.masked_fill(owned == 0, float("nan")).cpu()}

    def _restore_carried(self, tensors: dict[str, torch.Tensor]) -> None:
        self._memories = tensors["memories"].to(self.args.device)

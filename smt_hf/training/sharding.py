"""Whole tensors out of sharded optimisers and back: what a phase hands to the next, whatever it ran under."""

import os

import torch
from safetensors.torch import load_file

STUDENT_OPTIMIZER = "student_optimizer.safetensors"


def load_student_optimizer(checkpoint: str) -> dict[str, dict[str, torch.Tensor]]:
    """Optimiser state of the student by parameter name, from a checkpoint of any phase."""
    state: dict[str, dict[str, torch.Tensor]] = {}
    for entry, value in load_file(os.path.join(checkpoint, STUDENT_OPTIMIZER)).items():
        name, key = entry.rsplit("/", 1)
        state.setdefault(name, {})[key] = value
    return state


def whole_state(trainer) -> dict[str, dict[str, torch.Tensor]]:
    """Optimiser state of the student by parameter name, whole, on the CPU where it was sharded. A collective call."""
    if trainer.is_deepspeed_enabled:
        return _from_deepspeed(trainer)
    named = trainer.model.student.named_parameters()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return {
        name: {key: _whole(value) for key, value in optimizer.state[parameter].items() if torch.is_tensor(value)}
        for name, parameter in named
        if parameter in optimizer.state
    }


def give_state(trainer, state: dict[str, dict[str, torch.Tensor]]) -> None:
    """Inverse of `whole_state`, for what the trainer's optimiser trains. A collective call."""
    if trainer.is_deepspeed_enabled:
        _to_deepspeed(trainer, state)
        return
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    # As torch's own load_state_dict: step counters live on the device only where the fused kernel wants them.
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for name, parameter in trainer.model.student.named_parameters():
        if name in state and parameter.requires_grad:
            optimizer.state[parameter] = {
                key: _like(parameter, value.to(parameter.device) if value.dim() or on_device else value)
                for key, value in state[name].items()
            }


def _whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor().cpu() if hasattr(value, "full_tensor") else value


def _like(parameter, value: torch.Tensor) -> torch.Tensor:
    """`value` sharded as `parameter` is."""
    if not hasattr(parameter, "device_mesh") or value.dim() == 0:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def _flat_parameters(engine) -> list[torch.Tensor]:
    """The flat fp32 shards of this rank, which the optimiser's state belongs to."""
    optimizer = engine.optimizer
    flat = getattr(optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3
    return list(optimizer.single_partition_of_fp32_groups if flat is None else flat)


def _link(engine) -> None:
    """Let every parameter find its part of the flat states. ZeRO-1 and 2 do so once, after the first of several
    parameter groups has been stepped, and leave the others without."""
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _from_deepspeed(trainer) -> dict[str, dict[str, torch.Tensor]]:
    from deepspeed.utils import safe_get_full_optimizer_state

    engine = trainer.deepspeed
    states = engine.optimizer.optimizer.state
    own: dict = next((states[flat] for flat in _flat_parameters(engine) if states.get(flat)), {})
    keys = sorted(key for key in own if key != "step")
    _link(engine)
    whole: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in trainer.model.student.named_parameters():
        if parameter.requires_grad:
            values = {key: safe_get_full_optimizer_state(parameter, key) for key in keys}
            whole[name] = {key: value.detach().cpu().float() for key, value in values.items()}
            if "step" in own:
                whole[name]["step"] = torch.tensor(float(own["step"]))
    return whole


def _to_deepspeed(trainer, state: dict[str, dict[str, torch.Tensor]]) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state

    engine = trainer.deepspeed
    first = next(iter(state.values()))
    for flat in _flat_parameters(engine):  # as the optimiser makes them in its first step
        engine.optimizer.optimizer.state[flat] = {
            key: value.to(flat.device).clone() if key == "step" else torch.zeros_like(flat)
            for key, value in first.items()
        }
    _link(engine)
    for name, parameter in trainer.model.student.named_parameters():
        if name in state and parameter.requires_grad:
            for key, value in state[name].items():
                if key != "step":
                    safe_set_full_optimizer_state(parameter, value.to(trainer.args.device), key)

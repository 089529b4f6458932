"""A pretended accelerator: it finds tensors that were left on the CPU on a machine that has nothing but a CPU.

Tensors on it hold real data and say that they are on another device. An operation that mixes them with a tensor on the
CPU fails, as it would on a GPU, so that device placement is checked together with values and gradients.
"""

import contextlib

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

# A device that torch knows on every machine and that no test uses for anything else.
DEVICE = torch.device("meta")
# What torch itself allows between a GPU and the CPU: copies, and indices on the CPU.
_MAY_MIX = {"aten._to_copy.default", "aten.copy_.default", "aten.index.Tensor", "aten.index_put_.default"}
_TO_PYTHON = "aten._local_scalar_dense.default"


class PretendedTensor(torch.Tensor):
    """`data` on the pretended device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            data.shape,
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            device=DEVICE,
        )
        made.on_cpu = data
        return made

    def __repr__(self, **_):
        return f"PretendedTensor({self.on_cpu})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _call(function, args, kwargs or {})


class _Pretending(TorchDispatchMode):
    """New tensors that ask for the device are made on it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _call(function, args, kwargs or {})


def _call(function, args, kwargs):
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    away = [tensor for tensor in tensors if isinstance(tensor, PretendedTensor)]
    here = [tensor for tensor in tensors if not isinstance(tensor, PretendedTensor) and tensor.dim()]
    if away and here and str(function) not in _MAY_MIX:
        shapes = [tuple(tensor.shape) for tensor in here]
        raise RuntimeError(f"{function}: expected all tensors on one device, those of shape {shapes} are on the CPU")
    goes_away = bool(away)
    kwargs = dict(kwargs)
    if kwargs.get("device") is not None:
        goes_away = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs["device"] = torch.device("cpu")
    plain_args, plain_kwargs = tree_map(to_cpu, (args, kwargs))
    with torch.inference_mode(False), torch.no_grad():  # tensors of that mode cannot be wrapped
        results = function(*plain_args, **plain_kwargs)
        if not goes_away or str(function) == _TO_PYTHON:
            return results
        known = {id(tensor.on_cpu): tensor for tensor in away}  # an operation in place returns its argument
        return tree_map(lambda value: known[id(value)] if id(value) in known else to_device(value), results)


def to_device(value):
    """A tensor as a copy-free tensor on the pretended device; anything else as it is."""
    is_plain = isinstance(value, torch.Tensor) and not isinstance(value, PretendedTensor)
    return PretendedTensor(value) if is_plain else value


def to_cpu(value):
    """The data of a tensor on the pretended device; anything else as it is."""
    return value.on_cpu if isinstance(value, PretendedTensor) else value


def moved(model: nn.Module) -> nn.Module:
    """The module with all parameters and buffers on the pretended device, in place; tied weights stay tied."""
    new: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in new:
                    new[id(parameter)] = nn.Parameter(PretendedTensor(parameter.data), parameter.requires_grad)
                module._parameters[name] = new[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = to_device(buffer)
    return model


@contextlib.contextmanager
def pretended():
    """Inside, `device=DEVICE` and what follows from it works."""
    make = torch.tensor

    def tensor(data, *args, device=None, **kwargs):  # does not come through the dispatcher with its device
        made = make(to_cpu(data), *args, **kwargs)
        return to_device(made) if device is not None and torch.device(device).type == DEVICE.type else made

    torch.tensor = tensor
    try:
        with _Pretending():
            yield
    finally:
        torch.tensor = make

"""What a launch has turned out to be, against what was asked for."""

import contextlib
import os
import warnings
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from smt_hf.errors import InputError

# Set by `accelerate launch`, for a single process too.
_LAUNCHED = "ACCELERATE_MIXED_PRECISION"
# As the launch configuration has it; what is in the environment later is what DeepSpeed is to see.
LAUNCHED_PRECISION = os.environ.get(_LAUNCHED, "no")


def launched_with_deepspeed() -> bool:
    """Whether the launch configuration asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def launched_sharded() -> bool:
    """Whether the launch configuration asks for DeepSpeed or FSDP."""
    return launched_with_deepspeed() or os.environ.get("ACCELERATE_USE_FSDP") == "true"


@contextlib.contextmanager
def applied_launch(arguments) -> Iterator[None]:
    """Around the construction of `TrainingArguments`: everything that this machine and launch decide about them.

    Sets `use_cpu`, `bf16` and `dataloader_pin_memory` of `arguments`, the device of accelerate's state, and under
    DeepSpeed the variable ACCELERATE_MIXED_PRECISION: its own bfloat16 would make memories and norms of half precision.

    Raises:
        InputError: float16 was asked for.
    """
    on_cpu = not torch.accelerator.is_available()
    if on_cpu:
        arguments.use_cpu = True  # DeepSpeed and accelerate's launcher look for it, and for a GPU without it
        arguments.dataloader_pin_memory = False
    under_deepspeed = bool(arguments.deepspeed) or launched_with_deepspeed()
    if under_deepspeed:
        settle_deepspeed()
    autocasts = under_deepspeed and (arguments.bf16 or LAUNCHED_PRECISION == "bf16")
    if autocasts:
        arguments.bf16 = False
        os.environ[_LAUNCHED] = "no"
    if arguments.fp16 or LAUNCHED_PRECISION == "fp16":
        raise InputError(
            "`fp16` is not supported: the memory is carried over thousands of steps, and a loss scale hides what "
            "overflows. Use `bf16`."
        )
    yield
    if autocasts:  # matrix products in bfloat16 under autocast, over float32 weights and states
        arguments.deepspeed_plugin.hf_ds_config.config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    state = arguments.distributed_state
    if state is not None and state.device.type == "cpu":
        # transformers 5.17 loads to this device, and torch knows no "cpu:0" there.
        state.device = torch.device("cpu")
        vars(arguments)["_setup_devices"] = torch.device("cpu")  # what `device` has been computed to already


def check_launch(accelerator: Accelerator, wants_deepspeed: bool = False, wants_fsdp: bool = False) -> None:
    """Refuse to train as something else than what the launch asked for: several switches of the libraries fall back
    to plain data parallelism, or to one process, without a word.

    Args:
        wants_deepspeed, wants_fsdp: whether the training arguments ask for it; a launch configuration is read from the
            environment that `accelerate launch` makes.

    Raises:
        InputError: what was asked for, what is there, and how to get it.
    """
    realised = accelerator.distributed_type
    wants_deepspeed = wants_deepspeed or launched_with_deepspeed()
    wants_fsdp = wants_fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    there = f"this is {realised.value} with {accelerator.num_processes} process(es)"
    if wants_deepspeed and realised != DistributedType.DEEPSPEED:
        raise InputError(
            f"the launch asked for DeepSpeed, but {there}: on a CPU set `use_cpu: true` in the launch configuration "
            "and DS_ACCELERATOR=cpu, and do not set ACCELERATE_USE_CPU."
        )
    plugin = accelerator.state.deepspeed_plugin if realised == DistributedType.DEEPSPEED else None
    contradictions = getattr(getattr(plugin, "hf_ds_config", None), "mismatches", None)
    if contradictions:
        raise InputError(
            "DeepSpeed's configuration has values that mismatch TrainingArguments values "
            f"({'; '.join(contradictions)}): set them to `auto` there, or make them equal."
        )
    zero = {} if plugin is None else plugin.deepspeed_config.get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise InputError(
            "ZeRO-3 is to save whole weights, which the next phase and `student/` are made of: set "
            "`zero3_save_16bit_model: true` in the launch configuration, or "
            "`stage3_gather_16bit_weights_on_model_save` in DeepSpeed's."
        )
    if wants_fsdp and realised != DistributedType.FSDP:
        raise InputError(
            f"the launch asked for FSDP, but {there}: accelerate shards on accelerators only. On a CPU, take "
            "recipes/accelerate/ddp.yaml or a deepspeed_zero*.yaml."
        )
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked != accelerator.num_processes:
        raise InputError(f"the launch started {asked} processes, but {there}.")
    if _LAUNCHED in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise InputError(
            f"the launch asked for several processes, but {there}: `distributed_type: MULTI_CPU` and `--cpu` need "
            "mpirun. Take recipes/accelerate/cpu.yaml, or unset MASTER_ADDR if one process is what you want."
        )


def settle_deepspeed() -> None:
    """Quiet DeepSpeed, and on a CPU keep it from compiling a communication kernel on the first run: a minute, and a
    compiler, for nothing that training needs."""
    import deepspeed

    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning)
    if not torch.accelerator.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

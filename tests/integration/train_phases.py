"""Run under torchrun by test_distributed.py: trains the phases that it is told, rank 0 writes what came out."""

import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from tests.conftest import make_fast_weight_composite, make_pretrained_composite
from tests.unit.training.test_trainers import PLAIN_STEPS, make_trainer, some_rows

# End of a kind -> the composite that is trained. "_half" is a model in bfloat16 as the teacher.
TEACHERS = {
    "_fast": make_fast_weight_composite,
    "_lora": make_pretrained_composite,
    "_half": lambda: make_pretrained_composite("bfloat16"),
}


def backend_settings(backend: str) -> dict:
    if backend.startswith("zero"):
        zero = {"stage": int(backend[-1]), "stage3_gather_16bit_weights_on_model_save": True}
        if backend == "zero3":
            zero["stage3_param_persistence_threshold"] = 0  # or a small model is not sharded at all
        auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
        return {
            "deepspeed": {
                "zero_optimization": zero,
                "zero_allow_untested_optimizer": True,
                **dict.fromkeys(auto, "auto"),
            }
        }
    if backend == "fsdp2":
        return {
            "fsdp": True,
            "fsdp_config": {
                "fsdp_version": 2,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "state_dict_type": "SHARDED_STATE_DICT",
            },
        }
    return {}


def is_sharded(trainer, backend: str) -> bool:
    """Whether parameters really are in shards: that a library says so proves nothing."""
    parameters = list(trainer.model.parameters())
    if backend == "fsdp2":
        return all(isinstance(parameter, torch.distributed.tensor.DTensor) for parameter in parameters)
    if backend == "zero3":
        return all(
            parameter.ds_tensor.numel() < parameter.ds_numel for parameter in parameters if parameter.ds_numel > 1
        )
    if backend in ("zero1", "zero2"):
        flat = trainer.deepspeed.optimizer.single_partition_of_fp32_groups
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        return sum(part.numel() for part in flat) < trained
    return False


def ragged_rows() -> list[dict]:
    """Of 7 to 13 tokens: the batches of two ranks are seldom of one length."""
    return [{"input_ids": row["input_ids"][: 13 - 5 * place % 7]} for place, row in enumerate(some_rows())]


def main(folder: str, batch: str, backend: str, accumulation: str, *kinds: str) -> None:
    report: dict[str, dict] = {}
    for kind in kinds:
        AcceleratorState._reset_state()
        settings = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, **PLAIN_STEPS.get(kind, {})}
        if "muon" in kind:
            del settings["optim"]
        teacher = next((name for name in TEACHERS if kind.endswith(name)), None)
        if teacher is not None and kind.startswith("smt"):
            settings["teacher_weight"] = 0.0  # those teachers predict no tokens themselves
        name = kind.removesuffix("_adamw").removesuffix("_bf16").removesuffix("_ragged")
        trainer = make_trainer(
            name if teacher is None else name.removesuffix(teacher),
            f"{folder}/{kind}",
            model=None if teacher is None else TEACHERS[teacher](),
            rows=ragged_rows() if kind.endswith("_ragged") else None,
            per_device_train_batch_size=int(batch),
            gradient_accumulation_steps=int(accumulation),
            save_strategy="steps",
            save_steps=4,
            **(settings if not kind.endswith("_adamw") else {"learning_rate": 1e-3}),
            bf16=kind.endswith("_bf16"),
            **backend_settings(backend),
            before=shard_on_a_cpu if backend == "fsdp2" else None,
        )
        trainer.train()
        sharded = is_sharded(trainer, backend)
        measured = ("eval_drift_by_age", "eval_free_run", "eval_teacher_forced", "eval_lyapunov", "eval_rollout")
        trainer.save_model(f"{folder}/{kind}/final")
        report[kind] = {
            "distributed_type": trainer.accelerator.distributed_type.value,
            "world_size": trainer.args.world_size,
            "is_sharded": sharded,
            "tokens": trainer.cost.tokens,
            "evaluation": {name: value for name, value in trainer.evaluate().items() if name in measured},
            "log": [line for line in trainer.state.log_history if "loss" in line],
        }
        is_first = trainer.is_world_process_zero()
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.free_memory()
    if is_first:
        Path(folder, "report.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


def shard_on_a_cpu(arguments) -> None:
    """accelerate shards by FSDP on accelerators only; this is what makes it shard here, and why it stands in a test."""
    arguments.distributed_state.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Run under torchrun by test_distributed.py: trains the phases that it is told, rank 0 writes what came out."""

import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from smt_hf import SMTForPreTraining
from smt_hf.teachers import pretrained
from smt_hf.training import SMTPreTrainingConfig
from smt_hf.training.cached_teacher import fill_teacher_caches
from smt_hf.training.teacher_cache import TeacherCache
from tests.conftest import VOCAB, make_fast_weight_composite, make_pretrained_composite, student_config, wake
from tests.unit.training.test_trainers import PLAIN_STEPS, make_trainer, some_rows

# End of a kind -> the composite that is trained, for the folder of a Llama. "_half" is a model in bfloat16 as the
# teacher, and the last two are distilled: by a model that reads its windows one by one, and from a cache.
TEACHERS = {
    "_fast": lambda _: make_fast_weight_composite(),
    "_lora": lambda _: make_pretrained_composite(),
    "_half": lambda _: make_pretrained_composite("bfloat16"),
    "_distilled": lambda model: make_distilled_composite(model, holds_model=True),
    "_cached": lambda model: make_distilled_composite(model, holds_model=False),
}


def make_distilled_composite(model: str, **fields) -> SMTForPreTraining:
    """A student and the language model in a folder as its teacher, with its head."""
    torch.manual_seed(0)
    teacher = {"model_name_or_path": model, "keeps_head": True, **fields}
    student = student_config(embedding_size=6)
    return wake(SMTForPreTraining(SMTPreTrainingConfig(student=student, teacher=teacher))).eval()


def fill_cache(trainer, rows: list[dict], note: Path) -> None:
    """As a recipe does before the training; the note says how many rows this process has read."""
    fill, read = TeacherCache.fill, []

    def counted(self, teacher, batch_size, missing, shows=True):
        read.append(len(missing))
        fill(self, teacher, batch_size, missing, shows)

    TeacherCache.fill = counted
    fill_teacher_caches(trainer.model.config.teacher, [trainer.args], lambda _: rows, trainer.eval_dataset)
    TeacherCache.fill = fill
    note.write_text(json.dumps(read))


def rows_of_documents() -> list[dict]:
    """Of one document or of several, which are windows of their own for a language model: ranks have unequal numbers
    of them."""
    ids = [torch.arange(13).mul(1 + place % 4).div(13, rounding_mode="floor").numpy() for place in range(40)]
    return [{**row, "document_ids": own} for row, own in zip(some_rows(), ids)]


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


ROWS = {"_ragged": ragged_rows, "_documents": rows_of_documents}


def main(folder: str, batch: str, backend: str, accumulation: str, *kinds: str) -> None:
    report: dict[str, dict] = {}
    for kind in kinds:
        AcceleratorState._reset_state()
        settings = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, **PLAIN_STEPS.get(kind, {})}
        if "muon" in kind:
            del settings["optim"]
        name = kind.removesuffix("_adamw").removesuffix("_bf16").removesuffix("_ragged").removesuffix("_documents")
        teacher = next((ending for ending in TEACHERS if name.endswith(ending)), None)
        if teacher is not None and kind.startswith("smt"):
            settings["teacher_weight"] = 0.0  # those teachers predict no tokens themselves
        if teacher in ("_distilled", "_cached"):
            settings |= {"distillation_weight": 1.0, "distillation_top_k": 8}
        if teacher == "_cached":
            settings["teacher_cache_dir"] = f"{folder}/cache"
        pretrained._MOST_LOGITS = 13 * VOCAB
        rows = next((make() for ending, make in ROWS.items() if kind.endswith(ending)), None)
        trainer = make_trainer(
            name if teacher is None else name.removesuffix(teacher),
            f"{folder}/{kind}",
            model=None if teacher is None else TEACHERS[teacher](f"{folder}/model"),
            rows=rows,
            per_device_train_batch_size=int(batch),
            gradient_accumulation_steps=int(accumulation),
            save_strategy="steps",
            save_steps=4,
            **(settings if not kind.endswith("_adamw") else {"learning_rate": 1e-3}),
            bf16=kind.endswith("_bf16"),
            **backend_settings(backend),
            before=shard_on_a_cpu if backend == "fsdp2" else None,
        )
        if teacher == "_cached":
            rank = trainer.args.process_index
            fill_cache(trainer, some_rows() if rows is None else rows, Path(folder, f"read_{kind}_{rank}.json"))
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

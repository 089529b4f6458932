"""Run under torchrun by test_distributed.py: trains the phases that it is told, rank 0 writes what came out."""

import json
import sys

from safetensors.torch import save_file

from tests.unit.training.test_trainers import PLAIN_STEPS, make_trainer


def main(folder: str, batch: str, *kinds: str) -> None:
    report: dict[str, dict] = {}
    for kind in kinds:
        trainer = make_trainer(
            kind,
            f"{folder}/{kind}",
            per_device_train_batch_size=int(batch),
            max_grad_norm=0.0,
            save_strategy="steps",
            save_steps=4,
            **PLAIN_STEPS.get(kind, {"optim": "sgd", "learning_rate": 0.05}),
        )
        trainer.train()
        report[kind] = {
            "distributed_type": trainer.accelerator.distributed_type.value,
            "world_size": trainer.args.world_size,
            "tokens": trainer.cost.tokens,
            "log": [line for line in trainer.state.log_history if "loss" in line],
        }
        if trainer.is_world_process_zero():
            save_file(
                {name: value.clone() for name, value in trainer.model.state_dict().items()}, f"{folder}/{kind}.st"
            )
    if trainer.is_world_process_zero():
        with open(f"{folder}/report.json", "w") as file:
            json.dump(report, file)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What a launch has turned out to be, without launching anything."""

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from smt_hf.errors import InputError
from smt_hf.training.launch import check_launch


def under_deepspeed(mismatches):
    config = SimpleNamespace(mismatches=mismatches)
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 2}}, hf_ds_config=config)
    state = SimpleNamespace(deepspeed_plugin=plugin)
    return SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, num_processes=1, state=state)


def test_settings_of_deepspeed_that_contradict_the_arguments():
    """Found when the Trainer is made, not when it trains: rows may be cached in between."""
    check_launch(under_deepspeed([]), wants_deepspeed=True)
    said = "- ds train_micro_batch_size_per_gpu=3 vs hf per_device_train_batch_size=4"
    with pytest.raises(InputError, match=rf"mismatch TrainingArguments values \({said}\): set them to `auto`"):
        check_launch(under_deepspeed([said]), wants_deepspeed=True)

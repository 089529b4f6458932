"""Tiny models and texts; everything offline."""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers would write each other's copies of remote code
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules")
# Where the scripts of the benchmarks find their package.
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "benchmarks"))

import datasets
import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.utils import logging

from smt_hf import SMTForPreTraining, SMTRecurrentConfig, SMTRecurrentForCausalLM, SMTTeacherConfig
from smt_hf.student.updaters_smt_recurrent import UPDATERS as REGISTERED
from smt_hf.training import SMTPreTrainingConfig

UPDATERS = tuple(REGISTERED)
VOCAB = 37
# Ends of the names of weights that are zero at birth, and how large they are in tests.
ZERO_AT_BIRTH = {"updater.out_proj.weight": 0.3, "updater.control_proj.weight": 0.05}


@pytest.fixture(autouse=True)
def quiet_and_seeded():
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def wake(model: nn.Module) -> nn.Module:
    """Give the projection that is zero at birth random weights, so that updates do something."""
    for name, parameter in model.named_parameters():
        for end, std in ZERO_AT_BIRTH.items():
            if name.endswith(end):
                nn.init.normal_(parameter, std=std)
    return model


def student_config(**fields) -> SMTRecurrentConfig:
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_attention_heads": 2, "num_memory_tokens": 3}
    return SMTRecurrentConfig(**{**sizes, "eos_token_id": None, "pad_token_id": 0, **fields})


def make_student(**fields) -> SMTRecurrentForCausalLM:
    torch.manual_seed(0)
    return wake(SMTRecurrentForCausalLM(student_config(**fields))).eval()


def teacher_config(**fields) -> SMTTeacherConfig:
    sizes = {"vocab_size": VOCAB, "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    return SMTTeacherConfig(**{**sizes, "sliding_window": 5, "num_memory_tokens": 3, "memory_size": 16, **fields})


def make_composite(**fields) -> SMTForPreTraining:
    torch.manual_seed(0)
    config = SMTPreTrainingConfig(student=student_config(), teacher=teacher_config(**fields))
    return wake(SMTForPreTraining(config)).eval()


def make_fast_weight_composite() -> SMTForPreTraining:
    """A fast-weight student and the teacher that it can follow."""
    torch.manual_seed(0)
    student = student_config(updater_type="fast_weight")
    config = SMTPreTrainingConfig(student=student, teacher={"model_type": "smt_fast_weight_teacher"})
    return wake(SMTForPreTraining(config)).eval()


def make_pretrained_composite(dtype: str = "float32", lora_r: int = 2) -> SMTForPreTraining:
    """A student and a Llama with random weights, without a folder, as its teacher."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = {**LlamaConfig(vocab_size=VOCAB, **sizes).to_dict(), "dtype": dtype}
    teacher = {"model_type": "smt_pretrained_teacher", "base_config": base, "lora_r": lora_r}
    student = student_config(embedding_size=6)
    return wake(SMTForPreTraining(SMTPreTrainingConfig(student=student, teacher=teacher))).eval()


@pytest.fixture(params=UPDATERS)
def student(request):
    return make_student(updater_type=request.param)


@pytest.fixture
def composite():
    return make_composite()


@pytest.fixture
def tokens():
    return torch.randint(1, VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def text_file(tmp_path):
    """A file of some 20 kB with structure that a small model can learn."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {number}: the quick brown fox counts {number * 7}\n" for number in range(400)))
    return path

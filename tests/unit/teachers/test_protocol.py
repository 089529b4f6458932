"""What holds of every teacher that is registered, and how a new one is."""

import inspect

import pytest
import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from smt_hf.command_line import names_of
from smt_hf.errors import InputError
from smt_hf.teachers import (
    TEACHERS,
    SMTTeacherEncoder,
    make_teacher,
    register_teacher,
    teacher_config,
    teacher_config_class,
)
from tests.conftest import VOCAB

K, D = 3, 16
SIZES = {"vocab_size": VOCAB, "hidden_size": 24, "num_attention_heads": 2, "num_memory_tokens": K, "memory_size": D}
PRETRAINED = "smt_pretrained_teacher"
# A Llama with random weights, the model that the pretrained teacher reads with.
BASE = {"model_type": "llama", "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 32}
BASE |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4}
KINDS = [{"model_type": model_type} for model_type in TEACHERS] + [{"memory_readout": "registers"}]
KINDS += [{"model_type": PRETRAINED, "lora_r": 2}]


def fields_of(kind):
    if kind.get("model_type") != PRETRAINED:
        return {**SIZES, **kind}
    return {"vocab_size": VOCAB, "num_memory_tokens": K, "memory_size": D, "base_config": BASE, **kind}


@pytest.fixture(params=KINDS, ids=lambda fields: "-".join(map(str, fields.values())))
def teacher(request):
    torch.manual_seed(0)
    return make_teacher(teacher_config(fields_of(request.param))).eval()


def test_speaks_the_protocol(teacher):
    parameters = inspect.signature(type(teacher).forward).parameters
    expected = inspect.signature(SMTTeacherEncoder.forward).parameters
    defaults = {name: entry.default for name, entry in parameters.items()}
    assert {name: entry.default for name, entry in expected.items()}.items() <= defaults.items()
    more = set(defaults) - set(expected)  # what a teacher that can go on takes besides
    assert more == ({"returns_last"} if getattr(teacher, "can_go_on", False) else set())
    labels = teacher(torch.randint(VOCAB, (2, 6)), torch.arange(1, 7), torch.zeros(K, D))
    assert labels.shape == (2, 6, K, D)
    # A linear recurrence is normalised where it is read: its last token, and what was read.
    normalised = slice(None, None, K - 1) if teacher.config.model_type == "smt_fast_weight_teacher" else slice(None)
    sizes = labels[:, :, normalised].square().mean(-1)
    torch.testing.assert_close(sizes, torch.ones_like(sizes), atol=1e-3, rtol=1e-3)
    assert teacher.has_next_token_head == (teacher.get_output_embeddings() is not None)
    assert teacher.labels_all_positions in (True, False)
    names = {type(module).__name__ for module in teacher.modules()}
    assert set(teacher._no_split_modules) <= names


def test_saves_and_loads_by_auto_classes(teacher, tmp_path):
    teacher.save_pretrained(tmp_path)
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(teacher.config)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(teacher)
    arguments = (torch.randint(VOCAB, (2, 6)), torch.arange(7), torch.zeros(K, D))
    assert torch.equal(loaded(*arguments), teacher(*arguments))


SIZES_REFUSED = [
    ({"hidden_size": 0}, "the teacher's `hidden_size` must be at least 1, got 0"),
    ({"hidden_size": -8}, "the teacher's `hidden_size` must be at least 1, got -8"),
    ({"num_memory_tokens": 0}, "`num_memory_tokens` must be at least 1"),
    ({"intermediate_size": -1}, "`intermediate_size` must be at least 1"),
    ({"memory_size": 0}, "`memory_size` must be at least 1"),
    ({"hidden_size": 25}, "`num_attention_heads` .4. must divide `hidden_size` .25."),
    ({"initializer_range": -0.1}, "`initializer_range` must be at least 0, got -0.1"),
    ({"rms_norm_eps": float("nan")}, "`rms_norm_eps` must be at least 0, got nan"),
    ({"rope_theta": 0}, "`rope_theta` must be a number above 0"),
    ({"hidden_act": "nothing"}, "`hidden_act` 'nothing' is unknown: choose one of .*gelu"),
]


@pytest.mark.parametrize(
    "model_type, fields, message",
    [
        (model_type, fields, message)
        for model_type in TEACHERS
        for fields, message in SIZES_REFUSED
        if set(fields) <= names_of(teacher_config_class(model_type))
    ],
)
def test_refuses_sizes(model_type, fields, message):
    with pytest.raises(InputError, match=message):
        teacher_config({"model_type": model_type, **fields})


@pytest.mark.parametrize(
    "fields", [{"memory_readout": "x"}, {"sliding_window": 0}, {"conv_kernel": 0}, {"context_length": 0}]
)
def test_refuses_what_is_a_teachers_own(fields):
    model_type = "smt_windowed_teacher" if "context_length" in fields else "smt_teacher"
    with pytest.raises(InputError, match=next(iter(fields))):
        teacher_config({"model_type": model_type, **fields})


def test_refuses_unknown_teachers():
    # Transformers knows the type; it makes no memory labels.
    with pytest.raises(InputError, match="unknown teacher `model_type` 'llama': choose one of smt_teacher, "):
        teacher_config({"model_type": "llama"})


def test_a_new_teacher_is_one_class(monkeypatch):
    @strict
    class ToyConfig(PreTrainedConfig):
        model_type = "toy_teacher"
        memory_size: int = D

    monkeypatch.setattr("smt_hf.teachers.protocol.TEACHERS", dict(TEACHERS))

    @register_teacher
    class ToyTeacher(PreTrainedModel):
        config_class = ToyConfig

        def __init__(self, config):
            super().__init__(config)
            self.embed_tokens = nn.Embedding(VOCAB, config.memory_size)
            self.post_init()

    config = teacher_config({"model_type": "toy_teacher", "memory_size": 5})
    assert teacher_config_class("toy_teacher") is type(config) is ToyConfig and config.memory_size == 5
    assert type(make_teacher(config)) is type(AutoModel.from_config(config)) is ToyTeacher

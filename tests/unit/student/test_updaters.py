"""The registry of updaters: what each says about itself, and what a new one needs."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import initialization as init

from smt_hf import SMTRecurrentForCausalLM, SMTRecurrentModel
from smt_hf.student.layers_smt_recurrent import SMTRecurrentUpdater, register_updater
from smt_hf.student.updaters_smt_recurrent import UPDATERS
from tests.conftest import student_config


@pytest.mark.parametrize("updater_type", UPDATERS)
@pytest.mark.parametrize("num_hidden_layers", [1, 3])
def test_cost_of_a_transition(updater_type, num_hidden_layers):
    """Multiply-adds as torch counts them (all but those of the CPU's attention kernel, 2 % here); numbers held for the
    backward pass, each storage once, within a quarter."""
    config = student_config(updater_type=updater_type, num_hidden_layers=num_hidden_layers, hidden_size=32)
    updater = SMTRecurrentModel(config).updater
    memory, embeds = torch.randn(5, 3, 32, requires_grad=True), torch.randn(5, 32)
    weights = {parameter.untyped_storage().data_ptr() for parameter in updater.parameters()}
    held = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            held[storage.data_ptr()] = (storage.nbytes() // 4, tensor)
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda held: held):
        updater(memory, embeds)
    expected = 5 * 2 * UPDATERS[updater_type].multiply_adds(config)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.025 if updater_type == "transformer" else 0)
    measured = sum(size for size, _ in held.values())
    assert measured == pytest.approx(5 * UPDATERS[updater_type].saved_numbers(config), rel=0.25)


def test_a_new_updater_is_one_class(tokens, tmp_path, monkeypatch):
    monkeypatch.delitem(UPDATERS, "toy", raising=False)

    @register_updater
    class ToyUpdater(SMTRecurrentUpdater):
        updater_type = "toy"

        def __init__(self, config):
            super().__init__(config)
            self.scale = nn.Parameter(torch.empty(self.stream_width(config)))
            self.token_proj = nn.Linear(config.hidden_size, self.stream_width(config), bias=False)

        @classmethod
        def check_config(cls, config):
            if config.num_hidden_layers != 1:
                raise ValueError("the toy has one layer.")

        @classmethod
        def multiply_adds(cls, config):
            return cls.stream_width(config) * (config.hidden_size + cls.stream_width(config))

        @classmethod
        def saved_numbers(cls, config):
            return 5 * cls.stream_width(config)

        def init_own_weights(self):
            init.ones_(self.scale)

        def layers_of(self, memory, embeds):
            yield memory.flatten(1) * self.scale + self.token_proj(embeds)

    monkeypatch.setitem(UPDATERS, "toy", UPDATERS.pop("toy"))  # gone after the test
    with pytest.raises(ValueError, match="the toy has one layer"):
        student_config(updater_type="toy")
    student = SMTRecurrentForCausalLM(student_config(updater_type="toy", num_hidden_layers=1))
    updater = student.model.updater
    assert type(updater) is ToyUpdater and (updater.scale == 1).all() and not updater.out_proj.weight.any()
    assert updater.token_proj.weight.std() > 0.01
    student.save_pretrained(tmp_path)
    loaded = SMTRecurrentForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, student(tokens).logits)

"""bfloat16 where it is safe, float32 where it is not; and no float16."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from smt_hf import SMTForPreTraining
from smt_hf.training import SMTPreTrainingConfig
from tests.conftest import UPDATERS, student_config, teacher_config, wake
from tests.unit.training.test_trainers import make_trainer, weights_of

HALF, WHOLE = torch.bfloat16, torch.float32


def composite(updater_type, teacher=None):
    torch.manual_seed(0)
    student = student_config(updater_type=updater_type)
    return wake(SMTForPreTraining(SMTPreTrainingConfig(student=student, teacher=teacher or teacher_config())))


@pytest.mark.parametrize("updater_type", UPDATERS)
@pytest.mark.parametrize("kind", ["smt", "smt_ours", "smt_sparse", "smt_chunks", "dmt", "dmt_forced", "bptt"])
def test_what_runs_in_which_precision(kind, updater_type, tmp_path, monkeypatch):
    model = composite(updater_type)
    seen = {"matrices": set(), "norms": set(), "memories": set(), "losses": set()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *call: seen["matrices"].add(call[-1].dtype))
        elif isinstance(module, nn.RMSNorm):
            module.register_forward_hook(lambda *call: seen["norms"].update((call[1][0].dtype, call[-1].dtype)))
        elif name.endswith("updater"):
            module.register_forward_hook(lambda *call: seen["memories"].update((call[1][0].dtype, call[-1].dtype)))
    if model.teacher is not None:
        model.teacher.register_forward_hook(
            lambda *call: seen["memories"].add(call[-1][0].dtype if isinstance(call[-1], tuple) else call[-1].dtype)
        )
    cross_entropy, rms_norm = F.cross_entropy, F.rms_norm

    def watched_loss(*args, **kwargs):
        loss = cross_entropy(*args, **kwargs)
        seen["losses"].add(loss.dtype)
        return loss

    def watched_norm(states, *args, **kwargs):
        seen["norms"].add(states.dtype)
        return rms_norm(states, *args, **kwargs)

    monkeypatch.setattr(F, "cross_entropy", watched_loss)
    monkeypatch.setattr(F, "rms_norm", watched_norm)
    trainer = make_trainer(kind, tmp_path, model=model, bf16=True, max_steps=2)
    trainer.train()
    assert seen == {"matrices": {HALF}, "norms": {WHOLE}, "memories": {WHOLE}, "losses": {WHOLE}}
    assert {value.dtype for value in weights_of(trainer).values()} <= {WHOLE, torch.long}
    state = trainer.optimizer.state_dict()["state"]
    assert {own["exp_avg"].dtype for own in state.values()} == {WHOLE}


@pytest.mark.parametrize("updater_type", UPDATERS)
@pytest.mark.parametrize("kind", ["smt", "bptt"])
def test_it_learns_as_float32_does(kind, updater_type, tmp_path):
    losses = {}
    for bf16 in (False, True):
        trainer = make_trainer(
            kind, tmp_path / str(bf16), model=composite(updater_type), bf16=bf16, max_steps=30, learning_rate=0.01
        )
        trainer.train()
        losses[bf16] = [line["readout"] for line in trainer.state.log_history if "readout" in line]
    assert losses[True][-1] < losses[True][0] - 0.2
    assert losses[True] == pytest.approx(losses[False], rel=0.05) and losses[True] != losses[False]


def test_no_float16(tmp_path):
    with pytest.raises(ValueError, match="Use `bf16`"):
        make_trainer("smt", tmp_path, fp16=True)

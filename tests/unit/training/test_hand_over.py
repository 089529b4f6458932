"""A student that begins as its teacher: when the weights are handed over in a pipeline."""

import shutil

import pytest
import torch
from datasets import Dataset

from smt_hf import DMTTrainingArguments, SMTForPreTraining, SMTTrainer, SMTTrainingArguments
from smt_hf.training import SMTPreTrainingConfig
from smt_hf.training.phases import lay_out, run_phases
from tests.conftest import student_config

ROWS = Dataset.from_dict({"input_ids": [[1 + (i + j) % 5 for j in range(17)] for i in range(8)]})


def composite() -> SMTForPreTraining:
    torch.manual_seed(0)
    student = student_config(updater_type="fast_weight")
    return SMTForPreTraining(SMTPreTrainingConfig(student=student, teacher={"model_type": "smt_fast_weight_teacher"}))


def teacher_alone(output_dir, **settings) -> SMTTrainingArguments:
    return SMTTrainingArguments(
        output_dir=str(output_dir), use_cpu=True, trains_updater=False, teacher_weight=0.0, teacher_readout_weight=1.0,
        predictive_weight=0.0, context_length=16, learning_rate=0.01, report_to=[], disable_tqdm=True, **settings,
    )  # fmt: skip


def test_the_student_that_would_begin_as_the_teacher_is_scored(tmp_path):
    """In a phase of the teacher alone, evaluations score the rollout of the student with the teacher's weights."""
    arguments = teacher_alone(tmp_path, max_steps=60)
    arguments.student_is_new = True
    trainer = SMTTrainer(model=composite(), args=arguments, train_dataset=ROWS, eval_dataset=ROWS)
    before = trainer.evaluate()["eval_rollout"]
    trainer.train()
    own = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    scores = trainer.evaluate()
    assert all(torch.equal(own[name], tensor) for name, tensor in trainer.model.state_dict().items())
    assert scores["eval_rollout"] < before - 1.0
    assert scores["eval_rollout"] == pytest.approx(scores["eval_teacher_readout"], rel=1e-3)


@pytest.mark.parametrize("is_cut", [False, True])
def test_the_student_of_dmt_begins_as_the_teacher_and_stays_its_own(is_cut, tmp_path):
    """After the smt phase the dynamics error is 0; a run that is resumed within dmt does not begin again."""

    def phases(max_steps):
        dmt = DMTTrainingArguments(
            output_dir="x", use_cpu=True, context_length=16, max_steps=max_steps, save_steps=2, logging_steps=1,
            learning_rate=0.01, disable_tqdm=True, report_to=[],
        )  # fmt: skip
        own = [teacher_alone("x", max_steps=20), dmt]
        lay_out(own, str(tmp_path))
        return own

    model = composite()
    results = list(run_phases(model, phases(4), lambda _: ROWS, ROWS))
    logged = [line["dynamics"] for line in results[1].log_history if "dynamics" in line]
    assert logged[0] < 1e-6 < logged[-1]
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if is_cut:
        shutil.rmtree(tmp_path / "dmt" / "checkpoint-4")
        (tmp_path / "dmt" / "trainer_state.json").unlink()
    again = composite()
    list(run_phases(again, phases(4), lambda _: ROWS, ROWS, resume_from_checkpoint=True))
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_trained_student_is_not_overwritten(tmp_path):
    """A later phase of the teacher alone leaves the student as it is, evaluations included."""
    smt = SMTTrainingArguments(
        output_dir="x", use_cpu=True, context_length=16, max_steps=2, teacher_weight=0.0, future_length=4,
        disable_tqdm=True, report_to=[],
    )  # fmt: skip
    dmt = DMTTrainingArguments(
        output_dir="x", use_cpu=True, context_length=16, max_steps=1, disable_tqdm=True, report_to=[]
    )
    phases = [smt, teacher_alone("x", max_steps=2, eval_strategy="steps", eval_steps=1), dmt]
    lay_out(phases, str(tmp_path))
    model, updaters = composite(), []
    for _ in run_phases(model, phases, lambda _: ROWS, ROWS):
        updaters.append({name: tensor.clone() for name, tensor in model.student.model.updater.state_dict().items()})
    assert all(torch.equal(updaters[1][name], tensor) for name, tensor in updaters[0].items())
    assert any(not torch.equal(updaters[2][name], tensor) for name, tensor in updaters[1].items())

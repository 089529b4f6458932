"""A pipeline whose teacher is a model that exists: cut off and resumed, and what its checkpoints hold."""

import shutil

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from smt_hf import DMTTrainingArguments, SMTForPreTraining, SMTRecurrentForCausalLM, SMTTrainingArguments
from smt_hf.training import SMTPreTrainingConfig
from smt_hf.training.phases import lay_out, run_phases

ROWS = Dataset.from_dict({"input_ids": [[1 + (i + j) % 5 for j in range(17)] for i in range(8)]})
SIZES = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize("lora_r, distillation_weight", [(0, 0.0), (0, 1.0), (2, 1.0)])
def test_a_resumed_pipeline_is_the_whole_one(lora_r, distillation_weight, tmp_path):
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "model")

    def composite():
        torch.manual_seed(0)
        student = {"hidden_size": 8, "num_attention_heads": 2}
        teacher = {"model_name_or_path": str(tmp_path / "model"), "lora_r": lora_r}
        teacher["keeps_head"] = distillation_weight > 0
        return SMTForPreTraining(SMTPreTrainingConfig(student=student, teacher=teacher))

    def trained(model, folder, resume=False):
        settings = {"use_cpu": True, "context_length": 16, "save_steps": 2, "disable_tqdm": True, "report_to": []}
        settings |= {"distillation_weight": distillation_weight, "distillation_top_k": 4}
        smt = SMTTrainingArguments(output_dir="x", max_steps=4, teacher_weight=0.0, future_length=4, **settings)
        phases = [smt, DMTTrainingArguments(output_dir="x", max_steps=4, **settings)]
        lay_out(phases, str(folder))
        for result in run_phases(model, phases, lambda _: ROWS, ROWS, resume_from_checkpoint=resume):
            model = result.model
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    before = composite().state_dict()
    whole = trained(composite(), tmp_path / "runs")
    changed = {name for name in whole if not torch.equal(whole[name], before[name])}
    assert "teacher.memory_proj.weight" in changed
    assert {name for name in changed if name.startswith("teacher.model.")} == {
        name for name in whole if "lora_" in name
    }
    student = SMTRecurrentForCausalLM.from_pretrained(tmp_path / "runs" / "dmt" / "checkpoint-4" / "student")
    assert torch.equal(student.lm_head.weight, whole["student.lm_head.weight"])
    optimizer = torch.load(tmp_path / "runs" / "smt" / "checkpoint-4" / "optimizer.pt")
    held = sum(len(group["params"]) for group in optimizer["param_groups"])
    fixed = sum(name.startswith("teacher.model.") and "lora_" not in name for name, _ in composite().named_parameters())
    assert held <= len(list(composite().parameters())) - fixed

    for phase, step in (("dmt", 4), ("smt", 4)):  # first within dmt, then within smt
        shutil.rmtree(tmp_path / "runs" / phase / f"checkpoint-{step}")
        if phase == "smt":
            shutil.rmtree(tmp_path / "runs" / "dmt")
        again = trained(composite(), tmp_path / "runs", resume=True)
        for name, tensor in again.items():
            torch.testing.assert_close(tensor, whole[name], rtol=1e-5, atol=1e-6, msg=name)
    saved = load_file(tmp_path / "runs" / "dmt" / "checkpoint-4" / "model.safetensors")
    assert {name for name in saved if name.startswith("teacher.model.")}  # a checkpoint stands alone

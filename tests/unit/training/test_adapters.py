"""LoRA: by PEFT's own words on a student, and as a cheap second phase."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from smt_hf import DMTTrainingArguments, SMTTrainingArguments
from smt_hf.errors import InputError
from smt_hf.training.adapters import LORA_TARGET_MODULES, LoraSettings, add_lora, has_lora, merged_copy
from smt_hf.training.phases import lay_out, run_phases
from tests.conftest import make_composite
from tests.unit.training.test_trainers import assert_same, make_trainer, some_rows


def shake(student):
    """Factors that are zero at birth get a value, so that the adapter does something."""
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)


def test_targets_are_every_linear_layer_but_the_head(student):
    names = {name for name, module in student.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    add_lora(student)
    adapted = {
        name.removesuffix(".lora_A.default") for name, _ in student.named_modules() if name.endswith("A.default")
    }
    assert adapted == names and all(name.startswith(("model.updater.", "model.readout.")) for name in names)
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in student.named_parameters())


def test_targets_by_the_last_part_of_a_name(student):
    """As many scripts choose them; no such part is a number, which would be the name of whole blocks as well."""
    names = {name for name, module in student.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    last = {name.rpartition(".")[2] for name in names}
    assert not [part for part in last if part.isdigit()]
    adapted = get_peft_model(student, LoraConfig(target_modules=sorted(last), task_type="CAUSAL_LM"))
    assert set(adapted.targeted_module_names) == names


def test_train_save_load_merge(student, tokens, tmp_path):
    base = copy.deepcopy(student)
    adapted = get_peft_model(student, LoraConfig(target_modules=LORA_TARGET_MODULES, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    logits = adapted(input_ids=tokens).logits
    adapted.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(loaded(input_ids=tokens).logits, logits)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    generated = adapted.generate(input_ids=tokens, **settings)
    copied = merged_copy(student)
    torch.testing.assert_close(copied(tokens).logits, logits, atol=1e-5, rtol=1e-4)
    merged = adapted.merge_and_unload()
    assert merged is student and not has_lora(student) and not has_lora(copied)
    torch.testing.assert_close(merged(tokens).logits, logits, atol=1e-5, rtol=1e-4)
    assert torch.equal(merged.generate(tokens, **settings), generated)
    copied.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(plain(tokens).logits, copied(tokens).logits, atol=1e-5, rtol=1e-4)


def test_prompt_tuning_works_and_prefix_tuning_is_refused(student, tokens):
    prompted = get_peft_model(
        copy.deepcopy(student), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_attention_heads=2)
    )
    mask = torch.ones_like(tokens)
    prompted(input_ids=tokens, attention_mask=mask, labels=tokens).loss.backward()
    assert any(parameter.grad is not None for parameter in prompted.parameters())
    prefixed = get_peft_model(student, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="LoRA"):
        prefixed(input_ids=tokens, attention_mask=mask)


def test_settings_are_checked():
    for settings in ({"rank": 0}, {"alpha": 0}, {"dropout": 1.0}):
        with pytest.raises(InputError, match="LoRA"):
            LoraSettings(**settings)


def run(folder, resume=None, stop_after=None):
    common = {"output_dir": "x", "use_cpu": True, "disable_tqdm": True, "context_length": 12, "transition_steps": 4}
    common |= {"per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    phases = [
        SMTTrainingArguments(**common, future_length=4, max_steps=2),
        DMTTrainingArguments(**common, max_steps=4, learning_rate=0.02),
    ]
    lay_out(phases, str(folder))
    model, rows, seen = make_composite(), some_rows(), []
    for result in run_phases(
        model, phases, lambda _: rows, rows[:8], resume_from_checkpoint=resume, lora={"dmt": LoraSettings(4, 8)}
    ):
        seen.append(({name: value.clone() for name, value in model.student.state_dict().items()}, result))
        if stop_after == len(seen):
            break
    return model, seen


def test_a_second_phase_of_lora(tmp_path):
    """It changes linear layers by its adapter and nothing else, is merged, and resumes."""
    model, ((before, _), (after, dmt)) = run(tmp_path)
    assert not has_lora(model.student) and before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    linear = {f"{name}.weight" for name, module in model.student.named_modules() if isinstance(module, nn.Linear)}
    assert changed and changed <= linear - {"lm_head.weight"}
    for name in changed:
        change = after[name] - before[name]
        assert torch.linalg.matrix_rank(change, rtol=1e-4) <= 4, name
    assert dmt.log_history[0]["loss"] > 0
    # The adapter on the weights before it, and the student in the checkpoint, are what came out.
    tokens = torch.randint(1, 37, (2, 9))
    expected = model.student(tokens).logits
    base = copy.deepcopy(model.student)
    base.load_state_dict(before)
    adapted = PeftModel.from_pretrained(base, tmp_path / "dmt" / "adapter")
    torch.testing.assert_close(adapted(input_ids=tokens).logits, expected, atol=1e-5, rtol=1e-4)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "dmt" / "checkpoint-4" / "student")
    torch.testing.assert_close(student(tokens).logits, expected, atol=1e-5, rtol=1e-4)
    # A finished run, and one cut off inside the phase.
    again, _ = run(tmp_path, resume=True)
    assert_same(model.state_dict(), again.state_dict(), rtol=1e-6, atol=1e-6)
    for path in (tmp_path / "dmt" / "checkpoint-4").iterdir():
        path.unlink() if path.is_file() else None
    again, seen = run(tmp_path, resume=True)
    assert [result.is_new for _, result in seen] == [False, True]
    assert_same(model.state_dict(), again.state_dict(), rtol=1e-5, atol=1e-6)


def test_lora_with_muon(tmp_path):
    """There are matrices alone, and nothing left for AdamW."""
    trainer = make_trainer("dmt", tmp_path, matrix_optimizer="muon")
    add_lora(trainer.model.student)
    trainer.model.freeze_for("dmt")
    before = {name: value.clone() for name, value in trainer.model.student.named_parameters()}
    trainer.train()
    changed = {name for name, value in trainer.model.student.named_parameters() if not torch.equal(before[name], value)}
    assert changed and all("lora_" in name for name in changed)

"""Embeddings and a head of another width than the model: V x E tables, linear maps E -> D and D -> E."""

import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from smt_hf import SMTForPreTraining, SMTRecurrentConfig, SMTRecurrentForCausalLM, SMTRecurrentStep
from smt_hf.student.modeling_smt_recurrent import CACHE_NAME
from smt_hf.training import SMTPreTrainingConfig
from smt_hf.training.objective import Objective
from tests.conftest import UPDATERS, VOCAB, make_student, student_config
from tests.unit.student.test_model import naive_logits

E, D = 6, 16


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def factorised(request):
    return make_student(embedding_size=E, tie_word_embeddings=request.param)


@pytest.mark.parametrize("updater_type", UPDATERS)
@pytest.mark.parametrize(("embedding_size", "tied"), [(E, False), (E, True), (D + 4, False)])
def test_equals_naive_twin(updater_type, embedding_size, tied, tokens):
    student = make_student(updater_type=updater_type, embedding_size=embedding_size, tie_word_embeddings=tied)
    twin, tokens = copy.deepcopy(student), tokens[:, :7]
    logits, expected = student(tokens).logits, naive_logits(twin, tokens)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    weights = torch.randn_like(logits)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, own), (_, theirs) in zip(student.named_parameters(), twin.named_parameters()):
        torch.testing.assert_close(own.grad, theirs.grad, atol=2e-4, rtol=1e-3, msg=name)


def test_futures_are_decoded_by_the_same_maps(factorised, tokens):
    """The readout with one true future token, from states that are embedded and read out by hand."""
    memories = torch.randn(3, 3, D)
    future = factorised.model.embed_tokens.weight[tokens[:, :1]] @ factorised.model.embed_proj.weight.T
    states = factorised.model.readout(memories, future)
    expected = states @ factorised.head_proj.weight.T @ factorised.lm_head.weight.T
    torch.testing.assert_close(factorised.decode_logits(memories, tokens[:, :2]), expected, atol=1e-5, rtol=1e-4)


def test_sizes_and_names(factorised):
    shapes = {name: tuple(weight.shape) for name, weight in factorised.state_dict().items()}
    tables = {"model.embed_tokens.weight": (VOCAB, E), "lm_head.weight": (VOCAB, E)}
    maps = {"model.embed_proj.weight": (D, E), "head_proj.weight": (E, D)}
    assert {name: shapes[name] for name in {**tables, **maps}} == {**tables, **maps}
    assert (factorised.lm_head.weight is factorised.model.embed_tokens.weight) == factorised.config.tie_word_embeddings


@pytest.mark.parametrize("embedding_size", [None, D])
def test_nothing_is_added_at_the_models_own_width(embedding_size):
    """The names and the birth are those of models without the field."""
    own = make_student(embedding_size=embedding_size).state_dict()
    assert not [name for name in own if "embed_proj" in name or "head_proj" in name]
    assert all(torch.equal(own[name], weight) for name, weight in make_student().state_dict().items())
    assert SMTRecurrentConfig(hidden_size=D).embedding_size is None


def test_scales_at_birth():
    """What the updater takes and the logits are as large as without the maps."""
    sizes = {"hidden_size": 256, "vocab_size": 2000, "num_attention_heads": 4}
    states, tokens = torch.randn(500, 256), torch.arange(2000)
    found = {}
    for embedding_size in (None, 64):
        torch.manual_seed(0)
        model = SMTRecurrentForCausalLM(student_config(**sizes, embedding_size=embedding_size))
        with torch.no_grad():
            found[embedding_size] = [float(of.std()) for of in (model.model.embed(tokens), model.head(states))]
    assert found[64] == pytest.approx(found[None], rel=0.05)


def test_save_and_load(factorised, tokens, tmp_path):
    factorised.save_pretrained(tmp_path)
    tied = factorised.config.tie_word_embeddings
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.embedding_size == E
    assert torch.equal(loaded(tokens).logits, factorised(tokens).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert classifier(tokens).logits.shape == (3, 3)


@pytest.mark.parametrize("size", [VOCAB + 11, VOCAB - 5])
def test_resize_token_embeddings(factorised, tokens, size):
    tokens, kept = tokens % (VOCAB - 5), min(size, VOCAB)
    before = factorised(tokens).logits
    factorised.resize_token_embeddings(size)
    assert (
        factorised.get_input_embeddings().weight.shape == factorised.get_output_embeddings().weight.shape == (size, E)
    )
    torch.testing.assert_close(factorised(tokens).logits[..., :kept], before[..., :kept])
    tied = factorised.get_input_embeddings().weight is factorised.get_output_embeddings().weight
    assert tied == factorised.config.tie_word_embeddings


def test_inputs_embeds_hidden_states_and_generation(factorised, tokens):
    embeds = factorised.get_input_embeddings()(tokens)
    assert embeds.shape == (3, 12, E)
    outputs = factorised(tokens, output_hidden_states=True)
    assert torch.equal(factorised(inputs_embeds=embeds).logits, outputs.logits)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(3, 12, D)] * 3
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    written = factorised.generate(tokens, **settings)
    for position in range(12, 17):
        assert torch.equal(written[:, position], factorised(written[:, :position]).logits[:, -1].argmax(-1))
    assert torch.equal(factorised.generate(inputs_embeds=embeds, **settings), written[:, 12:])


def test_the_step_and_its_export(factorised, tokens):
    step = SMTRecurrentStep(factorised)
    exported = torch.export.export(step, (tokens[:, 0].clone(), step.start(3).contiguous())).module()
    memory = step.start(3)
    for column in tokens.unbind(1):
        logits, memory = exported(column.clone(), memory.contiguous())
    outputs = factorised(tokens, use_cache=True)
    torch.testing.assert_close(logits, outputs.logits[:, -1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(memory, getattr(outputs, CACHE_NAME).memory, atol=1e-5, rtol=1e-5)


def test_peft(factorised, tokens):
    """LoRA goes into the maps, too; prompts are as wide as the embeddings."""
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, num_attention_heads=2, token_dim=E)
    prompted = get_peft_model(copy.deepcopy(factorised), prompts)
    prompted(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens).loss.backward()
    adapted = get_peft_model(factorised, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert {"model.embed_proj", "head_proj"} <= set(adapted.targeted_module_names)
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    logits = adapted(input_ids=tokens).logits
    torch.testing.assert_close(adapted.merge_and_unload()(tokens).logits, logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("phase", ["smt", "dmt", "bptt"])
def test_every_phase_reaches_the_maps(phase, tokens):
    torch.manual_seed(0)
    student = student_config(embedding_size=E)
    model = SMTForPreTraining(SMTPreTrainingConfig(student=student, teacher={"hidden_size": 8}))
    nn.init.normal_(model.student.model.updater.out_proj.weight, std=0.3)
    objective = Objective(phase, 4 if phase != "bptt" else tokens.shape[1] - 1, {"readout": 1.0})
    model.freeze_for(phase, objective=objective)
    model.train()
    model(tokens[:, :9] if phase != "bptt" else tokens, objective).loss.backward()
    for projection in (model.student.model.embed_proj, model.student.head_proj):
        assert projection.weight.grad.abs().max() > 0


def test_refused():
    with pytest.raises(ValueError, match="`embedding_size` must be at least 1, got 0"):
        student_config(embedding_size=0)

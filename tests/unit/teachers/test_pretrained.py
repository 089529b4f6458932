"""Models of several families with random weights as teachers: their hidden states at every prefix, and what a run of
training, saving and loading does to them."""

import struct

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
)
from transformers.integrations import HfDeepSpeedConfig

from smt_hf import SMTForPreTraining
from smt_hf.data import byte_tokenizer
from smt_hf.errors import InputError
from smt_hf.evaluation import evaluate_rows
from smt_hf.teachers import SMTPretrainedTeacher, SMTPretrainedTeacherConfig, make_teacher, pretrained, teacher_config
from smt_hf.teachers.loading import start_token_of
from smt_hf.training import SMTPreTrainingConfig
from smt_hf.training.objective import Objective
from tests.conftest import VOCAB

K, D, E = 3, 8, 16
SIZES = {"vocab_size": VOCAB, "hidden_size": E, "num_hidden_layers": 3, "bos_token_id": None, "eos_token_id": None}
HEADS = {"num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 16}
FAMILIES = {
    "llama": LlamaConfig(**SIZES, **HEADS, num_key_value_heads=1),
    "gpt2": GPT2Config(**SIZES, num_attention_heads=2, n_positions=16),
    "gpt_neox": GPTNeoXConfig(**SIZES, **HEADS),
    "qwen2": Qwen2Config(**SIZES, **HEADS, num_key_value_heads=1),
    "qwen3": Qwen3Config(**SIZES, **HEADS, num_key_value_heads=1, head_dim=8),
    "mamba": MambaConfig(**SIZES, state_size=4),
}
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """A saved model whose states depend on what was read by more than rounding."""
    return saved(tmp_path_factory.mktemp(request.param), FAMILIES[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("llama"), FAMILIES["llama"])


def saved(path, config):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(path)
    return str(path)


def make(folder, **fields):
    torch.manual_seed(0)
    fields = {"model_name_or_path": folder, "num_memory_tokens": K, "memory_size": D, "vocab_size": VOCAB, **fields}
    return make_teacher(teacher_config(fields)).eval()


def composite(folder, **fields):
    torch.manual_seed(0)
    student = {"hidden_size": D, "num_attention_heads": 2, "num_memory_tokens": K}
    return SMTForPreTraining(
        SMTPreTrainingConfig(student=student, teacher={"model_name_or_path": folder, **fields})
    ).eval()


def text(*size, seed=0):
    return torch.randint(VOCAB, size, generator=torch.Generator().manual_seed(seed))


def naive_label(teacher, model, prefix, span=None):
    """The memory of one prefix of one document: the model of transformers on the tokens that it sees of it, alone."""
    if span is not None and len(prefix) > span:
        step = (span + 1) // 2
        while len(prefix) > span:
            prefix = prefix[step:]
    states = model(prefix[None], output_hidden_states=True).hidden_states
    parts = []
    for number, norm in zip(teacher.config.layers, teacher.norms):
        state = states[number][0, -1]
        parts.append(state / (state.square().mean() + teacher.config.rms_norm_eps).sqrt() * norm.weight)
    memory = (teacher.memory_proj.weight @ torch.cat(parts)).view(K, D)
    return memory / (memory.square().mean(-1, keepdim=True) + teacher.config.rms_norm_eps).sqrt()


@pytest.mark.parametrize("extra", ["plain", "mask", "documents", "both"])
@torch.no_grad()
def test_equals_the_model_on_every_prefix_alone(folder, extra):
    """Rows longer than half of the window's 5 tokens, with padding anywhere, and several documents."""
    teacher, model = make(folder, model_context_length=5), AutoModelForCausalLM.from_pretrained(folder).eval()
    length, generator = 13, torch.Generator().manual_seed(2)
    tokens, start = text(3, length), torch.randn(K, D)
    mask = documents = None
    if extra in ("mask", "both"):
        mask = torch.rand(3, length, generator=generator) > 0.3
    if extra in ("documents", "both"):
        documents = (torch.rand(3, length, generator=generator) > 0.75).long().cumsum(1)
    labels = teacher(tokens, torch.arange(length + 1), start, mask, documents)
    assert torch.isfinite(labels).all()
    for row in range(3):
        for position in range(length + 1):
            kept = [index for index in range(position) if mask is None or mask[row, index]]
            if documents is not None and kept:
                kept = [index for index in kept if documents[row, index] == documents[row, kept[-1]]]
            expected = naive_label(teacher, model, tokens[row, kept], span=5) if kept else start
            torch.testing.assert_close(labels[row, position], expected, **CLOSE)


@pytest.mark.parametrize("extra", ["plain", "mask", "documents", "both", "start", "start and both"])
@torch.no_grad()
def test_expects_what_the_model_does_after_every_prefix_alone(folder, extra, monkeypatch):
    """As above, of a student with fewer tokens than the model; the model reads its windows two at a time."""
    monkeypatch.setattr(pretrained, "_MOST_LOGITS", 2 * 6 * VOCAB)
    start_token = 7 if "start" in extra else -1
    teacher = make(folder, model_context_length=5, keeps_head=True, vocab_size=VOCAB - 6, start_token=start_token)
    model, length, generator = AutoModelForCausalLM.from_pretrained(folder).eval(), 13, torch.Generator().manual_seed(2)
    tokens, start = text(3, length) % (VOCAB - 6), torch.randn(K, D)
    mask = documents = None
    if extra.endswith(("mask", "both")):
        mask = torch.rand(3, length, generator=generator) > 0.3
    if extra.endswith(("documents", "both")):
        documents = (torch.rand(3, length, generator=generator) > 0.75).long().cumsum(1)
    arguments = (tokens, torch.arange(length + 1), start, mask, documents)
    memories, found = teacher(*arguments, top_k=4, temperature=1.5)
    torch.testing.assert_close(memories, teacher(*arguments), **CLOSE)
    seen = torch.tensor([] if start_token == -1 else [start_token], dtype=torch.long)
    for row in range(3):
        for position in range(length + 1):
            kept = [index for index in range(position) if mask is None or mask[row, index]]
            if documents is not None and kept:
                kept = [index for index in kept if documents[row, index] == documents[row, kept[-1]]]
            while len(kept) > 5:
                kept = kept[3:]
            prefix = torch.cat([seen, tokens[row, kept]])
            own = found[row, position]
            assert own.is_known == (len(prefix) > 0)
            if len(prefix):
                wanted = (model(prefix[None]).logits[0, -1, : VOCAB - 6] / 1.5).softmax(-1)
                torch.testing.assert_close(own.probabilities[:4], wanted[own.tokens], **CLOSE)
                torch.testing.assert_close(own.probabilities[:4], wanted.topk(4).values, **CLOSE)
                torch.testing.assert_close(own.probabilities[4], 1 - wanted[own.tokens].sum(), **CLOSE)


def test_states_and_expectations_come_from_one_pass(llama):
    teacher = make(llama, keeps_head=True)
    calls = []
    teacher.trunk.register_forward_hook(lambda *call: calls.append(1))
    teacher.model.lm_head.register_forward_hook(lambda *call: calls.append("head"))
    teacher(text(2, 8), torch.arange(9), torch.zeros(K, D), top_k=3)
    assert calls == [1, "head"]
    teacher(text(2, 8), torch.arange(9), torch.zeros(K, D))  # no logits where nobody asks for them
    assert calls == [1, "head", 1]
    nothing = teacher(text(2, 0), torch.arange(1), torch.ones(K, D), top_k=3)
    assert torch.equal(nothing[0], torch.ones(2, 1, K, D)) and not nothing[1].is_known.any()


@torch.no_grad()
def test_states_of_a_prefix_do_not_know_what_follows(folder):
    teacher, tokens, start = make(folder), text(1, 12), torch.zeros(K, D)
    labels = teacher(tokens, torch.arange(13), start)
    for place in range(12):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % VOCAB
        distance = (teacher(changed, torch.arange(13), start) - labels).abs().amax((0, 2, 3))
        assert distance[: place + 1].max() < 1e-6, place
        assert distance[place + 1] > 1e-3, place


@torch.no_grad()
def test_documents_of_a_row_are_read_as_if_alone(folder):
    teacher, tokens, start = make(folder), text(2, 14), torch.randn(K, D)
    documents = torch.tensor([[3] * 4 + [0] * 7 + [1] * 3]).expand(2, -1)
    labels = teacher(tokens, torch.arange(15), start, document_ids=documents)
    begin = 0
    for part in tokens.split([4, 7, 3], dim=1):
        size = part.shape[1]
        alone = teacher(part, torch.arange(1, size + 1), start)
        torch.testing.assert_close(labels[:, begin + 1 : begin + size + 1], alone, **CLOSE)
        begin += size


@torch.no_grad()
def test_positions_pick_rows_and_empty_rows(llama):
    teacher, tokens, start = make(llama), text(2, 11), torch.randn(K, D)
    everything = teacher(tokens, torch.arange(12), start)
    chosen = torch.tensor([[0, 11, 4], [7, 0, 1]])
    picked = teacher(tokens, chosen, start)
    for row in range(2):
        torch.testing.assert_close(picked[row], everything[row, chosen[row]], **CLOSE)
    assert torch.equal(picked[0, 0], start)
    assert torch.equal(teacher(tokens[:, :0], torch.tensor([0]), start), start.expand(2, 1, K, D))
    nothing = teacher(tokens, torch.arange(12), start, torch.zeros(2, 11, dtype=torch.bool))
    assert torch.equal(nothing, start.expand(2, 12, K, D))


@torch.no_grad()
def test_a_start_token_stands_before_every_window_and_is_no_position(llama):
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    teacher, tokens = make(llama, start_token=7), text(1, 6)
    assert teacher.config.model_context_length == 15  # one of the 16 places is taken
    documents = torch.tensor([[0, 0, 0, 0, 1, 1]])
    labels = teacher(tokens, torch.arange(7), torch.zeros(K, D), document_ids=documents)
    for position, prefix in ((1, tokens[0, :1]), (4, tokens[0, :4]), (6, tokens[0, 4:])):
        expected = naive_label(teacher, model, torch.cat([torch.tensor([7]), prefix]))
        torch.testing.assert_close(labels[0, position], expected, **CLOSE)


def test_the_start_token_is_that_of_the_models_tokenizer(llama, tmp_path):
    from tokenizers.processors import TemplateProcessing

    AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZES, "vocab_size": 260}, **HEADS)).save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert start_token_of(tokenizer) is None and start_token_of(None) is None
    assert teacher_config({"model_name_or_path": str(tmp_path)}).start_token == -1
    first = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)])
    tokenizer.backend_tokenizer.post_processor = first
    tokenizer.save_pretrained(tmp_path)
    config = teacher_config({"model_name_or_path": str(tmp_path), "vocab_size": 258})
    assert config.start_token == 256
    # A tokenizer that adds something behind a text has no start token.
    last = TemplateProcessing(single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 256)])
    tokenizer.backend_tokenizer.post_processor = last
    assert start_token_of(tokenizer) is None
    assert teacher_config({"model_name_or_path": llama, "vocab_size": VOCAB}).start_token == -1  # has no tokenizer


@pytest.mark.parametrize(
    "layers, numbers",
    [(None, [2, 3]), ("-1", [3]), ("1,3", [1, 3]), ("0", [0]), ([-2, 0], [2, 0])],
)
def test_layers(llama, layers, numbers):
    teacher = make(llama, layers=layers)
    assert teacher.config.layers == numbers
    assert teacher.memory_proj.in_features == E * len(numbers)


def test_frozen_model_keeps_its_weights_and_its_mode(llama):
    """A step of the smt phase trains the map, and not a single weight of the model, whose dropout stays off."""
    model = composite(llama)
    model.freeze_for("smt")
    model.train()
    assert model.teacher.training and not any(module.training for module in model.teacher.model.modules())
    before = {name: value.clone() for name, value in model.teacher.state_dict().items()}
    step(model)
    trained = {name for name, parameter in model.teacher.named_parameters() if parameter.grad is not None}
    assert trained == {"memory_proj.weight", "norms.0.weight", "norms.1.weight"}
    after = model.teacher.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == trained
    model.freeze_for("dmt")
    assert not model.trains_teacher and any(parameter.requires_grad for parameter in model.student.parameters())


def step(model):
    objective = Objective(
        "smt", 2, {"readout": 1.0, "dynamics": 0.1, "predictive": 1.0, "uniformity": 0.001}, future_length=3,
        num_predictive_positions=4,
    )  # fmt: skip
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    loss = model(text(2, 9), objective, example_ids=torch.arange(2)).loss
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.teacher.memory_proj.parameters())
    optimizer.step()
    return loss.item()


def test_lora_trains_layers_inside_the_model_alone(folder, tmp_path):
    """They are trained in smt, rest in dmt, change nothing at birth and are saved with the rest."""
    model, plain = composite(folder, lora_r=2), composite(folder)
    plain.load_state_dict(
        {name: value for name, value in model.state_dict().items() if "teacher.model" not in name}, strict=False
    )
    arguments = (text(2, 8), torch.arange(9), torch.zeros(K, D))
    torch.testing.assert_close(model.teacher(*arguments), plain.teacher(*arguments), **CLOSE)
    model.freeze_for("smt")
    model.train()
    weights = {name: value.clone() for name, value in model.teacher.named_parameters()}
    for _ in range(2):  # the first moves one of the two factors alone, the other is 0
        step(model)
        model.zero_grad()
    changed = {name for name, value in model.teacher.named_parameters() if not torch.equal(value, weights[name])}
    own = {name for name in changed if name.startswith("model.")}
    assert own and all("lora_" in name for name in own)
    assert all(parameter.requires_grad for name, parameter in model.teacher.named_parameters() if "lora_" in name)
    labels = model.teacher(*arguments)
    assert (labels - plain.teacher(*arguments)).abs().max() > 1e-4
    model.freeze_for("dmt")
    assert not model.trains_teacher
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(SMTForPreTraining.from_pretrained(tmp_path).teacher(*arguments), labels)


def test_lora_above_the_last_layer_that_is_read_rests(llama, tmp_path):
    """DDP waits for the gradient of everything that takes one."""
    model = composite(llama, lora_r=2, layers="1,2")
    model.save_pretrained(tmp_path)
    for one in (model, SMTForPreTraining.from_pretrained(tmp_path)):
        one.freeze_for("smt")
        step(one)
        trained = {name for name, parameter in one.teacher.named_parameters() if parameter.requires_grad}
        assert any("layers.1." in name for name in trained) and not any("layers.2." in name for name in trained)
        reached = {name for name, parameter in one.teacher.named_parameters() if parameter.grad is not None}
        assert trained == reached


def test_lora_of_the_student_leaves_that_of_the_teacher_at_rest(llama):
    from smt_hf.training.adapters import add_lora

    model = composite(llama, lora_r=2)
    add_lora(model.student)
    model.freeze_for("dmt")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(name.startswith("student.") and "lora_" in name for name in trained)


def test_a_checkpoint_needs_the_models_folder_no_more(tmp_path):
    source = saved(tmp_path / "model", FAMILIES["gpt2"])
    model = composite(source)
    model.save_pretrained(tmp_path / "composite")
    model.teacher.save_pretrained(tmp_path / "teacher")
    arguments = (text(2, 8), torch.arange(9), torch.zeros(K, D))
    labels = model.teacher(*arguments)
    (tmp_path / "model").rename(tmp_path / "moved")
    again = SMTForPreTraining.from_pretrained(tmp_path / "composite")
    assert torch.equal(again.teacher(*arguments), labels)
    assert torch.equal(SMTPretrainedTeacher.from_pretrained(tmp_path / "teacher")(*arguments), labels)
    assert again.config.student.vocab_size == VOCAB
    again.freeze_for("smt")  # what was frozen is frozen again
    assert not any(parameter.requires_grad for parameter in again.teacher.model.parameters())
    # A new teacher from the same configuration would have random weights: it is refused instead.
    with pytest.raises(InputError, match=r"no causal language model could be loaded from .*model"):
        SMTForPreTraining(SMTPreTrainingConfig.from_pretrained(tmp_path / "composite"))


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("lora_r", [0, 2])
def test_a_checkpoint_has_the_head_that_was_kept(is_tied, lora_r, tmp_path):
    """A head of its own is saved, one that is tied to the embeddings is there without being saved."""
    config = LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=is_tied)
    source = saved(tmp_path / "model", config)
    model, plain = composite(source, keeps_head=True, lora_r=lora_r), composite(source, lora_r=lora_r)
    sizes = [sum(parameter.numel() for parameter in one.teacher.parameters()) for one in (model, plain)]
    assert sizes[0] - sizes[1] == (0 if is_tied else VOCAB * E)
    arguments = (text(2, 8), torch.arange(9), torch.zeros(K, D))
    memories, expected = model.teacher(*arguments, top_k=5)
    torch.testing.assert_close(memories, plain.teacher(*arguments))
    model.save_pretrained(tmp_path / "composite")
    model.teacher.save_pretrained(tmp_path / "teacher")
    held = load_file(tmp_path / "composite" / "model.safetensors")
    assert ("teacher.model.lm_head.weight" in held) == (not is_tied)
    (tmp_path / "model").rename(tmp_path / "moved")
    again = SMTForPreTraining.from_pretrained(tmp_path / "composite")
    for teacher in (again.teacher, SMTPretrainedTeacher.from_pretrained(tmp_path / "teacher")):
        own, found = teacher(*arguments, top_k=5)
        torch.testing.assert_close(own, memories)
        torch.testing.assert_close(found.probabilities, expected.probabilities)
        assert (teacher.model.lm_head.weight is teacher.get_input_embeddings().weight) == is_tied
    again.freeze_for("smt")
    trained = {name for name, parameter in again.teacher.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained if name.startswith("model.")) and "memory_proj.weight" in trained
    assert any("lora_" in name for name in trained) == bool(lora_r)
    assert not any("lm_head" in name for name in trained)


def test_weights_are_those_of_the_folder(folder):
    """`post_init` of the composite, which comes later, leaves them alone; the head is not kept."""
    model, files = composite(folder), load_file(f"{folder}/model.safetensors")
    own = model.teacher.model.state_dict()
    matched = [name for name in files if any(torch.equal(files[name], value) for value in own.values())]
    assert len(matched) >= len(files) - 1 and len(own) >= len(matched)
    assert not any(tuple(module.weight.shape) == (VOCAB, E) for module in linears(model.teacher.model))


def linears(model):
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear)]


def test_one_argument_in_python(llama, tmp_path):
    """The student takes the model's vocabulary: of its tokenizer if it has one, and not of its padded embeddings."""
    assert SMTPreTrainingConfig(teacher={"model_name_or_path": llama}).student.vocab_size == VOCAB
    padded = {**SIZES, "vocab_size": 320}
    AutoModelForCausalLM.from_config(LlamaConfig(**padded, **HEADS)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    config = SMTPreTrainingConfig(teacher={"model_name_or_path": str(tmp_path)})
    assert (config.student.vocab_size, config.student.eos_token_id, config.student.pad_token_id) == (258, 256, 257)
    assert config.teacher.vocab_size == 258 and config.teacher.base_config["vocab_size"] == 320
    again = SMTPreTrainingConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert (
        SMTPreTrainingConfig(
            student={"vocab_size": 300}, teacher={"model_name_or_path": llama} | {"model_name_or_path": str(tmp_path)}
        ).teacher.vocab_size
        == 300
    )


@pytest.mark.parametrize("lora_r", [0, 2])
@pytest.mark.parametrize(("of_file", "given"), [("bfloat16", "auto"), ("bfloat16", "float32"), ("float32", "bfloat16")])
def test_precision_survives_saving_and_loading(of_file, given, lora_r, tmp_path):
    """The model's own weights in the precision that was chosen, everything else in full: made anew from a saved
    configuration, loaded as a composite, and as the teacher alone."""
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(FAMILIES["llama"]).to(getattr(torch, of_file)).save_pretrained(tmp_path / "base")
    model = composite(str(tmp_path / "base"), model_dtype=given, lora_r=lora_r)
    wanted = getattr(torch, of_file if given == "auto" else given)
    for name, weight in model.named_parameters():
        is_theirs = name.startswith("teacher.model.") and "lora_" not in name
        assert weight.dtype == (wanted if is_theirs else torch.float32), name
    model.save_pretrained(tmp_path / "composite")
    model.teacher.save_pretrained(tmp_path / "teacher")
    loaded = SMTForPreTraining.from_pretrained(tmp_path / "composite")
    alone = AutoModel.from_pretrained(tmp_path / "teacher")
    again = SMTForPreTraining(SMTPreTrainingConfig.from_pretrained(tmp_path / "composite"))
    again.load_state_dict(model.state_dict())  # as a resumed run does
    expected = model.state_dict()
    for found in (loaded.state_dict(), again.state_dict(), {f"teacher.{k}": v for k, v in alone.state_dict().items()}):
        for name, weight in found.items():
            assert weight.dtype == expected[name].dtype and torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtype_and_device_map_pass_through(llama, dtype):
    """Whatever the model's precision is, the memories and what is trained are of full precision."""
    model = composite(llama, model_dtype=dtype, device_map="cpu")
    assert {parameter.dtype for parameter in model.teacher.model.parameters()} == {getattr(torch, dtype)}
    assert model.teacher.memory_proj.weight.dtype == torch.float32
    labels = model.teacher(text(2, 8), torch.arange(9), torch.zeros(K, D))
    assert labels.dtype == torch.float32
    torch.testing.assert_close(
        labels, composite(llama).teacher(text(2, 8), torch.arange(9), torch.zeros(K, D)), atol=0.1, rtol=0.1
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_loading_passes_through(llama, bits, monkeypatch):
    given = {}

    def from_pretrained(*arguments, **words):
        given.update(words)
        raise ImportError("bitsandbytes is not installed")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(InputError, match=r"needs a package that is missing: .*bitsandbytes"):
        make(llama, device_map="auto", **{f"load_in_{bits}bit": True})
    if given:  # else transformers has asked for the package before
        assert getattr(given["quantization_config"], f"load_in_{bits}bit") and given["device_map"] == "auto"
    with pytest.raises(InputError, match="in 4 or in 8 bits"):
        make(llama, load_in_4bit=True, load_in_8bit=True)


def write_gguf(path):
    """A Llama of one layer with random weights: header, numbers about the model, table of tensors, float32 data."""
    string = lambda text: struct.pack("<Q", len(text)) + text.encode()  # noqa: E731
    known = {"block_count": 1, "context_length": 16, "embedding_length": E, "feed_forward_length": 24}
    known |= {"attention.head_count": 2, "attention.head_count_kv": 2, "vocab_size": VOCAB, "rope.dimension_count": 8}
    facts = [string("general.architecture") + struct.pack("<I", 8) + string("llama")]
    facts += [string(f"llama.{name}") + struct.pack("<II", 4, number) for name, number in known.items()]
    facts += [string("llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, 1e-6)]
    shapes = {"token_embd": (VOCAB, E), "output": (VOCAB, E), "output_norm": (E,)}
    shapes |= {f"blk.0.attn_{part}": (E, E) for part in ("q", "k", "v", "output")}
    shapes |= {"blk.0.attn_norm": (E,), "blk.0.ffn_norm": (E,), "blk.0.ffn_down": (E, 24)}
    shapes |= {"blk.0.ffn_gate": (24, E), "blk.0.ffn_up": (24, E)}
    table, data = b"", b""
    for name, shape in shapes.items():
        table += string(f"{name}.weight") + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        table += struct.pack("<IQ", 0, len(data))
        data += torch.randn(shape, generator=torch.Generator().manual_seed(len(data))).numpy().tobytes()
        data += bytes(-len(data) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(facts)) + b"".join(facts) + table
    path.write_bytes(head + bytes(-len(head) % 32) + data)


def test_gguf_file(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    try:
        model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf").eval()
    except ImportError:  # transformers before 5.24
        with pytest.raises(InputError, match=r'needs the package gguf: `pip install "smt_hf\[gguf\]"`'):
            make(str(tmp_path), gguf_file="tiny.gguf")
        return
    teacher, tokens = make(str(tmp_path), gguf_file="tiny.gguf"), text(1, 5)
    assert teacher.config.layers == [1] and teacher.config.model_context_length == 16
    label = teacher(tokens, torch.tensor([5]), torch.zeros(K, D))[0, 0]
    torch.testing.assert_close(label, naive_label(teacher, model, tokens[0]), **CLOSE)
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="no causal language model could be loaded"):
        make(str(tmp_path), gguf_file="tiny.gguf")


class BlindConfig(PreTrainedConfig):
    model_type = "blind_for_test"
    vocab_size: int = VOCAB
    hidden_size: int = E
    num_hidden_layers: int = 1


class BlindForCausalLM(PreTrainedModel):
    """A language model that keeps its hidden states to itself."""

    config_class = BlindConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def forward(self, input_ids, **words):
        return {"logits": F.linear(self.embed_tokens(input_ids), self.embed_tokens.weight)}


def test_refuses_models_that_make_no_states_of_prefixes(tmp_path):
    from transformers import AutoConfig

    sizes = {"vocab_size": VOCAB, "hidden_size": E, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertLMHeadModel(BertConfig(**sizes, intermediate_size=24)).save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match=r"BertModel is an encoder: .*name a causal language model"):
        make(str(tmp_path / "bert"))
    decoder = BertLMHeadModel(BertConfig(**sizes, intermediate_size=24, is_decoder=True))
    decoder.save_pretrained(tmp_path / "decoder")
    assert make(str(tmp_path / "decoder")).config.layers == [1]
    T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, d_model=E, num_layers=1, num_heads=2)).save_pretrained(
        tmp_path / "t5"
    )
    with pytest.raises(InputError, match=r"t5, an encoder with a decoder.*name a causal language model"):
        make(str(tmp_path / "t5"))
    ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(InputError, match="vit, which is no causal language model"):
        make(str(tmp_path / "vit"))
    AutoConfig.register("blind_for_test", BlindConfig, exist_ok=True)
    AutoModelForCausalLM.register(BlindConfig, BlindForCausalLM, exist_ok=True)
    BlindForCausalLM(BlindConfig()).save_pretrained(tmp_path / "blind")
    with pytest.raises(InputError, match=r"BlindForCausalLM returns no hidden states.*name a causal language model"):
        make(str(tmp_path / "blind"))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model_name_or_path": "nowhere/at-all"}, "no causal language model could be loaded from 'nowhere/at-all'"),
        ({"vocab_size": VOCAB + 1}, f"the student has {VOCAB + 1} tokens, the teacher's model .* knows {VOCAB}"),
        ({"layers": "4"}, r"from 0 .* to 3 .*got '4'"),
        ({"layers": "-5"}, "got '-5'"),
        ({"layers": "1,1"}, "different numbers"),
        ({"layers": "last"}, "must be numbers joined by commas, got 'last'"),
        ({"model_context_length": 17}, "`model_context_length` is 17, and the model .* reads 16 tokens at most"),
        ({"model_context_length": 1}, "`model_context_length` must be at least 2"),
        ({"lora_r": -1}, "`lora_r` must be at least 0"),
        ({"start_token": VOCAB}, f"`start_token` {VOCAB} is no token"),
        ({"model_dtype": "int8"}, "unknown `model_dtype` 'int8'"),
    ],
)
def test_refuses_what_does_not_fit(llama, fields, message):
    with pytest.raises(InputError, match=message):
        make(llama, **fields)


def test_needs_a_model():
    SMTPretrainedTeacherConfig()  # transformers makes one to compare with
    with pytest.raises(InputError, match="needs a model: give `teacher_model_name_or_path`"):
        make_teacher(SMTPretrainedTeacherConfig())


def test_has_no_logits(llama):
    with pytest.raises(InputError, match=r"predicts no tokens for `distillation_weight`.*`keeps_head` true"):
        make(llama)(text(1, 4), torch.arange(5), torch.zeros(K, D), top_k=3)
    with pytest.raises(InputError, match=r"predicts no tokens for `distillation_weight`"):
        composite(llama).freeze_for("dmt", objective=Objective("dmt", 1, {"distillation": 1.0}))
    with pytest.raises(InputError, match="no next-token head"):
        make(llama)(text(1, 4), torch.arange(5), torch.zeros(K, D), return_logits=True)


def test_evaluations_run(llama):
    """Those that follow gradients to the teacher's embeddings do not apply."""
    model = composite(llama)
    rows = text(4, 21).numpy()  # longer than the model reads
    found = evaluate_rows(model, rows, rows)
    assert "teacher_gradient_norm" not in found and "drift" in found


def test_the_model_is_whole_under_zero_3(llama):
    """transformers would split its weights as it loads them; the engine splits the composite as a whole, later."""
    pytest.importorskip("deepspeed")
    stage = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    held = HfDeepSpeedConfig(stage)
    try:
        teacher = make(llama)
        assert all(parameter.numel() for parameter in teacher.model.parameters())
        assert held.is_zero3()
        from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

        assert is_deepspeed_zero3_enabled()  # again, for whatever comes next
    finally:
        del held

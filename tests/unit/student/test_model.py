"""The recurrent model against a naive twin, and the behaviours that generation and training rely on."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from smt_hf import SMTRecurrentCache, SMTRecurrentConfig, SMTRecurrentForCausalLM
from smt_hf.student.modeling_smt_recurrent import CACHE_NAME
from tests.conftest import UPDATERS, VOCAB, make_student, student_config


def state_of(outputs):
    return getattr(outputs, CACHE_NAME)


def naive_block(block, states, causal, rotary_theta=None):
    """One Transformer block, a head and a position at a time."""
    heads, width = block.attention.num_heads, block.attention.head_dim
    _, length, size = states.shape
    normed = block.attention_norm(states)
    keys, values = block.attention.kv_proj(normed).split(size, dim=-1)
    queries = block.attention.q_proj(normed)

    def turned(vector, position):
        if rotary_theta is None:
            return vector
        half = width // 2
        angles = torch.tensor([position * rotary_theta ** (-2 * i / width) for i in range(half)])
        first, second = vector[..., :half], vector[..., half:]
        return torch.cat(
            [first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos()], -1
        )

    mixed = torch.zeros_like(states)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        for i in range(length):
            seen = range(i + 1) if causal else range(length)
            query = turned(queries[:, i, part], i)
            scores = torch.stack([(query * turned(keys[:, j, part], j)).sum(-1) for j in seen], -1) / width**0.5
            weights = scores.softmax(-1)
            mixed[:, i, part] = sum(weights[:, n, None] * values[:, j, part] for n, j in enumerate(seen))
    states = states + block.attention.o_proj(mixed)
    return states + block.mlp(block.mlp_norm(states))


def naive_rms(vector, eps):
    return vector / (vector.square().mean(-1, keepdim=True) + eps).sqrt()


def naive_fast_weight_row(updater, memory, embeds, eps):
    """One transition of one row `(K, D)`, `(D,)`, written from the definition, a number at a time where it is short."""
    cell, width = updater.cell, len(embeds)
    heads, values, keys, num_traces = cell.sizes
    numbers = memory.flatten()
    last, read = numbers[:width], numbers[-width:]
    traces = numbers[width : width + num_traces]
    matrices = numbers[width + num_traces : -width].view(heads, values, keys)
    token = naive_rms(embeds, eps)
    control = list((updater.control_proj.weight @ read).split(updater.controlled))
    gates, inputs = (cell.mean_proj.weight @ torch.cat([last, token]) + control.pop(0)).chunk(2)
    kept = torch.sigmoid(gates + cell.mean_bias)
    means = torch.stack([kept[i] * traces[heads + i] + (1 - kept[i]) * inputs[i] for i in range(num_traces - heads)])
    features = torch.cat([last, token, naive_rms(means, eps)])
    gates, moves = (cell.pointer_proj.weight @ features + control.pop(0)).chunk(2)
    at_birth = torch.tensor([float(head % 2 == 0) for head in range(heads)])  # every other pointer rests
    traces = torch.cat([torch.sigmoid(gates + 6) * traces[:heads] + moves + at_birth, means])

    def turned(vectors):  # (heads, keys): pair j of head h by the angle of its pointer
        rows = []
        for head, vector in enumerate(vectors.view(heads, keys)):
            vector, half = vector / vector.norm(), keys // 2
            angles = traces[head] * torch.tensor([torch.pi / 2 ** (5 * j / max(half - 1, 1)) for j in range(half)])
            cos, sin, one, two = angles.cos(), angles.sin(), vector[:half], vector[half:]
            rows.append(torch.cat([one * cos - two * sin, one * sin + two * cos]))
        return torch.stack(rows)

    wrote = cell.matrix_proj.weight @ features + control.pop(0)
    at, what, strength, keep = wrote.split([heads * keys, heads * values, heads, heads])
    at, what = turned(at), what.view(heads, values)
    left = torch.sigmoid(keep + 6)[:, None, None] * matrices
    matrices = torch.stack(
        [left[h] + torch.sigmoid(strength[h]) * torch.outer(what[h] - left[h] @ at[h], at[h]) for h in range(heads)]
    )
    stream = None
    for query_proj, up_proj, down_proj in zip(
        cell.query_projs.values(), cell.up_projs.values(), cell.down_projs.values()
    ):
        seen = features if stream is None else torch.cat([features, naive_rms(stream, eps)])
        asked = turned(query_proj.weight @ seen + control.pop(0))
        answers = torch.cat([matrices[h] @ asked[h] for h in range(heads)])
        gate, inner = (up_proj.weight @ torch.cat([seen, naive_rms(answers, 0.1)]) + control.pop(0)).chunk(2)
        change = down_proj.weight @ (F.silu(gate) * inner)
        stream = change if stream is None else stream + change
    return torch.cat([token, traces, matrices.flatten(), naive_rms(stream, eps)]).view(memory.shape)


def naive_embeds(model, token):
    """Rows of the table, and the map to the model's width if there is one."""
    rows = torch.stack([model.embed_tokens.weight[number] for number in token])
    if model.config.embedding_size in (None, model.config.hidden_size):
        return rows
    return torch.stack([model.embed_proj.weight @ row for row in rows])


def naive_head(student, states):
    """Logits of each state, a token's row of the head after the other."""
    if student.config.embedding_size not in (None, student.config.hidden_size):
        states = torch.stack([student.head_proj.weight @ state for state in states])
    return torch.stack([(states * row).sum(-1) for row in student.lm_head.weight], -1)


def naive_step(model, memory, token):
    """One transition, written from the definition."""
    updater, embeds = model.updater, naive_embeds(model, token)
    if model.config.updater_type == "fast_weight":
        rows = zip(memory, embeds)
        return torch.stack([naive_fast_weight_row(updater, *row, model.config.rms_norm_eps) for row in rows])
    if model.config.updater_type == "transformer":
        states = torch.cat([embeds[:, None], memory], 1) + updater.slot_embeddings
        for layer in updater.layers:
            states = naive_block(layer, states, causal=False)
        stream = states[:, 1:]
    elif model.config.updater_type == "mlp":
        stream = memory.flatten(1) + updater.token_proj(embeds)
        for norm, layer in zip(updater.norms, updater.layers):
            stream = stream + layer.down_proj(F.gelu(layer.up_proj(norm(stream))))
    else:
        stream = memory.flatten(1)
        for input_proj, state_proj in zip(updater.input_projs.values(), updater.state_projs.values()):
            cell = nn.GRUCell(embeds.shape[1], stream.shape[1])
            cell.weight_ih, cell.bias_ih = input_proj.weight, input_proj.bias
            cell.weight_hh, cell.bias_hh = state_proj.weight, state_proj.bias
            stream = cell(embeds, stream)
    moved = memory + updater.out_proj(updater.out_norm(stream)).view(memory.shape)
    return moved / (moved.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()


def naive_logits(student, input_ids):
    model = student.model
    memory = naive_rms(model.initial_memory, model.config.rms_norm_eps)
    if model.config.updater_type == "fast_weight":
        memory = torch.cat([memory[:1], torch.zeros_like(memory[1:-1]), memory[-1:]])
    memory = memory.expand(len(input_ids), -1, -1)
    logits = []
    for token in input_ids.unbind(1):
        memory = naive_step(model, memory, token)
        states = memory[:, -len(model.readout.slot_embeddings) :] + model.readout.slot_embeddings
        for layer in model.readout.layers:
            states = naive_block(layer, states, causal=True, rotary_theta=model.config.rope_theta)
        logits.append(naive_head(student, model.readout.norm(states[:, -1])))
    return torch.stack(logits, 1)


@pytest.mark.parametrize("num_readout_layers", [1, 2])
def test_equals_naive_twin(student, tokens, num_readout_layers):
    heads = {"num_memory_tokens": 6, "num_matrix_heads": 2} if student.config.updater_type == "fast_weight" else {}
    student = make_student(
        updater_type=student.config.updater_type,
        num_readout_layers=num_readout_layers,
        **(heads if num_readout_layers > 1 else {}),
    )
    twin = copy.deepcopy(student)
    logits, expected = student(tokens).logits, naive_logits(twin, tokens)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    weights = torch.randn_like(logits)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, own), (_, theirs) in zip(student.named_parameters(), twin.named_parameters()):
        torch.testing.assert_close(own.grad, theirs.grad, atol=2e-4, rtol=1e-3, msg=name)


def test_identity_at_birth(tokens):
    for updater_type in set(UPDATERS) - {"fast_weight"}:
        model = SMTRecurrentForCausalLM(student_config(updater_type=updater_type)).model
        memories = model.unroll(model.start_memory().expand(3, -1, -1), model.embed_tokens(tokens))
        torch.testing.assert_close(memories, model.start_memory().expand_as(memories), atol=1e-5, rtol=1e-5)


def test_a_fast_weight_keeps_what_no_token_overwrites():
    """At birth three quarters of what is stored are left after 100 tokens that write nothing."""
    model = SMTRecurrentForCausalLM(student_config(updater_type="fast_weight", num_memory_tokens=7)).model
    updater = model.updater
    assert not updater.control_proj.weight.any()
    memory = model.start_memory()[None].detach()
    heads, values, keys, traces = updater.cell.sizes
    assert memory[0, 0].square().mean() == pytest.approx(1, abs=1e-3) and not memory[0, 1:-1].any()
    stored = torch.zeros(values, keys)
    stored[:, 0] = 1.0
    with torch.no_grad():
        memory.flatten()[16 + traces : 16 + traces + values * keys] = stored.flatten()
        updater.cell.matrix_proj.weight[heads * keys :].zero_()  # gates as at birth, strengths 0 below
        original = updater.cell.write_inputs
        updater.cell.write_inputs = lambda *inputs: (
            *original(*inputs)[:2],
            torch.zeros(1, heads),
            original(*inputs)[3],
        )
        for token in torch.randint(1, VOCAB, (100, 1)):
            memory = updater(memory, model.embed_tokens(token))
    kept = memory.flatten()[16 + traces : 16 + traces + values * keys].view(values, keys)
    torch.testing.assert_close(kept, stored * torch.sigmoid(torch.tensor(6.0)) ** 100, atol=1e-5, rtol=1e-4)
    assert kept[0, 0] > 0.75


@pytest.mark.parametrize("cuts", [[1], [5], [1, 2, 11], list(range(1, 12))])
def test_split_anywhere(student, tokens, cuts):
    """Same logits, memory and gradients, whole or in pieces; pieces of one token are step-by-step."""
    whole = student(tokens, use_cache=True)
    loss = (whole.logits * torch.linspace(-1, 1, VOCAB)).sum()
    gradients = torch.autograd.grad(loss, list(student.parameters()))
    cache, pieces = None, []
    for begin, end in zip([0, *cuts], [*cuts, 12]):
        outputs = student(tokens[:, begin:end], past_key_values=cache, use_cache=True)
        cache = state_of(outputs)
        pieces.append(outputs.logits)
    logits = torch.cat(pieces, 1)
    torch.testing.assert_close(logits, whole.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cache.layers[0].memory, state_of(whole).layers[0].memory, atol=1e-6, rtol=1e-5)
    assert cache.get_seq_length() == 12
    again = torch.autograd.grad((logits * torch.linspace(-1, 1, VOCAB)).sum(), list(student.parameters()))
    for own, theirs in zip(again, gradients):
        torch.testing.assert_close(own, theirs, atol=1e-4, rtol=1e-4)


def test_masked_tokens_leave_the_memory(student, tokens):
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0  # left
    mask[1, 5:7] = 0  # middle
    mask[2, 9:] = 0  # right
    outputs = student(tokens, attention_mask=mask, use_cache=True)
    for row, keep in enumerate(mask.bool()):
        alone = student(tokens[row : row + 1, keep], use_cache=True)
        torch.testing.assert_close(outputs.logits[row, keep], alone.logits[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(state_of(outputs).layers[0].memory[row], state_of(alone).layers[0].memory[0])
    # Masked again on a continued forward, with a mask as long as all tokens so far.
    first = student(tokens[:, :6], attention_mask=mask[:, :6], use_cache=True)
    second = student(tokens[:, 6:], attention_mask=mask, past_key_values=state_of(first))
    torch.testing.assert_close(second.logits, outputs.logits[:, 6:], atol=1e-5, rtol=1e-5)


def test_inputs_embeds_labels_and_kept_logits(student, tokens):
    outputs = student(tokens, labels=tokens, output_hidden_states=True)
    expected = F.cross_entropy(outputs.logits[:, :-1].reshape(-1, VOCAB), tokens[:, 1:].reshape(-1))
    torch.testing.assert_close(outputs.loss, expected)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(3, 12, 16)] * 3
    embeds = student.get_input_embeddings()(tokens)
    torch.testing.assert_close(student(inputs_embeds=embeds).logits, outputs.logits)
    torch.testing.assert_close(student(tokens, logits_to_keep=4).logits, outputs.logits[:, -4:])
    torch.testing.assert_close(student(tokens, logits_to_keep=torch.tensor([2, 7])).logits, outputs.logits[:, [2, 7]])
    assert state_of(student(tokens, use_cache=False)) is None
    torch.testing.assert_close(student(tokens, return_dict=False)[0], outputs.logits)


def test_refusals(student, tokens):
    for inputs in ({}, {"input_ids": tokens, "inputs_embeds": student.get_input_embeddings()(tokens)}):
        with pytest.raises(ValueError, match="exactly one"):
            student(**inputs)
    with pytest.raises(ValueError, match="covers 5 tokens"):
        student(tokens, attention_mask=torch.ones(3, 5))
    with pytest.raises(ValueError, match="no tokens"):
        student(tokens[:, :0])
    with pytest.raises(ValueError, match="attentions"):
        student(tokens, output_attentions=True)
    with pytest.raises(ValueError, match="mask"):
        student(tokens, attention_mask=torch.ones(3, 1, 12, 12))
    with pytest.raises(ValueError, match="batch_repeat_interleave"):
        student(tokens, past_key_values=state_of(student(tokens[:1], use_cache=True)))
    with pytest.raises(ValueError, match="cache_implementation"):
        student.generate(tokens, max_new_tokens=2, cache_implementation="static")
    assert student(tokens, past_key_values=DynamicCache()).logits.shape == (3, 12, VOCAB)
    filled = DynamicCache()
    filled.update(torch.zeros(3, 1, 2, 4), torch.zeros(3, 1, 2, 4), 0)
    with pytest.raises(ValueError, match="SMTRecurrentCache"):
        student(tokens, past_key_values=filled)


def gradients_of(student, ids, mask):
    """Loss, gradients, and numbers held for the backward pass."""
    student.zero_grad()
    held = []
    keep = lambda tensor: (held.append(tensor.numel()), tensor)[1]  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = student(ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in student.parameters()], sum(held)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(student, use_reentrant):
    """The same gradients, with less held for the backward pass; 70 tokens are no multiple of a stretch."""
    ids = torch.randint(1, VOCAB, (2, 70))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, 40:50] = 0
    student.train()
    loss, expected, plain = gradients_of(student, ids, mask)
    assert [module for module in student.modules() if isinstance(module, GradientCheckpointingLayer)]
    student.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    student.enable_input_require_grads()
    again, own, checkpointed = gradients_of(student, ids, mask)
    torch.testing.assert_close(again, loss)
    for one, other in zip(own, expected):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert checkpointed < 0.5 * plain
    student.gradient_checkpointing_disable()
    assert gradients_of(student, ids, mask)[2] >= plain


@pytest.mark.skipif(not hasattr(PreTrainedModel, "activation_checkpointing_enable"), reason="transformers is older")
def test_every_second_stretch_is_checkpointed():
    """`every_n_layers` counts stretches of 32 tokens: of four, two are held; the gradients do not change."""
    student = make_student(updater_type="mlp")
    ids = torch.randint(1, VOCAB, (2, 128))
    mask = torch.ones_like(ids)
    student.train()
    held = {}
    for every_n_layers in (1, 2, 5):
        student.activation_checkpointing_enable(every_n_layers=every_n_layers)
        _, own, held[every_n_layers] = gradients_of(student, ids, mask)
        student.activation_checkpointing_disable()
        _, expected, plain = gradients_of(student, ids, mask)
        for one, other in zip(own, expected):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    # What is between the checkpointed and the plain run is held of 0, 2 and 3 of 4 stretches.
    span = plain - held[1]
    assert (held[2] - held[1]) / span == pytest.approx(2 / 4, abs=0.05)
    assert (held[5] - held[1]) / span == pytest.approx(3 / 4, abs=0.05)


def test_packed_documents(student, tokens):
    """The memory goes back to m_0 where a document ends; a row is then as its documents alone."""
    document_ids = torch.tensor([[0] * 12, [0] * 5 + [1] * 7, [3, 7, *[1] * 10]])
    logits = student(tokens, document_ids=document_ids).logits
    for row, begin, end in ((0, 0, 12), (1, 0, 5), (1, 5, 12), (2, 0, 1), (2, 1, 2), (2, 2, 12)):
        alone = student(tokens[row : row + 1, begin:end]).logits[0]
        torch.testing.assert_close(logits[row, begin:end], alone, atol=1e-5, rtol=1e-5)


def test_loss(student, tokens):
    """-100 is ignored, a number of items is divided by, nothing to predict is no number."""
    labels = tokens.clone()
    labels[:, 3:8] = -100
    logits = student(tokens).logits[:, :-1].reshape(-1, VOCAB)
    expected = F.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum")
    num_labels = (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(student(tokens, labels=labels).loss, expected / num_labels)
    torch.testing.assert_close(student(tokens, labels=labels, num_items_in_batch=100).loss, expected / 100)
    assert student(tokens, labels=torch.full_like(tokens, -100)).loss.isnan()


def test_tuples(student, tokens):
    """`return_dict=False`, by argument and by configuration."""
    expected = student(tokens, labels=tokens, output_hidden_states=True, use_cache=True)
    outputs = student(tokens, labels=tokens, output_hidden_states=True, use_cache=True, return_dict=False)
    assert [type(part) for part in outputs] == [torch.Tensor, torch.Tensor, SMTRecurrentCache, tuple]
    assert torch.equal(outputs[0], expected.loss) and torch.equal(outputs[1], expected.logits)
    student.config.return_dict = False
    assert torch.equal(student(tokens)[0], expected.logits)


def test_compiled_whole(student, tokens):
    """No graph break in a forward without a state."""
    compiled = torch.compile(student, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens, use_cache=False).logits, student(tokens).logits)


def test_right_padding_without_a_mask(student, tokens):
    """As lm-eval reads: what comes after a token changes nothing before it."""
    padded = F.pad(tokens, (0, 5))
    torch.testing.assert_close(student(padded).logits[:, :12], student(tokens).logits)


def test_hidden_states(student, tokens):
    """Embeddings, the stream between the layers, what is read out; whole, whatever logits are kept."""
    outputs = student(tokens, output_hidden_states=True, logits_to_keep=2)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(3, 12, 16)] * 3
    assert outputs.logits.shape == (3, 2, VOCAB)
    assert torch.equal(outputs.hidden_states[0], student.get_input_embeddings()(tokens))
    torch.testing.assert_close(student.lm_head(outputs.hidden_states[-1]), student(tokens).logits)
    torch.testing.assert_close(outputs.logits, student(tokens).logits[:, -2:])
    generated = student.generate(
        tokens, max_new_tokens=2, do_sample=False, output_hidden_states=True, return_dict_in_generate=True,
        pad_token_id=0,
    )  # fmt: skip
    assert [[part.shape[1] for part in step] for step in generated.hidden_states] == [[12] * 3, [1] * 3]


def test_embedding_accessors(student, tokens):
    embeddings, head = nn.Embedding(VOCAB, 16), nn.Linear(16, VOCAB, bias=False)
    before = student(tokens).logits
    student.set_input_embeddings(embeddings)
    student.set_output_embeddings(head)
    assert student.get_input_embeddings() is embeddings and student.get_output_embeddings() is head
    expected = naive_logits(student, tokens)
    torch.testing.assert_close(student(tokens).logits, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(expected, before)


@pytest.mark.parametrize("of_model, of_state", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_state_of_another_precision(student, tokens, of_model, of_state):
    """A state kept by one precision of a model is gone on with by another."""
    state = state_of(student(tokens, use_cache=True))
    state.layers[0].memory = state.memory.to(getattr(torch, of_state))
    logits = student.to(getattr(torch, of_model))(tokens, past_key_values=state).logits
    assert logits.dtype == getattr(torch, of_model) and logits.isfinite().all()


@pytest.mark.gpu
def test_quantised(student, tokens, tmp_path):
    """bitsandbytes in 8 bits finds the linear layers."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="auto"
    )
    assert loaded(tokens.to(loaded.device)).logits.isfinite().all()


def test_slow_changes_of_a_half_precision_model_add_up(student):
    """A model in bfloat16 whose transitions are below the resolution of bfloat16 ends where one in float32 does."""
    updater, slow = student.model.updater, slice(None)
    if student.config.updater_type == "fast_weight":  # of its memory, traces and pointers move in small steps
        nn.init.zeros_(updater.control_proj.weight)
        slow = slice(updater.cell.width, updater.cell.width + updater.cell.sizes.traces)
    else:
        nn.init.normal_(updater.out_proj.weight, std=0.003)
    ids = torch.randint(1, VOCAB, (2, 400))
    with torch.no_grad():
        expected = student.model.final_memory(ids)
        moved = (expected - student.model.start_memory()).flatten(1)[:, slow].square().mean().sqrt()
        own = student.bfloat16().model.final_memory(ids)
    assert own.dtype == torch.float32
    assert (own - expected).flatten(1)[:, slow].square().mean().sqrt() < 0.05 * moved


def test_every_linear_layer_is_found_by_its_type(student, tokens):
    """Quantisation by bitsandbytes, and torch's dynamic one, convert what is exactly an `nn.Linear`."""
    names = {name for name, module in student.named_modules() if isinstance(module, nn.Linear)}
    assert all(type(student.get_submodule(name)) is nn.Linear for name in names)
    expected = student(tokens).logits
    quantised = torch.ao.quantization.quantize_dynamic(student, {nn.Linear}, dtype=torch.qint8)
    assert not [module for module in quantised.modules() if isinstance(module, nn.Linear)]
    agree = (quantised(tokens).logits.argmax(-1) == expected.argmax(-1)).float().mean()
    assert agree > 0.7


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_memory_tokens": 0}, "`num_memory_tokens` must be at least 1"),
        ({"hidden_size": 20, "num_attention_heads": 3}, "`num_attention_heads` .3. must divide `hidden_size` .20."),
        ({"updater_type": "lstm"}, "unknown `updater_type` 'lstm': choose one of transformer, mlp, gru, fast_weight"),
        ({"vocab_size": 0}, "`vocab_size` must be at least 1"),
        ({"hidden_size": 0}, "`hidden_size` must be at least 1, got 0"),
        ({"hidden_size": -8}, "`hidden_size` must be at least 1, got -8"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be at least 1"),
        ({"num_readout_layers": -1}, "`num_readout_layers` must be at least 1"),
        ({"intermediate_size": 0}, "`intermediate_size` must be at least 1"),
        ({"num_attention_heads": 0}, "`num_attention_heads` must be at least 1"),
        ({"initializer_range": -0.1}, "`initializer_range` must be at least 0, got -0.1"),
        ({"rms_norm_eps": float("nan")}, "`rms_norm_eps` must be at least 0, got nan"),
        ({"rope_theta": -1.0}, "`rope_theta` must be a number above 0"),
        ({"hidden_act": "nope"}, "`hidden_act` 'nope' is unknown: choose one of .*gelu"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        SMTRecurrentConfig(**fields)

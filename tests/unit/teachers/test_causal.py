"""Labels of all prefixes from one pass against a twin that encodes every prefix on its own."""

import copy

import pytest
import torch

from smt_hf import SMTTeacherEncoder
from tests.conftest import VOCAB, teacher_config

READOUTS = ("projection", "registers")


def make_teacher(**fields):
    torch.manual_seed(0)
    return SMTTeacherEncoder(teacher_config(**fields))


def rotated(heads, positions, theta):
    half = heads.shape[-1] // 2
    angles = positions[:, None, None] * theta ** (-torch.arange(half) * 2.0 / heads.shape[-1])
    first, second = heads[..., :half], heads[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos()], -1)


def naive_label(teacher, prefix):
    """`(t,)` tokens -> `(K, D)`: the tokens and the registers of this prefix alone, with a full mask."""
    config, length = teacher.config, len(prefix)
    states, positions = teacher.embed_tokens(prefix), torch.arange(length, dtype=torch.float)
    registers = config.num_memory_tokens if config.memory_readout == "registers" else 0
    if registers:
        states = torch.cat([states, teacher.registers])
        positions = torch.cat([positions, torch.full((registers,), length - 1.0)])
    mask = torch.zeros(len(states), len(states), dtype=torch.bool)
    for i in range(len(states)):
        for j in range(len(states)):
            if i < length:
                mask[i, j] = j <= i < j + config.sliding_window and j < length
            else:
                mask[i, j] = j >= length or j >= length - config.sliding_window
    collected = []
    for layer in teacher.layers:
        normed = layer.attention_norm(states)
        if layer.conv is not None:
            kernel = layer.conv.weight
            convolved = [sum(kernel[d] * normed[i - d] for d in range(min(len(kernel), i + 1))) for i in range(length)]
            normed = torch.cat([torch.stack(convolved), normed[length:]])
        query, key, value = layer.qkv_proj(normed).view(len(states), 3, layer.num_heads, -1).unbind(1)
        query, key = rotated(query, positions, config.rope_theta), rotated(key, positions, config.rope_theta)
        scores = torch.einsum("ihd,jhd->hij", query, key) / layer.head_dim**0.5
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        if config.rotary_values:  # by the distance, one pair of tokens at a time
            mixed = torch.stack(
                [
                    sum(
                        weights[:, i, j, None]
                        * rotated(value[j, None], positions[j, None] - positions[i], config.rope_theta)[0]
                        for j in range(len(states))
                    )
                    for i in range(len(states))
                ]
            )
        else:
            mixed = torch.einsum("hij,jhd->ihd", weights, value)
        states = states + layer.o_proj(mixed.flatten(1))
        states = states + layer.down_proj(layer.activation(layer.up_proj(layer.mlp_norm(states))))
        collected.append(teacher.norm(states))
    if registers:
        memory = teacher.memory_proj(collected[-1][length:])
    else:
        memory = teacher.memory_proj(torch.cat([state[length - 1] for state in collected])).view(-1, config.memory_size)
    return memory / (memory.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()


def naive_labels(teacher, input_ids, positions, initial_memory, attention_mask=None, document_ids=None):
    rows = []
    for row, read in enumerate(input_ids):
        labels = []
        for position in positions.tolist():
            kept = [index for index in range(position) if attention_mask is None or attention_mask[row, index]]
            if document_ids is not None and kept:
                kept = [index for index in kept if document_ids[row, index] == document_ids[row, kept[-1]]]
            labels.append(naive_label(teacher, read[kept]) if kept else initial_memory)
        rows.append(torch.stack(labels))
    return torch.stack(rows)


@pytest.mark.parametrize("length", [1, 4, 5, 13])
@pytest.mark.parametrize("extra", ["plain", "mask", "documents", "both"])
@pytest.mark.parametrize(("conv_kernel", "rotary_values"), [(4, True), (1, False)])
@pytest.mark.parametrize("memory_readout", READOUTS)
def test_equals_naive_twin(memory_readout, conv_kernel, rotary_values, extra, length):
    teacher = make_teacher(memory_readout=memory_readout, conv_kernel=conv_kernel, rotary_values=rotary_values)
    if teacher.layers[0].conv is not None:  # at birth it changes nothing
        for layer in teacher.layers:
            torch.nn.init.normal_(layer.conv.weight)
    twin = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(length)
    input_ids = torch.randint(VOCAB, (3, length), generator=generator)
    mask = documents = None
    if extra in ("mask", "both"):
        mask = torch.rand(3, length, generator=generator) > 0.3
    if extra in ("documents", "both"):
        documents = (torch.rand(3, length, generator=generator) > 0.7).long().cumsum(1)
    positions = torch.arange(length + 1)
    start = torch.randn(3, 16, generator=generator)
    own_start, twin_start = start.clone().requires_grad_(), start.clone().requires_grad_()
    labels = teacher(input_ids, positions, own_start, mask, documents)
    expected = naive_labels(twin, input_ids, positions, twin_start, mask, documents)
    torch.testing.assert_close(labels, expected, atol=2e-5, rtol=1e-4)
    weights = torch.randn(labels.shape, generator=generator)
    (labels * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(own_start.grad, twin_start.grad)
    for (name, own), (_, theirs) in zip(teacher.named_parameters(), twin.named_parameters()):
        if theirs.grad is not None or own.grad is not None:
            own_grad = torch.zeros_like(own) if own.grad is None else own.grad
            their_grad = torch.zeros_like(own) if theirs.grad is None else theirs.grad
            torch.testing.assert_close(own_grad, their_grad, atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("memory_readout", READOUTS)
def test_labels_mean_the_same_at_any_position(memory_readout):
    """Past the receptive field, 2 layers x (4 + 3) tokens + 1, a label does not know how long the text before was."""
    teacher = make_teacher(memory_readout=memory_readout)
    for layer in teacher.layers:
        torch.nn.init.normal_(layer.conv.weight)
    tail = torch.randint(VOCAB, (1, 15))
    labels = []
    for before in (0, 3, 20):
        text = torch.cat([torch.randint(VOCAB, (1, before)), tail], 1)
        labels.append(teacher(text, torch.tensor([before + 15]), torch.zeros(3, 16)))
    torch.testing.assert_close(labels[1], labels[0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(labels[2], labels[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("memory_readout", READOUTS)
def test_positions_pick_rows(memory_readout):
    teacher = make_teacher(memory_readout=memory_readout)
    input_ids, start = torch.randint(VOCAB, (2, 11)), torch.randn(3, 16)
    everything, logits = teacher(input_ids, torch.arange(12), start, return_logits=True)
    chosen = torch.tensor([[0, 11, 4], [7, 0, 1]])
    picked, picked_logits = teacher(input_ids, chosen, start, return_logits=True)
    for row in range(2):
        torch.testing.assert_close(picked[row], everything[row, chosen[row]])
        torch.testing.assert_close(picked_logits[row], logits[row, chosen[row]])
    assert not logits[:, 0].any()

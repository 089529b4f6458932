"""Algebra of the recurrent state."""

import copy

import pytest
import torch

from smt_hf import SMTRecurrentCache


def filled(record=False, batch=2, lengths=(3, 2)):
    cache = SMTRecurrentCache()
    if record:
        cache.activate_past_recording()
    memories = torch.randn(batch, sum(lengths), 4, 5)
    for part in memories.split(list(lengths), dim=1):
        cache.layers[0].update_memory(part)
    return cache, memories


def test_rows():
    cache, memories = filled()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.layers[0].memory, memories[[1, 0], -1])
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.layers[0].memory, memories[[1, 1, 0, 0], -1])
    cache.batch_select_indices(torch.tensor([3]))
    assert torch.equal(cache.layers[0].memory, memories[[0], -1])
    assert cache.batch_size == 1 and cache.get_seq_length() == 5
    cache.reset()
    assert cache.layers[0].memory is None and cache.get_seq_length() == 0


@pytest.mark.parametrize("removed", range(6))
def test_crop(removed):
    cache, memories = filled(record=True)
    cache.crop(-removed)
    assert cache.get_seq_length() == 5 - removed
    expected = memories[:, 4 - removed] if removed < 5 else None
    assert cache.layers[0].memory is expected or torch.equal(cache.layers[0].memory, expected)
    with pytest.raises(ValueError, match="activate_past_recording"):
        cache.crop(1)  # the record ends with a crop


def test_crop_without_record():
    with pytest.raises(ValueError, match="activate_past_recording"):
        filled()[0].crop(1)


def test_copies_and_gradients():
    cache = SMTRecurrentCache()
    start = torch.randn(1, 1, 2, 3, requires_grad=True)
    cache.layers[0].update_memory(start * 2)
    copied = copy.deepcopy(cache)
    assert not copied.layers[0].memory.requires_grad and cache.layers[0].memory.requires_grad
    cache.layers[0].memory.sum().backward()
    assert torch.equal(start.grad, torch.full_like(start, 2.0))
    assert not cache.detach_().layers[0].memory.requires_grad

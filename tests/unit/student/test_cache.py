"""Algebra of the recurrent state."""

import copy

import pytest
import torch
from safetensors.torch import save_file

from smt_hf import SMTRecurrentCache
from smt_hf.student.modeling_smt_recurrent import CACHE_NAME
from tests.conftest import student_config


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


def test_save_and_load(student, tokens, tmp_path):
    """Read half of a text, save the state, go on from the file."""
    whole = student(tokens).logits
    cache = getattr(student(tokens[:, :7], use_cache=True), CACHE_NAME)
    path = tmp_path / "state.safetensors"
    cache.save(path)
    loaded = SMTRecurrentCache.load(path, student.config)
    assert torch.equal(loaded.memory, cache.memory) and loaded.get_seq_length() == 7
    torch.testing.assert_close(student(tokens[:, 7:], past_key_values=loaded).logits, whole[:, 7:])
    with pytest.raises(FileExistsError, match="overwrite"):
        cache.save(path)
    cache.save(path, overwrite=True)
    assert {found.name for found in tmp_path.iterdir()} == {path.name}  # nothing half-written is left


def test_save_and_load_refuse(student, tokens, tmp_path):
    path = tmp_path / "state.safetensors"
    with pytest.raises(ValueError, match="empty"):
        SMTRecurrentCache().save(path)
    getattr(student(tokens, use_cache=True), CACHE_NAME).save(path)
    with pytest.raises(ValueError, match="another model"):
        SMTRecurrentCache.load(path, student_config(num_memory_tokens=5))
    save_file({"memory": torch.ones(1, 3, 16)}, tmp_path / "other.safetensors", metadata={"smt_recurrent_state": "0"})
    with pytest.raises(ValueError, match="version"):
        SMTRecurrentCache.load(tmp_path / "other.safetensors")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="cut off"):
        SMTRecurrentCache.load(path)


def test_short_names():
    cache, memories = filled(record=True)
    cache.reorder(torch.tensor([1, 0]))
    cache.repeat(2)
    cache.select(torch.tensor([0, 2]))
    cache.crop(2)
    assert torch.equal(cache.memory, memories[[1, 0], 2])


def test_detach_leaves_the_original(student, tokens):
    cache = getattr(student(tokens, use_cache=True), CACHE_NAME)
    copied = cache.detach()
    assert cache.memory.requires_grad and not copied.memory.requires_grad
    student(tokens, past_key_values=copied)
    assert cache.get_seq_length() == 12 and copied.get_seq_length() == 24

"""Generation in every mode of transformers: the same tokens as without a state that is carried along."""

import copy

import pytest
import torch
from transformers import DynamicCache

from smt_hf import SMTRecurrentCache
from smt_hf.student.modeling_smt_recurrent import CACHE_NAME
from tests.conftest import VOCAB, make_student

SETTINGS = {"max_new_tokens": 7, "pad_token_id": 0}


def generated(student, prompt, **settings):
    torch.manual_seed(3)
    return student.generate(prompt, **{**SETTINGS, "do_sample": False, **settings})


def test_greedy_is_the_argmax_written_out(student, tokens):
    prompt = tokens[:, :5]
    longhand = prompt
    for _ in range(7):
        longhand = torch.cat([longhand, student(longhand).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated(student, prompt), longhand)


MODES = {
    "greedy": {},
    "sample": {"do_sample": True},
    "num_return_sequences": {"do_sample": True, "num_return_sequences": 3},
    "beam": {"num_beams": 3},
    "beam_returned": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    "beam_sample": {"num_beams": 3, "do_sample": True},
    "guidance": {"guidance_scale": 1.7},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "chunked_prefill": {"prefill_chunk_size": 2},
}


@pytest.mark.parametrize("mode", list(MODES))
def test_with_and_without_a_state(student, tokens, mode):
    prompt = tokens[:, :5]
    without = {name: value for name, value in MODES[mode].items() if name != "prefill_chunk_size"}
    expected = generated(student, prompt, use_cache=False, **without)
    assert torch.equal(generated(student, prompt, **MODES[mode]), expected)


def test_guidance_with_a_negative_prompt(student, tokens):
    expected, own = (
        generated(student, tokens[:1, :5], guidance_scale=1.5, negative_prompt_ids=tokens[1:2, :3], use_cache=use_cache)
        for use_cache in (False, True)
    )
    assert torch.equal(own, expected)


@pytest.mark.parametrize("helper", ["lookup", "itself", "smaller"])
def test_assisted_generation(student, tokens, helper):
    prompt = torch.cat([tokens[:1, :5], tokens[:1, :5]], 1)  # something to look up
    drafts = {
        "lookup": {"prompt_lookup_num_tokens": 3},
        "itself": {"assistant_model": copy.deepcopy(student)},
        "smaller": {"assistant_model": make_student(num_memory_tokens=1, updater_type="mlp")},
    }
    expected = generated(student, prompt, max_new_tokens=12)
    outputs = generated(student, prompt, max_new_tokens=12, return_dict_in_generate=True, **drafts[helper])
    assert torch.equal(outputs.sequences, expected)
    layer = getattr(outputs, CACHE_NAME).layers[0]
    assert len(layer._history) <= 14  # of the last round, not of the whole text


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("extra", [{}, {"num_beams": 3}, {"prefill_chunk_size": 3}], ids=str)
def test_generate_padded(student, tokens, extra, side):
    """Padding on either side, also where the prompt is read in chunks: as every row alone."""
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "num_beams": extra.get("num_beams", 1)}
    padded = torch.zeros(2, 8, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, length in enumerate((8, 3)):
        place = slice(8 - length, 8) if side == "left" else slice(length)
        padded[row, place], mask[row, place] = tokens[row, :length], 1
    together = student.generate(padded, attention_mask=mask, **{**settings, **extra})
    for row, length in enumerate((8, 3)):
        alone = student.generate(tokens[row : row + 1, :length], **settings)
        assert torch.equal(together[row, 8:], alone[0, length:])


def test_generate_goes_on_from_a_returned_cache(student, tokens):
    settings = {"do_sample": False, "pad_token_id": 0, "suppress_tokens": [0]}  # or it would be read as padding
    whole = student.generate(tokens, max_new_tokens=8, **settings)
    first = student.generate(tokens, max_new_tokens=4, return_dict_in_generate=True, **settings)
    cache = getattr(first, CACHE_NAME)
    assert isinstance(cache, SMTRecurrentCache)
    rest = student.generate(first.sequences, **{CACHE_NAME: cache}, max_new_tokens=4, **settings)
    assert torch.equal(rest, whole)


def test_continue_several_ways_from_one_state(student, tokens):
    """Read a prompt once, repeat its state, go on; and rows chosen out of a batch."""
    cache = getattr(student(tokens[:1], use_cache=True), CACHE_NAME)
    cache.repeat(3)
    more = tokens[:, :4]
    whole = student(torch.cat([tokens[:1].expand(3, -1), more], 1)).logits[:, -4:]
    torch.testing.assert_close(student(more, past_key_values=cache.detach()).logits, whole)
    cache.select(torch.tensor([2, 0]))
    torch.testing.assert_close(student(more[[2, 0]], past_key_values=cache).logits, whole[[2, 0]])


def test_state_of_a_prompt_is_not_changed_by_a_copy(student, tokens):
    cache = getattr(student(tokens, use_cache=True), CACHE_NAME)
    before = cache.memory.clone()
    generated(student, tokens, **{CACHE_NAME: copy.deepcopy(cache)})
    assert torch.equal(cache.memory, before) and cache.get_seq_length() == 12


def test_no_state_on_the_module(student, tokens):
    """Two texts read in turns do not meet."""
    alone = student(tokens[:1]).logits
    generated(student, tokens[1:2])
    assert torch.equal(student(tokens[:1]).logits, alone)


def test_a_long_prompt_is_not_held(student):
    """With `logits_to_keep` the memories of what is not read out are not kept."""
    prompt = torch.randint(1, VOCAB, (1, 200))
    held: list[int] = []
    read = student.model.read
    student.model.read = lambda memories: (held.append(memories.shape[1]), read(memories))[1]
    update = SMTRecurrentCache().layers[0].__class__.update_memory
    seen: list[int] = []

    def spy(layer, memories, num_tokens=None):
        seen.append(memories.shape[1])
        update(layer, memories, num_tokens)

    cache = SMTRecurrentCache()
    cache.layers[0].update_memory = spy.__get__(cache.layers[0])
    with torch.no_grad():
        outputs = student(prompt, past_key_values=cache, logits_to_keep=1)
    del student.model.read
    assert held == seen == [1] and cache.get_seq_length() == 200
    torch.testing.assert_close(outputs.logits, student(prompt).logits[:, -1:])


def test_refused_caches(student, tokens):
    for name in ("static", "quantized", "offloaded_static", "paged"):
        with pytest.raises(ValueError, match="cache_implementation"):
            generated(student, tokens, cache_implementation=name)


def test_an_offloaded_cache_is_the_state(student, tokens):
    """There is nothing to offload between layers; scripts that ask for it work, as they do with Mamba."""
    expected = generated(student, tokens)
    for name in ("offloaded", "dynamic"):
        assert torch.equal(generated(student, tokens, cache_implementation=name), expected)


def test_early_exit_is_refused(student, tokens):
    with pytest.raises(ValueError, match=r"`assistant_early_exit` drafts with the first layers.*assistant_model"):
        generated(student, tokens[:1], assistant_early_exit=1)


def test_inputs_embeds(student, tokens):
    embeds = student.get_input_embeddings()(tokens)
    assert torch.equal(generated(student, None, inputs_embeds=embeds), generated(student, tokens)[:, 12:])


def test_foreign_caches(student, tokens):
    """An empty one is taken for none; one with keys and values is not."""
    expected = generated(student, tokens)
    assert torch.equal(generated(student, tokens, **{CACHE_NAME: DynamicCache()}), expected)
    filled = DynamicCache()
    filled.update(torch.zeros(3, 1, 2, 4), torch.zeros(3, 1, 2, 4), 0)
    with pytest.raises(ValueError, match="SMTRecurrentCache"):
        generated(student, tokens, **{CACHE_NAME: filled})


def test_state_algebra_against_reading_again(student, tokens):
    """Every change of a state's rows or length is that of the text it stands for."""

    def read(rows):
        cache = SMTRecurrentCache()
        cache.activate_past_recording()
        student(rows, past_key_values=cache)
        return cache

    def after(change):
        cache = read(tokens)
        change(cache)
        return cache.memory

    own = lambda rows: read(rows).memory  # noqa: E731
    order = torch.tensor([2, 0, 0])
    torch.testing.assert_close(after(lambda cache: cache.reorder(order)), own(tokens[order]))
    torch.testing.assert_close(after(lambda cache: cache.repeat(2)), own(tokens.repeat_interleave(2, 0)))
    torch.testing.assert_close(after(lambda cache: cache.select(torch.tensor([1]))), own(tokens[1:2]))
    torch.testing.assert_close(after(lambda cache: cache.crop(-4)), own(tokens[:, :8]))
    torch.testing.assert_close(copy.deepcopy(read(tokens)).memory, own(tokens))
    cache = read(tokens)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert cache.memory.device.type == "cpu"
    torch.testing.assert_close(
        student(tokens, past_key_values=cache).logits, student(tokens.repeat(1, 2)).logits[:, 12:]
    )
    cache.reset()
    assert cache.memory is None
    torch.testing.assert_close(student(tokens, past_key_values=cache).logits, student(tokens).logits)

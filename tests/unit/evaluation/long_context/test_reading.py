"""Reading in pieces, side by side and behind padding, against a plain pass over each prompt alone."""

import random

import pytest
import torch

from smt_hf.errors import InputError
from smt_hf.evaluation.long_context.manners import find_manner
from smt_hf.evaluation.long_context.reading import ALONE, EQUAL, PADDED, Manner, Reader
from tests.conftest import UPDATERS
from tests.language_models import (
    make_gpt2,
    make_llama,
    make_mamba,
    make_mamba2,
    make_ours,
    make_rwkv,
    plain_continuation,
    plain_logits,
)

CHUNK = 8
LENGTHS = [23, 17, 16, 30, 24, 9, 23]
MODELS = {
    **{f"ours, {name}": (lambda name=name: make_ours(updater_type=name), Manner()) for name in UPDATERS},
    "llama": (make_llama, Manner()),
    "gpt2": (make_gpt2, Manner()),
    "mamba": (make_mamba, Manner(carries_chunks=False, together=PADDED, masks_past=False)),
    "mamba2": (make_mamba2, Manner()),
    "rwkv": (make_rwkv, Manner(together=ALONE)),
}


@pytest.fixture(params=MODELS)
def known(request):
    """A model and the manner in which it is right."""
    make, manner = MODELS[request.param]
    return make(), manner


def prompts_of(lengths, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(258) for _ in range(length)] for length in lengths]


def test_the_manner_is_found(known):
    model, manner = known
    assert find_manner(model) == manner


def test_a_state_that_matters_little_is_missed_all_the_same():
    """In a Mamba of random weights, losing the state changes logits of about 1 by about 1e-4."""
    assert find_manner(make_mamba(scale=1)) == MODELS["mamba"][1]


def test_half_precision_is_tested_in_full(known):
    model, manner = known
    assert find_manner(model.to(torch.bfloat16)) == manner
    assert model.dtype == torch.bfloat16


def test_reading_equals_plain_passes(known):
    model, manner = known
    reader, prompts, answers = Reader(model, manner, CHUNK), prompts_of(LENGTHS), prompts_of([3, 12, 1, 9, 5, 4, 20], 1)
    batches = reader.batches(LENGTHS, 4)
    assert sorted(index for batch in batches for index in batch) == list(range(len(LENGTHS)))
    assert manner.together == ALONE or any(len({LENGTHS[index] for index in batch}) > 1 for batch in batches)
    for batch in batches:
        reading = reader.read([prompts[index] for index in batch])
        losses = reading.copy().losses([answers[index] for index in batch])
        written = reading.copy().write(6)
        for row, index in enumerate(batch):
            prompt, answer = prompts[index], answers[index]
            logs = plain_logits(model, prompt + answer).log_softmax(-1)[len(prompt) - 1 : -1]
            torch.testing.assert_close(reading.logits[row].log_softmax(-1), logs[0], atol=2e-4, rtol=1e-4)
            nats, hits = losses[row]
            targets = torch.tensor(answer)
            expected = -logs.gather(1, targets[:, None])[:, 0].double()
            torch.testing.assert_close(torch.from_numpy(nats), expected, atol=2e-4, rtol=1e-4)
            assert hits.tolist() == (logs.argmax(-1) == targets).tolist()
            assert written[row] == plain_continuation(model, prompt, 6)


def test_another_chunk_size_changes_nothing(known):
    model, manner = known
    prompts = prompts_of([40, 38])
    for batch in Reader(model, manner, 3).batches([40, 38], 2):
        some = [prompts[index] for index in batch]
        logits = [Reader(model, manner, size).read(some).logits for size in (3, 7, 64)]
        torch.testing.assert_close(logits[0], logits[1], atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(logits[0], logits[2], atol=2e-4, rtol=1e-4)


def test_no_forward_is_longer_than_a_chunk_and_no_logits_of_a_prompt_are_held(known):
    """So memory does not depend on the length of the prompt, but for what the model keeps of it."""
    model, manner = known
    forward, sizes = model.forward, []

    def watched(**inputs):
        outputs = forward(**inputs)
        sizes.append((inputs["input_ids"].shape[1], outputs.logits.shape[1]))
        return outputs

    reader = Reader(model, manner, CHUNK)
    model.forward = watched
    reading = reader.read(prompts_of([100]))
    assert sum(length for length, _ in sizes) == reader.num_tokens == 100
    assert max(sizes) == (CHUNK, 1)
    sizes.clear()
    reading.losses(prompts_of([50]))
    assert sum(length for length, _ in sizes) == 49 and max(length for length, _ in sizes) <= CHUNK


def test_the_state_of_a_student_does_not_grow():
    reader = Reader(make_ours(), Manner(), CHUNK)
    (short,), (long,) = (reader.read(prompts_of([length]))._state.values() for length in (10, 200))
    assert short.memory.shape == long.memory.shape and long.get_seq_length() == 200
    assert long.memory.untyped_storage().nbytes() == short.memory.untyped_storage().nbytes()


def test_the_state_is_weighed_as_it_is_kept(known):
    model, manner = known
    reader = Reader(model, manner, CHUNK)
    longest = []
    for length in (9, 40):
        reader.state_bytes = 0
        reader.read(prompts_of([length]))
        longest.append(reader.state_bytes)
    config = model.config
    if config.model_type in ("llama", "gpt2"):
        per_token = 2 * 4 * config.num_hidden_layers * config.hidden_size  # keys and values of as many heads
        assert longest == [per_token * 9, per_token * 40]
    else:
        assert longest[0] == longest[1] > 0
    if config.model_type == "smt_recurrent":
        numbers = config.num_memory_tokens * config.hidden_size
        assert 4 * numbers <= longest[0] <= 4 * numbers + 64  # and what the cache counts
    if manner.together == PADDED:  # side by side, a prompt keeps no more
        reader.read(prompts_of([40, 40, 40]))
        assert reader.state_bytes == longest[1]


def test_copies_go_separate_ways(known):
    model, manner = known
    reading = Reader(model, manner, CHUNK).read(prompts_of([20]))
    first = reading.copy().write(5)
    reading.copy().losses(prompts_of([9]))
    assert reading.copy().write(5) == first == reading.write(5)


def test_batches():
    def batches(manner, lengths, size):
        return Reader(make_llama(), manner, 4).batches(lengths, size)

    lengths = [9, 10, 7, 6, 10, 6]
    assert batches(Manner(together=PADDED), lengths, 3) == [[1, 4, 0], [2, 3, 5]]
    assert batches(Manner(together=PADDED), [10, 7, 6], 3) == [[0, 1], [2]]  # 4 of padding leave nothing of a chunk
    assert batches(Manner(together=EQUAL), lengths, 2) == [[1, 4], [0], [2], [3, 5]]
    assert batches(Manner(together=ALONE), [5, 5], 2) == [[0], [1]]


def test_prompts_that_do_not_go_together_are_refused():
    reader = Reader(make_llama(), Manner(together=EQUAL), 4)
    for lengths in ([5, 6], [0]):
        with pytest.raises(ValueError, match="side by side"):
            reader.read(prompts_of(lengths))


def test_writing_ends():
    model = make_llama()
    reader, prompts = Reader(model, Manner(), CHUNK), prompts_of([20, 20])
    rows = [plain_continuation(model, prompt, 6) for prompt in prompts]
    end = next(token for token in rows[0] if token not in rows[1])
    assert reader.read(prompts).write(6, {end}) == [rows[0][: rows[0].index(end)], rows[1]]
    assert reader.read(prompts).write(6, (), lambda written: len(written) == 2) == [row[:2] for row in rows]
    fed = []
    reading = reader.read(prompts)
    reading.feed = lambda ids: fed.append(ids)
    reading.write(1)
    assert fed == []  # what is written last need not be read


def test_a_model_without_a_state_is_refused():
    model = make_llama()
    forward = model.forward
    model.forward = lambda **inputs: forward(**{**inputs, "use_cache": False})
    with pytest.raises(InputError, match="LlamaForCausalLM hands on no state"):
        Reader(model, Manner(), CHUNK).read(prompts_of([20]))
    with pytest.raises(InputError, match="cannot be read piece by piece"):
        find_manner(model)

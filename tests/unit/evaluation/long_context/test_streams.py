"""Bits per byte of streams against plain passes over them."""

import math

import numpy as np
import pytest

from smt_hf.errors import InputError
from smt_hf.evaluation.long_context.manners import find_manner
from smt_hf.evaluation.long_context.reading import Reader
from smt_hf.evaluation.long_context.streams import contexts_of, cut_streams, measure_streams, num_passes
from tests.language_models import language_model, make_llama, make_mamba, make_ours, make_rwkv, plain_logits


def plain_bits(model, ids):
    """Of every token but the first."""
    logs = plain_logits(model, ids).log_softmax(-1)[:-1].numpy()
    return -logs[np.arange(len(ids) - 1), ids[1:]] / math.log(2)


@pytest.mark.parametrize("make", [make_ours, make_llama, make_mamba, make_rwkv])
def test_bits_are_those_of_plain_passes(make):
    model = make()
    length, scored = 101, 50
    streams = np.random.default_rng(0).integers(0, 256, (3, length + 1)).tolist()
    read = []
    found = measure_streams(
        language_model(model), Reader(model, find_manner(model), 16), streams, batch_size=2, advance=read.append
    )
    bits = np.stack([plain_bits(model, stream) for stream in streams])
    assert found["value"] == pytest.approx(bits.mean(), abs=1e-3) and found["n"] == 3
    edges = [0, 1, 2, 4, 8, 16, 32, 64, 101]
    assert [entry["position"] for entry in found["by_position"]] == edges[1:]
    for entry, begin, end in zip(found["by_position"], edges, edges[1:]):
        assert entry["value"] == pytest.approx(bits[:, begin:end].mean(), abs=1e-3)
    assert [entry["context"] for entry in found["by_context"]] == [16, 32, 52] == contexts_of(length)
    for entry in found["by_context"]:
        ends = [plain_bits(model, stream[-(entry["context"] + scored) :])[-scored:] for stream in streams]
        assert entry["value"] == pytest.approx(np.mean(ends), abs=1e-3)
    assert sum(read) == 3 * num_passes(length)


def test_streams_are_cut_one_after_the_other():
    loaded = language_model(make_ours())
    assert cut_streams(["abcde", "fgh"], loaded, 3, 9) == [[97, 98, 99, 100], [101, 256, 102, 103]]
    assert cut_streams(["abcde", "fgh"], loaded, 3, 1) == [[97, 98, 99, 100]]
    assert cut_streams(["ab"], loaded, 1, 9) == [[97, 98]]
    with pytest.raises(InputError, match="hold 9 tokens, and one stream needs 11"):
        cut_streams(["abcde", "fgh"], loaded, 10, 2)


def test_a_stream_beyond_the_positions_is_refused():
    model = make_llama(max_position_embeddings=64)
    with pytest.raises(InputError, match="64 positions"):
        measure_streams(language_model(model), Reader(model, find_manner(model), 16), [[1] * 65])


def test_short_streams_have_no_contexts():
    model = make_ours()
    found = measure_streams(language_model(model), Reader(model, find_manner(model), 16), [[1] * 9])
    assert "by_context" not in found and found["interval"] is None and num_passes(8) == 1
    assert [entry["position"] for entry in found["by_position"]] == [1, 2, 4, 8]


def test_bytes_are_counted_where_tokens_are_longer():
    model, loaded = make_ours(), language_model(make_ours())
    loaded.tokenizer.add_tokens(["ell"])
    stream = loaded.encoded("hello hello")
    assert len(stream) == 7
    stream = [min(token, 257) for token in stream]  # the model has no token 258

    class Longer:
        """Writes token 257 as three letters."""

        all_special_ids = ()

        def __len__(self):
            return 10

        def batch_decode(self, tokens, **kwargs):
            return ["".join("ell" if token == 257 else chr(token) for token in row) for row in tokens]

    longer = type(loaded)("tiny", model, Longer())
    found = measure_streams(longer, Reader(model, find_manner(model), 16), [stream])
    bits = plain_bits(model, stream)
    assert found["value"] == pytest.approx(bits.sum() / len("ello hello"), abs=1e-4)
    parts = [entry["value"] for entry in found["by_position"]]  # "ell", "o", " h", "ell" and "o"
    expected = [bits[0] / 3, bits[1], bits[2:4].sum() / 2, bits[4:].sum() / 4]
    assert parts == pytest.approx(expected, abs=1e-4)

"""Raster scans of digits and of small files in MNIST's format."""

import gzip
import struct
import sys

import numpy as np
import pytest

from smt_hf.data import load_pixels

TRAIN, HELDOUT = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"


def idx(images, magic=2051):
    return struct.pack(">4I", magic, *images.shape) + images.astype(np.uint8).tobytes()


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (5, 3, 4)), rng.integers(0, 256, (2, 3, 4))


@pytest.fixture
def folder(tmp_path, images):
    (tmp_path / TRAIN).write_bytes(idx(images[0]))
    (tmp_path / f"{HELDOUT}.gz").write_bytes(gzip.compress(idx(images[1])))
    return tmp_path


def test_digits():
    digits = pytest.importorskip("sklearn.datasets").load_digits().images
    train, heldout, facts = load_pixels()
    assert (facts.vocab_size, facts.height, facts.width) == (17, 8, 8)
    assert facts.uniform_bits == pytest.approx(np.log2(17))
    assert (len(train), len(heldout)) == (1617, 180)
    together = np.vstack([np.stack(rows[:]["input_ids"]) for rows in (train, heldout)])
    assert sorted(together.tolist()) == sorted(digits.reshape(-1, 64).astype(int).tolist())
    assert (train[0]["labels"] == train[0]["input_ids"]).all()
    again = load_pixels()[1]
    assert all((a["input_ids"] == b["input_ids"]).all() for a, b in zip(heldout, again))


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"pip install smt_hf\[test\]"):
        load_pixels()


def test_mnist(folder, images):
    train, heldout, facts = load_pixels(str(folder))
    assert (facts.vocab_size, facts.height, facts.width, facts.uniform_bits) == (16, 3, 4, 4.0)
    for rows, expected in zip((train, heldout), images):
        assert rows.format["type"] == "numpy" and rows.features["input_ids"].feature.dtype == "int32"
        assert len(rows) == len(expected)
        for row, image in zip(rows, expected):
            assert row["input_ids"].tolist() == row["labels"].tolist() == [level // 16 for level in image.flat]


def test_missing_file(folder):
    (folder / TRAIN).unlink()
    with pytest.raises(ValueError, match=rf"neither {TRAIN} nor {TRAIN}\.gz"):
        load_pixels(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda content: content[:10], "truncated, 10 bytes"),
        (lambda content: content[:-1], "is truncated: 5 images of 3 x 4 pixels make 76 bytes, not 75"),
        (lambda content: content + b"0", "bytes after"),
        (lambda content: struct.pack(">I", 2049) + content[4:], "magic number is 2049, not 2051"),
        (lambda content: idx(np.zeros((0, 3, 4))), "holds 0 images"),
        (lambda content: idx(np.zeros((5, 4, 3))), "differ in size"),
    ],
)
def test_malformed_file(folder, change, message):
    path = folder / TRAIN
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        load_pixels(folder)


@pytest.mark.parametrize("change", [lambda packed: packed[:-12], lambda packed: b"not packed at all"])
def test_broken_gzip(folder, change):
    path = folder / f"{HELDOUT}.gz"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match="cannot be unpacked"):
        load_pixels(folder)

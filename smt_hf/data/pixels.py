"""Pictures of digits as rows of tokens: the raster scan of an image, one token per pixel."""

import gzip
import math
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset

from smt_hf.errors import InputError

from .tasks import labelled_rows

_IMAGES_MAGIC = 2051  # unsigned bytes in three dimensions


@dataclass(frozen=True)
class PixelFacts:
    """What is known of the images."""

    vocab_size: int  # grey levels
    height: int  # in pixels; rows have height * width tokens, one line of pixels after the other
    width: int
    uniform_bits: float  # bits per pixel of a uniform guess over all levels


def load_pixels(mnist_dir: str | os.PathLike | None = None) -> tuple[Dataset, Dataset, PixelFacts]:
    """Images for training, held-out images and facts about them.

    Rows are raster scans of `height * width` tokens. They have no start token: the first pixel is predicted from the
    memory of the empty prefix. `labels` equal `input_ids`.

    Args:
        mnist_dir: folder with MNIST's `train-images-idx3-ubyte` and `t10k-images-idx3-ubyte`, each as such or with
            `.gz`. The 256 levels become 16, and the test images are held out. The default is scikit-learn's digits, 8 x
            8 pixels in 17 levels, of which a fixed tenth is held out.

    Raises:
        InputError: scikit-learn or a file is missing, or a file is not what its name says.
    """
    if mnist_dir is None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise InputError(
                "the digits come with scikit-learn, which is not installed: `pip install smt_hf[test]`, or name a "
                "folder with MNIST as `mnist_dir`."
            ) from error
        images, levels = load_digits().images.astype(np.int64), 17
        order = np.random.default_rng([zlib.crc32(b"digits")]).permutation(len(images))
        heldout, train = np.split(images[order], [round(len(images) / 10)])
    else:
        train, heldout = (_idx_images(Path(mnist_dir), f"{part}-images-idx3-ubyte") for part in ("train", "t10k"))
        if train.shape[1:] != heldout.shape[1:]:
            raise InputError(
                f"the images of {mnist_dir} differ in size, {train.shape[1:]} for training and {heldout.shape[1:]} "
                "held out: put both files of one dataset there."
            )
        levels = 16
        train, heldout = train // (256 // levels), heldout // (256 // levels)
    facts = PixelFacts(levels, train.shape[1], train.shape[2], math.log2(levels))
    train, heldout = (images.reshape(len(images), -1) for images in (train, heldout))
    return labelled_rows(train, train), labelled_rows(heldout, heldout), facts


def _idx_images(folder: Path, name: str) -> np.ndarray:
    """`(number, height, width)` levels of 0..255."""
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise InputError(f"there is neither {name} nor {name}.gz in {folder}: put one there, as MNIST comes.")
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path} cannot be unpacked, {error}: download it again.") from error
    if len(content) < 16:
        raise InputError(f"{path} is truncated, {len(content)} bytes where its head alone has 16: download it again.")
    magic, number, height, width = struct.unpack(">4I", content[:16])
    if magic != _IMAGES_MAGIC:
        raise InputError(
            f"{path} does not hold images: its magic number is {magic}, not {_IMAGES_MAGIC}. Put the file there that "
            "MNIST has under this name."
        )
    if not number * height * width:
        raise InputError(f"{path} holds {number} images of {height} x {width} pixels: bring one that has pixels.")
    expected = 16 + number * height * width
    if len(content) != expected:
        problem = "is truncated" if len(content) < expected else "has bytes after its last image"
        raise InputError(
            f"{path} {problem}: {number} images of {height} x {width} pixels make {expected} bytes, not "
            f"{len(content)}. Download it again."
        )
    return np.frombuffer(content, dtype=np.uint8, offset=16).reshape(number, height, width)

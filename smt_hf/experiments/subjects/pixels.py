"""Images as rows of pixels: the embedded digits, or MNIST from a folder."""

import hashlib
import math
from typing import Any

import numpy as np
import torch

from smt_hf.data import load_pixels, number_tokenizer
from smt_hf.errors import InputError
from smt_hf.evaluation import Scores
from smt_hf.training.arguments import PhaseArguments

from .subject import Subject, refuse_curriculum, row_length

_EVAL_ROWS = 128


class PixelSubject(Subject):
    """Images, pixel by pixel.

    Args:
        mnist_dir: folder with MNIST's files; default: scikit-learn's digits.
        num_heldout: images to score at most.
    """

    metric = "bits_per_pixel"
    name = "pixels"

    def __init__(self, mnist_dir: str | None = None, num_heldout: int = 1000):
        if num_heldout < 1:
            raise InputError(f"`num_heldout` must be at least 1, got {num_heldout}.")
        self.train, heldout, self.pixels = load_pixels(mnist_dir)
        self.vocab_size, self.chance = self.pixels.vocab_size, self.pixels.uniform_bits
        self.tokenizer = number_tokenizer(self.vocab_size)
        self.difficulty = self.pixels.height * self.pixels.width
        chosen = heldout.select(range(min(num_heldout, len(heldout))))
        pixels = np.stack(chosen["input_ids"][:]).astype(np.int64)
        self.heldout = pixels, pixels  # the first pixel is predicted, too, from the memory of nothing
        self.eval_rows = heldout.select(range(min(_EVAL_ROWS, len(heldout))))
        self.digest = hashlib.sha256(np.stack(self.train["input_ids"][:]).tobytes()).hexdigest()[:16]

    def required(self, arguments: PhaseArguments) -> dict[str, Any]:
        refuse_curriculum(arguments)
        return {**row_length(arguments, self.difficulty - 1), "curriculum_threshold": None}

    def rows(self, arguments: PhaseArguments):
        return self.train

    def described_scores(self, scores: Scores) -> dict[str, Any]:
        return {**super().described_scores(scores), "bits_per_pixel": scores.loss / math.log(2)}

    def facts(self) -> dict:
        name = "digits" if self.pixels.height == 8 else "MNIST"
        return {
            "name": name,
            "hash": f"{name}-{len(self.train)}" if self.pixels.height == 8 else self.digest,
            "training_tokens": len(self.train) * self.difficulty,
            **super().facts(),
        }

    def describe(self) -> str:
        facts = self.facts()
        return (
            f"{facts['name']}: {len(self.train):,} images of {self.pixels.height} x {self.pixels.width} pixels in "
            f"{self.vocab_size} levels, {facts['heldout_streams']} held out"
        )

    @torch.inference_mode()
    def samples(self, student, num: int = 8, seed: int = 0) -> list[list[list[int]]]:
        """Images drawn pixel by pixel from the student's own distribution, from `m_0`: `num` lists of rows."""
        generator = torch.Generator().manual_seed(seed)
        memory = student.model.start_memory().expand(num, -1, -1)
        drawn: list[torch.Tensor] = []
        for _ in range(self.difficulty):
            weights = student.read_logits(memory).softmax(-1).cpu()
            drawn.append(torch.multinomial(weights, 1, generator=generator)[:, 0].to(memory.device))
            memory = student.model.updater(memory, student.model.embed(drawn[-1]))
        images = torch.stack(drawn, dim=1).view(num, self.pixels.height, self.pixels.width)
        return images.tolist()

"""Whole runs: data, phases, evaluation and export put together."""

from .pretraining import PretrainArguments, pretrain

__all__ = ["PretrainArguments", "pretrain"]

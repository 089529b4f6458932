"""Whole runs: data, phases, evaluation and export put together."""

from .finetuning import FinetuneArguments, FinetuneTrainingArguments, finetune
from .pretraining import PretrainArguments, pretrain

__all__ = ["FinetuneArguments", "FinetuneTrainingArguments", "PretrainArguments", "finetune", "pretrain"]

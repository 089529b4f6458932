"""Whole runs: data, phases, evaluation and export put together."""

from .continuation import GenerateArguments, continue_text
from .finetuning import FinetuneArguments, FinetuneTrainingArguments, finetune
from .pretraining import PretrainArguments, pretrain

__all__ = [
    "FinetuneArguments",
    "FinetuneTrainingArguments",
    "GenerateArguments",
    "PretrainArguments",
    "continue_text",
    "finetune",
    "pretrain",
]

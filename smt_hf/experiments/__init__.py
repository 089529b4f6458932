"""Whole runs: data, phases, evaluation and export put together."""

from .continuation import GenerateArguments, continue_text
from .finetuning import FinetuneArguments, FinetuneTrainingArguments, finetune
from .pretraining import pretrain
from .run_arguments import PretrainArguments, parse_run

__all__ = [
    "FinetuneArguments",
    "FinetuneTrainingArguments",
    "GenerateArguments",
    "PretrainArguments",
    "continue_text",
    "parse_run",
    "finetune",
    "pretrain",
]

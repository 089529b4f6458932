"""The rollout, the loss terms, the composite that is trained, and the Trainer of each phase."""

from .arguments import BPTTTrainingArguments, DMTTrainingArguments, SMTTrainingArguments
from .composite import SMTForPreTraining, SMTPreTrainingConfig
from .objective import Objective
from .rollout import rollout
from .trainers import BPTTTrainer, DMTTrainer, SMTTrainer

__all__ = [
    "BPTTTrainer",
    "BPTTTrainingArguments",
    "DMTTrainer",
    "DMTTrainingArguments",
    "Objective",
    "SMTForPreTraining",
    "SMTPreTrainingConfig",
    "SMTTrainer",
    "SMTTrainingArguments",
    "rollout",
]

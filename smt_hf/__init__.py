"""Pretraining of nonlinear recurrent language models with credit assignment taken out of time."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .student import (
    SMTRecurrentCache,
    SMTRecurrentConfig,
    SMTRecurrentForCausalLM,
    SMTRecurrentForSequenceClassification,
    SMTRecurrentModel,
    SMTRecurrentStep,
)
from .teachers import SMTTeacherConfig, SMTTeacherEncoder
from .training import (
    BPTTTrainer,
    BPTTTrainingArguments,
    DMTTrainer,
    DMTTrainingArguments,
    SMTForPreTraining,
    SMTTrainer,
    SMTTrainingArguments,
)

__version__ = "0.1.0"

AutoConfig.register(SMTRecurrentConfig.model_type, SMTRecurrentConfig, exist_ok=True)
AutoModel.register(SMTRecurrentConfig, SMTRecurrentModel, exist_ok=True)
AutoModelForCausalLM.register(SMTRecurrentConfig, SMTRecurrentForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(SMTRecurrentConfig, SMTRecurrentForSequenceClassification, exist_ok=True)

__all__ = [
    "BPTTTrainer",
    "BPTTTrainingArguments",
    "DMTTrainer",
    "DMTTrainingArguments",
    "SMTForPreTraining",
    "SMTRecurrentCache",
    "SMTRecurrentConfig",
    "SMTRecurrentForCausalLM",
    "SMTRecurrentForSequenceClassification",
    "SMTRecurrentModel",
    "SMTRecurrentStep",
    "SMTTeacherConfig",
    "SMTTeacherEncoder",
    "SMTTrainer",
    "SMTTrainingArguments",
    "__version__",
]

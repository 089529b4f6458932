"""The recurrent model. The sibling files travel inside every checkpoint as its custom code."""

from .cache_smt_recurrent import SMTRecurrentCache
from .configuration_smt_recurrent import SMTRecurrentConfig
from .modeling_smt_recurrent import (
    SMTRecurrentForCausalLM,
    SMTRecurrentForSequenceClassification,
    SMTRecurrentModel,
    SMTRecurrentStep,
)

__all__ = [
    "SMTRecurrentCache",
    "SMTRecurrentConfig",
    "SMTRecurrentForCausalLM",
    "SMTRecurrentForSequenceClassification",
    "SMTRecurrentModel",
    "SMTRecurrentStep",
]

"""LoRA on the student (Hu et al. 2021, by PEFT), for a cheap second phase or a cheap fine-tuning."""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from smt_hf.errors import InputError
from smt_hf.student import SMTRecurrentForCausalLM

if TYPE_CHECKING:
    from peft import PeftModel

# Every linear layer but the head, whatever the `updater_type`: those of the updater and of the readout.
LORA_TARGET_MODULES = "all-linear"
LORA_PARTS = ("updater", "readout")


@dataclass(frozen=True)
class LoraSettings:
    """Sizes of the LoRA layers, and the parts of the student that get them.

    Raises:
        InputError: a value is out of range, or a part is unknown.
    """

    rank: int = 8  # of the change of a weight, which is the product of two factors
    alpha: int = 16  # the change is scaled by `alpha / rank`
    dropout: float = 0.0  # probability of dropout on the input of the change
    parts: tuple[str, ...] = LORA_PARTS

    def __post_init__(self):
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise InputError(
                f"LoRA needs a rank of at least 1, an alpha above 0 and a dropout in [0, 1), got {self.rank}, "
                f"{self.alpha} and {self.dropout}."
            )
        if not self.parts or set(self.parts) - set(LORA_PARTS):
            raise InputError(f"LoRA layers go into {' and '.join(LORA_PARTS)}, got {', '.join(self.parts) or 'none'}.")


def add_lora(student: SMTRecurrentForCausalLM, settings: LoraSettings | None = None) -> "PeftModel":
    """Put LoRA layers into `student`, in place, and freeze all other parameters.

    Returns:
        PEFT's view of the same student: `save_pretrained` writes the adapter alone, `merge_and_unload` adds its change
        to the weights and removes the layers.
    """
    from peft import LoraConfig, get_peft_model  # slow to import, and few runs need it

    settings = settings or LoraSettings()
    targets: str | list[str] = LORA_TARGET_MODULES
    if set(settings.parts) != set(LORA_PARTS):
        places = [f"model.{part}." for part in settings.parts]
        targets = [
            name
            for name, module in student.named_modules()
            if isinstance(module, nn.Linear) and name.startswith(tuple(places))
        ]
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(student, config)


def has_lora(student: nn.Module) -> bool:
    """Whether LoRA layers are in the student."""
    return any("lora_" in name for name, _ in student.named_parameters())


def merged_copy(student: SMTRecurrentForCausalLM) -> SMTRecurrentForCausalLM:
    """A copy of a student that has LoRA layers: their change is added to its weights and the layers are removed."""
    merged = copy.deepcopy(student)
    for parent in list(merged.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "merge") and hasattr(child, "get_base_layer"):
                child.merge()
                setattr(parent, name, child.get_base_layer())
    merged._hf_peft_config_loaded = False
    return merged

"""What the models of this package share: how their weights begin, are saved, and are found."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .configuration_smt_recurrent import SMTRecurrentConfig, share_weights
from .fast_weight_smt_recurrent import SMTRecurrentFastWeightCell
from .layers_smt_recurrent import SMTRecurrentReadout, SMTRecurrentTransition
from .recurrence_smt_recurrent import SMTRecurrentStretch
from .updaters_smt_recurrent import UPDATERS


class SMTRecurrentPreTrainedModel(PreTrainedModel):
    config_class = SMTRecurrentConfig
    config: SMTRecurrentConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = [*(updater.__name__ for updater in UPDATERS.values()), "SMTRecurrentReadout"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    # The state cannot be exchanged between the ranks of a split sequence.
    _supports_context_parallel = False

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            fan_in = module.in_features / self.config.hidden_size
            init.normal_(module.weight, std=self.config.initializer_range * fan_in**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.16)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, SMTRecurrentTransition | SMTRecurrentFastWeightCell):
            module.init_own_weights()
        elif isinstance(module, SMTRecurrentReadout):
            init.normal_(module.slot_embeddings, std=0.5)

    @classmethod
    def from_pretrained(cls, *args, key_mapping: dict[str, str] | None = None, **kwargs):
        """As in transformers; weights that an earlier release has written under other names are found."""
        renamed: dict[str, str] = {}
        for updater in UPDATERS.values():
            renamed |= updater.renamed_weights
        return super().from_pretrained(*args, key_mapping=renamed | (key_mapping or {}), **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers, with two additions.

        `auto_map` names all Auto classes: any of them loads the checkpoint by `trust_remote_code=True` where `smt_hf`
        is not installed. The weights are as readable as `config.json`; safetensors writes them for their owner alone.
        """
        self.config.auto_map = {
            "AutoConfig": "configuration_smt_recurrent.SMTRecurrentConfig",
            "AutoModel": "modeling_smt_recurrent.SMTRecurrentModel",
            "AutoModelForCausalLM": "modeling_smt_recurrent.SMTRecurrentForCausalLM",
            "AutoModelForSequenceClassification": "modeling_smt_recurrent.SMTRecurrentForSequenceClassification",
        }
        super().save_pretrained(save_directory, *args, **kwargs)
        share_weights(save_directory)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, every_n_layers=1, **kwargs):
        """As in transformers, with stretches of `CHECKPOINT_EVERY` tokens in the place of layers: every
        `every_n_layers`-th is checkpointed."""
        super().activation_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, **kwargs)
        for module in self.modules():
            if isinstance(module, SMTRecurrentStretch):
                module.every_n = every_n_layers

"""Muon for the matrices, AdamW for the rest, as one optimiser that a Trainer steps, saves and resumes."""

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` (Jordan et al. 2024) on weight matrices, `torch.optim.AdamW` on everything else.

    The orthogonalised update is scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982), so that one learning
    rate serves both.

    Args:
        matrices: 2-D weights.
        others: parameter groups with a `weight_decay` of their own.
        lr, betas, eps, weight_decay: those of AdamW; `lr` and `weight_decay` are Muon's too.
    """

    def __init__(self, matrices, others, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        super().__init__([{"params": matrices, "weight_decay": weight_decay}, *others], {"lr": lr})
        # Both work on this optimiser's groups and state, which are the ones that are scheduled and saved.
        muon = torch.optim.Muon(self.param_groups[:1], lr=lr, adjust_lr_fn="match_rms_adamw")
        self._parts: list[torch.optim.Optimizer] = [muon]
        if others:  # LoRA trains matrices alone
            self._parts.append(torch.optim.AdamW(self.param_groups[1:], lr=lr, betas=betas, eps=eps, fused=True))

    @torch.no_grad()
    def step(self, closure=None):
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Loading a state puts new groups and a new state in place of the old ones.
        for part, groups in zip(self._parts, (self.param_groups[:1], self.param_groups[1:])):
            part.param_groups, part.state = groups, self.state
            part.step()
        return loss


def muon_with_adamw(model: nn.Module, decayed: list[str], arguments) -> MuonWithAdamW:
    """The optimiser of `model`: Muon for the weights of linear layers, but for those that read tokens out.

    Args:
        decayed: names of parameters with weight decay.
        arguments: `TrainingArguments` with the rates.
    """
    heads = {f"{name}.weight" for name, _ in model.named_modules() if name.endswith("lm_head")}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = {name for name in decayed if name in trained and trained[name].ndim == 2 and name not in heads}
    others = [
        {
            "params": [trained[name] for name in trained if name not in matrices and (name in decayed) == is_decayed],
            "weight_decay": arguments.weight_decay if is_decayed else 0.0,
        }
        for is_decayed in (True, False)
    ]
    return MuonWithAdamW(
        [trained[name] for name in trained if name in matrices],
        [group for group in others if group["params"]],
        arguments.learning_rate,
        (arguments.adam_beta1, arguments.adam_beta2),
        arguments.adam_epsilon,
        arguments.weight_decay,
    )

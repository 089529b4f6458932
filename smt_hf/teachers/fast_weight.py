"""The teacher that a student can follow: the linear recurrence of the fast-weight updater, computed for a whole row.

Its memories are those that the student reaches with `control_proj` at zero, as at birth: the error of the student's
dynamics is then 0. What the student has to learn is the nonlinear correction alone.

To be plain about the gradient: the scan is an exact gradient through time, over the whole row, of a linear recurrence
whose coefficients depend on the tokens. No gradient through time of the nonlinear student is taken here.

Shapes: B sequences, T tokens, S supervised positions, K memory tokens, D width. A *position* is a number of tokens
read, 0 .. T.
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init

from smt_hf.errors import InputError
from smt_hf.student.fast_weight_smt_recurrent import FastWeightSizes, SMTRecurrentFastWeightCell
from smt_hf.student.recurrence_smt_recurrent import document_starts

from .protocol import SMTTeacher, SMTTeacherSizes, register_teacher, without_padding


@strict
class SMTFastWeightTeacherConfig(SMTTeacherSizes):
    """Configuration of [`SMTFastWeightTeacher`]: all of it follows from the student's, whose fields it repeats.

    Args:
        vocab_size, num_memory_tokens, hidden_size, intermediate_size, num_hidden_layers, num_matrix_heads,
        matrix_key_size, rms_norm_eps: as in `SMTRecurrentConfig`.
        memory_size: `hidden_size`.

    Raises:
        InputError: a size is out of range.
    """

    model_type = "smt_fast_weight_teacher"

    hidden_size: int = 64
    num_matrix_heads: int = 1
    matrix_key_size: int | None = None

    follows_student = SMTTeacherSizes.follows_student | {
        name: name
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_matrix_heads",
            "matrix_key_size",
            "rms_norm_eps",
            "num_attention_heads",
            "hidden_act",
            "rope_theta",
            "initializer_range",
        )
    }
    updater_type = "fast_weight"

    def validate_sizes(self):
        """Part of `validate()`: refuses sizes that no teacher can be built from."""
        super().validate_sizes()
        try:
            FastWeightSizes.of(self)
        except ValueError as error:
            raise InputError(str(error)) from None


@register_teacher
class SMTFastWeightTeacher(SMTTeacher):
    """The memories of all prefixes by one scan over the row [the role of the encoder in Sec. 3.1]."""

    config_class = SMTFastWeightTeacherConfig
    config: SMTFastWeightTeacherConfig
    _no_split_modules = ["SMTRecurrentFastWeightCell"]
    has_next_token_head = False
    # The readout of its memories trains it: the future beyond the next token adds nothing where gradients already reach
    # back over the whole row.
    smt_defaults = {
        "teacher_weight": 0.0,
        "teacher_readout_weight": 1.0,
        "predictive_weight": 0.0,
        "uniformity_weight": 0.0,
    }
    labels_all_positions = True
    can_read_only = True

    def __init__(self, config: SMTFastWeightTeacherConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.cell = SMTRecurrentFastWeightCell(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.16)  # as the student's
        elif isinstance(module, SMTRecurrentFastWeightCell):
            module.init_own_weights()

    @torch.no_grad()
    def hand_over(self, student) -> None:
        """Embeddings and recurrence of the student become this teacher's, its correction zero."""
        updater = student.model.updater
        updater.cell.load_state_dict(self.cell.state_dict())
        updater.control_proj.weight.zero_()
        student.model.embed_tokens.weight.copy_(self.embed_tokens.weight)

    def forward(
        self,
        input_ids,
        positions,
        initial_memory,
        attention_mask=None,
        document_ids=None,
        return_logits=False,
        reads_only=False,
    ) -> Any:
        """As [`SMTTeacher.forward`], with the student's normalisation: of the last token and of what was read alone.

        `reads_only`: of every memory the last token alone, `(B, S, 1, D)`, which is all that the readout sees.
        """
        if return_logits:
            return super().forward(input_ids, positions, initial_memory, return_logits=True)  # refused
        batch, length = input_ids.shape
        positions = positions.expand(batch, -1) if positions.dim() == 1 else positions
        if attention_mask is not None:
            input_ids, positions, document_ids = without_padding(input_ids, positions, attention_mask, document_ids)
        if not length:
            return initial_memory.expand(*positions.shape, -1, -1)
        resets = None if document_ids is None else document_starts(document_ids)
        parts = self.cell.scan(self.embed_tokens(input_ids), initial_memory[0], resets, reads_only)
        memories = torch.cat([part.flatten(2).to(initial_memory.dtype) for part in parts], dim=-1)
        start = initial_memory[-1:] if reads_only else initial_memory
        memories = torch.cat([start.flatten().expand(batch, 1, -1), memories], dim=1)
        chosen = memories.gather(1, positions[..., None].expand(-1, -1, memories.shape[-1]))
        return chosen.unflatten(-1, start.shape)


__all__ = ["SMTFastWeightTeacher", "SMTFastWeightTeacherConfig"]

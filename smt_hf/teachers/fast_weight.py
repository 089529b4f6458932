"""The teacher that a student can follow: the fast-weight updater without feedback, computed for a whole row.

Its memories are those that the student reaches with `control_proj` at zero, as at birth: the error of the student's
dynamics is then 0. What the student has more is the feedback from what was read.

To be plain about the gradient: without feedback the memory is three recurrences, one after the other, each linear in
itself. The coefficients of the running means are computed from the tokens, those of the pointers from the tokens and
the means, those of the matrix from all of these. The scans give their exact gradient through time, over the whole row.
No gradient through time of the student with its feedback is taken here.

Shapes: B sequences, T tokens, S supervised positions, K memory tokens, D width, H heads, P value width, Q key width,
R traces, C tokens of a block. A *position* is a number of tokens read, 0 .. T. The scan in blocks: arXiv:2406.06484.
"""

from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init

from smt_hf.errors import InputError
from smt_hf.student.fast_weight_smt_recurrent import FastWeightSizes, SMTRecurrentFastWeightCell
from smt_hf.student.layers_smt_recurrent import init_projection, projection
from smt_hf.student.recurrence_smt_recurrent import document_starts, state_dtype

from .protocol import SMTTeacher, SMTTeacherSizes, register_teacher, without_padding

# Tokens that a block of the scan holds: its cost per token grows with them, the number of sequential steps falls.
BLOCK = 32


def gated_sums(kept: torch.Tensor, added: torch.Tensor, start: torch.Tensor | None = None) -> torch.Tensor:
    """`s_t = kept_t s_{t-1} + added_t` from `s_0 = start`, element by element: `(B, T, R)` twice -> `(B, T, R)`.

    By doubling: about log2(T) passes over the row. `start`: `(B, R)`, or `None` for zero.
    """
    length, reach = added.shape[1], 1
    if start is not None:
        added = torch.cat([added[:, :1] + (kept[:, 0] * start)[:, None], added[:, 1:]], dim=1)
    while reach < length:
        added = added + kept * F.pad(added[:, :-reach], (0, 0, reach, 0))
        if 2 * reach < length:
            kept = kept * F.pad(kept[:, :-reach], (0, 0, reach, 0))
        reach *= 2
    return added


class ScannedMatrices:
    """The matrices `S_t = a_t S_{t-1} + b_t (v_t - a_t S_{t-1} k_t) k_t^T` of a row from `S_0`, block by block.

    Inside a block everything is matrix products and one triangular system. Only the T / C blocks follow one another,
    so that cost and memory are linear in T.

    Args:
        keys, values: `(B, H, T, Q)`, `(B, H, T, P)`: k and v.
        strengths, log_kept: `(B, H, T)`: b and the logarithm of a.
        resets: `(B, T)` bool, true where the matrix before a token is zero (another document), or `None`.
        start: `(B, H, P, Q)`: S_0, or `None` for zero.
        block: C.

    Attributes:
        last: `(B, H, P, Q)`: S_T.
    """

    def __init__(self, keys, values, strengths, log_kept, resets=None, start=None, block: int = BLOCK):
        self.length, value_size, key_size = keys.shape[2], values.shape[-1], keys.shape[-1]
        self.block = min(block, self.length)
        keys, values = self._blocks(keys), self._blocks(values)
        strengths, sums = self._blocks(strengths[..., None]), self._blocks(log_kept[..., None])[..., 0].cumsum(-1)
        # What is left at token t of what was there after token i, and of what was there before the block.
        left = (sums[..., :, None] - sums[..., None, :]).tril().exp().tril()
        left_of_start = sums.exp()[..., None]
        if resets is not None:
            documents = self._blocks(resets[:, None, :, None].long())[..., 0].cumsum(-1)
            left = left * (documents[..., :, None] == documents[..., None, :])
            left_of_start = left_of_start * (documents == 0)[..., None]
        # The written u_t = b_t (v_t - sum_{i < t} left_ti (k_i . k_t) u_i - left_of_start_t S_start k_t).
        overlaps = strengths * left * (keys @ keys.transpose(-1, -2))
        wanted = torch.cat([strengths * values, strengths * left_of_start * keys], dim=-1)
        # Of `overlaps` what lies below the diagonal is read; the diagonal is taken to be 1.
        solved = torch.linalg.solve_triangular(overlaps, wanted, upper=False, unitriangular=True)
        own, of_start = solved.split([value_size, key_size], dim=-1)
        last_keys = left[..., -1, :, None] * keys
        matrix = keys.new_zeros(*keys.shape[:2], value_size, key_size) if start is None else start
        starts, written = [], []
        for index in range(keys.shape[2]):
            starts.append(matrix)
            written.append(own[:, :, index] - of_start[:, :, index] @ matrix.transpose(-1, -2))
            matrix = matrix * left_of_start[:, :, index, -1:] + written[-1].transpose(-1, -2) @ last_keys[:, :, index]
        self.last = matrix  # what pads the last block writes nothing and keeps everything
        self.keys, self.left, self.left_of_start = keys, left, left_of_start
        self.starts, self.written = torch.stack(starts, dim=2), torch.stack(written, dim=2)

    def _blocks(self, tensor: torch.Tensor) -> torch.Tensor:
        """`(B, H, T, X)` -> `(B, H, T / C, C, X)`, zeros at the end."""
        padding = -self.length % self.block
        return F.pad(tensor, (0, 0, 0, padding)).unflatten(2, (-1, self.block))

    def answers(self, queries: torch.Tensor) -> torch.Tensor:
        """`S_t q_t`: `(B, H, T, Q)` -> `(B, H, T, P)`. No matrix but those between blocks is computed."""
        queries = self._blocks(queries)
        answers = (self.left * (queries @ self.keys.transpose(-1, -2))) @ self.written
        answers = answers + (self.left_of_start * queries) @ self.starts.transpose(-1, -2)
        return answers.flatten(2, 3)[:, :, : self.length]

    def matrices(self) -> torch.Tensor:
        """`S_t` for all t, `(B, H, T, P, Q)`."""
        products = (self.written[..., None] * self.keys[..., None, :]).flatten(-2)
        matrices = self.left @ products + self.left_of_start * self.starts.flatten(-2)[..., None, :]
        return matrices.flatten(2, 3)[:, :, : self.length].unflatten(-1, self.starts.shape[-2:])


class SMTFastWeightScan(SMTRecurrentFastWeightCell):
    """The cell over whole rows, without control."""

    def forward(self, tokens, start, resets=None, reads_only: bool = False) -> tuple[list[torch.Tensor], torch.Tensor]:
        """All memories of rows.

        Args:
            tokens: `(B, T, D)`, embedded.
            start: `(B, K, D)`, the memory to go on from.
            resets: `(B, T)` bool, true at the first token of another document, which is read from the empty memory with
                the last token of `start`; `None`: one document per row.
            reads_only: return the last of the four alone, and compute no other matrices than those between blocks.

        Returns:
            Last tokens `(B, T, D)`, traces `(B, T, R)`, matrices `(B, T, H, P, Q)`, what was read `(B, T, D)`; and the
            last memory, `(B, K, D)`.
        """
        heads, values, keys, num_traces = self.sizes
        dtype = state_dtype(start.dtype)
        parts = [self.width, heads, num_traces - heads, heads * values * keys, self.width]
        first, pointers, means, matrix, _ = start.flatten(1).to(dtype).split(parts, dim=-1)
        tokens, first = self.normed(tokens), first[:, None].to(tokens.dtype)
        before = torch.cat([first, tokens[:, :-1]], dim=1)
        if resets is not None:
            before = torch.where(resets[..., None], first, before)
        pair = torch.cat([before, tokens], dim=-1)

        def summed(kept, added, start):
            return gated_sums(kept if resets is None else kept.masked_fill(resets[..., None], 0.0), added, start)

        means = summed(*self.mean_inputs(self.mean_proj(pair).to(dtype)), means)
        features = self.features(pair, means)
        pointers = summed(*self.pointer_inputs(self.pointer_proj(features).to(dtype)), pointers)
        angles = self.angles(pointers)
        written_at, written, strengths, log_kept = self.write_inputs(self.matrix_proj(features), angles)

        def in_full_precision():  # the matrices are of the memory's precision, whatever autocast says
            return torch.autocast(tokens.device.type, enabled=False)

        with in_full_precision():
            scanned = ScannedMatrices(
                written_at.transpose(1, 2),
                written.transpose(1, 2),
                strengths.transpose(1, 2),
                log_kept.transpose(1, 2),
                resets,
                matrix.unflatten(-1, (heads, values, keys)),
            )

        def answer(queries):
            with in_full_precision():
                return scanned.answers(queries.transpose(1, 2)).transpose(1, 2)

        read = self.read(features, angles, answer)
        traces = torch.cat([pointers, means], dim=-1)
        ends = [tokens[:, -1], traces[:, -1], scanned.last.flatten(1), read[:, -1]]
        last = torch.cat([part.to(dtype) for part in ends], dim=-1).view(start.shape)
        if reads_only:
            return [read], last
        with in_full_precision():
            return [tokens, traces, scanned.matrices().transpose(1, 2), read], last


@strict
class SMTFastWeightTeacherConfig(SMTTeacherSizes):
    """Configuration of [`SMTFastWeightTeacher`]: all of it follows from the student's, whose fields it repeats.

    Args:
        vocab_size, embedding_size, num_memory_tokens, intermediate_size, num_hidden_layers, num_matrix_heads,
        matrix_key_size, rms_norm_eps: as in `SMTRecurrentConfig`.
        memory_size: the student's `hidden_size`, the width of everything but the embeddings; `hidden_size` repeats it
            and is not used.

    Raises:
        InputError: a size is out of range.
    """

    model_type = "smt_fast_weight_teacher"

    embedding_size: int | None = None
    num_matrix_heads: int = 1
    matrix_key_size: int | None = None

    follows_student = SMTTeacherSizes.follows_student | {
        name: name
        for name in (
            "hidden_size",
            "embedding_size",
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
            FastWeightSizes.of(self, self.memory_size)
        except ValueError as error:
            raise InputError(str(error)) from None


@register_teacher
class SMTFastWeightTeacher(SMTTeacher):
    """The memories of all prefixes by one scan over the row [the role of the encoder in Sec. 3.1]."""

    config_class = SMTFastWeightTeacherConfig
    config: SMTFastWeightTeacherConfig
    _no_split_modules = ["SMTFastWeightScan"]
    has_next_token_head = False
    # The readout of its memories trains it: the future beyond the next token adds nothing where gradients already reach
    # back over the whole row.
    smt_defaults = {"teacher_readout_weight": 1.0, "predictive_weight": 0.0, "uniformity_weight": 0.0}
    labels_all_positions = True
    can_read_only = True
    can_go_on = True

    def __init__(self, config: SMTFastWeightTeacherConfig):
        super().__init__(config)
        width = config.embedding_size or config.memory_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.embed_proj = projection(width, config.memory_size)
        self.cell = SMTFastWeightScan(config, config.memory_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self.embed_proj:
            init_projection(module)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.16)  # as the student's
        elif isinstance(module, SMTRecurrentFastWeightCell):
            module.init_own_weights()

    @torch.no_grad()
    def hand_over(self, student) -> None:
        """Embeddings and recurrence of the student become this teacher's, its correction zero."""
        updater = student.model.updater
        updater.cell.load_state_dict(self.cell.state_dict())
        updater.control_proj.weight.zero_()
        student.model.embed_tokens.load_state_dict(self.embed_tokens.state_dict())
        student.model.embed_proj.load_state_dict(self.embed_proj.state_dict())

    def forward(
        self,
        input_ids,
        positions,
        initial_memory,
        attention_mask=None,
        document_ids=None,
        return_logits=False,
        reads_only=False,
        top_k=None,
        temperature=1.0,
        returns_last=False,
    ) -> Any:
        """As [`SMTTeacher.forward`], with the student's normalisation: of the last token and of what was read alone.

        `reads_only`: of every memory the last token alone, `(B, S, 1, D)`, which is all that the readout sees.
        `initial_memory` may be `(B, K, D)`, memories to go on from. `returns_last`: return also the memory after all
        tokens, `(B, K, D)`, of rows without padding.
        """
        if return_logits or top_k is not None:  # refused
            return super().forward(input_ids, positions, initial_memory, return_logits=return_logits, top_k=top_k)
        batch, length = input_ids.shape
        positions = positions.expand(batch, -1) if positions.dim() == 1 else positions
        if attention_mask is not None:
            input_ids, positions, document_ids = without_padding(input_ids, positions, attention_mask, document_ids)
        start = initial_memory.expand(batch, -1, -1)
        if not length:
            chosen = start[:, None].expand(*positions.shape, -1, -1)
            return (chosen, start) if returns_last else chosen
        resets = None if document_ids is None else document_starts(document_ids)
        parts, last = self.cell(self.embed_proj(self.embed_tokens(input_ids)), start, resets, reads_only)
        dtype = state_dtype(initial_memory.dtype)  # as the student's: a half-precision pointer stops at 256
        memories = torch.cat([part.flatten(2).to(dtype) for part in parts], dim=-1)
        start = (start[:, -1:] if reads_only else start).to(dtype)
        memories = torch.cat([start.flatten(1)[:, None], memories], dim=1)
        chosen = memories.gather(1, positions[..., None].expand(-1, -1, memories.shape[-1])).unflatten(
            -1, start.shape[1:]
        )
        return (chosen, last) if returns_last else chosen


__all__ = ["SMTFastWeightTeacher", "SMTFastWeightTeacherConfig"]

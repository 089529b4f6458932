"""How a model has to be read, found by a test of the model itself.

A model may ignore a mask, begin a chunk with an empty state, or mix up rows, and raise no error (seen in transformers
5.24: Mamba, RWKV). So every manner is tried on a few random tokens, the fastest first, and the first one is taken whose
logits are those of plain passes over whole prompts.
"""

import copy
from collections.abc import Iterator

import torch

from smt_hf.errors import InputError

from .reading import ALONE, EQUAL, PADDED, Manner, Reader

# Of the prompts that are tried: chunks of 4 tokens, of which the short prompt has 3 of padding in the first; then a few
# tokens one by one, as in writing.
_CHUNK, _LENGTHS, _NUM_WRITTEN = 4, {PADDED: (11, 8), EQUAL: (11, 11), ALONE: (11,)}, 3
# What logits may differ by: a share of what the first chunk of the prompt changes in them, or a share of the largest.
_SHARE, _ROUNDING = 0.02, 1e-5


def find_manner(model) -> Manner:
    """The fastest manner in which the model computes what it computes of whole prompts.

    Raises:
        InputError: there is none.
    """
    if model.dtype not in (torch.float32, torch.float64):  # whose rounding would hide what a state is worth
        model = copy.deepcopy(model).float()
    size = model.config.get_text_config().vocab_size
    drawn = torch.Generator().manual_seed(0)
    rows = torch.randint(size, (2, max(_LENGTHS[ALONE]) + _NUM_WRITTEN), generator=drawn).tolist()
    faults = []
    for manner in _manners():
        try:
            error = _difference(model, manner, rows)
        except Exception as fault:  # what a model raises for a mask or a state that it does not expect is its own
            faults.append(f"{type(fault).__name__}: {' '.join(str(fault).split())[:100]}")
            continue
        if error is None:
            return manner
        faults.append(f"logits differ by {error:.2g}")
    raise InputError(
        f"a {type(model).__name__} cannot be read piece by piece: its logits are not those of a whole pass, however it "
        f"is read ({'; '.join(dict.fromkeys(faults))})."
    )


def _manners() -> Iterator[Manner]:
    for carries_chunks in (True, False):
        for together, masks_past in ((PADDED, True), (PADDED, False), (EQUAL, True), (ALONE, True)):
            yield Manner(carries_chunks, together, masks_past)


def _difference(model, manner: Manner, rows: list[list[int]]) -> float | None:
    """The largest difference from plain passes, `None` if it is no more than is allowed."""
    longest = max(_LENGTHS[ALONE])
    lengths = _LENGTHS[manner.together]
    rows = [row[longest - length :] for row, length in zip(rows, lengths)]
    reading = Reader(model, manner, _CHUNK).read([row[:-_NUM_WRITTEN] for row in rows])
    found = [reading.logits]
    for place in range(-_NUM_WRITTEN, 0):
        reading.feed(torch.tensor([[row[place]] for row in rows]))
        found.append(reading.logits)
    worst = None
    for row, length, logits in zip(rows, lengths, torch.stack(found, dim=1)):
        expected, forgotten = _plain(model, row), _plain(model, row[_CHUNK - (longest - length) :])
        allowed = max(_SHARE * (forgotten - expected).abs().max().item(), _ROUNDING * expected.abs().max().item())
        error = (logits - expected).abs().max().item()
        if not error <= allowed:  # nor if it is no number
            worst = max(error, worst or 0.0)
    return worst


@torch.inference_mode()
def _plain(model, row: list[int]) -> torch.Tensor:
    """Logits after the prompt and after each token written, of one pass over all: `(_NUM_WRITTEN + 1, V)`."""
    ids = torch.tensor([row], device=model.device)
    return model(input_ids=ids, use_cache=False, return_dict=True).logits[0, -_NUM_WRITTEN - 1 :].float()

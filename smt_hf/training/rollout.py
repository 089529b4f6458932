"""The one chunked rollout, and where its chunks start.

SMT, DMT and BPTT are settings of it: chunks of k tokens, a start memory for each, k sequential steps for all chunks of
all sequences side by side. Shapes: B sequences, T tokens, C = T / k chunks, K memory tokens, D width.
"""

import torch

from smt_hf.student.modeling_smt_recurrent import document_starts


def rollout(student, starts, input_ids, attention_mask=None, document_ids=None) -> torch.Tensor:
    """Unroll the student inside every chunk, from the chunk's own start.

    Args:
        student: an `SMTRecurrentForCausalLM`.
        starts: `(B, C, K, D)`, memories before the first token of each chunk.
        input_ids: `(B, T)`, C divides T.
        attention_mask: `(B, T)`; padding leaves the memory unchanged.
        document_ids: `(B, T)`; where it changes inside the row the memory goes back to `m_0`.

    Returns:
        `(B, T, K, D)`: the memory after each token. Gradients reach the starts and cross at most `T / C` transitions.
    """
    batch, num_chunks = starts.shape[:2]
    length = input_ids.shape[1]
    if length % num_chunks:
        raise ValueError(f"{num_chunks} chunks do not divide {length} tokens evenly.")

    def chunked(tensor):
        return None if tensor is None else tensor.reshape(batch * num_chunks, length // num_chunks)

    new_document = None if document_ids is None else document_starts(document_ids)
    memories = student.model.unroll(
        starts.flatten(0, 1),
        student.model.embed(chunked(input_ids)),
        chunked(attention_mask),
        chunked(new_document),
    )
    return memories.view(batch, length, *starts.shape[2:])


def pulled(own: torch.Tensor, labels: torch.Tensor, forcing: float) -> torch.Tensor:
    """`own + forcing (label - own)`, labels without gradient: generalised teacher forcing (Hess et al. 2023)."""
    return own + forcing * (labels.detach().to(own.dtype) - own)


def truncated_rollout(
    student, start, window, input_ids, attention_mask=None, document_ids=None, *, labels=None, forcing: float = 0.0
) -> torch.Tensor:
    """One chunk as long as the row, its gradient cut between windows: truncated BPTT of a row in one step.

    Args:
        start: `(B, K, D)`, memory before the row.
        window: transitions that a gradient crosses at most; the last window may be shorter.
        others: as in `rollout`.
        labels, forcing: `(B, C, K, D)`, memories before each window, that it starts from after a `forcing` above 0 has
            pulled the student's own there (`pulled`); the first is not used.

    Returns:
        `(B, T, K, D)`.
    """
    pieces = []
    memory = start
    for begin in range(0, input_ids.shape[1], window):
        # One token before the window, so that a document that starts with it is seen.
        seen = slice(max(begin - 1, 0), begin + window)
        own = [None if tensor is None else tensor[:, seen] for tensor in (input_ids, attention_mask, document_ids)]
        reset = None
        if own[2] is not None and begin:
            reset = (own[2][:, 0] != own[2][:, 1])[:, None, None]
            memory = torch.where(reset, student.model.start_memory(), memory)
        own = [None if tensor is None else tensor[:, 1 if begin else 0 :] for tensor in own]
        pieces.append(rollout(student, memory[:, None], *own))
        memory = pieces[-1][:, -1].detach().clone()  # a view would keep the whole window where it is checkpointed
        following = begin // window + 1
        if forcing and following < labels.shape[1]:
            memory = pulled(memory, labels[:, following], forcing)
    return torch.cat(pieces, dim=1)


@torch.no_grad()
def sequential_starts(
    student, num_chunks, input_ids, attention_mask=None, document_ids=None, *, labels=None, forcing: float = 0.0
) -> torch.Tensor:
    """Own states of all ages: roll from `m_0` over the whole row and keep the memory before every chunk.

    T - k sequential steps without gradient. With `forcing`, the rollout goes on from each kept memory after it has been
    pulled towards the label there: `labels` `(B, C, K, D)`. Returns `(B, C, K, D)`, the first of them `m_0`.
    """
    start = student.model.start_memory().expand(input_ids.shape[0], 1, -1, -1)
    steps = input_ids.shape[1] // num_chunks
    read = slice(0, input_ids.shape[1] - steps)  # what the last chunk reads comes after its start
    if num_chunks == 1:
        return start
    own = [None if tensor is None else tensor[:, read] for tensor in (input_ids, attention_mask, document_ids)]
    if forcing:
        ends = truncated_rollout(student, start[:, 0], steps, *own, labels=labels, forcing=forcing)
        return torch.cat([start, pulled(ends[:, steps - 1 :: steps], labels[:, 1:], forcing)], dim=1)
    return torch.cat([start, rollout(student, start, *own)[:, steps - 1 :: steps]], dim=1)


@torch.no_grad()
def parallel_starts(
    student,
    starts,
    ages,
    input_ids,
    attention_mask=None,
    document_ids=None,
    sweeps: int | None = None,
    forcing: float = 0.0,
) -> torch.Tensor:
    """Own states of limited age, by sweeps over all chunks at once.

    After sweep i a chunk starts where the student arrives i chunks after it left the given starts: an exact on-policy
    rollout of `i * k` steps, at a depth of `i * k` sequential steps for all chunks together.

    Args:
        starts: `(B, C, K, D)`, the teacher's memories.
        ages: `(B, C)` long, sweeps that each chunk's start has gone through; 0 keeps the given start.
        sweeps: how many to do; default: the oldest age.
        forcing: share by which every sweep pulls the chunks' starts towards the given ones (`pulled`).

    Returns:
        `(B, C, K, D)`. The first chunk always keeps its given start.
    """
    num_chunks = starts.shape[1]
    steps = input_ids.shape[1] // num_chunks
    current = chosen = starts
    for age in range(1, (int(ages.max()) if sweeps is None else sweeps) + 1):
        ends = rollout(student, current, input_ids, attention_mask, document_ids)[:, steps - 1 :: steps]
        current = torch.cat([starts[:, :1], ends[:, :-1]], dim=1)
        if forcing:
            current = pulled(current, starts, forcing)
        chosen = torch.where((ages == age)[..., None, None], current, chosen)
    return chosen


def example_uniforms(example_ids: torch.Tensor, num: int, seed: int, stream: int) -> torch.Tensor:
    """Random numbers that depend on nothing but the example: the same whatever the batch, rank or accumulation.

    Args:
        example_ids: `(B,)`, unique over the run (row and epoch).
        num: numbers per example.
        seed, stream: seed of the run; number of the decision that the random numbers are for.

    Returns:
        `(B, num)` float32, uniform in [0, 1): the SplitMix64 hash (Steele et al. 2014) of example and counter.
    """
    golden, first, second = -7046029254386353131, -4658895280553007687, -7723592293110705685

    def shifted(value, bits):
        return (value >> bits) & ((1 << (64 - bits)) - 1)

    def mixed(value):
        value = (value ^ shifted(value, 30)) * first
        value = (value ^ shifted(value, 27)) * second
        return value ^ shifted(value, 31)

    counters = torch.arange(num, device=example_ids.device)
    salt = torch.tensor(seed * 1_000_003 + stream, device=example_ids.device)
    key = mixed(example_ids * golden + salt * first)  # int64 products wrap around, as the hash wants
    hashed = mixed(key[:, None] + (counters + 1) * golden)
    return shifted(hashed, 40).float() / (1 << 24)

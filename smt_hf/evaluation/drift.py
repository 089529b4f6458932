"""Distance between the student's and the teacher's memories, reach of gradients, and spread of memories.

Rows as in `scores.py`: `input_ids (N, T + 1)`, the last token only a target, and aligned `labels (N, T + 1)`.
`batch_size` rows are computed side by side: it changes memory use and speed, not the result.
Shapes: N rows, B rows of a batch, T tokens, K memory tokens, D width, V vocabulary.
"""

from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call

from .memories import own_memories, reading_teacher, teacher_memories
from .scores import check_aligned


@torch.inference_mode()
def drift_by_position(model, input_ids: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """Squared distance of the student's own rollout from `m_0` to the teacher's memories, relative to their spread.

    The mean over rows at each position is divided by one number: the mean squared distance between the teacher's
    memories of two different rows at the same position (twice their unbiased variance over rows), averaged over all
    positions, since it is 0 at positions up to which all rows read the same. A drift of 0 is the teacher's trajectory;
    1 is as far off as the teacher's memory of a random other row. (The Trainer's `drift` is relative to the variance
    over the positions of a row instead.)

    Args:
        model: student and teacher (an `SMTForPreTraining`).
        input_ids: `(N, T + 1)`, at least two rows, not padded.

    Returns:
        `(T,)`, no unit: after 1 .. T tokens.

    Raises:
        ValueError: fewer than two rows.
    """
    num_rows, length = len(input_ids), input_ids.shape[1] - 1
    if num_rows < 2:
        raise ValueError(f"the spread of memories over rows needs at least two rows, got {num_rows}.")
    tokens = torch.from_numpy(input_ids[:, :-1]).to(model.device)
    positions = torch.arange(length + 1, device=tokens.device)
    errors, squares = torch.zeros(2, length + 1, dtype=torch.float64)
    totals = torch.zeros((), dtype=torch.float64)
    for rows in tokens.split(batch_size):
        goals = teacher_memories(model, rows, positions).flatten(2).cpu()
        totals = totals + goals.double().sum(0)
        squares += goals.double().square().sum((0, 2))
        for first, memories in own_memories(model.student, rows):
            places = slice(first, first + memories.shape[1])
            errors[places] += (memories.flatten(2).cpu().double() - goals[:, places]).square().sum((0, 2))
    variance = (squares - totals.square().sum(1) / num_rows) / (num_rows - 1)
    to_other_row = 2 * variance[1:].mean().clamp(
        min=1e-6 * totals.shape[1]
    )  # not 0 for a collapsed teacher; memories have RMS 1
    return (errors[1:] / num_rows / to_other_row).numpy()


@torch.enable_grad()
def gradient_norm_by_distance(student, input_ids: np.ndarray, labels: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """Norm of the gradient that BPTT carries back to earlier memories: `|d loss / d m_{p - d}|` at every distance d.

    The loss (nats) is that of a row's last label, at position p, in the student's own rollout from `m_0` with the
    graph of all its steps. The norm is over a whole memory and averaged over rows.

    Args:
        student: an `SMTRecurrentForCausalLM`; its parameters get no gradient.
        input_ids, labels: `(N, T + 1)`; rows whose last label is at `m_0`, or that have none, are left out.

    Returns:
        `(T,)`, nats (memories have RMS 1): d = 0 .. T - 1 transitions before the loss, d = 0 the memory that it is
        read from. NaN where no row has so many tokens before its last label.

    Raises:
        ValueError: the shapes differ or no row has a label after its first token.
    """

    def norms_of(tokens, last, targets):
        memory = student.model.start_memory().detach().expand(len(tokens), -1, -1).requires_grad_()
        memories = []
        # Token by token: `unroll` stacks its memories, and the stack is not on the path from one to the next.
        for embeds in student.model.embed(tokens).split(1, dim=1):
            memory = student.model.unroll(memory, embeds)[:, 0]
            memories.append(memory)
        read = torch.stack(memories, dim=1)[torch.arange(len(last), device=last.device), last - 1]
        loss = F.cross_entropy(student.read_logits(read), targets, reduction="sum")
        gradients = torch.autograd.grad(loss, memories)
        return torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients], dim=1)

    return _mean_by_distance(norms_of, input_ids, labels, batch_size, student.device)


@torch.enable_grad()
def teacher_gradient_norm(model, input_ids: np.ndarray, labels: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """As `gradient_norm_by_distance`, for the teacher: `|d loss / d e_{p - d}|` with `e_t` the embedding of token t.

    The loss is read out of the teacher's memory at position p. The teacher reads all tokens at once, so that the path
    from every token to the loss is a few layers long. The gradient is 0 for tokens that its attention does not reach.

    Args:
        model: student and teacher (an `SMTForPreTraining`); their parameters get no gradient.
        others: as in `gradient_norm_by_distance`.

    Returns:
        `(T,)`, nats per unit of embedding: d = 0 .. T - 1 tokens before the last one that is read; else NaN.
    """
    embeddings = model.teacher.get_input_embeddings()
    (name,) = [name for name, module in model.teacher.named_modules() if module is embeddings]

    def norms_of(tokens, last, targets):
        # Every token gets an entry of its own in the table, whatever order the teacher looks tokens up in.
        table = embeddings(tokens).detach().flatten(0, 1).requires_grad_()
        numbers = torch.arange(tokens.numel(), device=tokens.device).view(tokens.shape)
        arguments = (numbers, last[:, None], model.student.model.start_memory())
        memories = functional_call(model.teacher, {f"{name}.weight": table}, arguments)
        loss = F.cross_entropy(model.student.read_logits(memories[:, 0]), targets, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, table)
        return gradient.norm(dim=1).view(tokens.shape)

    return _mean_by_distance(norms_of, input_ids, labels, batch_size, model.device)


def memory_geometry(memories: torch.Tensor) -> dict[str, float]:
    """How many directions a set of memories spans, and how evenly.

    Args:
        memories: `(N, K, D)`, at least two.

    Returns:
        `effective_rank`: exp of the entropy of the normalised singular values of the flattened memories `(N, K * D)`
        after centring (Roy & Vetterli 2007); at most `min(N - 1, K * D)`, 0 if all memories are the same.
        `participation_ratio`: `(sum l)^2 / sum l^2` of the eigenvalues l of their covariance; it gives small
        directions less weight. `spread`: mean unbiased variance of a coordinate (memories have RMS 1).
        `uniformity`: `log E exp(-2 |u_a - u_b|^2)` over pairs of L2-normalised memory tokens [Eq. 4], of 2,048 random
        tokens if there are more: 0 if all are the same, -4 for orthogonal ones. `n`: memories.

    Raises:
        ValueError: fewer than two memories.
    """
    if len(memories) < 2:
        raise ValueError(f"the geometry of memories needs at least two of them, got {len(memories)}.")
    # Singular values below this share of the memories' norm before centring are rounding errors.
    precision = torch.finfo(memories.dtype).eps
    flat = memories.detach().cpu().flatten(1).double()
    centred = flat - flat.mean(0)
    singular = torch.linalg.svdvals(centred)
    singular = singular[singular > precision * flat.norm()]
    shares, squares = singular / singular.sum(), singular.square()
    return {
        "effective_rank": float((-(shares * shares.log()).sum()).exp()) if len(singular) else 0.0,
        "participation_ratio": float(squares.sum().square() / squares.square().sum()) if len(singular) else 0.0,
        "spread": float(centred.square().sum() / (len(flat) - 1) / flat.shape[1]),
        "uniformity": _uniformity(F.normalize(flat.view(memories.shape).flatten(0, 1), dim=-1)),
        "n": len(memories),
    }


@torch.inference_mode()
def geometry_of(
    model, input_ids: np.ndarray, num_positions: int = 8, batch_size: int = 64
) -> dict[str, dict[str, float]]:
    """`memory_geometry` of held-out rows: of the student's own rollout from `m_0` and, if there is one, of the teacher.

    Args:
        model: an `SMTForPreTraining`.
        input_ids: `(N, T + 1)`, not padded.
        num_positions: memories taken from each row, at even distances, the last one after T tokens. They are
            pooled over all rows; where they are fewer than `K * D`, their number bounds the ranks.

    Returns:
        `{"student": {...}, "teacher": {...}}`, the latter only if the model has a teacher.
    """
    tokens = torch.from_numpy(input_ids[:, :-1]).to(model.device)
    length = tokens.shape[1]
    steps = torch.arange(1, num_positions + 1, device=tokens.device)
    positions = (steps * length).div(num_positions, rounding_mode="floor").clamp(min=1).unique()
    taken: dict[str, list[torch.Tensor]] = defaultdict(list)
    for rows in tokens.split(batch_size):
        for first, memories in own_memories(model.student, rows):
            inside = positions[(positions >= first) & (positions < first + memories.shape[1])]
            taken["student"].append(memories[:, inside - first].flatten(0, 1).cpu())
        if reading_teacher(model) is not None:
            taken["teacher"].append(teacher_memories(model, rows, positions).flatten(0, 1).cpu())
    return {name: memory_geometry(torch.cat(parts)) for name, parts in taken.items()}


def _mean_by_distance(norms_of, input_ids: np.ndarray, labels: np.ndarray, batch_size: int, device) -> np.ndarray:
    """Mean over rows of `norms_of(tokens (B, t), last (B,), targets (B,)) -> (B, t)`, aligned at each row's last label.

    Entry t - 1 of a row belongs to its t-th token and counts at distance `last - t`.
    """
    check_aligned(input_ids, labels)
    positions = np.arange(labels.shape[1])
    last = np.where(labels != -100, positions, -1).max(1)
    rows = np.flatnonzero(last > 0)
    if not len(rows):
        raise ValueError("no row has a label after its first token, so there is no gradient to measure.")
    sums, counts = np.zeros((2, labels.shape[1] - 1))
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        ends = last[some]
        tokens = torch.from_numpy(input_ids[some, : ends.max()]).to(device)
        norms = norms_of(tokens, torch.from_numpy(ends).to(device), torch.from_numpy(labels[some, ends]).to(device))
        distances = ends[:, None] - positions[1 : 1 + tokens.shape[1]]
        before = distances >= 0
        sums += np.bincount(distances[before], norms.double().cpu().numpy()[before], len(sums))
        counts += np.bincount(distances[before], minlength=len(counts))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _uniformity(directions: torch.Tensor, most: int = 2048) -> float:
    """`log E exp(-2 |u_a - u_b|^2)` over pairs of different unit vectors `(M, D)`, or of `most` random ones of them."""
    if len(directions) > most:
        generator = torch.Generator().manual_seed(0)
        directions = directions[torch.randperm(len(directions), generator=generator)[:most]]
    num = len(directions)
    total = float((-4 + 4 * directions @ directions.T).exp().sum())  # |u_a - u_b|^2 = 2 - 2 cos
    return float(np.log((total - num) / (num * (num - 1))))  # a vector and itself: exp(0)

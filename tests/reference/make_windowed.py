"""Makes windowed.npz: the published method in plain float64 numpy, straight from the equations of arXiv:2606.06479.

Run `python tests/reference/make_windowed.py`; the same bytes come out every time. Nothing of `smt_hf` and nothing of
torch is used here: every attention weight, rotation and mean is written out, one window, one head, one token at a time.
Tokens t are numbered from 0, a position p is a number of tokens read, as in the package.

What the equations leave open is fixed as in the package, and stated here once:
- pre-norm blocks with RMSNorm (learned scale), exact GELU, no biases; a last RMSNorm before `W`;
- rotary embedding by halves: coordinate i of a head is turned with coordinate i + d / 2, by place * theta^(-2 i / d);
  places count from the window's first token, and the registers follow the last token;
- uniformity [Eq. 4] is taken over the ordered pairs of different memory tokens *inside a sequence* and then averaged.
  With one sequence in the batch that is the paper's mean over all pairs; with more, the paper's also pairs tokens of
  different sequences.
"""

import math
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("windowed.npz")
# rope_theta: a power of two whose frequencies are exact in float32 too, so that parity can be asked to 1e-9.
SIZES = {
    "vocab_size": 13,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "context_length": 5,
    "num_memory_tokens": 3,
    "memory_size": 8,
    "rope_theta": 256,
}
RMS_NORM_EPS = 1e-5
FUTURE_LENGTH = 4
WEIGHTS = {"predictive": 1.0, "dynamics": 0.1, "uniformity": 0.001}  # of the paper


def rms_norm(vector, scale=1.0):
    return vector / math.sqrt(sum(number * number for number in vector) / len(vector) + RMS_NORM_EPS) * scale


def gelu(vector):
    return np.array([0.5 * number * (1 + math.erf(number / math.sqrt(2))) for number in vector])


def softmax(numbers):
    exponentials = [math.exp(number - max(numbers)) for number in numbers]
    return [number / sum(exponentials) for number in exponentials]


def turned(vector, place):
    half = len(vector) // 2
    result = np.empty(len(vector))
    for i in range(half):
        angle = place * SIZES["rope_theta"] ** (-2 * i / len(vector))
        result[i] = vector[i] * math.cos(angle) - vector[half + i] * math.sin(angle)
        result[half + i] = vector[i] * math.sin(angle) + vector[half + i] * math.cos(angle)
    return result


def encode(weights, window):
    """`E(x_{t-T_c}, .., x_{t-1})` [Sec. 3.1]: a list of token ids -> `(K, D)`."""
    states = [weights["embed_tokens.weight"][token] for token in window] + list(weights["registers"])
    width, num_heads = SIZES["hidden_size"], SIZES["num_attention_heads"]
    for layer in range(SIZES["num_hidden_layers"]):
        own = {name.split(".", 2)[2]: w for name, w in weights.items() if name.startswith(f"layers.{layer}.")}
        projected = [own["qkv_proj.weight"] @ rms_norm(state, own["attention_norm.weight"]) for state in states]
        mixed = [np.zeros(width) for _ in states]
        for head in range(num_heads):
            rows = slice(head * width // num_heads, (head + 1) * width // num_heads)
            queries = [turned(vector[:width][rows], place) for place, vector in enumerate(projected)]
            keys = [turned(vector[width : 2 * width][rows], place) for place, vector in enumerate(projected)]
            values = [vector[2 * width :][rows] for vector in projected]
            for place, query in enumerate(queries):
                scores = softmax([query @ key / math.sqrt(width // num_heads) for key in keys])
                mixed[place][rows] = sum(score * value for score, value in zip(scores, values))
        states = [state + own["o_proj.weight"] @ mix for state, mix in zip(states, mixed)]
        inner = [own["up_proj.weight"] @ rms_norm(state, own["mlp_norm.weight"]) for state in states]
        states = [state + own["down_proj.weight"] @ gelu(vector) for state, vector in zip(states, inner)]
    registers = states[len(window) :]
    return np.stack([rms_norm(weights["memory_proj.weight"] @ rms_norm(r, weights["norm.weight"])) for r in registers])


def label(weights, tokens, position, initial_memory, mask=None, documents=None):
    """The memory label at a position of a row: the window of what is real, of this document, and was read."""
    read = [t for t in range(position) if mask is None or mask[t]]
    if documents is not None:
        read = [t for t in read if documents[t] == documents[read[-1]]]
    window = [tokens[t] for t in read][-SIZES["context_length"] :]
    return encode(weights, window) if window else initial_memory


def predictive(logits, future):
    """Eq. 2: `(S, F, V)`, `(S, F)` -> nats, mean over what is predicted (future token >= 0)."""
    losses = []
    for row_logits, row_future in zip(logits, future):
        for scores, token in zip(row_logits, row_future):
            if token >= 0:
                losses.append(-math.log(softmax(list(scores))[token]))
    return sum(losses) / len(losses)


def dynamics(memories, labels, counts=None):
    """Eq. 3: `(S, K, D)` twice -> mean squared error over the positions that count."""
    losses = []
    for position in range(len(memories)):
        if counts is None or counts[position]:
            losses.extend(((memories[position] - labels[position]) ** 2).flatten())
    return sum(losses) / len(losses)


def uniformity(memories):
    """Eq. 4 inside a sequence: `(S, K, D)` -> `log E exp(-2 |u_a - u_b|^2)`, a and b different memory tokens."""
    directions = [token / math.sqrt(token @ token) for memory in memories for token in memory]
    kernels = []
    for a, first in enumerate(directions):
        for b, second in enumerate(directions):
            if a != b:
                kernels.append(math.exp(-2 * ((first - second) ** 2).sum()))
    return math.log(sum(kernels) / len(kernels))


def published_step(weights, x, change, decoder):
    """One transition a sequence of SMT as published: the alignment of its windows, and its loss.

    Args:
        x: `(B, T_c + F)` tokens. The context is the first T_c of them, the next context the T_c from the second on: the
            window slides. The transition reads token T_c, which is also the first one decoded from the first memory.
        change: `(B, K, D)`; in the place of the student, `f(m, x) = RMSNorm(m + change)`.
        decoder: `(F, V, K, D)`; in the place of the decoder, logits linear in the memory.

    Returns:
        Named arrays; the terms are means over the batch.
    """
    length = SIZES["context_length"]
    x_ctx, x_ctx_next, targets = x[:, :length], x[:, 1 : length + 1], x[:, length : length + FUTURE_LENGTH]
    memory = np.stack([encode(weights, list(row)) for row in x_ctx])
    next_memory = np.stack([encode(weights, list(row)) for row in x_ctx_next])
    reached = np.stack([[rms_norm(token) for token in tokens] for tokens in memory + change])
    logits = np.array([[[(w * m).sum() for w in step] for step in decoder] for m in memory])
    rows = range(len(x))
    terms = {
        "predictive": sum(predictive(logits[b][None], targets[b][None]) for b in rows) / len(x),
        "dynamics": sum(dynamics(reached[b][None], next_memory[b][None]) for b in rows) / len(x),
        "uniformity": sum(uniformity(memory[b][None]) for b in rows) / len(x),
    }
    loss = sum(WEIGHTS[name] * term for name, term in terms.items())
    return {"memory": memory, "next_memory": next_memory, "reached": reached, "targets": targets, "loss": loss, **terms}


def random_weights(rng):
    """By the names of the state dict; the scales are not 1, so that leaving one out shows."""
    width, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    shapes = {
        "registers": (SIZES["num_memory_tokens"], width),
        "embed_tokens.weight": (SIZES["vocab_size"], width),
        "norm.weight": (width,),
        "memory_proj.weight": (SIZES["memory_size"], width),
    }
    for layer in range(SIZES["num_hidden_layers"]):
        shapes |= {
            f"layers.{layer}.attention_norm.weight": (width,),
            f"layers.{layer}.qkv_proj.weight": (3 * width, width),
            f"layers.{layer}.o_proj.weight": (width, width),
            f"layers.{layer}.mlp_norm.weight": (width,),
            f"layers.{layer}.up_proj.weight": (inner, width),
            f"layers.{layer}.down_proj.weight": (width, inner),
        }
    weights = {}
    for name, shape in shapes.items():
        noise = rng.standard_normal(shape)
        weights[name] = 1 + 0.3 * noise if len(shape) == 1 else noise * (1.0 if "emb" in name else 1.5 * width**-0.5)
    return weights


def slope(weights, direction, step_inputs):
    """Derivative of the published loss along a direction of the weights: central differences of fourth order."""
    size = 2e-4

    def loss(scale):
        return published_step({n: w + scale * direction[n] for n, w in weights.items()}, *step_inputs)["loss"]

    return (8 * (loss(size) - loss(-size)) - (loss(2 * size) - loss(-2 * size))) / (12 * size)


def fixtures():
    """Everything in windowed.npz, by its key."""
    rng = np.random.default_rng(6479)
    vocab, length = SIZES["vocab_size"], 11
    num_memory_tokens, memory_size = SIZES["num_memory_tokens"], SIZES["memory_size"]
    weights = random_weights(rng)
    result = {f"weights/{name}": weight for name, weight in weights.items()}

    # (a) labels of whole rows: plain, and with padding on either side and inside, and packed documents
    tokens = rng.integers(vocab, size=(3, length))
    initial_memory = rng.standard_normal((num_memory_tokens, memory_size))
    positions = np.stack([np.arange(length + 1)] * 3)
    mask = np.ones((3, length), dtype=np.int64)
    mask[0, 8:], mask[1, :3], mask[2, [2, 5, 6]] = 0, 0, 0
    documents = np.array([[0] * 4 + [1] * 7, [0] * 9 + [1] * 2, [4] * 1 + [7] * 4 + [2] * 6])
    result |= {"tokens": tokens, "initial_memory": initial_memory, "positions": positions}
    result |= {"mask": mask, "documents": documents}
    for name, use_mask, use_documents in (("plain", 0, 0), ("mask", 1, 0), ("documents", 0, 1), ("both", 1, 1)):
        result[f"labels/{name}"] = np.array(
            [
                [
                    label(weights, row, p, initial_memory, m if use_mask else None, d if use_documents else None)
                    for p in places
                ]
                for row, places, m, d in zip(tokens, positions, mask, documents)
            ]
        )

    # (b) to (d) the losses on given tensors
    logits = 2 * rng.standard_normal((2, 3, FUTURE_LENGTH, vocab))
    future = rng.integers(vocab, size=logits.shape[:-1])
    future[0, 2, 1:], future[1, 0] = -100, -100
    memories, targets = rng.standard_normal((2, 2, 4, num_memory_tokens, memory_size))
    counts = np.array([[1, 1, 0, 1], [0, 1, 0, 0]])
    result |= {"logits": logits, "future": future, "memories": memories, "targets": targets, "counts": counts}
    result |= {
        "losses/predictive": np.array([predictive(*pair) for pair in zip(logits, future)]),
        "losses/dynamics": np.array([dynamics(*pair) for pair in zip(memories, targets)]),
        "losses/dynamics_masked": np.array([dynamics(*triple) for triple in zip(memories, targets, counts)]),
        "losses/uniformity": np.array([uniformity(memory) for memory in memories]),
    }

    # (e) and (f) one transition of the published step, and how its loss changes with the teacher's weights
    x = rng.integers(vocab, size=(2, SIZES["context_length"] + FUTURE_LENGTH))
    change = 0.3 * rng.standard_normal((2, num_memory_tokens, memory_size))
    decoder = 0.3 * rng.standard_normal((FUTURE_LENGTH, vocab, num_memory_tokens, memory_size))
    result |= {"x": x, "change": change, "decoder": decoder}
    result |= {f"step/{name}": np.asarray(value) for name, value in published_step(weights, x, change, decoder).items()}
    # One direction for each weight alone: a gradient that misses a path shows in its own weight.
    slopes = []
    for name in sorted(weights):
        direction = {other: np.zeros_like(weight) for other, weight in weights.items()}
        direction[name] = np.cos(np.arange(weights[name].size)).reshape(weights[name].shape)
        slopes.append(slope(weights, direction, (x, change, decoder)))
    result["step/slopes"] = np.array(slopes)
    return result


if __name__ == "__main__":
    np.savez_compressed(FILE, **fixtures())

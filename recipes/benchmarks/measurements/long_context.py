"""Past the training length: bits per byte by position on long streams, and a needle far back.

Shapes: B streams, L tokens predicted, N rows, T tokens.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from smt_hf.command_line import argument
from smt_hf.data import byte_tokenizer, heldout_streams, load_corpus, load_task, tokenize
from smt_hf.errors import InputError
from smt_hf.evaluation import score_student
from smt_hf.evaluation.text import stream_labels
from smt_hf.publishing.arms import NAMING

from .arguments import BenchmarkArguments
from .results import facts

_HELDOUT_SEED = 2_000_000
_CHANCE = 1 / 8


@dataclass
class LongContextArguments(BenchmarkArguments):
    """Folders of students that learned text or retrieval, each under the name that the lines carry."""

    text_students: list[str] = argument([], "name=folder pairs of students of text.")
    retrieval_students: list[str] = argument([], "name=folder pairs of students of retrieval.")
    lengths: list[int] = argument([1024, 4096, 8192, 16384], "Lengths of streams and needle rows, in tokens.")
    num_streams: int = argument(8, "Held-out streams of text.")
    num_rows: int = argument(256, "Rows of retrieval per length.")
    train_file: str | None = argument(None, "Text whose held-out part is scored; default: the embedded corpus.")
    figure: str | None = argument(None, "PNG to draw.")

    def __post_init__(self):
        super().__post_init__()
        self.at_least_1("lengths", "num_streams", "num_rows")
        if not (self.text_students or self.retrieval_students):
            raise InputError("name at least one student: `--text_students smt8_bptt=runs/pretrain/student`.")
        for pair in (*self.text_students, *self.retrieval_students):
            name, _, folder = pair.partition("=")
            if not name or not folder:
                raise InputError(f"students are given as name=folder, got {pair!r}.")
            if not Path(folder).expanduser().is_dir():
                raise InputError(f"there is no folder {folder!r}: give one that `save_pretrained` has written.")


def measure_long_context(arguments: LongContextArguments) -> list[dict]:
    """One line per student and length, with the shared fields of all benchmarks."""
    torch.set_num_threads(arguments.num_threads)
    shared = {"benchmark": "long_context", "seed": arguments.seed, **facts(arguments.num_threads)}
    lines: list[dict] = []
    longest = max(arguments.lengths)
    edges = [0, *sorted(arguments.lengths)]
    if arguments.text_students:
        heldout = tokenize(load_corpus(arguments.train_file).heldout, byte_tokenizer())
        streams = heldout_streams(heldout, arguments.num_streams, longest)
        for name, student, phases in _students(arguments.text_students, "text"):
            for begin, part in zip(edges, bits_by_position(student, streams, edges)):
                lines.append(
                    {**shared, "task": "text", "arm": name, "position": part["position"], "chance": 8.0, **phases}
                )
                lines[-1] |= {"parameters": student.num_parameters(), "batch_size": len(streams)}
                lines[-1] |= {"bits_per_byte": part["bits"], "n": len(streams) * (int(part["position"]) - begin)}
    for name, student, phases in _students(arguments.retrieval_students, "retrieval"):
        rows = needles(arguments.num_rows, arguments.seed)
        for length in sorted(arguments.lengths):
            (entry,) = far_needle_accuracy(student, rows, [length], _CHANCE, batch_size=arguments.num_rows)
            lines.append({**shared, "task": "retrieval", "arm": name, "position": length, "chance": _CHANCE, **phases})
            lines[-1] |= {"parameters": student.num_parameters(), "batch_size": arguments.num_rows}
            lines[-1] |= {"accuracy": entry["accuracy"], "n": entry["n"]}
    return lines


def _students(pairs: list[str], task: str):
    """Name, student, and the phases that it was trained by where its folder says them."""
    for pair in tqdm(pairs, desc=task, dynamic_ncols=True):
        name, _, folder = pair.partition("=")
        path = Path(folder).expanduser()
        results = path / "eval_results.json"
        phases = json.loads(results.read_text()).get("phases", []) if results.exists() else []
        named = [{key: phase[key] for key in NAMING if key in phase} for phase in phases]
        yield name, AutoModelForCausalLM.from_pretrained(path).eval(), {"phases": named} if named else {}


def needles(num_rows: int, seed: int) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    """Rows whose needle is the first thing read: the question comes as many tokens later as the row is long."""

    def rows(length: int) -> tuple[np.ndarray, np.ndarray]:
        drawn = load_task("retrieval", length, num_rows, _HELDOUT_SEED + seed)
        ids = np.stack(drawn["input_ids"][:]).astype(np.int64)
        labels = np.stack(drawn["labels"][:]).astype(np.int64)
        marked = np.nonzero(ids[:, :-2] == 0)  # one marker per row before the question
        needle = ids[marked[0], marked[1] + 1]
        ids[marked] = ids[:, 0]
        ids[:, 0], ids[:, 1] = 0, needle
        return ids, labels

    return rows


def bits_by_position(student, tokens: np.ndarray, edges: Sequence[int]) -> list[dict[str, float]]:
    """Mean bits per token at increasing ages of long streams, the memory carried on from `m_0`.

    Args:
        student: an `SMTRecurrentForCausalLM`.
        tokens: `(B, L + 1)`.
        edges: ages (tokens read) that bound the bins, increasing, within 0 .. L.

    Returns:
        `{"position": b, "bits": x}` for each pair of neighbouring edges a < b: predictions after a + 1 .. b tokens.

    Raises:
        ValueError: fewer than two edges, not increasing, or beyond the streams.
    """
    length = tokens.shape[1] - 1
    if len(edges) < 2 or edges[0] < 0 or edges[-1] > length or any(a >= b for a, b in pairwise(edges)):
        raise ValueError(f"`edges` must be two or more increasing numbers from 0 to {length}, got {list(edges)}.")
    scores = score_student(student, tokens, stream_labels(tokens))
    bits = scores.nats[1:] / scores.counts[1:] / math.log(2)
    return [{"position": int(end), "bits": float(bits[begin:end].mean())} for begin, end in pairwise(edges)]


def far_needle_accuracy(
    student,
    make_rows: Callable[[int], tuple[np.ndarray, np.ndarray]],
    distances: Sequence[int],
    chance: float | None = None,
    batch_size: int = 512,
) -> list[dict[str, float | None]]:
    """Accuracy of the student's own rollout from `m_0` as the needle moves away from the question.

    Args:
        student: an `SMTRecurrentForCausalLM`.
        make_rows: distance (tokens) -> `input_ids`, `labels`, each `(N, T + 1)`, as in `smt_hf.evaluation.scores`.
        distances: the distances to try.
        chance: accuracy of guessing, noted in every result.
        batch_size: rows side by side; changes memory use and speed, not the result.

    Returns:
        `{"distance": d, "accuracy": x, "loss": nats per label, "n": labels, "chance": chance}` for each distance.
    """
    results: list[dict[str, float | None]] = []
    for distance in distances:
        scores = score_student(student, *make_rows(distance), batch_size=batch_size)
        entry = {"distance": distance, "accuracy": scores.accuracy, "loss": scores.loss, "n": scores.n}
        results.append({**entry, "chance": chance})
    return results

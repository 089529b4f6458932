"""Past the training length: bits per byte by position on long streams, and a needle far back."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from smt_hf.command_line import argument
from smt_hf.data import byte_tokenizer, heldout_streams, load_corpus, load_task, tokenize
from smt_hf.errors import InputError
from smt_hf.evaluation import bits_by_position, far_needle_accuracy
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
    lengths: list[int] = argument([1024, 4096, 8192, 16384], "Tokens of the streams, and rows with the needle.")
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

"""A Transformer trained on documents with questions, as what people would take instead of a recurrent student.

It has the parameters of a student, reads the same rows, and trains for the same seconds, by the Trainer of
transformers. Rows of all levels are mixed: attention needs no curriculum of lengths to cross them.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import ConcatDataset
from transformers import (
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from smt_hf.command_line import argument
from smt_hf.data import collate
from smt_hf.errors import InputError
from smt_hf.experiments.subjects import DOCUMENTS, DocumentSubject
from smt_hf.publishing.export import export_model
from smt_hf.training.argument_checks import words_of

from .arguments import BenchmarkArguments
from .peers import count_parameters, llama_config_like, load_student
from .results import facts

_WARMUP, _DECAY = 0.05, 0.3  # shares of the seconds
_INPUTS = ("input_ids", "labels", "attention_mask")


@dataclass
class AttentionArguments(BenchmarkArguments):
    """What is learned, for how long, and where the model goes."""

    documents: list[str] = argument([], f"What rows are made of: {', '.join(DOCUMENTS)}.")
    haystack: list[str] | None = argument(None, "Files of text that needles are hidden in, and exercises filled with.")
    difficulty: int = argument(1024, "Transitions of the longest rows.")
    curriculum: list[int] = argument([], "Transitions of shorter rows, which are mixed in.")
    window: int | None = argument(None, "Tokens that attention reaches back in each layer; default: all.")
    num_layers: int | None = argument(None, "Layers; default: as many as a token passes in the student.")
    max_positions: int = argument(65536, "Most tokens that the model takes.")
    seconds: float = argument(600.0, "Seconds of training steps.")
    learning_rate: float = argument(1e-3, "Peak rate of AdamW.")
    batch_size: int = argument(16, "Rows of a step.")
    folder: str | None = argument(None, "Folder that the model and its tokenizer are written to.")
    overwrite: bool = argument(False, "Replace what is in `folder`.")

    def __post_init__(self):
        super().__post_init__()
        self.at_least_1("difficulty", "max_positions", "batch_size")
        self.positive("seconds", "learning_rate", "window", "num_layers")
        if not self.folder:
            raise InputError("name the folder of the model: `--folder runs/llama`.")
        if Path(self.folder).exists() and not self.overwrite:
            raise InputError(f"{self.folder} exists: name another `--folder`, or add `--overwrite`.")
        if self.difficulty >= self.max_positions:
            raise InputError(f"`max_positions` ({self.max_positions}) must hold rows of {self.difficulty} transitions.")


class _Clock(TrainerCallback):
    """Seconds inside steps; training ends when they are used up."""

    def __init__(self, budget: float):
        self.budget, self.seconds, self._started = budget, 0.0, 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self._started
        control.should_training_stop = self.seconds >= self.budget

    def rate(self, step: int) -> float:
        """Factor of the learning rate: a linear warm-up, a plateau, and a linear decay to a tenth."""
        share = min(self.seconds / self.budget, 1.0)
        return min(1.0, (share + 1e-3) / _WARMUP, 0.1 + 0.9 * (1 - share) / _DECAY)


def train_transformer(arguments: AttentionArguments) -> dict[str, Any]:
    """Train and write the model; the line of results says what it was, and its accuracy on held-out rows."""
    torch.set_num_threads(arguments.num_threads)
    rest = (arguments.difficulty, arguments.curriculum, arguments.haystack, arguments.seed)
    subject = DocumentSubject(words_of(arguments.documents), *rest)
    model = _like_the_student(arguments, subject)
    clock = _Clock(arguments.seconds)
    optimizer = torch.optim.AdamW(model.parameters(), arguments.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    with TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=10**9,
            per_device_train_batch_size=arguments.batch_size,
            seed=arguments.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            use_cpu=True,
            remove_unused_columns=False,
        )
        trainer = Trainer(
            model,
            settings,
            data_collator=lambda rows: {name: part for name, part in collate(rows).items() if name in _INPUTS},
            train_dataset=ConcatDataset([subject.level(level) for level in subject.level_names]),
            callbacks=[clock],
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, clock.rate)),
        )
        trainer.train()
    model.eval()
    line = {
        "benchmark": "train_transformer",
        "arm": "full attention" if arguments.window is None else f"attention over {arguments.window}",
        "documents": list(subject.documents),
        "difficulty": subject.difficulty,
        "accuracy": _accuracy(model, *subject.heldout),
        "chance": subject.chance,
        "seconds": round(clock.seconds, 1),
        "steps": trainer.state.global_step,
        "learning_rate": arguments.learning_rate,
        "batch_size": arguments.batch_size,
        "layers": model.config.num_hidden_layers,
        "parameters": count_parameters(model),
        "seed": arguments.seed,
        **facts(arguments.num_threads),
    }
    target = Path(arguments.folder or "")
    export_model(model, subject.tokenizer, target)
    (target / "training.json").write_text(json.dumps(line, indent=2) + "\n")
    return line


def _like_the_student(arguments: AttentionArguments, subject: DocumentSubject):
    if arguments.model is None:
        arguments.vocab_size = arguments.vocab_size or subject.vocab_size
        if arguments.vocab_size != subject.vocab_size:
            raise InputError(f"the rows have a vocabulary of {subject.vocab_size}: leave `vocab_size` out.")
    config = llama_config_like(load_student(arguments), arguments.max_positions, num_layers=arguments.num_layers)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(subject.tokenizer, name))
    set_seed(arguments.seed)
    if arguments.window is None:
        return LlamaForCausalLM(config)
    sizes = {
        name: value for name, value in config.to_diff_dict().items() if name not in ("model_type", "architectures")
    }
    return MistralForCausalLM(MistralConfig(**sizes, sliding_window=arguments.window))


@torch.inference_mode()
def _accuracy(model, ids, labels, batch_size: int = 16) -> float:
    """Share of the labels that are the most likely tokens."""
    num_right = num_labels = 0
    for begin in range(0, len(ids), batch_size):
        tokens, answers = (torch.from_numpy(part[begin : begin + batch_size]) for part in (ids, labels))
        found = model(tokens, use_cache=False).logits[:, :-1].argmax(-1)
        asked = answers[:, 1:] != -100
        num_right += int((found == answers[:, 1:])[asked].sum())
        num_labels += int(asked.sum())
    return num_right / num_labels

"""Supervised fine-tuning of a checkpoint on a text or on instructions: what `recipes/finetune.py` runs."""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoTokenizer, TrainingArguments, set_seed
from transformers.utils import logging

from smt_hf.command_line import (
    argument,
    built,
    check_keys,
    check_values,
    described,
    names_of,
    read_flags,
    read_yaml,
    whole_number,
)
from smt_hf.data import holds_instructions, load_table, padded, tokenize_instructions
from smt_hf.evaluation import Scores
from smt_hf.evaluation.ngram import uniform_bits
from smt_hf.evaluation.streams import count_bytes
from smt_hf.publishing.export import export_student, write_card, write_json
from smt_hf.publishing.figures import plot_curves
from smt_hf.publishing.provenance import run_facts
from smt_hf.publishing.results_table import results_table
from smt_hf.student import SMTRecurrentConfig, SMTRecurrentForCausalLM
from smt_hf.training.arguments import BPTTTrainingArguments
from smt_hf.training.composite import SMTForPreTraining, SMTPreTrainingConfig
from smt_hf.training.phases import apply_required, lay_out, run_phases

from .composition import cost_of, launch_settings, phase_settings, set_threads, tokenizer_hash
from .preflight import check_trackers, lora_settings, pushed_repository
from .pretraining import publish_student
from .run_arguments import HIDDEN, built_phase, new_fields
from .run_folder import RESULTS, check_output_dir, writing
from .subjects import Subject, TextSubject, refuse_curriculum


@dataclass
class FinetuneArguments:
    """What concerns the whole run; the training itself has `FinetuneTrainingArguments`."""

    checkpoint: str | None = argument(None, "Folder or Hub name of an SMTRecurrentForCausalLM.")
    train_file: str | None = argument(
        None,
        "Text, or a table (json, jsonl, csv, parquet) of `text`, of `messages`, or of `prompt` and `completion`.",
    )
    validation_file: str | None = argument(None, "Held out, of the same kind; default: a tenth of the training file.")
    text_column: str = argument("text", "Column of a table that holds the text.")
    config: str | None = argument(None, "YAML file with any of these arguments; flags beat it.")
    output_dir: str = argument("runs/finetune", "Folder for everything that the run writes.")
    use_peft: bool = argument(False, "Train LoRA layers alone: `adapter/` holds them, `student/` the merged model.")
    lora_r: int = argument(8, "Rank of the LoRA layers. Not searched.")
    lora_alpha: int = argument(16, "Their change is scaled by `lora_alpha / lora_r`. Not searched.")
    lora_parts: str = argument("updater,readout", "Where they are put: updater, readout, or both.")
    seed: int = argument(0, "Of everything random.")
    overwrite_output_dir: bool = argument(False, "Remove what an earlier run left in `output_dir`.")
    resume_from_checkpoint: bool = argument(False, "Go on from the run's newest complete checkpoint.")
    num_threads: int | None = argument(None, "CPU threads of this process; default: cores / local processes.")


@dataclass
class FinetuneTrainingArguments(BPTTTrainingArguments):
    """Backpropagation through time on a model that has learned already."""

    learning_rate: float = argument(1e-3, "Peak learning rate. Not searched.")
    max_steps: int = argument(300, "Optimiser steps. Not searched.")
    per_device_train_batch_size: int = argument(16, "Streams, or examples, a device. Not searched.")
    transition_steps: int = argument(64, "Transitions that a gradient crosses. Not searched.")
    context_length: int = argument(512, "Transitions a row of text; examples of instructions must not be longer.")
    continue_previous_phase: bool = argument(False, "There is none.")


class InstructionSubject(Subject):
    """Examples whose answers are learned and scored; bits a byte of the answers.

    Args:
        train_file, validation_file: tables of `messages`, or of `prompt` and `completion`.
        tokenizer: of the checkpoint.
        context_length: longer examples are left out.
    """

    metric = "bits_per_byte"
    name = "instructions"

    def __init__(self, train_file: str, validation_file: str | None, tokenizer, context_length: int):
        train = load_table(train_file)
        heldout = None if validation_file is None else load_table(validation_file)
        if train is None or (validation_file is not None and heldout is None):
            raise ValueError("instructions are json, jsonl, csv or parquet: one of the files is plain text.")
        if heldout is None:
            if len(train) < 10:
                raise ValueError(f"{train_file} has {len(train)} examples: give ten or more, or a `validation_file`.")
            chosen = [index for index in range(len(train)) if index % 10 == 3]
            left = [index for index in range(len(train)) if index % 10 != 3]
            train, heldout = train.select(left), train.select(chosen)
        self.tokenizer, self.vocab_size, self.difficulty = tokenizer, len(tokenizer), context_length
        self.chance = uniform_bits()
        self.file_name = Path(train_file).name
        learned, scored = (tokenize_instructions(part, tokenizer, context_length + 1) for part in (train, heldout))
        self.train, self.num_left_out = learned.rows, learned.num_too_long + scored.num_too_long
        self.heldout = padded(scored.rows)
        answers = [[token for token in labels if token != -100] for labels in scored.rows["labels"]]
        self.num_bytes = sum(count_bytes(tokenizer, np.array([tokens])) for tokens in answers)
        self.eval_rows = scored.rows.select(range(min(128, len(scored.rows))))
        content = json.dumps([train[:], heldout[:]], sort_keys=True, default=str)
        self.digest = hashlib.sha256(content.encode()).hexdigest()[:16]

    def required(self, arguments) -> dict[str, Any]:
        refuse_curriculum(arguments)
        steps = min(arguments.transition_steps, arguments.context_length)
        return {"carries_memory": False, "transition_steps": steps}

    def rows(self, arguments):
        return self.train

    def described_scores(self, scores: Scores) -> dict[str, Any]:
        return {"bits_per_byte": scores.bits_per(self.num_bytes), "accuracy": scores.accuracy, "n": scores.n}

    def facts(self) -> dict:
        return {
            "name": self.file_name,
            "hash": self.digest,
            "training_tokens": sum(len(ids) for ids in self.train["input_ids"]),
            "heldout_tokens": int((self.heldout[1] != -100).sum()),
            "heldout_streams": len(self.heldout[0]),
        }

    def describe(self) -> str:
        left_out = f", {self.num_left_out} too long and left out" if self.num_left_out else ""
        return f"{self.file_name}: {len(self.train):,} examples, {len(self.heldout[0]):,} held out{left_out}"


def finetune(run: FinetuneArguments, arguments: FinetuneTrainingArguments) -> dict:
    """Load, train, score before and after, export. Everything that can be wrong is found before anything is written.

    Returns:
        The content of `eval_results.json`: arms `checkpoint` and `finetuned`.

    Raises:
        ValueError: bad input, with the way to mend it.
    """
    if not run.checkpoint or not run.train_file:
        raise ValueError("name what to fine-tune and on what: `--checkpoint DIR_OR_REPO --train_file FILE`.")
    lora = lora_settings(run)
    pushed = pushed_repository([arguments])
    output_dir = Path(run.output_dir)
    check_output_dir(run)
    check_trackers([arguments])
    logging.disable_progress_bar()
    num_threads = set_threads(run.num_threads)
    lay_out([arguments], str(output_dir))
    set_seed(run.seed)
    student, tokenizer = load_checkpoint(run.checkpoint)
    student = student.float()  # a checkpoint may be of bfloat16; what is trained is not
    with arguments.main_process_first(desc="preparing the data"):
        subject = _subject(run, arguments, tokenizer)
    apply_required(arguments, subject.required(arguments))
    if subject.vocab_size > student.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {subject.vocab_size} tokens and the model knows {student.config.vocab_size}: call "
            "`model.resize_token_embeddings(len(tokenizer))` and save both first."
        )
    is_main = arguments.process_index == 0
    settings = {
        "weights": _digest(value.numpy().tobytes() for value in student.state_dict().values()),
        "data_hash": subject.facts()["hash"],
        "lora": None if lora is None else dataclasses.asdict(lora),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "training": phase_settings(arguments),
        **launch_settings(arguments),
        "seed": run.seed,
    }
    with writing(run, settings) if is_main else contextlib.nullcontext():
        return _finetuned(run, arguments, student, tokenizer, subject, lora, pushed, num_threads)


def _finetuned(run, arguments, student, tokenizer, subject, lora, pushed, num_threads) -> dict:
    is_main, output_dir = arguments.process_index == 0, Path(run.output_dir)
    if is_main:
        print(f"{subject.describe()}\n{run.checkpoint}: {student.num_parameters():,} parameters; {num_threads} threads")
    model = SMTForPreTraining.from_student(student)
    before = _scores(subject.evaluate(model.eval(), arguments))
    (result,) = run_phases(
        model,
        [arguments],
        subject.rows,
        subject.eval_rows,
        tokenizer,
        subject.evaluate,
        run.resume_from_checkpoint,
        {"bptt": lora} if lora is not None else None,
    )
    model = result.model
    if not is_main:
        return {}
    results = {
        "arms": {"checkpoint": before, "finetuned": {**_scores(result.scores), **cost_of(result)}},
        "student_arm": "finetuned",
        "base_model": _name_of(run.checkpoint),
        "task": {"name": subject.name, "difficulty": subject.difficulty, "chance": subject.chance},
        "metric": subject.metric,
        "data": subject.facts(),
        "config": {"student": model.student.config.to_dict(), "teacher": None},
        "phases": [phase_settings(arguments)],
        **({"lora": dataclasses.asdict(lora)} if lora is not None else {}),
        "seed": run.seed,
        **run_facts(num_threads, arguments),
    }
    print(f"\n{results_table(results)}\n")
    plot_curves([("bptt", result.log_history)], output_dir / "curves.png")
    adapter = Path(str(arguments.output_dir)) / "adapter"
    if adapter.exists():
        shutil.copytree(adapter, output_dir / "adapter", dirs_exist_ok=True)
    export_student(model.student, tokenizer, output_dir / "student")
    write_card(output_dir / "student", model.student, results)
    write_json(results, output_dir / RESULTS)
    print(f"written to {output_dir}: {', '.join(sorted(path.name for path in output_dir.iterdir()))}")
    if pushed is not None:
        print(publish_student(output_dir / "student", pushed, arguments, f"Fine-tuned from {results['base_model']}"))
    return results


def _digest(parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def load_checkpoint(checkpoint: str):
    """Student and tokenizer of a folder or a Hub repository.

    Raises:
        ValueError: there is none, or it is of another model.
    """
    try:
        config = AutoConfig.from_pretrained(checkpoint)
        if config.model_type == SMTPreTrainingConfig.model_type:
            raise ValueError("it holds student and teacher: give the `student` folder inside it.")
        if config.model_type != SMTRecurrentConfig.model_type:
            raise ValueError(f"it is a {config.model_type}, not a {SMTRecurrentConfig.model_type}.")
        student, report = SMTRecurrentForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no checkpoint could be loaded from {checkpoint!r}: give a `student` folder, or a Hub repository that "
            f"holds one. ({error})"
        ) from error
    wrong = {name: sorted(map(str, keys)) for name, keys in report.items() if keys}
    if wrong:
        raise ValueError(f"{checkpoint!r} does not hold the weights of its configuration: {wrong}.")
    return student, tokenizer


def _subject(run: FinetuneArguments, arguments: FinetuneTrainingArguments, tokenizer) -> Subject:
    table = load_table(str(run.train_file))
    if table is not None and holds_instructions(table.column_names):
        return InstructionSubject(str(run.train_file), run.validation_file, tokenizer, arguments.context_length)
    return TextSubject(
        [arguments],
        run.seed,
        run.train_file,
        run.validation_file,
        text_column=run.text_column,
        tokenizer_name=str(run.checkpoint),
    )


def _scores(scores: dict) -> dict:
    return {name: value for name, value in scores["student"].items() if name != "losses"}


def _name_of(checkpoint: str) -> str:
    """The repository's name, or the last part of a folder: cards say nothing of the machine that they are made on."""
    return Path(checkpoint).resolve().name if Path(checkpoint).exists() else checkpoint


def parse_finetune(argv: list[str]) -> tuple[FinetuneArguments, FinetuneTrainingArguments]:
    """All settings of a fine-tuning from its command line.

    Raises:
        ValueError: as `parse_run`.
        SystemExit: after `--help`.
    """
    if "--help" in argv or "-h" in argv:
        own = new_fields(FinetuneTrainingArguments, TrainingArguments)
        lines = ["usage: accelerate launch recipes/finetune.py --checkpoint DIR_OR_REPO --train_file FILE [--flag ...]"]
        lines += ["", "the run:", *described(FinetuneArguments, "", {}), "", "the training:"]
        lines += [*described(FinetuneTrainingArguments, "", {}, own)]
        print("\n".join([*lines, "", "Every other field of transformers' TrainingArguments is a flag too."]))
        raise SystemExit(0)
    flags = read_flags(argv)
    given = {**(read_yaml(str(flags["config"])) if "config" in flags else {}), **flags}
    of_run, of_training = names_of(FinetuneArguments), names_of(FinetuneTrainingArguments) - HIDDEN
    if "num_train_epochs" in given:
        raise ValueError("a fine-tuning counts steps, not epochs: set `max_steps`.")
    check_keys(given, of_run | of_training, "argument")
    check_values(given, FinetuneArguments)
    run = built(FinetuneArguments, {key: value for key, value in given.items() if key in of_run})
    settings = {key: value for key, value in given.items() if key in of_training}
    if "context_length" in settings and "transition_steps" not in settings:
        length = whole_number("context_length", settings["context_length"])
        default = FinetuneTrainingArguments.transition_steps
        settings["transition_steps"] = next((k for k in range(min(default, length), 0, -1) if length % k == 0), 1)
    return run, built_phase(FinetuneTrainingArguments, {**settings, "seed": run.seed})

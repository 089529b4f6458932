"""Supervised fine-tuning of a checkpoint on a text or on instructions: what `recipes/finetune.py` runs."""

import contextlib
import dataclasses
import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.utils import logging

from smt_hf.command_line import argument, built, check_keys, described, names_of, read_layers, whole_number
from smt_hf.data import collate
from smt_hf.data.files import load_table, name_of_files
from smt_hf.data.instructions import check_columns, holds_instructions, tokenize_instructions
from smt_hf.errors import InputError
from smt_hf.evaluation import Scores
from smt_hf.evaluation.text import count_bytes, uniform_bits
from smt_hf.publishing.export import export_student, write_card, write_json
from smt_hf.publishing.figures import plot_curves
from smt_hf.publishing.model_card import license_of
from smt_hf.publishing.provenance import run_facts
from smt_hf.publishing.scores import results_table
from smt_hf.student import SMTRecurrentConfig, SMTRecurrentForCausalLM
from smt_hf.training.arguments import BPTTTrainingArguments
from smt_hf.training.composite import SMTForPreTraining, SMTPreTrainingConfig
from smt_hf.training.phases import PhaseResult, apply_required, lay_out, run_phases

from .composition import cost_of, launch_settings, phase_settings, set_threads, tokenizer_hash
from .pretraining import check_trackers, lora_settings, publish_student, pushed_repository
from .run_arguments import HIDDEN, built_phase, new_fields
from .run_folder import RESULTS, RunArguments, check_output_dir, writing
from .subjects import Subject, TextSubject, refuse_curriculum


@dataclass
class FinetuneArguments(RunArguments):
    """Arguments of the whole run; those of the training are `FinetuneTrainingArguments`."""

    checkpoint: str | None = argument(None, "Folder or Hub name of an SMTRecurrentForCausalLM.")
    train_file: list[str] | None = argument(
        None, "Text, or tables (json, jsonl, csv, tsv, parquet) of `text`, `messages`, or `prompt` and `completion`."
    )
    validation_file: list[str] | None = argument(None, "Held-out files of that kind; default: a tenth of `train_file`.")
    text_column: str = argument("text", "Column of a table that holds the text.", is_text=True)
    output_dir: str = argument("runs/finetune", "Folder for everything that the run writes.")
    use_peft: bool = argument(False, "Train LoRA layers only: `adapter/` holds them, and `student/` the merged model.")
    resume_from_checkpoint: bool = argument(False, "Continue from the newest complete checkpoint of the run.")


@dataclass
class FinetuneTrainingArguments(BPTTTrainingArguments):
    """Backpropagation through time on a model that has been trained before."""

    learning_rate: float = argument(1e-3, "Peak learning rate. Not searched.")
    max_steps: int = argument(300, "Optimiser steps. Not searched.")
    per_device_train_batch_size: int = argument(16, "Streams, or examples, per device. Not searched.")
    transition_steps: int = argument(64, "Transitions that a gradient crosses. Not searched.")
    context_length: int = argument(512, "Transitions per row of text. Longer instructions are left out. Not searched.")
    continue_previous_phase: bool = argument(False, "Has no effect: a fine-tuning has one phase.")


class InstructionSubject(Subject):
    """Examples whose answers are learned and scored, in bits per byte of the answers.

    Args:
        train, heldout: tables of `messages`, or of `prompt` and `completion`, with the places of their rows; without
            `heldout`, every tenth example of `train` that has an answer and is not too long.
        file_name: of the training file, for results and cards.
        context_length: examples with more transitions are left out.

    Raises:
        InputError: as `tokenize_instructions`, or fewer than ten examples to hold some out from.
    """

    metric = "bits_per_byte"
    name = "instructions"

    def __init__(self, train: list, heldout: list | None, file_name: str, tokenizer, context_length: int):
        self.tokenizer, self.vocab_size, self.difficulty = tokenizer, len(tokenizer), context_length
        self.chance, self.file_name = uniform_bits(), file_name
        parts = [tokenize_instructions(part, tokenizer, context_length + 1) for part in (train, heldout) if part]
        self.digest = "-".join(part.digest for part in parts)
        self.without_answer = [place for part in parts for place in part.without_answer]
        self.too_long = [place for part in parts for place in part.too_long]
        self.train, scored = parts[0].rows, parts[-1].rows
        if heldout is None:
            num = len(self.train)
            if num < 10:
                raise InputError(f"{file_name} has {num} examples to learn: give ten or more, or a `validation_file`.")
            scored = self.train.select(range(3, num, 10))
            self.train = self.train.select([index for index in range(num) if index % 10 != 3])
        batch = collate(list(scored))
        self.heldout = batch["input_ids"].numpy(), batch["labels"].numpy()
        answers = [[token for token in labels if token != -100] for labels in scored["labels"]]
        self.num_bytes = sum(count_bytes(tokenizer, np.array([tokens])) for tokens in answers)
        self.eval_rows = scored.select(range(min(128, len(scored))))

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
        lines = [f"{self.file_name}: {len(self.train):,} examples, {len(self.heldout[0]):,} held out"]
        for places, reason in ((self.without_answer, "no answer"), (self.too_long, "too many tokens")):
            if places:
                more = ", ..." if len(places) > 5 else ""
                lines.append(f"left out {len(places):,} with {reason}: {', '.join(places[:5])}{more}")
        return "\n".join(lines)


def finetune(run: FinetuneArguments, arguments: FinetuneTrainingArguments) -> dict:
    """Load, train, score before and after, export. Everything that can be wrong is found before anything is written.

    Returns:
        The content of `eval_results.json`: arms `checkpoint` and `finetuned`.

    Raises:
        InputError: bad input, with the way to fix it.
    """
    if not run.checkpoint or not run.train_file:
        raise InputError("name what to fine-tune and on what: `--checkpoint DIR_OR_REPO --train_file FILE`.")
    lora = lora_settings(run)
    repository = pushed_repository([arguments])
    check_output_dir(run)
    check_trackers([arguments])
    logging.disable_progress_bar()
    num_threads = set_threads(run.num_threads)
    lay_out([arguments], run.output_dir)
    set_seed(run.seed)
    student, tokenizer = load_checkpoint(run.checkpoint)
    licence = run.license or license_of(run.checkpoint)
    if run.overwrite_output_dir and Path(run.checkpoint).resolve().is_relative_to(Path(run.output_dir).resolve()):
        raise InputError("`overwrite_output_dir` would remove the checkpoint, which is inside it: name another folder.")
    student = student.float()  # a checkpoint may be in bfloat16; training needs float32
    with arguments.main_process_first(desc="preparing the data"):
        subject = _subject(run, arguments, tokenizer)
    changes = apply_required(arguments, subject.required(arguments))
    if subject.vocab_size > student.config.vocab_size:
        raise InputError(
            f"the tokenizer has {subject.vocab_size} tokens and the model knows {student.config.vocab_size}: call "
            "`model.resize_token_embeddings(len(tokenizer))` and save both first."
        )
    is_main, output_dir = arguments.process_index == 0, Path(run.output_dir)
    with contextlib.ExitStack() as stack:
        if is_main:
            print("\n".join([*changes, subject.describe()]))
            print(f"{run.checkpoint}: {student.num_parameters():,} parameters; {num_threads} threads", flush=True)
            stack.enter_context(writing(run, _settings(run, arguments, student, subject)))
        PartialState().wait_for_everyone()  # an old run's folders are gone before a process looks into them
        model = SMTForPreTraining.from_student(student)
        before = _scores(subject.evaluate(model.eval(), arguments))
        resume, layers = run.resume_from_checkpoint, {"bptt": lora} if lora is not None else None
        (result,) = run_phases(
            model, [arguments], subject.rows, subject.eval_rows, tokenizer, subject.evaluate, resume, layers
        )
        if not is_main:
            return {}
        config = {
            name: value for name, value in result.model.student.config.to_dict().items() if name != "_name_or_path"
        }
        results = {
            "arms": {"checkpoint": before, "finetuned": {**_scores(result.scores), **cost_of(result)}},
            "student_arm": "finetuned",
            # The last part of a folder: cards say nothing of the machine that they are made on.
            "base_model": Path(run.checkpoint).resolve().name if Path(run.checkpoint).exists() else run.checkpoint,
            "task": {"name": subject.name, "difficulty": subject.difficulty, "chance": subject.chance},
            "metric": subject.metric,
            "data": {**subject.facts(), "tokenizer_hash": tokenizer_hash(tokenizer)},
            "config": {"student": config, "teacher": None},
            "phases": [phase_settings(arguments)],
            **({"lora": dataclasses.asdict(lora)} if lora is not None else {}),
            **({"license": licence} if licence is not None else {}),
            "seed": run.seed,
            **run_facts(num_threads, arguments),
        }
        _write(output_dir, result, tokenizer, results)
        if repository is not None:
            message = f"Fine-tuned from {results['base_model']}"
            print(publish_student(output_dir / "student", repository, arguments, message))
    return results


def _settings(run: FinetuneArguments, arguments: FinetuneTrainingArguments, student, subject: Subject) -> dict:
    """Everything that changes what a run trains: a resumed run must have the same."""
    weights, lora = hashlib.sha256(), lora_settings(run)
    for value in student.state_dict().values():
        weights.update(value.numpy().tobytes())
    return {
        "weights": weights.hexdigest()[:16],
        "data_hash": subject.facts()["hash"],
        "tokenizer_hash": tokenizer_hash(subject.tokenizer),
        "chat_template": subject.tokenizer.chat_template,
        "lora": None if lora is None else dataclasses.asdict(lora),
        "training": phase_settings(arguments),
        **launch_settings(arguments),
        "seed": run.seed,
    }


def _write(output_dir: Path, result: PhaseResult, tokenizer, results: dict) -> None:
    """Export the student first, so that a failure in a figure loses no training."""
    export_student(result.model.student, tokenizer, output_dir / "student")
    adapter = Path(str(result.arguments.output_dir)) / "adapter"
    if adapter.exists():
        shutil.copytree(adapter, output_dir / "adapter", dirs_exist_ok=True)
    print(f"\n{results_table(results)}\n")
    plot_curves([("bptt", result.log_history)], output_dir / "curves.png")
    write_card(output_dir / "student", result.model.student, results)
    write_json(results, output_dir / RESULTS)
    print(f"written to {output_dir}: {', '.join(sorted(path.name for path in output_dir.glob('[!.]*')))}")


def load_checkpoint(checkpoint: str) -> tuple[SMTRecurrentForCausalLM, PreTrainedTokenizerBase]:
    """Student and tokenizer of a folder or a Hub repository.

    Raises:
        InputError: there is none, it is damaged, or it is of another model.
    """
    try:
        config = AutoConfig.from_pretrained(checkpoint)
        if config.model_type == SMTPreTrainingConfig.model_type:
            raise InputError("it holds student and teacher: give the `student` folder inside it.")
        if config.model_type != SMTRecurrentConfig.model_type:
            raise InputError(f"it is a {config.model_type}, not a {SMTRecurrentConfig.model_type}.")
        student, report = SMTRecurrentForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except Exception as error:  # of a damaged file the readers of JSON, safetensors and tokenizers raise their own
        raise InputError(
            f"no checkpoint could be loaded from {checkpoint!r}: give a complete `student` folder, or a Hub repository "
            f"that holds one. ({type(error).__name__}: {str(error).strip()})"
        ) from error
    wrong = {name: sorted(map(str, keys)) for name, keys in report.items() if keys}
    if wrong:
        raise InputError(f"{checkpoint!r} does not hold the weights of its configuration: {wrong}.")
    return student, tokenizer


def _subject(run: FinetuneArguments, arguments: FinetuneTrainingArguments, tokenizer) -> Subject:
    train_file: Any = run.train_file  # `finetune` has checked that there is one
    first = load_table(train_file, num_rows=1)
    columns = first[0][1] if first else {run.text_column: ""}
    check_columns(columns, run.text_column)
    if run.text_column in columns and (run.text_column != "text" or not holds_instructions(columns)):
        files = {"train_file": train_file, "validation_file": run.validation_file, "text_column": run.text_column}
        return TextSubject([arguments], run.seed, tokenizer_name=str(run.checkpoint), **files)
    heldout = load_table(run.validation_file) if run.validation_file else None
    if run.validation_file and not heldout:
        raise InputError("`train_file` holds instructions, `validation_file` holds none: give instructions in both.")
    examples = load_table(train_file) or []
    return InstructionSubject(examples, heldout, name_of_files(train_file), tokenizer, arguments.context_length)


def _scores(scores: dict) -> dict:
    return {name: value for name, value in scores["student"].items() if name != "losses"}


def parse_finetune(argv: list[str]) -> tuple[FinetuneArguments, FinetuneTrainingArguments]:
    """All settings of a fine-tuning from its command line.

    Raises:
        InputError: as `parse_run`, or a flag that has no effect.
        SystemExit: after `--help`.
    """
    of_run, of_training = names_of(FinetuneArguments), names_of(FinetuneTrainingArguments) - HIDDEN
    given: dict[str, Any] = {}
    for layer in read_layers(argv, _help_text):
        if "num_train_epochs" in layer:
            raise InputError("a fine-tuning counts steps, not epochs: set `max_steps`.")
        check_keys(layer, of_run | of_training, "argument")
        given |= layer
    run = built(FinetuneArguments, {key: value for key, value in given.items() if key in of_run})
    unused = sorted(key for key in given if key.startswith("lora_"))
    if unused and not run.use_peft:
        raise InputError(f"`{unused[0]}` has no effect without `use_peft`: set it, or leave `{unused[0]}` out.")
    settings = {key: value for key, value in given.items() if key in of_training}
    if "context_length" in settings and "transition_steps" not in settings:
        length = whole_number("context_length", settings["context_length"])
        default = FinetuneTrainingArguments.transition_steps
        settings["transition_steps"] = next((k for k in range(min(default, length), 0, -1) if length % k == 0), 1)
    return run, built_phase(FinetuneTrainingArguments, {**settings, "seed": run.seed})


def _help_text() -> str:
    lines = ["usage: accelerate launch recipes/finetune.py --checkpoint DIR_OR_REPO --train_file FILE [--flag ...]"]
    lines += ["", "the run:", *described(FinetuneArguments), "", "the training:"]
    lines += described(FinetuneTrainingArguments, names=new_fields(FinetuneTrainingArguments, TrainingArguments))
    return "\n".join([*lines, "", "Every other field of transformers' TrainingArguments is a flag too."])

"""Pretraining on text from end to end: what `recipes/pretrain.py` runs."""

import copy
import dataclasses
import json
import math
import os
import re
import shutil
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from transformers import AutoTokenizer, TextStreamer, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import logging

from smt_hf.data import byte_tokenizer, heldout_streams, load_corpus, pack, tokenize
from smt_hf.evaluation import NGramModel, StreamScores, score_student, score_teacher
from smt_hf.evaluation.ngram import document_symbols, stream_symbols, uniform_bits
from smt_hf.evaluation.streams import count_bytes
from smt_hf.publishing.export import append_evidence, export_student, export_teacher, write_json
from smt_hf.publishing.figures import plot_curves, plot_loss_by_position
from smt_hf.publishing.provenance import run_facts
from smt_hf.student import SMTRecurrentConfig
from smt_hf.teachers import SMTTeacherConfig
from smt_hf.training.arguments import BPTTTrainingArguments, PhaseArguments
from smt_hf.training.phases import PhaseResult, arm_name, check_named_checkpoint, lay_out, run_phases
from smt_hf.training.pretraining import SMTForPreTraining, SMTPreTrainingConfig
from smt_hf.training.trainers import BPTTTrainer

_RESULTS = "eval_results.json"
_RUN = "run.json"
_WRITTEN = ("student", "teacher", "compare_bptt", _RESULTS, _RUN, "curves.png", "loss_by_position.png")
# Settings that a resumed run may change: they say what is written down, not what is trained.
_MAY_CHANGE = {"logging_steps", "save_total_limit", "per_device_eval_batch_size", "logging_nan_inf_filter"}
_EVAL_ROW, _EVAL_ROWS = 128, 32
# Held-out streams are as long as 8 training rows, so that memories older than any row are scored; the upper bound keeps
# evaluation within seconds.
_STREAMS, _SHORTEST_STREAM, _LONGEST_STREAM = 64, 1024, 8192


def _argument(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class PretrainArguments:
    """What concerns the whole run. Phases, student and teacher have their own arguments."""

    config: str | None = _argument(None, "YAML file with any of these arguments; flags beat it.")
    output_dir: str = _argument("runs/pretrain", "Folder for everything that the run writes.")
    phases: str = _argument("smt,bptt", "Any sequence of smt, dmt and bptt, joined by commas.")
    train_file: str | None = _argument(None, "Text file, folder, glob, or json / jsonl / csv / parquet.")
    validation_file: str | None = _argument(None, "Held-out text; default: a tenth of the training text.")
    dataset_name: str | None = _argument(None, "Dataset of the Hub, or a local one that `datasets` knows.")
    dataset_config_name: str | None = _argument(None, "Its configuration.")
    text_column: str = _argument("text", "Column of the dataset that holds the text.")
    tokenizer_name: str | None = _argument(None, "Any Hugging Face tokenizer; default: one token a byte.")
    document_start_fraction: float = _argument(0.05, "Share of rows that start where a document starts. Ours.")
    evidence_file: str | None = _argument(None, "JSON lines file to which the run appends a line an arm.")
    compare_bptt: bool = _argument(False, "Also train the same student by BPTT for the same measured seconds.")
    seed: int = _argument(0, "Of everything random.")
    overwrite_output_dir: bool = _argument(False, "Remove what an earlier run left in `output_dir`.")
    resume_from_checkpoint: str | None = _argument(
        None, "Without a value: go on from the run's newest complete checkpoint. With one: from that checkpoint."
    )
    num_threads: int | None = _argument(None, "CPU threads of this process; default: cores / local processes.")


def pretrain(
    run: PretrainArguments,
    phases: list[PhaseArguments],
    student_fields: dict[str, Any],
    teacher_fields: dict[str, Any],
    rival: BPTTTrainingArguments | None = None,
) -> dict:
    """Train, evaluate, export. Everything that can be wrong with the input is found before anything is written.

    Args:
        run, phases: arguments.
        student_fields, teacher_fields: fields of the two configurations that differ from their defaults.
        rival: arguments of `compare_bptt`; its steps are set from the seconds of the pipeline.

    Returns:
        The content of `eval_results.json`.

    Raises:
        ValueError: bad input, with the way to mend it.
    """
    output_dir = Path(run.output_dir)
    _check_output_dir(run, output_dir)
    resume = True if run.resume_from_checkpoint in ("True", "true") else run.resume_from_checkpoint or None
    lay_out(phases, str(output_dir))
    if isinstance(resume, str):
        check_named_checkpoint(phases, resume)
    elif resume and (output_dir / _RESULTS).exists():
        results = json.loads((output_dir / _RESULTS).read_text())
        if rival is None or arm_name([rival]) in results["arms"]:
            print(f"{output_dir} is finished already, with the arguments in {_RUN}:\n{results_table(results)}")
            return results
    logging.disable_progress_bar()  # of saving; the phases have their own
    num_threads = _set_threads(run.num_threads)
    is_main = phases[0].process_index == 0
    if rival is not None and arm_name(phases) == arm_name([rival]):
        warnings.warn("the pipeline is BPTT itself: there is nothing to compare it with.", stacklevel=2)
        rival = None
    with phases[0].main_process_first(desc="preparing the data"):
        text = _Text(run, phases, rival)
    config = _model_config(text.tokenizer, phases, student_fields, teacher_fields)
    _remember(run, output_dir, config, phases, text.corpus.digest, is_main)
    if isinstance(resume, str) and is_main:
        # What is trained anew must not look finished if it is cut off again.
        (output_dir / _RESULTS).unlink(missing_ok=True)
        shutil.rmtree(output_dir / "compare_bptt", ignore_errors=True)
    set_seed(run.seed)
    model = SMTForPreTraining(config)
    for arguments in phases:
        _evaluate_ten_times(arguments)
    if is_main and phases[0].phase == "dmt":
        warnings.warn(
            "the first phase is dmt: the student will imitate a teacher that was never trained.", stacklevel=2
        )
    if is_main:
        parts = {"student": model.student, "teacher": model.teacher}
        sizes = [f"{part} {sum(p.numel() for p in module.parameters()):,}" for part, module in parts.items() if module]
        print(
            f"{text.corpus.name}: {text.num_train_tokens:,} training tokens, {len(text.corpus.train)} documents, hash "
            f"{text.corpus.digest}\nparameters: {', '.join(sizes)}; {num_threads} threads; pipeline {arm_name(phases)}"
        )
    arms: dict[str, dict] = {}
    histories: list[tuple[str, list[dict]]] = []
    curves: dict[str, np.ndarray] = {}
    spent = {"wall_clock_s": 0.0, "sequential_steps": 0, "tokens": 0}
    for result in run_phases(model, phases, text.rows, text.eval_rows, text.tokenizer, text.evaluate, resume):
        spent = {
            "wall_clock_s": spent["wall_clock_s"] + result.seconds,
            "sequential_steps": spent["sequential_steps"] + result.sequential_steps,
            "tokens": spent["tokens"] + result.tokens,
        }
        histories.append((result.arguments.phase, result.log_history))
        for arm, scores in result.scores.items():
            name = result.arm if arm == "student" else arm
            curves[name] = np.array(scores["losses"]) / text.bytes_per_token
            arms[name] = {**{key: value for key, value in scores.items() if key != "losses"}, **spent}
            if not math.isfinite(scores["bits_per_byte"]):
                raise RuntimeError(
                    f"{name} has diverged (loss {scores['bits_per_byte']}): lower "
                    f"`{result.arguments.phase}_learning_rate`. Its log is in {result.arguments.output_dir}."
                )
    student_arm = arm_name(phases)
    if rival is not None:
        name, scores = _train_rival(run, rival, config, text, spent["wall_clock_s"])
        if is_main:
            curves[name] = np.array(scores.pop("losses")) / text.bytes_per_token
            arms[name] = scores
    if not is_main:
        return {}
    ngram_bits = text.ngram_bits()
    arms |= {name: {"bits_per_byte": bits} for name, bits in ngram_bits.items()}
    facts = run_facts(num_threads, phases[0])
    results = {
        "arms": arms,
        "student_arm": student_arm,
        "task": {"name": "text", "difficulty": text.streams.shape[1] - 1, "chance": uniform_bits()},
        "data": {
            "name": text.corpus.name,
            "hash": text.corpus.digest,
            "training_tokens": text.num_train_tokens,
            "heldout_tokens": int(text.streams[:, 1:].size),
            "heldout_streams": len(text.streams),
        },
        "config": config.to_dict(),
        "phases": [_settings(arguments) for arguments in phases],
        "seed": run.seed,
        **facts,
    }
    print(f"\n{results_table(results)}\n")
    results["sample"] = _sample(model.student, text)
    plot_curves(histories, output_dir / "curves.png")
    plot_loss_by_position(curves, ngram_bits, output_dir / "loss_by_position.png")
    if model.teacher is not None:
        export_teacher(model.teacher, text.tokenizer, output_dir / "teacher")
    export_student(model.student, text.tokenizer, output_dir / "student", results)
    write_json(results, output_dir / _RESULTS)
    if run.evidence_file:
        append_evidence(results, Path(run.evidence_file))
    print(f"\nwritten to {output_dir}: {', '.join(sorted(path.name for path in output_dir.iterdir()))}")
    return results


class _Text:
    """The corpus as rows for training and streams for evaluation."""

    def __init__(self, run: PretrainArguments, phases: list[PhaseArguments], rival: BPTTTrainingArguments | None):
        self.tokenizer = byte_tokenizer() if run.tokenizer_name is None else _tokenizer(run.tokenizer_name)
        self.corpus = load_corpus(
            run.train_file, run.validation_file, run.dataset_name, run.dataset_config_name, run.text_column
        )
        train, heldout = (tokenize(part, self.tokenizer) for part in (self.corpus.train, self.corpus.heldout))
        self.num_train_tokens = int(sum(len(row) for row in train.with_format("numpy")["input_ids"]))
        self._rows = {}
        lengths = {arguments.context_length for arguments in (*phases, *([rival] if rival else []))}
        for length in lengths:
            self._rows[length] = pack(train, length, run.document_start_fraction, run.seed)
        stream_length = min(max(_SHORTEST_STREAM, 8 * max(lengths)), _LONGEST_STREAM)
        self.streams = heldout_streams(heldout, _STREAMS, stream_length)
        self.num_bytes = count_bytes(self.tokenizer, self.streams[:, 1:])
        self.bytes_per_token = self.num_bytes / self.streams[:, 1:].size
        rows = heldout_streams(heldout, _EVAL_ROWS, _EVAL_ROW)
        self.eval_rows = [{"input_ids": row} for row in rows]

    def rows(self, arguments: PhaseArguments):
        return self._rows[arguments.context_length]

    def evaluate(self, model: SMTForPreTraining, arguments: PhaseArguments) -> dict:
        scores = {"student": _as_dict(score_student(model.student, self.streams, self.num_bytes))}
        if arguments.phase == "smt":  # later phases change the readout, or the memories it reads
            scores["teacher"] = _as_dict(score_teacher(model, self.streams, self.num_bytes))
        return scores

    def ngram_bits(self) -> dict[str, float]:
        model = NGramModel(document_symbols(self.corpus.train["text"][:]))
        sequences = stream_symbols(self.tokenizer, self.streams)
        return {f"ngram{context}": model.bits_per_byte(sequences, context) for context in (1, 2, 3)}


def _tokenizer(name: str):
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer could be loaded from {name!r}: {error}") from error


def _as_dict(scores: StreamScores) -> dict:
    return {
        "bits_per_byte": scores.bits_per_byte,
        "accuracy": scores.accuracy,
        "losses": [round(float(loss), 5) for loss in scores.losses],
    }


def _check_output_dir(run: PretrainArguments, output_dir: Path) -> None:
    if run.overwrite_output_dir and run.resume_from_checkpoint:
        raise ValueError("pass either `--overwrite_output_dir` or `--resume_from_checkpoint`, not both.")
    if output_dir.is_file():
        raise ValueError(f"`output_dir` {output_dir} is a file: name a folder.")
    if output_dir.is_dir() and any(output_dir.iterdir()):
        if not (run.overwrite_output_dir or run.resume_from_checkpoint):
            raise ValueError(
                f"`output_dir` {output_dir} is not empty: pass `--resume_from_checkpoint` to go on, "
                "`--overwrite_output_dir` to start over, or another folder."
            )
    elif run.resume_from_checkpoint:
        raise ValueError(f"there is no run to resume in {output_dir}.")


def _model_config(
    tokenizer, phases: list[PhaseArguments], student_fields: dict, teacher_fields: dict
) -> SMTPreTrainingConfig:
    fields = {"vocab_size": len(tokenizer), **student_fields}
    if fields["vocab_size"] < len(tokenizer):
        raise ValueError(
            f"`vocab_size` ({fields['vocab_size']}) is smaller than the tokenizer's ({len(tokenizer)}): leave it out."
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields.setdefault(name, getattr(tokenizer, name))
    student = SMTRecurrentConfig(**fields)
    if all(arguments.phase == "bptt" for arguments in phases):
        return SMTPreTrainingConfig(student=student)
    teacher = SMTTeacherConfig(
        **teacher_fields,
        vocab_size=student.vocab_size,
        num_memory_tokens=student.num_memory_tokens,
        memory_size=student.hidden_size,
    )
    return SMTPreTrainingConfig(student=student, teacher=teacher)


def _remember(
    run: PretrainArguments,
    output_dir: Path,
    config: SMTPreTrainingConfig,
    phases: list[PhaseArguments],
    corpus_digest: str,
    is_main: bool,
) -> None:
    """Clear the folder if asked to, note what the run trains, or check that a resumed run trains the same."""
    settings = {
        **{part: config.to_diff_dict().get(part) for part in ("student", "teacher")},
        "phases": [
            {name: value for name, value in _settings(arguments).items() if name not in _MAY_CHANGE}
            for arguments in phases
        ],
        "data_hash": corpus_digest,
        "document_start_fraction": run.document_start_fraction,
        "seed": run.seed,
    }
    path = output_dir / _RUN
    if run.resume_from_checkpoint:
        if not path.exists():
            raise ValueError(f"{output_dir} holds no run that could be resumed ({_RUN} is missing).")
        earlier, now = json.loads(path.read_text()), json.loads(json.dumps(settings))
        earlier, now = _flat(earlier), _flat(now)
        changed = [name for name in sorted(earlier.keys() | now) if earlier.get(name) != now.get(name)]
        if changed:
            differences = ", ".join(f"{name}: {earlier.get(name)} then, {now.get(name)} now" for name in changed)
            raise ValueError(
                f"the run in {output_dir} was started with other arguments ({differences}): resume it with the same."
            )
        return
    if not is_main:
        return
    if output_dir.is_dir() and run.overwrite_output_dir:
        for entry in output_dir.iterdir():
            if entry.name in _WRITTEN or re.fullmatch(r"(smt|dmt|bptt)(_\d+)?", entry.name):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(settings, path)


def _flat(settings, prefix: str = "") -> dict:
    """Nested settings under dotted names."""
    items = enumerate(settings) if isinstance(settings, list) else settings.items()
    flat: dict = {}
    for name, value in items:
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict | list) else {f"{prefix}{name}": value}
    return flat


def _set_threads(num_threads: int | None) -> int:
    """`accelerate launch` without a configuration exports OMP_NUM_THREADS=1, which would leave cores idle."""
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"`num_threads` must be at least 1, got {num_threads}.")
    if num_threads is None:
        given = int(os.environ.get("OMP_NUM_THREADS", "1"))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_threads = given if given > 1 else max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    torch.set_num_threads(num_threads)
    return num_threads


def _evaluate_ten_times(arguments: PhaseArguments) -> None:
    if arguments.eval_strategy == IntervalStrategy.NO and arguments.max_steps > 0:
        arguments.eval_strategy = IntervalStrategy.STEPS
        arguments.eval_steps = max(arguments.max_steps // 10, 1)


def _train_rival(run, rival: BPTTTrainingArguments, config: SMTPreTrainingConfig, text: _Text, seconds: float):
    """The same student, from the same seed, by BPTT for the same seconds. Steps from a short measurement before."""
    folder = Path(run.output_dir) / "compare_bptt"
    steps_file = folder / "steps.json"
    set_seed(run.seed)
    model = SMTForPreTraining(SMTPreTrainingConfig(student=config.to_dict()["student"]))
    if steps_file.exists():
        steps = json.loads(steps_file.read_text())["max_steps"]
    else:
        steps = _steps_for(seconds, rival, model, text)
    (rival.max_steps,) = broadcast_object_list([steps])  # every rank has measured its own
    if rival.process_index == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json({"max_steps": rival.max_steps}, steps_file)
    lay_out([rival], str(folder))
    _evaluate_ten_times(rival)
    resume = True if run.resume_from_checkpoint else None
    (result,) = run_phases(model, [rival], text.rows, text.eval_rows, text.tokenizer, text.evaluate, resume)
    return result.arm, {**result.scores.get("student", {}), **_cost(result)}


def _cost(result: PhaseResult) -> dict:
    return {
        "wall_clock_s": result.seconds,
        "sequential_steps": result.sequential_steps,
        "tokens": result.tokens,
    }


def _steps_for(seconds: float, rival: BPTTTrainingArguments, model: SMTForPreTraining, text: _Text) -> int:
    """Steps that take `seconds`, from the median of a few steps of a copy."""
    trial = copy.deepcopy(model).train()
    arguments = copy.copy(rival)
    arguments.max_steps, arguments.save_strategy = 40, SaveStrategy.NO
    arguments.logging_strategy, arguments.eval_strategy = IntervalStrategy.NO, IntervalStrategy.NO
    arguments.disable_tqdm = True
    with tempfile.TemporaryDirectory() as folder:
        arguments.output_dir = folder
        trainer = BPTTTrainer(trial, arguments, train_dataset=text.rows(rival))
        trainer.train()
    return max(int(seconds / float(np.median(trainer.cost.step_seconds[5:]))), 1)


def _settings(arguments: PhaseArguments) -> dict:
    names = {
        entry.name
        for kind in type(arguments).__mro__
        if issubclass(kind, PhaseArguments)
        for entry in dataclasses.fields(kind)
    }
    inherited = {entry.name for entry in dataclasses.fields(PhaseArguments.__mro__[1])} - set(
        PhaseArguments.__annotations__
    )
    values = {name: getattr(arguments, name) for name in sorted(names - inherited)}
    return {"phase": arguments.phase, **{name: getattr(value, "value", value) for name, value in values.items()}}


def results_table(results: dict) -> str:
    """The arms of `eval_results.json` as aligned lines, best last."""
    lines = [f"{'arm':<18}{'bits/byte':>11}{'accuracy':>10}{'seconds':>9}{'tokens':>13}{'sequential steps':>18}"]
    for arm, scores in sorted(results["arms"].items(), key=lambda entry: -entry[1]["bits_per_byte"]):
        accuracy, seconds = scores.get("accuracy"), scores.get("wall_clock_s")
        mark = " *" if arm == results["student_arm"] else ""
        lines.append(
            f"{arm + mark:<18}{scores['bits_per_byte']:>11.3f}"
            + (f"{accuracy:>10.1%}" if accuracy is not None else f"{'':>10}")
            + (
                f"{seconds:>9.0f}{scores['tokens']:>13,}{scores['sequential_steps']:>18,}"
                if seconds is not None
                else ""
            )
        )
    data = results["data"]
    lines.append(
        f"held out: {data['heldout_streams']} streams x {results['task']['difficulty']} tokens from m_0; "
        "* the exported student; teacher: the shared readout on the teacher's memories"
    )
    return "\n".join(line.rstrip() for line in lines)


@torch.inference_mode()
def _sample(student, text: _Text, prompt_tokens: int = 160, new_tokens: int = 240) -> dict:
    """Print a held-out prompt and stream its continuation."""
    prompt = torch.from_numpy(text.streams[len(text.streams) // 3, :prompt_tokens])[None].to(student.device)
    shown = text.tokenizer.decode(prompt[0])
    print(f"--- held-out prompt ---\n{shown}\n--- continuation ---", flush=True)
    set_seed(0)
    generated = student.generate(
        prompt,
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=0.7,
        streamer=TextStreamer(text.tokenizer, skip_prompt=True),
    )
    return {"prompt": shown, "continuation": text.tokenizer.decode(generated[0, prompt_tokens:])}

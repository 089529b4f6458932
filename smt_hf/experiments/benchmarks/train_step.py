"""What a full optimiser step costs (forward, backward, clipping, AdamW), and how much it supervises.

- **published**: SMT as published. A bidirectional teacher makes two labels a row, each from a window of its own
  (`context_length` tokens), and one transition a row is supervised. Losses: predictive, dynamics, uniformity.
- **smt**, **smt8**: ours. A causal teacher makes the labels of all prefixes in one pass and every transition of every
  row is supervised, by a gradient that crosses 1 or 8 transitions; all losses that are on by default.
- **smt8_compiled**: the same with the student's transition compiled by `torch.compile`.
- **bptt_truncated**, **bptt**: the yardstick without a teacher, in windows with a carried memory (a step a window) and
  over the whole row.

Student, rows, number of rows and context are equal, as are layers and width of the two teachers. Models, optimisers and
objectives are those of the phases' trainers, without what a Trainer does around a step.

Shapes: B rows, T transitions a row (`context_length`), K memory tokens, D width.
"""

import dataclasses
import gc
import math
import statistics
import tempfile
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, set_seed

from smt_hf.command_line import argument
from smt_hf.data import CarriedWindows, IndexedExamples, collate, heldout_streams, tokenize
from smt_hf.experiments.subjects import TextSubject
from smt_hf.student import SMTRecurrentConfig
from smt_hf.teachers import SMTTeacherConfig, SMTWindowedTeacherConfig
from smt_hf.training.arguments import BPTTTrainingArguments, PhaseArguments, SMTTrainingArguments
from smt_hf.training.composite import SMTForPreTraining, SMTPreTrainingConfig
from smt_hf.training.losses import next_token_loss
from smt_hf.training.pacing import now
from smt_hf.training.phases import TRAINERS
from smt_hf.training.rollout import rollout
from smt_hf.training.trainers import SMTTrainer

from .arguments import BenchmarkArguments
from .memory_wall import PeakMemory, in_a_fresh_process
from .peers import count_parameters, describe, load_student
from .results import facts

PUBLISHED = "published"
# Arm -> transitions that a gradient crosses.
OURS = {"smt": 1, "smt8": 8, "smt8_compiled": 8}
ARMS = (PUBLISHED, "smt", "smt8", "bptt_truncated", "bptt", "smt8_compiled")
_NUM_BATCHES = 4
_HELDOUT_BATCH = 256


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class TrainStepArguments(BenchmarkArguments):
    """Arms, sizes and how long. Of a `model` only the sizes are used: every arm starts from fresh weights."""

    arms: list[str] = argument(list(ARMS), f"Arms to measure, side by side; {PUBLISHED} is what others are held to.")
    context_length: int = argument(64, "Transitions a row, and tokens that a teacher sees. Paper: 256.")
    batch_size: int = argument(16, "Rows a step, of every arm. Paper: 128.")
    future_length: int = argument(8, "Tokens decoded from a memory. Paper: 64.")
    on_policy_fraction: float = argument(0.5, "Of smt and smt8: share of rows that start from own memories.")
    bptt_window: int = argument(16, "Transitions a window of bptt_truncated; divides `context_length`.")
    teacher_hidden_size: int | None = argument(None, "Width of both teachers; default: theirs. Paper: 256.")
    teacher_layers: int | None = argument(None, "Layers of both teachers; default: theirs. Paper: 8.")
    teacher_heads: int | None = argument(None, "Heads of both teachers; default: theirs. Paper: 8.")
    device: str = argument(_default_device, "cpu or cuda; default: cuda where there is one.")
    warmup_steps: int = argument(3, "Untimed steps of every arm.")
    steps: int = argument(10, "Timed steps of an arm in a repeat.")
    repeats: int = argument(7, "Repeats, each of which runs all arms; medians count.")
    memory_steps: int = argument(3, "Steps of an arm in a fresh process whose peak memory is read; 0: leave it out.")
    reach_seconds: float | None = argument(
        None, f"Train {PUBLISHED} for so many seconds, then ours until it is as good; default: leave it out."
    )
    reach_interval: float = argument(2.0, "Seconds of training between two looks at the held-out loss.")
    heldout_rows: int = argument(2048, "Held-out rows, of which the token after the last is predicted.")
    learning_rate: float = argument(4e-3, "Of ours, in training for `reach_seconds`.")
    published_learning_rates: list[float] = argument(
        [4e-3, 1e-3], f"Of {PUBLISHED}, which is trained once with each; the best one counts."
    )
    train_file: str | None = argument(None, "Text to train on; default: the embedded corpus.")

    def __post_init__(self):
        super().__post_init__()
        self.at_least_1("context_length", "batch_size", "future_length", "bptt_window")
        self.at_least_1("warmup_steps", "steps", "repeats", "heldout_rows")
        self.among("arms", ARMS)
        if PUBLISHED not in self.arms:
            raise ValueError(f"`arms` must contain {PUBLISHED}: the others are measured against it.")
        if self.device not in ("cpu", "cuda") or (self.device == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"`device` must be cpu, or cuda where there is one, got {self.device!r}.")
        if self.memory_steps < 0:
            raise ValueError(f"`memory_steps` must not be negative, got {self.memory_steps}.")
        if self.reach_interval <= 0 or (self.reach_seconds is not None and self.reach_seconds <= 0):
            raise ValueError("`reach_seconds` and `reach_interval` must be positive.")
        if min([self.learning_rate, *self.published_learning_rates], default=0) <= 0:
            raise ValueError("learning rates must be positive.")
        if self.context_length % self.bptt_window:
            raise ValueError(
                f"`bptt_window` ({self.bptt_window}) must divide `context_length` ({self.context_length})."
            )


def phase_of(arguments: TrainStepArguments, arm: str, folder: str, **fields) -> PhaseArguments:
    """The phase that an arm trains."""
    shared: dict[str, Any] = {
        "output_dir": folder,
        "seed": arguments.seed,
        "use_cpu": arguments.device == "cpu",
        "per_device_train_batch_size": arguments.batch_size,
        "context_length": arguments.context_length,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **fields,
    }
    if arm.startswith("bptt"):
        steps = arguments.bptt_window if arm == "bptt_truncated" else arguments.context_length
        return BPTTTrainingArguments(transition_steps=steps, **shared)
    shared["future_length"] = arguments.future_length
    if arm == PUBLISHED:
        return SMTTrainingArguments(
            transition_steps=1,
            num_supervised_transitions=1,
            teacher_weight=0.0,
            readout_weight=0.0,
            on_policy_fraction=0.0,
            **shared,
        )
    return SMTTrainingArguments(transition_steps=OURS[arm], on_policy_fraction=arguments.on_policy_fraction, **shared)


def build(arguments: TrainStepArguments, arm: str, config: SMTRecurrentConfig) -> SMTForPreTraining:
    """A fresh student, the same for all arms, with the arm's teacher."""
    set_seed(arguments.seed)
    if arm.startswith("bptt"):
        return SMTForPreTraining(SMTPreTrainingConfig(student=config.to_dict()))
    given = {
        "hidden_size": arguments.teacher_hidden_size,
        "num_hidden_layers": arguments.teacher_layers,
        "num_attention_heads": arguments.teacher_heads,
    }
    teacher: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if arm == PUBLISHED:
        teacher |= {"model_type": SMTWindowedTeacherConfig.model_type, "context_length": arguments.context_length}
    else:
        teacher |= {"model_type": SMTTeacherConfig.model_type, "sliding_window": arguments.context_length}
    return SMTForPreTraining(SMTPreTrainingConfig(student=config.to_dict(), teacher=teacher))


class Stepper:
    """Steps of one arm on random tokens, over a few batches again and again.

    Args:
        arguments: sizes.
        arm: which.
        config: of the student.
        folder: for the Trainer that makes the optimiser.
    """

    def __init__(self, arguments: TrainStepArguments, arm: str, config: SMTRecurrentConfig, folder: str):
        phase = phase_of(arguments, arm, folder)
        trainer = TRAINERS[phase.phase](model=build(arguments, arm, config), args=phase)
        self.model: SMTForPreTraining = trainer.model
        self.objective, self.max_grad_norm = trainer.objective, phase.max_grad_norm
        self.optimizer = trainer.create_optimizer()
        if arm.endswith("compiled"):
            self.model.student.model.updater.compile(dynamic=True)
        size, length = arguments.batch_size, arguments.context_length
        generator = torch.Generator().manual_seed(arguments.seed)
        tokens = torch.randint(config.vocab_size, (_NUM_BATCHES * size, length + 1), generator=generator)
        rows = [{"input_ids": row} for row in tokens.numpy()]
        num_batches = _NUM_BATCHES
        examples: IndexedExamples | CarriedWindows = IndexedExamples(rows)
        if arm == "bptt_truncated":
            num_batches = _NUM_BATCHES * length // arguments.bptt_window
            examples = CarriedWindows(rows, size, arguments.bptt_window, num_batches, arguments.seed)
        self.batches = []
        for index in range(num_batches):
            batch = collate([examples[index * size + place] for place in range(size)])
            self.batches.append({name: values.to(self.model.device) for name, values in batch.items()})
        self.num_steps = 0
        self.memory: torch.Tensor | None = None

    def step(self) -> int:
        """One optimiser step; the number of transitions that it supervised."""
        batch = dict(self.batches[self.num_steps % len(self.batches)])
        self.num_steps += 1
        is_fresh, is_carried = batch.pop("is_fresh", None), batch.pop("stream_ids", None) is not None
        if self.memory is not None and is_fresh is not None:
            batch["memory"] = self.memory.masked_fill(is_fresh[:, None, None], float("nan"))
        outputs = self.model(**batch, objective=self.objective)
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.memory = outputs.memory if is_carried else None
        return outputs.transitions


def peak_memory_mb(arguments: TrainStepArguments, arm: str) -> float | None:
    """Peak memory of a few steps in 1e6 bytes, to be called in a fresh process: parameters, gradients, optimiser and
    whatever a step keeps.

    On the CPU it is the growth of the process, `None` where Linux cannot say; on CUDA what torch has allocated.
    """
    torch.set_num_threads(arguments.num_threads)
    tiny = dataclasses.replace(
        arguments,
        model=None,
        hidden_size=8,
        num_hidden_layers=1,
        num_readout_layers=1,
        num_attention_heads=2,
        num_memory_tokens=1,
        batch_size=1,
        teacher_hidden_size=8,
        teacher_layers=1,
        teacher_heads=2,
    )
    with tempfile.TemporaryDirectory() as folder:
        # What torch loads and allocates once is not counted.
        Stepper(tiny, arm, load_student(tiny).config, folder).step()
        config = load_student(arguments).config
        gc.collect()
        memory = PeakMemory()
        stepper = Stepper(arguments, arm, config, folder)
        for _ in range(arguments.memory_steps):
            stepper.step()
        if arguments.device == "cuda":
            return torch.cuda.max_memory_allocated() / 1e6
        growth = memory.peak_growth()
        return None if growth is None else growth / 1e6


@torch.no_grad()
def heldout_losses(model: SMTForPreTraining, rows: torch.Tensor) -> tuple[float, float]:
    """Next-token loss (nats) of the shared readout after a full window, the same for any teacher.

    Args:
        model: student and teacher.
        rows: `(N, T + 1)`; T tokens are read, the last one is predicted.

    Returns:
        The loss on the teacher's memory of the T tokens, and on the student's own after T transitions from `m_0`.
    """
    assert model.teacher is not None
    sums = torch.zeros(2, dtype=torch.float64)
    position = torch.tensor([rows.shape[1] - 1], device=model.device)
    for part in rows.to(model.device).split(_HELDOUT_BATCH):
        inputs, targets = part[:, :-1], part[:, -1:]
        m_0 = model.student.model.start_memory()
        labels = model.teacher(inputs, position, m_0)
        own = rollout(model.student, m_0.expand(len(part), 1, -1, -1), inputs)[:, -1:]
        for index, memory in enumerate((labels, own)):
            sums[index] += next_token_loss(model.student.read_logits(memory), targets).double().sum().cpu()
    of_teacher, of_student = (sums / len(rows)).tolist()
    return of_teacher, of_student


class _Watch(TrainerCallback):
    """Looks at the held-out losses between steps, and ends the training where the teacher's is at the target."""

    def __init__(self, trainer: SMTTrainer, rows: torch.Tensor, interval: float, target: float | None, bar: tqdm):
        self.trainer, self.rows, self.interval, self.target, self.bar = trainer, rows, interval, target, bar
        self.curve: list[dict] = []
        self.next = interval

    def on_step_end(self, args, state, control, **kwargs):
        cost = self.trainer.cost
        self.bar.update(round(min(cost.seconds, self.bar.total), 2) - self.bar.n)
        if cost.seconds < self.next and not control.should_training_stop:
            return
        self.next = cost.seconds + self.interval
        loss, student_loss = heldout_losses(self.trainer.model, self.rows)
        self.bar.set_postfix(loss=f"{loss:.3f}", student_loss=f"{student_loss:.3f}", refresh=False)
        spent = {"seconds": cost.seconds, "steps": state.global_step, "transitions": cost.tokens}
        self.curve.append({**spent, "loss": loss, "student_loss": student_loss})
        if self.target is not None and loss <= self.target:
            control.should_training_stop = True


def train_until(
    arguments: TrainStepArguments,
    arm: str,
    config: SMTRecurrentConfig,
    subject: TextSubject,
    heldout: torch.Tensor,
    learning_rate: float,
    target: float | None,
) -> list[dict]:
    """Train an arm for `reach_seconds`, at most until the held-out loss is at the target.

    The learning-rate schedule spans `reach_seconds` whenever it ends, which is to the advantage of the arm that runs
    to its end.

    Returns:
        The held-out losses on the way: `seconds` (inside steps only), `steps`, `transitions`, `loss`, `student_loss`.
    """
    assert arguments.reach_seconds is not None
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=arguments.reach_seconds, unit="s", desc=f"{arm}, {learning_rate:g}", dynamic_ncols=True) as bar,
    ):
        phase = phase_of(
            arguments,
            arm,
            folder,
            max_seconds=arguments.reach_seconds,
            evaluates_by_seconds=False,
            learning_rate=learning_rate,
        )
        model = build(arguments, arm, config)
        trainer = SMTTrainer(model=model, args=phase, train_dataset=subject.rows(phase))
        watch = _Watch(trainer, heldout, arguments.reach_interval, target, bar)
        trainer.add_callback(watch)
        trainer.train()
        trainer.accelerator.free_memory()
    return watch.curve


def measure_reach(
    arguments: TrainStepArguments, config: SMTRecurrentConfig, subject: TextSubject, heldout: torch.Tensor
) -> dict[str, dict]:
    """Seconds to the loss that `published` has after `reach_seconds`, by arm.

    Returns:
        Arm -> fields of its line. `seconds_to_loss` is `None` where ours was not there within `reach_seconds`.
    """
    curves = {
        rate: train_until(arguments, PUBLISHED, config, subject, heldout, rate, None)
        for rate in arguments.published_learning_rates
    }
    ends = {rate: curve[-1]["loss"] for rate, curve in curves.items()}
    finite = {rate: loss for rate, loss in ends.items() if math.isfinite(loss)}
    if not finite:
        return {PUBLISHED: {"error": "diverged with every learning rate: there is no loss to reach"}}
    rate = min(finite, key=lambda rate: finite[rate])
    results = {PUBLISHED: _reached(curves[rate], rate, True) | {"loss_by_learning_rate": list(ends.items())}}
    for arm in (arm for arm in arguments.arms if arm in OURS and not arm.endswith("compiled")):
        curve = train_until(arguments, arm, config, subject, heldout, arguments.learning_rate, finite[rate])
        results[arm] = _reached(curve, arguments.learning_rate, curve[-1]["loss"] <= finite[rate])
    return results


def _reached(curve: list[dict], learning_rate: float, is_there: bool) -> dict:
    last = curve[-1]
    finite = {name: value if math.isfinite(value) else None for name, value in last.items()}
    return {
        "seconds_to_loss": last["seconds"] if is_there else None,
        "loss": finite["loss"],
        "student_loss": finite["student_loss"],
        "steps_to_loss": last["steps"] if is_there else None,
        "transitions_to_loss": last["transitions"] if is_there else None,
        "learning_rate": learning_rate,
        "curve": [point for point in curve if math.isfinite(point["loss"] + point["student_loss"])],
    }


def measure_train_step(arguments: TrainStepArguments) -> list[dict]:
    """Measure the arms, interleaved: every repeat runs all of them, so that they share what else the machine does.

    Returns:
        One line an arm: `transitions_per_second` (supervised ones), `milliseconds_per_step` (both medians over the
        repeats), `ratio_to_published` (of the transitions a second, median of the ratios within a repeat),
        `peak_memory_mb` (1e6 bytes, see `peak_memory_mb`; not of compiled arms on the CPU, whose compiler would count),
        `parameters` and `teacher_parameters`, `objective`, `error` (why an arm has no numbers: no compiler, not enough
        memory; else `None`). With `reach_seconds` also `seconds_to_loss`, `loss` (held out, of the readout on the
        teacher's memory) and `student_loss` (on the student's own) there, and the `curve` that leads there.

    Raises:
        ValueError: a vocabulary smaller than the text's.
    """
    torch.set_num_threads(arguments.num_threads)
    config = load_student(arguments).config
    subject = heldout = None
    if arguments.reach_seconds is not None:
        subject = TextSubject([phase_of(arguments, PUBLISHED, "unused")], arguments.seed, arguments.train_file)
        if config.vocab_size < subject.vocab_size:
            raise ValueError(f"`vocab_size` must be at least {subject.vocab_size}, the text's: leave it out.")
        rows = heldout_streams(
            tokenize(subject.corpus.heldout, subject.tokenizer), arguments.heldout_rows, arguments.context_length
        )
        heldout = torch.from_numpy(rows)
    errors: dict[str, str] = {}
    peaks = _peaks(arguments, errors) if arguments.memory_steps else {}
    with tempfile.TemporaryDirectory() as folder:
        steppers = {arm: Stepper(arguments, arm, config, folder) for arm in arguments.arms}
        for arm, stepper in steppers.items():
            parts = [f"student {count_parameters(stepper.model.student):,}"]
            if stepper.model.teacher is not None:
                parts.append(f"teacher {count_parameters(stepper.model.teacher):,}")
            print(f"{arm}: parameters of {', '.join(parts)}")
        seconds, transitions = _timed(arguments, steppers, errors)
    reached: dict[str, dict] = {}
    if subject is not None and heldout is not None:
        reached = measure_reach(arguments, config, subject, heldout)

    lines = []
    shared = {**facts(arguments.num_threads), "device": arguments.device}
    empty = dict.fromkeys(("seconds_to_loss", "loss", "student_loss"))
    speeds = {arm: [transitions[arm] / value for value in seconds[arm]] for arm in steppers}
    for arm, stepper in steppers.items():
        teacher = stepper.model.teacher
        ratios = [own / published for own, published in zip(speeds[arm], speeds[PUBLISHED])]
        lines.append(
            {
                "benchmark": "train_step",
                "arm": arm,
                "transitions_per_second": statistics.median(speeds[arm]) if speeds[arm] else None,
                "milliseconds_per_step": 1000 * statistics.median(seconds[arm]) if seconds[arm] else None,
                "transitions_per_step": transitions.get(arm),
                "ratio_to_published": statistics.median(ratios) if ratios else None,
                "peak_memory_mb": peaks.get(arm),
                "parameters": count_parameters(stepper.model.student),
                "teacher_parameters": None if teacher is None else count_parameters(teacher),
                "error": errors.get(arm),
                **empty,
                **reached.get(arm, {}),
                "reach_seconds": arguments.reach_seconds if arm in reached else None,
                "data_hash": subject.corpus.digest if subject is not None and arm in reached else None,
                "all_seconds_per_step": seconds[arm],
                "steps": arguments.steps,
                "repeats": arguments.repeats,
                "batch_size": arguments.batch_size,
                "context_length": arguments.context_length,
                "seed": arguments.seed,
                "sizes": describe(config),
                "teacher_sizes": None if teacher is None else describe(teacher.config),
                "objective": dataclasses.asdict(stepper.objective),
                **shared,
            }
        )
    return lines


def _peaks(arguments: TrainStepArguments, errors: dict[str, str]) -> dict[str, float | None]:
    """Arm -> peak memory; adds to `errors` the arms that do not fit."""
    peaks: dict[str, float | None] = {}
    arms = [arm for arm in arguments.arms if arguments.device == "cuda" or not arm.endswith("compiled")]
    for arm in tqdm(arms, unit="arm", desc="peak memory", dynamic_ncols=True):
        try:
            peaks[arm] = in_a_fresh_process(peak_memory_mb, arguments, arm)
        except Exception as error:
            _keep_or_raise(error, arm, errors)
    return peaks


def _timed(arguments: TrainStepArguments, steppers: dict[str, Stepper], errors: dict[str, str]):
    """Arm -> seconds a step in each repeat, and arm -> transitions a step. Arms with errors have none."""
    seconds: dict[str, list[float]] = {arm: [] for arm in steppers}
    transitions: dict[str, int] = {}
    total = len(steppers) * (arguments.warmup_steps + arguments.repeats * arguments.steps)
    with tqdm(total=total, unit="step", dynamic_ncols=True) as bar:
        for arm, stepper in steppers.items():
            bar.set_description(f"warm-up of {arm}", refresh=False)
            try:
                for _ in range(arguments.warmup_steps if arm not in errors else 0):
                    transitions[arm] = stepper.step()
            except Exception as error:
                _keep_or_raise(error, arm, errors)
            bar.update(arguments.warmup_steps)
        for _ in range(arguments.repeats):
            for arm, stepper in steppers.items():
                bar.set_description(arm, refresh=False)
                if arm not in errors:
                    begin = now()
                    for _ in range(arguments.steps):
                        stepper.step()
                    seconds[arm].append((now() - begin) / arguments.steps)
                bar.update(arguments.steps)
    return seconds, transitions


def _keep_or_raise(error: Exception, arm: str, errors: dict[str, str]) -> None:
    """Keep why an arm cannot be measured here. Without a compiler that works anything may be raised."""
    lacks_memory = isinstance(error, BrokenProcessPool | torch.OutOfMemoryError) or "allocate memory" in str(error)
    if not lacks_memory and not arm.endswith("compiled"):
        raise error
    errors[arm] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

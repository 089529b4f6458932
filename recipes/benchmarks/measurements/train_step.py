"""What a full optimiser step costs (forward, backward, clipping, AdamW), and how much it supervises.

Models, optimisers and objectives are those of the phases' trainers, without what a Trainer does around a step.

Shapes: B rows, T transitions per row (`context_length`), K memory tokens, D width.
"""

import dataclasses
import gc
import statistics
import tempfile
from concurrent.futures.process import BrokenProcessPool

import torch
from tqdm.auto import tqdm

from smt_hf.data import CarriedWindows, IndexedExamples, collate
from smt_hf.student import SMTRecurrentConfig
from smt_hf.training.composite import SMTForPreTraining
from smt_hf.training.pacing import now
from smt_hf.training.phases import TRAINERS

from .memory_wall import PeakMemory, in_a_fresh_process
from .peers import count_parameters, describe, load_student
from .results import facts
from .time_to_loss import NOT_REACHED, heldout_text, measure_time_to_loss
from .training_arms import PUBLISHED, TrainStepArguments, build, phase_of

_NUM_BATCHES = 4
_RECORDED = ("steps", "repeats", "batch_size", "context_length", "seed")


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


def measure_train_step(arguments: TrainStepArguments) -> list[dict]:
    """Measure the arms, interleaved: every repeat runs all of them, so that they share what else the machine does.

    Returns:
        One line per arm: `transitions_per_second` (supervised ones), `milliseconds_per_step` (both medians over the
        repeats), `ratio_to_published` (of the transitions per second, median of the ratios within a repeat),
        `peak_memory_mb` (1e6 bytes, see `peak_memory_mb`; not of compiled arms on the CPU, whose compiler would count),
        `parameters` and `teacher_parameters`, `objective`, `error` (why an arm has no numbers: no compiler, not enough
        memory; else `None`). With `reach_seconds` also `seconds_to_loss`, `loss` (held out, of the readout on the
        teacher's memory) and `student_loss` (on the student's own) there, and the `curve` that leads there.

    Raises:
        InputError: a vocabulary smaller than the text's.
    """
    torch.set_num_threads(arguments.num_threads)
    config = load_student(arguments).config
    text = None if arguments.reach_seconds is None else heldout_text(arguments, config)
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
    reached = {} if text is None else measure_time_to_loss(arguments, config, *text)
    speeds = {arm: [transitions[arm] / value for value in seconds[arm]] for arm in steppers}
    shared = {
        **{name: getattr(arguments, name) for name in _RECORDED},
        **{"sizes": describe(config), **facts(arguments.num_threads), "device": arguments.device},
    }
    lines = []
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
                **NOT_REACHED,
                **reached.get(arm, {}),
                "all_seconds_per_step": seconds[arm],
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
    """Arm -> seconds per step in each repeat, and arm -> transitions per step. Arms with errors have none."""
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

"""The pace of a phase: budget of seconds, curriculum, dynamics that wait for the teacher, and the progress bar."""

import time

import torch
from accelerate.utils import broadcast
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

# With a budget of seconds the learning-rate schedule counts milliseconds instead of steps.
VIRTUAL_STEPS_PER_SECOND = 1000
# Values of the log that the progress bar shows.
_SHOWN = ("loss", "readout", "dynamics", "predictive", "teacher", "teacher_readout", "eval_rollout", "eval_drift")


class _KeptState(TrainerCallback, ExportableState):
    """A callback whose attributes `kept` are in `trainer_state.json`, so that a resumed run goes on with them."""

    kept: tuple[str, ...]

    def state(self) -> dict:
        return {"args": {}, "attributes": {name: getattr(self, name) for name in self.kept}}

    def on_train_begin(self, args, state, control, **kwargs):
        # The Trainer's own way to do this needs an argument that is off by default.
        earlier = state.stateful_callbacks.get(type(self).__name__)
        for name, value in earlier["attributes"].items() if earlier else ():
            setattr(self, name, value)


class TrainingCost(_KeptState):
    """What the phase has cost so far, over interruptions: seconds inside steps (no evaluation, no saving),
    sequential transitions, transitions supervised, and steps left out because their gradient was not finite. Kept in
    `trainer_state.json`.

    Ends the phase when its `max_seconds` are used up, and evaluates `num_evaluations` times on the way there.
    """

    spent_of_a_phase = ("seconds", "sequential_steps", "tokens", "skipped_steps")
    kept = (*spent_of_a_phase, "skipped_in_a_row")
    num_evaluations = 10

    def __init__(self):
        self.seconds, self.sequential_steps, self.tokens = 0.0, 0, 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.step_seconds: list[float] = []
        self._started = 0.0

    def spent(self) -> dict[str, float]:
        """What a line of the log says of it."""
        names = self.spent_of_a_phase if self.skipped_steps else self.spent_of_a_phase[:-1]
        return {name: getattr(self, name) for name in names}

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = now()

    def on_step_end(self, args, state, control, **kwargs):
        before = self.seconds
        self.step_seconds.append(now() - self._started)
        self.seconds += self.step_seconds[-1]
        if not args.max_seconds:
            return
        if args.world_size > 1:  # all ranks stop at the same step
            self.seconds = float(broadcast(torch.tensor(self.seconds, dtype=torch.float64, device=args.device)))
        share = args.max_seconds / self.num_evaluations
        is_over = self.seconds >= args.max_seconds
        if args.evaluates_by_seconds and (is_over or int(before / share) < int(self.seconds / share)):
            control.should_evaluate = True
        if is_over:
            control.should_training_stop = True


def now() -> float:
    """Seconds, after all work of the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Pace(_KeptState):
    """Running losses that a phase is paced by, and the level of its curriculum. Kept in `trainer_state.json`.

    Args:
        num_levels: of the training data, easiest first.
        threshold: nats per label; below it the next level begins.
        first_level: index of the level to start with.

    Attributes:
        level: index of the level that is trained.
        own_loss: running mean of the student's own rollout, nats per label; in a phase that does not train the student,
            of the readout on the teacher's memories. A curriculum of the student that the *teacher* gated left the
            student at chance: the teacher reached the last level before the student had learned the first.
        teacher_loss: running mean of the readout on the teacher's memories; `None` before the first step.
    """

    kept = ("level", "own_loss", "teacher_loss")
    momentum = 0.9

    def __init__(self, num_levels: int = 1, threshold: float | None = None, first_level: int = 0):
        self.num_levels, self.threshold = num_levels, threshold
        self.level = min(first_level, num_levels - 1)
        self.own_loss: float | None = None
        self.teacher_loss: float | None = None

    def update(self, own_loss: float | None, teacher_loss: float | None) -> None:
        """Take in the losses of an optimiser step; `None` where it had none."""
        if teacher_loss is not None:
            earlier = teacher_loss if self.teacher_loss is None else self.teacher_loss
            self.teacher_loss = self.momentum * earlier + (1 - self.momentum) * teacher_loss
        if own_loss is None:
            return
        earlier = max(own_loss, 1.0) if self.own_loss is None else self.own_loss
        self.own_loss = self.momentum * earlier + (1 - self.momentum) * own_loss
        if self.threshold is not None and self.own_loss < self.threshold and self.level + 1 < self.num_levels:
            self.level += 1
            self.own_loss = None

    def dynamics_scale(self, starts_below: float | None, full_below: float | None, least: float = 0.05) -> float:
        """Factor on the dynamics terms: `least` while the teacher's loss is above `starts_below`, 1 below
        `full_below`, linear in between."""
        if starts_below is None or full_below is None:
            return 1.0
        if self.teacher_loss is None:
            return least
        share = (starts_below - self.teacher_loss) / max(starts_below - full_below, 1e-6)
        return min(max(share, least), 1.0)


def shifted_schedule(function, offset: int, cost: TrainingCost | None):
    """A learning-rate schedule from a later step on; with `cost`, by the seconds used.

    A plain function: the saved state of the scheduler holds the attributes of any other callable, and a checkpoint is
    read back with `weights_only=True`.
    """

    def rate(step: int) -> float:
        return function(offset + (step if cost is None else int(cost.seconds * VIRTUAL_STEPS_PER_SECOND)))

    return rate


class PhaseProgress(TrainerCallback):
    """One bar per phase: its name, the named losses of the last log lines, steps and time to go."""

    def __init__(self, phase: str):
        self.phase, self.bar = phase, None
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            total = None if args.max_seconds else state.max_steps
            self.bar = tqdm(total=total, initial=state.global_step, desc=self.phase, dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is None or logs is None:
            return
        self._shown |= {name.removeprefix("eval_"): f"{logs[name]:.3g}" for name in _SHOWN if name in logs}
        self.bar.set_postfix(self._shown, refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None

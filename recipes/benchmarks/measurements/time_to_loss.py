"""Seconds of training to an equal held-out loss, ours beside SMT as published."""

import math
import tempfile

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from smt_hf.data import heldout_streams, tokenize
from smt_hf.errors import InputError
from smt_hf.experiments.subjects import TextSubject
from smt_hf.student import SMTRecurrentConfig
from smt_hf.training.composite import SMTForPreTraining
from smt_hf.training.losses import next_token_loss
from smt_hf.training.rollout import rollout
from smt_hf.training.trainers import SMTTrainer

from .training_arms import OURS, PUBLISHED, TrainStepArguments, build, phase_of

_HELDOUT_BATCH = 256
# Fields of the line of an arm that was not trained.
NOT_REACHED = dict.fromkeys(("seconds_to_loss", "loss", "student_loss", "reach_seconds", "data_hash"))


def heldout_text(arguments: TrainStepArguments, config: SMTRecurrentConfig) -> tuple[TextSubject, torch.Tensor]:
    """The text to train on, and held-out rows `(N, T + 1)` of it.

    Raises:
        InputError: a vocabulary smaller than the text's.
    """
    subject = TextSubject([phase_of(arguments, PUBLISHED, "unused")], arguments.seed, arguments.train_file)
    if config.vocab_size < subject.vocab_size:
        raise InputError(f"`vocab_size` must be at least {subject.vocab_size}, the text's: leave it out.")
    heldout = tokenize(subject.corpus.heldout, subject.tokenizer)
    return subject, torch.from_numpy(heldout_streams(heldout, arguments.heldout_rows, arguments.context_length))


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


def measure_time_to_loss(
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
    shared = {"reach_seconds": arguments.reach_seconds, "data_hash": subject.corpus.digest}
    return {arm: {**result, **shared} for arm, result in results.items()}


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

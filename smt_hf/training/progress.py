"""The progress bar of a phase."""

from tqdm.auto import tqdm
from transformers import TrainerCallback

_SHOWN = ("loss", "readout", "dynamics", "predictive", "teacher", "eval_rollout", "eval_drift")


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
        if self._shown:
            self.bar.set_postfix(self._shown, refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None

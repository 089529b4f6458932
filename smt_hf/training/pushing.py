"""What a Trainer sends to the Hub: the student, which loads by itself, and never the state that resumes a run."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from smt_hf.upload import check_files, upload


@cache
def _background() -> HfApi:
    """The client whose one thread runs uploads after each other, so that two commits never meet."""
    return HfApi()


class StudentPushingTrainer(Trainer):
    """A Trainer whose `push_to_hub` and `hub_strategy` send the `student/` folder of what it saves.

    transformers would send the composite with `training_args.bin`, a pickle. The strategy `end` sends nothing during
    training and `every_save` sends the student at every save. `checkpoint` and `all_checkpoints` also keep a copy in a
    folder of the repository, named `last-checkpoint` or after phase and step. The state of optimiser and data stays
    local.
    """

    hub_model_id: str | None
    push_in_progress: Any

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        strategy, output_dir = self.args.hub_strategy, Path(str(self.args.output_dir))
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        is_pushing = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_pushing and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        # A copy: the checkpoint may be rotated away before it has been sent.
        copied = output_dir / "_pushed_student"
        if is_pushing:
            self._finish_current_push()
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(Path(checkpoint_folder) / "student", copied, symlinks=True)
        jobs = [self._upload(copied, message, run_as_future=True)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            own_place = f"{output_dir.name}-{Path(checkpoint_folder).name}"
            place = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else own_place
            jobs.append(self._upload(copied, f"{message}, checkpoint", place, run_as_future=True))
        self.push_in_progress = PushInProgress(jobs)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """Send the student with its code, tokenizer, card and last evaluation, in one commit.

        Args:
            kwargs: of `create_model_card`, as `license="apache-2.0"`.
            others: as in transformers.

        Returns:
            The commit, or a future of it if `blocking` is false; `None` on other processes than the first.

        Raises:
            InputError: the student's folder holds what must not be sent, or the Hub refuses the access token.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if private is not None:
            self.args.hub_private_repo = private  # `init_hf_repo` reads it there in every release
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)  # on all processes
        if not self.is_world_process_zero():
            return None
        name = kwargs.pop("model_name", None) or str(self.hub_model_id).split("/")[-1]
        self.create_model_card(model_name=name, **kwargs)
        folder = Path(str(self.args.output_dir)) / "student"
        card = ModelCard.load(Path(str(self.args.output_dir)) / "README.md")
        card.data.pipeline_tag = "text-generation"
        card.data.tags = [*(card.data.tags or []), "recurrent", "custom_code", *self._tag_names]
        card.save(folder / "README.md")
        evaluations = [line for line in self.state.log_history if "eval_loss" in line]
        if evaluations:
            (folder / "eval_results.json").write_text(json.dumps(evaluations[-1], indent=2) + "\n")
        self._finish_current_push()
        message = commit_message or "End of training"
        return self._upload(folder, message, run_as_future=not blocking, token=token, revision=revision)

    def _finish_current_push(self) -> None:
        """As in transformers; an upload that the Hub has refused raises its error here."""
        super()._finish_current_push()
        push, self.push_in_progress = getattr(self, "push_in_progress", None), None
        for job in push.jobs if push is not None else ():
            job.result()

    def _upload(self, folder: Path, message: str, place="", run_as_future=False, token=None, revision=None):
        what = (folder, check_files(folder), str(self.hub_model_id), message, place)
        settings = {"private": self.args.hub_private_repo, "revision": revision or self.args.hub_revision}
        settings["token"] = token or self.args.hub_token
        if run_as_future:
            return _background().run_as_future(upload, *what, **settings)
        return upload(*what, **settings)

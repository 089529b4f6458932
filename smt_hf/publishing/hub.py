"""A publication: an exported student with its card and results, sent to the Hub or listed without sending."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from yaml import YAMLError

from smt_hf.command_line import argument
from smt_hf.errors import InputError
from smt_hf.upload import LARGEST_FILE, check_hub_access, check_repo_id, find_problems, refuse, upload

_CARD_FIELDS = ("library_name", "pipeline_tag", "tags", "datasets", "model_name", "eval_results")


@dataclass(frozen=True)
class Publication:
    """What was sent, or would be."""

    repo_id: str
    files: dict[str, int]  # path in the repository -> bytes
    url: str | None = None  # of the commit; `None` after a dry run
    notes: tuple[str, ...] = ()  # what the publisher should know before a reader does, one sentence each

    def __str__(self) -> str:
        width = max(map(len, self.files))
        lines = [f"  {path:<{width}}  {size:>13,} bytes" for path, size in self.files.items()]
        total = f"{len(self.files)} files, {sum(self.files.values()):,} bytes"
        verb, end = ("would send", ". Nothing was sent.") if self.url is None else ("sent", f": {self.url}")
        return "\n".join([f"{verb} to {self.repo_id}:", *lines, *self.notes, f"{total}{end}"])


def check_folder(folder: str | Path, largest_file: int = LARGEST_FILE) -> dict[str, int]:
    """The files of an exported student, path in the repository -> bytes, if all of them may be published.

    Raises:
        InputError: every reason why not: what `find_problems` finds, a missing tokenizer, card or results, and a card
            without metadata or with other numbers than its results.
    """
    folder = Path(folder)
    files, problems = find_problems(folder, largest_file)
    needed = ("tokenizer_config.json", "eval_results.json", "README.md")
    problems += [f"{name} is missing: export the student by a recipe." for name in needed if name not in files]
    if "README.md" in files and not problems:
        problems = problems_of_card(folder)
    refuse(folder, problems)
    return files


def problems_of_card(folder: Path) -> list[str]:
    """What `folder/README.md` lacks, and where it differs from `folder/eval_results.json`."""
    try:
        card = ModelCard.load(folder / "README.md")
    except (ValueError, TypeError, YAMLError) as error:
        return [f"README.md has no valid metadata: {error}"]
    missing = [name for name in _CARD_FIELDS if not getattr(card.data, name, None)]
    problems = [f"README.md has no `{name}` in its metadata." for name in missing]
    results = json.loads((folder / "eval_results.json").read_bytes())
    if not isinstance(results, dict) or not {"arms", "student_arm"} <= results.keys():
        return [*problems, "eval_results.json is not that of a recipe: export the student by one."]
    scores = results["arms"][results["student_arm"]]
    long_contexts = {
        (entry["suite"], f"{entry['task']}-{entry['length']}-{entry['length_unit']}", entry["metric"]): entry["value"]
        for entry in results.get("long_contexts", [])
    }
    for metric in card.data.eval_results or []:
        value = scores.get(metric.metric_type)
        if metric.dataset_config is not None:
            value = long_contexts.get((metric.dataset_type, metric.dataset_config, metric.metric_type))
        if value is None or round(value, 4) != metric.metric_value:
            said = f"{metric.metric_type} {metric.metric_value}"
            problems.append(f"README.md says {said} and eval_results.json {value}: export again.")
    return problems


def publish(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Publish a student",
    license: str | None = None,
    dry_run: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
) -> Publication:
    """Send an exported student to the Hub in one commit.

    Args:
        folder: a `student` folder.
        repo_id, private, revision, commit_message, token, endpoint: as in `smt_hf.upload.upload`.
        license: identifier that the card sent names, as "apache-2.0"; default: the one that the card has, if any.
        dry_run: check and list the files; send nothing and ask the Hub nothing.

    Raises:
        InputError: see `check_folder`, `check_hub_access` and `upload`.
        HfHubHTTPError: the Hub refuses the commit, or stays busy. Nothing is half published.
    """
    check_repo_id(repo_id)
    files = check_folder(folder)
    card = ModelCard.load(Path(folder) / "README.md")
    contents = {}
    if license is not None:
        card.data.license = license
        contents["README.md"] = str(card).encode()
        files["README.md"] = len(contents["README.md"])
    notes = []
    if card.data.license is None:
        notes.append("README.md names no licence: give one by `--license NAME` that data and base model permit.")
    if "sample" in json.loads((Path(folder) / "eval_results.json").read_bytes()):
        notes.append("eval_results.json quotes held-out text in `sample`: check that it may be published.")
    if dry_run:
        return Publication(repo_id, files, None, tuple(notes))
    check_hub_access(repo_id, token, private, endpoint)
    access: dict[str, Any] = {"private": private, "token": token, "endpoint": endpoint}
    commit = upload(folder, files, repo_id, commit_message, contents=contents, revision=revision, **access)
    return Publication(repo_id, files, str(commit.commit_url), tuple(notes))


@dataclass
class PublishArguments:
    """Arguments of `publish`. The access token comes from `hf auth login` or HF_TOKEN.

    Raises:
        InputError: there is no checkpoint or repository.
    """

    checkpoint: str | None = argument(None, "The `student` folder of a run.")
    repo_id: str | None = argument(None, "Repository, `user/name`; created if it does not exist.")
    private: bool | None = argument(None, "Whether a new repository is private; default: its owner's setting.")
    revision: str | None = argument(None, "Branch; default: main.")
    commit_message: str = argument("Publish a student", "Title of the commit.", is_text=True)
    license: str | None = argument(
        None, "Licence that the card sent names, for example apache-2.0; default: the one that the card has, if any."
    )
    dry_run: bool = argument(False, "Check and list what would be sent; send nothing.")

    def __post_init__(self):
        if self.checkpoint is None or self.repo_id is None:
            raise InputError("name what to publish and where: `--checkpoint DIR --repo_id USER/NAME`.")

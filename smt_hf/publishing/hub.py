"""To the Hub: what would be sent, what is refused, and one commit that is complete or absent."""

import dataclasses
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from yaml import YAMLError

from smt_hf.command_line import argument, built, check_keys, check_values, described, names_of, read_flags

# Formats that run code when they are loaded, or may.
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".h5", ".msgpack"}
_SENT = {".safetensors", ".json", ".jsonl", ".md", ".py", ".txt", ".png", ".jinja", ".model"}
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_CARD_FIELDS = ("license", "library_name", "pipeline_tag", "tags", "datasets", "model_name", "eval_results")
_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")
_BUSY = (429, 500, 502, 503, 504)
LARGEST_FILE = 50 * 10**9  # bytes; the Hub takes no larger ones
ATTEMPTS, FIRST_WAIT = 5, 1.0  # of what the client does not try again by itself


@dataclass(frozen=True)
class Publication:
    """What was sent, or would be.

    Args:
        repo_id: of the repository.
        files: path in the repository -> bytes.
        url: of the commit; `None` after a dry run.
        has_sample: whether the results quote the held-out text.
    """

    repo_id: str
    files: dict[str, int]
    url: str | None = None
    has_sample: bool = False

    def __str__(self) -> str:
        width = max(map(len, self.files))
        lines = [f"  {path:<{width}}  {size:>13,} bytes" for path, size in self.files.items()]
        if self.has_sample:
            lines.append("eval_results.json holds a passage of held-out text, `sample`: is it yours to publish?")
        total = f"{len(self.files)} files, {sum(self.files.values()):,} bytes"
        if self.url is None:
            return "\n".join([f"would send to {self.repo_id}:", *lines, f"{total}. Nothing was sent."])
        return "\n".join([f"sent to {self.repo_id}:", *lines, f"{total}: {self.url}"])


def check_folder(folder: str | Path, largest_file: int = LARGEST_FILE) -> dict[str, int]:
    """The files of an exported student, path -> bytes, if all of them may be published.

    Raises:
        ValueError: every reason why not: pickles and other files that do not belong there, files over the limit,
            missing weights, code or tokenizer, an access token in a file, a card without metadata or at odds with its
            results.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give the `student` folder of a run.")
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    problems = []
    for path, (name, size) in zip(paths, files.items()):
        if path.suffix in _PICKLES:
            problems.append(f"{name} may run code when it is loaded: only safetensors are published.")
        elif path.suffix not in _SENT:
            problems.append(f"{name} is no part of a checkpoint: take it out.")
        if size > largest_file:
            problems.append(
                f"{name} has {size:,} bytes, more than {largest_file:,}: save with a smaller `max_shard_size`."
            )
        elif path.suffix in {".json", ".md", ".py", ".txt"} and _TOKEN.search(path.read_bytes()):
            problems.append(f"{name} holds what looks like an access token: take it out, and revoke it.")
    for name in ("config.json", "tokenizer_config.json", "eval_results.json", "README.md"):
        if name not in files:
            problems.append(f"{name} is missing: export the student by a recipe.")
    if not any(name.endswith(".safetensors") for name in files):
        problems.append("there are no weights (*.safetensors).")
    problems += _problems_of_shards(folder, files) + _problems_of_code(folder, files)
    if "README.md" in files:
        problems += problems_of_card(folder)
    if problems:
        raise ValueError(f"{folder} cannot be published:\n- " + "\n- ".join(problems))
    return files


def _problems_of_shards(folder: Path, files: dict[str, int]) -> list[str]:
    index = "model.safetensors.index.json"
    if index not in files:
        return []
    shards = set(json.loads((folder / index).read_text())["weight_map"].values())
    return [f"{shard} is named in {index} and missing." for shard in sorted(shards - files.keys())]


def _problems_of_code(folder: Path, files: dict[str, int]) -> list[str]:
    if "config.json" not in files:
        return []
    references = json.loads((folder / "config.json").read_text()).get("auto_map", {}).values()
    if not references:
        return [
            "config.json has no `auto_map`: `trust_remote_code=True` would find no code. Save by `save_pretrained`."
        ]
    needed = {f"{reference.split('.')[0]}.py" for reference in references}
    seen: set[str] = set()
    while needed - seen:
        name = (needed - seen).pop()
        seen.add(name)
        if name in files:
            needed |= {
                f"{sibling}.py" for sibling in re.findall(r"^from \.(\w+) import", (folder / name).read_text(), re.M)
            }
    return [f"{name} is missing, which the code in the checkpoint imports." for name in sorted(needed - files.keys())]


def problems_of_card(folder: Path) -> list[str]:
    """What is missing in `folder/README.md`, or at odds with `folder/eval_results.json`; empty if it is right."""
    try:
        card = ModelCard.load(folder / "README.md")
    except (ValueError, TypeError, YAMLError) as error:
        return [f"README.md has no valid metadata: {error}"]
    problems = [
        f"README.md has no `{name}` in its metadata." for name in _CARD_FIELDS if not getattr(card.data, name, None)
    ]
    results_path = folder / "eval_results.json"
    if results_path.exists():
        results = json.loads(results_path.read_text())
        if "arms" not in results or "student_arm" not in results:
            return [*problems, "eval_results.json is not that of a recipe: export the student by one."]
        scores = results["arms"][results["student_arm"]]
        for metric in card.data.eval_results or []:
            value = scores.get(metric.metric_type)
            if value is None or round(value, 4) != metric.metric_value:
                problems.append(
                    f"README.md says {metric.metric_type} {metric.metric_value} and eval_results.json {value}: export "
                    "again."
                )
    return problems


def publish(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Publish a student",
    dry_run: bool = False,
    token: str | None = None,
    largest_file: int = LARGEST_FILE,
    endpoint: str | None = None,
) -> Publication:
    """Send an exported student to the Hub in one commit: a reader sees the old state or the new one.

    Weights that the repository has and the folder has not are removed in the same commit, since a loader would prefer
    some of them. What the Hub is too busy for is tried again.

    Args:
        folder: a `student` folder.
        repo_id: `user/name`; created if it does not exist.
        private: whether a repository that is created is; default: as its owner has it. One that is public is refused.
        revision: branch; created if it does not exist. Default: main.
        dry_run: check and list, send nothing.
        token: default: the one that `hf auth login` stored, or HF_TOKEN.
        endpoint: of another Hub; default: HF_ENDPOINT, or huggingface.co.

    Raises:
        ValueError: see `check_folder`; or the name is not one of the Hub's.
        HfHubHTTPError: the Hub refuses, or stays busy. Nothing is half published.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"`repo_id` must be `user/name`, got {repo_id!r}.")
    files = check_folder(folder, largest_file)
    has_sample = "sample" in json.loads((Path(folder) / "eval_results.json").read_text())
    if dry_run:
        return Publication(repo_id, files, None, has_sample)
    api = HfApi(endpoint=endpoint, token=token)
    _patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    if private and not _patiently(lambda: api.repo_info(repo_id)).private:
        raise ValueError(f"{repo_id} exists and is public: make it private on the Hub first, or leave `private` out.")
    if revision is not None and revision != "main":
        _patiently(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    there = _patiently(lambda: api.list_repo_files(repo_id, revision=revision))
    old_weights = [name for name in there if name.endswith(_WEIGHTS) and "/" not in name and name not in files]
    commit = _patiently(
        lambda: api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            allow_patterns=sorted(files),
            delete_patterns=old_weights,
        )
    )
    return Publication(repo_id, files, str(commit.commit_url), has_sample)


def _patiently(call):
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else None
            if status not in _BUSY or attempt == ATTEMPTS - 1:
                raise
        except Exception as error:  # cut off or not answered in time; the client changes the library that says so
            names = {kind.__name__ for kind in type(error).__mro__}
            if "TransportError" not in names or attempt == ATTEMPTS - 1:
                raise
        time.sleep(FIRST_WAIT * 2**attempt)
    return None


@dataclasses.dataclass
class PublishArguments:
    """Arguments of `smt_hf.publishing.hub.publish`. The access token comes from `hf auth login` or HF_TOKEN."""

    checkpoint: str | None = argument(None, "The `student` folder of a run.")
    repo_id: str | None = argument(None, "`user/name`; created if it does not exist.")
    private: bool | None = argument(None, "Whether a repository that is created is private; default: its owner's.")
    revision: str | None = argument(None, "Branch; default: main.")
    commit_message: str = argument("Publish a student", "Of the one commit.")
    dry_run: bool = argument(False, "Check and list what would be sent; send nothing.")


def parse_publish(argv: list[str]) -> PublishArguments:
    """All settings of a publication from its command line.

    Raises:
        ValueError: as `parse_run`, or no checkpoint or repository.
        SystemExit: after `--help`.
    """
    if "--help" in argv or "-h" in argv:
        lines = ["usage: python recipes/publish.py --checkpoint DIR --repo_id USER/NAME [--dry_run] [--flag ...]", ""]
        print("\n".join([*lines, *described(PublishArguments, "", {})]))
        raise SystemExit(0)
    flags = read_flags(argv)
    check_keys(flags, names_of(PublishArguments), "argument")
    check_values(flags, PublishArguments)
    arguments = built(PublishArguments, flags)
    if not arguments.checkpoint or not arguments.repo_id:
        raise ValueError("name what to publish and where: `--checkpoint DIR --repo_id USER/NAME`.")
    return arguments

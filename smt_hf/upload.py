"""The one way to the Hub: which files may be sent, whether the account may write, and one commit for all of them.

Trainers (`training/pushing.py`) and recipes (`publishing/hub.py`) send files by this module alone.
"""

import contextlib
import json
import os
import pickletools
import re
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from smt_hf.errors import InputError

_Answer = TypeVar("_Answer")

_TEXTS = {".json", ".jsonl", ".md", ".py", ".txt", ".jinja"}
_SENT = _TEXTS | {".safetensors", ".png", ".model"}
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_PNG = b"\x89PNG\r\n\x1a\n"
# First bytes of a pickle from protocol 2 on, of NumPy and HDF5 files, and of compressed files that may hold a pickle.
_RUNS_CODE = re.compile(
    rb"\x80[\x02-\x05]|\x93NUMPY|\x89HDF|\x1f\x8b|BZh[1-9]|\xfd7zXZ|\x28\xb5\x2f\xfd|x[\x01\x9c\xda]"
)
_SECRET = re.compile(
    rb"(?:(?<![A-Za-z0-9])|(?<=\\[nrtbf]))(?:"  # a letter before it is no part of it in an escape such as \n
    rb"hf_[A-Za-z0-9]{30}|api_org_[A-Za-z0-9]{30}"  # Hugging Face
    rb"|sk-[A-Za-z0-9_-]{20}"  # OpenAI, Anthropic
    rb"|gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{22}|glpat-[A-Za-z0-9_-]{20}"  # GitHub, GitLab
    rb"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[A-Za-z0-9_-]{35}|xox[abprs]-[A-Za-z0-9-]{10}"  # AWS, Google, Slack
    rb")|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_BUSY = (429, 500, 502, 503, 504)
LARGEST_FILE = 50 * 10**9  # bytes: the Hub's limit per file
ATTEMPTS, FIRST_WAIT = 5, 1.0  # requests, seconds: for what the client does not repeat by itself


def find_problems(folder: str | Path, largest_file: int = LARGEST_FILE) -> tuple[dict[str, int], list[str]]:
    """The files of a saved model that an upload would send, and every reason why it must not be sent.

    Refused are: symbolic links that leave the folder, hidden files and folders, formats that may run code when they are
    loaded (by name and by content), files that are not what their name says, access tokens and keys, files above the
    limit, and a checkpoint without its configuration, weights or code.

    Args:
        largest_file: bytes.

    Returns:
        Path in the repository -> bytes, and one sentence per problem.

    Raises:
        InputError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: give the `student` folder of a run.")
    root = folder.resolve()
    files: dict[str, int] = {}
    hidden: dict[str, None] = {}
    problems = []
    for path in sorted(folder.rglob("*")):
        name, parts = path.relative_to(folder).as_posix(), path.relative_to(folder).parts
        first_hidden = next((index for index, part in enumerate(parts) if part.startswith(".")), None)
        if first_hidden is not None:
            hidden["/".join(parts[: first_hidden + 1])] = None
        elif path.is_symlink() and not (path.is_file() and Path(os.path.realpath(path)).is_relative_to(root)):
            problems.append(
                f"{name} is a symbolic link that leads to no file of this folder: put a copy of the file there."
            )
        elif path.is_file():
            files[name] = path.stat().st_size
            problems += [f"{name} {problem}" for problem in _problems_of_file(path, files[name], largest_file)]
        elif not path.is_dir():
            problems.append(f"{name} is no regular file: take it out.")
    hidden.pop(".gitattributes", None)  # it comes with every download; the Hub has its own
    problems += [f"{name} is hidden: take it out." for name in hidden]
    if "config.json" not in files:
        problems.append("config.json is missing: save the model by `save_pretrained`.")
    if not any(name.endswith(".safetensors") for name in files):
        problems.append("there are no weights (*.safetensors).")
    if not problems:
        problems = _problems_of_shards(folder, files) + _problems_of_code(folder, files)
    return files, problems


def refuse(folder: str | Path, problems: list[str]) -> None:
    """Raise an InputError that lists the problems of a folder, if there are any."""
    if problems:
        raise InputError(f"{folder} cannot be published:\n- " + "\n- ".join(problems))


def check_files(folder: str | Path) -> dict[str, int]:
    """The files of a saved model that may be sent, path in the repository -> bytes.

    Raises:
        InputError: every problem that `find_problems` finds.
    """
    files, problems = find_problems(folder)
    refuse(folder, problems)
    return files


def _problems_of_file(path: Path, size: int, largest_file: int) -> list[str]:
    if path.suffix not in _SENT:
        return [
            "is no part of a checkpoint, of which only "
            f"{', '.join(sorted(_SENT))} files are sent (never a pickle, which may run code): take it out."
        ]
    if size > largest_file:
        return [f"has {size:,} bytes, more than {largest_file:,}: save with a smaller `max_shard_size`."]
    problem = None
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy"), path.open("rb") as file:
                content = file.read(int.from_bytes(file.read(8), "little"))  # its metadata; the rest is numbers
        else:
            content = path.read_bytes()
            problem = _problem_of_content(path, content)
    except SafetensorError as error:
        return [f"is no safetensors file ({error}): save the weights by `save_pretrained`."]
    except OSError as error:
        return [f"cannot be read ({error.strerror})."]
    problems = [problem] if problem else []
    if _SECRET.search(content):
        problems.append("holds what looks like an access token or a private key: take it out, and revoke it.")
    return problems


def _problem_of_content(path: Path, content: bytes) -> str | None:
    if _RUNS_CODE.match(content) or zipfile.is_zipfile(path) or _is_pickle(content):
        return "is a pickle or an archive by its content, which may run code when it is loaded: take it out."
    if path.suffix == ".png" and not content.startswith(_PNG):
        return "is no PNG picture: take it out."
    try:
        text = content.decode() if path.suffix in _TEXTS else ""
        for part in {".json": [text], ".jsonl": filter(str.strip, text.split("\n"))}.get(path.suffix, []):
            json.loads(part)
    except UnicodeDecodeError:
        return "is not text in UTF-8: take it out."
    except ValueError as error:
        return f"is not valid JSON ({error}): mend it or take it out."
    return None


def _is_pickle(content: bytes) -> bool:
    """Whether bytes are a pickle of any protocol: it ends where they end, or names a function on its way."""
    try:
        operations = [(operation.name, position) for operation, _, position in pickletools.genops(content)]
    except ValueError:
        return False
    names = {name for name, _ in operations}
    return bool(names & {"GLOBAL", "STACK_GLOBAL", "INST"}) or operations[-1][1] == len(content.rstrip()) - 1


def _problems_of_shards(folder: Path, files: dict[str, int]) -> list[str]:
    index = "model.safetensors.index.json"
    if index not in files:
        return []
    shards = set(json.loads((folder / index).read_bytes())["weight_map"].values())
    return [f"{shard} is named in {index} and missing." for shard in sorted(shards - files.keys())]


def _problems_of_code(folder: Path, files: dict[str, int]) -> list[str]:
    config = json.loads((folder / "config.json").read_bytes())
    references = config.get("auto_map", {}).values() if isinstance(config, dict) else ()
    if not references or any("--" in reference for reference in references):
        return [
            "config.json has no `auto_map` that names code in this folder: `trust_remote_code=True` would find none. "
            "Save the model by `save_pretrained`."
        ]
    needed = {f"{reference.split('.')[0]}.py" for reference in references}
    seen: set[str] = set()
    while found := sorted((needed & files.keys()) - seen):
        seen |= set(found)
        code = "\n".join((folder / name).read_text(encoding="utf-8") for name in found)
        needed |= {f"{sibling}.py" for sibling in re.findall(r"^from \.(\w+) import", code, re.M)}
    return [f"{name} is missing, which the code in the checkpoint imports." for name in sorted(needed - files.keys())]


def check_hub_access(
    repo_id: str, token: str | None = None, private: bool | None = None, endpoint: str | None = None
) -> None:
    """Find out whether a later `upload` may write to a repository. Nothing is written or created.

    Args:
        repo_id: `user/name`, whether it exists or not.
        token: default: the one that `hf auth login` stored, or HF_TOKEN.
        private: whether a private repository is wanted.
        endpoint: of another Hub; default: HF_ENDPOINT, or huggingface.co.

    Raises:
        InputError: the name is not one of the Hub's; the machine is offline or not logged in; the account or the token
            may not write there; the repository is public and `private` is true.
    """
    check_repo_id(repo_id)
    if is_offline_mode():
        raise InputError(
            f"nothing can be sent to {repo_id} in offline mode: unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, or do "
            "not push."
        )
    if not (token or get_token()):
        raise InputError("the Hub needs a login: run `hf auth login`, or set HF_TOKEN to an access token.")
    api = HfApi(endpoint=endpoint, token=token)
    try:
        account = _patiently(api.whoami, attempts=2)
    except HfHubHTTPError as error:
        raise InputError(f"the Hub cannot say who you are ({error}): try again later, or do not push.") from error
    except Exception as error:
        if not _is_cut(error):
            raise
        raise InputError(
            f"the Hub at {api.endpoint} cannot be reached ({error}): check the connection, or do not push."
        ) from error
    owner = repo_id.split("/")[0]
    organisations = {entry["name"]: entry.get("roleInOrg") for entry in account.get("orgs", [])}
    if owner != account["name"] and organisations.get(owner, "read") == "read":
        raise InputError(f"{account['name']} may not write to {owner}'s repositories: give `{account['name']}/NAME`.")
    access = account.get("auth", {}).get("accessToken", {})
    permissions = re.findall(r"repo\.[\w.]*write", json.dumps(access))
    if access.get("role") == "read" or (access.get("role") == "fineGrained" and not permissions):
        raise InputError(
            "the access token may only read: make one that may write on https://huggingface.co/settings/tokens."
        )
    if private:
        with contextlib.suppress(RepositoryNotFoundError):  # it will be created
            _check_private(api, repo_id)


def check_repo_id(repo_id: str) -> None:
    """Raise an InputError unless the name of a repository is `user/name`."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"no repository can have the name {repo_id!r}: {error}") from error
    if "/" not in repo_id:
        raise InputError(f"the repository must be named `user/name`, got {repo_id!r}.")


def _check_private(api: HfApi, repo_id: str) -> None:
    if not _patiently(lambda: api.repo_info(repo_id)).private:
        raise InputError(f"{repo_id} exists and is public: make it private on the Hub first, or leave `private` out.")


def upload(
    folder: str | Path,
    files: Sequence[str] | dict[str, int],
    repo_id: str,
    commit_message: str,
    path_in_repo: str = "",
    contents: dict[str, bytes] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> CommitInfo:
    """Send files in one commit: a reader of the repository sees the state before it or after it.

    Weights that the repository has and the folder has not are removed in the same commit, since a loader would prefer
    some of them. Requests that fail because the Hub is busy or the connection is cut are repeated.

    Args:
        folder: of the files.
        files: their names, as `check_files` returns them.
        repo_id: `user/name`; created if it does not exist.
        commit_message: title of the commit.
        path_in_repo: folder in the repository; default: its root.
        contents: name -> what is sent in place of the file.
        private: whether a repository that is created is private; default: its owner's setting. A public one is refused.
        revision: branch; created if it does not exist. Default: main.
        token, endpoint: as in `check_hub_access`.

    Raises:
        InputError: the Hub refuses the access token, or the repository is public and `private` is true.
        HfHubHTTPError: the Hub refuses the commit, or stays busy. Nothing is half published.
    """
    folder, contents = Path(folder), contents or {}
    prefix = f"{path_in_repo}/" if path_in_repo else ""
    api = HfApi(endpoint=endpoint, token=token)
    _patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    if private:
        _check_private(api, repo_id)
    if revision is not None and revision != "main":
        _patiently(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    there = _patiently(lambda: api.list_repo_files(repo_id, revision=revision))
    own = [name.removeprefix(prefix) for name in there if name.startswith(prefix)]
    old_weights = [name for name in own if name.endswith(_WEIGHTS) and "/" not in name and name not in files]

    def commit() -> CommitInfo:  # operations serve one attempt
        added = [CommitOperationAdd(prefix + name, contents.get(name, folder / name)) for name in files]
        removed = [CommitOperationDelete(prefix + name) for name in old_weights]
        return api.create_commit(repo_id, [*added, *removed], commit_message=commit_message, revision=revision)

    return _patiently(commit)


def _patiently(call: Callable[[], _Answer], attempts: int = ATTEMPTS) -> _Answer:
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except Exception as error:
            response = error.response if isinstance(error, HfHubHTTPError) else None
            status = None if response is None else response.status_code
            if status in (401, 403) and not isinstance(error, RepositoryNotFoundError):
                raise InputError(
                    f"the Hub refused the access token ({status}): run `hf auth login`, or set HF_TOKEN to one that "
                    "may write there."
                ) from error
            if attempt == attempts or not (status in _BUSY or _is_cut(error)):
                raise
        time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
    raise AssertionError("the last attempt returns or raises")


def _is_cut(error: Exception) -> bool:
    """Whether a request was cut off or not answered in time, by name: releases of the client use different packages."""
    return "TransportError" in {kind.__name__ for kind in type(error).__mro__}

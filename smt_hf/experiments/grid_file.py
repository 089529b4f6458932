"""A grid of runs, from its YAML file and command line.

`tasks` (each with `difficulties`, `seconds`, `curriculum`, and under `arms` what changes for the task; a mixture of
`documents` has any name) times `arms` (each with `phases`; `share` is a phase's part of the seconds) times `seeds`.
`recipes/README.md` lists all keys.
"""

import itertools
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smt_hf.command_line import argument, built, check_keys, closest, described, read_layers, typed, whole_number
from smt_hf.data import TASKS, task_facts
from smt_hf.errors import InputError
from smt_hf.training.phases import ARGUMENTS

from .grid import Run
from .grid_teacher import is_language_model
from .run_arguments import PHASE_NAMES, STUDENT_FIELDS, read_phases, typed_teacher
from .subjects import DOCUMENTS

_GRID_KEYS = {"output", "jobs", "num_threads", "seeds", "num_heldout", "student", "teacher", "tasks", "arms"}
_GRID_KEYS |= {"init_embeddings_from_teacher"}
_TASK_KEYS = {"difficulties", "seconds", "curriculum", "arms", "documents", "train_tokens"}
_ARM_KEYS = {"phases", "student", "teacher", "only", "sweep", "variants", "group"}
_ONLY_KEYS = ("task", "difficulty", "arm", "seed", "variant")
_SOURCES = ("train_file", "mnist_dir")  # flags that name files, besides `haystack` of documents
_OTHER_TASKS = ("text", "pixels")  # those that need no difficulty


@dataclass
class GridArguments:
    """The flags of `recipes/experiment.py`."""

    config: str = argument("", "Grid of tasks, difficulties, arms and seeds, a YAML file.")
    output: str | None = argument(None, "File of JSON lines; runs that it has are skipped. Default: runs/GRID.jsonl.")
    only: list[str] = argument(
        [], "Run a part: task= difficulty= arm= seed= variant=, with spaces between; difficulty and seed may be new."
    )
    jobs: int | None = argument(None, "Runs side by side; default: those of the grid.")
    report: bool = argument(False, "Train nothing; write tables and figures of the output next to it.")
    train_file: str | None = argument(None, "Text for the task text; default: the embedded corpus.")
    teacher_model_name_or_path: str | None = argument(
        None,
        "Folder or repository of the language model that is the teacher of the grid, whose tokens text is read in.",
    )
    teacher_gguf_file: str | None = argument(None, "Name of a GGUF file in that folder; it needs the extra `gguf`.")
    teacher_cache_dir: str | None = argument(
        None,
        "Folder for what that model says of the rows: it reads them once, before the first run. A GGUF file is "
        "unpacked there, too.",
    )
    mnist_dir: str | None = argument(None, "Folder of MNIST's files for the task pixels; default: the 8 x 8 digits.")
    haystack: list[str] | None = argument(
        None,
        "Files, folders or patterns of text that the needles of `documents` are hidden in, and exercises filled with.",
    )
    students: str | None = argument(
        None, "Folder in which the trained students are kept, each in a folder named by its cell, arm and seed."
    )


@dataclass
class ParsedGrid:
    """A grid as its command line asks for it."""

    runs: list[Run]  # what the grid holds, or what `--only` leaves of it
    output: Path  # file of JSON lines
    jobs: int  # runs side by side
    report: bool  # render what is in `output` instead of training
    students: Path | None  # folder of the trained students


def parse_grid(argv: list[str]) -> ParsedGrid:
    """A grid of runs from its command line.

    A seed or difficulty that the grid does not list is run all the same when `--only` names it. Arms with a `sweep` run
    under the first seed, unless `--only` names the arm.

    Raises:
        InputError: unknown keys (the closest valid one is named), values of the wrong type, malformed YAML.
        SystemExit: after `--help`.
    """
    usage = "usage: python recipes/experiment.py --config GRID.yaml [--flag ...]\n"
    *grids, flags = read_layers(argv, lambda: "\n".join([usage, *described(GridArguments)]))
    given = built(GridArguments, flags)
    if not grids:
        raise InputError("name the grid: `--config recipes/probes.yaml`.")
    (grid,) = grids
    _check_grid(grid, given.config)
    only = _read_only(given.only, grid)
    sources = {name: value for name in _SOURCES if (value := getattr(given, name)) is not None}
    of_documents = sources | ({} if given.haystack is None else {"haystack": given.haystack})
    grid = _with_teacher(grid, given)
    runs = [
        run
        for task, settings in grid["tasks"].items()
        if only.get("task", task) == task
        for run in _runs_of_task(
            grid, str(task), settings or {}, only, of_documents if "documents" in (settings or {}) else sources
        )
    ]
    if not runs:
        raise InputError(f"nothing of {given.config} is left by `--only` {' '.join(given.only)}.")
    jobs = whole_number("jobs", given.jobs if given.jobs is not None else grid.get("jobs", 1))
    if jobs < 1:
        raise InputError(f"`jobs` must be at least 1, got {jobs}.")
    output = Path(given.output or f"runs/{Path(given.config).stem}.jsonl")
    return ParsedGrid(runs, output, jobs, given.report, None if given.students is None else Path(given.students))


def _with_teacher(grid: dict, given: GridArguments) -> dict:
    """The grid with the teacher's model of the command line.

    Raises:
        InputError: what is asked for needs a language model, and none is named.
    """
    flags = {"model_name_or_path": given.teacher_model_name_or_path, "gguf_file": given.teacher_gguf_file}
    teacher = {**(grid.get("teacher") or {}), **{name: value for name, value in flags.items() if value is not None}}
    asks = {"teacher_gguf_file": given.teacher_gguf_file, "teacher_cache_dir": given.teacher_cache_dir}
    asks["init_embeddings_from_teacher"] = grid.get("init_embeddings_from_teacher")
    asked = next((name for name, value in asks.items() if value), None)
    if asked and not given.report and not is_language_model(teacher):  # a report reads lines alone
        raise InputError(f"`{asked}` needs a language model: name it by `--teacher_model_name_or_path`.")
    return {**grid, "teacher": teacher, "teacher_cache_dir": given.teacher_cache_dir}


def _check_grid(grid: dict, path: str) -> None:
    """Refuse keys and names that belong to nothing in the grid: they would have no effect."""
    check_keys(grid, _GRID_KEYS, f"key of {path}")
    if "output" in grid:
        warnings.warn(f"`output` of {path} is ignored: lines go to runs/, or where `--output` says.", stacklevel=3)
    for name in ("tasks", "arms"):
        if not isinstance(grid.get(name), dict) or not grid[name]:
            raise InputError(f"{path} needs `{name}`, each with a name: `{name}: {{NAME: {{...}}}}`.")
    for name in ("num_threads", "num_heldout"):
        if whole_number(name, grid.get(name, 1)) < 1:
            raise InputError(f"`{name}` of {path} must be at least 1, got {grid[name]}.")
    _check_numbers(grid.get("seeds", [0]), f"`seeds` of {path}")
    if not isinstance(grid.get("init_embeddings_from_teacher", False), bool):
        raise InputError(f"`init_embeddings_from_teacher` of {path} must be true or false.")
    for arm, spec in grid["arms"].items():
        _check_arm(str(arm), spec, set(map(str, grid["tasks"])))
    for task, settings in grid["tasks"].items():
        check_keys(settings or {}, _TASK_KEYS, f"key of task {task}")
        _check_documents(str(task), settings or {})
        _check_train_tokens(str(task), settings or {})
        for name in ("difficulties", "curriculum"):
            _check_numbers((settings or {}).get(name) or [0], f"`{name}` of task {task}")
        seconds = (settings or {}).get("seconds", 1)
        for value in seconds.values() if isinstance(seconds, dict) and seconds else (seconds,):
            if not isinstance(value, int | float) or not value > 0:
                raise InputError(
                    f"`seconds` of task {task} must be a positive number, or one per difficulty: {seconds!r}."
                )
        for arm, of_arm in ((settings or {}).get("arms") or {}).items():
            check_keys({arm: None}, set(grid["arms"]), f"arm in task {task}")
            phases = {number for number, _, _ in _numbered_phases(grid["arms"][arm])}
            check_keys(of_arm or {}, phases, f"phase of arm {arm}")


def _check_documents(task: str, settings: dict) -> None:
    """A task with `documents` has any name but that of another task; one without them has one of those."""
    known = {*TASKS, *_OTHER_TASKS}
    if "documents" not in settings:
        check_keys({task: None}, known, "task")
        return
    names = settings["documents"]
    if task in known or not isinstance(names, list) or not names or any(name not in DOCUMENTS for name in names):
        raise InputError(
            f"`documents` of task {task} must be a list of {', '.join(DOCUMENTS)}, under a name that no other task "
            f"has; got {names!r}."
        )


def _check_train_tokens(task: str, settings: dict) -> None:
    if "train_tokens" not in settings:
        return
    if task != "text" or whole_number("train_tokens", settings["train_tokens"]) < 1:
        raise InputError(
            f"`train_tokens` is a number of tokens of the task text, above 0; task {task} has no use for it."
        )


def _check_numbers(values: Any, what: str) -> None:
    if not isinstance(values, list) or not all(isinstance(value, int) and value >= 0 for value in values):
        raise InputError(f"{what} must be a list of whole numbers, such as [0, 1], got {values!r}.")


def _check_arm(arm: str, spec: dict, tasks: set[str]) -> None:
    check_keys(spec, _ARM_KEYS, f"key of arm {arm}")
    if not spec.get("phases"):
        raise InputError(f"arm {arm} needs `phases`.")
    phases = {number for number, _, _ in _numbered_phases(spec)}
    if ("sweep" in spec or "variants" in spec) and not spec.get("group"):
        raise InputError(f"arm {arm} has variants: name their `group`, a title for their table.")
    check_keys(spec.get("only") or {}, tasks, f"task in `only` of arm {arm}")
    sweep = spec.get("sweep", {})
    check_keys(sweep, phases, f"phase in `sweep` of arm {arm}")
    axes = [values for of_phase in sweep.values() if isinstance(of_phase, dict) for values in of_phase.values()]
    if ("sweep" in spec and (len(sweep) != 1 or not axes)) or not all(isinstance(values, list) for values in axes):
        raise InputError("`sweep` takes one phase with lists of values: `bptt: {learning_rate: [...], ...}`.")
    for changes in (spec.get("variants") or {}).values():
        check_keys(changes or {}, phases | {"student", "teacher"}, f"part of a variant of arm {arm}")


def _numbered_phases(spec: dict) -> list[tuple[str, str, dict]]:
    """Name in the grid (`smt`, `smt_2`, as their folders), phase and settings of an arm's phases."""
    phases = read_phases(spec["phases"], also=("share",))
    names = [name for name, _ in phases]
    earlier = [names[:place].count(name) for place, name in enumerate(names)]
    return [(f"{name}_{num + 1}" if num else name, name, of) for (name, of), num in zip(phases, earlier)]


def _read_only(words: list[str], grid: dict) -> dict[str, Any]:
    only: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in _ONLY_KEYS:
            raise InputError(f"`--only` takes {', '.join(_ONLY_KEYS)} as name=value, got {word!r}.")
        only[name] = whole_number(name, value) if name in ("seed", "difficulty") else value
    for name, known in (("task", grid["tasks"]), ("arm", grid["arms"])):
        if name in only and only[name] not in known:
            raise InputError(f"the grid has no {name} {only[name]!r}{closest(only[name], known)}")
    return only


def _runs_of_task(grid: dict, task: str, settings: dict, only: dict, sources: dict) -> Iterator[Run]:
    difficulties = [only["difficulty"]] if "difficulty" in only else settings.get("difficulties") or [None]
    documents = tuple(settings.get("documents") or ())
    if (task in TASKS or documents) and None in difficulties:
        raise InputError(f"task {task} needs `difficulties`.")
    if task in TASKS:
        for difficulty in difficulties:
            task_facts(task, difficulty)
    seeds = [only["seed"]] if "seed" in only else grid.get("seeds", [0])
    for seed, difficulty, (arm, spec) in itertools.product(seeds, difficulties, grid["arms"].items()):
        if only.get("arm", arm) != arm:
            continue
        if "sweep" in spec and seed != grid.get("seeds", [0])[0] and "arm" not in only:
            continue  # settings are chosen under one seed
        where = spec.get("only")
        is_named = "arm" in only and "difficulty" in only
        if where is not None and not is_named and difficulty not in (where.get(task) or []):
            continue
        of_task = (settings.get("arms") or {}).get(arm) or {}
        for variant, changes in _variants(spec):
            if only.get("variant", variant) != variant:
                continue
            student = {**(grid.get("student") or {}), **(spec.get("student") or {}), **changes.get("student", {})}
            yield Run(
                task=task,
                difficulty=difficulty,
                arm=str(arm),
                seed=int(seed),
                phases=_cached(
                    _phases_of_arm(spec, of_task, changes, _seconds(settings, difficulty)), grid["teacher_cache_dir"]
                ),
                student=typed(STUDENT_FIELDS, student),
                teacher=typed_teacher(grid["teacher"], spec.get("teacher", {}), changes.get("teacher", {})),
                curriculum=tuple(settings.get("curriculum", ())),
                group=spec.get("group"),
                variant=variant,
                num_threads=int(grid.get("num_threads", 1)),
                num_heldout=int(grid.get("num_heldout", 4096)),
                sources=sources,
                documents=documents,
                train_tokens=settings.get("train_tokens"),
                init_embeddings_from_teacher=grid.get("init_embeddings_from_teacher", False),
            )


def _cached(phases: tuple[tuple[str, dict], ...], folder: str | None) -> tuple[tuple[str, dict], ...]:
    """The phases, those with a teacher reading from its cache."""
    if folder is None:
        return phases
    return tuple((name, of if name == "bptt" else {**of, "teacher_cache_dir": folder}) for name, of in phases)


def _seconds(settings: dict, difficulty: int | None) -> float | None:
    seconds = settings.get("seconds")
    if isinstance(seconds, dict):
        seconds = seconds.get(difficulty, max(seconds.values()))  # one that the grid does not list: the longest
    return None if seconds is None else float(seconds)


def _variants(spec: dict) -> Iterable[tuple[str | None, dict]]:
    """Names and changes (`student`, `teacher` or a phase -> settings) of an arm's variants; one without a name else."""
    if "sweep" in spec:
        ((phase, axes),) = spec["sweep"].items()
        for values in itertools.product(*axes.values()):
            named = dict(zip(axes, values))
            yield ", ".join(f"{name}={value}" for name, value in named.items()), {phase: named}
    elif "variants" in spec:
        for name, changes in spec["variants"].items():
            yield str(name), changes or {}
    else:
        yield None, {}


def _phases_of_arm(spec: dict, of_task: dict, changes: dict, seconds: float | None) -> tuple[tuple[str, dict], ...]:
    """Arguments of the phases: what the arm says, then what the task says for it, then what the variant changes.

    A phase gets its `share` of the seconds (default: what the others leave, evenly).
    """
    phases = [
        (name, {**settings, **(of_task.get(number) or {}), **(changes.get(number) or {})})
        for number, name, settings in _numbered_phases(spec)
    ]
    shares = [settings.pop("share", None) for _, settings in phases]
    num_open = sum(share is None and "max_steps" not in of for share, (_, of) in zip(shares, phases))
    if not all(share is None or (isinstance(share, int | float) and 0 < share <= 1) for share in shares):
        raise InputError(f"the `share` of a phase must lie between 0 and 1, got {shares}.")
    left = 1 - sum(share or 0 for share in shares)
    if left < -1e-9:
        raise InputError(f"the `share`s of an arm must not add up to more than 1, got {shares}.")
    typed_phases = []
    for (name, settings), share in zip(phases, shares):
        if seconds is not None and "max_steps" not in settings:
            settings["max_seconds"] = seconds * (share if share is not None else left / num_open)
        check_keys(settings, PHASE_NAMES[name], f"argument of phase {name}")
        arguments = built(ARGUMENTS[name], {**settings, "output_dir": "unused"})
        typed_phases.append((name, {key: getattr(arguments, key) for key in settings}))
    return tuple(typed_phases)

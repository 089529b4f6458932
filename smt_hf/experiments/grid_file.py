"""A grid of runs, from its YAML file and command line."""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

from smt_hf.command_line import built, check_keys, closest, read_flags, read_yaml, whole_number
from smt_hf.training.phases import ARGUMENTS

from .grid import Run
from .run_arguments import PHASE_NAMES, STUDENT_FIELDS, typed, typed_teacher


@dataclasses.dataclass
class ParsedGrid:
    """Args:
    runs: what the grid holds, or what `--only` leaves of it.
    output: file of JSON lines.
    jobs: runs side by side.
    report: render what is in `output` instead of training.
    """

    runs: list[Run]
    output: str
    jobs: int
    report: bool


_GRID_KEYS = {"output", "jobs", "num_threads", "seeds", "num_heldout", "student", "teacher", "tasks", "arms"}


_TASK_KEYS = {"difficulties", "seconds", "curriculum", "arms"}


_ARM_KEYS = {"phases", "student", "teacher", "only", "sweep", "variants", "group"}


_ONLY_KEYS = {"task", "difficulty", "arm", "seed", "variant"}


_GRID_FLAGS = {"config", "output", "only", "jobs", "report", "train_file", "mnist_dir"}


_GRID_HELP = """usage: python recipes/experiment.py --config GRID.yaml [--flag ...]

  --config      grid of tasks, difficulties, arms and seeds
  --output      JSON lines file; what it has is skipped (default: the grid's `output`)
  --only        task= difficulty= arm= seed= variant=, with spaces between; seeds and difficulties may be new ones
  --jobs        runs side by side (default: the grid's)
  --report      train nothing; write tables and figures next to the output
  --train_file  text for the task `text`
  --mnist_dir   MNIST's files for the task `pixels`"""


def parse_grid(argv: list[str]) -> ParsedGrid:
    """A grid of runs from its command line.

    `--config GRID.yaml [--only task=... difficulty=... arm=... seed=... variant=...] [--output FILE.jsonl] [--jobs N]
    [--report] [--train_file FILE] [--mnist_dir DIR]`. A seed or difficulty that the grid does not list is run all the
    same when `--only` names it. Arms with a `sweep` run under the first seed, unless `--only` names the arm.

    Raises:
        ValueError: unknown keys (the closest valid one is named), values of the wrong type, malformed YAML.
    """
    if "--help" in argv or "-h" in argv:
        print(_GRID_HELP)
        raise SystemExit(0)
    flags = read_flags(argv)
    check_keys(flags, _GRID_FLAGS, "flag")
    if not isinstance(flags.get("config"), str):
        raise ValueError("name the grid: `--config recipes/probes.yaml`.")
    grid = read_yaml(flags["config"])
    check_keys(grid, _GRID_KEYS, f"key of {flags['config']}")
    if flags.get("only") is True:
        raise ValueError(f"`--only` takes {', '.join(sorted(_ONLY_KEYS))} as name=value.")
    only = _read_only(flags.get("only", []))
    for name in ("tasks", "arms", "output"):
        if not grid.get(name):
            raise ValueError(f"{flags['config']} needs `{name}`.")
    _check_grid(grid)
    runs = [
        run
        for task, settings in grid["tasks"].items()
        if only.get("task", task) == task
        for run in _runs_of_task(grid, str(task), settings or {}, only, flags)
    ]
    if not runs:
        raise ValueError(f"nothing of {flags['config']} is left by `--only` {only}.")
    return ParsedGrid(
        runs=runs,
        output=str(flags.get("output", grid["output"])),
        jobs=whole_number("jobs", flags.get("jobs", grid.get("jobs", 1))),
        report=bool(flags.get("report", False)),
    )


def _check_grid(grid: dict) -> None:
    """Names that are spelled right but belong to nothing would leave a run as it is, unseen."""
    for arm, spec in grid["arms"].items():
        check_keys(spec, _ARM_KEYS, f"key of arm {arm}")
        phases = _phase_names_of(spec)
        check_keys(dict.fromkeys(phase for _, phase, _ in _numbered_phases(spec)), set(ARGUMENTS), "phase")
        if ("sweep" in spec or "variants" in spec) and not spec.get("group"):
            raise ValueError(f"arm {arm} has variants: name their `group`, a title for their table.")
        if len(spec.get("sweep") or {}) > 1:
            raise ValueError("`sweep` takes one phase with lists of values: `bptt: {learning_rate: [...], ...}`.")
        check_keys(spec.get("only") or {}, set(map(str, grid["tasks"])), f"task in `only` of arm {arm}")
        check_keys(spec.get("sweep") or {}, phases, f"phase in `sweep` of arm {arm}")
        for changes in (spec.get("variants") or {}).values():
            check_keys(changes or {}, phases | {"student", "teacher"}, f"part of a variant of arm {arm}")
    for task, settings in grid["tasks"].items():
        check_keys(settings or {}, _TASK_KEYS, f"key of task {task}")
        for arm, of_arm in ((settings or {}).get("arms") or {}).items():
            if arm not in grid["arms"]:
                raise ValueError(f"unknown arm {arm!r} in task {task}{closest(str(arm), grid['arms'])}")
            check_keys(of_arm or {}, _phase_names_of(grid["arms"][arm]), f"phase of arm {arm}")


def _phase_names_of(spec: dict) -> set[str]:
    return {number for number, _, _ in _numbered_phases(spec)}


def _numbered_phases(spec: dict) -> list[tuple[str, str, dict]]:
    """Name in the grid (`smt`, `smt_2`, as their folders), phase and settings of an arm's phases."""
    numbered: list[tuple[str, str, dict]] = []
    for entry in (spec or {}).get("phases") or []:
        if isinstance(entry, dict) and len(entry) != 1:
            raise ValueError(f"a phase must be a name or a one-key mapping `name: {{...}}`, got {entry!r}.")
        phase, settings = next(iter(entry.items())) if isinstance(entry, dict) else (entry, {})
        earlier = sum(name == phase for _, name, _ in numbered)
        numbered.append((f"{phase}_{earlier + 1}" if earlier else str(phase), str(phase), settings or {}))
    return numbered


def _read_only(words: Any) -> dict[str, Any]:
    only: dict[str, Any] = {}
    for word in [words] if isinstance(words, str) else words:
        name, equals, value = str(word).partition("=")
        if not equals or name not in _ONLY_KEYS:
            raise ValueError(f"`--only` takes {', '.join(sorted(_ONLY_KEYS))} as name=value, got {word!r}.")
        only[name] = whole_number(name, value) if name in ("seed", "difficulty") else value
    return only


def _runs_of_task(grid: dict, task: str, settings: dict, only: dict, flags: dict) -> Iterable[Run]:
    difficulties = [only["difficulty"]] if "difficulty" in only else settings.get("difficulties", [None])
    seeds = [only["seed"]] if "seed" in only else grid.get("seeds", [0])
    sources = {name: flags[name] for name in ("train_file", "mnist_dir") if name in flags}
    for seed in seeds:
        for difficulty in difficulties:
            for arm, spec in grid["arms"].items():
                if only.get("arm", arm) != arm:
                    continue
                if "sweep" in spec and seed != grid.get("seeds", [0])[0] and "arm" not in only:
                    continue  # settings are chosen under one seed
                where = spec.get("only")
                is_named = "arm" in only and "difficulty" in only
                if where is not None and not is_named and difficulty not in (where.get(task) or []):
                    continue
                for variant, changes in _variants(spec):
                    if only.get("variant", variant) != variant:
                        continue
                    of_task = (settings.get("arms") or {}).get(arm) or {}
                    yield Run(
                        task=task,
                        difficulty=difficulty,
                        arm=str(arm),
                        seed=int(seed),
                        phases=_phases_of_arm(spec, of_task, changes, _seconds(settings, task, difficulty)),
                        student=typed(
                            STUDENT_FIELDS,
                            {**grid.get("student", {}), **spec.get("student", {}), **changes.get("student", {})},
                        ),
                        teacher=typed_teacher(
                            grid.get("teacher", {}), spec.get("teacher", {}), changes.get("teacher", {})
                        ),
                        curriculum=tuple(settings.get("curriculum", ())),
                        group=spec.get("group"),
                        variant=variant,
                        num_threads=int(grid.get("num_threads", 1)),
                        num_heldout=int(grid.get("num_heldout", 4096)),
                        sources=sources,
                    )


def _seconds(settings: dict, task: str, difficulty: int | None) -> float | None:
    seconds = settings.get("seconds")
    if isinstance(seconds, dict):
        seconds = seconds.get(difficulty, max(seconds.values()))  # one that the grid does not list: the longest
    return None if seconds is None else float(seconds)


def _variants(spec: dict) -> Iterable[tuple[str | None, dict]]:
    """Names and changes (`student`, `teacher` or a phase -> settings) of an arm's variants; one without a name else."""
    if "sweep" in spec:
        ((phase, axes),) = spec["sweep"].items()
        if not isinstance(axes, dict):
            raise ValueError("`sweep` takes one phase with lists of values: `bptt: {learning_rate: [...], ...}`.")
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
    phases = []
    for number, name, settings in _numbered_phases(spec):
        merged = {**settings, **(of_task.get(number) or {}), **(changes.get(number) or {})}
        phases.append((name, merged.pop("share", None), merged))
    if not phases:
        raise ValueError("every arm needs `phases`.")
    left = 1 - sum(share or 0 for _, share, _ in phases)
    num_open = sum(share is None and "max_steps" not in settings for _, share, settings in phases)
    typed = []
    for name, share, settings in phases:
        if seconds is not None and "max_steps" not in settings:
            settings["max_seconds"] = seconds * (share if share is not None else left / num_open)
        check_keys(settings, PHASE_NAMES[name], f"argument of phase {name}")
        arguments = built(ARGUMENTS[name], {**settings, "output_dir": "unused"})
        typed.append((name, {key: getattr(arguments, key) for key in settings}))
    return tuple(typed)

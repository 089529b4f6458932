"""The report of a grid: tables, verdicts and figures, made from its JSON lines and from nothing else.

A line is one arm in one cell with one seed; a cell is a task at a difficulty, a number that grows with it. Scores are
accuracies (0 to 1), bits per byte or bits per pixel. Lines with a `group` belong to a sweep or an ablation: they have
tables of their own and no figures.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from operator import itemgetter
from pathlib import Path
from statistics import fmean

from smt_hf.errors import InputError

from .arms import YARDSTICKS, arm_order, by_arm, display_name, is_whole_run, kind_of, natural_order
from .evidence import cells_with, hardest_cells, split_by
from .export import write_text
from .figures import looks_of, save_figures
from .report_figures import draw_figures
from .scores import (
    MARGIN,
    REACHED,
    SOLVED,
    UNITS,
    Verdict,
    badness,
    chances_of,
    judge,
    metric_of,
    metric_score,
    score_of,
)
from .tables import markdown_table
from .teacher_cost_report import CAPTION, FIGURE, split_readings, teacher_cost_figure, teacher_cost_section

_SAME_TIME = 1.1  # seconds of the longer over those of the shorter training
_NUM_TEXTS = 2  # samples shown per arm

_HOW_TO_READ = f"""How to read the tables:

- Mean ± standard error over seeds (number of seeds). Bold: the best student of a row.
- `teacher` (the mean of the teachers of all arms) and n-grams are yardsticks, not students.
- Ours: the best arm with an smt or dmt phase and no bptt phase. Bptt: the best arm with bptt phases alone. The best of
  many arms is better by chance than the best of a few: compare the numbers of columns of both sides.
- Differences are ours minus bptt. For bits, a difference below zero is in our favour. A difference counts beyond
  {MARGIN} and beyond two of its standard errors.
- Both fail: both accuracies are below {SOLVED}. The difference is shown all the same."""


def render_report(lines: list[dict], name: str, folder: Path) -> list[Path]:
    """Write `<folder>/<name>.md`, and `<folder>/<name>_<figure>.png` for every figure that a line has data for.

    The order of the lines changes nothing. Figures of an earlier report of this name that have no data now are removed.

    Args:
        lines: as `read_lines` returns them.

    Returns:
        The files written, the Markdown first.

    Raises:
        InputError: no lines; a line of a grid without task, difficulty, arm, seed or metric, or in a group without
            `variant`; a task whose lines have different metrics.
    """
    lines, readings = split_readings(lines)
    if not lines:
        raise InputError("there are no lines to report: run the grid first.")
    _check(lines)
    given, lines = lines, sorted(_without_stages(lines), key=_line_order)
    num_stages = len(given) - len(lines)
    main = [line for line in lines if line.get("group") is None]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.md"
    figures = draw_figures(main, name, folder)
    figures |= save_figures({FIGURE: (CAPTION, teacher_cost_figure(lines, readings))}, name, folder)
    pictures = [f"### {caption}\n\n![{caption}]({figure.name})" for figure, caption in figures.items()]
    parts = [
        f"# {name}",
        f"Made by `smt_hf.publishing.report` from {len(lines)} lines: numbers are changed there, not here.",
        f"{num_stages} more lines, of stages that are also arms of their own, are left out." if num_stages else "",
        _results(main),
        teacher_cost_section(lines, readings),
        _costs(main),
        _sweeps([line for line in lines if line.get("group") is not None]),
        _section("Figures", pictures),
        _text_samples(main),
        _provenance(lines),
    ]
    write_text("\n\n".join(part for part in parts if part) + "\n", path)
    return [path, *figures]


def _check(lines: list[dict]) -> None:
    for line in lines:
        missing = [key for key in ("task", "difficulty", "arm", "seed") if key not in line]
        if line.get("group") is not None and "variant" not in line:
            missing.append("variant")
        if not any(metric in line for metric in UNITS):
            missing.append(" or ".join(UNITS))
        if missing:
            known = {key: line[key] for key in ("task", "difficulty", "arm", "seed", "group") if key in line}
            raise InputError(f"the line of {known} has no {', '.join(missing)}: mend or remove it.")
    for task, some in split_by(lines, "task").items():
        metrics = sorted({metric_of(line) for line in some})
        if len(metrics) > 1:
            raise InputError(f"lines of task {task!r} are scored in {' and in '.join(metrics)}: give all of them one.")


def _section(title: str, parts: list[str]) -> str:
    return "\n\n".join([f"## {title}", *parts]) if parts else ""


def _line_order(line: dict) -> tuple:
    names = [natural_order(str(line.get(key))) for key in ("group", "variant")]
    text = json.dumps(line, sort_keys=True)
    return *names, line["task"], line["difficulty"], arm_order(line), line["seed"], text


def _without_stages(lines: list[dict]) -> list[dict]:
    """Leave out the stages of longer pipelines that are arms with a whole run of their own in the cell."""

    def cell(line: dict) -> tuple:
        return tuple(line.get(key) for key in ("group", "variant", "task", "difficulty", "arm"))

    whole = {cell(line) for line in lines if is_whole_run(line)}
    return [line for line in lines if is_whole_run(line) or cell(line) not in whole]


def _code(text: str) -> str:
    """A fenced block. The fence is longer than any in the text; what cannot be printed is escaped."""
    letters = text.replace("\t", "    ")
    text = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in letters)
    fence = "`" * max([2, *map(len, re.findall("`+", text))]) + "`"
    return f"{fence}\n{text}\n{fence}"


def _results(lines: list[dict]) -> str:
    if not lines:
        return ""
    verdicts: dict[str, Verdict | None] = {}
    tables = [_task_table(task, some, verdicts) for task, some in split_by(lines, "task").items()]
    notes = [*_summary(verdicts), *_unequal(lines, verdicts), *_doubles(lines), _names(lines)]
    return _section("Results", [*notes, _HOW_TO_READ, *tables, *filter(None, [_speeds(lines)])])


def _names(lines: list[dict]) -> str:
    names: dict[str, list[str]] = {}
    for line in lines:
        if kind_of(line) not in YARDSTICKS and is_whole_run(line):
            names.setdefault(display_name(line), []).append(f"`{line['arm']}`")
    listed = [f"{name}: {', '.join(sorted(set(arms), key=natural_order))}" for name, arms in sorted(names.items())]
    return f"What the arms are called in the figures: {'; '.join(listed)}."


def _task_table(task: str, lines: list[dict], verdicts: dict[str, Verdict | None]) -> str:
    """Rows are difficulties, columns are arms. Enters the verdict of every cell in `verdicts`."""
    metric, arms, chances = metric_of(lines[0]), list(by_arm(lines)), chances_of(lines)
    kinds = {line["arm"]: kind_of(line) for line in lines}
    rows = []
    for difficulty, cell in split_by(lines, "difficulty").items():
        scores = {arm: metric_score(own) for arm, own in by_arm(cell).items()}
        shown = {arm: f"{badness(score, metric):.3f}" for arm, score in scores.items()}
        students = [arm for arm in scores if kinds[arm] not in YARDSTICKS and math.isfinite(scores[arm].mean)]
        best = min((shown[arm] for arm in students), key=float, default="")
        row = [str(difficulty)]
        for arm in arms:
            bold = "**" if arm in students and shown[arm] == best else ""
            row.append(f"{bold}{scores[arm]}{bold} ({scores[arm].num_seeds})" if arm in scores else "")
        if chances:
            row.append(f"{chances[difficulty]:.3f}" if difficulty in chances else "")
        verdict = verdicts[f"{task} {difficulty}"] = judge(scores, kinds, metric)
        sides = f"{verdict.signed()} ({verdict.ours} against {verdict.rival})" if verdict else ""
        rows.append([*row, sides, verdict.word if verdict else "not compared"])
    header = ["difficulty", *(f"`{arm}`" for arm in arms), *(["chance"] if chances else [])]
    title = f"### `{task}`: {UNITS[metric].label} ({UNITS[metric].better} is better)"
    return f"{title}\n\n{markdown_table([*header, 'ours - bptt', 'verdict'], rows)}"


def _speeds(lines: list[dict]) -> str:
    """Seconds of training until the student's own rollout is first evaluated at `REACHED` or more, per cell and arm."""
    lines = [line for line in lines if metric_of(line) == "accuracy" and (line.get("curve") or {}).get("accuracy")]
    names = list(looks_of([display_name(line) for line in lines]))  # in the order of the figures
    rows = []
    for title, cell in cells_with(lines, "curve"):
        row = [title]
        for name in names:
            own = [line for line in cell if display_name(line) == name]
            reached = [at for at in map(_seconds_until_reached, own) if at is not None]
            row.append(f"{fmean(reached):.0f} ({len(reached)} of {len(own)})" if reached else "never" if own else "")
        rows.append(row)
    if not rows:
        return ""
    legend = (
        f"Seconds of training until an evaluation of the student's own rollout first has an accuracy of {REACHED}: the "
        "mean over the runs that have reached it, and how many have."
    )
    return f"### Seconds to {REACHED}\n\n{legend}\n\n{markdown_table(['cell', *names], rows)}"


def _seconds_until_reached(line: dict) -> float | None:
    points = zip(line["curve"]["seconds"], line["curve"]["accuracy"])
    return next((at for at, accuracy in points if accuracy is not None and accuracy >= REACHED), None)


def _summary(verdicts: dict[str, Verdict | None]) -> list[str]:
    compared = {cell: verdict for cell, verdict in verdicts.items() if verdict}
    cells: dict[str, list[str]] = {"ahead": [], "level": [], "behind": []}
    for cell, verdict in compared.items():
        word, comma, both_fail = verdict.word.partition(",")
        cells[word].append(f"{cell} ({verdict.signed()}{comma}{both_fail})")
    counts = ", ".join(f"{word} in {len(some)}" for word, some in cells.items())
    failed = [cell for cell, verdict in compared.items() if "," in verdict.word]
    lines = [
        f"**Our best arm against the better BPTT: {counts} of {len(compared)} cells; among them, both are below "
        f"{SOLVED} in: {', '.join(failed) or 'none'}.**",
        "\n".join(f"- {word}: {', '.join(some) or 'nowhere'}" for word, some in cells.items()),
    ]
    single = [cell for cell, verdict in compared.items() if verdict.difference.num_seeds == 1]
    if single:
        lines.append(f"An arm with a single seed has no standard error: {len(single)} of the verdicts rest on one.")
    missing = [cell for cell, verdict in verdicts.items() if verdict is None]
    if missing:
        lines.append(f"Not compared, one of the two sides was not run: {', '.join(missing)}.")
    return lines


def _unequal(lines: list[dict], verdicts: dict[str, Verdict | None]) -> list[str]:
    """The verdicts on arms that were not trained for the same time."""
    notes = []
    for (task, difficulty), cell in split_by(lines, "task", "difficulty").items():
        verdict, arms = verdicts[f"{task} {difficulty}"], by_arm(cell)
        if verdict is None:
            continue
        ours, rival = (score_of(arms[arm], "wall_clock_s") for arm in (verdict.ours, verdict.rival))
        if ours and rival and max(ours.mean, rival.mean) > _SAME_TIME * min(ours.mean, rival.mean):
            notes.append(f"{task} {difficulty} (ours {ours.mean:,.0f} s, bptt {rival.mean:,.0f} s)")
    return [f"Trained for times that differ by more than a tenth: {', '.join(notes)}."] if notes else []


def _doubles(lines: list[dict]) -> list[str]:
    counts: Counter[str] = Counter()
    for line in lines:
        variant = f"{line['variant']}, " if line.get("variant") else ""
        if kind_of(line) not in YARDSTICKS:
            counts[f"{line['task']} {line['difficulty']} {variant}{line['arm']} seed {line['seed']}"] += 1
    doubles = [f"{run} ({count} lines)" for run, count in counts.items() if count > 1]
    return [f"Averaged before anything else, as one arm and seed: {', '.join(doubles)}."] if doubles else []


def _mean(lines: list[dict], key: str) -> str:
    values = [line[key] for line in lines if line.get(key) is not None]
    return f"{fmean(values):,.0f}" if values else ""


def _costs(lines: list[dict]) -> str:
    keys = {"wall_clock_s": "seconds", "tokens": "tokens", "sequential_steps": "sequential steps"}
    rows = []
    for task, some in split_by(lines, "task").items():
        for arm, own in by_arm(some).items():
            costs = [_mean(own, key) for key in keys]
            if any(costs):
                rows.append([f"`{task}`", f"`{arm}`", *costs, str(len(own))])
    legend = "Means over difficulties and seeds. Sequential steps are transitions that are computed one after another."
    return _section("Costs", [legend, markdown_table(["task", "arm", *keys.values(), "lines"], rows)] if rows else [])


def _sweeps(lines: list[dict]) -> str:
    lines = [{**line, "variant": line["variant"] or "as it stands"} for line in lines]  # None: a group without variants
    parts = ["Best first. They are not part of the results above, nor of the figures."] if lines else []
    for group, of_group in split_by(lines, "group").items():
        parts.append(f"### {group}")
        for (task, difficulty), cell in split_by(of_group, "task", "difficulty").items():
            parts.append(f"`{task}` {difficulty}:\n\n{_sweep_table(cell)}")
        parts += _doubles(of_group)
    return _section("Ablations and sweeps", parts)


def _sweep_table(cell: list[dict]) -> str:
    metric, runs = metric_of(cell[0]), []
    for (variant, arm), some in split_by(cell, "variant", "arm").items():
        score = metric_score(some)
        row = [variant, f"`{arm}`", str(score), _mean(some, "wall_clock_s"), str(score.num_seeds)]
        runs.append((badness(score, metric), natural_order(variant), arm_order(some[0]), row))
    header = ["variant", "arm", UNITS[metric].label, "seconds", "seeds"]
    return markdown_table(header, [run[-1] for run in sorted(runs)])


def _text_samples(lines: list[dict]) -> str:
    parts = []
    for title, cell in hardest_cells(lines, "samples"):
        for arm, own in by_arm(cell).items():
            line = min(own, key=itemgetter("seed"))
            texts = [sample for sample in line["samples"] if isinstance(sample, str)]
            if texts:
                shown = f"the first {min(len(texts), _NUM_TEXTS)} of {len(texts)}"
                parts.append(f"{title}, `{arm}`, seed {line['seed']}, {shown}:")
                parts += [_code(text) for text in texts[:_NUM_TEXTS]]
    return _section("Sampled text", parts)


def _provenance(lines: list[dict]) -> str:
    def count(values: Iterable) -> str:
        return "; ".join(f"{value} ({number} lines)" for value, number in sorted(Counter(map(str, values)).items()))

    def listing(facts: dict) -> str:
        return ", ".join(f"{key} {value}" for key, value in sorted(facts.items()))

    def values_of(lines: list[dict], key: str) -> list:
        return [line[key] for line in lines if line.get(key) is not None]

    commits, facts = "commits (`+`: with changes that are in no commit)", {}
    titles = {"hardware": "hardware", "num_threads": "threads", "commit": commits}
    for key, title in {**titles, "versions": "versions", "student": "students"}.items():
        values = values_of(lines, key)
        facts[title] = count(listing(value) if isinstance(value, dict) else value for value in values)
    for key, title in (("seed", "seeds"), ("n", "labels scored (`n`)")):
        of_task = {task: sorted(set(values_of(some, key))) for task, some in split_by(lines, "task").items()}
        texts = [f"{task}: {', '.join(f'{value:,}' for value in some)}" for task, some in of_task.items() if some]
        facts[title] = "; ".join(texts)
    return _section(
        "Where the numbers come from", ["\n".join(f"- {key}: {text}" for key, text in facts.items() if text)]
    )

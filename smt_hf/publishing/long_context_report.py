"""The report of long-context lines: tables and figures, made from them and from nothing else."""

import json
from pathlib import Path

from smt_hf.errors import InputError

from .export import write_text
from .long_context_figures import draw_long_context
from .long_context_scores import CONTROLS, Score, by_task, difference, means_by, scores_of
from .tables import markdown_table

_HOW_TO_READ = """How to read the tables:

- A score has its 95 % interval over samples behind it; or, over several trainings of one name, its standard error and
  the number of trainings.
- Chance is the score of a guess. *Needle removed*: the same prompts without what the answer is in. *Last window*: the
  last tokens of the prompts alone. *Shortcut*: the answer of a reader without memory, for which no model is asked: the
  label mentioned last, or what the last 512 characters hold. Controls may be of the first samples alone
  (`--control_samples`).
- *Memory* says yes where the lower end of the score is above chance and above all controls.
- *Tokens right* and *nats per token* are of the true answer, each token after the true ones before it. *More nats
  without needle*: by how much the loss of the same answers is higher; above 0, the needle was of use. *Label ranking*:
  how often the most likely label is right, and its chance.
- In SCROLLS the needle is the whole text. Without it there is the text of another sample, a shuffled context. Its
  *official* number for summaries is the geometric mean of three means, which is not the mean over samples beside it.
- *State*: what the model keeps of one prompt, its keys and values for example, the most that it had. *Tokens/s*: of all
  prompts side by side, with those of the controls and what is written.
- Lengths hold the prompt and the tokens to write. A byte is about a quarter of a usual token."""


def render_long_context(lines: list[dict], name: str, folder: Path, against: str | None = None) -> list[Path]:
    """Write `<folder>/<name>.md`, and `<folder>/<name>_{score,depth,distance,position}.png` for what the lines
    hold.

    The order of the lines changes nothing. Figures of an earlier report of this name that have no data now are removed.

    Args:
        lines: as `read_lines` returns them.
        against: name of a model whose score is taken from that of every other model, cell by cell.

    Returns:
        The files, the Markdown first.

    Raises:
        InputError: a line lacks something, two do not belong together, or there is no model of the name `against`.
    """
    scores = scores_of(sorted(lines, key=lambda line: json.dumps(line, sort_keys=True)))
    figures = draw_long_context(scores, name, Path(folder))
    pictures = [f"### {caption}\n\n![{caption}]({figure.name})" for figure, caption in figures.items()]
    tasks = by_task(scores)
    parts = [
        f"# {name}",
        f"Made by `smt_hf.publishing.long_context_report` from {len(lines)} lines. Change numbers there, not here.",
        *_models(scores),
        *([] if against is None else [_differences(scores, against)]),
        _HOW_TO_READ,
        *(_table_of(*task, own) for task, own in tasks.items()),
        *(["## Figures", *pictures] if pictures else []),
        *_provenance(lines),
    ]
    path = Path(folder) / f"{name}.md"
    write_text("\n\n".join(part for part in parts if part) + "\n", path)
    return [path, *figures]


def _table_of(suite: str, task: str, unit: str, scores: list[Score]) -> str:
    metric = scores[0].lines[0]["metric"]
    if any(means_by(score, "by_position", "position", "value") for score in scores):
        parts = [_series(scores, "by_position", "position", unit), _series(scores, "by_context", "context", unit)]
        return "\n\n".join([f"## {suite}: {task}, {metric}", *filter(None, parts)])
    rows = []
    for score in scores:
        shows = score.shows_memory()
        row = [f"{score.length:,}", score.name, _counts(score), score.written("value"), _plain(score.mean("official"))]
        row.append(_plain(score.mean("chance")))
        row += [_plain(score.mean("controls", control, "value")) for control in CONTROLS]
        row.append("" if shows is None else "yes" if shows else "no")
        row += [score.written("graded", graded, "value") for graded in ("tokens_right", "nats_per_token")]
        row.append(score.written("controls", "needle_removed", "more_nats", "value"))
        ranking = score.written("graded", "ranking", "value")
        row.append(f"{ranking}, chance {_plain(score.mean('graded', 'ranking', 'chance'))}" if ranking else "")
        row += [_whole(score.mean("state_bytes")), _rounded(score.mean("tokens_per_second"))]
        rows.append(row)
    head = [f"length ({unit})", "model", "samples", metric, "official", "chance", *CONTROLS.values(), "memory"]
    head += ["tokens right", "nats per token", "more nats without needle", "label ranking", "state (bytes)", "tokens/s"]
    parts = [f"## {suite}: {task}", markdown_table(*_without_empty(head, rows))]
    return "\n\n".join(parts)


def _differences(scores: list[Score], against: str) -> str:
    """How far each model is ahead of one of them, in every cell that both have."""
    names = list(dict.fromkeys(score.name for score in scores))
    if against not in names:
        raise InputError(f"there is no model {against!r} to compare with; the lines have {', '.join(names)}.")
    cells: dict[tuple, dict[str, Score]] = {}  # of samples of one kind
    for score in scores:
        # Of bits per byte, less is better, and they are told by position.
        if score.lines[0]["metric"] != "bits_per_byte" and score.values("value"):
            cell = (score.suite, score.task, score.length, score.unit, score.lines[0].get("made_by"))
            cells.setdefault(cell, {})[score.name] = score
    others = [name for name in names if name != against]
    rows = []
    for (_, task, length, unit, _), models in cells.items():
        if against in models and len(models) > 1:
            verdicts = [compared(models[name], models[against]) if name in models else "" for name in others]
            rows.append([task, f"{length:,} {unit}", *verdicts])
    if not rows:
        raise InputError(
            f"no other model has a score in a cell that {against!r} has one in, of samples of the same kind."
        )
    legend = (
        "Differences of the scores, with their standard errors: those over trainings, or those over samples if these "
        "are larger. *Ahead* and *behind* are differences with a probability below 5 % if the two were equal (Welch's "
        "test; of three trainings a side, up to 4.3 standard errors are needed). *Level* is whatever is not told "
        "apart. A model that was trained once is compared as that one training. A difference without a word is of a "
        "score without an interval."
    )
    return f"## Against {against}\n\n{legend}\n\n{markdown_table(['task', 'length', *others], rows)}"


def compared(score: Score, rival: Score) -> str:
    """How far a score is ahead of another of the same cell, in words and numbers."""
    ahead, error, needed = difference(score, rival)
    if not (score.standard_error()[0] and rival.standard_error()[0]):
        return f"{ahead:+.3f}"
    verdict = "ahead" if ahead > needed else "behind" if ahead < -needed else "level"
    return f"{verdict}, {ahead:+.3f} ± {error:.3f}"


def _without_empty(head: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    kept = [place for place in range(len(head)) if any(row[place] for row in rows)]
    return [head[place] for place in kept], [[row[place] for place in kept] for row in rows]


def _series(scores: list[Score], series: str, place: str, unit: str) -> str:
    """Bits per byte of each model by position or context, of its longest streams."""
    longest = {score.name: score for score in scores if means_by(score, series, place, "value")}
    columns = {name: means_by(score, series, place, "value") for name, score in longest.items()}
    places = sorted({at for means in columns.values() for at in means})
    rows = [[f"{at:,}", *(_plain(means.get(at)) for means in columns.values())] for at in places]
    if not rows:
        return ""
    legend = {
        "by_position": "Bits per byte of the tokens up to a position, from the one of the row above on:",
        "by_context": "Bits per byte of the ends of the same streams, after so much context:",
    }[series]
    return f"{legend}\n\n{markdown_table([f'{place} ({unit})', *columns], rows)}"


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _rounded(value: float | None) -> str:
    """Three digits: machines differ by more."""
    return "" if value is None else f"{float(f'{value:.3g}'):,.0f}"


def _counts(score: Score) -> str:
    counts = sorted({int(number) for number in score.values("n")})
    return " to ".join(dict.fromkeys([f"{counts[0]:,}", f"{counts[-1]:,}"])) if counts else ""


def _models(scores: list[Score]) -> list[str]:
    """One entry per model: what it is, what it was trained on, how it was read."""
    entries: dict[str, dict[str, dict[str, None]]] = {}  # name -> description -> checkpoints
    for score in scores:
        for line in score.lines:
            facts = [line.get("model_type"), line.get("num_parameters"), line.get("trained_on"), line.get("reading")]
            kind = f"{facts[0]}, {facts[1]:,} parameters" if facts[1] is not None else str(facts[0])
            text = f"{kind}; trained on: {facts[2] or 'not said'}; read in {facts[3]}"
            entries.setdefault(score.name, {}).setdefault(text, {})[f"`{line.get('checkpoint')}`"] = None
    listed = {
        name: " / ".join(f"{text}; {', '.join(sorted(checkpoints))}" for text, checkpoints in texts.items())
        for name, texts in entries.items()
    }
    return ["\n".join(f"- **{name}**: {text}" for name, text in listed.items())]


def _provenance(lines: list[dict]) -> list[str]:
    facts = {}
    for key in ("commit", "hardware", "versions", "num_threads", "device", "seed", "settings"):
        values = [line[key] for line in lines if line.get(key) is not None]
        texts = sorted({json.dumps(value, sort_keys=True).strip('"') for value in values})
        facts[key] = "; ".join(texts)
    listed = "\n".join(f"- {key}: {text}" for key, text in facts.items() if text)
    return ["## Where the numbers come from", listed] if listed else []

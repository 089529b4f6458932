"""Arms: what a line's `phases` trained, the kind that makes an arm ours or a rival, and its name in figures.

A line names its arm (`smt8_dmt`) and holds, as data, the phases that trained it. Yardsticks are known by their promised
names: `teacher`, and `ngram1` to `ngram3`, which no phase trains.
"""

import re

# In the order of every table, axis and legend.
KINDS = ("ours", "mixed", "published", "rival", "other", "teacher", "ngram")
YARDSTICKS = ("teacher", "ngram")
# Settings of a phase that tell arms apart; every line has them where they differ from their defaults.
NAMING = ("phase", "transition_steps", "context_length", "trains_updater", "num_supervised_transitions")


def student_phases(line: dict) -> list[dict]:
    """The phases of a line that trained the student's updater."""
    return [phase for phase in line.get("phases") or [] if phase.get("trains_updater", True)]


def kind_of(line: dict) -> str:
    """The kind of a line's arm, one of `KINDS`.

    `ours` has smt or dmt phases and no bptt phase, `rival` has bptt phases alone, `mixed` has both; `published` is SMT
    with a few supervised transitions per row; `other` is an arm that no phase of ours trained.
    """
    if line["arm"] == "teacher":
        return "teacher"
    if re.fullmatch(r"ngram\d", line["arm"]):
        return "ngram"
    phases = student_phases(line)
    if any(phase.get("num_supervised_transitions") for phase in phases):
        return "published"
    has_bptt = any(phase["phase"] == "bptt" for phase in phases)
    if any(phase["phase"] in ("smt", "dmt") for phase in phases):
        return "mixed" if has_bptt else "ours"
    return "rival" if has_bptt else "other"


def display_name(line: dict) -> str:
    """What a line's arm is, in words for people: `ours, 1 step`, `BPTT, truncated`, `3-gram`."""
    kind, phases = kind_of(line), student_phases(line)
    if kind == "ngram":
        return f"{line['arm'][-1]}-gram"
    if kind == "teacher":
        is_published = any(phase.get("num_supervised_transitions") for phase in phases)
        return "teacher, published" if is_published else "teacher"
    if kind == "ours":
        steps = max(phase["transition_steps"] for phase in phases)
        has_dmt = any(phase["phase"] == "dmt" for phase in phases)
        return f"ours, {'1 step' if steps == 1 else 'multi-step'}{'' if has_dmt else ', no dmt'}"
    if kind == "rival":
        is_whole = all(phase["transition_steps"] >= phase["context_length"] for phase in phases)
        return "BPTT" if is_whole else "BPTT, truncated"
    return {"mixed": "SMT, then BPTT", "published": "published"}.get(kind, line["arm"])


def is_whole_run(line: dict) -> bool:
    """Whether the line is of an arm that a run was made for, not of a stage on the way to it."""
    return line.get("is_last", "run" not in line)


def natural_order(text: str) -> list[tuple]:
    """A key that sorts `smt8` before `smt16`."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]


def arm_order(line: dict) -> tuple:
    """A key that sorts lines by the kind, then by the name of their arms: the order of every table, axis and legend."""
    return KINDS.index(kind_of(line)), [natural_order(part) for part in line["arm"].split("_")]


def by_arm(lines: list[dict]) -> dict[str, list[dict]]:
    """The arms in order -> the lines of each, in their order."""
    arms = dict.fromkeys(line["arm"] for line in sorted(lines, key=arm_order))
    return {arm: [line for line in lines if line["arm"] == arm] for arm in arms}

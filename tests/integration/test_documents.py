"""What the documents say holds: commands parse, Python examples run, numbers are those of the runs, links lead on."""

import json
import math
import re
import shlex
from pathlib import Path
from statistics import fmean, stdev

import pytest

from smt_hf.experiments.grid_file import parse_grid
from smt_hf.experiments.long_context import parse_evaluate
from smt_hf.experiments.run_arguments import parse_run

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "recipes" / "README.md"]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), flags=re.DOTALL)


def commands() -> list[list[str]]:
    """Command lines of the documents, of code blocks and of tables, as words."""
    found = []
    for path in DOCUMENTS:
        lines = "\n".join(blocks(path, "bash")).replace("\\\n", "").splitlines()
        lines += re.findall(r"`((?:accelerate launch|python) recipes/[^`]*)`", path.read_text())
        found += [shlex.split(line, comments=True) for line in lines]
    return found


def test_ci_finds_the_commands_in_the_readme():
    readme, script = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    first = "pip install -e . torch==2.13.0 && accelerate launch recipes/pretrain.py"
    second = 'pip install -e ".[test]" torch==2.13.0 && pytest -n 2'
    for command, found_by in ((first, "pip install -e . torch"), (second, 'pip install -e ".[test]" torch')):
        assert readme.count(command + "\n") == 1 and readme.count(found_by) == 1
        assert f"readme_command '{found_by}'" in script
    assert "\n".join(readme.splitlines()[:40]).count(first)


def test_commands_are_accepted(monkeypatch):
    monkeypatch.chdir(ROOT)
    parsed = 0
    for words in commands():
        if "recipes/pretrain.py" in words:
            parse_run(words[words.index("recipes/pretrain.py") + 1 :])
            parsed += 1
        elif "recipes/experiment.py" in words:
            parse_grid(words[words.index("recipes/experiment.py") + 1 :])
            parsed += 1
        elif "recipes/evaluate.py" in words:
            parse_evaluate(words[words.index("recipes/evaluate.py") + 1 :])
            parsed += 1
    assert parsed >= 15
    published = re.search(r"`(--teacher_model_type smt_windowed_teacher [^`]*)`", DOCUMENTS[2].read_text())
    assert published
    parse_run(shlex.split(published.group(1)))


def test_python_examples(tmp_path, monkeypatch, text_file):
    """They run as they stand, with fewer steps: the library first, then those that use its checkpoint."""
    (load,), (state, library) = blocks(ROOT / "README.md", "python"), blocks(DOCUMENTS[2], "python")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text(text_file.read_text())
    exec(library.replace("max_steps=600", "max_steps=2, use_cpu=True"), {})
    assert (tmp_path / "runs" / "library" / "student" / "model.safetensors").exists()
    names: dict = {}
    load = load.replace("runs/pretrain/student", "runs/library/student")
    exec(load.replace("max_new_tokens=200", "max_new_tokens=5"), names)
    exec(state, names)
    assert names["again"].get_seq_length() == len("def main(") + len("argv)") and names["logits"].shape[1] == 5
    assert names["model"].model.final_memory(**names["inputs"]).shape == (1, 4, 64)


def test_the_numbers_of_the_default_run():
    results = json.loads((ROOT / "model_cards" / "text_cpu" / "eval_results.json").read_text())
    ours, rival = (results["arms"][arm] for arm in (results["student_arm"], "bptt_truncated"))
    readme = (ROOT / "README.md").read_text()
    seconds = {f"{part['wall_clock_s']:.0f} s" for part in (ours, rival)}
    assert len(seconds) == 1  # as many for both
    row = f"| {ours['bits_per_byte']:.3f} | {rival['bits_per_byte']:.3f} | 8 | two threads, {seconds.pop()}"
    assert row in readme
    assert f"Expect {ours['bits_per_byte']:.2f} bits per byte" in readme
    lines = (ROOT / "model_cards" / "evidence" / "text_cpu.jsonl").read_text().splitlines()
    newest = [line["bits_per_byte"] for line in map(json.loads, lines) if line["arm"] == results["student_arm"]]
    assert newest[-1] == pytest.approx(ours["bits_per_byte"], abs=1e-4)


def scores_of(name: str) -> dict:
    """(task, difficulty) -> side -> arm -> scores of its seeds. The sides are ours without a bptt phase, and BPTT."""
    scores: dict = {}
    for line in map(json.loads, (ROOT / "model_cards" / "evidence" / f"{name}.jsonl").read_text().splitlines()):
        side = "ours" if line["arm"].startswith("smt") else line["arm"].removesuffix("_truncated")
        cell = scores.setdefault((line["task"], line["difficulty"]), {})
        score = line["bits_per_byte"] if "bits_per_byte" in line else line["accuracy"]
        cell.setdefault(side, {}).setdefault(line["arm"], []).append(score)
    return scores


def verdict(ours: list[float], theirs: list[float]) -> str:
    difference = fmean(ours) - fmean(theirs)
    error = math.hypot(*(stdev(values) / math.sqrt(len(values)) for values in (ours, theirs)))
    if abs(difference) <= max(0.02, 2 * error):
        return "level"
    return "ahead" if difference > 0 else "behind"


def test_the_numbers_of_the_tasks():
    """Each cell of the README is a mean over three seeds of the lines; none is said to differ, and none does."""
    scores, readme = scores_of("probes_long"), (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)`: .*?(\d[\d /]+)\D*\| ([\d. /]+) % \| ([\d. /]+) % \|", readme, flags=re.MULTILINE)
    assert len(rows) == 5
    for task, difficulties, *sides in rows:
        for number, difficulty in enumerate(map(int, difficulties.split("/"))):
            (ours,) = scores[task, difficulty]["ours"].values()
            (theirs,) = scores[task, difficulty]["bptt"].values()
            assert len(ours) == len(theirs) == 3
            written = [side.split(" / ")[number] for side in sides]
            assert written == [f"{100 * fmean(values):.1f}" for values in (ours, theirs)]
            assert verdict(ours, theirs) == "level"


def test_the_counts_of_the_other_updaters():
    """Of ours without bptt and of BPTT, the arm with the better mean in each cell."""
    verdicts = []
    for sides in scores_of("probes").values():
        ours, theirs = (max(sides[side].values(), key=fmean) for side in ("ours", "bptt"))
        assert len(ours) == len(theirs) == 3
        verdicts.append(verdict(ours, theirs))
    counts = {word: verdicts.count(word) for word in ("ahead", "level", "behind")}
    assert counts == {"ahead": 3, "level": 10, "behind": 2}
    text = " ".join((ROOT / "README.md").read_text().split())
    assert "With the `mlp` updater SMT is ahead in 3, level in 10 and behind in 2 of 15 cells" in text


def test_the_numbers_of_text():
    (cell,) = scores_of("text_fast_weight").values()
    (ours,), (theirs,) = (cell[side].values() for side in ("ours", "bptt"))
    assert len(ours) == len(theirs) == 3
    row = f"| text, one thread | {fmean(ours):.3f} | {fmean(theirs):.3f} | 8 | 600 s, 3 seeds |"
    assert row in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        target, _, anchor = link.partition("#")
        if target.startswith("http"):
            continue
        file = path.parent / target if target else path
        assert file.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, link


def test_what_contributing_points_at_is_there():
    """Files that it names exist, and symbols are in the file that it names for them."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    places = (ROOT / "smt_hf", ROOT, ROOT / "tests" / "integration")
    files = {name: [place / name for place in places if (place / name).exists()] for name in named_files(text)}
    assert len(files) > 15 and [name for name, found in files.items() if not found] == []
    symbols = re.findall(r"`@?(\w+)`\s(?:in|of)\s`([\w/]+\.py)`", text)
    assert len(symbols) > 5
    for symbol, name in symbols:
        assert re.search(rf"\b{symbol}\b", files[name][0].read_text()), f"{symbol} is not in {name}"


def named_files(text: str) -> set[str]:
    return {name for name in re.findall(r"`([\w/.]+\.(?:py|yaml|md))`", text) if "NAME" not in name}

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
    row = f"| {ours['bits_per_byte']:.3f} | {rival['bits_per_byte']:.3f} | 8 | Muon, {ours['wall_clock_s']:.0f} s"
    assert row in readme
    more = rival["wall_clock_s"] / ours["wall_clock_s"] - 1
    assert f"({100 * more:.0f} % more for BPTT in the" in readme
    assert f"Expect {ours['bits_per_byte']:.2f} bits per byte" in readme
    lines = (ROOT / "model_cards" / "evidence" / "text_cpu.jsonl").read_text().splitlines()
    newest = [line["bits_per_byte"] for line in map(json.loads, lines) if line["arm"] == results["student_arm"]]
    assert newest[-1] == pytest.approx(ours["bits_per_byte"], abs=1e-4)


def test_the_numbers_of_the_probes():
    """Each cell of the README: of the lines, the best of ours without bptt and the better BPTT, by their means."""
    lines = (ROOT / "model_cards" / "evidence" / "probes.jsonl").read_text().splitlines()
    scores: dict = {}
    for line in map(json.loads, lines):
        side = "ours" if line["arm"].startswith("smt") else line["arm"].removesuffix("_truncated")
        cell = scores.setdefault((line["task"], line["difficulty"]), {})
        cell.setdefault(side, {}).setdefault(line["arm"], []).append(line["accuracy"])
    readme = (ROOT / "README.md").read_text()
    verdicts = {"ahead": [], "level": [], "behind": []}
    rows = re.findall(
        r"^\| `(\w+)`.*?(\d[\d /]+) .*?\| `smt,dmt` \| ([\d. /]+) % \| ([\d. /]+) % \|", readme, flags=re.MULTILINE
    )
    for task, difficulties, *sides in rows:
        for number, difficulty in enumerate(map(int, difficulties.split("/"))):
            names = [
                max(scores[task, difficulty][side].items(), key=lambda arm: fmean(arm[1])) for side in ("ours", "bptt")
            ]
            assert "_dmt" in names[0][0]
            best = [values for _, values in names]
            assert [side.split(" / ")[number] for side in sides] == [f"{100 * fmean(values):.1f}" for values in best]
            assert all(len(values) == 3 for values in best)
            difference = fmean(best[0]) - fmean(best[1])
            error = math.hypot(*(stdev(values) / math.sqrt(3) for values in best))
            counts = abs(difference) > max(0.02, 2 * error)
            verdicts["level" if not counts else "ahead" if difference > 0 else "behind"].append((task, difficulty))
    assert [len(cells) for cells in verdicts.values()] == [3, 10, 2]
    assert {task for task, _ in verdicts["ahead"]} == {"keys_values"}
    assert verdicts["behind"] == [("string_copy", 24), ("string_copy", 48)]


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

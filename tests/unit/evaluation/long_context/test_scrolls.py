"""SCROLLS from files in its own format."""

import json
import zipfile

import pytest

from smt_hf.errors import InputError
from smt_hf.evaluation.long_context import LongContextSettings, TooShort, official, tasks_of

TEXT = " ".join(f"word{number}" for number in range(400))
QUALITY = "What is it?\n\n (A) a red\n house\n (B) a dog\n (C) a cat\n (D) none\n\n" + TEXT
MEETING = {
    "meeting_transcripts": [
        {"speaker": "Professor E", "content": "So . OK ."},
        {"speaker": "Grad G", "content": "Fine ."},
    ],
    "general_query_list": [{"query": "Summarize the meeting.", "answer": "They began."}],
    "specific_query_list": [{"query": "What was agreed?", "answer": "Nothing."}],
}


def row(name, text, output):
    return {"id": name, "pid": f"{name}_0", "input": text, "output": output}


def folder(tmp_path, task, rows, part="validation"):
    path = tmp_path / task / f"{part}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(tmp_path)


def task_of(name, path, split="test"):
    return tasks_of("scrolls", [name], LongContextSettings(scrolls=path, split=split))[0]


def test_rows_with_one_id_are_references(tmp_path, count_bytes):
    rows = [
        row("a", f"Who?\n\n{TEXT}", "Ann"),
        row("b", f"Where?\n\n{TEXT} end", "here"),
        row("a", "Who?\n\nx", "Ann B."),
    ]
    task = task_of("narrative_qa", folder(tmp_path, "narrative_qa", rows))
    assert task.num_samples == 2 and task.metric == "f1"
    samples = {sample.answers: sample for sample in (task.sample(5000, index, 0, count_bytes) for index in range(2))}
    assert set(samples) == {("Ann", "Ann B."), ("here",)}
    sample = samples["Ann", "Ann B."]
    assert sample.prompt == f"{TEXT}\n\nQuestion: Who?\nAnswer:" and sample.facts["is_whole"]
    assert task.score(sample, "ann b") == 1 and task.score(sample, "Ann C") == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="has 2 samples"):
        task.sample(5000, 2, 0, count_bytes)


def test_a_long_text_is_cut(tmp_path, count):
    task = task_of("qasper", folder(tmp_path, "qasper", [row("a", f"Who?\n\n{TEXT}", "Ann")]))
    sample = task.sample(800, 0, 0, count)
    assert not sample.facts["is_whole"]
    assert sample.prompt == f"{sample.context}\n\nQuestion: Who?\nAnswer:" and TEXT.startswith(sample.context + " ")
    assert 800 - 10 < count(sample.prompt) + task.num_generated <= 800
    with pytest.raises(TooShort, match="does not fit in a length of 140: the smallest"):
        task.sample(140, 0, 0, count)


def test_summaries(tmp_path, count_bytes):
    pytest.importorskip("rouge_score")
    task = task_of("gov_report", folder(tmp_path, "gov_report", [row("a", f"Title\n\n{TEXT}", "word1 word2 word3")]))
    sample = task.sample(9000, 0, 0, count_bytes)
    assert sample.prompt == f"Title\n\n{TEXT}\n\nQuestion: What is a summary of the preceding text?\nAnswer:"
    assert task.score(sample, "word1 word2 word3") == pytest.approx(1) and task.score(sample, "word1") == 0
    parts = [task.parts(sample, written) for written in ("word1 word2 word3", "other")]
    assert official(parts) == pytest.approx(0.5)  # of the means; the mean of the samples' is the same here by chance
    parts = [{"rouge1": 1.0, "rouge2": 0.0, "rougeL": 1.0}, {"rouge1": 0.0, "rouge2": 1.0, "rougeL": 0.0}]
    assert official(parts) == pytest.approx(0.5) and official(parts[:1]) == official(parts[1:]) == 0


def test_choices(tmp_path, count_bytes):
    task = task_of("quality", folder(tmp_path, "quality", [row("a", QUALITY, "a red\n house")]))
    sample = task.sample(9000, 0, 0, count_bytes)
    assert sample.labels == ("a red house", "a dog", "a cat", "none") and task.chance(sample) == 0.25
    assert sample.prompt == (
        f"{TEXT}\n\nQuestion: What is it?\n (A) a red\n house\n (B) a dog\n (C) a cat\n (D) none\nAnswer:"
    )
    assert task.score(sample, "A red house.") == 1 and task.score(sample, "a dog") == 0


def test_relations(tmp_path, count_bytes):
    rows = [row("a", f"It ends.\n\n{TEXT}", "Not mentioned")]
    task = task_of("contract_nli", folder(tmp_path, "contract_nli", rows))
    sample = task.sample(9000, 0, 0, count_bytes)
    assert sample.prompt == f"{TEXT}\n\nHypothesis: It ends.\nConclusion:"
    assert sample.labels == ("Not mentioned", "Entailment", "Contradiction") and task.chance(sample) == 1 / 3
    assert task.score(sample, sample.completion) == 1


def test_the_control_has_another_document(tmp_path, count_bytes):
    rows = [row(name, f"Who {name}?\n\n{name * 3} {TEXT}", name) for name in "abc"]
    rows.append(row("d", "Who d?\n\nddd short", "d"))
    task = task_of("qasper", folder(tmp_path, "qasper", rows))
    for index in range(4):
        sample = task.sample(1000, index, 0, count_bytes)
        control = task.without_needles(sample)
        name = sample.answers[0]
        assert len(control.prompt) == len(sample.prompt) and name * 3 in sample.prompt
        assert name * 3 not in control.prompt and f"Who {name}?" in control.prompt


def test_zip_files_splits_and_single_files(tmp_path, count_bytes):
    with zipfile.ZipFile(tmp_path / "qasper.zip", "w") as archive:
        archive.writestr("qasper/train.jsonl", json.dumps(row("a", "Who?\n\nIn training.", "x")))
        archive.writestr("qasper/validation.jsonl", json.dumps(row("b", "Who?\n\nIn validation.", "y")))
    for split, text in (("train", "In training."), ("test", "In validation.")):
        assert task_of("qasper", str(tmp_path), split).sample(500, 0, 0, count_bytes).context == text
    file = tmp_path / "some.jsonl"
    file.write_text(json.dumps(row("c", "Who?\n\nIn one file.", "z")))
    assert task_of("qasper", str(file)).sample(500, 0, 0, count_bytes).context == "In one file."


def test_qmsum_as_its_authors_publish_it(tmp_path, count_bytes):
    file = tmp_path / "all_val.jsonl"
    file.write_text(json.dumps(MEETING) + "\n" + json.dumps(MEETING))
    task = task_of("qmsum", str(file))
    assert task.num_samples == 4
    prompts = {task.sample(2000, index, 0, count_bytes).prompt for index in range(4)}
    text = "Professor E: So . OK .\nGrad G: Fine ."
    assert prompts == {
        f"{text}\n\nQuestion: {query}\nAnswer:" for query in ("What was agreed?", "Summarize the meeting.")
    }


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="`qmsum` needs its data: give `--scrolls FOLDER`"):
        tasks_of("scrolls", ["qmsum"])
    with pytest.raises(InputError, match=r"`--scrolls` takes a folder with qasper/validation.jsonl or qasper.zip"):
        task_of("qasper", str(tmp_path))
    (tmp_path / "qmsum.zip").write_text("no archive")
    with pytest.raises(InputError, match="cannot read"):
        task_of("qmsum", str(tmp_path))
    with pytest.raises(InputError, match="line 1 is no row of SCROLLS"):
        task_of("qasper", folder(tmp_path, "qasper", [{"id": 1}]))
    with pytest.raises(InputError, match="line 1 is no row of SCROLLS"):  # of the test set
        task_of("qasper", folder(tmp_path, "qasper", [row("a", f"Who?\n\n{TEXT}", None)]))
    with pytest.raises(InputError, match="the example 'a' of `qasper` has no document after its question"):
        task_of("qasper", folder(tmp_path, "qasper", [row("a", "Who?", "Ann")]))
    (tmp_path / "qasper" / "validation.jsonl").write_text("{")
    with pytest.raises(InputError, match="line 1 is not valid JSON"):
        task_of("qasper", str(tmp_path))
    (tmp_path / "qasper" / "validation.jsonl").write_text("\n")
    with pytest.raises(InputError, match="has no example"):
        task_of("qasper", str(tmp_path))

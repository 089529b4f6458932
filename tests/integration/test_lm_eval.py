"""lm-eval's own front ends on a checkpoint, offline, on a local task; needs the extra `eval`."""

import json
import os
import subprocess
import sys

import pytest
import torch

from smt_hf.data import byte_tokenizer
from tests.conftest import make_student

pytest.importorskip("lm_eval", reason='needs the extra: pip install -e ".[eval]"')

pytestmark = pytest.mark.processes

TASK = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{[one, other]}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """A checkpoint, and what `lm_eval --model hf` says of it without our package."""
    folder = tmp_path_factory.mktemp("harness")
    student, tokenizer = make_student(vocab_size=258, updater_type="mlp"), byte_tokenizer()
    student.save_pretrained(folder / "checkpoint")
    tokenizer.save_pretrained(folder / "checkpoint")
    # The last text is longer than the 2048 tokens that lm-eval falls back to.
    texts = ["abc", "a longer text", "x" * 3000 + "yz" * 100]
    rows = [{"text": text, "one": one, "other": other} for text in texts for one, other in (("d", "qq"), ("ef", "g"))]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "letters.yaml").write_text(TASK.replace("FILE", str(folder / "rows.jsonl")))
    words = [
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={folder / 'checkpoint'},trust_remote_code=True",
    ]
    words += ["--tasks", "letters", "--include_path", folder / "tasks", "--batch_size", "2", "--device", "cpu"]
    words += ["--output_path", folder / "out", "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (folder / "out").rglob("samples_letters_*.jsonl")
    return student, tokenizer, rows, [json.loads(line) for line in samples.read_text().splitlines()]


def own_score(student, tokenizer, context, answer):
    ids = torch.tensor([tokenizer(context + answer)["input_ids"]])
    num = len(tokenizer(answer)["input_ids"])
    with torch.inference_mode():
        logs = student(ids).logits.log_softmax(-1)[0, -num - 1 : -1]
    return logs.gather(1, ids[0, -num:, None]).sum().item()


def test_nothing_is_cut_at_2048(harness, tmp_path):
    """The harness's own window is that of the configuration."""
    from lm_eval.models.huggingface import HFLM

    student, tokenizer, *_ = harness
    student.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert HFLM(pretrained=str(tmp_path), trust_remote_code=True, device="cpu").max_length == 8192


def test_scores_are_our_own(harness):
    student, tokenizer, rows, samples = harness
    assert len(samples) == len(rows) == 6
    for sample in samples:
        row = sample["doc"]
        for answer, ((score, _),) in zip((row["one"], row["other"]), sample["resps"]):
            assert float(score) == pytest.approx(own_score(student, tokenizer, row["text"], answer), abs=1e-3)

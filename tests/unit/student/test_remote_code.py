"""A checkpoint where this package is not installed: its own code, in a clean process that can ask nobody."""

import json
import os
import subprocess
import sys

from transformers import AutoTokenizer

from smt_hf.data.packing import byte_tokenizer
from tests.conftest import make_student

CLEAN = """
import json, sys, time
from transformers import AutoTokenizer, pipeline
folder = sys.argv[1]
begin = time.monotonic()
tokenizer = AutoTokenizer.from_pretrained(folder)
seconds = time.monotonic() - begin
generator = pipeline("text-generation", model=folder, trust_remote_code=True)
texts = generator(["ab", "c"], max_new_tokens=3, do_sample=False, batch_size=2)
print("\\n" + json.dumps([seconds, tokenizer("ab")["input_ids"], texts, "smt_hf" in sys.modules]))
"""


def test_nothing_waits_for_an_answer(tmp_path):
    """transformers reads config.json before a tokenizer and asks about code for a type of model that it does not know.

    With nobody to answer it goes on at once, without the code, and loads the tokenizer; a model needs
    `trust_remote_code=True`.
    """
    tokenizer = byte_tokenizer()
    student = make_student(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    student.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", CLEAN, str(tmp_path / "student")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    seconds, ids, texts, imported = json.loads(done.stdout.strip().splitlines()[-1])
    assert seconds < 10 and not imported  # the question would wait for 15 seconds
    assert ids == AutoTokenizer.from_pretrained(tmp_path / "student")("ab")["input_ids"]
    assert [texts[0][0]["generated_text"][:2], texts[1][0]["generated_text"][:1]] == ["ab", "c"]

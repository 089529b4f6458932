"""Documents with questions as rows to train on."""

import re

import numpy as np
import pytest
import torch

from smt_hf import BPTTTrainingArguments, SMTTrainingArguments
from smt_hf.data import Levels
from smt_hf.errors import InputError
from smt_hf.evaluation.long_context.haystack import noise_filler
from smt_hf.experiments.composition import resolve
from smt_hf.experiments.subjects import DocumentSubject, documents, exercises
from tests.unit.evaluation.long_context.conftest import make_book

pytest.importorskip("wonderwords")
pytest.importorskip("nltk")


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(documents, "_ROWS", 24)
    monkeypatch.setattr(documents, "_EVAL_ROWS", 6)
    monkeypatch.setattr(documents, "_BLIND_ROWS", 48)


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(make_book())
    return [str(path)]


def texts(subject, rows):
    return [subject.tokenizer.decode(row) for row in rows["input_ids"][:]]


def keys(subject, rows):
    """The parts of all keys."""
    found = [re.findall(r"for ([a-z'-]+)-([a-z]+) is: ", text) for text in texts(subject, rows)]
    return {word for of_row in found for key in of_row for word in key}


def test_rows_of_tasks_and_text(book):
    subject = DocumentSubject(["niah_single_2", "qa1", "text"], 512, [128, 1024], book, num_heldout=40)
    assert subject.level_names == [128, 512] and subject.name == "niah_single_2+qa1+text"
    assert len(subject.levels[512]) == len(subject.levels[128]) == 24
    for length, rows in subject.levels.items():
        ids, labels = (np.stack(rows[name][:]) for name in ("input_ids", "labels"))
        assert ids.shape == labels.shape == (24, length + 1)
        assert (labels[labels != -100] == ids[labels != -100]).all()
        num_text = sum((row[-32:] != -100).all() and (row[:-32] == -100).all() for row in labels)
        assert num_text == (12 if length == 128 else 8)  # as many as of each task
        decoded = texts(subject, rows)
        assert sum("Where is" in text for text in decoded) == (12 if length == 128 else 8)  # needles do not fit in 128
        assert sum("magic number" in text for text in decoded) == (0 if length == 128 else 8)
        for text, row in zip(decoded, labels):
            if "magic number" in text:
                answer = subject.tokenizer.decode(row[row != -100])
                assert re.fullmatch(r" \d{7}<\|endoftext\|>", answer) and f"is:{answer[:8]}." in text
    heldout = subject.tokenizer.decode(subject.heldout[0].ravel())
    assert "magic number" in heldout and "Where is" in heldout  # and no text
    assert 30 <= (subject.heldout[1] != -100).sum() <= 60


def test_what_is_right_without_the_document():
    """Room names are most of their letters once the first is known; digits are not."""
    numbers = DocumentSubject(["niah_single_1"], 384, num_heldout=90)
    assert 0.25 < numbers.chance < 0.45  # the space and the end, and few of the seven digits
    # Space, letter, the letter after it, end-of-text.
    trained = np.array([[-100, 32, 97, 98, 256], [-100, 32, 97, 98, 256], [-100, 32, 99, 100, 256]])
    heldout = np.array([[32, 99, 100, 256, -100], [32, 120, 98, 256, -100]])
    # Both first letters are guessed as 97. After 99 comes 100; after 120, never seen, what is commonest at that place.
    assert documents._blind_accuracy(trained, heldout) == (3 + 3) / 8


def test_text_has_no_part_in_chance_and_no_curriculum(book):
    alone, mixed = (DocumentSubject(names, 384, (), book) for names in (["niah_single_1"], ["niah_single_1", "text"]))
    assert abs(alone.chance - mixed.chance) < 0.1
    subject = DocumentSubject(["qa1", "text"], 256, [128], book)
    with pytest.raises(InputError, match="`text` among the `documents` never falls so low"):
        subject.required(BPTTTrainingArguments(output_dir="x", use_cpu=True, curriculum_threshold=0.5))
    assert subject.facts()["hash"] != DocumentSubject(["qa1", "text"], 256, [128], book, seed=1).facts()["hash"]


def test_exercises_fill_the_levels_in_which_no_task_fits(book):
    names = ["niah_single_1", "recall", "rooms", "chains"]
    subject = DocumentSubject(names, 512, [128], book, num_heldout=40)
    short, long = texts(subject, subject.levels[128]), texts(subject, subject.levels[512])
    assert len(short) == len(long) == 24
    assert not any("magic number" in text for text in short) and sum("magic number" in text for text in long) == 6
    assert sum("Where is" in text for text in long) == 6 and any("Where is" in text for text in short)
    heldout = subject.tokenizer.decode(subject.heldout[0].ravel())
    assert "magic number" in heldout and "Where is" not in heldout  # exercises are not scored
    words = set(make_book().split()) - set(noise_filler(200).split())
    assert "The grass is green" in "".join(short) and any(word in "".join(short) for word in words)
    alone = DocumentSubject(["niah_single_1"], 512, (), book, num_heldout=40)
    assert alone.chance == subject.chance
    documents.check_rows(names, [128, 512], book)


def test_levels_have_as_many_rows(book, monkeypatch):
    monkeypatch.setattr(documents, "_ROWS", 25)
    subject = DocumentSubject(["niah_single_1", "qa1", "recall", "rooms"], 384, [64, 128], book, num_heldout=10)
    assert {len(rows) for rows in subject.levels.values()} == {25}
    gated = BPTTTrainingArguments(output_dir="x", use_cpu=True, curriculum_threshold=0.5)
    assert len(subject.rows(gated)) == 25


def test_short_levels_are_of_exercises_alone(book):
    alone, mixed = (
        DocumentSubject(names, 256, [128, 192], book, num_heldout=10) for names in (["qa1"], ["qa1", "recall"])
    )
    asked = {level: sum("Where is" in text for text in texts(mixed, rows)) for level, rows in mixed.levels.items()}
    assert asked == {128: 0, 192: 12, 256: 12}
    assert sum("Where is" in text for text in texts(alone, alone.levels[128])) == 24
    assert mixed.heldout_rows(128, 2)[0].shape == (2, 129)


def test_other_rows_of_an_exercise_are_other_data(book, monkeypatch):
    def hashed():
        return DocumentSubject(["qa1", "rooms"], 256, (), book, num_heldout=10).facts()["hash"]

    before = hashed()
    assert before == hashed()
    monkeypatch.setattr(exercises, "_BRIEF", 0.0)
    assert hashed() != before


@pytest.mark.parametrize("name", ["text", "recall"])
def test_the_haystack_of_text_is_in_the_hash(book, tmp_path, name):
    (tmp_path / "other.txt").write_text(make_book(seed=1))
    names = ["niah_single_1", name]
    hashes = {DocumentSubject(names, 384, (), files).facts()["hash"] for files in (book, [str(tmp_path / "other.txt")])}
    assert len(hashes) == 2


def test_what_is_trained_on_is_not_tested(book):
    subject = DocumentSubject(["niah_single_2"], 512, (), book, num_heldout=300)
    trained = keys(subject, subject.levels[512])
    heldout = keys(subject, {"input_ids": subject.heldout[0]}) | keys(subject, subject.eval_rows)
    assert len(trained) > 20 and len(heldout) > 20 and not trained & heldout
    other = DocumentSubject(["niah_single_2"], 512, (), book, seed=1, num_heldout=300)
    assert not set(texts(subject, subject.levels[512])) & set(texts(other, other.levels[512]))
    np.testing.assert_array_equal(subject.heldout[0], other.heldout[0])  # the same for all seeds
    assert subject.facts()["hash"] != other.facts()["hash"]


def test_levels_of_phases(book):
    subject = DocumentSubject(["qa1"], 256, [128], book, num_heldout=10)
    gated = BPTTTrainingArguments(output_dir="x", use_cpu=True, curriculum_threshold=0.5, transition_steps=16)
    assert isinstance(subject.rows(gated), Levels)
    assert subject.required(gated) == {"context_length": 256, "transition_steps": 16, "carries_memory": False}
    wrong = BPTTTrainingArguments(output_dir="x", use_cpu=True, curriculum_threshold=0.5, curriculum_levels="32,192")
    with pytest.raises(InputError, match="rows of 32"):
        subject.required(wrong)
    own = BPTTTrainingArguments(output_dir="x", use_cpu=True, curriculum_threshold=0.5, curriculum_levels="192")
    assert subject.required(own)["curriculum_levels"] == ["192"]
    own.curriculum_threshold = None
    assert len(subject.rows(own)[0]["input_ids"]) == 193
    own.curriculum_levels = ["384"]  # longer than what is scored
    assert subject.required(own)["context_length"] == 384 and len(subject.rows(own)[0]["input_ids"]) == 385
    assert (len(subject.level(256)), len(subject.level(384))) == (24, 16)  # no more tokens
    own.curriculum_levels, own.curriculum_threshold = ["192", "384"], 0.5
    with pytest.raises(InputError, match="rows of 384 transitions a phase of their own"):
        subject.required(own)
    assert subject.longer(4) == 1024 and subject.heldout_rows(1024, 2)[0].shape == (2, 1025)


def test_a_haystack_that_is_too_short_for_a_level_is_found_before_the_run(tmp_path):
    (tmp_path / "short.txt").write_text(make_book()[:1500])
    subject = DocumentSubject(["qa1", "text"], 256, (), [str(tmp_path / "short.txt")], num_heldout=10)
    long = BPTTTrainingArguments(output_dir="x", use_cpu=True, curriculum_levels="4096")
    with pytest.raises(InputError, match="the haystack is shorter than a row of 4096 transitions"):
        subject.required(long)


def test_the_rival_has_no_rows_beyond_those_scored(book):
    subject = DocumentSubject(["qa1"], 256, [128], book, num_heldout=10)
    shared = {"output_dir": "x", "use_cpu": True, "curriculum_threshold": 0.5}
    rival = BPTTTrainingArguments(**shared)
    alone = {**shared, "trains_updater": False, "teacher_readout_weight": 1.0}
    phases = [SMTTrainingArguments(**alone), SMTTrainingArguments(**alone, curriculum_levels="384")]
    resolve(phases, subject, rival)
    assert [arguments.levels for arguments in (*phases, rival)] == [[128, 256], [384], [128, 256]]
    assert [arguments.context_length for arguments in (*phases, rival)] == [256, 384, 256]


@pytest.mark.parametrize(
    ("names", "difficulty", "settings", "message"),
    [
        (["niah_single"], 512, {}, "must be out of niah_single_1"),
        (["qa_squad"], 512, {}, "must be out of"),
        ([], 512, {}, "got none"),
        (["niah_single_1", "text"], 512, {}, "`haystack`"),
        (["text"], 512, {"haystack": ["x"]}, "`task` to text"),
        (["recall", "rooms"], 512, {}, "need a task that is tested, besides recall, rooms"),
        (["qa1"], 512, {}, "--haystack"),
        (["vt"], 512, {}, "vt of the `documents` does not fit in rows of 512"),
        (["niah_single_1", "vt"], 512, {}, "vt of the `documents` does not fit in rows of 512"),
        (["niah_single_1", "rooms"], 512, {"curriculum": [32]}, "exercises need rows of 63"),
        (["niah_single_1"], 512, {"curriculum": [128]}, "niah_single_1 .* does not fit in rows of 128"),
        (["niah_single_1"], 512, {"seed": 1_000_000}, "held-out"),
        (["niah_single_1"], 512, {"num_heldout": 0}, "num_heldout"),
    ],
)
def test_what_cannot_be_made(names, difficulty, settings, message):
    with pytest.raises(InputError, match=message):
        DocumentSubject(names, difficulty, **settings)


class Parrot:
    """A student that goes on with the same letters after every prompt, then ends."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, written):
        self.ids = torch.tensor([[*tokenizer.encode(written), tokenizer.eos_token_id]])

    def generate(self, prompt, max_new_tokens, **settings):
        assert self.ids.shape[1] <= max_new_tokens and not settings["do_sample"]
        return torch.cat([prompt, self.ids], dim=1)


def test_answers_for_the_card(book):
    """Prompts of the shortest held-out documents, without their answers."""
    subject = DocumentSubject(["qa1"], 384, [128, 256], book, num_heldout=10)
    answered = subject.answered(Parrot(subject.tokenizer, " pantry"), 3)
    assert len(answered) == 3
    rows, _ = subject.heldout_rows(128, 3)
    for row, sample in zip(rows, answered):
        assert sample["prompt"].endswith("?") and sample["continuation"] == " pantry"
        assert sample["answer"].strip() in ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
        whole = subject.tokenizer.decode(row, skip_special_tokens=True)
        assert whole == sample["prompt"] + sample["answer"]

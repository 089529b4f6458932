"""What subjects hand to the phases of a pipeline, and what they score."""

import json
import math
import warnings

import numpy as np
import pytest

from smt_hf import BPTTTrainingArguments, DMTTrainingArguments, SMTForPreTraining, SMTTrainingArguments
from smt_hf.data import Levels
from smt_hf.errors import InputError
from smt_hf.evaluation import score_student
from smt_hf.experiments.subjects import PixelSubject, TaskSubject, TextSubject
from smt_hf.training import SMTPreTrainingConfig
from smt_hf.training.phases import apply_required
from tests.conftest import student_config, teacher_config

SEQUENTIAL = {"on_policy_mode": "sequential", "on_policy_warmup_ratio": 0.0}


def phase(kind=BPTTTrainingArguments, **settings):
    return kind(output_dir="x", use_cpu=True, **settings)


def fitted(subject, *phases):
    """The lines that are printed of what the subject changes."""
    return [line for part in zip(phases, subject.required_of(phases)) for line in apply_required(*part)]


def test_what_a_task_requires():
    subject = TaskSubject("retrieval", 16, num_heldout=8)
    length = subject.num_transitions
    whole, truncated = phase(curriculum_threshold=0.5), phase(transition_steps=4)
    whole.transition_steps = whole.context_length
    before = str(whole)
    required = subject.required(whole)
    assert str(whole) == before  # nothing is set
    assert required == {
        "context_length": length,
        "transition_steps": length,
        "carries_memory": False,
        "curriculum_threshold": None,
    }
    assert f"bptt: context_length 256 -> {length}" in fitted(subject, whole)
    assert fitted(subject, whole) == []  # nothing is left to change
    fitted(subject, truncated)
    assert (truncated.context_length, truncated.transition_steps) == (length, 4)
    smt = phase(SMTTrainingArguments, transition_steps=50)
    fitted(subject, smt)
    assert (smt.context_length, smt.transition_steps) == (length, min(length, 50))


def test_each_phase_has_its_curriculum():
    subject = TaskSubject("retrieval", 16, curriculum=[4, 8], num_heldout=8)
    own = phase(curriculum_levels="6,12", curriculum_threshold=0.5)
    alone = phase(curriculum_levels=["6"])
    last = phase()
    shared = phase(curriculum_threshold=0.5)
    fitted(subject, own, alone, last, shared)
    assert (own.curriculum_levels, alone.curriculum_levels, last.curriculum_levels) == (["6", "12"], ["6"], None)
    assert shared.levels == [4, 8, 16]  # the run's, by name, since another phase has its own
    assert isinstance(subject.rows(own), Levels) and len(subject.rows(own).levels) == 2
    lengths = [len(level[0]["input_ids"]) for level in subject.rows(own).levels]
    assert lengths == [len(TaskSubject("retrieval", n, num_heldout=8).rows(phase())[0]["input_ids"]) for n in (6, 12)]
    assert len(subject.rows(alone)[0]["input_ids"]) == lengths[0]
    assert len(subject.rows(last)[0]["input_ids"]) > lengths[1]


def test_without_one_the_run_s_is_shared_and_not_named():
    subject = TaskSubject("retrieval", 16, curriculum=[4, 8], num_heldout=8)
    with_threshold, without = phase(curriculum_threshold=0.5), phase()
    fitted(subject, with_threshold, without)
    assert with_threshold.curriculum_levels is None and len(subject.rows(with_threshold).levels) == 3
    assert not isinstance(subject.rows(without), Levels)


def test_levels_above_the_difficulty_are_left_out():
    """As those of the run are: one grid serves several difficulties."""
    own = phase(curriculum_levels="4,8,32", curriculum_threshold=0.5)
    subject = TaskSubject("retrieval", 16, num_heldout=8)
    assert "bptt: curriculum_levels ['4', '8', '32'] -> ['4', '8']" in fitted(subject, own)
    assert len(subject.rows(own).levels) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"curriculum_levels": "32,64", "curriculum_threshold": 0.5}, "all above the run's `difficulty` \\(16\\)"),
        ({"curriculum_levels": "4,8"}, "need a `curriculum_threshold`"),
        ({"curriculum_levels": "8,4"}, "rising"),
        ({"curriculum_levels": "4,long"}, "joined by commas"),
    ],
)
def test_levels_that_do_not_fit(settings, message):
    subject = TaskSubject("retrieval", 16, num_heldout=8)
    with pytest.raises(ValueError, match=message):
        subject.required(phase(SMTTrainingArguments, **SEQUENTIAL, **settings))


def test_pixels():
    pytest.importorskip("sklearn", reason='needs the extra: pip install -e ".[test]"')
    subject = PixelSubject(num_heldout=4)
    with pytest.raises(InputError, match="synthetic task"):
        subject.required(phase(curriculum_levels="4", curriculum_threshold=0.5))
    whole = phase(transition_steps=256, curriculum_threshold=0.5)
    fitted(subject, whole)
    assert (whole.context_length, whole.transition_steps, whole.curriculum_threshold) == (63, 63, None)
    model = SMTForPreTraining(SMTPreTrainingConfig(student=student_config())).eval()
    scores = subject.evaluate(model, whole)["student"]
    assert scores["n"] == 4 * 64 and scores["bits_per_pixel"] == pytest.approx(scores["loss"] / math.log(2))


@pytest.mark.parametrize("kind", [TaskSubject, PixelSubject])
def test_something_is_held_out(kind):
    with pytest.raises(InputError, match="num_heldout"):
        kind(*(("retrieval", 16) if kind is TaskSubject else ()), num_heldout=0)


@pytest.fixture
def long_text(tmp_path):
    """110 kB: the held-out tenth is several streams long."""
    path = tmp_path / "long.txt"
    path.write_text("".join(f"line {n}: a quick brown fox counts {n * 7}\n" for n in range(2700)))
    return str(path)


def test_held_out_streams_are_the_same_whatever_is_trained(long_text):
    """So that bits per byte of two pipelines compare."""
    smt, dmt, bptt = phase(SMTTrainingArguments), phase(DMTTrainingArguments), phase()
    longer = phase(SMTTrainingArguments, context_length=1024)
    subjects = [TextSubject(phases, train_file=long_text) for phases in ([smt, bptt], [smt, dmt], [longer])]
    for subject in subjects:
        assert subject.streams.shape[1] == 2049 and subject.difficulty == 2048
        np.testing.assert_array_equal(subject.streams, subjects[0].streams)
        assert subject.num_bytes == subjects[0].num_bytes and subject.ngram_bits() == subjects[0].ngram_bits()
    assert TextSubject([smt], train_file=long_text, stream_length=300).difficulty == 300  # asked for
    with pytest.raises(InputError, match="at least 1 token"):
        TextSubject([smt], train_file=long_text, stream_length=0)


def test_short_held_out_text_is_scored_as_far_as_it_goes(text_file):
    with pytest.warns(UserWarning, match=r"only 1,653 bytes \(1 stream\(s\) of 1,653 tokens\)"):
        subject = TextSubject([phase()], train_file=str(text_file))
    assert subject.difficulty == 1653 and len(subject.streams) == 1


def test_held_out_text_that_means_nothing(tmp_path, long_text):
    few = tmp_path / "few.txt"
    few.write_text("hello")
    with pytest.raises(InputError, match="the held-out text has 5 bytes"):
        TextSubject([phase()], train_file=long_text, validation_file=str(few))
    with pytest.raises(InputError, match="validation_file"):
        TextSubject([phase()], train_file=long_text, validation_file=long_text)
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"text": " "}\n' * 40)
    for files in ({"train_file": str(blank)}, {"train_file": long_text, "validation_file": str(blank)}):
        with pytest.raises(InputError, match="text"):
            TextSubject([phase()], **files)
    again = tmp_path / "again.jsonl"
    rows = [f"{n} bottles of beer on the wall, {n} bottles of beer" for n in range(40)]
    again.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows for _ in range(20)))
    with pytest.warns(UserWarning, match="100% of the held-out text is also in the training text"):
        TextSubject([phase()], train_file=str(again))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = tmp_path / "other.txt"
        other.write_text("".join(f"{n} green bottles hang on the wall, {n}\n" for n in range(500)))
        TextSubject([phase()], train_file=long_text, validation_file=str(other))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"curriculum_levels": "4", "curriculum_threshold": 0.5}, "synthetic task"),
        ({"context_length": 8, "future_length": 8}, "must be shorter"),
        ({"context_length": 60, "transition_steps": 7}, "must divide"),
    ],
)
def test_what_does_not_fit_text(text_file, settings, message):
    subject = TextSubject([phase()], train_file=str(text_file))
    with pytest.raises(InputError, match=message):
        subject.required(phase(SMTTrainingArguments, **SEQUENTIAL, **settings))


def test_a_future_is_shorter_than_the_row_where_it_is_decoded(text_file):
    subject = TextSubject([phase()], train_file=str(text_file))
    short = {"context_length": 8, "transition_steps": 8, "future_length": 8}
    assert subject.required(phase(**short)) == {}
    with pytest.raises(InputError, match="must be shorter"):
        subject.required(phase(**short, consistency_weight=1.0))


def test_text_requires_nothing_but_of_a_stream(tmp_path):
    for number in range(120):
        (tmp_path / f"{number}.txt").write_text(f"{number} bottles of beer on the wall\n" * 3)
    bptt = phase()
    assert TextSubject([bptt], train_file=str(tmp_path)).required(bptt) == {}
    stream = TextSubject([bptt], train_file=str(tmp_path), streaming=True)
    assert stream.required(bptt) == {"carries_memory": False, "ignore_data_skip": True}
    for settings, message in (({"max_steps": -1}, "max_steps"), ({"dataloader_num_workers": 1}, "num_workers")):
        with pytest.raises(InputError, match=message):
            stream.required(phase(**settings))


def test_scores_after_a_phase(long_text):
    """Of the student where it was trained, of the teacher after smt; once over all rows, whichever process asks."""
    config = SMTPreTrainingConfig(
        student=student_config(vocab_size=258), teacher=teacher_config(vocab_size=258).to_dict()
    )
    model = SMTForPreTraining(config).eval()
    smt, bptt = phase(SMTTrainingArguments), phase()
    subject = TextSubject([smt], train_file=long_text, stream_length=40)
    scores = subject.evaluate(model, smt)
    assert scores.keys() == {"student", "teacher"} and subject.evaluate(model, bptt).keys() == {"student"}
    assert len(scores["student"]["losses"]) == 40 and scores["student"]["n"] == subject.streams[:, 1:].size
    bits = score_student(model.student, *subject.heldout).loss / math.log(2)  # a byte per token
    assert scores["student"]["bits_per_byte"] == pytest.approx(bits)
    teacher_alone = phase(SMTTrainingArguments, trains_updater=False, teacher_readout_weight=1.0)
    assert subject.evaluate(model, teacher_alone).keys() == {"teacher"}


def test_the_rival_goes_through_all_levels_and_changes_none_of_the_pipeline():
    from smt_hf.experiments.composition import resolve
    from smt_hf.experiments.pretraining import make_subject
    from smt_hf.experiments.run_arguments import parse_run

    words = "--task retrieval --difficulty 16 --curriculum 4,8 --phases dmt,dmt --compare_bptt --num_heldout 8"
    words += " --curriculum_threshold 0.3 --on_policy_mode sequential --on_policy_warmup_ratio 0"
    words = words.split()
    parsed = parse_run([*words, "--bptt_curriculum_levels", "12"])
    resolve(parsed.phases, make_subject(parsed), parsed.rival)
    assert [arguments.levels for arguments in (*parsed.phases, parsed.rival)] == [[], [], [12]]
    parsed = parse_run([*words, "--dmt_curriculum_levels", "5", "6"])
    resolve(parsed.phases, make_subject(parsed), parsed.rival)
    assert [arguments.levels for arguments in (*parsed.phases, parsed.rival)] == [[5, 6], [5, 6], [5, 6, 16]]

"""What a task hands to the phases of a pipeline."""

import pytest

from smt_hf import BPTTTrainingArguments, SMTTrainingArguments
from smt_hf.data import Levels
from smt_hf.experiments.subjects import PixelSubject, TaskSubject


def phase(kind=BPTTTrainingArguments, **settings):
    return kind(output_dir="x", use_cpu=True, **settings)


def test_a_curriculum_a_phase():
    subject = TaskSubject("retrieval", 16, curriculum=[4, 8], num_heldout=8)
    own = phase(curriculum="6,12", curriculum_threshold=0.5)
    alone = phase(curriculum=[6])
    last = phase()
    shared = phase(curriculum_threshold=0.5)
    subject.fit([own, alone, last, shared])
    assert (own.curriculum, alone.curriculum, last.curriculum) == (["6", "12"], ["6"], None)
    assert shared.levels == [4, 8, 16]  # the run's, by name, since another phase has its own
    assert isinstance(subject.rows(own), Levels) and len(subject.rows(own).levels) == 2
    lengths = [len(level[0]["input_ids"]) for level in subject.rows(own).levels]
    assert lengths == [len(TaskSubject("retrieval", n, num_heldout=8).rows(phase())[0]["input_ids"]) for n in (6, 12)]
    assert len(subject.rows(alone)[0]["input_ids"]) == lengths[0]
    assert len(subject.rows(last)[0]["input_ids"]) > lengths[1]


def test_without_one_the_run_s_is_shared_and_not_named():
    subject = TaskSubject("retrieval", 16, curriculum=[4, 8], num_heldout=8)
    with_threshold, without = phase(curriculum_threshold=0.5), phase()
    subject.fit([with_threshold, without])
    assert with_threshold.curriculum is None and len(subject.rows(with_threshold).levels) == 3
    assert not isinstance(subject.rows(without), Levels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"curriculum": [4, 32], "curriculum_threshold": 0.5}, "lie between 1 and the run's `difficulty` \\(16\\)"),
        ({"curriculum": [4, 8]}, "needs a `curriculum_threshold`"),
        ({"curriculum": [8, 4]}, "rising"),
        ({"curriculum": "4,long"}, "joined by commas"),
    ],
)
def test_a_curriculum_that_does_not_fit(settings, message):
    subject = TaskSubject("retrieval", 16, num_heldout=8)
    with pytest.raises(ValueError, match=message):
        subject.fit([phase(SMTTrainingArguments, **{"on_policy_mode": "sequential", **settings})])


def test_pixels_have_no_levels():
    with pytest.raises(ValueError, match="synthetic tasks"):
        PixelSubject(num_heldout=4).fit([phase(curriculum=[4], curriculum_threshold=0.5)])

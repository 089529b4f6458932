"""What a task hands to the phases of a pipeline."""

import pytest

from smt_hf import BPTTTrainingArguments, SMTTrainingArguments
from smt_hf.data import Levels
from smt_hf.experiments.subjects import PixelSubject, TaskSubject


def phase(kind=BPTTTrainingArguments, **settings):
    return kind(output_dir="x", use_cpu=True, **settings)


def test_a_curriculum_a_phase():
    subject = TaskSubject("retrieval", 16, curriculum=[4, 8], num_heldout=8)
    own = phase(curriculum_levels="6,12", curriculum_threshold=0.5)
    alone = phase(curriculum_levels=["6"])
    last = phase()
    shared = phase(curriculum_threshold=0.5)
    subject.fit([own, alone, last, shared])
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
    subject.fit([with_threshold, without])
    assert with_threshold.curriculum_levels is None and len(subject.rows(with_threshold).levels) == 3
    assert not isinstance(subject.rows(without), Levels)


def test_levels_above_the_difficulty_are_left_out():
    """As those of the run are: one grid serves several difficulties."""
    own = phase(curriculum_levels="4,8,32", curriculum_threshold=0.5)
    subject = TaskSubject("retrieval", 16, num_heldout=8)
    subject.fit([own])
    assert own.levels == [4, 8] and len(subject.rows(own).levels) == 2


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
        subject.fit([phase(SMTTrainingArguments, **{"on_policy_mode": "sequential", **settings})])


def test_pixels_have_no_levels():
    pytest.importorskip("sklearn", reason='needs the extra: pip install -e ".[test]"')
    with pytest.raises(ValueError, match="synthetic tasks"):
        PixelSubject(num_heldout=4).fit([phase(curriculum_levels="4", curriculum_threshold=0.5)])


def test_the_rival_goes_through_all_levels_and_changes_none_of_the_pipeline():
    from smt_hf.experiments.pretraining import _subject
    from smt_hf.experiments.run_arguments import parse_run

    words = "--task retrieval --difficulty 16 --curriculum 4,8 --phases dmt,dmt --compare_bptt --num_heldout 8"
    words += " --curriculum_threshold 0.3 --on_policy_mode sequential --on_policy_warmup_ratio 0"
    words = words.split()
    parsed = parse_run([*words, "--bptt_curriculum_levels", "12"])
    _subject(parsed.run, parsed.phases, parsed.rival)
    assert [arguments.levels for arguments in (*parsed.phases, parsed.rival)] == [[], [], [12]]
    parsed = parse_run([*words, "--dmt_curriculum_levels", "5", "6"])
    _subject(parsed.run, parsed.phases, parsed.rival)
    assert [arguments.levels for arguments in (*parsed.phases, parsed.rival)] == [[5, 6], [5, 6], [5, 6, 16]]

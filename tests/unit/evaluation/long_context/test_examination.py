"""Scores, graded scores and controls of a model on samples, against plain passes over each prompt."""

import math
from dataclasses import replace
from statistics import fmean

import pytest
import torch

from smt_hf.errors import InputError
from smt_hf.evaluation.long_context.examination import Examiner, choices_of
from smt_hf.evaluation.long_context.manners import find_manner
from smt_hf.evaluation.long_context.reading import Reader
from smt_hf.evaluation.long_context.sample import Needle
from tests.language_models import (
    HandTask,
    language_model,
    make_llama,
    make_mamba,
    make_ours,
    plain_continuation,
    plain_logits,
)

LENGTH, NUM = 60, 12


def examiner_of(model, task, **settings):
    return Examiner(language_model(model), Reader(model, find_manner(model), 16), task, batch_size=5, **settings)


def samples_of(task, number=NUM, length=LENGTH):
    return [task.sample(length, index, 0, len) for index in range(number)]


def written_by(model, prompt, num_tokens=4):
    ids = plain_continuation(model, prompt.encode(), num_tokens)
    return language_model(model).tokenizer.decode(ids, skip_special_tokens=True)


def plain_losses(model, prompt, answer):
    """Nats and hits of the bytes of an answer."""
    ids, targets = [*prompt.encode(), *answer.encode()], torch.tensor(list(answer.encode()))
    logs = plain_logits(model, ids).log_softmax(-1)[len(prompt.encode()) - 1 : -1]
    return -logs.gather(1, targets[:, None])[:, 0], (logs.argmax(-1) == targets).float()


@pytest.fixture(params=[make_ours, make_llama, make_mamba], ids=["ours", "llama", "mamba"])
def model(request):
    return request.param()


@pytest.fixture
def task(model):
    """The right answers of the first three samples are what the model writes."""
    known = {index: written_by(model, HandTask().sample(LENGTH, index, 0, len).prompt) for index in range(3)}
    return HandTask(known=known)


def test_scores_are_those_of_plain_passes(model, task):
    samples = samples_of(task)
    found = examiner_of(model, task).examine(samples, num_controlled=0)
    scores = [task.score(sample, written_by(model, sample.prompt)) for sample in samples]
    assert scores[:3] == [1, 1, 1]
    assert found["value"] == pytest.approx(fmean(scores), abs=1e-6) and found["n"] == NUM
    losses = [plain_losses(model, sample.prompt, sample.completion) for sample in samples]
    nats = fmean(nats[1:].mean().item() for nats, _ in losses)  # the space is not scored
    assert found["graded"]["nats_per_token"]["value"] == pytest.approx(nats, abs=1e-3)
    right = fmean(hits[1:].mean().item() for _, hits in losses)
    assert found["graded"]["tokens_right"]["value"] == pytest.approx(right, abs=1e-5)
    assert found["controls"] == {} and found["chance"] == 0.001
    assert found["examples"][0] == {
        "written": written_by(model, samples[0].prompt),
        "answers": list(samples[0].answers),
    }


def test_controls_of_the_first_samples(model, task):
    samples = samples_of(task)
    few, own = examiner_of(model, task).examine(samples, 3), examiner_of(model, task).examine(samples[:3])
    assert few["n"] == len(samples) > 3 and set(few["controls"]) == set(own["controls"])
    for name, control in own["controls"].items():
        assert few["controls"][name]["value"] == control["value"] and few["controls"][name]["n"] == control["n"] == 3
    nats, expected = (part["controls"]["needle_removed"]["graded"]["nats_per_token"]["value"] for part in (few, own))
    assert nats == pytest.approx(expected, abs=1e-3)


def test_controls_read_what_they_say(model, task):
    samples = samples_of(task)
    found = examiner_of(model, task, window=20).examine(samples)
    controls = found["controls"]
    assert set(controls) == {"needle_removed", "last_window", "last_mentioned"}
    prompts = {
        "needle_removed": [task.without_needles(sample).prompt for sample in samples],
        "last_window": [sample.prompt[-20:] for sample in samples],
    }
    for name, texts in prompts.items():
        scores = [task.score(sample, written_by(model, text)) for sample, text in zip(samples, texts)]
        losses = [plain_losses(model, text, sample.completion)[0][1:] for sample, text in zip(samples, texts)]
        assert controls[name]["value"] == pytest.approx(fmean(scores), abs=1e-6)
        assert controls[name]["graded"]["nats_per_token"]["value"] == pytest.approx(
            fmean(nats.mean().item() for nats in losses), abs=1e-3
        )
    assert controls["last_window"]["window"] == 20
    own = found["graded"]["nats_per_token"]["value"]
    without = controls["needle_removed"]["graded"]["nats_per_token"]["value"]
    assert controls["needle_removed"]["more_nats"]["value"] == pytest.approx(without - own, abs=1e-5)
    # One sample in ten has its needle at the end, and two of twelve have index 9 or 19.
    assert controls["last_mentioned"]["value"] == pytest.approx(1 / 12, abs=1e-6)


def test_a_window_that_holds_every_prompt_is_no_control():
    task, model = HandTask(), make_ours()
    assert "last_window" not in examiner_of(model, task, window=60).examine(samples_of(task, 3))["controls"]
    assert "last_window" in examiner_of(model, task, window=50).examine(samples_of(task, 3))["controls"]


def test_depths_and_distances():
    task, model = HandTask(), make_ours()
    samples = samples_of(task)
    outcomes = examiner_of(model, task).ask([list(sample.prompt.encode()) for sample in samples], samples)
    found = examiner_of(model, task).examine(samples, num_controlled=0)
    by_depth = found["by_depth"]
    assert [entry["depth"] for entry in by_depth] == [0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95]
    assert [entry["n"] for entry in by_depth] == [2, 2, 1, 1, 1, 1, 1, 1, 1, 1]
    for place, entry in enumerate(by_depth):
        own = [outcome for outcome, sample in zip(outcomes, samples) if sample.index % 10 == place]
        assert entry["nats_per_token"] == pytest.approx(fmean(outcome.nats for outcome in own), abs=1e-5)
    distances = [len(sample.prompt) - sample.needles[0].end for sample in samples]
    for entry in found["by_distance"]:
        at = entry["distance"]
        own = [outcome for outcome, distance in zip(outcomes, distances) if at / 2 < distance <= at]
        assert entry["n"] == len(own)
        assert entry["nats_per_token"] == pytest.approx(fmean(outcome.nats for outcome in own), abs=1e-5)
    assert sum(entry["n"] for entry in found["by_distance"]) == NUM


def test_a_needle_that_is_the_whole_text_has_no_depth():
    task, model = HandTask(), make_ours()
    samples = [replace(sample, needles=(Needle(0, sample.facts["context"][1], 0.0),)) for sample in samples_of(task, 3)]
    found = examiner_of(model, task).examine(samples, num_controlled=0)
    assert "by_depth" not in found and "by_distance" not in found


def test_labels_are_ranked(model):
    labels = ("123", "456", "78")
    task = HandTask(labels=labels, known={index: labels[index % 3] for index in range(NUM)})
    samples = samples_of(task)
    samples[3] = replace(samples[3], labels=())
    found = examiner_of(model, task).examine(samples, num_controlled=0)["graded"]["ranking"]
    hits = []
    for sample in samples:
        if sample.labels:
            nats = {label: plain_losses(model, sample.prompt, " " + label)[0][1:].sum() for label in sample.labels}
            hits.append(min(nats, key=nats.__getitem__) in sample.answers)
    assert found["value"] == pytest.approx(fmean(hits), abs=1e-6) and found["n"] == NUM - 1
    outcomes = examiner_of(model, task).ask([list(sample.prompt.encode()) for sample in samples], samples)
    assert [outcome.ranked for outcome in outcomes] == [*hits[:3], None, *hits[3:]] and len(set(hits)) == 2
    assert found["chance"] == pytest.approx(1 / 3, abs=1e-6)
    assert choices_of(samples[0]) == [" 123", " 456", " 78"]


def test_writing_stops_where_the_task_says():
    model = make_llama()
    sample = HandTask(num_generated=6).sample(LENGTH, 0, 0, len)
    whole = written_by(model, sample.prompt, 6)

    class Stopping(HandTask):
        stops = (whole[2],)

    task = Stopping(num_generated=6)
    (outcome,) = examiner_of(model, task).ask([list(sample.prompt.encode())], [sample])
    assert outcome.written == whole[: whole.index(whole[2]) + 1] and len(outcome.written) < len(whole)


def test_a_prompt_beyond_the_positions_is_refused():
    model, task = make_llama(max_position_embeddings=64), HandTask()
    examiner_of(model, task).examine(samples_of(task, 3, length=64))
    with pytest.raises(InputError, match="64 positions, and prompt and answer have 65 tokens"):
        examiner_of(model, task).examine(samples_of(task, 3, length=65))
    longer = HandTask(known={0: "1" * 40})
    with pytest.raises(InputError, match="not cut"):
        examiner_of(model, longer).examine(samples_of(longer, 1, length=60))


def test_progress_is_told():
    read = []
    task, model = HandTask(), make_ours()
    examiner_of(model, task, window=20, advance=read.append).examine(samples_of(task))
    assert sum(read) == 3 * NUM


def test_official_number_of_a_task_with_parts():
    """The geometric mean of means, not the mean of geometric means."""

    class InParts(HandTask):
        def parts(self, sample, written):
            return {"a": float(sample.index % 2), "b": 0.5}

    task = InParts()
    found = examiner_of(make_ours(), task).examine(samples_of(task), num_controlled=0)
    assert found["official"] == pytest.approx(math.sqrt(0.5 * 0.5), abs=1e-6)

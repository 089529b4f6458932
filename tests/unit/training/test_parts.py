"""What a phase trains, and that nothing else moves."""

import pytest
import torch

from smt_hf.training.adapters import LoraSettings, add_lora
from smt_hf.training.objective import PARTS, part_of
from tests.conftest import UPDATERS, make_composite, make_student
from tests.unit.training.test_trainers import make_trainer, weights_of

CASES = {
    "smt": (("teacher",), ("readout",), ("updater",), ("teacher", "readout"), ("embeddings", "updater")),
    "dmt": (("updater",), ("readout",), ("embeddings", "updater")),
    "bptt": (("readout",), ("updater",), ("embeddings",)),
}


def test_every_parameter_has_a_part():
    model = make_composite()
    found = {part_of(name) for name, _ in model.named_parameters()}
    assert found == set(PARTS)
    parts = {name: part_of(name) for name, _ in model.named_parameters()}
    assert parts["student.model.initial_memory"] == "updater" and parts["student.lm_head.weight"] == "readout"
    assert parts["teacher.embed_tokens.weight"] == "teacher"
    assert part_of("student.model.embed_proj.weight") == "embeddings"
    assert part_of("student.head_proj.weight") == "readout"
    places = {"teacher.": "teacher", "student.model.embed_tokens.": "embeddings", "student.model.updater.": "updater"}
    for place, part in {**places, "student.model.readout.": "readout"}.items():
        assert {parts[name] for name in parts if name.startswith(place)} == {part}


@pytest.mark.parametrize(("kind", "parts"), [(kind, parts) for kind in CASES for parts in CASES[kind]])
def test_the_frozen_parts_stay_bit_equal(kind, parts, tmp_path):
    trainer = make_trainer(kind, tmp_path, trainable=list(parts), weight_decay=0.1)
    before = weights_of(trainer)
    trainer.train()
    moved = {part_of(name) for name, value in weights_of(trainer).items() if not torch.equal(value, before[name])}
    assert moved - {"updater"} == set(parts) - {"updater"} and ("updater" in moved) == ("updater" in parts)


def test_frozen_labels_carry_no_gradient(tmp_path):
    trainer = make_trainer("smt", tmp_path, trainable=["updater"], dynamics_weight=1.0, readout_weight=0.0)
    needed = []
    trainer.model.teacher.register_forward_hook(lambda module, inputs, labels: needed.append(labels.requires_grad))
    trainer.train()
    assert needed and not any(needed)


@pytest.mark.parametrize(
    ("kind", "trainable", "message"),
    [
        ("dmt", ["teacher"], "names 'teacher'"),
        ("bptt", ["teacher"], "names 'teacher'"),
        ("smt", ["decoder"], "names 'decoder'"),
        ("smt", [], "names no part"),
        ("smt_teacher", ["updater"], "names 'updater'"),
    ],
)
def test_bad_parts(kind, trainable, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(kind, tmp_path, trainable=trainable)


def test_a_part_that_no_loss_reaches(tmp_path):
    trainer = make_trainer("dmt", tmp_path, trainable=["readout"], readout_weight=0.0)
    with pytest.raises(ValueError, match="no loss of the dmt phase reaches"):
        trainer.train()


def test_a_list_of_parts_is_read_as_words_or_with_commas(tmp_path):
    for given in (["updater", "readout"], ["updater,readout"], "updater, readout"):
        assert make_trainer("dmt", tmp_path, trainable=given).args.trainable == ["updater", "readout"]


@pytest.mark.parametrize("part", ["updater", "readout"])
@pytest.mark.parametrize("updater_type", UPDATERS)
def test_lora_in_one_part(part, updater_type):
    student = make_student(updater_type=updater_type)
    add_lora(student, LoraSettings(parts=(part,)))
    placed = {name for name, _ in student.named_parameters() if "lora_" in name}
    assert placed and all(f"model.{part}." in name for name in placed)
    with pytest.raises(ValueError, match="updater and readout"):
        LoraSettings(parts=("head",))

"""The language of a run whose teacher is a model that exists: from the command line to the sizes of the composite."""

import json
import shutil

import pytest
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from smt_hf.data import byte_tokenizer
from smt_hf.data.packing import number_tokenizer
from smt_hf.errors import InputError
from smt_hf.experiments.composition import model_config
from smt_hf.experiments.pretraining import make_subject, pretrain
from smt_hf.experiments.run_arguments import parse_run, typed_teacher
from smt_hf.experiments.teacher_language import check_tokenizer, end_tokens, teacher_tokenizer
from smt_hf.teachers import teacher_config
from smt_hf.teachers.loading import vocabulary_size
from smt_hf.training import DMTTrainer, SMTPreTrainingConfig
from smt_hf.training.teacher_cache import TeacherCache

PRETRAINED = "smt_pretrained_teacher"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama whose 320 embeddings are more than the 258 tokens of its tokenizer."""
    path = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=320, **sizes)).save_pretrained(path)
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 4321  # tells it from the package's own
    tokenizer.save_pretrained(path)
    return str(path)


def parsed(folder, text_file, *words):
    words = ["--teacher_model_name_or_path", folder, "--train_file", str(text_file), *words]
    return parse_run([*words, "--use_cpu", "--context_length", "16", "--report_to", "none"])


def configured(run):
    subject = make_subject(run)
    return subject, model_config(subject, run.phases, run.student_fields, run.teacher_fields)


def test_one_flag_makes_the_teacher_and_the_students_language(folder, text_file):
    run = parsed(folder, text_file)
    assert run.phases[0].phase == "smt" and run.phases[0].teacher_weight == 0.0
    assert any("no next-token head" in note for note in run.notes)
    subject, config = configured(run)
    assert subject.tokenizer.model_max_length == 4321
    assert config.teacher.model_type == PRETRAINED and config.teacher.layers == [1, 2]
    assert (config.student.vocab_size, config.student.eos_token_id) == (258, 256)
    assert config.teacher.base_config["vocab_size"] == 320


def test_its_fields_are_flags(folder, text_file):
    run = parsed(
        folder, text_file, "--teacher_layers", "0,-1", "--teacher_lora_r", "4", "--teacher_model_dtype", "bfloat16",
        "--teacher_device_map", "cpu", "--teacher_load_in_8bit",
    )  # fmt: skip
    assert run.teacher_fields == {
        "model_name_or_path": folder, "layers": "0,-1", "lora_r": 4, "model_dtype": "bfloat16", "device_map": "cpu",
        "load_in_8bit": True,
    }  # fmt: skip
    with pytest.raises(InputError, match="base_config"):
        parsed(folder, text_file, "--teacher_base_config", "x")
    with pytest.raises(InputError, match="hidden_size"):
        parsed(folder, text_file, "--teacher_hidden_size", "8")


def test_the_head_of_the_model_is_kept_where_a_phase_is_distilled(folder, text_file):
    assert not configured(parsed(folder, text_file, "--distillation_weight", "0"))[1].teacher.keeps_head
    run = parsed(folder, text_file, "--phases", "smt,dmt", "--dmt_distillation_weight", "0.5")
    assert [arguments.distillation_weight for arguments in run.phases] == [0.0, 0.5]
    assert configured(run)[1].teacher.keeps_head
    assert not configured(parsed(folder, text_file, "--phases", "bptt", "--smt_distillation_weight", "1"))[1].teacher
    with pytest.raises(InputError, match="keeps_head"):  # it follows from the weights
        parsed(folder, text_file, "--teacher_keeps_head")
    words = ["--train_file", str(text_file), "--use_cpu", "--report_to", "none", "--dmt_distillation_weight", "1"]
    with pytest.raises(InputError, match="the teacher smt_fast_weight_teacher predicts no tokens"):
        configured(parse_run(words))


TRAINED_HERE = ["--teacher_model_type", "smt_teacher", "--updater_type", "mlp", "--phases", "smt,dmt"]


@pytest.mark.parametrize(
    ("words", "phase"),
    [
        (["--smt_distillation_weight", "1", "--teacher_weight", "0"], "smt"),
        (["--dmt_distillation_weight", "1", "--teacher_weight", "0"], "dmt"),
        (["--distillation_weight", "1", "--smt_num_supervised_transitions", "2"], "smt"),
        (["--distillation_weight", "1", "--smt_trainable", "updater,readout"], "smt"),
        (["--distillation_weight", "1", "--phases", "dmt,smt"], "dmt"),
        (["--distillation_weight", "1"], None),
        (["--dmt_distillation_weight", "1", "--teacher_weight", "0.5"], None),
        (["--teacher_weight", "0"], None),
    ],
)
def test_no_phase_teaches_from_a_head_that_none_has_trained(words, phase, text_file):
    run = parse_run(["--train_file", str(text_file), "--use_cpu", "--report_to", "none", *TRAINED_HERE, *words])
    if phase is None:
        assert configured(run)[1].teacher.model_type == "smt_teacher"
        return
    message = rf"`distillation_weight` of the {phase} phase .* head of the teacher smt_teacher .*set `teacher_weight`"
    with pytest.raises(InputError, match=message):
        configured(run)


def test_bptt_alone_has_no_teacher_and_keeps_its_bytes(folder, text_file):
    run = parsed(folder, text_file, "--phases", "bptt")
    subject, config = configured(run)
    assert config.teacher is None and subject.tokenizer.model_max_length != 4321
    assert any("bptt has no teacher" in note for note in run.notes)


def test_a_tokenizer_with_other_tokens_is_refused(folder, text_file, tmp_path):
    other = number_tokenizer(10)
    other.add_special_tokens({"eos_token": "9"})
    other.save_pretrained(tmp_path)
    message = r"does not match the vocabulary of the teacher's model .*10 of 10 tokens differ \(0 is '0', not 'Ā'"
    with pytest.raises(InputError, match=message):
        check_tokenizer(number_tokenizer(10), config_of(folder, 10))
    with pytest.raises(InputError, match="does not match"):
        configured(parsed(folder, text_file, "--tokenizer_name", str(tmp_path)))
    words = ["--teacher_model_name_or_path", folder, "--task", "retrieval", "--difficulty", "8"]
    with pytest.raises(InputError, match="does not match"):
        configured(parse_run([*words, "--use_cpu", "--report_to", "none"]))


def config_of(folder, vocab_size):
    return teacher_config({"model_name_or_path": folder, "vocab_size": vocab_size})


@pytest.mark.parametrize(
    ("field", "value", "students"), [("num_memory_tokens", 3, "num_memory_tokens"), ("memory_size", 12, "hidden_size")]
)
def test_a_memory_of_another_shape_is_refused(folder, field, value, students):
    student = {"num_memory_tokens": 4, "hidden_size": 8, "num_attention_heads": 2}
    message = f"the teacher's {field} is {value}, the student's {students} is {student[students]}: make them equal"
    with pytest.raises(InputError, match=message):
        SMTPreTrainingConfig(student=student, teacher={"model_name_or_path": folder, field: value})


def test_tokens_behind_the_models_own_are_free_up_to_its_embeddings(folder):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|added|>"])
    check_tokenizer(tokenizer, config_of(folder, len(tokenizer)))
    with pytest.raises(InputError, match=r"the student has 321 tokens, the teacher's model .* knows 320"):
        config_of(folder, 321)


def test_the_student_has_the_tokens_of_the_tokenizer_or_more(folder, text_file):
    """320 embeddings, 258 tokens: the rest are no tokens of the student, unless it is to have as many."""
    _, config = configured(parsed(folder, text_file, "--vocab_size", "320"))
    assert (config.student.vocab_size, config.teacher.vocab_size) == (320, 320)
    with pytest.raises(InputError, match=r"321 tokens, the teacher's model .* knows 320"):
        configured(parsed(folder, text_file, "--vocab_size", "321"))


def test_numbers_that_no_token_has(folder, text_file, tmp_path):
    """A tokenizer may leave numbers out: the last one counts, not how many there are."""
    tokenizer = byte_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"]["far"] = 300
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|endoftext|>", pad_token="<|pad|>"
    )
    assert len(tokenizer) == 259 and vocabulary_size(tokenizer) == 301
    shutil.copytree(folder, tmp_path / "gaps")
    tokenizer.save_pretrained(tmp_path / "gaps")
    _, config = configured(parsed(str(tmp_path / "gaps"), text_file))
    assert config.student.vocab_size == 301
    teacher = {"model_name_or_path": str(tmp_path / "gaps")}
    assert SMTPreTrainingConfig(student={}, teacher=teacher).student.vocab_size == 301


def test_what_ends_a_text(folder, tmp_path):
    """Several tokens of the model's generation settings, if the tokenizer's is one of them and they are its tokens."""
    tokenizer = byte_tokenizer()
    assert end_tokens(tokenizer, None) == end_tokens(tokenizer, config_of(folder, 258)) == 256
    shutil.copytree(folder, tmp_path / "chat")
    for ends, expected in (([10, 256, 319], [10, 256]), ([10, 11], 256), ([256, 319], 256), (2, 256), (None, 256)):
        GenerationConfig(eos_token_id=ends).save_pretrained(tmp_path / "chat")
        assert end_tokens(tokenizer, config_of(str(tmp_path / "chat"), 258)) == expected
    (tmp_path / "chat" / "generation_config.json").unlink()
    config = config_of(str(tmp_path / "chat"), 258)
    config.base_config["eos_token_id"] = [256, 11]
    assert end_tokens(tokenizer, config) == [256, 11]


def test_embeddings_of_a_teacher_that_is_no_language_model(folder, text_file, tmp_path):
    words = ["--init_embeddings_from_teacher", "--output_dir", str(tmp_path / "out")]
    plain = ["--train_file", str(text_file), "--use_cpu", "--report_to", "none", "--updater_type", "mlp", *words]
    for run in (parse_run(plain), parsed(folder, text_file, "--phases", "bptt", *words)):
        with pytest.raises(InputError, match="needs a phase with a language model as the teacher"):
            pretrain(run)
    assert not (tmp_path / "out").exists()


def test_deepspeed_takes_no_model_in_half_precision(folder, text_file, tmp_path, monkeypatch):
    words = ["--teacher_model_dtype", "bfloat16", "--hidden_size", "8", "--num_attention_heads", "2"]
    run = parsed(folder, text_file, *words, "--output_dir", str(tmp_path / "out"))
    monkeypatch.setattr("smt_hf.experiments.pretraining.launched_with_deepspeed", lambda: True)
    with pytest.raises(InputError, match="pass `--teacher_model_dtype float32`"):
        pretrain(run)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder_exists", [False, True])
def test_a_wrong_launch_is_refused_before_the_model_reads(folder, text_file, tmp_path, monkeypatch, folder_exists):
    """The hour that the cache may take comes after everything that can be refused without a forward."""

    def refused(*arguments, **words):
        raise AssertionError("the model has been loaded, or a row read")

    monkeypatch.setattr(TeacherCache, "fill", refused)
    monkeypatch.setattr("smt_hf.teachers.pretrained.load_model", refused)
    words = ["--teacher_cache_dir", str(tmp_path / "cache"), "--hidden_size", "8", "--num_attention_heads", "2"]
    words += ["--phases", "smt,dmt", "--output_dir", str(tmp_path / "out"), "--max_steps", "2"]
    if folder_exists:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("kept")
        with pytest.raises(InputError, match="is not empty"):
            pretrain(parsed(folder, text_file, *words))
    else:
        run = parsed(folder, text_file, *words)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(InputError, match="the launch started 2 processes"):
            pretrain(run)
        monkeypatch.delenv("WORLD_SIZE")
        run = parsed(folder, text_file, *words)
        monkeypatch.setattr(DMTTrainer, "_check", classmethod(_refuses_dmt))  # as a later phase may
        with pytest.raises(InputError, match="of the second phase"):
            pretrain(run)
        assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()


def _refuses_dmt(kind, model, arguments):
    raise InputError("a fault of the second phase")


def test_lora_phases_choose_their_parts_themselves(folder, text_file, tmp_path):
    words = ["--phases", "smt,dmt", "--use_peft", "--dmt_trainable", "updater", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(InputError, match="leave `trainable` of the dmt phase out"):
        pretrain(parsed(folder, text_file, *words))


def test_a_model_without_a_tokenizer(folder, text_file, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(bare)
    with pytest.raises(InputError, match=r"comes without a tokenizer.*`tokenizer_name`"):
        configured(parsed(str(bare), text_file))
    _, config = configured(parsed(str(bare), text_file, "--tokenizer_name", folder))
    assert config.student.vocab_size == 258
    with pytest.raises(InputError, match="no causal language model could be loaded from 'nowhere/at-all'"):
        configured(parsed("nowhere/at-all", text_file))
    assert teacher_tokenizer({"hidden_size": 8}) is None


def test_in_a_grid(folder):
    """A grid's teacher is changed by an arm; one that names a model is of another kind than one that does not."""
    named = {"model_name_or_path": folder}
    assert typed_teacher(named, {"lora_r": 2}, {}) == {**named, "lora_r": 2}
    assert typed_teacher({"hidden_size": 8}, named, {}) == named
    assert typed_teacher(named, {"model_type": "smt_teacher"}, {"hidden_size": 8}) == {
        "model_type": "smt_teacher", "hidden_size": 8
    }  # fmt: skip
    assert typed_teacher({"hidden_size": 8}, {}, {"num_hidden_layers": 3}) == {"hidden_size": 8, "num_hidden_layers": 3}

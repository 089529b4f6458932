"""A student's embeddings and head that begin as those of a language model, against the singular values themselves."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from smt_hf import SMTForPreTraining
from smt_hf.errors import InputError
from smt_hf.teachers.loading import load_tables
from smt_hf.training import SMTPreTrainingConfig
from smt_hf.training.embeddings import init_embeddings_from_teacher, principal_coordinates
from tests.conftest import make_composite

X, V, PADDED = 12, 40, 48
SIZES = {"intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request, tmp_path_factory):
    """A Llama with 8 embeddings more than tokens, whose directions have different variances."""
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=PADDED, hidden_size=X, tie_word_embeddings=request.param, **SIZES)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            table.copy_(torch.randn(PADDED, X) @ torch.diag(torch.linspace(0.1, 3, X)) @ torch.randn(X, X) + 2)
            table[V:] *= 100
    model.save_pretrained(path)
    return path, model


def composite(path, **student):
    torch.manual_seed(0)
    fields = {"vocab_size": V, "hidden_size": 8, "num_attention_heads": 2, **student}
    return SMTForPreTraining(SMTPreTrainingConfig(student=fields, teacher={"model_name_or_path": str(path)}))


def best_of_rank(table, rank):
    """The matrix of a rank that is nearest to the rows about their mean, by singular values."""
    rows = table[:V] - table[:V].mean(0)
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def assert_same_geometry(weight, expected):
    """Inner products of all pairs of rows, up to one factor."""
    own, theirs = weight @ weight.T, expected @ expected.T
    torch.testing.assert_close(own / own.norm(), theirs / theirs.norm(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("student", [{}, {"embedding_size": 5}, {"hidden_size": 12}])
@torch.no_grad()
def test_tables_are_the_best_of_their_rank(model, student):
    path, language_model = model
    made = composite(path, **student)
    tables = [made.student.get_input_embeddings().weight, made.student.get_output_embeddings().weight]
    births = [table.square().mean().clone() for table in tables]
    rest = {name: weight.clone() for name, weight in made.student.state_dict().items()}
    init_embeddings_from_teacher(made.student, made.teacher)
    sources = [language_model.get_input_embeddings().weight, language_model.get_output_embeddings().weight]
    for table, birth, source in zip(tables, births, sources):
        assert_same_geometry(table, best_of_rank(source, table.shape[1]))
        torch.testing.assert_close(table.square().mean(), birth)
    changed = {name for name, weight in made.student.state_dict().items() if not torch.equal(weight, rest[name])}
    assert changed == {"model.embed_tokens.weight", "lm_head.weight"}


@torch.no_grad()
def test_a_teacher_without_its_model_gives_the_same(model):
    """As one that is trained from a cache: the tables are read from the folder."""
    path, _ = model
    with_model, without = composite(path), composite(path)
    without.teacher.model, without.teacher.config.holds_model = None, False
    for made in (with_model, without):
        init_embeddings_from_teacher(made.student, made.teacher)
    for name, weight in with_model.student.state_dict().items():
        assert torch.equal(weight, without.student.state_dict()[name]), name


def refuse_to_load(monkeypatch):
    def refused(*arguments, **words):
        raise AssertionError("the model has been loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refused)


@torch.no_grad()
@pytest.mark.parametrize("size", ["1KB", "1GB"])
def test_tables_are_read_without_the_model(model, size, tmp_path, monkeypatch):
    """From one safetensors file or several, by the names that the model's class has."""
    model[1].save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "1KB")
    refuse_to_load(monkeypatch)
    tables = load_tables(str(tmp_path))
    assert torch.equal(tables[0], model[1].get_input_embeddings().weight)
    assert torch.equal(tables[1], model[1].get_output_embeddings().weight)


@torch.no_grad()
def test_tables_of_files_with_other_names(model, tmp_path, monkeypatch):
    """Of a model that was saved without its head, and of files that hold them under names of nobody's: the whole model
    is loaded then."""
    (tmp_path / "trunk").mkdir()
    state = {name.removeprefix("model."): weight for name, weight in model[1].state_dict().items()}
    del state["lm_head.weight"]
    save_file(state, tmp_path / "trunk" / "model.safetensors", metadata={"format": "pt"})
    model[1].config.save_pretrained(tmp_path / "trunk")
    (tmp_path / "bin").mkdir()
    torch.save(model[1].state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    model[1].config.save_pretrained(tmp_path / "bin")
    is_tied = model[1].config.tie_word_embeddings
    loaded, original = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda **words: loaded.append(words) or original(**words)
    )
    tables = load_tables(str(tmp_path / "bin"))
    assert len(loaded) == 1
    assert torch.equal(tables[0], model[1].get_input_embeddings().weight)
    assert torch.equal(tables[1], model[1].get_output_embeddings().weight)
    if is_tied:  # else there is no head in the file
        assert torch.equal(load_tables(str(tmp_path / "trunk"))[0], tables[0]) and len(loaded) == 1


@torch.no_grad()
def test_a_head_that_the_teacher_holds_is_not_read_again(model, monkeypatch):
    fields = {"vocab_size": V, "hidden_size": 8, "num_attention_heads": 2}
    teacher = {"model_name_or_path": str(model[0]), "keeps_head": True}
    torch.manual_seed(0)
    holding = SMTForPreTraining(SMTPreTrainingConfig(student=fields, teacher=teacher))
    other = composite(model[0])
    init_embeddings_from_teacher(other.student, other.teacher)

    def refused(*arguments):
        raise AssertionError("tables have been read")

    monkeypatch.setattr("smt_hf.training.embeddings.load_tables", refused)
    init_embeddings_from_teacher(holding.student, holding.teacher)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(holding.student.state_dict()[name], other.student.state_dict()[name])


@torch.no_grad()
def test_a_tied_student_stays_tied(model):
    path, language_model = model
    made = composite(path, tie_word_embeddings=True)
    init_embeddings_from_teacher(made.student, made.teacher)
    assert made.student.lm_head.weight is made.student.model.embed_tokens.weight
    assert_same_geometry(made.student.lm_head.weight, best_of_rank(language_model.get_input_embeddings().weight, 8))


@torch.no_grad()
def test_coordinates_that_the_model_has_not_stay(model):
    path, language_model = model
    made = composite(path, hidden_size=16)
    weight = made.student.get_input_embeddings().weight
    before = weight.clone()
    init_embeddings_from_teacher(made.student, made.teacher)
    assert torch.equal(weight[:, X:], before[:, X:]) and not torch.equal(weight[:, :X], before[:, :X])
    assert_same_geometry(weight[:, :X], best_of_rank(language_model.get_input_embeddings().weight, X))


def test_the_first_coordinate_has_the_largest_variance():
    rows = torch.randn(50, 7) @ torch.diag(torch.linspace(3, 0.1, 7)) + 5
    found = principal_coordinates(rows.bfloat16(), 4)
    assert found.dtype == torch.float32 and found.mean(0).abs().max() < 1e-4
    variances = found.var(0)
    assert variances.tolist() == sorted(variances.tolist(), reverse=True)


def test_refusals(model, tmp_path):
    made = composite(model[0])
    for teacher in (None, make_composite().teacher):
        with pytest.raises(InputError, match="give the teacher a `model_name_or_path`"):
            init_embeddings_from_teacher(made.student, teacher)
    made.student.resize_token_embeddings(PADDED + 1)
    with pytest.raises(InputError, match=f"the student has {PADDED + 1} tokens, the teacher's model {PADDED}"):
        init_embeddings_from_teacher(made.student, made.teacher)
    if not model[1].config.tie_word_embeddings:
        gone = composite(model[0])
        gone.teacher.config.model_name_or_path = str(tmp_path / "gone")
        with pytest.raises(InputError, match="no causal language model could be loaded"):
            init_embeddings_from_teacher(gone.student, gone.teacher)

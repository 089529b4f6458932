"""A cache of what a model says that comes from a GGUF file or from a repository of the Hub."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants

from smt_hf import SMTForPreTraining, SMTTrainer, SMTTrainingArguments
from smt_hf.errors import InputError
from smt_hf.teachers import pretrained
from smt_hf.training import SMTPreTrainingConfig
from smt_hf.training.cached_teacher import fill_teacher_caches
from smt_hf.training.teacher_cache import TeacherCache
from tests.loopback_hub import Hub
from tests.unit.teachers.test_pretrained import write_gguf
from tests.unit.training.test_teacher_cache import VOCAB, saved_model

NAME, GGUF = "user/llama", "tiny.gguf"
SOURCES = {
    "file": {"gguf_file": GGUF},
    "repository": {"model_name_or_path": NAME},
    "file of a repository": {"model_name_or_path": NAME, "gguf_file": GGUF},
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub without repositories, and a place for what is downloaded."""
    with Hub() as running:
        url = running.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        settings = {"ENDPOINT": running.endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": url, "HF_HUB_OFFLINE": False}
        settings |= {"HF_HUB_CACHE": str(tmp_path / "downloads"), "HF_HUB_DISABLE_XET": True}
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        yield running


def fields_of(source, hub, tmp_path, seed=1):
    """Fields of a teacher whose model is where `source` says, with other weights for every seed."""
    folder = tmp_path / f"model_{seed}"
    folder.mkdir()
    if "gguf_file" in SOURCES[source]:
        pytest.importorskip("gguf", reason='needs the extra: pip install -e ".[gguf]"')
        write_gguf(folder / GGUF)
    else:
        saved_model(folder, seed)
    if "model_name_or_path" in SOURCES[source]:
        hub.repos.setdefault(NAME, {})
        hub.commit(NAME, "main", f"model {seed}", {path.name: path.read_bytes() for path in folder.iterdir()})
    return {"model_name_or_path": str(folder), **SOURCES[source]}


def some_rows(num=6, seed=0):
    tokens = np.random.default_rng(seed).integers(VOCAB, size=(num, 9))
    return Dataset.from_dict({"input_ids": tokens.tolist()})


def composite(fields):
    torch.manual_seed(0)
    student = {"hidden_size": 8, "num_attention_heads": 2, "vocab_size": VOCAB}
    teacher = {"keeps_head": True, "holds_model": False, **fields}
    return SMTForPreTraining(SMTPreTrainingConfig(student=student, teacher=teacher))


def trained(fields, tmp_path):
    """The weights after two steps from the cache, as the recipe does it."""
    model = composite(fields)
    weights = {"teacher_weight": 0.0, "distillation_weight": 1.0, "distillation_top_k": 4}
    arguments = SMTTrainingArguments(
        output_dir=str(tmp_path / "run"), use_cpu=True, context_length=8, future_length=4, max_steps=2, report_to=[],
        per_device_train_batch_size=3, disable_tqdm=True, save_strategy="no", **weights,
        teacher_cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    fill_teacher_caches(model.config.teacher, [arguments], lambda _: some_rows(), some_rows(2, seed=5))
    SMTTrainer(model=model, args=arguments, train_dataset=some_rows(), eval_dataset=some_rows(2, seed=5)).train()
    return model.state_dict()


@pytest.mark.parametrize("source", SOURCES)
def test_the_second_run_takes_the_cache_of_the_first(source, hub, tmp_path, monkeypatch):
    """It loads no model, and downloads none; what was kept is what the model says."""
    fields = fields_of(source, hub, tmp_path)
    loaded, load = [], pretrained.load_model
    monkeypatch.setattr(pretrained, "load_model", lambda *where: loaded.append(where) or load(*where))
    first = trained(fields, tmp_path)
    assert len(loaded) == 1
    files = sorted((tmp_path / "cache").rglob("*"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    hub.requests.clear()
    second = trained(fields, tmp_path)
    assert len(loaded) == 1 and sorted((tmp_path / "cache").rglob("*")) == files
    assert not any(path.endswith("model.safetensors") for _, path in hub.requests)
    for name, value in first.items():
        assert torch.equal(second[name], value), name

    teacher = composite({**fields, "holds_model": True}).teacher.eval()
    cache = TeacherCache(tmp_path / "cache", teacher.config, some_rows(), {"top_k": 4, "temperature": 1.0})
    cache.open()
    rows = torch.tensor(some_rows()["input_ids"])[:, :-1]
    states, next_tokens = teacher.read(rows, torch.arange(9).expand(6, -1), likeliest=(4, 1.0))
    found = cache.get(torch.arange(6))
    assert states.float().std() > 0.01
    torch.testing.assert_close(found.states.float(), states.float(), rtol=0.01, atol=1e-5)
    torch.testing.assert_close(found.next_tokens.probabilities, next_tokens.probabilities, rtol=0.02, atol=1e-5)


def test_another_commit_is_another_model(hub, tmp_path, monkeypatch):
    def names():
        config = composite({"model_name_or_path": NAME}).config.teacher
        return [part.folder.name for part in TeacherCache(tmp_path / "cache", config, some_rows()).parts]

    fields_of("repository", hub, tmp_path)
    first = names()
    assert names() == first
    fields_of("repository", hub, tmp_path, seed=2)
    assert names() != first
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(InputError, match="no causal language model could be loaded"):
        names()

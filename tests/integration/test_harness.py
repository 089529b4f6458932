"""lm-eval with our model class and our tasks agrees with our own recipe; needs the extra `eval`."""

import itertools
import sys
from dataclasses import dataclass

import pytest
import torch
import yaml

pytest.importorskip("lm_eval", reason='needs the extra: pip install -e ".[eval]"')

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from smt_hf.data import byte_tokenizer
from smt_hf.errors import InputError
from smt_hf.evaluation.harness import TASK_FOLDER, __main__, documents
from smt_hf.evaluation.harness.model import CarriedStateLM
from smt_hf.evaluation.long_context import SUITES
from smt_hf.evaluation.long_context.documents import DocumentTask
from smt_hf.experiments import long_context
from smt_hf.experiments.long_context import evaluate, parse_evaluate
from tests.language_models import (
    HandTask,
    make_llama,
    make_mamba,
    make_ours,
    make_rwkv,
    plain_continuation,
    plain_logits,
)

LENGTH, NUM = 64, 6


@pytest.fixture(scope="module", params=[make_ours, make_llama, make_mamba, make_rwkv])
def loaded(request, tmp_path_factory):
    """A model of bytes and its folder."""
    model, folder = request.param(), tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model, folder


@pytest.fixture
def lm(loaded):
    return CarriedStateLM(str(loaded[1]), batch_size=3, device="cpu", chunk_size=16)


@dataclass
class Request:
    args: tuple


def losses(model, context, continuation):
    """Nats of each byte of a continuation, and whether it is the most likely one."""
    targets = torch.tensor(list(continuation))
    logs = plain_logits(model, [*context, *continuation]).log_softmax(-1)[len(context) - 1 : -1]
    return -logs.gather(1, targets[:, None])[:, 0], logs.argmax(-1) == targets


def known_task(model):
    """Half of the answers are what the model writes."""
    known = {}
    for index in range(0, NUM, 2):
        prompt = HandTask().sample(LENGTH, index, 0, len).prompt
        ids = plain_continuation(model, prompt.encode(), 4)
        known[index] = byte_tokenizer().decode(ids, skip_special_tokens=True)
    return HandTask(known=known)


def test_both_ways_agree(loaded, lm, tmp_path, monkeypatch):
    model, folder = loaded
    task = known_task(model)
    for module in (documents, long_context):
        monkeypatch.setattr(module, "tasks_of", lambda suite, names, settings: [task])
    monkeypatch.setattr(long_context, "SUITES", {"hand": {}})
    documents._task.cache_clear()
    template = (TASK_FOLDER / "sample_template_yaml").read_text()
    (tmp_path / "sample_template_yaml").write_text(template)
    one = (TASK_FOLDER / "ruler_vt.yaml").read_text().replace("max_gen_toks: 30", "max_gen_toks: 4")
    (tmp_path / "hand.yaml").write_text(
        one.replace("smt_ruler_vt", "hand").replace("ruler, task: vt", "hand, task: hand")
    )
    metadata = {"tokenizer": str(folder), "length": LENGTH, "num_samples": NUM, "split": "all"}
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False, metadata=metadata)
    theirs = simple_evaluate(lm, tasks=["hand"], task_manager=manager, bootstrap_iters=0)
    documents._task.cache_clear()
    words = ["--checkpoint", str(folder), "--suite", "hand", "--lengths", str(LENGTH), "--num_samples", str(NUM)]
    (ours,) = evaluate(*parse_evaluate([*words, "--device", "cpu", "--output", str(tmp_path / "out.jsonl")]))
    assert theirs["results"]["hand"]["score,none"] == pytest.approx(ours["value"]) and 0.5 <= ours["value"] < 1
    samples = sorted(theirs["samples"]["hand"], key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0] for sample in samples[:2]] == [example["written"] for example in ours["examples"]]
    for index, sample in enumerate(samples):
        assert documents.sample_of(sample["doc"]) == task.sample(LENGTH, index, 0, len)


def test_rolling_likelihood_is_one_stream(loaded, lm):
    model, _ = loaded
    texts = ["abc" * 30, "", "x", "hello world, " * 9]
    found = lm.loglikelihood_rolling([Request((text,)) for text in texts], disable_tqdm=True)
    assert found[1] == 0
    for text, value in zip(texts, found):
        if text:
            assert value == pytest.approx(-losses(model, [256], text.encode())[0].sum().item(), rel=1e-4)


def test_likelihoods(loaded, lm):
    """Also of contexts that come several times, and of trailing spaces, which belong to the continuation."""
    model, _ = loaded
    pairs = [(" a long context" * 5, "yes"), ("short", "no"), ("short", "maybe not"), ("", "alone"), ("end ", "x")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    found = lm.loglikelihood(requests, disable_tqdm=True)
    pairs[3], pairs[4] = (None, "alone"), ("end", " x")
    for (context, continuation), (value, is_greedy) in zip(pairs, found):
        ids = [256] if context is None else list(context.encode())
        nats, hits = losses(model, ids, continuation.encode())
        assert value == pytest.approx(-nats.sum().item(), rel=1e-4) and is_greedy == bool(hits.all())
    greedy = bytes(plain_continuation(model, b"short", 1))
    if greedy[0] < 128:
        assert lm.loglikelihood([Instance("loglikelihood", {}, ("short", greedy.decode()), 0)])[0][1]


def test_writing_ends_before_a_stop(loaded, lm):
    model, _ = loaded
    prompts = ["a prompt of some bytes", "another"]
    ids = [plain_continuation(model, prompt.encode(), 8) for prompt in prompts]
    ids = [list(itertools.takewhile(lambda token: token not in lm.loaded.ends, some)) for some in ids]
    whole = [byte_tokenizer().decode(some, skip_special_tokens=True) for some in ids]
    for stop in (None, whole[0][-1], whole[1][1:3]):
        settings = {"max_gen_toks": 8, "until": [stop] if stop else [], "do_sample": False, "temperature": 0.0}
        found = lm.generate_until([Request((prompt, settings)) for prompt in prompts], disable_tqdm=True)
        assert found == [text.partition(stop)[0] if stop else text for text in whole]
    with pytest.raises(InputError, match="do_sample"):
        lm.generate_until([Request((prompts[0], {"do_sample": True, "temperature": 0.7}))])


def test_nothing_is_cut(loaded):
    short = CarriedStateLM(str(loaded[1]), device="cpu", max_length=20)
    assert short.max_length == 20
    settings = {"max_gen_toks": 5}
    short.generate_until([Request(("x" * 15, settings))])
    short.loglikelihood_rolling([Request(("x" * 19,))])
    for ask in (
        lambda: short.generate_until([Request(("x" * 16, settings))]),
        lambda: short.loglikelihood([Instance("loglikelihood", {}, ("x" * 16, "y" * 5), 0)]),
        lambda: short.loglikelihood_rolling([Request(("x" * 20,))]),
    ):
        with pytest.raises(InputError, match=r"21 tokens.*`max_length` is 20"):
            ask()


def test_only_positions_limit_a_model(loaded):
    model, folder = loaded
    limit = 512 if model.config.model_type == "llama" else None
    assert CarriedStateLM(str(folder), device="cpu").max_length == limit
    with pytest.raises(InputError, match="batch_size"):
        CarriedStateLM(str(folder), batch_size="auto", device="cpu")


def test_there_is_a_task_for_every_task():
    """With the tokens to write that the suite says."""
    files = {path.stem: yaml.safe_load(path.read_text()) for path in TASK_FOLDER.glob("*.yaml")}
    assert set(files) == {f"{suite}_{name}" for suite, names in SUITES.items() for name in names}
    for stem, content in files.items():
        suite, name = content["dataset_kwargs"].values()
        assert stem == f"{suite}_{name}" and content["task"] == f"smt_{stem}" and content["tag"] == f"smt_{suite}"
        assert content["generation_kwargs"]["until"] == [] and content["generation_kwargs"]["do_sample"] is False


def test_tokens_to_write_are_those_of_the_tasks(text_file, tmp_path):
    text_file.write_text("The whale swam on and on in the cold and quiet sea. " * 400)
    row = '{"id": "1", "input": "Q?\\n\\n(A) a (B) b (C) c (D) d\\n\\nText of it.", "output": "a"}\n'
    for name in SUITES["scrolls"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "validation.jsonl").write_text(row)
    settings = long_context.LongContextSettings(haystack=[str(text_file)], scrolls=str(tmp_path))
    for suite, names in SUITES.items():
        for name in names:
            if name.startswith("qa_"):  # of a file that is not at hand
                expected = DocumentTask.num_generated
            else:
                (task,) = long_context.tasks_of(suite, [name], settings)
                expected = task.num_generated
            content = yaml.safe_load((TASK_FOLDER / f"{suite}_{name}.yaml").read_text())
            assert content["generation_kwargs"]["max_gen_toks"] == expected, name


def test_the_command_knows_our_tasks(monkeypatch):
    asked = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: asked.append(list(sys.argv)))
    monkeypatch.setattr(sys, "argv", ["harness", "run", "--model", "smt_rnn"])
    __main__.main()
    assert asked == [["harness", "run", "--model", "smt_rnn", "--include_path", str(TASK_FOLDER)]]
    assert get_model("smt_rnn") is CarriedStateLM
    monkeypatch.setattr(sys, "argv", ["harness", "run", "--include_path=mine"])
    __main__.main()
    assert asked[-1] == ["harness", "run", "--include_path=mine"]


def test_bad_input_ends_the_command_with_one_line(monkeypatch, capsys):
    def refused():
        raise InputError("too\nshort")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", refused)
    monkeypatch.setattr(sys, "argv", ["harness"])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 2 and capsys.readouterr().err == "error: too short\n"

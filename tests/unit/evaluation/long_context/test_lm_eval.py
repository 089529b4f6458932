"""Our tasks against those of lm-eval: prompts, frequencies and scores."""

import random
import re
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from smt_hf.evaluation.long_context import documents, frequencies, needles, tasks_of, variables
from smt_hf.evaluation.long_context.answers import any_matched, only_label, share_matched
from smt_hf.evaluation.long_context.haystack import NOISE
from smt_hf.evaluation.long_context.stories import ROOMS

pytest.importorskip("lm_eval")
pytest.importorskip("wonderwords")
nltk = pytest.importorskip("nltk")

NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.")
CONFIGURATIONS = {
    "niah_single_1": ("repeat", "words", "numbers", {}),
    "niah_single_2": ("essay", "words", "numbers", {}),
    "niah_single_3": ("essay", "words", "uuids", {}),
    "niah_multikey_1": ("essay", "words", "numbers", {"num_needle_k": 4}),
    "niah_multikey_2": ("needle", "words", "numbers", {}),
    "niah_multikey_3": ("needle", "uuids", "uuids", {}),
    "niah_multivalue": ("essay", "words", "numbers", {"num_needle_v": 4}),
    "niah_multiquery": ("essay", "words", "numbers", {"num_needle_q": 4}),
}


@pytest.fixture(scope="module")
def theirs():
    """lm-eval's modules, imported without its download of NLTK's data and without its list of all pairs of words."""
    few = {"noun": ["cat", "dog"], "adjective": ["big", "red"], "verb": ["go", "run"]}
    many = {f"{kind}s": words for kind, words in few.items()}
    modules = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wonderwords.RandomWord", lambda: SimpleNamespace(_categories={**few, **many}))
        patch.setattr(nltk.data, "find", lambda *names: None)
        for name in ("prepare_niah", "niah_utils", "vt_utils", "cwe_utils", "fwe_utils", "qa_utils", "common_utils"):
            modules[name] = pytest.importorskip(f"lm_eval.tasks.ruler.{name}")
    modules["prepare_niah"].cached_sent_tokenize = nltk.PunktSentenceTokenizer().tokenize
    yield SimpleNamespace(**modules)
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ruler.")]:
        del sys.modules[name]


def skeleton(prompt, kind_of_key):
    """A prompt without what is drawn: its ends, and its needles with `K` and `V` for keys and values."""
    keys = {key for _, key, _ in NEEDLE.findall(prompt)}
    for key in sorted(keys, key=len, reverse=True):
        prompt = prompt.replace(f" {key}", " K")
    head, _, rest = prompt.partition("\n")
    context, _, tail = rest.rpartition("\n")
    texts = {re.sub(r"(is: )\S+\.", r"\1V.", match[0]) for match in NEEDLE.finditer(context)}
    lines = {line for line in context.split("\n") if not NEEDLE.fullmatch(line)} if kind_of_key == "lines" else set()
    return head, texts, lines, tail


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_needles(name, theirs, settings, book, count_bytes):
    haystack, key_kind, value_kind, numbers = CONFIGURATIONS[name]
    text = {
        "essay": book.read_text().split(),
        "repeat": NOISE,
        "needle": needles.NEEDLE.replace("{kind}", "{type_needle_v}"),
    }
    random.seed(0)
    (their,) = theirs.prepare_niah.generate_samples(
        text[haystack],
        lambda text: SimpleNamespace(input_ids=[0] * count_bytes(text)),
        max_seq_length=4500,
        type_haystack=haystack,
        type_needle_k=key_kind,
        type_needle_v=value_kind,
        template=theirs.niah_utils.TEMPLATE,
        num_samples=1,
        **numbers,
    )
    (task,) = tasks_of("ruler", [name], settings)
    ours = task.sample(4500, 0, 0, count_bytes)
    kind = "essay" if haystack == "essay" else "lines"
    their_prompt = f"{their['input']} {their['gen_prefix']}"
    assert skeleton(ours.prompt, kind) == skeleton(their_prompt, kind)
    assert len(ours.answers) == len(their["outputs"])
    if haystack == "essay":
        assert len(NEEDLE.findall(ours.context)) == len(NEEDLE.findall(their_prompt.split("\n")[1]))
    assert task.num_generated == 128
    for written in (ours.completion, f"x {ours.answers[0]} y", "nothing"):
        assert task.score(ours, written) == theirs.common_utils.string_match_all([written], [ours.answers])


def test_templates(theirs):
    assert theirs.vt_utils.TEMPLATE.format(context="{context}", query="12345", num_v=5) == variables.TEMPLATE.format(
        value="12345", number=5
    )
    assert theirs.cwe_utils.TEMPLATE == frequencies.COMMON_TEMPLATE
    assert theirs.fwe_utils.TEMPLATE == frequencies.CODED_TEMPLATE
    assert theirs.qa_utils.TEMPLATE == documents.TEMPLATE + "{query}"
    for module, task in (
        (theirs.cwe_utils, frequencies.CommonWordsTask),
        (theirs.fwe_utils, frequencies.CodedWordsTask),
    ):
        assert module.CONFIG["tokens_to_generate"] == task.num_generated
    assert theirs.vt_utils.CONFIG["variable_tracking"]["tokens_to_generate"] == variables.VariableTask.num_generated


def test_assignments(theirs):
    (names,), (chain,) = theirs.vt_utils.generate_chains(1, 4)
    assert variables.assignments(names, chain[0].split(" = ")[1]) == chain


def test_frequencies_of_coded_words(theirs):
    for number in (60, 300, 1234):
        tokenizer = lambda text: SimpleNamespace(input_ids=[])  # noqa: E731
        text, answers, _ = theirs.fwe_utils.generate_input_output(9999, tokenizer, number, vocab_size=30)
        context = text.split("coded words. ")[1].split("\nQuestion")[0]
        times = Counter(context.split(" "))
        expected = frequencies.zipf(number, 30)
        assert sorted(times.values(), reverse=True) == [count for count in expected if count]
        assert [times[word] for word in answers] == list(expected[1:4])


def test_the_list_of_common_words(theirs, settings, count_bytes, monkeypatch):
    monkeypatch.setattr(theirs.cwe_utils, "WORDS", [f"word{number}" for number in range(100)])
    for length in (3000, 9000):
        (task,) = tasks_of("ruler", ["cwe"], settings)
        ours = task.sample(length, 0, 0, count_bytes)
        units = ours.facts["num_different"]
        example, question, _ = theirs.cwe_utils.generate_input_output(min(units, 50), length)
        entries = [re.findall(r"\d+\. \S+", text) for text in (example, ours.prompt.split("\nBelow is")[0])]
        assert len(entries[0]) == len(entries[1])

        def times(text):
            words = re.findall(r"\d+\. (.+?)(?= \d+\. |\n)", text)
            return set(Counter(words).values())

        assert times(question) == times(ours.context + "\n")


def test_matches(theirs):
    references = ["Abc", "12"]
    for written in ("abc 12", "ABC", "", "1 2"):
        assert share_matched(written, references) == theirs.common_utils.string_match_all([written], [references])
        any_of_them = theirs.common_utils.string_match_part([written], [references]) > 0  # lm-eval takes the share
        assert any_matched(written, references) == any_of_them


def test_accuracy_of_babilong():
    """lm-eval's is looser: it finds the label anywhere."""
    babilong = pytest.importorskip("lm_eval.tasks.babilong.common_utils")
    for written in (" garden", "Mary is in the GARDEN.", "the office", "", "garden or office", "No. garden"):
        theirs = babilong.process_results({"target": "garden"}, [written])["acc"]
        ours = only_label(written, "garden", ROOMS, "Where is Mary?")
        assert ours <= theirs
        if sum(room in written.lower() for room in ROOMS) < 2 and "." not in written[:-1]:
            assert ours == theirs

"""RULER's tasks: their texts, sizes, controls, guesses and refusals."""

import json
import re
from collections import Counter
from itertools import pairwise

import pytest

from smt_hf.errors import InputError
from smt_hf.evaluation.long_context import LongContextSettings, TooShort, tasks_of
from smt_hf.evaluation.long_context.frequencies import zipf
from smt_hf.evaluation.long_context.haystack import NOISE
from smt_hf.evaluation.long_context.needles import DEPTHS
from smt_hf.evaluation.long_context.ruler import WINDOW
from smt_hf.evaluation.long_context.vocabulary import belongs

pytest.importorskip("wonderwords")
pytest.importorskip("nltk")

NIAH = [f"niah_{kind}" for kind in ("single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3")]
NIAH += ["niah_multivalue", "niah_multiquery"]
GENERATED = [*NIAH, "vt", "cwe", "fwe"]
NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.")


def task_of(name, settings):
    return tasks_of("ruler", [name], settings)[0]


@pytest.mark.parametrize("name", GENERATED)
def test_a_prompt_fills_its_length_and_is_the_same_again(name, settings, count):
    task = task_of(name, settings)
    for length in (2500, 3000):
        sample = task.sample(length, 1, 7, count)
        size = count(sample.prompt) + task.num_generated
        assert length - 250 < size <= length
        assert sample == task.sample(length, 1, 7, count)
        assert sample.prompt != task.sample(length, 2, 7, count).prompt
        assert sample.prompt != task.sample(length, 1, 8, count).prompt
        assert json.loads(json.dumps(sample.facts)) == sample.facts


@pytest.mark.parametrize("name", GENERATED)
def test_the_smallest_length_is_told_and_works(name, settings, count):
    task = task_of(name, settings)
    with pytest.raises(TooShort, match=f"`{name}` does not fit in a length of 50") as error:
        task.sample(50, 3, 0, count)
    smallest = int(re.search(r"sample 3 is (\d+)", str(error.value))[1])
    assert smallest - 20 < count(task.sample(smallest, 3, 0, count).prompt) + task.num_generated <= smallest
    with pytest.raises(TooShort):
        task.sample(smallest - 20, 3, 0, count)


@pytest.mark.parametrize("name", GENERATED)
def test_the_control_has_no_answer_and_the_same_length(name, settings, count_bytes):
    task = task_of(name, settings)
    sample = task.sample(4000, 0, 0, count_bytes)
    control = task.without_needles(sample)
    assert sample.needles and not control.needles and control.answers == sample.answers
    assert task.score(sample, sample.context) == 1
    pieces = set(re.split(r"[ \n]", control.context))
    assert not any(answer in pieces or f"{answer}." in pieces for answer in sample.answers)
    slack = 60 if name == "cwe" else 12 if name == "niah_multikey_2" else 0
    assert abs(len(control.prompt) - len(sample.prompt)) <= slack
    first, last = sample.needles[0].start, sample.needles[-1].end
    assert control.prompt[:first] == sample.prompt[:first]
    assert control.prompt.endswith(sample.prompt[last:])
    assert control.prompt.endswith(sample.prompt[sample.facts["context"][1] :])


@pytest.mark.parametrize("name", GENERATED)
def test_needles_lie_where_their_depth_says(name, settings, count_bytes):
    for index in range(4):
        sample = task_of(name, settings).sample(3000, index, 0, count_bytes)
        start, end = sample.facts["context"]
        assert [needle.start for needle in sample.needles] == sorted(needle.start for needle in sample.needles)
        for needle in sample.needles:
            assert start <= needle.start < needle.end <= end and 0 <= needle.depth <= 1
            assert needle.depth == pytest.approx((needle.start - start) / (end - start), abs=0.05)
            assert any(answer in sample.prompt[needle.start : needle.end] for answer in sample.answers)


@pytest.mark.parametrize("name", GENERATED)
def test_a_model_that_knows_the_answer_scores_one(name, settings, count_bytes):
    task = task_of(name, settings)
    sample = task.sample(4000, 0, 0, count_bytes)
    assert task.score(sample, sample.completion) == 1
    assert task.score(sample, sample.completion.upper()) == 1
    assert task.score(sample, "") == 0
    assert task.score(sample, sample.answers[-1]) == pytest.approx(1 / len(sample.answers))
    assert 0 <= task.chance(sample) < 0.3
    if name != "cwe":  # bytes of ten numbered words are more than the tokens to generate
        assert count_bytes(sample.completion) <= task.num_generated


def test_the_prompt_of_one_needle_in_noise(settings, count_bytes):
    sample = task_of("niah_single_1", settings).sample(1500, 0, 0, count_bytes)
    (needle,) = sample.needles
    match = NEEDLE.fullmatch(sample.prompt[needle.start : needle.end])
    kind, key, value = match.groups()
    assert kind == "numbers" and sample.answers == (value,) and 1_000_000 <= int(value) <= 9_999_999
    lines = sample.prompt.split("\n")
    assert lines[0] == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards."
    )
    assert lines[-1] == (
        f"What is the special magic number for {key} mentioned in the provided text? The special magic number for "
        f"{key} mentioned in the provided text is"
    )
    assert set(lines[1:-1]) == {NOISE, match[0]} and lines[-2] == NOISE and lines.count(match[0]) == 1
    assert sample.completion == f" {value}"


def test_the_prompt_of_several_keys(settings, count_bytes):
    sample = task_of("niah_multiquery", settings).sample(2500, 0, 0, count_bytes)
    found = {key: value for _, key, value in NEEDLE.findall(sample.prompt)}
    keys = [key for key in found if found[key] in sample.answers]
    asked = re.search(r"numbers for (.*) mentioned in the provided text\? ", sample.prompt)[1]
    assert len(found) == 4 and set(asked.replace("and ", "").split(", ")) == set(keys)
    assert [found[key] for key in asked.replace("and ", "").split(", ")] == list(sample.answers)
    assert sample.prompt.startswith("Some special magic numbers are hidden within the following text. Make sure")
    assert sample.prompt.endswith(
        f"\nWhat are all the special magic numbers for {asked} mentioned in the provided text? The special magic "
        f"numbers for {asked} mentioned in the provided text are"
    )


@pytest.mark.parametrize(
    ("name", "kind", "num_mentioned", "num_answers"),
    [
        ("niah_single_2", "numbers", 1, 1),
        ("niah_single_3", "uuids", 1, 1),
        ("niah_multikey_1", "numbers", 4, 1),
        ("niah_multivalue", "numbers", 4, 4),
    ],
)
def test_needles_in_an_essay(name, kind, num_mentioned, num_answers, settings, book, count_bytes):
    task = task_of(name, settings)
    sample = task.sample(3000, 0, 0, count_bytes)
    needles = NEEDLE.findall(sample.context)
    assert len(needles) == num_mentioned and {needle[0] for needle in needles} == {kind}
    assert len({key for _, key, _ in needles}) == (4 if name == "niah_multikey_1" else 1)
    assert {value for _, _, value in needles} >= set(sample.answers) and len(sample.answers) == num_answers
    assert len(sample.needles) == num_answers
    book_text = " ".join(book.read_text().split())
    words = NEEDLE.sub("", sample.context).split()
    start = (book_text + " " + book_text).index(" ".join(words[:50]))
    assert (book_text + " " + book_text)[start:].startswith(" ".join(words))
    before = sample.context[: sample.context.index("One of the special")].strip()
    assert before == "" or before.endswith(".")  # after a whole sentence
    assert task.chance(sample) == (0.25 if name == "niah_multikey_1" else pytest.approx(0, abs=1e-6))


@pytest.mark.parametrize(("name", "kind"), [("niah_multikey_2", "numbers"), ("niah_multikey_3", "uuids")])
def test_needles_among_needles(name, kind, settings, count_bytes):
    task = task_of(name, settings)
    sample = task.sample(3000, 0, 0, count_bytes)
    lines = sample.context.split("\n")
    parts = [NEEDLE.fullmatch(line).groups() for line in lines]
    assert {part[0] for part in parts} == {kind}
    assert len({part[1] for part in parts}) == len({part[2] for part in parts}) == len(lines) > 10
    asked = sample.prompt.rpartition(" for ")[2].split(" mentioned")[0]
    assert [value for _, key, value in parts if key == asked] == list(sample.answers)
    assert task.chance(sample) == 1 / len(lines)
    longer = task.sample(3500, 0, 0, count_bytes)
    assert longer.answers == sample.answers and set(longer.context.split("\n")) > set(lines)


def test_the_chain_of_variables(settings, count_bytes):
    sample = task_of("vt", settings).sample(4000, 0, 0, count_bytes)
    first, second = re.findall(r"hidden in the following text\.\n\n(.*?)\nQuestion", sample.prompt, re.DOTALL)
    assert second == sample.context
    lines = [line for line in second.split("\n") if line != NOISE]
    names = sample.answers
    assert len(names) == 5 and all(re.fullmatch("[A-Z]{5}", name) for name in names)
    assert lines == [
        f"VAR {names[0]} = {sample.facts['value']}",
        *(f"VAR {name} = VAR {last} " for last, name in pairwise(names)),
    ]
    assert second.endswith(NOISE)
    shown = [line for line in first.split("\n") if line != NOISE]
    example = re.findall(r"VAR ([A-Z]{3}) = ", first)
    assert len(shown) == len(example) == 5 and first.count(NOISE) == 5  # bytes: the fewest that can be
    assert f", they are:  {' '.join(example)}\n\nMemorize and track" in sample.prompt
    assert sample.prompt.endswith(
        f"Question: Find all variables that are assigned the value {sample.facts['value']} in the text above. Answer: "
        "According to the chain(s) of variable assignment in the text above, 5 variables are assgined the value "
        f"{sample.facts['value']}, they are: "
    )


def test_the_example_of_variables_has_up_to_500_tokens(settings):
    def count(text):
        return len(text) // 8

    sample = task_of("vt", settings).sample(2000, 0, 0, count)
    example = sample.prompt.partition("they are:  ")[0]
    assert 500 - len(NOISE) // 8 - 3 <= count(example + "they are: ") <= 500


@pytest.mark.parametrize(
    ("length", "common", "other", "shown"), [(3000, 6, 1, 20), (4500, 6, 1, 20), (9000, 30, 3, 40)]
)
def test_common_words(length, common, other, shown, settings, count_bytes):
    sample = task_of("cwe", settings).sample(length, 0, 0, count_bytes)
    start = "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones"
    _, example, question = sample.prompt.split(start)
    entries = re.findall(r"(\d+)\. (.+?)(?= \d+\. |$)", sample.context)
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    frequencies = Counter(word for _, word in entries)
    assert {word for word, times in frequencies.items() if times == common} == set(sample.answers)
    assert set(frequencies.values()) == {common, other} and len(sample.answers) == 10
    listed, answer = re.search(r"most often\.\n(.*)\nQuestion.*in the list are: (.*)\n$", example).groups()
    in_example = Counter(re.findall(r"\d+\. (.+?)(?= \d+\. |$)", listed))
    most_common = [word for word, _ in in_example.most_common(10)]
    assert set(re.findall(r"\d+\. (.+?)(?= \d+\. |$)", answer)) == set(most_common)
    assert len(in_example) == shown and not set(in_example) & set(frequencies)
    assert question.endswith(
        "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most "
        "often in the list are:"
    )


def test_coded_words(settings, count_bytes):
    task = task_of("fwe", settings)
    sample = task.sample(3000, 0, 0, count_bytes)
    frequencies = Counter(sample.context.split(" "))
    ranks = [word for word, _ in frequencies.most_common(4)]
    assert ranks[0] == "..." and set(ranks[1:]) == set(sample.answers)
    assert all(re.fullmatch("[a-z]{6}", word) for word in frequencies if word != "...")
    times = sorted(frequencies.values(), reverse=True)
    assert any(list(zipf(number, 60))[: len(times)] == times for number in range(400, 700))
    assert sample.prompt.startswith(
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. "
    )
    assert sample.prompt.endswith(
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
        "appeared words are:"
    )


def test_the_fourth_coded_word_is_more_frequent_than_the_fifth():
    for number in range(27, 2000):
        times = zipf(number, 40)
        assert times[3] > times[4] and (times[0] == int(number * 6 / 3.14159265358979**2) or number < 53)


@pytest.mark.parametrize("name", NIAH)
def test_the_shortcut_knows_the_end_of_the_haystack_alone(name, settings, count_bytes):
    task, found = task_of(name, settings), []
    for index in range(12):
        sample = task.sample(2000, index, 0, count_bytes)
        end = sample.facts["context"][1]
        near = [sample.prompt[needle.start : needle.end] for needle in sample.needles if needle.start >= end - WINDOW]
        values = [NEEDLE.fullmatch(text)[3] for text in near]
        assert task.shortcut(sample).split() == values
        found += values
    assert found
    assert task.shortcut(task.without_needles(sample)) == ""


def test_the_shortcuts_of_frequencies_and_variables(settings, count_bytes):
    for name, expected in (("fwe", 0.8), ("cwe", 0.2), ("vt", 0.05)):
        task = task_of(name, settings)
        samples = [task.sample(4000, index, 0, count_bytes) for index in range(8)]
        score = sum(task.score(sample, task.shortcut(sample)) for sample in samples) / 8
        assert expected < score < 1.01, name
    near = [name for name in samples[0].answers if name in samples[0].context[-WINDOW:]]
    assert task.shortcut(samples[0]).split() == near


@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.parametrize("split", ["train", "test"])
def test_keys_and_values_are_those_of_the_split(name, split, book, count_bytes):
    task = task_of(name, LongContextSettings(haystack=[str(book)], split=split))
    samples = [task.sample(2500, index, 0, count_bytes) for index in range(5)]
    text = " ".join(sample.prompt for sample in samples)
    patterns = {
        "vt": r"VAR ([A-Z]+) = |VAR [A-Z]+ = (\d+)\n",
        "cwe": r"\d+\. (.+?)(?= \d+\. |\n)",
        "fwe": r"(?:\. | )([a-z]{6})(?= \.\.\.)",
    }
    pattern = patterns.get(name, NEEDLE.pattern)
    found = {part for match in re.finditer(pattern, text) for part in match.groups() if part}
    found -= {"numbers", "uuids"}
    assert len(found) >= 10
    for part in found:
        if name.startswith("niah") and not re.fullmatch(r"\d{7}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", part):
            cuts = [match.start() for match in re.finditer("-", part)]
            assert any(belongs(part[:cut], split) and belongs(part[cut + 1 :], split) for cut in cuts)
        else:
            assert belongs(part, split)


def test_needles_in_an_essay_have_one_of_40_depths(settings, count_bytes):
    task = task_of("niah_single_2", settings)
    depths = [task.sample(6000, index, 0, count_bytes).needles[0].depth for index in range(40)]
    assert min(depths) < 0.15 and max(depths) > 0.85 and 0.3 < sum(depths) / 40 < 0.7
    assert DEPTHS[:4] == (0, 3, 5, 8) and DEPTHS[-1] == 100 and len(set(DEPTHS)) == 40


def test_essays_need_a_haystack():
    with pytest.raises(InputError, match="`niah_single_2` hides its needles in text: give `--haystack FILE`"):
        tasks_of("ruler", ["niah_single_2"])
    with pytest.raises(InputError, match="no file found at 'nothing"):
        tasks_of("ruler", ["niah_single_2"], LongContextSettings(haystack=["nothing.txt"]))


def squad(tmp_path, num_articles=6, num_paragraphs=3):
    articles = []
    for article in range(num_articles):
        paragraphs = []
        for place in range(num_paragraphs):
            context = f"Article {article}, part {place}. The colour is c{article}x{place}. " + "More is said. " * 5
            asked = {"question": f"Which colour has {article}, {place}?", "is_impossible": False}
            asked["answers"] = [{"text": f"c{article}x{place}"}, {"text": f"the colour c{article}x{place}"}]
            refused = {"question": "What is not told?", "is_impossible": True, "answers": []}
            paragraphs.append({"context": context, "qas": [asked, refused]})
        articles.append({"paragraphs": paragraphs})
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": articles}))
    return path


def test_questions_about_squad(tmp_path, count_bytes):
    task = task_of("qa_squad", LongContextSettings(squad_file=str(squad(tmp_path))))
    assert task.num_samples == 18 and task.metric == "string_match_part"
    sample = task.sample(1500, 0, 0, count_bytes)
    documents = re.findall(r"Document (\d+):\n(.*?)\n\n", sample.prompt, re.DOTALL)
    assert [int(number) for number, _ in documents] == list(range(1, len(documents) + 1))
    (needle,) = sample.needles
    answer = sample.answers[0]
    assert f"The colour is {answer}." in sample.prompt[needle.start : needle.end]
    article = answer[1]
    assert sum(f"Article {article}," in text for _, text in documents) == 3  # those of the same article come first
    assert len({text for _, text in documents}) == len(documents) > 5
    assert sample.prompt.startswith(
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
        "\n\nThe following are given documents.\n\nDocument 1:\nArticle "
    )
    assert sample.prompt.endswith(
        "\n\nAnswer the question based on the given documents. Only give me the answer and do not output any other "
        f"words.\n\nQuestion: Which colour has {article}, {answer[-1]}? Answer:"
    )
    assert 1500 - 130 < count_bytes(sample.prompt) + 32 <= 1500
    assert task.score(sample, f"It is {answer}.") == 1 and task.score(sample, "c0") == 0
    control = task.without_needles(sample)
    assert len(control.prompt) == len(sample.prompt) and answer not in control.context
    prompts = [task.sample(700, index, 3, count_bytes).answers[0] for index in range(18)]
    assert len(set(prompts)) == 18 and prompts != sorted(prompts)
    with pytest.raises(InputError, match="has 18 samples"):
        task.sample(700, 18, 0, count_bytes)
    with pytest.raises(InputError, match="haystack for a length of"):
        task.sample(5000, 0, 0, count_bytes)


def test_questions_about_hotpot(tmp_path, count_bytes):
    rows = []
    for number in range(5):
        context = [
            [f"Title {number} {place}", [f"Sentence {number}.", f" Fact f{number}v{place}."]] for place in range(4)
        ]
        rows.append({"question": f"Which {number}?", "answer": f"f{number}v2", "context": context})
        rows[-1]["supporting_facts"] = [[f"Title {number} 2", 1]]
    path = tmp_path / "hotpot.json"
    path.write_text(json.dumps(rows))
    task = task_of("qa_hotpot", LongContextSettings(hotpot_file=str(path)))
    sample = task.sample(800, 0, 0, count_bytes)
    number = sample.answers[0][1]
    assert all(
        f"Title {number} {place}\nSentence {number}. Fact f{number}v{place}." in sample.prompt for place in range(4)
    )
    (needle,) = sample.needles
    assert sample.answers[0] in sample.prompt[needle.start : needle.end]
    with pytest.raises(TooShort):
        task.sample(400, 0, 0, count_bytes)


def test_files_of_questions_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="`qa_squad` asks questions of SQuAD: give `--squad_file"):
        tasks_of("ruler", ["qa_squad"])
    with pytest.raises(InputError, match="give `--hotpot_file"):
        tasks_of("ruler", ["qa_hotpot"])
    with pytest.raises(InputError, match="cannot read"):
        tasks_of("ruler", ["qa_squad"], LongContextSettings(squad_file=str(tmp_path / "none.json")))
    with pytest.raises(InputError, match="not a JSON file in the format of HotpotQA"):
        tasks_of("ruler", ["qa_hotpot"], LongContextSettings(hotpot_file=str(squad(tmp_path))))

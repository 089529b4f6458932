"""bAbI's stories and their places in a book."""

import random
import re
from collections import Counter

import pytest

from smt_hf.errors import InputError
from smt_hf.evaluation.long_context import LongContextSettings, TooShort, tasks_of
from smt_hf.evaluation.long_context.babilong import last_label
from smt_hf.evaluation.long_context.instructions import INSTRUCTIONS
from smt_hf.evaluation.long_context.stories import ROOMS, made_up, read_stories
from smt_hf.evaluation.long_context.vocabulary import belongs

pytest.importorskip("nltk")

FILE = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Mary went back to the hallway.
5 Where is Mary? \thallway\t4
1 John got the  apple there.
2 Sandra moved to the office.
3 John journeyed to the garden.
4 Where is the apple? \tgarden\t1 3
"""


def task_of(name, settings, **changes):
    for field, value in changes.items():
        setattr(settings, field, value)
    return tasks_of("babilong", [name], settings)[0]


def replayed(facts):
    """Rooms of people and places of objects, step by step, with nothing but the words of the facts."""
    rooms, places, histories = {}, {}, {}
    for fact in facts:
        words = fact.rstrip(".").split()
        if words[-1] in ROOMS:
            rooms[words[0]] = words[-1]
        else:
            thing = next(word for word in words if word in ("apple", "football", "milk"))
            is_left = re.search(r" (dropped|discarded|left|put down) the ", fact)
            places[thing] = rooms.get(words[0]) if is_left else words[0]
        for thing, place in places.items():
            room = rooms.get(place) if place in ("John", "Mary", "Sandra", "Daniel") else place
            history = histories.setdefault(thing, [])
            if room is not None and history[-1:] != [room]:
                history.append(room)
    return rooms, histories


@pytest.mark.parametrize("task", ["qa1", "qa2", "qa3"])
def test_made_up_stories_have_the_answers_that_follow_from_them(task):
    rng = random.Random(5)
    stories = [story for _ in range(80) for story in made_up(task, rng)]
    for story in stories:
        rooms, histories = replayed(story.facts)
        words = story.question.rstrip("?").split()
        if task == "qa1":
            assert rooms[words[2]] == story.answer
            assert len(story.support) == 1 and story.answer in story.facts[story.support[0]]
        elif task == "qa2":
            assert histories[words[3]][-1] == story.answer and len(story.support) == 2
        else:
            assert histories[words[3]][-2:] == [story.answer, words[-1]] and 3 <= len(story.support) <= 4
            assert words[-1] != story.answer
        supporting = [story.facts[number] for number in story.support]
        assert any(story.answer in fact for fact in supporting)
        assert task == "qa1" or any(words[3] in fact for fact in supporting)
    told = [story.facts[number] for story in stories for number in story.support]
    left = [fact for fact in told if re.search("(dropped|discarded|left|put down)", fact)]
    assert bool(left) == (task == "qa2")  # also of objects that lie in a room; for qa3, leaving changes no room
    assert len(stories) == 400 and {story.answer for story in stories} == set(ROOMS)
    assert all(Counter(story.answer for story in stories)[room] > 30 for room in ROOMS)


def test_the_supporting_facts_alone_lead_to_the_answer():
    for task in ("qa1", "qa2"):
        for story in [story for seed in range(40) for story in made_up(task, random.Random(seed))]:
            rooms, histories = replayed([story.facts[number] for number in story.support])
            words = story.question.rstrip("?").split()
            assert (rooms[words[2]] if task == "qa1" else histories[words[3]][-1]) == story.answer


def test_stories_of_task_1_grow_by_two_facts_a_question():
    stories = made_up("qa1", random.Random(0))
    assert [len(story.facts) for story in stories] == [2, 4, 6, 8, 10]
    assert all(later.facts[: len(story.facts)] == story.facts for story, later in zip(stories, stories[1:]))  # noqa: RUF007


def test_a_file_of_babi(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text(FILE)
    first, second, third = read_stories(path)
    assert first.facts == ("Mary moved to the bathroom.", "John went to the hallway.")
    assert (first.question, first.answer, first.support) == ("Where is Mary?", "bathroom", (0,))
    assert second.facts == (*first.facts, "Mary went back to the hallway.") and second.support == (2,)
    assert third.facts[0] == "John got the  apple there." and len(third.facts) == 3 and third.support == (0, 2)
    path.write_text("Mary moved.\n")
    with pytest.raises(InputError, match="line 1 is not a line of bAbI"):
        read_stories(path)


def test_the_label_mentioned_last():
    assert last_label(["Mary went to the garden.", "John went to the office."], ROOMS) == "office"
    assert last_label(["John went to the office.", "Mary took the milk."], ROOMS) == "office"
    assert last_label(["Mary took the milk."], ROOMS) is None


@pytest.mark.parametrize("name", ["qa1", "qa2", "qa3"])
def test_a_sample(name, settings, book, count):
    task = task_of(name, settings)
    for index in range(5):
        sample = task.sample(4000, index, 3, count)
        story, question = sample.facts["story"], sample.facts["question"]
        assert 4000 - 20 < count(sample.prompt) + task.num_generated <= 4000
        assert sample == task.sample(4000, index, 3, count)
        assert sample.prompt == f"{sample.context}\n{question}"
        places = [-1]
        for fact in story:  # in their order
            places.append(sample.context.index(fact, places[-1] + 1))
        assert places == sorted(places)
        assert count(" ".join(story)) <= 4000 / 8
        pattern = "|".join(re.escape(fact) for fact in sorted(story, key=len, reverse=True))
        background = " ".join(re.sub(pattern, "", sample.context).split())
        sentences = [sentence for sentence in re.findall(r"[^.]+\.", background)]
        text = " ".join(book.read_text().split())
        assert all(sentence.strip() in text and count(sentence.strip()) >= 10 for sentence in sentences)
        assert len(sample.answers) == 1 and sample.answers[0] in sample.labels
        assert task.score(sample, sample.completion) == 1
        if name == "qa3":
            assert len(sample.labels) == 5 and task.chance(sample) == 0.2
            assert not any(label in question for label in sample.labels)
        else:
            assert sample.labels == ROOMS and task.chance(sample) == 1 / 6


def test_short_sentences_are_left_out(tmp_path, count_bytes):
    book = tmp_path / "book.txt"
    book.write_text("Tiny one. This sentence is long enough. No. Another long sentence is here.")
    sample = task_of("qa1", LongContextSettings(haystack=[str(book)])).sample(3000, 0, 0, count_bytes)
    assert "Tiny" not in sample.context and "No." not in sample.context
    assert sample.context.count("This sentence is long enough.") > 20  # the book goes round
    book.write_text("Tiny. One. No.")
    (tmp_path / "other.txt").write_text("Tiny. One. No.")
    with pytest.raises(InputError, match="no sentence that is long enough"):
        settings = LongContextSettings(haystack=[str(tmp_path / "other.txt")])
        task_of("qa1", settings).sample(3000, 0, 0, count_bytes)


def test_facts_lie_anywhere(settings, count_bytes):
    task = task_of("qa1", settings, babilong_fact_share=1.0)
    depths = [needle.depth for index in range(60) for needle in task.sample(2000, index, 0, count_bytes).needles]
    assert min(depths) < 0.4 and max(depths) > 0.9
    stories = [len(task.sample(2000, index, 0, count_bytes).facts["story"]) for index in range(60)]
    assert set(stories) == {2, 4, 6, 8, 10}


@pytest.mark.parametrize("name", ["qa1", "qa3"])
def test_the_control_lacks_the_supporting_facts(name, settings, count_bytes):
    task = task_of(name, settings)
    sample = task.sample(4000, 0, 0, count_bytes)
    control = task.without_needles(sample)
    assert len(control.prompt) == len(sample.prompt) and not control.needles
    supporting = [sample.prompt[needle.start : needle.end] for needle in sample.needles]
    assert all(fact in sample.facts["story"] for fact in supporting)
    assert all(
        control.context.count(fact) == sample.context.count(fact) - supporting.count(fact) for fact in supporting
    )
    others = [fact for fact in sample.facts["story"] if fact not in supporting]
    assert all(fact in control.context for fact in others)


def test_the_share_of_facts(settings, count_bytes):
    task = task_of("qa3", settings)
    with pytest.raises(
        TooShort, match="`qa3` does not fit in a length of 300: the smallest that holds its sample 2 is"
    ) as error:
        task.sample(300, 2, 0, count_bytes)
    smallest = int(re.search(r"sample 2 is (\d+)", str(error.value))[1])
    story = task.sample(smallest, 2, 0, count_bytes).facts["story"]
    assert smallest - 8 < 8 * count_bytes(" ".join(story)) <= smallest
    with pytest.raises(TooShort):
        task.sample(smallest - 1, 2, 0, count_bytes)
    short = task_of("qa3", settings, babilong_fact_share=1.0).sample(300, 2, 0, count_bytes)
    assert len(" ".join(short.facts["story"])) > 300 / 8


@pytest.mark.parametrize(("task", "published"), [("qa1", 0.527), ("qa2", 0.399), ("qa3", 0.14)])
def test_the_room_mentioned_last_is_right_about_as_often_as_in_the_published_test_questions(task, published):
    rng = random.Random(0)
    stories = [story for _ in range(400) for story in made_up(task, rng)]
    right = sum(last_label(story.facts, ROOMS) == story.answer for story in stories) / len(stories)
    assert right == pytest.approx(published, abs=0.07)


def test_the_shortcut_and_its_score(settings, count_bytes):
    task = task_of("qa1", settings)
    samples = [task.sample(2000, index, 0, count_bytes) for index in range(40)]
    rooms = [re.findall("|".join(ROOMS), " ".join(sample.facts["story"]))[-1] for sample in samples]
    assert [task.shortcut(sample) for sample in samples] == rooms
    score = sum(task.score(sample, task.shortcut(sample)) for sample in samples) / 40
    assert 0.3 < score < 0.8


@pytest.mark.parametrize("split", ["train", "test"])
def test_stories_are_those_of_the_split(split, book, count_bytes):
    task = task_of("qa1", LongContextSettings(haystack=[str(book)], split=split, babilong_fact_share=1.0))
    for index in range(12):
        facts = task.sample(800, index, 0, count_bytes).facts
        assert belongs(" ".join([*facts["story"], facts["question"]]), split)


def test_a_file_or_a_folder_of_babi(tmp_path, settings, count_bytes):
    path = tmp_path / "qa1_single-supporting-fact_test.txt"
    path.write_text(FILE)
    task = task_of("qa1", settings, babi=str(path))
    samples = [task.sample(2000, index, 0, count_bytes) for index in range(6)]
    assert {sample.facts["question"] for sample in samples[:3]} == {"Where is Mary?", "Where is the apple?"}
    assert len({tuple(sample.facts["story"]) for sample in samples[:3]}) == 3  # each question once, then again
    assert samples[3].facts["story"] == samples[0].facts["story"] and samples[3].prompt != samples[0].prompt
    assert samples[0].labels == ("bathroom", "garden", "hallway")
    with pytest.raises(InputError, match="holds qa1: ask for this task alone"):
        task_of("qa2", settings, babi=str(path))
    (tmp_path / "qa1_single-supporting-fact_train.txt").write_text(FILE.split("1 John got")[0])
    (tmp_path / "qa11_basic-coreference_test.txt").write_text(FILE)
    assert len(task_of("qa1", settings, babi=str(tmp_path)).stories.stories) == 3
    assert len(task_of("qa1", settings, babi=str(tmp_path), split="train").stories.stories) == 2
    with pytest.raises(InputError, match="has 0 files of `qa3`"):
        task_of("qa3", settings, babi=str(tmp_path))


def test_the_instruction(settings, count_bytes):
    for name in ("qa1", "qa2", "qa3"):
        sample = task_of(name, settings, babilong_instruction=True).sample(6000, 0, 0, count_bytes)
        assert sample.prompt.startswith(INSTRUCTIONS[name] + "\n<context>\n" + sample.context)
        assert sample.prompt.endswith(f"\n</context>\nQuestion: {sample.facts['question']}")
        (*_, last) = INSTRUCTIONS[name].split("</example>\n")
        assert last.startswith("Always return your answer in the following format: ")

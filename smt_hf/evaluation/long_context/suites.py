"""The suites by name, and their tasks made from settings."""

from collections.abc import Callable, Sequence

from smt_hf.command_line import closest
from smt_hf.errors import InputError

from .babilong import BabilongTask, read_story_file
from .documents import DocumentTask, read_hotpot, read_squad
from .frequencies import CodedWordsTask, CommonWordsTask
from .haystack import Haystack, read_haystack
from .needles import NeedleTask
from .sample import Task
from .scrolls import ScrollsTask, read_documents
from .settings import LongContextSettings
from .variables import VariableTask

Maker = Callable[[str, LongContextSettings], Task]  # name and settings -> task


def _haystack(name: str, settings: LongContextSettings) -> Haystack:
    if not settings.haystack:
        raise InputError(f"`{name}` hides its needles in text: give `--haystack FILE`, novels for example.")
    return read_haystack(settings.haystack)


def _needles(is_essay: bool = False, **fields) -> Maker:
    def make(name: str, settings: LongContextSettings) -> Task:
        haystack = _haystack(name, settings) if is_essay else None
        return NeedleTask(name, settings.split, haystack=haystack, **fields)

    return make


def _squad(name: str, settings: LongContextSettings) -> Task:
    if settings.squad_file is None:
        raise InputError(f"`{name}` asks questions of SQuAD: give `--squad_file dev-v2.0.json`.")
    return DocumentTask(name, settings.split, read_squad(settings.squad_file))


def _hotpot(name: str, settings: LongContextSettings) -> Task:
    if settings.hotpot_file is None:
        raise InputError(f"`{name}` asks questions of HotpotQA: give `--hotpot_file hotpot_dev_distractor_v1.json`.")
    return DocumentTask(name, settings.split, read_hotpot(settings.hotpot_file))


def _babilong(name: str, settings: LongContextSettings) -> Task:
    stories = None if settings.babi is None else read_story_file(settings.babi, name, settings.split)
    share, has_instruction = settings.babilong_fact_share, settings.babilong_instruction
    return BabilongTask(name, settings.split, _haystack(name, settings), stories, share, has_instruction)


def _scrolls(metric: str, num_generated: int) -> Maker:
    def make(name: str, settings: LongContextSettings) -> Task:
        if settings.scrolls is None:
            raise InputError(f"`{name}` needs its data: give `--scrolls FOLDER` with {name}.zip.")
        return ScrollsTask(name, read_documents(settings.scrolls, name, settings.split), metric, num_generated)

    return make


SUITES: dict[str, dict[str, Maker]] = {
    "ruler": {
        "niah_single_1": _needles(),
        "niah_single_2": _needles(is_essay=True),
        "niah_single_3": _needles(is_essay=True, value_kind="uuids"),
        "niah_multikey_1": _needles(is_essay=True, num_keys=4),
        "niah_multikey_2": _needles(lines="needles"),
        "niah_multikey_3": _needles(lines="needles", key_kind="uuids", value_kind="uuids"),
        "niah_multivalue": _needles(is_essay=True, num_values=4),
        "niah_multiquery": _needles(is_essay=True, num_keys=4, num_asked=4),
        "vt": lambda name, settings: VariableTask(name, settings.split),
        "cwe": lambda name, settings: CommonWordsTask(name, settings.split),
        "fwe": lambda name, settings: CodedWordsTask(name, settings.split),
        "qa_squad": _squad,
        "qa_hotpot": _hotpot,
    },
    "babilong": {"qa1": _babilong, "qa2": _babilong, "qa3": _babilong},
    "scrolls": {
        "gov_report": _scrolls("rouge", 1024),
        "summ_screen_fd": _scrolls("rouge", 512),
        "qmsum": _scrolls("rouge", 512),
        "narrative_qa": _scrolls("f1", 128),
        "qasper": _scrolls("f1", 128),
        "quality": _scrolls("exact_match", 128),
        "contract_nli": _scrolls("exact_match", 16),
    },
}


def tasks_of(suite: str, names: Sequence[str] | None = None, settings: LongContextSettings | None = None) -> list[Task]:
    """Tasks of a suite.

    Args:
        suite: of `SUITES`.
        names: of its tasks; default: all.
        settings: default: no files, and the halves for tests.

    Raises:
        InputError: an unknown name, or a file that a task needs and that is missing or faulty.
    """
    if suite not in SUITES:
        raise InputError(f"unknown suite {suite!r}{closest(suite, SUITES)} There are {', '.join(SUITES)}.")
    makers = SUITES[suite]
    for name in names or ():
        if name not in makers:
            raise InputError(f"unknown task {name!r} of {suite}{closest(name, makers)} There are {', '.join(makers)}.")
    settings = settings or LongContextSettings()
    return [makers[name](name, settings) for name in dict.fromkeys(names or makers)]

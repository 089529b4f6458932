"""What tasks are made from: the caller's files and choices."""

from dataclasses import dataclass

from smt_hf.command_line import argument
from smt_hf.errors import InputError

from .vocabulary import SPLITS


@dataclass
class LongContextSettings:
    """Settings of the suites. A task whose file is missing says which flag names it."""

    split: str = argument(
        "test",
        "train, test or all: half of the words, names, numbers and stories are for training, the other half for tests; "
        "`all` is everything, as in the original benchmarks. Of SCROLLS, test is the validation set.",
    )
    haystack: list[str] | None = argument(
        None,
        "Files, folders or patterns of text that needles are hidden in, novels for example. Nothing divides it: give "
        "training and tests different books.",
    )
    squad_file: str | None = argument(None, "JSON file of SQuAD 2.0, as dev-v2.0.json, for RULER's `qa_squad`.")
    hotpot_file: str | None = argument(
        None, "JSON file of HotpotQA, as hotpot_dev_distractor_v1.json, for RULER's `qa_hotpot`."
    )
    babi: str | None = argument(
        None,
        "A bAbI file, or a folder of them (`qa1_..._test.txt`), for BABILong; default: stories of the same worlds that "
        "are made up.",
    )
    babilong_fact_share: float = argument(
        0.125, "The share of a BABILong sample that its facts may take up; longer stories are left out. BABILong's."
    )
    babilong_instruction: bool = argument(
        False, "Put BABILong's instruction and examples into the prompt, for models that follow instructions."
    )
    scrolls: str | None = argument(
        None,
        "Folder of SCROLLS, with `TASK/{train,validation}.jsonl` or `TASK.zip` for each task; or one jsonl file, of "
        "SCROLLS or of QMSum as its authors publish it.",
    )

    def __post_init__(self):
        if self.split not in SPLITS:
            raise InputError(f"`split` must be one of {', '.join(SPLITS)}, got {self.split!r}.")
        if not 0 < self.babilong_fact_share <= 1:
            raise InputError(
                f"`babilong_fact_share` must lie above 0 and at most at 1, got {self.babilong_fact_share}."
            )

"""Where text comes from: the embedded corpus, files, or a dataset of the Hub. All end as documents in `datasets`."""

import contextlib
import hashlib
import sysconfig
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from smt_hf.errors import InputError

from .files import find_files, name_of_files, no_column, rows_of, shown, text_in

# Tests, other packages, and files that are tables rather than text, by part of their path.
_LEFT_OUT = (
    "site-packages", "dist-packages", "test", "idlelib", "pydoc_data", "encodings", "lib2to3", "ensurepip",
    "turtledemo", "__pycache__", "_sysconfigdata",
)  # fmt: skip
_TEXT = Features({"text": Value("string")})

Files = str | Sequence[str] | None


@dataclass(frozen=True)
class Corpus:
    """Documents for training and held-out documents."""

    name: str  # for tables and model cards
    # With a column `text`, one row per document, none of them blank; the `train` of a stream is an `IterableDataset`.
    train: Dataset | IterableDataset
    heldout: Dataset
    # SHA-256 over all documents in order, the first 16 hex digits; of a stream, over the held-out documents.
    digest: str
    hub_name: str | None  # of a dataset of the Hub

    @property
    def heldout_bytes(self) -> int:
        """Of the held-out documents in UTF-8."""
        return sum(len(text.encode()) for text in self.heldout["text"])


def load_corpus(
    train_file: Files = None,
    validation_file: Files = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    text_column: str = "text",
) -> Corpus:
    """The corpus that the arguments name; with no argument, the standard library's source text.

    Args:
        train_file: a text file, a folder (all files below it), a glob, or json / jsonl / csv / tsv / parquet, each also
            compressed by gzip, bzip2 or xz; or several of them.
        validation_file: likewise, held out; without it every tenth document is, or the last tenth of each document
            where there are fewer than ten.
        dataset_name, dataset_config_name: a dataset of the Hub or a local one that `datasets.load_dataset` knows.
        text_column: column that holds the text.

    Raises:
        InputError: nothing found, no text in it, a faulty row or file (named), no such column, arguments that exclude
            each other, or a `validation_file` whose documents are all trained on.
    """
    if train_file and dataset_name:
        raise InputError("pass either `train_file` or `dataset_name`, not both.")
    for name, is_given, needed, is_there in (
        ("validation_file", validation_file, "train_file", train_file),
        ("dataset_config_name", dataset_config_name, "dataset_name", dataset_name),
        ("text_column", text_column != "text", "train_file` or `dataset_name", train_file or dataset_name),
    ):
        if is_given and not is_there:
            raise InputError(f"`{name}` goes with `{needed}`.")
    hub_name = None
    if dataset_name:
        name, hub_name = _names_of_dataset(dataset_name)
        parts = [_text_only(split, text_column, dataset_name) for split in _splits(dataset_name, dataset_config_name)]
    elif train_file:
        name = name_of_files(train_file)
        parts = [_from_files(files, text_column) for files in (train_file, validation_file) if files]
        if validation_file:
            _check_heldout(*parts)
    else:
        name = f"python {sysconfig.get_python_version()} standard library"
        parts = [_from_files([str(path) for path in standard_library_files()], text_column)]
    train, heldout = parts if len(parts) == 2 else _divided(parts[0])
    digest = _digest(text for part in (train, heldout) for text in part["text"])
    return Corpus(name, train, heldout, digest, hub_name)


def stream_corpus(
    train_file: Files = None,
    validation_file: Files = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    text_column: str = "text",
    num_heldout: int = 100,
    num_ranks: int = 1,
) -> Corpus:
    """The corpus as a stream: documents are read when they are trained on, from the files or over the network.

    Held out is `validation_file`, or the split `validation` or `test` of the dataset; without one, the first documents
    of the stream. Wherever a held-out text comes again in the stream, it is left out.

    A faulty row or file is left out with a warning that names it, since it may come hours into a run.

    Args:
        num_heldout: documents to hold out at most.
        num_ranks: processes that are to share the documents.
        others: as in `load_corpus`.

    Raises:
        InputError: as `load_corpus`, or fewer documents than are to be held out and trained on.
    """
    if bool(train_file) == bool(dataset_name):
        raise InputError("a stream needs a `train_file` or a `dataset_name`, one of the two.")
    hub_name = None
    if train_file:
        name = name_of_files(train_file)
        parts = [_streamed_files(train_file, text_column)]
        parts += [_from_files(validation_file, text_column)] if validation_file else []
    elif dataset_name:
        name, hub_name = _names_of_dataset(dataset_name)
        splits = _splits(dataset_name, dataset_config_name, streaming=True)
        parts = [_streamed_text(split, text_column, name) for split in splits]
    train, is_named = parts[0], len(parts) == 2
    heldout = Dataset.from_dict({"text": [row["text"] for row in islice(parts[-1], num_heldout)]}, features=_TEXT)
    if len(heldout) < num_heldout and not is_named:
        raise InputError(
            f"{name} has only {len(heldout)} document(s), too few to stream and to hold {num_heldout} out: leave "
            "`--streaming` out, or name a `validation_file`."
        )
    kept_out = {_digest([text]) for text in heldout["text"]}
    train = train.filter(lambda row: _digest([row["text"]]) not in kept_out)
    num_left = sum(1 for _ in train.take(num_ranks))
    if num_left < num_ranks:
        raise InputError(
            f"the stream of {name} has {num_left} document(s) to train on besides the {len(heldout)} that are held "
            f"out, and {num_ranks} process(es) need one each: bring more documents, leave `--streaming` out, or start "
            "fewer processes."
        )
    return Corpus(name, train, heldout, _digest(heldout["text"]), hub_name)


def _names_of_dataset(dataset_name: str) -> tuple[str, str | None]:
    """A title, and the name on the Hub. The path of a local dataset says where it is, not what."""
    return (name_of_files(dataset_name), None) if Path(dataset_name).exists() else (dataset_name, dataset_name)


def _splits(name: str, config_name: str | None, **settings) -> list:
    """The split to train on, and the one to hold out, if there is one."""
    try:
        splits = load_dataset(name, config_name, **settings)
    except Exception as error:  # it raises whatever its readers and the network raise
        reason = str(error.__cause__ or error).strip() or type(error).__name__
        raise InputError(f"dataset {name!r} could not be read: {reason}") from error
    if "train" not in splits:
        raise InputError(f"dataset {name!r} has no split `train`, only {', '.join(splits)}.")
    heldout = next((split for split in ("validation", "test") if split in splits), None)
    return [splits[split] for split in ("train", heldout) if split]


def _reading(pattern: str | Sequence[str], text_column: str) -> dict[str, Any]:
    """Arguments of the functions that read files."""
    paths, table_format = find_files(pattern)
    if table_format is None and text_column != "text":
        raise InputError(f"{shown(pattern)} is plain text, which has no columns: leave `text_column` out.")
    # A list is what `datasets` shares out among processes and counts a position in.
    return {"paths": [str(path) for path in paths], "table_format": table_format, "text_column": text_column}


def _from_files(pattern: str | Sequence[str], text_column: str) -> Dataset:
    """Documents on disk, memory-mapped; `datasets` caches them by the names of their files and what these hold."""
    reading = _reading(pattern, text_column)
    digests = [_digest_of(path) for path in reading["paths"]]
    try:
        documents = Dataset.from_generator(_texts_of_files, _TEXT, gen_kwargs={**reading, "digests": digests})
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        raise
    return _filled(documents, shown(pattern))


def _digest_of(path: str) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()


def _texts_of_files(paths: list[str], table_format: str | None, text_column: str, digests: list[str]):
    is_empty = True
    for path in paths:
        for place, row in rows_of(Path(path), table_format, text_column):
            is_empty = False
            yield {"text": text_in(place, row, text_column)}
    if is_empty:  # which `datasets` reports as a missing split
        raise InputError(f"{paths[0]} has no rows: there is nothing to train on.")


def _filled(documents: Dataset, name: str) -> Dataset:
    """Without the documents that hold white space alone, which are counted."""
    lengths = pc.utf8_length(pc.utf8_trim_whitespace(documents.data.column("text"))).to_numpy()
    if not lengths.any():
        raise InputError(f"{name} holds no text, its {len(documents)} document(s) are blank.")
    if lengths.all():
        return documents
    warnings.warn(
        f"{int((lengths == 0).sum())} of {len(documents)} documents of {name} are blank: left out.", stacklevel=2
    )
    return documents.select(np.flatnonzero(lengths))


def _text_only(dataset: Dataset, text_column: str, name: str) -> Dataset:
    """The text of a dataset that `datasets` has read, under the name `text`."""
    if text_column not in dataset.column_names:
        raise no_column(name, text_column, dataset.column_names)
    column = dataset.data.column(text_column)
    if dataset.features[text_column].dtype not in ("string", "large_string"):
        raise InputError(f"column {text_column!r} of {name} holds {dataset.features[text_column].dtype}, not text.")
    if column.null_count:
        first = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise InputError(
            f"{name}, row {first + 1}: column {text_column!r} holds null, as {column.null_count} of {len(dataset)} "
            "rows do. Filter them out first."
        )
    dataset = dataset.select_columns([text_column])
    return _filled(dataset if text_column == "text" else dataset.rename_column(text_column, "text"), name)


def _streamed_files(pattern: str | Sequence[str], text_column: str) -> IterableDataset:
    reading = _reading(pattern, text_column)
    for place, row in islice(rows_of(Path(reading["paths"][0]), reading["table_format"]), 1):
        if isinstance(row, dict) and text_column not in row:  # nor do the others have it
            raise no_column(place, text_column, row)
    return IterableDataset.from_generator(_texts_of_stream, gen_kwargs=reading)


def _texts_of_stream(paths: list[str], table_format: str | None, text_column: str):
    for path in paths:
        num_faulty = 0
        try:
            for place, row in rows_of(Path(path), table_format, text_column):
                try:
                    text = text_in(place, row, text_column)
                except InputError as error:
                    if not num_faulty:
                        warnings.warn(f"left out a row of the stream: {error}", stacklevel=1)
                    num_faulty += 1
                    continue
                if text.strip():
                    yield {"text": text}
        except InputError as error:
            warnings.warn(f"left out a file of the stream, or what follows in it: {error}", stacklevel=1)
        if num_faulty > 1:
            warnings.warn(f"left out {num_faulty} rows of {path} in all.", stacklevel=1)


def _streamed_text(dataset: IterableDataset, text_column: str, name: str) -> IterableDataset:
    """The text of a streamed dataset of the Hub, whose rows that hold none are left out."""
    first = next(iter(dataset), None)
    if first is None:
        raise InputError(f"{name} has no rows: there is nothing to train on.")
    if text_column not in first:
        raise no_column(name, text_column, first)
    if not isinstance(first[text_column], str | None):
        raise InputError(f"column {text_column!r} of {name} holds something else than text.")
    dataset = dataset.select_columns([text_column])
    dataset = dataset if text_column == "text" else dataset.rename_column(text_column, "text")
    return dataset.filter(_is_text, fn_kwargs={"name": name})


def _is_text(row: dict, name: str) -> bool:
    if isinstance(row["text"], str):
        return bool(row["text"].strip())
    warnings.warn(f"left out rows of {name} whose text is null or something else than text.", stacklevel=1)
    return False


def standard_library_files() -> list[Path]:
    """The embedded corpus: source files of the running Python's standard library, in a fixed order.

    About 370 files and 8 MB. Files under 2,000 bytes say little and are left out, as are those that are not UTF-8.

    Raises:
        InputError: this Python comes without its source.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not any(part in name for part in _LEFT_OUT) and path.stat().st_size >= 2000:
            with contextlib.suppress(UnicodeDecodeError):
                path.read_bytes().decode()
                files.append(path)
    if not files:
        raise InputError(f"this Python has no source files of its standard library in {root}: pass `--train_file`.")
    return files


def _check_heldout(train: Dataset, heldout: Dataset) -> None:
    """Refuse a validation text that is trained on, and warn of one that is in part.

    A document also counts as trained on where it is a piece of one of a few long training documents.
    """
    trained = {_digest([text.strip()]) for text in train["text"]}
    long = list(train["text"]) if max(len(train), len(heldout)) < 10 else []
    texts = [text.strip() for text in heldout["text"]]
    shared = sum(_digest([text]) in trained or any(text in other for other in long) for text in texts)
    if shared == len(heldout):
        raise InputError(
            "all text of `validation_file` is part of `train_file`: its score would say nothing about new text. Name "
            "another file, or leave `validation_file` out."
        )
    if shared:
        warnings.warn(
            f"{shared} of {len(heldout)} documents of `validation_file` are part of `train_file`: the score is partly "
            "of text that was trained on.",
            stacklevel=2,
        )


def _divided(documents: Dataset) -> tuple[Dataset, Dataset]:
    """What to train on, and every tenth document, or the last tenth of each where there are few, to hold out."""
    if len(documents) >= 10:
        left = [index for index in range(len(documents)) if index % 10 != 3]
        return documents.select(left), documents.select(range(3, len(documents), 10))
    return documents.map(_part, fn_kwargs={"is_heldout": False}), documents.map(_part, fn_kwargs={"is_heldout": True})


def _part(document: dict[str, str], is_heldout: bool) -> dict[str, str]:
    text = document["text"]
    cut = len(text) - max(len(text) // 10, 1)
    return {"text": text[cut:] if is_heldout else text[:cut]}


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]

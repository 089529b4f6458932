"""Where text comes from: the embedded corpus, files, or a dataset of the Hub. All end as documents in `datasets`."""

import glob
import hashlib
import os
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset

# Tests, other packages, and files that are tables rather than text, by part of their path.
_LEFT_OUT = (
    "site-packages",
    "dist-packages",
    "test",
    "idlelib",
    "pydoc_data",
    "encodings",
    "lib2to3",
    "ensurepip",
    "turtledemo",
    "__pycache__",
    "_sysconfigdata",
)
_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Corpus:
    """Documents for training and held-out documents.

    Args:
        name: for tables and model cards.
        train, heldout: `datasets.Dataset`s with a column `text`, a row a document; a stream's `train` is an
            `IterableDataset`.
        digest: SHA-256 over all documents in order, the first 16 hex digits; names what was trained on. Of a stream,
            over the held-out documents.
        hub_name: of a dataset of the Hub.
    """

    name: str
    train: Dataset | IterableDataset
    heldout: Dataset
    digest: str
    hub_name: str | None = None


def load_corpus(
    train_file: str | None = None,
    validation_file: str | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    text_column: str = "text",
) -> Corpus:
    """The corpus that the arguments name; with no argument, the standard library's source text.

    Args:
        train_file: a text file, a folder (all files below it), a glob, or json / jsonl / csv / parquet.
        validation_file: likewise, held out; without it every tenth document is, or the last tenth of a single text.
        dataset_name, dataset_config_name: a dataset of the Hub or a local one that `datasets.load_dataset` knows.
        text_column: column that holds the text.

    Raises:
        ValueError: nothing found, an empty or binary file, no such column, or both a file and a dataset.
    """
    if train_file and dataset_name:
        raise ValueError("pass either `train_file` or `dataset_name`, not both.")
    if validation_file and not train_file:
        raise ValueError("`validation_file` goes with `train_file`.")
    if dataset_name:
        return _from_hub(dataset_name, dataset_config_name, text_column)
    if train_file:
        train = _from_files(train_file, text_column)
        heldout = _from_files(validation_file, text_column) if validation_file else None
        return _corpus(os.path.basename(os.path.normpath(train_file)), train, heldout)
    files = standard_library_files()
    return _corpus(
        f"python {sysconfig.get_python_version()} standard library",
        _documents([_read_text(path) for path in files]),
        None,
    )


def stream_corpus(
    train_file: str | None = None,
    validation_file: str | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    text_column: str = "text",
    num_heldout: int = 100,
) -> Corpus:
    """The corpus as a stream: documents are read when they are trained on, from the files or over the network.

    Held out is `validation_file`, or the split `validation` or `test` of the dataset; without one, the first documents
    of the stream, and wherever the same text comes again.

    Args:
        num_heldout: documents to hold out at most.
        others: as in `load_corpus`.

    Raises:
        ValueError: as `load_corpus`, or fewer documents than are to be held out.
    """
    if bool(train_file) == bool(dataset_name):
        raise ValueError("a stream needs a `train_file` or a `dataset_name`, one of the two.")
    heldout: Dataset | None = None
    if train_file:
        name, hub_name = os.path.basename(os.path.normpath(train_file)), None
        train = _streamed_files(train_file, text_column)
        if validation_file:
            heldout = _from_files(validation_file, text_column)
    else:
        assert dataset_name is not None
        is_local = os.path.exists(dataset_name)
        hub_name = None if is_local else dataset_name
        name = os.path.basename(os.path.normpath(dataset_name)) if is_local else dataset_name
        splits = _loaded(dataset_name, dataset_name, dataset_config_name, streaming=True)
        if "train" not in splits:
            raise ValueError(f"dataset {dataset_name!r} has no split `train`, only {', '.join(splits)}.")
        train = _streamed_text(splits["train"], text_column, dataset_name)
        split = next((split for split in ("validation", "test") if split in splits), None)
        if split is not None:
            texts = [row["text"] for row in _streamed_text(splits[split], text_column, dataset_name).take(num_heldout)]
            heldout = _documents(texts)
    if heldout is None:
        texts = [row["text"] for row in train.take(num_heldout)]
        if len(texts) < num_heldout:
            raise ValueError(
                f"{name} has only {len(texts)} document(s), too few to stream and to hold {num_heldout} out: leave "
                "`--streaming` out, or name a `validation_file`."
            )
        heldout = _documents(texts)
        kept_out = {_digest([text]) for text in texts}
        train = train.filter(lambda row: _digest([row["text"]]) not in kept_out)
    heldout = heldout.select(range(min(num_heldout, len(heldout))))
    return Corpus(name, train, heldout, _digest(heldout["text"]), hub_name)


def _streamed_files(pattern: str, text_column: str) -> IterableDataset:
    paths, table_format = _files(pattern, reads=False)
    if table_format is None:  # a file a document, read when its turn comes
        return IterableDataset.from_generator(_read_one_by_one, gen_kwargs={"paths": paths})
    loaded = _loaded(pattern, table_format, data_files=[str(entry) for entry in paths], split="train", streaming=True)
    return _streamed_text(loaded, text_column, pattern)


def _read_one_by_one(paths: list[Path]):
    for path in paths:
        try:
            text = _read_text(path)
        except (ValueError, OSError) as error:  # hours into a run, one bad file is no reason to end it
            warnings.warn(f"skipped a file of the stream: {error}", stacklevel=1)
            continue
        yield {"text": text}


def _streamed_text(dataset: IterableDataset, text_column: str, name: str) -> IterableDataset:
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{name} has no rows: there is nothing to train on.")
    if text_column not in first:
        raise ValueError(f"{name} has no column {text_column!r}: pass `--text_column` with one of {', '.join(first)}.")
    if not isinstance(first[text_column], str):
        raise ValueError(f"column {text_column!r} of {name} holds something that is not text.")
    dataset = dataset.select_columns([text_column])
    dataset = dataset if text_column == "text" else dataset.rename_column(text_column, "text")
    return dataset.filter(_is_text)


def _is_text(row: dict) -> bool:
    if isinstance(row["text"], str) and row["text"].strip():
        return True
    warnings.warn("skipped rows of the stream that hold no text.", stacklevel=1)
    return False


def standard_library_files() -> list[Path]:
    """The embedded corpus: source files of the running Python's standard library, in a fixed order.

    About 370 files and 8 MB. Files under 2,000 bytes say little and are left out, as are those that are not UTF-8.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(part in name for part in _LEFT_OUT) or path.stat().st_size < 2000:
            continue
        try:
            path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        files.append(path)
    if not files:
        raise ValueError(f"this Python has no source files of its standard library in {root}: pass `--train_file`.")
    return files


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    if not content.strip():
        raise ValueError(f"{path} is empty: there is nothing to train on.")
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = None
    if text is None or "\0" in text:
        raise ValueError(f"{path} is not text (UTF-8): pass a text file, or jsonl, csv or parquet with `text_column`.")
    return text


def _documents(texts: list[str]) -> Dataset:
    """Texts as a dataset on disk, memory-mapped; `datasets` caches it by its content."""
    return Dataset.from_generator(_rows, gen_kwargs={"texts": texts})


def _rows(texts: list[str]):
    for text in texts:
        yield {"text": text}


def _from_files(pattern: str, text_column: str) -> Dataset:
    paths, table_format = _files(pattern)
    if table_format is None:
        return _documents([_read_text(entry) for entry in paths])
    loaded = _loaded(pattern, table_format, data_files=[str(entry) for entry in paths], split="train")
    return _text_only(loaded, text_column, pattern)


def load_table(pattern: str) -> Dataset | None:
    """The rows of json / jsonl / csv / parquet files with all their columns, or `None` where the files are text.

    Raises:
        ValueError: as `load_corpus`.
    """
    paths, table_format = _files(pattern)
    if table_format is None:
        return None
    return _loaded(pattern, table_format, data_files=[str(entry) for entry in paths], split="train")


def _files(pattern: str, reads: bool = True) -> tuple[list[Path], str | None]:
    """The files that a pattern names, and the format of the table that they are, `None` for text.

    `reads`: look into them for blank ones; else only empty ones are left out.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        hidden = lambda entry: any(part.startswith(".") for part in entry.relative_to(path).parts)  # noqa: E731
        found = sorted(entry for entry in path.rglob("*") if entry.is_file() and not hidden(entry))
        paths = [  # an empty file of a folder says nothing
            entry for entry in found if (entry.read_bytes().strip() if reads else entry.stat().st_size)
        ]
    else:
        found = paths = sorted(Path(entry) for entry in glob.glob(str(path), recursive=True) if Path(entry).is_file())
    if not found:
        raise ValueError(f"no file found at {pattern!r}: pass a file, a folder or a glob that matches some.")
    if not paths:
        raise ValueError(f"all files in {pattern!r} are empty: there is nothing to train on.")
    formats = {_FORMATS.get(entry.suffix.lower()) for entry in paths}
    if len(formats) > 1:
        raise ValueError(f"{pattern!r} mixes formats: {', '.join(sorted({entry.suffix for entry in paths}))}.")
    return paths, formats.pop()


def _loaded(what: str, *args, **kwargs):
    """`datasets.load_dataset`, whose many errors become one that names what was asked for."""
    try:
        return load_dataset(*args, **kwargs)
    except Exception as error:  # it raises whatever its readers and the network raise
        reason = str(error.__cause__ or error).strip() or type(error).__name__
        raise ValueError(f"{what!r} could not be read: {reason}") from error


def _from_hub(name: str, config_name: str | None, text_column: str) -> Corpus:
    splits = _loaded(name, name, config_name)
    if "train" not in splits:
        raise ValueError(f"dataset {name!r} has no split `train`, only {', '.join(splits)}.")
    heldout = next((splits[split] for split in ("validation", "test") if split in splits), None)
    train = _text_only(splits["train"], text_column, name)
    heldout = None if heldout is None else _text_only(heldout, text_column, name)
    is_local = os.path.exists(name)
    title = os.path.basename(os.path.normpath(name)) if is_local else name  # a path says where, not what
    return _corpus(title, train, heldout, None if is_local else name)


def _text_only(dataset: Dataset, text_column: str, name: str) -> Dataset:
    if text_column not in dataset.column_names:
        raise ValueError(
            f"{name} has no column {text_column!r}: pass `--text_column` with one of {', '.join(dataset.column_names)}."
        )
    if (
        dataset.features[text_column].dtype not in ("string", "large_string")
        or dataset.data.column(text_column).null_count
    ):
        raise ValueError(f"column {text_column!r} of {name} holds something that is not text.")
    dataset = dataset.select_columns([text_column])
    return dataset if text_column == "text" else dataset.rename_column(text_column, "text")


def _corpus(name: str, train: Dataset, heldout: Dataset | None, hub_name: str | None = None) -> Corpus:
    if heldout is None and len(train) >= 10:
        chosen = range(3, len(train), 10)  # every tenth document
        left = [index for index in range(len(train)) if index % 10 != 3]
        train, heldout = train.select(left), train.select(chosen)
    elif heldout is None:
        texts = train["text"][:]
        cuts = [len(text) - max(len(text) // 10, 1) for text in texts]
        heldout = _documents([text[cut:] for text, cut in zip(texts, cuts)])
        train = _documents([text[:cut] for text, cut in zip(texts, cuts)])
    digest = _digest(text for part in (train, heldout) for text in part["text"])
    return Corpus(name, train, heldout, digest, hub_name)


def _digest(texts) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]

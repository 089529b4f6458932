"""Files on disk: which ones a pattern names, and their rows, each with the place where it stands.

A text file is one row with the column `text`. json, jsonl, csv, tsv and parquet are tables. A place is written as
`notes.jsonl, line 7` (json lines, csv, tsv) or `notes.parquet, row 7` (parquet, a json list); both count from 1.
"""

import bz2
import codecs
import csv
import glob
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from smt_hf.errors import InputError

# Where a row stands, and its columns or what is wrong with it: one bad row does not hide those after it.
Row = tuple[str, dict[str, Any] | InputError]

_TABLES = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
_UNPACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_PACKED = (".zip", ".tar", ".tgz", ".zst", ".lz4", ".7z", ".rar")


def find_files(pattern: str | Sequence[str]) -> tuple[list[Path], str | None]:
    """The files that a pattern names, and the format of the tables that they are, `None` for text.

    Args:
        pattern: a file, a folder (all files below it that are neither hidden nor empty) or a glob; or several of them,
            as a shell makes of an unquoted glob.

    Raises:
        InputError: no file, no file with content, files of several formats, or packed ones.
    """
    paths = list(dict.fromkeys(path for name in _as_list(pattern) for path in _named(name)))
    filled = [path for path in paths if path.stat().st_size]
    if not filled:
        raise InputError(f"all files in {shown(pattern)} are empty: there is nothing to train on.")
    endings = {_ending(path): path for path in filled}
    packed = [path for ending, path in endings.items() if ending in _PACKED]
    if packed:
        raise InputError(f"{packed[0]} is packed: unpack it first. Only .gz, .bz2 and .xz are read as they are.")
    formats = {_TABLES.get(ending) for ending in endings}
    if len(formats) > 1:
        raise InputError(
            f"{shown(pattern)} mixes formats ({', '.join(sorted(endings))}): name the files of one format, for "
            "example by a glob such as `folder/*.jsonl`."
        )
    return filled, formats.pop()


def shown(pattern: str | Sequence[str]) -> str:
    """A pattern as error messages write it."""
    names = _as_list(pattern)
    return os.path.normpath(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def name_of_files(pattern: str | Sequence[str]) -> str:
    """A name for results and cards, which does not show the folders of the machine."""
    return os.path.basename(shown(pattern))


def _as_list(pattern: str | Sequence[str]) -> list[str]:
    return [pattern] if isinstance(pattern, str) else list(pattern)


def _named(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if os.path.isdir(path):
        visible = (entry for entry in path.rglob("*") if "/." not in f"/{entry.relative_to(path).as_posix()}")
        found = sorted(entry for entry in visible if entry.is_file())
    elif os.path.isfile(path):  # before it is taken for a glob: `[2024] notes.txt` is the name of a file
        found = [path]
    elif os.path.exists(path):
        raise InputError(f"{name!r} is neither a file nor a folder: save its content in a file first.")
    else:
        found = sorted(entry for entry in map(Path, glob.glob(str(path), recursive=True)) if entry.is_file())
    if not found:
        raise InputError(f"no file found at {name!r}: pass a file, a folder or a glob that matches some.")
    return found


def _ending(path: Path) -> str:
    """The suffix that says what a file holds: `.jsonl` of `notes.jsonl.gz`."""
    return (path.with_suffix("") if path.suffix.lower() in _UNPACKED else path).suffix.lower()


def rows_of(path: Path, table_format: str | None, column: str | None = None) -> Iterator[Row]:
    """The rows of a file, in order.

    Args:
        table_format: as `find_files` tells it.
        column: the only one that is needed; parquet files are then read without the others.

    Raises:
        InputError: the file cannot be read, unpacked or decoded. A fault of one row is given out in its place.
    """
    try:
        with _UNPACKED.get(path.suffix.lower(), open)(path, "rb") as file:
            if table_format is None:
                yield str(path), {"text": _decoded(path, file.read())}
            elif table_format == "json":
                yield from _json_rows(path, file)
            elif table_format == "parquet":
                yield from _parquet_rows(path, file, column)
            else:
                yield from _csv_rows(path, file, csv.excel if table_format == "csv" else csv.excel_tab)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{path} cannot be read, the file may be damaged or cut off: {error}.") from error


def _decoded(path: Path, content: bytes) -> str:
    try:
        text = content.decode("utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not text in UTF-8 (byte {error.start} is no part of it): convert it, by `iconv -f ENCODING -t "
            "utf-8` for example, or pass json, csv or parquet under its own ending."
        ) from error
    if "\0" in text:
        raise InputError(f"{path} is not text: it holds zero bytes.")
    return text


def _json_rows(path: Path, file: BinaryIO) -> Iterator[Row]:
    """Objects, one per line, or a list of objects."""
    if file.peek(64).lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith(b"["):  # type: ignore[attr-defined]
        try:
            rows = json.loads(file.read())
        except ValueError as error:
            raise _json_fault(str(path), error) from error
        yield from (_row(f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))
        return
    for number, line in enumerate(file, start=1):
        place = f"{path}, line {number}"
        if line.strip():
            try:
                yield _row(place, json.loads(line))
            except ValueError as error:
                yield place, _json_fault(place, error)


def _json_fault(place: str, error: ValueError) -> InputError:
    where = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    return InputError(f"{place} is not valid JSON ({where}): give one object per line, or a list of objects.")


def _row(place: str, row: Any) -> Row:
    return place, row if isinstance(row, dict) else InputError(f"{place} holds {_kind(row)}, not an object.")


def _csv_rows(path: Path, file: BinaryIO, dialect: type[csv.Dialect]) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # a document may be longer than the 128 kB that `csv` allows
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as lines:
        # Strict, or a quote that is never closed would swallow the rest of the file.
        reader = csv.reader(lines, dialect, strict=True)
        names: list[str] | None = None
        while True:
            place = f"{path}, line {reader.line_num + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield place, InputError(f"{place} is not valid {_ending(path)[1:]}: {error}.")
                continue
            except UnicodeDecodeError as error:
                raise InputError(f"{place} or the lines after it are not text in UTF-8: convert the file.") from error
            if cells is None:
                return
            if names is None:
                names = cells
            elif len(cells) == len(names):
                yield place, dict(zip(names, cells))
            elif cells:
                yield place, InputError(f"{place} has {len(cells)} cells, the head of the file has {len(names)}.")


def _parquet_rows(path: Path, file: BinaryIO, column: str | None) -> Iterator[Row]:
    try:
        table = pq.ParquetFile(file)
        chosen = [column] if column in table.schema_arrow.names else None
        batches = table.iter_batches(batch_size=1000, columns=chosen)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))
    except pa.ArrowException as error:
        raise InputError(f"{path} cannot be read as parquet: {error}") from error


def text_in(place: str, row: dict[str, Any] | InputError, column: str) -> str:
    """The text of a row, which may be empty.

    Raises:
        InputError: the row's own fault, no such column, or something in it that is not text.
    """
    if isinstance(row, InputError):
        raise row
    if column not in row:
        raise no_column(place, column, row)
    text = row[column]
    if not isinstance(text, str):
        raise InputError(f"{place}: column {column!r} holds {_kind(text)}, not text. Mend the row or take it out.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: column {column!r} holds half a character ({error.reason}).") from error
    return text


def no_column(place: str, column: str, columns: Iterable[str]) -> InputError:
    """The error for a table without the column that holds the text."""
    return InputError(f"{place} has no column {column!r}: pass `--text_column` with one of {', '.join(columns)}.")


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return "a list" if isinstance(value, list) else f"{str(value)[:30]!r} ({type(value).__name__})"


def load_table(pattern: str | Sequence[str], num_rows: int | None = None) -> list[tuple[str, dict[str, Any]]] | None:
    """The rows of table files, or the first `num_rows`, with their places; `None` where the files are text.

    Raises:
        InputError: as `find_files` and `rows_of`, or the first faulty row.
    """
    paths, table_format = find_files(pattern)
    if table_format is None:
        return None
    rows = []
    for place, row in islice((row for path in paths for row in rows_of(path, table_format)), num_rows):
        if isinstance(row, InputError):
            raise row
        rows.append((place, row))
    return rows

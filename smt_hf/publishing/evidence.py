"""Lines of evidence: one JSON object per arm of a run, in a file of JSON lines that is only appended to."""

import json
from pathlib import Path

from smt_hf.errors import InputError


def read_lines(path: str | Path) -> list[dict]:
    """The lines of a `.jsonl` file; blank ones are skipped.

    Raises:
        InputError: there is no such file, or a line is not a JSON object; names file and line number.
    """
    try:
        texts = Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise InputError(f"there is no file {path}: run first what writes it, or name another.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the lines of {path}: {error}") from error
    lines = []
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error}): mend or remove it.") from None
        if not isinstance(line, dict):
            raise InputError(f"{path}, line {number}: not a JSON object: mend or remove it.")
        lines.append(line)
    return lines


def append_lines(lines: list[dict], path: str | Path) -> None:
    """Append the lines to a file, which is made with its folder where there is none.

    Raises:
        ValueError: a number in a line is not finite, which JSON cannot hold; nothing is written then.
    """
    text = "".join(json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n" for line in lines)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)

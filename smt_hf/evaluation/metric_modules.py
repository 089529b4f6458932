"""The metrics as modules of Hugging Face's `evaluate`, which loads them by path, offline."""

from pathlib import Path

_FOLDER = Path(__file__).with_name("metrics")
METRICS = tuple(sorted(path.name for path in _FOLDER.iterdir() if path.is_dir() and not path.name.startswith("_")))


def metric_path(name: str) -> str:
    """The folder of a metric, for `evaluate.load`.

    Raises:
        ValueError: there is no such metric.
    """
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}: choose one of {', '.join(METRICS)}.")
    return str(_FOLDER / name)

"""The picture of the method: the recipe writes it, and the committed one is small and what the recipe draws."""

import runpy
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from recipes.method_figure import plot_method
from smt_hf.errors import InputError

ROOT = Path(__file__).parents[2]


def test_the_recipe_draws_what_is_committed(tmp_path, monkeypatch, capsys):
    path = tmp_path / "new" / "method.png"
    monkeypatch.setattr(sys, "argv", ["method_figure.py", "--output", str(path)])
    runpy.run_path(str(ROOT / "recipes" / "method_figure.py"), run_name="__main__")
    assert f"written: {path}" in capsys.readouterr().out
    committed, drawn = ROOT / "model_cards" / "method.png", imread(path)
    assert committed.stat().st_size < 150_000
    assert drawn.shape == imread(committed).shape
    assert abs(drawn - imread(committed)).mean() < 0.02  # fonts differ a little from machine to machine
    # The margin is transparent and the card opaque and light: readable whatever is behind it.
    assert drawn[0, 0, 3] == 0 and drawn[40, 400].min() > 0.98


def test_an_existing_file_is_kept(tmp_path):
    path = tmp_path / "method.png"
    path.write_bytes(b"mine")
    with pytest.raises(InputError, match="--overwrite"):
        plot_method(path)
    assert path.read_bytes() == b"mine"
    assert imread(plot_method(path, overwrite=True)).ndim == 3

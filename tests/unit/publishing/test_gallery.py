"""The gallery: what stands on it, that it is one file, and that a browser shows it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from smt_hf.publishing.gallery import render_gallery

ROOT = Path(__file__).parents[3]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return render_gallery(ROOT / "model_cards", tmp_path_factory.mktemp("page") / "gallery.html")


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.images, self.links, self.ids, self.open = [], [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.images += [values] if tag == "img" else []
        self.links += [values["href"]] if tag == "a" else []
        self.ids |= {values["id"]} if "id" in values else set()
        self.open += [tag] if tag not in ("img", "meta") else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_every_card_and_figure(page):
    text = page.read_text()
    elements = Elements(text)
    for path in (ROOT / "model_cards").glob("*/eval_results.json"):
        results = json.loads(path.read_text())
        assert path.parent.name in elements.ids
        for arm, scores in results["arms"].items():
            value = f"{scores['bits_per_byte']:.3f}" if "bits_per_byte" in scores else f"{scores['accuracy']:.1%}"
            assert re.search(rf"<td>{arm}( \(published\))?</td><td>{re.escape(value)}</td>", text), arm
    assert {link.removeprefix("#") for link in elements.links} <= elements.ids
    assert elements.images and all(image["alt"] for image in elements.images)
    assert all(image["src"].startswith("data:image/png;base64,") for image in elements.images)
    assert not re.findall(r"""(?:src|href)=["'](?:https?:|/)""", text)  # one file, nothing from elsewhere


def test_markup_in_a_sample_is_text(tmp_path):
    source = ROOT / "model_cards" / "text_cpu" / "eval_results.json"
    results = json.loads(source.read_text())
    results["sample"] = {"prompt": "<script>alert(1)</script>", "continuation": "&"}
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "eval_results.json").write_text(json.dumps(results))
    text = render_gallery(tmp_path, tmp_path / "out" / "page.html").read_text()
    assert "<script>" not in text and "&lt;script&gt;" in text
    with pytest.raises(ValueError, match="no `<card>"):
        render_gallery(tmp_path / "out", tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_shows_it(page, tmp_path):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += [
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    shown = subprocess.run(
        [str(BROWSER), *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert "smt8_bptt (published)" in shown.stdout
    picture = tmp_path / "page.png"
    subprocess.run(
        [str(BROWSER), *flags, f"--screenshot={picture}", "--window-size=1100,1600", page.as_uri()],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000

"""The documentation as pages: mkdocs builds them without a warning, they hold every key, the search needs no server."""

import importlib.util
import re
import subprocess
import sys
import time
from html import unescape
from pathlib import Path

import pytest
from browser import PROGRAM, Browser

from fastlightgen.config import root
from fastlightgen.config.commands import COMMANDS
from fastlightgen.config.layers import leaves
from fastlightgen.config.stages import METHODS

pytestmark = pytest.mark.skipif(importlib.util.find_spec("material") is None, reason="mkdocs-material is not installed")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built pages."""
    out = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def keys(page: Path) -> set[str]:
    """The keys that a page's tables list."""
    return set(re.findall(r"<td><code>([\w.]+)=", page.read_text()))


def test_every_key_is_listed(site):
    found = keys(site / "keys" / "train.html")
    for stage, names in METHODS.items():
        for name in names:
            assert set(leaves(root(stage, {stage: name}))) - {"stage"} <= found
    assert {key for cls in COMMANDS.values() for key in leaves(cls)} <= keys(site / "keys" / "commands.html")


def test_a_key_has_its_defaults_and_range(site):
    text = " ".join(unescape(re.sub(r"<[^>]+>", " ", (site / "keys" / "train.html").read_text())).split())
    assert "beta2=0.25 Eq. 9: weight of the strong teacher" in text
    assert "shift=5.0 tiny : 1.5 time shift s: t -> s t / (1 + (s - 1) t) (number >= 0.01 and <= 1000)" in text


def test_nothing_is_fetched(site):
    """No page takes a script, a style or a picture from elsewhere."""
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        taken = re.findall(r"<(?:script|link|img|iframe)[^>]+?(?:src|href)=\"?([^\" >]+)", page.read_text())
        assert taken
        assert not [url for url in taken if url.startswith(("http", "//"))], page


def test_readme_is_the_first_page(site):
    text = (site / "index.html").read_text()
    assert 'src="demo.gif"' in text and (site / "demo.gif").is_file()
    assert 'href="results.html' in text and 'href="contributing.html"' in text


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium")
@pytest.mark.parametrize("width", [390, 1440])
def test_search_finds_a_key_without_a_server(site, tmp_path, width):
    page = Browser(tmp_path)
    try:
        page.open(site / "index.html", width)
        assert page.run("document.documentElement.scrollWidth") <= width
        page.run("document.querySelector('[data-md-toggle=search]').click()")
        page.run("const i = document.querySelector('.md-search__input'); i.focus(); i.value = 'critic_start'")
        page.run("document.querySelector('.md-search__input').dispatchEvent(new Event('keyup', {bubbles: true}))")
        end = time.monotonic() + 60
        while not (found := page.run("document.querySelector('.md-search-result__link')?.href ?? ''")):
            assert time.monotonic() < end, "the search found nothing"
            time.sleep(0.1)
        assert "keys/train.html" in found or "method.html" in found
        assert not page.errors
    finally:
        page.close()

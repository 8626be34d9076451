"""The report in a browser, on a phone and on a desktop: nothing hidden, nothing cut, everything with a name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from browser import PROGRAM, Browser
from runs import make_run, record

from fastlightgen.data.frames import write_clips
from fastlightgen.report import write_report

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed")
ONE = "training step (one point so far)"
WIDTHS = (390, 1440)
CHECKS = Path(__file__).with_name("page_checks.js").read_text()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A run with six models with the titles of stage=all, 16 scores with intervals, 40 blocks, logs and previews."""
    run = make_run(tmp_path_factory.mktemp("browser") / "run")
    titles = {
        "real": "Real clips",
        "teacher": "Teacher, 50 steps, guidance 2",
        "pruned": "Pruned to 28 blocks, untrained, 4 steps",
        "stage2-few": "After Stage II, 4 steps, 28 blocks",
        "teacher-few": "Teacher, only 4 steps",
        "student": "Student, 4 steps, 28 blocks",
    }
    for name, title in titles.items():
        made = record(name if name in ("real", "teacher") else "student") | {"title": title}
        made["scores"] |= {"frechet": 229.194, "first_frame_psnr": 100.0, "temporal_flickering": 0.9587}
        made["intervals"] = {"frechet": [154.63, 303.74], "first_frame_psnr": [99.0, 100.0], "adherence": [0.9, 1.0]}
        made["intervals"] |= {"temporal_flickering": [0.9551, 0.9624]}
        if name != "real":
            made["num_blocks"] = 40 if name.startswith("teacher") else 28
        (run / "evaluate" / f"{name}.json").write_text(json.dumps(made))
        if name not in ("real", "teacher", "student"):
            shutil.copy(run / "evaluate" / "student.safetensors", run / "evaluate" / f"{name}.safetensors")
    ranking = json.loads((run / "stage1" / "importance.json").read_text())
    ranking["units"] = [ranking["units"][i % 3] | {"index": i, "name": f"blocks.{i}"} for i in range(40)]
    ranking["units"][0]["score"] = 0.95
    ranking["kept"], ranking["pruned"] = list(range(28)), list(range(28, 40))
    (run / "stage1" / "importance.json").write_text(json.dumps(ranking))
    lines = [{"step": n, "loss": 2.0 ** -(n / 8), "distill_pruned": 0.5, "distill_unpruned": 0.1} for n in range(1, 60)]
    (run / "stage2" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    film = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 48, 3), np.uint8)
    write_clips(run / "stage2" / "samples" / "step-000020.gif", film, 6)
    return write_report(run)


def show(browser: Browser, page: Path, width: int) -> Browser:
    browser.errors.clear()
    browser.open(page, width)
    browser.run(CHECKS)
    browser.run("unfold()")
    return browser


@pytest.fixture(params=WIDTHS)
def shown(request, browser, page):
    """The page in a window of this width."""
    return show(browser, page, request.param)


def named(browser, role: str) -> list[str]:
    """The accessible names of all parts with this role, as a screen reader gets them."""
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    own = [n for n in nodes if not n.get("ignored") and n["role"]["value"] == role]
    return [n.get("name", {}).get("value", "") for n in own]


def test_nothing_is_cut_or_hidden(shown):
    assert shown.run("fits()") and shown.run("cut()") == []
    assert shown.run("words()") == {"broken": [], "outside": []}
    assert shown.run("visible()") == shown.run("all('td, canvas, svg').length") > 40
    assert not shown.errors


@pytest.mark.parametrize("width", [390, 720, 900, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_scheme_and_width(browser, page, width, scheme):
    """Text stands out, nothing is cut, nothing moves or speaks by itself where the system asks for less motion."""
    wanted = [("prefers-color-scheme", scheme), ("prefers-reduced-motion", "reduce")]
    browser.call("Emulation.setEmulatedMedia", features=[{"name": name, "value": value} for name, value in wanted])
    show(browser, page, width)
    assert browser.run("contrast()") >= 4.5  # WCAG 2.2, level AA, for text of any size
    assert browser.run("fits()") and browser.run("cut()") == [] and not browser.errors
    assert browser.run("document.getElementById('play').textContent") == "Play"
    assert browser.run("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    assert browser.run("document.getElementById('where').getAttribute('aria-live')") == "off"
    browser.call("Emulation.setEmulatedMedia", features=[])


def test_pictures_and_charts_have_names(shown):
    names = named(shown, "image")
    assert len(names) == shown.run("document.querySelectorAll('canvas, svg').length") == 12 + 1 + 5 and all(names)
    assert "Student, 4 steps, 28 blocks: a red ball" in names
    assert sum(name.startswith("Stage II, step 20: clips of held-out prompts") for name in names) == 1
    assert "Distance against cost" in names
    [blocks] = [name for name in names if name.startswith("Error when one block is skipped")]
    wanted = (
        "(log scale): 0.15 with all blocks; least without blocks.1, 0.2; most without blocks.0, 0.95; 28 of 40 blocks"
    )
    assert wanted in blocks
    [loss] = [name for name in names if name.startswith("Stage II · loss")]
    assert loss.startswith("Stage II · loss (log scale): loss from 0.8") and loss.endswith(" at step 59.")


def test_axes_have_names(shown):
    blocks, *curves = shown.run("axes()")
    assert blocks == ["error (log scale)", "block that is skipped"]
    assert curves == [["loss (log scale)", "training step"], ["distance", "training step"], ["loss", ONE]]
    assert shown.run("smallest()") > 10  # pixels on the screen, whatever the width
    assert shown.run("apart()")


def test_tables_stay_tables(shown):
    assert {"Scores", "Size and speed"} <= set(named(shown, "table"))
    heads = named(shown, "columnheader")
    assert "Teacher, only 4 steps" in heads and "Time per clip" in heads
    rows = named(shown, "rowheader")
    assert any(name.startswith("Fréchet distance") for name in rows) and "Student, 4 steps, 28 blocks" in rows
    assert len(named(shown, "cell")) == shown.run("all('td').length") > 20


def test_a_table_too_wide_for_the_desktop_says_so(browser, page):
    run = page.parent
    for k in range(8):
        shutil.copy(run / "evaluate" / "student.json", run / "evaluate" / f"student-{k}.json")
    wide = write_report(run, run / "wide.html")
    for k in range(8):
        (run / "evaluate" / f"student-{k}.json").unlink()
    show(browser, wide, 1440)
    assert browser.run("fits()") and "Scores, scrolls sideways" in named(browser, "region")
    assert browser.run("focused('#scores .scroll')") and "Scroll sideways" in browser.run("cue('#scores .scroll')")
    show(browser, wide, 390)  # cards hide nothing
    assert "Scores, scrolls sideways" not in named(browser, "region") and browser.run("cut()") == []


def test_clips_play_pause_and_seek(shown):
    shown.run("seek(2)")
    assert shown.run("document.getElementById('where').textContent") == "frame 3 of 3"
    assert shown.run("document.getElementById('play').textContent") == "Play" and shown.run("painted()")

"""A run folder from a stranger: the page holds no script but its own, or one line says what is wrong."""

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest
import tally
import yaml
from mutants import mutants
from runs import Page, add_real_clips, make_run

from fastlightgen.report import PAGE, write_report

SCRIPT = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
FILES = (
    "evaluate/student.json",
    "evaluate/real.json",
    "evaluate/speed.json",
    "evaluate/made.json",
    "evaluate/cache.json",
    "stage1/importance.json",
    "stage2/metrics.jsonl",
    "stage2/alarms.jsonl",
    "config.yaml",
)


def harmless(path: Path) -> None:
    """The page has its own two scripts, no handlers, and nothing that loads or leads elsewhere."""
    page = Page(path)
    assert len(page.scripts) == 2 and "alert(1)" not in page.scripts[1]
    json.loads(page.scripts[0], parse_constant=pytest.fail)
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        links = [v for k, v in attributes.items() if k in ("src", "href", "data", "action") and v]
        assert all(link.startswith(("#", "data:image/", "data:,")) for link in links), (tag, links)
        assert tag not in ("iframe", "object", "embed", "base", "form")


def content_of(path: Path):
    if path.suffix == ".yaml":
        return yaml.safe_load(path.read_text())
    return json.loads(path.read_text().splitlines()[0] if path.suffix == ".jsonl" else path.read_text())


def write(path: Path, value) -> None:
    path.write_text(yaml.safe_dump(value) if path.suffix == ".yaml" else json.dumps(value) + "\n")


@pytest.fixture
def run(tmp_path):
    run = add_real_clips(make_run(tmp_path / "run"))
    alarm = {"step": 1, "alarm": "loss", "good": 0, "value": 2.0, "usual": 1.0}
    (run / "stage2" / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    return run


@pytest.mark.parametrize("name", FILES)
def test_every_mutant_is_shown_or_refused(run, tmp_path, name):
    path, out = run / name, tmp_path / "page.html"
    if not path.exists():
        pytest.skip("the made-up run has no such file")
    value = content_of(path)
    for picture in run.glob("evaluate/*.safetensors"):
        picture.unlink()  # pictures take most of the time
    refused = 0
    for mutant in mutants(value, [SCRIPT, 10**30, -1, None, [], {}, float("nan"), "1", [SCRIPT], {SCRIPT: SCRIPT}]):
        write(path, mutant)
        said = ""
        try:
            write_report(run, out)
            harmless(out)
        except ValueError as err:
            refused, said = refused + 1, str(err)
            assert "\n" not in str(err) and "\x1b" not in str(err) and name.split("/")[-1] in str(err), str(err)
        tally.count("run folders, shown in a report", bool(said))
    assert refused


def test_names_of_keys_are_text_too(run, tmp_path):
    (run / "stage2" / "metrics.jsonl").write_text(json.dumps({"step": 1, f"share_{SCRIPT}": 0.5, SCRIPT: 1.0}) + "\n")
    record = json.loads((run / "evaluate" / "student.json").read_text())
    record["attributes"] = {SCRIPT: 0.5}
    (run / "evaluate" / "student.json").write_text(json.dumps(record))
    harmless(write_report(run, tmp_path / "page.html"))


def test_the_policy_allows_the_page_s_own_script_alone(run, tmp_path):
    text = write_report(run, tmp_path / "page.html").read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(script) == 1 and (PAGE / "script.js").read_text() in script[0]
    wanted = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{wanted}';" in policy and "default-src 'none'" in policy


def test_a_preview_that_is_no_gif_is_left_out(run, tmp_path):
    samples = run / "stage2" / "samples"
    samples.mkdir()
    (samples / "step-000001.gif").write_text("%!PS-Adobe-3.0 EPSF-3.0")
    harmless(write_report(run, tmp_path / "page.html"))

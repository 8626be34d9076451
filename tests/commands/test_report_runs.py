"""The report of several runs: who is nearest to real clips, what differs, one chart for all, in a browser too."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from browser import PROGRAM, Browser
from runs import Page, make_run
from safetensors.torch import load_file, save_file

from fastlightgen import report
from fastlightgen.config import ConfigError, load
from fastlightgen.evaluation import latents
from fastlightgen.metrics.intervals import Resampled
from fastlightgen.page.compare import names_of
from fastlightgen.world import score


def spread(values, seed):
    """In place of the scores that need a reference of real clips: the mean, resampled with a small noise of its own."""
    out = {}
    for name, v in values.items():
        noise = torch.randn(200, generator=torch.Generator().manual_seed(round(1000 * v.mean().item()))).double()
        out[name] = Resampled(v.mean().item(), v.mean() + 0.01 * noise, 64, 0)
    return out


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Three runs with the distances 40, 30 and 30.001, and other learning rates of Stage II."""
    monkeypatch.setattr(report, "resampled", spread)
    monkeypatch.setattr(score, "reference", lambda seed: SimpleNamespace(look={}))
    out = []
    for name, distance, lr in (("a", 40.0, 1e-3), ("b & <c>", 30.0, 2e-3), ("d", 30.001, 1e-3)):
        run = make_run(tmp_path / name / "run")
        file = run / "evaluate" / "student.json"
        made = json.loads(file.read_text())
        made["scores"] |= {"frechet": distance}
        made |= {"clips": 64, "seed": 0}
        file.write_text(json.dumps(made))
        values = {"frechet": torch.full((64,), distance), "adherence": torch.full((64,), made["scores"]["adherence"])}
        save_file(values, file.with_suffix(".values.safetensors"))
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["stage2"]["lr"] = lr
        (run / "config.yaml").write_text(yaml.dump(config))
        out.append(run)
    return out


def compared(runs, tmp_path):
    report.report(load([f"runs={','.join(map(str, runs))}", f"out={tmp_path / 'x.html'}"], "report"))
    return Page(tmp_path / "x.html")


def said(page) -> str:
    """The text, without the marks where elements end."""
    return page.text.replace("|", "")


def test_the_page_says_who_is_nearest(runs, tmp_path):
    page = compared(runs, tmp_path)
    text = said(page)
    assert "b & <c>/run has the smallest distance to real clips: Frechet distance 30.00" in text
    assert "Against a/run (40.00, 91.2%) it is better in distance and not different in adherence." in text
    assert "Against d/run (30.00, 91.2%) it is not different in distance and not different in adherence." in text
    assert "3 runs compared: a/run, b & <c>/run, d/run" in page.text
    assert "stage2.lr" in page.text and "Frontier" in page.text and "stage2.iters" not in page.text
    data = json.loads(page.scripts[0])
    assert [run["name"] for run in data["runs"]] == ["a/run", "b & <c>/run", "d/run"]
    assert data["runs"][1]["curves"]["3"] == {"fake_loss": [[1, 0.5]]}


@pytest.fixture
def cached(tmp_path):
    """Two runs whose students were measured on 64 clips of a cache: sharp ones and blurred ones."""
    draw = torch.Generator().manual_seed(0)
    x0, made = (torch.randn(64, 4, 3, 6, 6, generator=draw) for _ in range(2))
    blurred = torch.nn.functional.avg_pool3d(made, (1, 3, 3), 1, (0, 1, 1))
    real = latents.Sampled(None, None, {}, None)
    latents.note(real, x0)
    for name, clips in (("sharp", made), ("blurred", blurred)):
        own = latents.Sampled(None, None, {}, None)
        latents.note(own, clips)
        file = tmp_path / name / "evaluate" / "cache.json"
        file.parent.mkdir(parents=True)
        values = own.values(real)
        scores = latents.scores_of(latents.statistics(values))
        record = {"title": "x/model", "scores": scores, "intervals": {}, "seconds_per_clip": 1.0, "data": "CACHE"}
        file.write_text(json.dumps(record | {"data_hash": "h", "clips": 64, "seed": 0}))
        save_file(values, file.with_suffix(".values.safetensors"))
    return [tmp_path / "blurred", tmp_path / "sharp"]


def test_runs_on_a_cache_are_ranked_by_its_clips(cached, tmp_path):
    page = said(compared(cached, tmp_path))
    assert "sharp is nearest to the clips of CACHE: Frechet distance" in page and ") it is better in distance." in page
    file = cached[0] / "evaluate" / "cache.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"seed": 1}))
    page = said(compared(cached, tmp_path))
    assert "sharp has the smallest distance to the clips of CACHE" in page
    assert ") it is not ranked: the clips differ or are too few, or" in page
    file.write_text(json.dumps(json.loads(file.read_text()) | {"data_hash": "of another cache"}))
    assert "The distance of blurred to the clips of CACHE is" in said(
        compared(cached, tmp_path)
    )  # only the first run's cache counts


@pytest.mark.parametrize("change, said", [
    (lambda values: values.pop("energies"), "the values of the clips lack energies"),
    (lambda values: values["features"].fill_(float("nan")), "features is no table of finite numbers"),
    (lambda values: values.update(features=values["features"][:, 1:].contiguous()), "as wide as that of real clips"),
])  # fmt: skip
def test_damaged_values_are_one_line(cached, tmp_path, change, said):
    file = cached[1] / "evaluate" / "cache.values.safetensors"
    values = load_file(file)
    change(values)
    save_file(values, file)
    with pytest.raises(ValueError, match=said):
        compared(cached, tmp_path)


def test_against_its_teacher_on_a_cache(cached):
    run = cached[1]
    record = json.loads((run / "evaluate" / "cache.json").read_text())
    record |= {"teacher": record | {"title": "t"}, "against_teacher": {}}
    for key, word in (("frechet", "worse"), ("kid", "worse"), ("detail", "better"), ("motion", "no difference")):
        record["against_teacher"][key] = {"difference": 0.0, "low": 0.0, "high": 0.0, "verdict": word}
    (run / "evaluate" / "cache.json").write_text(json.dumps(record))
    text = said(Page(report.write_report(run)))
    wanted = (
        "x/model is, against its teacher, better in 1 (detail), worse in 2 (frechet, kid) and not different beyond "
    )
    assert f"On 64 clips of CACHE that training held out, {wanted}noise in 1 of 4 scores." in text


def test_other_clips_are_not_ranked(runs, tmp_path):
    file = runs[0] / "evaluate" / "student.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"seed": 1}))
    assert "Against a/run (40.00, 91.2%) it is not ranked: the clips differ or are too few, or" in said(
        compared(runs, tmp_path)
    )


def test_the_nearest_without_values_is_not_ranked(runs, tmp_path):
    """The differences that the sentence gives are those of the student that it names."""
    (runs[1] / "evaluate" / "student.values.safetensors").unlink()
    text = said(compared(runs, tmp_path))
    assert "b & <c>/run has the smallest distance" in text and "better" not in text.partition("Better or worse")[0]


def test_runs_without_a_student(runs, tmp_path):
    for run in runs:
        (run / "evaluate" / "student.json").unlink()
    assert "None of these runs has an evaluated student." in compared(runs[:2], tmp_path).text


@pytest.mark.parametrize("words, said", [
    ([], "run is required: give run=DIR, or runs=A,B to compare several"),
    (["run=a", "runs=a,b"], "run=a: give run= or runs=, one of them"),
    (["runs=a"], "runs=a: wanted 2 to 8 different folders"),
    (["runs=a,a/"], "wanted 2 to 8 different folders"),
])  # fmt: skip
def test_mistakes(words, said):
    with pytest.raises(ConfigError, match=said):
        load(words, "report")


def test_names():
    assert names_of(["x/a", "y/a"]) == {"x/a": "x/a", "y/a": "y/a"} and names_of(["x/a/", "x/b"])["x/b"] == "b"


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed")
def test_in_a_browser(runs, tmp_path):
    """A curve for each run in every chart, and no error of the script."""
    compared(runs, tmp_path)
    browser = Browser(tmp_path / "profile")
    try:
        browser.open(tmp_path / "x.html", 390)
        charts = "[...document.querySelectorAll('#curves svg')]"
        assert browser.run(f"{charts}.map((c) => c.querySelectorAll('.curve').length)") == [3, 3, 3]
        assert browser.run("document.documentElement.scrollWidth <= 390") and not browser.errors
    finally:
        browser.close()

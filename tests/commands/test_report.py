"""The report: the numbers of a run folder, a single file that loads no other, hostile strings, missing parts."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import save_file

from fastlightgen import config, report
from fastlightgen.config import UserError
from fastlightgen.metrics.importance import is_log, plot_importance
from fastlightgen.report import best, write_report

HOSTILE = """</script><img src=x onerror="alert('1')">&"""
RANKING = {
    "units": [
        {"name": f"blocks.{i}", "kind": "block", "index": i, "score": s, "stderr": 0.01}
        for i, s in enumerate((0.9, 0.2, 0.25))
    ],
    "baseline_score": 0.15,
    "kept": [0, 2],
    "pruned": [1],
    "search": "single_skip",
    "score_kind": "elbo",
    "num_samples": 16,
}
KEPT = {"teacher": None, "student": [0, 2]}
ADHERENCE = {"real": 0.991, "teacher": 0.874, "student": 0.912}


def video(seed):
    return np.random.default_rng(seed).integers(0, 256, (2, 3, 4, 5, 3), dtype=np.uint8)


def record(name):
    scores = {"adherence": ADHERENCE[name], "saturation": {"real": 0.4, "teacher": 0.43, "student": 0.5}[name]}
    out = {"name": name, "title": name.title(), "clips": 32, "seed": 0, "attributes": {"colour": 0.5}}
    out |= {"scores": scores | {"tracking_error": float("nan")}}
    out |= {"shown": [{"caption": HOSTILE, "has_first": True}, {"caption": "a red ball", "has_first": False}]}
    if name != "real":
        kept = KEPT[name]
        out |= {"num_params": 1_230_000, "num_blocks": len(kept or range(3)), "kept_blocks": kept, "batch": 8}
        out |= {"sampler": {"kind": "ode", "steps": 50, "guidance": 2.0, "evaluations": 100}, "seconds_per_clip": 0.125}
    return out


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "my run"
    for sub in ("stage1", "stage2", "stage3", "evaluate"):
        (folder / sub).mkdir(parents=True)
    (folder / "stage1" / "importance.json").write_text(json.dumps(RANKING))
    lines = [{"step": 1, "loss": 0.123456, "distill_pruned": 0.25}, {"step": 2, "loss": float("nan")}]
    (folder / "stage2" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "stage3" / "metrics.jsonl").write_text('{"step": 1, "fake_loss": 0.5}\n')
    for i, name in enumerate(ADHERENCE):
        (folder / "evaluate" / f"{name}.json").write_text(json.dumps(record(name)))
        save_file({"video": video(i)}, folder / "evaluate" / f"{name}.safetensors")
    speed = {"theory": 37.5, "measured": 36.1, "teacher_seconds": 0.9, "student_seconds": 0.025, "batch": 8}
    (folder / "evaluate" / "speed.json").write_text(json.dumps(speed | {"theory_formula": "50 x 2 / (4 x 8/12)"}))
    settings = {"stage2": {"lr": 0.0003, "betas": [0.9, 0.999]}, "seed": 7, "versions": {"torch": "9.8.7"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | {"git_commit": "abc123"}))
    return folder


class Page(HTMLParser):
    """A page as a browser parses it: (tag, attributes), the text, the script elements."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.scripts, self.inside = [], "", [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, text):
        if self.inside == "script":
            self.scripts[-1] += text
        elif self.inside != "style":
            self.text += text + "|"


def test_numbers_of_the_run_are_on_the_page(run):
    page = Page(write_report(run))
    for shown in (
        *("36.1×", "37.5×", "50 x 2 / (4 x 8/12)", "0.9 s → 0.025 s per clip, batch 8", "67%", "2 of 3"),
        *("99.1%", "87.4%", "91.2%", "0.400", "0.430", "50.0%", "1.23 M", "0.125 s", "50 · ode · guidance 2"),
        *("Measured on 32 held-out clips.", "16 samples", "dropped: [1]", "0.0003", "[0.9,0.999]", "9.8.7", "abc123"),
    ):
        assert shown in page.text, shown
    data = json.loads(page.scripts[0])
    assert data["importance"]["baseline_score"] == 0.15 and data["importance"]["kept"] == [0, 2]
    assert [u["score"] for u in data["importance"]["units"]] == [0.9, 0.2, 0.25]
    # five digits; nan is left out
    wanted = {"2": {"loss": [[1, 0.12346]], "distill_pruned": [[1, 0.25]]}, "3": {"fake_loss": [[1, 0.5]]}}
    assert data["curves"] == wanted


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_every_rung_that_occurs_has_a_curve():
    template = (Path(report.__file__).parent / "report_template.html").read_text()
    line = next(line for line in template.splitlines() if line.startswith("const rungs ="))
    keys = ("fake_loss", "student_x0_gap", "student_x0_gap_rung8", "student_x0_gap_rung1")
    found = []
    for curves in ({"3": dict.fromkeys(keys, [[1, 0.5]])}, {}):
        script = f"const data = {json.dumps({'curves': curves})}; {line} console.log(JSON.stringify(rungs));"
        found.append(json.loads(subprocess.run(["node", "-e", script], capture_output=True, check=True).stdout))
    assert found == [[1, 8], []]


def test_alarms_and_time_shares(run):
    assert "alarm" not in Page(write_report(run)).text
    lines = [{"step": k, "share_data": 0.1 * k, "share_forward": 0.5, "loss": 1.0} for k in (1, 3)]
    (run / "stage2" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    alarm = {"step": 40, "alarm": f"motion collapse: {HOSTILE}", "value": 0.1234, "usual": 5.678, "good": 20}
    (run / "stage3" / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    page = Page(write_report(run))
    assert "Alarms of stage 3 (1)|" in page.text and "(0.123, usual 5.68)" in page.text
    assert "Time of stage 2: data 20%, forward 50%, rest 30%|" in page.text and "Time of stage 3" not in page.text
    widths = [a["style"].split(";")[0] for tag, a in page.tags if tag == "i" and "style" in a]
    assert widths == ["width:20.0%", "width:50.0%", "width:30.0%"]
    assert not [a for _, a in page.tags if "onerror" in a]


def test_clips_survive_as_sprites(run):
    """Row k, column f of a model's picture is frame f of clip k, bit for bit; the models are in order."""
    page = Page(write_report(run))
    sprites = [a for tag, a in page.tags if tag == "img" and a.get("class") == "sprite"]
    assert len(sprites) == len(ADHERENCE)
    for seed, image in enumerate(sprites):
        assert (image["data-frames"], image["data-h"], image["data-w"]) == ("3", "4", "5")
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))))
        for k in range(2):
            for f in range(3):
                assert np.array_equal(pixels[4 * k : 4 * k + 4, 5 * f : 5 * f + 5], video(seed)[k, f])
    cells = [(a["data-s"], a["data-k"]) for tag, a in page.tags if tag == "canvas"]
    assert cells == [(str(s), str(k)) for k in range(2) for s in range(3)]


def test_best_scores():
    evals = {name: record(name) for name in ADHERENCE}
    assert best("adherence", evals) == ["student"]  # the real clips do not compete
    assert best("saturation", evals) == ["teacher"]  # nearest to the real 0.4
    assert best("tracking_error", evals) == []  # nan
    evals["teacher"]["scores"]["adherence"] = 0.9121  # printed as 91.2%, like the student's
    assert best("adherence", evals) == ["teacher", "student"]
    evals["student"]["scores"] |= {"motion": 1.2, "frechet": 3.0}
    evals["teacher"]["scores"] |= {"motion": 0.9, "frechet": 2.0}
    assert best("motion", evals) == best("frechet", evals) == ["teacher"]
    del evals["real"]
    assert best("saturation", evals) == []  # without real clips there is no goal


def test_models_that_do_not_differ_share_the_first_place():
    evals = {name: record(name) for name in ADHERENCE}
    evals["student"]["against_teacher"] = {"adherence": {"verdict": "no difference"}}
    assert best("adherence", evals) == ["teacher", "student"]
    evals["student"]["against_teacher"] = {"adherence": {"verdict": "better"}}
    assert best("adherence", evals) == ["student"]
    evals["other"] = record("student") | {"against_teacher": {"adherence": {"verdict": "no difference"}}}
    evals["other"]["scores"]["adherence"] = 0.88  # like the teacher, which is not the best
    assert best("adherence", evals) == ["student"]
    evals["student"]["intervals"] = {}  # too few clips
    assert best("adherence", evals) == []


def test_intervals_and_verdicts_are_on_the_page(run):
    assert "Ranges are" not in Page(write_report(run)).text  # records without intervals stay as they are
    student = record("student") | {"intervals": {"adherence": [0.9, 0.9253], "saturation": [0.45, 0.55]}}
    student["against_teacher"] = {"adherence": {"verdict": "better"}, "saturation": {"verdict": "no difference"}}
    (run / "evaluate" / "student.json").write_text(json.dumps(student))
    text = Page(write_report(run)).text
    assert "91.2%|90.0% to 92.5%|" in text and "0.500|0.450 to 0.550|no difference|" in text
    assert text.count("no difference") == 1 and "Ranges are 95% intervals." in text
    assert "Kernel distance" not in text  # no model has this score


def test_hostile_strings_stay_text(run):
    ranking = RANKING | {"search": HOSTILE, "units": [u | {"name": HOSTILE} for u in RANKING["units"]]}
    (run / "stage1" / "importance.json").write_text(json.dumps(ranking))
    (run / "config.yaml").write_text(yaml.safe_dump({"stage2": {HOSTILE: HOSTILE}, "git_commit": HOSTILE}))
    hostile = record("student") | {"title": HOSTILE, "note": HOSTILE, "attributes": {HOSTILE: 1.0}}
    (run / "evaluate" / "student.json").write_text(json.dumps(hostile))
    page = Page(write_report(run))
    assert not [a for _, a in page.tags if "onerror" in a]
    assert page.text.count("alert('1')") >= 8
    assert len(page.scripts) == 2 and json.loads(page.scripts[0])["importance"]["units"][0]["name"] == HOSTILE


def test_page_loads_nothing(run):
    path = write_report(run)
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//\w+\.|@import", text)
    for _, attributes in Page(path).tags:
        for key in ("src", "href", "srcset", "action"):
            assert attributes.get(key, "#").startswith(("#", "data:"))
    assert text.count("url(") == text.count("url(#hatch)")
    assert len(text) < 3e6 and sorted(p.name for p in run.iterdir() if p.is_file()) == ["config.yaml", "report.html"]


@pytest.mark.parametrize("present", ["config.yaml", "stage1/importance.json", "stage2/metrics.jsonl", "evaluate"])
def test_absent_parts_name_their_command(run, tmp_path, present):
    part = tmp_path / "part"
    (part / present).parent.mkdir(parents=True, exist_ok=True)
    (run / present).rename(part / present)
    page = Page(write_report(part))
    assert f"python -m fastlightgen.train stage=all run={part}" in page.text
    assert (f"train stage=1 run={part}" in page.text) == (present != "stage1/importance.json")
    for inside, words in {
        "evaluate": "Adherence",
        "stage1/importance.json": "single_skip",
        "config.yaml": "abc123",
    }.items():
        assert (words in page.text) == (present == inside), words


def test_empty_and_broken_folders(tmp_path, run, capsys):
    with pytest.raises(UserError, match=r"nothing to report; wanted .*importance.json.* python -m fastlightgen.train"):
        write_report(tmp_path / "empty")
    with pytest.raises(SystemExit) as stop:
        config.main(lambda cfg: write_report(tmp_path / cfg.run), "report", ["run=empty"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "empty: nothing to report" in error
    (run / "evaluate" / "student.json").write_text('{"name"')
    with pytest.raises(UserError, match=r"student.json: is not valid JSON"):
        write_report(run)


def test_out_and_one_sample(run, tmp_path):
    units = [u | {"stderr": float("nan")} for u in RANKING["units"]]
    (run / "stage1" / "importance.json").write_text(json.dumps(RANKING | {"units": units}))
    out = write_report(run, tmp_path / "page.html")
    assert out == tmp_path / "page.html" and not (run / "report.html").exists()
    assert json.loads(Page(out).scripts[0], parse_constant=pytest.fail)["importance"]["units"][0]["stderr"] == 0.0


def test_plot_importance(tmp_path):
    """The picture is 1000 pixels wide and has more blue than orange: block 0 matters most and is kept."""
    plot_importance(RANKING, tmp_path / "importance.tmp.png")
    pixels = np.asarray(Image.open(tmp_path / "importance.tmp.png").convert("RGB")).astype(int)
    assert pixels.shape == (450, 1000, 3)
    kept, dropped = ((np.abs(pixels - c).max(-1) < 8).sum() for c in ((0x2F, 0x6F, 0xED), (0xE8, 0x83, 0x3A)))
    assert kept > dropped > 500
    assert is_log(RANKING) and not is_log(RANKING | {"baseline_score": 0.0})

"""The report: the numbers of a run folder, a single file that loads no other, hostile strings, missing parts."""

import base64
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import yaml
from PIL import Image
from runs import ADHERENCE, HOSTILE, RANKING, Page, make_run, record, video
from safetensors.numpy import save_file

from fastlightgen import config
from fastlightgen.config import UserError
from fastlightgen.data.frames import write_clips
from fastlightgen.metrics.importance import is_log, plot_importance
from fastlightgen.metrics.scores import best
from fastlightgen.report import PAGE, write_report


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "my run")


def test_numbers_of_the_run_are_on_the_page(run):
    page = Page(write_report(run))
    for shown in (
        *("36.1×", "37.5×", "50 x 2 / (4 x 8/12)", "0.9 s → 0.025 s per clip, batch 8", "67%", "2 of 3"),
        *("99.1%", "87.4%", "91.2%", "0.400", "0.430", "50.0%", "1.23 M", "0.125 s", "50 · ode · guidance 2"),
        *("Measured on 32 held-out clips.", "16 samples", "Dropped: [1].", "0.0003", "[0.9,0.999]", "9.8.7", "abc123"),
    ):
        assert shown in page.text, shown
    assert page.text.count(f"FastLightGen: {run.parent.name}/my run|") == 2  # title and heading
    assert "Score: elbo (Eq. 4, how far the predicted clip is from the real one)." in page.text
    data = json.loads(page.scripts[0])
    assert data["importance"]["baseline_score"] == 0.15 and data["importance"]["kept"] == [0, 2]
    assert [u["score"] for u in data["importance"]["units"]] == [0.9, 0.2, 0.25]
    # five digits; nan is left out
    wanted = {"2": {"loss": [[1, 0.12346]], "distill_pruned": [[1, 0.25]]}, "3": {"fake_loss": [[1, 0.5]]}}
    assert data["runs"] == [{"name": "", "curves": wanted}]
    with open(run / "stage2" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # a run that is writing at this moment
    assert json.loads(Page(write_report(run)).scripts[0])["runs"][0]["curves"] == wanted


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_every_rung_that_occurs_has_a_curve():
    line = next(line for line in (PAGE / "script.js").read_text().splitlines() if line.startswith("const rungs ="))
    keys = ("fake_loss", "student_x0_gap", "student_x0_gap_rung8", "student_x0_gap_rung1")
    found = []
    for curves in ({"3": dict.fromkeys(keys, [[1, 0.5]])}, {}):
        script = (
            f"const data = {json.dumps({'runs': [{'curves': curves}]})}; {line} console.log(JSON.stringify(rungs));"
        )
        found.append(json.loads(subprocess.run(["node", "-e", script], capture_output=True, check=True).stdout))
    assert found == [[1, 8], []]


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize("steps, wanted", [([21], ["21"]), ([1, 2], ["1", "2"]), ([1, 11], ["2", "4", "6", "8", "10"])])
def test_the_axis_of_steps_has_the_steps(steps, wanted):
    """A chart 400 pixels wide: a single point stands in the middle, above its step; other steps are whole numbers."""
    script = (PAGE / "script.js").read_text()
    script = script[script.index("// --- charts") : script.index("const rungs =")]
    points = [[step, 0.5] for step in steps]
    script += f'console.log(curve("title", "loss", [{{label: "loss", points: {points}}}], 400));'
    chart = subprocess.run(["node", "-e", script], capture_output=True, check=True, text=True).stdout
    assert re.findall(r'y="226" text-anchor="middle">([\d.]+)<', chart) == wanted
    assert ("(one point so far)" in chart) == (len(steps) == 1)
    if len(steps) == 1:
        middle = (52 + 400 - 8) / 2
        assert f'd="M{middle:g} ' in chart and f'<text x="{middle:g}" y="226"' in chart
        assert 'aria-label="title: loss 0.5 at step 21."' in chart
    assert "NaN" not in chart


def test_alarms_and_time_shares(run):
    assert "Alarms of" not in Page(write_report(run)).text
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


def test_clips_say_what_they_are(run):
    adherence = np.array([0.25, 1.0] + [0.5] * 30)
    save_file({"adherence": adherence}, run / "evaluate" / "student.values.safetensors")
    labels = [a["aria-label"] for tag, a in Page(write_report(run)).tags if tag == "canvas" and a["role"] == "img"]
    assert labels[2] == f"Student: {HOSTILE}; adherence of this clip 25%" and labels[3] == "Real: a red ball"
    assert labels[5] == "Student: a red ball; adherence of this clip 100%" and len(labels) == 6


def test_clips_of_the_training_are_embedded(run):
    """Four sets of a stage, the last one among them, with their numbers; a large one is made smaller."""
    folder, red = run / "stage3" / "samples", np.zeros((2, 30, 64, 800, 3), np.uint8)
    red[..., 0] = np.arange(30)[:, None, None] * 8
    for step in range(1, 8):
        write_clips(folder / f"step-{step:06d}.gif", red if step == 7 else red[:, :1, :, :80], fps=6)
    (folder / "step-000006.gif").write_text("cut short")
    lines = [{"step": n, "clips_motion": n / 2, "clips_contrast": 3.25} for n in (5, 7)]
    (run / "stage3" / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step"')
    page = Page(write_report(run))
    labels = [a["aria-label"] for tag, a in page.tags if tag == "canvas"][6:]
    shown = [label.partition(":")[0] for label in labels]
    assert shown == ["Stage III, step 2", "Stage III, step 4", "Stage III, step 5", "Stage III, step 7"]
    assert labels[3] == "Stage III, step 7: clips of held-out prompts side by side; motion 3.5, contrast 3.25"
    assert "|step 7|" in page.text and " motion 2.5, contrast 3.25|" in page.text and "#previews" in str(page.tags)
    last = [a for tag, a in page.tags if tag == "img" and a.get("class") == "sprite"][-1]
    assert (last["data-frames"], last["data-w"], last["data-h"]) == ("24", "768", "32")  # of 30, 1600 and 64
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(last["src"].partition(",")[2])))).astype(int)
    assert pixels.shape == (32, 24 * 768, 3)
    for j, level in ((0, 0), (12, 15 * 8), (23, 28 * 8)):  # frame 30 j / 24 of the film
        assert np.abs(pixels[:, 768 * j : 768 * (j + 1)] - [level, 0, 0]).max() <= 6  # JPEG and the palette of a GIF


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
def test_absent_parts_have_no_section(run, tmp_path, present):
    part = tmp_path / "part"
    (part / present).parent.mkdir(parents=True, exist_ok=True)
    (run / present).rename(part / present)
    page = Page(write_report(part))
    wanted = {
        "evaluate": ["Clips", "Scores", "Size and speed"],
        "stage1/importance.json": ["Block importance"],
        "stage2/metrics.jsonl": ["Training"],
        "config.yaml": ["Configuration"],
    }[present]
    ids = [title.split()[0].lower() for title in wanted]
    assert [a["href"] for tag, a in page.tags if tag == "a"] == [f"#{i}" for i in ids]
    assert [a["id"] for tag, a in page.tags if tag == "section"] == ids
    assert ("python -m" in page.text) == (present == "config.yaml")  # without it nobody knows the settings


def test_empty_and_broken_folders(tmp_path, run, capsys):
    with pytest.raises(UserError, match=r"nothing to report; wanted .*importance.json.* give the folder that was run="):
        write_report(tmp_path / "empty")
    with pytest.raises(SystemExit) as stop:
        config.main(lambda cfg: write_report(tmp_path / cfg.run), "report", ["run=empty"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "empty: nothing to report" in error
    (run / "evaluate" / "student.json").write_text('{"name"')
    with pytest.raises(ValueError, match=r"student.json: cannot be read as JSON .*delete it and make it again"):
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

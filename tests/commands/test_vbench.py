"""vbench: the videos with their names, how VBench is started, its result files, what is refused."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from students import make_student

from fastlightgen.config import main
from fastlightgen.evaluation.vbench import SEVEN, SIX
from fastlightgen.vbench import vbench

FIRST, SECOND, MOVED = "a cat's shadow, on wet sand.", "a red ball", "a red ball, camera pans left"
PROMPTS = [
    {"prompt_en": FIRST, "dimension": [*SIX, "temporal_flickering"], "image_type": "x", "image_name": "cat.jpg"},
    {"prompt_en": SECOND, "dimension": ["i2v_background", "aesthetic_quality"], "image_name": "ball.jpg"},
    {"prompt_en": MOVED, "dimension": ["camera_motion"], "image_name": "ball.jpg"},
]
# Stands for VBench's evaluate_i2v.py: writes what it was asked, and a result file as VBench does.
STAND_IN = """
import argparse, json, os, sys
p = argparse.ArgumentParser()
for name in ("videos_path", "output_path", "full_json_dir", "dimension", "ratio"):
    p.add_argument("--" + name, required=True)
a = p.parse_args()
if a.dimension == os.environ.get("FAILS"):
    sys.exit(3)
score = len(a.dimension) / 100
assert all(name.endswith(".mp4") for name in os.listdir(a.videos_path))
rows = [{"video_path": name, "video_results": score} for name in sorted(os.listdir(a.videos_path))]
extra = [{"pan_left": float("nan")}] if a.dimension == "camera_motion" else []
with open(os.path.join(a.output_path, f"results_{a.dimension}_eval_results.json"), "w") as f:
    json.dump({a.dimension: [score, *extra, rows]}, f)
with open("calls.txt", "a") as f:
    f.write(" ".join([a.dimension, a.ratio, a.full_json_dir]) + chr(10))
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    """VBench's list and pictures, a stand-in for its checkout."""
    root = tmp_path_factory.mktemp("vbench")
    (root / "prompts.json").write_text(json.dumps(PROMPTS))
    for folder in ("images", "checkout"):
        (root / folder).mkdir()
    for name, colour in (("cat.jpg", (90, 60, 30)), ("ball.jpg", (200, 20, 20))):
        Image.new("RGB", (96, 64), colour).save(root / "images" / name)
    (root / "checkout" / "evaluate_i2v.py").write_text(STAND_IN)
    return root


@pytest.fixture
def run(suite, capsys):
    def go(*words: str) -> str:
        common = [f"prompts={suite / 'prompts.json'}", "threads=1", "progress=false", "device=cpu"]
        main(vbench, "vbench", [*common, *words])
        return capsys.readouterr().out

    return go


@pytest.fixture(scope="module")
def student(pipeline, tmp_path_factory) -> list[str]:
    folder = make_student(pipeline("wan_i2v"), tmp_path_factory.mktemp("student") / "model")
    return [f"model={folder}", f"pipeline={pipeline('wan_i2v')}", "size=32x48x5", "samples=2"]


def test_from_videos_to_averages(suite, student, run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    words = [*student, f"images={suite / 'images'}", f"out={out}", f"vbench={suite / 'checkout'}"]
    text = run(*words)
    names = sorted(path.name for path in (out / "videos").iterdir())
    assert names == sorted(f"{p}-{k}.mp4" for p in (FIRST, SECOND) for k in range(2))  # camera motion: dimensions=total
    started = f"python evaluate_i2v.py --videos_path {out}/videos --output_path {out}/results --full_json_dir "
    assert started + f"{suite}/prompts.json --dimension i2v_subject --ratio 16-9" in text
    assert text.count("--dimension") == 7 and f"cd {suite / 'checkout'}" in text

    (out / "videos" / f"{SECOND}-1.mp4").unlink()
    before = (out / "videos" / f"{FIRST}-0.mp4").stat().st_mtime_ns
    first = (out / "videos" / f"{SECOND}-0.mp4").read_bytes()
    monkeypatch.setenv("FAILS", "motion_smoothness")
    with pytest.raises(SystemExit):
        run(*words, f"python={sys.executable}")
    assert (out / "videos" / f"{FIRST}-0.mp4").stat().st_mtime_ns == before  # what exists is kept
    assert (out / "videos" / f"{SECOND}-1.mp4").read_bytes() != first  # another noise
    monkeypatch.delenv("FAILS")
    text = run(*words, f"python={sys.executable}")
    calls = (suite / "checkout" / "calls.txt").read_text().splitlines()
    assert [line.split()[0] for line in calls] == list(SEVEN)  # none twice, though the first start failed
    scores = json.loads((out / "scores.json").read_text())
    six, seven = (sum(len(d) for d in ds) / len(ds) / 100 for ds in (SIX, SEVEN))
    assert scores["average_6"] == pytest.approx(six) and scores["average_7"] == pytest.approx(seven)
    assert scores["total"] is None and f"{seven:.4f}  average of 7 dimensions" in text

    text = run(f"out={out}", "samples=2", "dimensions=total")  # no model: what exists is read
    assert f"4 of 6 videos; the first missing: {MOVED}-0.mp4" in text
    with pytest.raises(SystemExit):
        run(*words, "steps=2")


def test_processes_share_the_videos(suite, student, run, tmp_path):
    words = [*student, f"images={suite / 'images'}", f"out={tmp_path}", "ranks=2"]
    text = run(*words, "rank=1")
    assert {path.name for path in (tmp_path / "videos").iterdir()} == {f"{p}-1.mp4" for p in (FIRST, SECOND)}
    assert f"2 of 4 videos; the first missing: {FIRST}-0.mp4" in text


def changed(number: int, **keys) -> list[dict]:
    return [{**row, **(keys if k == number else {})} for k, row in enumerate(PROMPTS)]


@pytest.mark.parametrize(
    "prompts, said",
    [
        (changed(0, prompt_en="../up"), "entry 0: '../up-0.mp4' is no name of a file"),
        (changed(1, image_name="/etc/passwd"), "entry 1: '/etc/passwd' is no name of a file"),
        (changed(1, prompt_en=FIRST), "twice, so that one video would replace another"),
        (changed(1, dimension="i2v_subject"), "[1].dimension: is 'i2v_subject', wanted a list"),
        ({}, "is an object of 0, wanted a list"),
        (PROMPTS[2:], "has no prompts for i2v_subject"),
    ],
)
def test_lists_that_are_refused(tmp_path, capsys, prompts, said):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(prompts))
    with pytest.raises(SystemExit):
        main(vbench, "vbench", [f"prompts={path}", f"out={tmp_path / 'out'}"])
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "content, said",
    [
        ({"i2v_subject": []}, "i2v_subject: has 0 entries"),
        ({"i2v_subject": [98.2, []]}, "i2v_subject[0]: is 98.2, wanted a number from 0 to 1"),
        ([0.5], "is a list of 1, wanted an object"),
    ],
)
def test_results_that_are_refused(suite, run, tmp_path, capsys, content, said):
    for folder in ("videos", "results"):
        (tmp_path / folder).mkdir()
    for prompt in (FIRST, SECOND):
        (tmp_path / "videos" / f"{prompt}-0.mp4").touch()
    (tmp_path / "results" / "a_eval_results.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        run(f"out={tmp_path}", "samples=1")
    assert said in capsys.readouterr().err


def test_keys_that_go_together(suite, pipeline, tmp_path, capsys):
    words = [f"prompts={suite / 'prompts.json'}", f"out={tmp_path / 'o'}", "progress=false"]
    text_only = [f"model={pipeline('wan_t2v')}", f"images={suite / 'images'}", "size=32x48x5"]
    for more, said in (
        (["model=x"], "images is required with model="),
        ([f"model={pipeline('wan_i2v')}", f"images={tmp_path}"], "'cat.jpg' is missing (2 pictures in all)"),
        (text_only, "makes videos from text alone; VBench-I2V begins with a picture"),
        (["python=python"], "vbench is required with python="),
        (["rank=0"], "rank=0, ranks=0: give both or neither"),
    ):
        with pytest.raises(SystemExit):
            main(vbench, "vbench", [*words, *more])
        assert said in capsys.readouterr().err

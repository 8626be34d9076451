"""Every command on the page runs: it makes the next part of the run, and the page then names the one after it."""

import html
import os
import re
import shlex
import signal
from dataclasses import replace

import pytest
import torch
import yaml
from helpers import run_train, typed, write_inputs, write_shapes

from fastlightgen.config import load, main
from fastlightgen.evaluate import evaluate
from fastlightgen.models.base import VideoDiT
from fastlightgen.page.advice import next_step
from fastlightgen.report import report, write_report
from fastlightgen.stages import earlier
from fastlightgen.stages.prune import Prune
from fastlightgen.train import train

QUICK = ["threads=1", "progress=false"]
FEWER = {"stage=2": ["iters=2", "batch=2"], "stage=3": ["iters=2", "batch=2", "steps=2", "critic_start=0", "ratio=1"]}


def advised(run) -> list[str]:
    """The words of the only command on the page: ["stage=2", "run=...", ...]; [] if it names none."""
    page = write_report(run).read_text()
    found = re.findall(r"<code>(python [^<]*)</code>", page)
    assert len(found) == page.count("python -m") <= 1
    return shlex.split(html.unescape(found[0])) if found else []


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("some inputs"))  # a path with a space


def cache(folder) -> str:
    write_shapes(folder, 8)
    return str(folder)


@pytest.mark.parametrize("kind", ["shapes", "cache"])
def test_the_commands_lead_from_stage_1_to_the_end(inputs, tmp_path, kind):
    run, model = tmp_path / "run", inputs[2][0]
    data = "shapes" if kind == "shapes" else cache(tmp_path / "cache")
    words = [f"data={data}", "seed=3", "clips=2", "batch=2", "timesteps=1", "ratio=0.5", *QUICK]
    run_train("stage=1", f"run={run}", model, *words)
    seen = []
    while command := advised(run):
        name, words = command[2], command[3:]
        seen.append(words[0] if name.endswith("train") else name)
        if name.endswith("train"):
            assert {f"run={run}", model, "seed=3", *[f"data={data}"] * (data != "shapes")} <= set(words)
            main(train, "train", [*words, *FEWER[words[0]], *QUICK])
        else:
            main(evaluate, "evaluate", [*words, "clips=8", "show=2", *QUICK])
        assert len(seen) < 5
    page = write_report(run).read_text()
    if kind == "shapes":
        assert seen == ["stage=2", "stage=3", "fastlightgen.evaluate"]
        assert "against the teacher in 2 steps it is not ranked: 8 clips" in page and 'id="scores"' in page
    else:
        assert seen == ["stage=2", "stage=3"] and 'id="scores"' not in page
        wanted = "The student makes a clip in 2 steps with 2 of 4 blocks. This page has no scores of it: "
        assert (
            wanted + "evaluate data=CACHE teacher=DIR out=RUN/evaluate/cache.json measures it on held-out clips."
            in page
        )


def test_a_stage_that_stopped_is_continued_by_the_command_itself(inputs, tmp_path, monkeypatch, capsys):
    """With all its settings, and no others: another configuration would be refused. The terminal shows it too."""
    run = tmp_path / "run"

    def stop(self, done):
        if done == 5:
            raise ValueError("stopped by the test")

    run_train("stage=1", f"run={run}", inputs[2][0], "clips=2", "batch=2", "timesteps=1", "ratio=0.5", *QUICK)
    words = [w for w in inputs[2] if not w.startswith("importance=")]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Prune, "check", stop)
        run_train("stage=2", f"run={run}", *words, "sample_every=0", "lr_schedule=cosine")
    assert "Stage 2 is not finished: step 3 of 7 is saved" in write_report(run).read_text()
    command = advised(run)
    assert {"lr_schedule=cosine", "warmup=3", "iters=7", "sample_every=0"} <= set(command)
    main(report, "report", [f"run={run}"])
    assert capsys.readouterr().out.splitlines()[-1] == f"next: {shlex.join(command)}"
    torch.set_num_threads(1)
    main(train, "train", command[3:])
    assert (run / "stage2" / "model" / "config.json").is_file()


def test_a_stage_1_that_stopped_says_how_far_it_is(inputs, tmp_path, monkeypatch, capsys):
    """4 clips in batches of 2 at one time: a signal in the first walk leaves 2 x 5 of 4 x 5 scores."""
    run, walk = tmp_path / "run", VideoDiT.walk

    def strike(self, *given):
        os.kill(os.getpid(), signal.SIGINT)
        return walk(self, *given)

    words = [f"run={run}", inputs[2][0], "clips=4", "batch=2", "timesteps=1", *QUICK]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(VideoDiT, "walk", strike)
        run_train("stage=1", *words)
    assert "Stage 1 is not finished: 10 of 20 scores of single blocks are measured" in write_report(run).read_text()
    assert advised(run)[3] == "stage=1"
    capsys.readouterr()
    two = load(["stage=2", *words[:2], "earlier=run", *QUICK])
    (one,) = earlier.missing(two)
    assert earlier.left(one) == 0.5 and earlier.left(two) == earlier.left(replace(one, overwrite=True)) == 1


def test_a_student_that_nobody_can_score_is_exported(tmp_path):
    (tmp_path / "stage3/model").mkdir(parents=True)
    (tmp_path / "cache").mkdir()
    record = {"stage3": {"data": str(tmp_path / "cache"), "model": "tiny", "engine": "deepspeed"}}
    text, line = next_step(tmp_path, record, False, {})
    words = [f"model={tmp_path}/stage3/model", "pipeline=PIPELINE", f"out={tmp_path}/student"]
    assert text == "" and typed(line) == ("export", words)
    text, line = next_step(tmp_path, {"stage3": record["stage3"] | {"data": "shapes"}}, True, {})
    assert text == "" and typed(line)[0] == "generate"


@pytest.mark.parametrize("change", [{"model": "/moved/away"}, {"engine": "deepspeed"}, {"batch": -1}])
def test_a_command_that_would_be_refused_is_not_shown(inputs, tmp_path, change):
    run = tmp_path / "run"
    run_train("stage=1", f"run={run}", inputs[2][0], "clips=2", "batch=2", "timesteps=1", *QUICK)
    record = yaml.safe_load((run / "config.yaml").read_text())
    (run / "stage1" / "importance.json").unlink()
    assert advised(run)[3] == "stage=1"
    record["stage1"] |= change
    (run / "config.yaml").write_text(yaml.safe_dump(record))
    assert advised(run) == [] and "Stage 1 is not finished." in (run / "report.html").read_text()

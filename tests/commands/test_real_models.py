"""Commands that meet a network for real videos, a cache, or a preset without weights: one line that says what to do."""

import subprocess
import sys

import pytest
from helpers import run_train, small_wan, write_shapes

from fastlightgen.__main__ import main as front
from fastlightgen.config import main
from fastlightgen.evaluate import evaluate
from fastlightgen.generate import generate
from fastlightgen.models.folder.weights import save_model
from fastlightgen.train import check_start, train


@pytest.fixture
def fails(capsys):
    """Run a command that must fail with exit code 2 and one line; return what it printed and the line."""

    def run(command, *words: str) -> tuple[str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            command(*words)
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
        return out, err

    return run


def test_all_stages_on_a_cache_end_with_a_report(tmp_path, capsys):
    """It evaluates nothing, says so before Stage I, and ends well."""
    write_shapes(tmp_path / "cache", 12)
    folder = save_model(small_wan(), tmp_path / "teacher", steps=2, guidance=2.0, shift=3.0)
    words = ["stage=all", f"run={tmp_path}/run", f"model={folder}", f"data={tmp_path}/cache", "progress=false"]
    words += ["threads=1", "stage1.clips=2", "stage1.batch=2", "stage1.timesteps=1", "stage1.ratio=0.5"]
    words += ["stage2.iters=2", "stage2.batch=2", "stage3.iters=2", "stage3.batch=2", "stage3.critic_start=0"]
    run_train(*words)
    out = capsys.readouterr().out
    said = f"data={tmp_path}/cache: no evaluation at the end: `evaluate data=` measures"
    assert said in out and out.index(said) < out.index("stage 1: keeps blocks")
    assert f"report: {tmp_path}/run/report.html" in out and (tmp_path / "run/report.html").is_file()
    assert (tmp_path / "run/stage3/model/config.json").is_file() and not (tmp_path / "run/evaluate").exists()


@pytest.mark.parametrize("kind", ["wan_t2v", "hunyuan_i2v"])
def test_a_real_network_without_data(pipeline, tmp_path, fails, kind):
    out, line = fails(run_train, "stage=1", f"run={tmp_path}/run", f"model={pipeline(kind)}")
    assert "data=shapes: is the toy's data, with latents of 12 channels; this network has 16. Encode videos" in line
    assert "python -m fastlightgen.encode videos=FOLDER pipeline=FOLDER out=CACHE) and give data=CACHE" in line
    assert "planned" not in out  # before anything is planned or read


@pytest.mark.parametrize("start", ["front", "module"])
def test_a_dry_run_warns_of_what_stops_the_start(start, pipeline, tmp_path, capsys):
    """The configuration on stdout, the refusal of the test above on stderr; the toy's own start is not refused."""

    def dry(*words: str) -> tuple[str, str]:
        words = (*words, f"run={tmp_path}/run", "dry_run=true")
        front(["train", *words]) if start == "front" else main(train, "train", words, check=check_start)
        said = capsys.readouterr()
        assert f"\nrun: {tmp_path}/run\n" in said.out and not (tmp_path / "run").exists()
        return said.err

    refused = dry("stage=1", f"model={pipeline('wan_t2v')}")
    assert refused.startswith("warning: this would stop at once: data=shapes: is the toy's data, with latents of 12")
    assert refused.count("\n") == 1
    assert "stage2.method=icmd: leaves the pruned network alone" in dry("stage=all", "stage2.method=icmd")
    assert dry("stage=1") == dry("stage=all") == ""


def test_a_real_network_without_pipeline(pipeline, tmp_path, fails):
    def run(*words: str) -> None:
        main(generate, "generate", words)

    model = pipeline("wan_t2v") / "transformer"
    _, line = fails(run, f"model={model}", "prompt=A cat runs.", f"out={tmp_path}/a.png")
    assert line.startswith(f"error: pipeline is required: model={model} makes latents of real videos; give pipeline=")

    def measure(*words: str) -> None:
        main(evaluate, "evaluate", words)

    _, line = fails(measure, f"model={model}", f"out={tmp_path}/a.json")
    assert f"model={model}: makes latents of real videos, and data=shapes is the toy's data; give data=CACHE" in line


@pytest.mark.parametrize("stage", ["all", "1", "2"])
def test_a_preset_without_weights(tmp_path, fails, stage):
    """One line with a command that exists; the same line is not printed once for each later stage."""
    words = [] if stage != "2" else [f"importance={tmp_path}/none.json"]
    out, line = fails(run_train, f"stage={stage}", f"run={tmp_path}/run", "model=tiny-hunyuan", *words)
    made = "stage=0 model=tiny-hunyuan run=runs/tiny-hunyuan-teacher"
    assert f"this preset has no weights here; make them with: python -m fastlightgen.train {made}; " in line
    assert "then give model=runs/tiny-hunyuan-teacher/stage0/model" in line and "no weights" not in out
    command = [sys.executable, "-m", "fastlightgen.train", *made.split(), "dry_run=true"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "model: tiny-hunyuan" in done.stdout


@pytest.mark.parametrize("stage", ["1", "3"])
def test_a_real_preset_without_weights(tmp_path, fails, stage):
    """Stage III does not name the commands of earlier stages first, which would be refused."""
    _, line = fails(run_train, f"stage={stage}", f"run={tmp_path}/run", "model=wan2.1-t2v-1.3b")
    wanted = "model=wan2.1-t2v-1.3b: this preset has no weights here; download them: hf download "
    name = "Wan2.1-T2V-1.3B-Diffusers"
    assert f"{wanted}Wan-AI/{name} --local-dir {name}; then give model={name}" in line

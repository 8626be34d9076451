"""Every command that writes, on small inputs, and what of its outcome must not depend on an interruption."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import numbered, result, run_train, small_wan, write_inputs, write_video
from PIL import Image
from runs import make_run
from safetensors.torch import load_file
from students import make_student

from fastlightgen import encode as encoding
from fastlightgen.config import main
from fastlightgen.evaluate import evaluate
from fastlightgen.export import export
from fastlightgen.generate import generate
from fastlightgen.models.folder.weights import save_model
from fastlightgen.pipelines.encoders import Encoders
from fastlightgen.report import report
from fastlightgen.world.score import reference
from fastlightgen.world.shapes import WORLD as VERSION

Case = tuple[Callable[[], None], Callable[[Path], Any]]


def tensors(folder: Path) -> dict[str, Any]:
    return {str(f.relative_to(folder)): load_file(f) for f in sorted(folder.rglob("*.safetensors"))}


def texts(folder: Path, *patterns: str) -> dict[str, str]:
    return {str(f.relative_to(folder)): f.read_text() for p in patterns for f in sorted(folder.rglob(p))}


def small(folder: Path) -> list[str]:
    """A small model of the built-in world, as words of a command."""
    model = save_model(small_wan(), folder / "small", stage=0, steps=2, guidance=2.0, shift=3.0, world=VERSION)
    return [f"model={model}", "threads=1", "progress=false"]


def picture(path: Path) -> list:
    return np.asarray(Image.open(path)).tolist()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[int, list[str]]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name in ("a", "b", "c"):
        write_video(folder / f"{name}.mp4", numbered(12), 10)
        (folder / f"{name}.txt").write_text("a cat")
    return folder


@pytest.fixture
def case(request, inputs, videos, pipeline, tmp_path, monkeypatch):
    """The command, and what of its outcome must not depend on crashes; both take a folder."""
    name = request.param
    if name.startswith("stage"):
        stage = int(name[-1])
        words = inputs.get(stage, [*inputs[0][:-1], "clips=4", "batch=2", "timesteps=2"] if stage == 1 else [])
        if stage == 1:
            words = [w for w in words if w.partition("=")[0] not in ("iters", "save_every", "log_every", "init")]

        def ranked(run: Path) -> Any:
            return json.loads((run / "stage1" / "importance.json").read_text())

        return lambda run: run_train(f"stage={stage}", f"run={run}", *words), (
            ranked if stage == 1 else lambda run: result(run, stage)
        )
    if name == "encode":
        encoders = Encoders(pipeline("wan_i2v"))  # once, before the forks
        monkeypatch.setattr(encoding, "load_encoders", lambda cfg, rank: encoders)
        words = [f"videos={videos}", f"pipeline={pipeline('wan_i2v')}", "buckets=32x48", "frames=5", "fps=10"]
        words += ["shard=2", "workers=0", "progress=false", "threads=1"]
        return lambda out: main(
            encoding.encode, "encode", [f"out={out}", *words]
        ), lambda out: tensors(out) | texts(out, "*.json")
    if name == "export":
        model = make_student(pipeline("wan_t2v"), tmp_path / "student")
        words = [f"model={model}", f"pipeline={pipeline('wan_t2v')}", "dtype=float32", "threads=1", "progress=false"]
        return lambda out: main(
            export, "export", [*words, f"out={out}"]
        ), lambda out: tensors(out) | texts(out, "*.json", "*.txt")
    if name == "generate":
        words = [*small(tmp_path), "prompt=a red ball moves right fast then stops", "steps=1"]
        return lambda out: main(generate, "generate", [*words, f"out={out}.png"]), lambda out: picture(
            out.with_suffix(".png")
        )
    if name == "evaluate":
        words = [*small(tmp_path), "clips=2", "noises=1", "steps=1", "show=1", "batch=2"]
        reference(0)  # measured once here, not in every fork
        return lambda out: main(evaluate, "evaluate", [*words, f"out={out}/m.json"]), lambda out: str(
            {k: v for k, v in json.loads((out / "m.json").read_text()).items() if k in ("scores", "clips")}
        )  # as text: a score of two clips may be nan
    run = make_run(tmp_path / "run")
    return lambda out: main(report, "report", [f"run={run}", f"out={out}.html"]), lambda out: out.with_suffix(
        ".html"
    ).read_text()

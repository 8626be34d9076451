"""model=tiny-ti2v, Wan2.2 TI2V's network on the built-in world, from random weights to the report."""

import json

import numpy as np
import pytest
import torch
from helpers import tiny_run
from PIL import Image
from safetensors.torch import load_file

from fastlightgen.config import main
from fastlightgen.generate import generate
from fastlightgen.models.families import family_of
from fastlightgen.models.folder.weights import load_model
from fastlightgen.world.shapes import Shapes


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("run"), "tiny-ti2v", 0.3)


def test_all_stages(run):
    ranking = json.loads((run / "stage1/importance.json").read_text())
    card = json.loads((run / "stage3/model/fastlightgen.json").read_text())
    assert card["family"] == "wan-ti2v" and card["kept_blocks"] == ranking["kept"] and len(ranking["pruned"]) == 4
    losses = [json.loads(line)["loss"] for line in (run / "stage2/metrics.jsonl").read_text().splitlines()]
    assert losses and all(0 < loss < 100 for loss in losses)


@torch.no_grad()
def test_stock_diffusers_runs_the_student(run):
    theirs = pytest.importorskip("diffusers").WanTransformer3DModel
    folder = run / "stage3/model"
    net, found = theirs.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()) and len(net.blocks) == 8
    ours = load_model(folder)
    x_t, t, cond, _ = ours.example_inputs(2)
    v = net.eval()(**family_of(ours.config).stock_inputs(ours.cfg, x_t, t, cond), return_dict=False)[0]
    torch.testing.assert_close(ours(x_t, t, cond)[:, :, 1:], v[:, :, 1:], rtol=0, atol=1e-5)
    assert load_file(folder / "diffusion_pytorch_model.safetensors").keys() == ours.state_dict().keys()


def test_the_student_makes_clips_from_a_picture(run, tmp_path):
    clip = Shapes().batch(range(1)).video[0, 0]  # [3, 20, 20]
    pixels = (clip.permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "first.png")
    words = [f"model={run / 'stage3/model'}", "prompt=a red ball moves right", "threads=1", "progress=false"]
    main(generate, "generate", [*words, f"image={tmp_path / 'first.png'}", f"out={tmp_path / 'a.png'}"])
    frame = np.asarray(Image.open(tmp_path / "a.png"))[::16, : 16 * 20 : 16].astype(int)  # enlarged 16 times
    assert np.abs(frame - pixels).max() <= 1

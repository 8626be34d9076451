"""model=tiny-hunyuan15, HunyuanVideo-1.5's class on the built-in world, from random weights to the report."""

import json

import pytest
import torch
from helpers import tiny_run

from fastlightgen.config import main
from fastlightgen.export import export
from fastlightgen.generate import generate
from fastlightgen.models.families import family_of
from fastlightgen.models.folder.weights import load_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("run"), "tiny-hunyuan15", 0.34)


def test_all_stages(run):
    ranking = json.loads((run / "stage1/importance.json").read_text())
    card = json.loads((run / "stage3/model/fastlightgen.json").read_text())
    assert card["family"] == "hunyuan15" and card["kept_blocks"] == ranking["kept"] and len(ranking["pruned"]) == 2
    losses = [json.loads(line)["loss"] for line in (run / "stage2/metrics.jsonl").read_text().splitlines()]
    assert losses and all(0 < loss < 100 for loss in losses)


@torch.no_grad()
def test_stock_diffusers_runs_the_student(run):
    theirs = pytest.importorskip("diffusers").HunyuanVideo15Transformer3DModel
    folder = run / "stage3/model"
    net, found = theirs.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()) and len(net.transformer_blocks) == 4
    ours = load_model(folder)
    x_t, t, cond, _ = ours.example_inputs(2)
    v = net.eval()(**family_of(ours.config).stock_inputs(ours.cfg, x_t, t, cond), return_dict=False)[0]
    torch.testing.assert_close(ours(x_t, t, cond), v, rtol=0, atol=1e-5)


def test_the_onnx_folder_makes_clips(run, tmp_path):
    """Its inputs are those that the world has: a sentence, and no quoted words."""
    pytest.importorskip("onnxruntime")
    words = [f"model={run / 'stage3/model'}", "to=onnx", f"out={tmp_path / 'o'}", "threads=1"]
    main(export, "export", words)
    card = json.loads((tmp_path / "o/fastlightgen.json").read_text())
    assert card["inputs"].keys() == {"text", "text_len"}


def test_the_student_makes_clips(run, tmp_path):
    words = [f"model={run / 'stage3/model'}", "prompt=a red ball moves right", f"out={tmp_path / 'a.png'}"]
    main(generate, "generate", [*words, "threads=1", "progress=false"])
    assert (tmp_path / "a.png").stat().st_size > 1000

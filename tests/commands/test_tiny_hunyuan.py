"""model=tiny-hunyuan, HunyuanVideo's class on the built-in world, from random weights to the report."""

import json

import pytest
import torch
from helpers import run_train
from safetensors.torch import load_file

from fastlightgen.config import main
from fastlightgen.generate import generate
from fastlightgen.models.folder.weights import load_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("hunyuan")
    common = ["progress=false", "threads=1", "log_every=1"]
    run_train("stage=0", f"run={root / 'teacher'}", "model=tiny-hunyuan", "iters=2", "batch=2", *common)
    words = ["stage=all", f"run={root / 'run'}", f"model={root / 'teacher/stage0/model'}", *common]
    words += ["stage1.clips=2", "stage1.batch=2", "stage1.timesteps=1", "stage1.units=per_list"]
    words += [
        "stage2.iters=2",
        "stage2.batch=2",
        "stage2.checkpointing=true",
        "stage3.iters=2",
        "stage3.batch=2",
        "stage3.critic_start=0",
    ]
    words += ["stage3.steps=2", "stage3.ratio=1", "evaluate.clips=8", "evaluate.batch=8", "evaluate.show=2"]
    run_train(*words, "evaluate.steps=2")
    return root / "run"


def test_all_stages(run):
    ranking = json.loads((run / "stage1/importance.json").read_text())
    dropped = [ranking["units"][i]["name"].split(".")[0] for i in ranking["pruned"]]
    assert dropped.count("double") == 1 and dropped.count("single") == 2  # 30% of 3 and of 6
    card = json.loads((run / "stage3/model/fastlightgen.json").read_text())
    assert card["family"] == "hunyuan" and card["kept_blocks"] == ranking["kept"] and card["num_blocks"] == 6
    speed = json.loads((run / "evaluate/speed.json").read_text())
    # 2 steps under guidance with 9 blocks against 2 steps with 6; a double block costs a little more for its modulation
    assert speed["theory"] == pytest.approx(2 * 9 / 6, rel=0.02) and "GFLOP" in speed["theory_formula"]
    assert (run / "report.html").stat().st_size > 10_000


@torch.no_grad()
def test_stock_diffusers_runs_the_student(run):
    theirs = pytest.importorskip("diffusers").HunyuanVideoTransformer3DModel
    folder = run / "stage3/model"
    net = theirs.from_config(theirs.load_config(folder)).eval()
    net.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    assert (len(net.transformer_blocks), len(net.single_transformer_blocks)) == (2, 4)
    ours = load_model(folder)
    x_t, t, cond, _ = ours.example_inputs(2)
    mask = (torch.arange(16) < cond.text_len[:, None]).long()
    v = net(torch.cat([x_t, cond.image], 1), 1000 * t, cond.text, mask, cond.pooled, return_dict=False)[0]
    torch.testing.assert_close(ours(x_t, t, cond), v, rtol=0, atol=1e-5)


def test_the_student_makes_clips(run, tmp_path):
    words = [f"model={run / 'stage3/model'}", "prompt=a red ball moves right", "count=2", "threads=1"]
    for name in ("a.png", "b.png"):
        main(generate, "generate", [*words, f"out={tmp_path / name}"])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_lora_critic(run):
    """The critic as adapters on the linear layers of both kinds of blocks."""
    words = ["stage=3", f"run={run.parent / 'lora'}", f"stage2_model={run / 'stage2/model'}", "fake_mode=lora"]
    words += [
        f"model={run.parent / 'teacher/stage0/model'}",
        "iters=1",
        "batch=1",
        "ratio=1",
        "steps=1",
        "threads=1",
        "critic_start=0",
    ]
    run_train(*words, "progress=false")
    assert (run.parent / "lora/stage3/model/config.json").is_file()

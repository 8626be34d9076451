"""model=tiny-a14b, two experts on the built-in world, from random weights to a clip of both students."""

import json

import pytest
from helpers import run_train
from safetensors.torch import load_file

from fastlightgen.config import main
from fastlightgen.generate import generate
from fastlightgen.models.folder.weights import read_card

LADDER = [1.0, 0.9, 0.75, 0.5]  # four steps with shift 3; the boundary is 0.875


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("a14b")
    common = ["progress=false", "threads=1", "batch=2"]
    run_train("stage=0", f"run={root / 'teacher'}", "model=tiny-a14b", "iters=1", *common)
    common += [f"run={root / 'run'}", f"model={root / 'teacher/stage0/model'}"]
    run_train("stage=1", "clips=2", "timesteps=1", *common)
    run_train("stage=2", "iters=1", *common)
    run_train("stage=3", "iters=2", "critic_start=0", "steps=4", "ratio=1", "sample_every=2", *common)
    return root / "run"


def test_both_experts_run_all_stages(run):
    for expert in ("high", "low"):
        ranking = json.loads((run / expert / "stage1/importance.json").read_text())
        card = read_card(run / "stage3/model" / expert)
        assert (card["expert"], card["boundary"]) == (expert, 0.875) and card["ladder"] == pytest.approx(LADDER)
        assert card["kept_blocks"] == ranking["kept"] and len(card["kept_blocks"]) == 8
    weights = [load_file(run / e / "stage3/model/diffusion_pytorch_model.safetensors") for e in ("high", "low")]
    assert not weights[0]["proj_out.bias"].equal(weights[1]["proj_out.bias"])
    # Clips take both students, so that only the second one shows some.
    assert not (run / "high/stage3/samples").exists() and (run / "low/stage3/samples/step-000002.gif").is_file()


def test_each_update_leaves_the_ladder_at_an_own_rung(run):
    for expert, own in (("high", {1, 2}), ("low", {3, 4})):
        lines = [json.loads(line) for line in (run / expert / "stage3/metrics.jsonl").read_text().splitlines()]
        found = {int(key[-1]) for line in lines for key in line if "x0_gap_rung" in key}
        assert found and found <= own


def test_the_students_make_a_clip_together(run, tmp_path, capsys):
    words = ["prompt=a red ball moves right", f"out={tmp_path / 'a.png'}", "threads=1", "progress=false"]
    main(generate, "generate", [f"model={run / 'stage3/model'}", *words])
    assert " 4 steps, guidance 1; " in capsys.readouterr().out and (tmp_path / "a.png").is_file()

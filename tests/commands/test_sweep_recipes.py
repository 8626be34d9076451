"""A sweep with recipes: whose settings win, which method takes a key, and models that no sweep can train."""

from pathlib import Path

import pytest
from helpers import NETWORK, build, small_wan

from fastlightgen import sweep
from fastlightgen.config import ConfigError
from fastlightgen.models.folder.weights import save_model
from fastlightgen.sweeps.points import points_of, unique


def recipe(file: Path, *lines: str) -> str:
    file.write_text("\n".join(["data: shapes", *lines]))
    return str(file)


def test_a_recipe_gives_the_model_and_settings_of_every_stage(tmp_path):
    """Lists of the command line stand over it, and a key for all stages over its keys for one."""
    save_model(small_wan(), tmp_path / "model")
    lines = [f"model: {tmp_path}/model", "threads: 1", "seed: 5", "run: elsewhere", "stage2: {iters: 3, lr: 1e-4}"]
    file = recipe(tmp_path / "a.yaml", *lines, "stage3: {iters: 25, critic_start: 20, steps: 3, lr: 3e-4}")
    points = points_of(tmp_path / "run", {"config": [file], "steps": ["2", "4"], "lr": ["1e-3"]}, [0], 64)
    assert [point.name for point in points] == ["steps=2", "steps=4"] and len(unique(points)) == 4
    for point, steps in zip(points, (2, 4), strict=True):
        _, second, third = point.parts
        assert (second.cfg.iters, second.cfg.lr) == (3, 1e-3)
        assert (third.cfg.iters, third.cfg.steps, third.cfg.lr, third.cfg.seed) == (25, steps, 1e-3, 0)
        assert {part.cfg.model for part in point.parts} == {point.start} == {f"{tmp_path}/model"}
        assert point.where == ("threads=1",)
        assert not [
            w for part in point.parts for w in part.words if w.startswith("config=")
        ]  # later edits are harmless
    other = recipe(tmp_path / "b.yaml", "model: tiny", "stage3: {critic_start: 20, iters: 25}")
    points = points_of(tmp_path / "run", {"config": [file, other]}, [0], 64)
    assert [point.start for point in points] == [f"{tmp_path}/model", "tiny"]


def test_the_method_of_a_recipe_and_of_the_command_line(tmp_path):
    """A recipe's method decides which stage takes a key; another method leaves out what it lacks."""
    file = recipe(tmp_path / "a.yaml", "stage3: {method: lcm}")
    assert [
        p.parts[-1].cfg.points for p in points_of(tmp_path, {"config": [file], "points": ["25", "50"]}, [0], 64)
    ] == [
        25,
        50,
    ]
    shipped = {"config": ["wan2.1-1.3b-1x80gb"], "model": ["tiny"], "data": ["shapes"]}  # it has rollouts, LCM has not
    ours, lcm = points_of(tmp_path, shipped | {"method": ["fastlightgen", "lcm"]}, [0], 64)
    assert (ours.parts[-1].cfg.rollouts, ours.parts[-1].cfg.iters) == ("shared", 2000)
    assert lcm.parts[-1].cfg.iters == 2000 and not hasattr(lcm.parts[-1].cfg, "rollouts")


def test_two_experts_are_refused(tmp_path):
    for name in ("high", "low"):
        save_model(small_wan(), tmp_path / "model" / name)
    with pytest.raises(ConfigError, match="model: has two experts; a sweep distils one network"):
        points_of(tmp_path, {"model": [f"{tmp_path}/model"]}, [0], 64)


def test_a_network_for_other_latents_is_refused(tmp_path):
    """Before anything is measured or trained: a released model, and no data=."""
    channels = {"in_channels": 16, "out_channels": 16}
    save_model(build(NETWORK | channels, seed=0), tmp_path / "model")
    with pytest.raises(ValueError, match="data=shapes: is the toy's data, with latents of"):
        sweep.sweep([f"run={tmp_path}/run", f"model={tmp_path}/model", "steps=2,4", "dry_run=true"])

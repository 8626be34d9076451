"""fp8=frozen in every method: what it changes in a step, the planned bytes, and the errors that users see."""

import math

import pytest
import torch
from helpers import KEPT, assert_same, result, run_train, write_ranking
from method_cases import built, networks, planned

from fastlightgen import train as command
from fastlightgen.config import ConfigError, another_stage, load, main, plan_root
from fastlightgen.engine.folder import StageFolder
from fastlightgen.engine.log import read_metrics
from fastlightgen.models.float8 import Float8Linear
from fastlightgen.models.folder.networks import config_of
from fastlightgen.ops import float8
from fastlightgen.plan import plan
from fastlightgen.planner.budget import budget, load_network

CRITIC = ["ratio=2", "lr_fake=1e-3", "critic_start=0"]
METHODS = {
    "fastlightgen": CRITIC,
    "fastlightgen, adapters": [*CRITIC, "fake_mode=lora", "lora_rank=2"],
    "fastlightgen, shared, original": [*CRITIC, "rollouts=shared", "strong=original", "checkpointing=true"],
    "regression": [],
    "dmd2": [*CRITIC, "checkpointing=true"],
    "lcm": ["target=ema"],
    "magicdistillation": [*CRITIC, "lora_rank=2"],
}
CASES = [("wan", name) for name in METHODS] + [("hunyuan", "fastlightgen, adapters"), ("hunyuan", "dmd2")]


def stage_of(models: list[str], name: str, *more: str):
    return built(*models, f"method={name.split(',')[0]}", *METHODS[name], *more)


@pytest.fixture
def in_8_bits(monkeypatch) -> list[bool]:
    """For each product in float8: whether anything of it may carry gradient."""
    seen: list[bool] = []
    own = float8.linear

    def noted(x, *rest):
        seen.append(torch.is_grad_enabled())
        return own(x, *rest)

    monkeypatch.setattr(float8, "linear", noted)
    return seen


@pytest.mark.parametrize("family, name", CASES)
def test_an_iteration_has_float8_without_gradient_alone(name, family, request, in_8_bits):
    models = request.getfixturevalue(family)
    losses = []
    for more in ([], ["fp8=frozen"]):
        stage = stage_of(models, name, *more)
        before = len(in_8_bits)
        losses.append([])
        for update in stage.updates(0):
            loss, _ = update.loss()
            loss.backward()
            losses[-1].append(loss.item())
        assert (len(in_8_bits) > before) == bool(more)
    assert not any(in_8_bits)
    plain, changed = losses
    assert plain != changed and all(map(math.isfinite, changed))
    assert changed == pytest.approx(plain, rel=0.2)


@pytest.mark.parametrize("family, name", CASES)
def test_the_planner_counts_the_bytes_of_real_networks(name, family, request):
    stage = stage_of(request.getfixturevalue(family), name, "fp8=frozen")
    keep = KEPT if family == "wan" else [0, 2, 3]
    assert planned(stage, keep).float8 == bytes_held(stage) > 0
    stage.cfg.fp8 = "off"
    assert planned(stage, keep).float8 == 0


def bytes_held(stage) -> int:
    """Bytes of the float8 copies in all networks of a stage."""
    held = 0
    for net in networks(stage):
        for m in net.modules():
            if isinstance(m, Float8Linear):
                weight, scale = m.quantised()
                held += weight.nbytes + scale.nbytes
    return held


def test_a_width_pruned_student(wan, tmp_path, in_8_bits):
    """Two steps, the first of which aligns: the teacher predicts in float8, and so does the measured network."""
    words = ["stage=2", "method=lightning", wan[0], f"importance={write_ranking(tmp_path / 'importance.json')}"]
    words += ["student=pruned", "prune_heads=1", "clips=2", "align_every=1", "warmup=0", "shift=3", "fp8=frozen"]
    stage = built(*words, f"run={tmp_path / 'built'}")
    assert planned(stage).float8 == bytes_held(stage) > 0
    in_8_bits.clear()
    run_train(*words, f"run={tmp_path}", "iters=2", "batch=2", "log_every=1", "progress=false", "threads=1")
    assert in_8_bits and not any(in_8_bits)
    lines = read_metrics(tmp_path / "stage2/metrics.jsonl")
    assert len(lines) == 2 and all(math.isfinite(line["loss"]) for line in lines)


def planned_parts(*words: str) -> dict[str, float]:
    """Bytes of a planned Stage III, by part."""
    given = {"stage": "3", "model": "wan2.1-t2v-1.3b", "engine": "deepspeed"} | dict(w.split("=", 1) for w in words)
    cfg = load([f"{k}={v}" for k, v in given.items()], "plan")
    return budget(load_network(config_of(cfg.model), "480x832x81", 0), cfg).gpu


def test_the_plan_has_the_bytes_unless_the_weights_are_sharded():
    """Wan 1.3B: 30 blocks of 8 x 1536^2 + 2 x 1536 x 8960 weights; the teacher, and 21 blocks of student and critic."""
    off, frozen = planned_parts("zero=2"), planned_parts("zero=2", "fp8=frozen")
    weights, outputs = 8 * 1536**2 + 2 * 1536 * 8960, 9 * 1536 + 8960
    assert frozen.pop("float8 weights") == (30 + 21 + 21) * (weights + 4 * outputs)
    assert frozen == off and planned_parts("zero=3", "fp8=frozen") == planned_parts("zero=3")


def test_the_plan_claims_no_speed(capsys):
    out = []
    for fp8 in ("off", "frozen"):
        plan(load(["stage=3", "model=wan2.1-t2v-1.3b", f"fp8={fp8}"], "plan"))
        out.append(capsys.readouterr().out.splitlines())
    note = "  fp8=frozen: no gain is counted, because none was measured"
    assert note in out[1] and [line for line in out[1] if line.startswith("  time ")] == [
        line for line in out[0] if line.startswith("  time ")
    ]


@pytest.mark.parametrize(
    "words, error",
    [
        (["stage=3", "run=r", "fp8=on"], "fp8=on: wanted one of off, frozen"),
        (["stage=0", "run=r", "fp8=frozen"], "fp8=frozen: stage=0 has gradients in all its predictions but clips"),
    ],
)
def test_a_bad_value_is_one_line(words, error):
    with pytest.raises(ConfigError) as stop:
        load(words)
    assert str(stop.value).startswith(error) and "\n" not in str(stop.value)


@pytest.mark.parametrize("words", [["gpu=a100"], ["gpu=mi300x"], ["gpu=h100", "dtype=float32"]], ids=" ".join)
def test_a_plan_for_a_gpu_without_it(words):
    with pytest.raises(ConfigError, match="^fp8=frozen: needs dtype=bfloat16 and a GPU with float8 products") as stop:
        load(["stage=3", "fp8=frozen", *words], "plan")
    assert "\n" not in str(stop.value)


def test_a_table_of_plans_leaves_it_out_of_stage_0():
    cfg = plan_root("3")(fp8="frozen")
    assert another_stage(cfg, "0").fp8 == "off" and another_stage(cfg, "2").fp8 == "frozen"


def test_a_gpu_without_it_stops_the_command_with_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(float8, "refusal", lambda device, dtype: "this GPU is sm_80")
    with pytest.raises(SystemExit) as stop:
        main(command.train, "train", ["stage=1", f"run={tmp_path}", "fp8=frozen", "progress=false"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: fp8=frozen: this GPU is sm_80; use fp8=off\n"


def test_stage_2_as_a_command(wan, tmp_path):
    """A run that stops half way and goes on has the bits of one that does not, with an averaged target in float8."""
    ranking = write_ranking(tmp_path / "importance.json")
    words = ["stage=2", wan[0], f"importance={ranking}", "batch=2", "shift=3", "progress=false", "threads=1"]
    words += ["fp8=frozen", "target=ema", "target_decay=0.5", "lr=1e-3", "warmup=1", "save_every=2", "log_every=1"]
    run_train(*words, f"run={tmp_path / 'whole'}", "iters=4", "sample_every=2")
    run_train(*words, f"run={tmp_path / 'parts'}", "iters=2", "sample_every=0")
    run_train(*words, f"run={tmp_path / 'parts'}", "iters=4", "sample_every=0")
    assert_same(result(tmp_path / "whole", 2), result(tmp_path / "parts", 2))


def test_a_folder_from_before_the_key_goes_on_without_float8(tmp_path):
    now = {"seed": 0, "lr": 0.1, "fp8": "off"}
    write_ranking(tmp_path / "stage1" / "importance.json")
    (tmp_path / "config.yaml").write_text("stage1: {seed: 0, lr: 0.1}\n")
    folder = StageFolder(str(tmp_path), 1, now, now)
    folder.close()
    assert folder.complete
    with pytest.raises(ValueError, match=r"another configuration \(fp8: off -> frozen\)"):
        StageFolder(str(tmp_path), 1, now | {"fp8": "frozen"}, now)

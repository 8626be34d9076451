"""Every method with two experts: the times of all predictions lie in the range of the network that makes them."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import KEPT, error_line, run_train, small_wan, write_ranking
from method_cases import built, configured, networks

from fastlightgen.config import method_for, preset
from fastlightgen.flow import ladder
from fastlightgen.methods import lcm
from fastlightgen.models.families import network
from fastlightgen.models.folder.weights import load_model, read_card, save_model
from fastlightgen.planner.walk import Route
from fastlightgen.stages import rival
from fastlightgen.stages.build import Builder
from fastlightgen.stages.experts import rollout_walks
from fastlightgen.world.shapes import WORLD

BOUNDARY, SHIFT = 0.8, 3.0
TIMES = ladder(4, SHIFT)  # 1, .9, .75, .5
RANGES = {"high": (BOUNDARY, 1.0), "low": (0.0, BOUNDARY)}
CRITIC = ["ratio=1", "critic_start=0", "count=generator"]
STAGE3 = {
    "fastlightgen": CRITIC,
    "dmd2": CRITIC,
    "magicdistillation": [*CRITIC, "lora_rank=2"],
    "regression": [],
    "lcm": ["points=8"],
}
STAGE2 = {
    "fastlightgen": [],
    "icmd": [],
    "lightning": ["prune_heads=1", "clips=2"],
    "f3": ["f3=head", "recover=true", "clips=2", "timesteps=2"],
}
PAIRS = [(method, expert) for method in STAGE3 for expert in RANGES if (method, expert) != ("lcm", "high")]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Teachers, models of Stage II and a student of the high-noise expert; each expert has weights of its own."""
    root = tmp_path_factory.mktemp("experts")
    for seed, name in enumerate(RANGES):
        card = {"expert": name, "boundary": BOUNDARY, "shift": SHIFT, "world": WORLD}
        save_model(small_wan(seed=seed), root / "teacher" / name, stage=0, guidance=2.0, **card)
        save_model(small_wan(seed=2 + seed), root / "stage2" / name, stage=2, pruned_path=KEPT, guidance=1.0, **card)
    card = {"expert": "high", "boundary": BOUNDARY, "shift": SHIFT, "ladder": TIMES, "sampler": "stochastic"}
    card["world"] = WORLD
    save_model(small_wan(seed=4).prune(KEPT), root / "partner", stage=3, **card)
    return root


def words(root: Path, method: str, expert: str, stage: int = 3) -> list[str]:
    given = [f"stage={stage}", f"method={method}", f"expert={expert}", f"boundary={BOUNDARY}", f"shift={SHIFT}"]
    given += [f"model={root / 'teacher' / expert}", *(STAGE3 if stage == 3 else STAGE2)[method]]
    if stage == 3:
        given += [f"stage2_model={root / 'stage2' / expert}", "steps=4"]
        given += [f"partner={root / 'partner'}"] * (expert == "low")
    return given


def watch(nets) -> dict[int, list[torch.Tensor]]:
    """The times at which each network predicts from now on."""
    seen: dict[int, list[torch.Tensor]] = {id(net): [] for net in nets}
    for net in nets:
        net._walk = partial(noted, net._walk, seen[id(net)])
    return seen


def noted(walk, own: list[torch.Tensor], x_t, t, streams):
    own.append(torch.as_tensor(t, dtype=torch.float64).flatten())
    return walk(x_t, t, streams)


ADAPTERS = [("fastlightgen", "high"), ("fastlightgen", "low"), ("dmd2", "low")]


@pytest.mark.parametrize(("method", "expert", "mode"), [(*p, "copy") for p in PAIRS] + [(*p, "lora") for p in ADAPTERS])
def test_stage_3(root, method: str, expert: str, mode: str):
    """With all weights of the student, and with adapters."""
    stage = built(*words(root, method, expert), f"student_mode={mode}")
    nets = networks(stage)
    partner = getattr(getattr(stage, "nets", None), "partner", None)
    assert (partner is not None) == (expert == "low" and "ratio=1" in STAGE3[method])
    seen = watch(nets)
    for step in range(8):
        for update in stage.updates(step):
            loss, _ = update.loss()
            assert loss.isfinite() and loss > 0
            loss.backward()
    low, high = RANGES[expert]
    for net in nets:
        times = torch.cat(seen[id(net)])
        if net is partner:
            assert set(times.tolist()) == set(TIMES[:2])
        else:
            assert low <= times.min() and times.max() <= high
            assert times.max() - times.min() >= 0.09  # the rungs are 1, .9 and .75, .5
    card = {}
    stage.save(Path("folder"), lambda net, folder, **values: card.update(values))
    assert (card["expert"], card["boundary"], card["ladder"]) == (expert, BOUNDARY, TIMES)


@pytest.mark.parametrize("method", ["dmd2", "magicdistillation"])
def test_the_planner_counts_the_partner(root, method: str):
    """Over cycles of all rungs; a student with all blocks has a partner too."""
    for student in ("pruned", "full"):
        given = words(root, method, "low")
        stage = built(*given, f"student={student}")
        partner = stage.nets.partner
        for step in range(8):
            stage.student_loss(step)
            stage.critic_loss(step)
        planned = {walk.net: walk.times for walk in rollout_walks(stage.cfg)}
        assert partner.block_calls / partner.num_blocks / 8 == planned["partner"] == 4
        net = network(stage.teacher.config, (2, 4, 4), 4, fused=False)
        iteration = method_for(stage.cfg).walks(net, KEPT, stage.cfg)
        assert len(iteration.nets["partner"].network.blocks) == len(KEPT)
        assert [w.times for w in iteration.walks if w.net == "partner" and w.routes == [Route()]] == [4]


@pytest.mark.parametrize("expert", RANGES)
@pytest.mark.parametrize("method", STAGE2)
def test_stage_2(root, method: str, expert: str, tmp_path, monkeypatch):
    """Training, and what lightning measures before it; f3 measures on clips of `evaluation_set` (test_experts.py)."""
    seen, load = [], Builder.load

    def watched(*given, **keys):
        seen.append(watch([net := load(*given, **keys)]))
        return net

    monkeypatch.setattr(Builder, "load", watched)
    given = [*words(root, method, expert, 2), f"run={tmp_path / 'run'}"]
    if method in ("fastlightgen", "icmd"):
        given.append(f"importance={write_ranking(tmp_path / 'importance.json')}")
    stage = built(*given, dtype=torch.float32)
    before = torch.cat([torch.empty(0), *(t for one in seen for own in one.values() for t in own)])
    assert bool(len(before)) == (method == "lightning")
    during = watch([net for net in networks(stage) if "_walk" not in vars(net)])
    for step in range(6):
        for update in stage.updates(step):
            update.loss()[0].backward()
    low, high = RANGES[expert]
    times = torch.cat([t for one in (*seen, during) for own in one.values() for t in own])
    assert len(times) > len(before)
    assert low <= times.min() and times.max() <= high and times.max() - times.min() > 0.1


def test_the_teacher_is_guided_as_its_release_guides_it(tmp_path):
    """wan/configs/wan_t2v_A14B.py: 4 for the high-noise expert, 3 for the low-noise one; a number given wins."""
    index = {"_class_name": "WanPipeline", "boundary_ratio": 0.875}
    for part in ("transformer", "transformer_2"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(preset("wan2.2-t2v-a14b")["network"]))
        index[part] = ["diffusers", "WanTransformer3DModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for expert, part, scale in (("high", "transformer", 4.0), ("low", "transformer_2", 3.0)):
        given = ["method=dmd2", f"model={tmp_path / part}", f"expert={expert}", "boundary=0.875"]
        assert rival.scale_of(configured(*given), small_wan(), {}) == scale
        assert rival.scale_of(configured(*given, "guidance=7"), small_wan(), {}) == 7.0


def test_lcm_takes_the_points_of_its_range():
    """By hand: of 8 steps with a shift of 3, t_4 = .75 lies below .8 and t_5 = .8333 above."""
    assert lcm.last_point(configured("method=lcm", "points=8")) == 8
    given = ["method=lcm", "expert=low", f"boundary={BOUNDARY}"]
    assert lcm.last_point(configured(*given, "points=8")) == 4
    with pytest.raises(ValueError, match="points=2: none lies below boundary=0.7; give more points"):
        lcm.last_point(configured("method=lcm", "expert=low", "boundary=0.7", "points=2"))


@pytest.mark.parametrize(
    ("method", "mode"), [("dmd2", "copy"), ("dmd2", "lora"), ("magicdistillation", "copy"), ("regression", "copy")]
)
def test_a_command_trains_both(root, tmp_path, method: str, mode: str):
    common = [f"model={root / 'teacher'}", f"stage2_model={root / 'stage2'}", f"run={tmp_path}", "batch=2", "iters=1"]
    common += ["progress=false", "threads=1", "steps=4", f"shift={SHIFT}", "stage=3", f"method={method}"]
    run_train(*common, f"student_mode={mode}", *[word for word in STAGE3[method] if "count" not in word])
    for expert in RANGES:
        card = read_card(tmp_path / "stage3/model" / expert)
        assert (card["expert"], card["ladder"], card["kept_blocks"]) == (expert, TIMES, KEPT)
        student, start = load_model(tmp_path / "stage3/model" / expert), load_model(root / "stage2" / expert)
        moved = [(p - q).abs().max() for p, q in zip(student.parameters(), start.prune(KEPT).parameters(), strict=True)]
        assert max(moved) > 0


def test_lcm_trains_the_low_noise_expert_alone(root, tmp_path, capsys):
    common = [f"model={root / 'teacher'}", f"stage2_model={root / 'stage2'}", f"run={tmp_path}", "batch=2", "iters=1"]
    common += ["progress=false", "threads=1", f"shift={SHIFT}", "stage=3", "method=lcm", "points=8"]
    said = error_line(capsys, run_train, *common)
    assert "method=lcm: not for expert=high: its estimates are anchored at t = 0, which the high-noise expert" in said
    run_train(*common, "expert=low")
    assert read_card(tmp_path / "low/stage3/model")["expert"] == "low"

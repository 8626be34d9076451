"""speed: the parts of a clip, counted operations and parameters, stock diffusers on the same tensors, the reason."""

import json
import time
from dataclasses import replace

import pytest
import torch
from helpers import counted_flops, error_line
from PIL import Image
from students import STEPS, make_pair, make_student, stock

from fastlightgen.config import main
from fastlightgen.evaluation.speed import PARTS, Clip, Subject, clocked, compared, stock_network, timed
from fastlightgen.models.families import family_of
from fastlightgen.models.folder.weights import load_model
from fastlightgen.pipelines.world import Pipeline
from fastlightgen.speed import speed

SIZE, PROMPT = (32, 48, 5), "a red ball"


@pytest.fixture(scope="module", params=["wan_i2v", "hunyuan_t2v"])
def timings(request, pipeline, tmp_path_factory):
    root, kind = tmp_path_factory.mktemp("speed"), request.param
    if kind == "wan_i2v":
        model = make_student(pipeline(kind), root / "student")
    else:
        model = pipeline(kind)
    words = [f"model={model}", f"pipeline={pipeline(kind)}", "size=32x48x5", "turns=2", "progress=false"]
    words += [f"prompt={PROMPT}"]
    words += ["threads=1", "device=cpu", f"out={root / 'speed.json'}", *["steps=2"] * (kind != "wan_i2v")]
    main(speed, "speed", words)
    return model, pipeline(kind), json.loads((root / "speed.json").read_text())


def test_the_built_in_world_has_no_pipeline(capsys):
    line = error_line(capsys, lambda *words: main(speed, "speed", words), "model=tiny")
    assert line == "error: model=tiny: the built-in world has no pipeline; `evaluate` times its models\n"


def test_counts_and_parts(timings, tmp_path):
    model, pipeline, record = timings
    own, theirs = record["records"]
    assert (own["name"], theirs["name"]) == ("model", "model, stock diffusers")
    net = load_model(model)
    steps = STEPS if own["steps"] == STEPS else 2
    assert own["evaluations"] == steps  # a student without guidance; HunyuanVideo's guidance is embedded
    # counted by torch in a prediction for the same prompt, block by block
    world = Pipeline(pipeline, torch.device("cpu"), torch.float32, "32x48x5")
    Image.new("RGB", (48, 32)).save(tmp_path / "a.png")
    wish = world.wish(PROMPT, None, str(tmp_path / "a.png") if world.encoders.from_image else "", 1)
    cond = replace(wish.cond, guidance=torch.ones(1)) if net.embeds_guidance else wish.cond
    per_block = counted_flops(net, torch.randn(wish.shape), torch.ones(1), cond)
    assert own["block_operations"] == steps * sum(per_block)
    padded = net.block_flops(torch.empty(wish.shape, device="meta"), replace(cond, text_len=None))
    assert theirs["block_operations"] == steps * sum(padded)
    parts = {n: p for n, p in stock(pipeline).components.items() if isinstance(p, torch.nn.Module)} | {"network": net}
    del parts["transformer"]
    assert own["parameters"] == {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    for r in (own, theirs):
        assert set(r["parts"]) == set(PARTS) and all(r["parts"][part]["median"] > 0 for part in PARTS[:3])
        assert r["seconds"]["low"] <= r["seconds"]["median"] <= r["seconds"]["high"]
        low, high = (sum(r["parts"][part][end] for part in PARTS) for end in ("low", "high"))
        assert low <= r["seconds"]["median"] <= high
    assert record["size"] == list(SIZE) and record["peak_memory"] > 1e8


def test_two_experts(pipeline, tmp_path):
    """Each step counts the blocks of its own expert, 3 or 2 of them; the teacher's guidance takes two predictions."""
    source, model = pipeline("a14b"), make_pair(pipeline("a14b"), tmp_path / "student")
    words = [f"model={model}", f"teacher={source}", f"pipeline={source}", "size=32x48x5", "turns=1", "progress=false"]
    main(speed, "speed", [*words, f"prompt={PROMPT}", "threads=1", "device=cpu", f"out={tmp_path / 'speed.json'}"])
    teacher, own, *theirs = json.loads((tmp_path / "speed.json").read_text())["records"]
    assert [r["name"] for r in theirs] == ["teacher, stock diffusers", "model, stock diffusers"]
    world = Pipeline(source, torch.device("cpu"), torch.float32, "32x48x5")
    wish = world.wish(PROMPT, None, "", 1)
    nets = [load_model(model / expert) for expert in ("high", "low")]
    per_block = counted_flops(nets[0], torch.randn(wish.shape), torch.ones(1), wish.cond)
    assert own["block_operations"] == (2 * 3 + 2 * 2) * per_block[0] and own["blocks"] == 5
    assert teacher["block_operations"] == teacher["steps"] * 2 * 4 * per_block[0]
    assert own["parameters"]["network"] == sum(p.numel() for net in nets for p in net.parameters())
    assert all(r["parts"]["network"]["median"] > 0 for r in (own, *theirs))
    # The stock pipeline's own scheduler places the steps: `high` has those from the boundary up.
    scheduler = stock(source).scheduler
    scheduler.set_timesteps(STEPS)
    high = sum(t >= 875 for t in scheduler.timesteps.tolist())
    padded = nets[0].block_flops(torch.empty(wish.shape, device="meta"), replace(wish.cond, text_len=None))
    assert theirs[1]["block_operations"] == (3 * high + 2 * (STEPS - high)) * padded[0] and 0 < high < STEPS


def test_stock_diffusers_gets_the_same_tensors(pipeline):
    """Its prediction differs by the order of sums; nothing is copied."""
    net = load_model(pipeline("wan_t2v"))
    theirs = stock_network(net)
    assert all(p.data_ptr() == net.get_parameter(name).data_ptr() for name, p in theirs.named_parameters())
    x_t, t, cond, _ = net.eval().example_inputs(batch=1)
    with torch.no_grad():
        inputs = family_of(net.config).stock_inputs(net.cfg, x_t, t, cond)
        torch.testing.assert_close(theirs(**inputs, return_dict=False)[0], net(x_t, t, cond), rtol=0, atol=1e-5)


def record(operations: float, **seconds: float) -> dict:
    """The record of a subject whose clips take all the same seconds."""
    parts = {part: {"median": seconds.get(part, 0.0)} for part in PARTS}
    rate = operations / seconds["network"]
    total = {"median": sum(seconds.values())}
    return {"block_operations": operations, "operations_per_second": rate, "parts": parts, "seconds": total}


def test_why_a_clip_is_not_as_much_faster_as_counted():
    """A network counted 30 times cheaper takes 100 s and 5 s; 10 s of each clip are not the network's.

    If the network were 30 times faster, a clip would take 10 + 100 / 30 s of 110: 8.25 times. It took 15 s: 7.33 times.
    """
    slow = record(3e12, network=100.0, prompt=4.0, decode=6.0)
    found = compared(slow, record(1e11, network=5.0, prompt=4.0, decode=6.0))
    assert (found["counted"], found["network"]) == (pytest.approx(30), pytest.approx(20))
    assert found["clip"] == pytest.approx(110 / 15) and found["possible"] == pytest.approx(110 / (10 + 100 / 30))
    assert "counted 30.0x, a clip 7.3x: 10 s of 15 s (67%) are text, picture, VAE and the rest" in found["reason"]
    assert "the count gives 8.2x; the network alone was 20.0x faster, at 20 against 30 GFLOP/s" in found["reason"]


def test_warm_up_and_turns():
    """One clip of each that does not count, then turns forwards and backwards."""
    order: list[str] = []
    subjects = [Subject(name, None, None, {}) for name in "ab"]

    def run(subject: Subject) -> Clip:
        order.append(subject.name)
        return Clip({"network": float(len(order))})

    timed(subjects, 3, run, bool)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert [clip.total for clip in subjects[0].clips] == [3, 6, 7]


def test_a_clocked_method_is_as_before_afterwards():
    class Owner:
        def work(self, seconds: float) -> str:
            time.sleep(seconds)
            return "done"

    owner, noted = Owner(), []
    with clocked(owner, "work", torch.device("cpu"), noted.append), clocked(owner, "none", torch.device("cpu"), len):
        assert owner.work(0.02) == owner.work(0.0) == "done"
    assert len(noted) == 2 and noted[0] >= 0.02 and "work" not in vars(owner)
    owner.work(0.0)
    assert len(noted) == 2

"""The plan command: the paper's figures, DeepSpeed's documented bytes by hand, remedies for a run that does not fit."""

import json
import re
from dataclasses import fields, replace

import pytest

from fastlightgen.config import Plan, load, main, plan_root, preset, recipe, root
from fastlightgen.config.fields import default_of
from fastlightgen.models.families import network
from fastlightgen.models.folder.networks import config_of
from fastlightgen.models.folder.original import original_config
from fastlightgen.plan import one, plan
from fastlightgen.planner.budget import PAPER as PRINTED
from fastlightgen.planner.budget import budget, load_network, paper_efficiency
from fastlightgen.planner.fit import plan_of
from fastlightgen.planner.memory import model_states
from fastlightgen.planner.step import planned_step, undropped
from fastlightgen.world.source import ShapesSource


def make(stage: str = "3", **keys) -> Plan:
    again = {} if stage == "1" else {"checkpointing": True}
    return plan_root(stage)(**{"size": "480x832x81"} | again | keys)


PAPER = make(offload="optimizer", **recipe("paper")["stage3"])  # and 16 H100, ZeRO-3: the machine's defaults
P, STUDENT = 16_394_878_784, 16_394_878_784 - 12 * 403_838_464  # parameters of the teacher and of 28 of its 40 blocks


def planned(cfg: Plan):
    return budget(load_network(preset(cfg.model)["network"], cfg.size, cfg.text_tokens), cfg)


def run(*words: str) -> None:
    main(plan, "plan", list(words))


def test_the_papers_gpu_days():
    """64 + 16 GPU-days on 16 GPUs over 4000 + 1000 iterations: one share of the peak for both stages, 8.1%.

    The paper's 86.4 s per iteration in both stages would be 7 and 12% of the peak: Stage II computes 6.1 PFLOP, Stage
    III 10.3. So with one share Stage II takes less than its 64 days here, and Stage III more than its 16.
    """
    two, three = planned(make("2", offload="optimizer", target="self")), planned(PAPER)
    assert (two.flops / 1e15, three.flops / 1e15) == (pytest.approx(6.13, abs=0.01), pytest.approx(10.27, abs=0.01))
    share = (4000 * two.flops + 1000 * three.flops) / (80 * 86400 / 16) / 989e12
    assert two.efficiency == three.efficiency == pytest.approx(share) == pytest.approx(0.0814, abs=1e-4)
    assert two.gpu_days + three.gpu_days == pytest.approx(80) and two.gpu_days < 64
    assert three.days == pytest.approx(1000 * three.flops / (share * 989e12) / 86400)
    assert planned(make("1")).efficiency == planned(make("0", gpu="4090")).efficiency == two.efficiency


def test_a_given_efficiency_divides_the_time():
    slow, fast = planned(PAPER), planned(replace(PAPER, efficiency=0.4))
    assert fast.seconds == pytest.approx(slow.seconds * paper_efficiency() / 0.4)
    assert fast.flops == slow.flops


def test_the_papers_stage_3_fits_its_gpus():
    """Wan I2V-14B, 480p, 16 x 80 GB: with AdamW in host memory as in the paper, and also without."""
    assert planned(PAPER).peak < 80e9
    assert planned(replace(PAPER, offload="none")).peak < 80e9


def test_zero_as_deepspeed_documents_it():
    """Per parameter 2 + 4 + 12 bytes; host memory 16 (18 with the weights) times 1.5 over the hosts. Roles are updated
    one after the other, so only zero=3, whose room for gradients stays, has those of both."""
    trained, everything = 2 * STUDENT, 2 * STUDENT + P
    states = ("weights", "gradients", "optimizer states")
    net = load_network(preset("wan2.1-i2v-14b")["network"], "480x832x81", 0)
    expected = {
        ("none", 1): (2 * everything, 4 * STUDENT, 12 * trained / 16),
        ("none", 2): (2 * everything, 4 * STUDENT / 16, 12 * trained / 16),
        ("none", 3): (2 * everything / 16, 4 * trained / 16, 12 * trained / 16),
        ("optimizer", 3): (2 * everything / 16, 0, 0),
        ("all", 3): (0, 0, 0),
    }
    for (offload, zero), wanted in expected.items():
        cfg = make(offload=offload, zero=zero)
        parts = model_states(planned_step(net, cfg, undropped(40, 0.3)), cfg)
        assert [parts[part] for part in states] == [pytest.approx(v) for v in wanted]
        b = planned(cfg)
        host = {"none": 0, "optimizer": 16 * trained, "all": 16 * trained + 2 * everything}[offload]
        assert sum(b.host.get(part, 0) for part in states) == pytest.approx(1.5 * host / 2)


def test_host_memory_of_what_is_read_and_written():
    """Each of a host's 8 ranks reads one tensor at a time, at most a block; random weights of Stage 0 are drawn whole.
    A checkpoint is 12 bytes per trained parameter over all hosts, and 4 more of the student with an average."""
    b = planned(make(ema=0.0))
    assert b.host["networks while they are read"] == 8 * 2 * 403_838_464
    assert b.host["a checkpoint while it is written"] == b.host_peak == 12 * 2 * STUDENT / 2
    assert planned(make()).host["a checkpoint while it is written"] == (12 * 2 + 4) * STUDENT / 2
    drawn = planned(make("0"))
    assert drawn.host["networks while they are read"] == drawn.host_peak == 8 * 2 * P
    alone = planned(make("0", engine="local", gpus=1, gpu="cpu", dtype="float32", model="wan2.1-t2v-1.3b"))
    assert alone.host["processes"] == alone.peak and alone.host_peak == alone.peak + 12 * 1_418_996_800
    assert alone.seconds == 0  # nothing is known of a CPU's speed


def test_the_parts_are_those_of_one_moment():
    """Activations are given back while gradients are made, so the peak holds one of them, and not AdamW's buffers."""
    cfg = make("0", engine="local", gpus=1, dtype="float32", model="wan2.1-t2v-1.3b", previews=False)
    b = planned(replace(cfg, checkpointing=False))
    steady = b.gpu["weights"] + b.gpu["optimizer states"] + b.gpu["buffers"]
    assert b.moment == "the start of a backward pass" and not {"gradients", "optimizer step"} & b.gpu.keys()
    assert b.peak == pytest.approx(steady + b.gpu["activations kept"] + b.gpu["one block, backward"])
    small = planned(replace(cfg, size="16x16x1"))
    assert small.moment == "an optimizer step" and "activations kept" not in small.gpu
    steady = small.gpu["weights"] + small.gpu["optimizer states"] + small.gpu["buffers"]
    assert small.peak == pytest.approx(steady + small.gpu["gradients"] + small.gpu["optimizer step"])
    # Under ZeRO-3 the room for gradients, 4 bytes of each on two GPUs, is there at every moment.
    sharded = planned(make("0", gpus=2, model="wan2.1-t2v-1.3b", size="16x16x1", dtype="float32"))
    assert sharded.moment != "a forward pass" and sharded.gpu["gradients"] == 4 * 1_418_996_800 / 2


def test_traffic_by_hand():
    """Stage 2 with its literal target: 40 gathers forward, 28 backward; bfloat16; 15 of 16 shares come from others."""
    cfg = make("2", target="self")
    b, block, outside = planned(cfg), 403_838_464, 241_340_224
    assert b.gathers == 68
    assert b.wire["weights"] == pytest.approx(2 * 15 / 16 * (68 * block + 2 * outside))
    assert b.wire["gradients"] == pytest.approx(2 * 15 / 16 * STUDENT)
    twice = planned(replace(cfg, batch=32, micro_batch=1))  # two passes of one clip on each of 16 GPUs
    assert twice.wire["weights"] == 2 * b.wire["weights"] and twice.flops == 2 * b.flops
    assert planned(replace(cfg, gpus=1)).wire == {} and planned(replace(cfg, zero=1)).gathers == 0


def test_shared_tokens_by_hand():
    """Of 8 GPUs the one with the most has 4 of 30 rows of patches, and all of the text."""
    cfg, share = make("2", target="self", batch=1), 4 / 30
    whole, b = planned(cfg), planned(replace(cfg, sequence_parallel=8))
    # Four tensors change their split around each attention: 54 forward, 28 again, 28 backward; 7 of 8 shares travel.
    hidden = 2 * 32760 * 5120 * share
    assert b.wire["attention"] == pytest.approx(4 * (54 + 28 + 28) * hidden * 7 / 8)
    # Keys and values of a block's text and image: 4 products of 769 x 5120 x 5120 in all; twice as many backward.
    text = 4 * 769 * 5120**2 * (40 + 2 * 28)
    scores = 4 * 32760**2 * 5120 * (54 + 28 + 2.5 * 28)
    estimate = text + scores / 8 + (whole.flops - text - scores) * share
    assert b.flops == pytest.approx(estimate, rel=2e-3)  # not counted here: what embeds the text, and the time
    # Kept of 769 keys and values of 28 blocks: 4 tensors in bfloat16, of them 2 in float32 inside the norms.
    kept = 28 * 769 * 5120 * (2 * 2 + 2 * 4)
    parts = [x.gpu["activations kept"] for x in (whole, b)]
    assert parts[1] == pytest.approx(kept + (parts[0] - kept) * share, rel=0.02)


def test_the_parts_of_the_activations():
    """28 hidden states of 32760 x 5120 bfloat16 numbers are 9.4 GB; attention outputs as much again for each block."""
    base, kept = planned(PAPER), planned(replace(PAPER, keep_attention=28))
    assert 9.4e9 < base.gpu["activations kept"] < 1.4 * 9.4e9
    outputs = 28 * (32760 * 5120 * 2 + 40 * 32760 * 4)
    assert kept.gpu["activations kept"] - base.gpu["activations kept"] == pytest.approx(outputs)
    assert kept.flops < base.flops < planned(replace(PAPER, strong="original")).flops
    assert planned(replace(PAPER, checkpointing=False)).gpu["activations kept"] > 10 * base.gpu["activations kept"]
    assert planned(replace(PAPER, batch=32)).gpu["activations kept"] == 2 * base.gpu["activations kept"]


def test_a_plan_has_the_keys_and_the_defaults_of_its_stage():
    """A plan is a stage's configuration on a machine: nothing is written twice, so nothing can differ."""
    differs = {"run", "model", "engine"}
    for stage in "0123":
        own, planned_ = ({f.name: default_of(f) for f in fields(cls)} for cls in (root(stage), plan_root(stage)))
        assert own.keys() <= planned_.keys()
        assert {k for k in own if own[k] != planned_[k]} == differs & own.keys()
    words = ["stage=3", "ratio=2", "beta1=1", "fake_mode=lora", "gpus=8", "sequence_parallel=2"]
    cfg = load(words, "plan")
    assert (cfg.ratio, cfg.beta1, cfg.fake_mode, cfg.groups, cfg.micro) == (2, 1.0, "lora", 4, 4)
    assert [PRINTED.stage2[1], PRINTED.stage3[1]] == [recipe("paper")[stage]["iters"] for stage in ("stage2", "stage3")]


def test_what_is_printed_adds_up_and_is_not_called_measured(capsys, tmp_path):
    run("offload=optimizer", "preset=paper", f"out={tmp_path / 'plan.json'}")
    text, record = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("memory per GPU")) + 1
    last = next(i for i, line in enumerate(lines) if "sum: the peak" in line)
    parts = [float(line[30:40]) for line in lines[first:last]]
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(float(lines[last][30:40]), abs=0.005 * len(parts))
    assert sum(record["plan"]["gpu"].values()) == pytest.approx(record["plan"]["peak"])
    assert "planned, not measured" in text and record["measured"] is False and " fits" in lines[last]
    assert "1.48 days, 23.6" in text and list(tmp_path.iterdir()) == [tmp_path / "plan.json"]


def test_changes_when_it_does_not_fit():
    """In order of cost, each on top of those before, until it fits; every line is a plan that can be asked for."""
    cfg = make("3", gpu="a100-80", zero=1, gpus=8, batch=16, checkpointing=False)
    lines, record = one(cfg)
    changes = record["changes"]
    assert any("DOES NOT FIT" in line for line in lines)
    assert [c["change"].split("=")[0] for c in changes][:3] == ["zero", "checkpointing", "micro_batch"]
    peaks = [record["plan"]["peak"], *(c["peak"] for c in changes)]
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] < 80e9 < peaks[-2]
    for change in changes:
        words = dict(w.split("=") for w in change["change"].split())
        values = {k: {"true": True, "false": False}.get(v, int(v) if v.isdecimal() else v) for k, v in words.items()}
        cfg = replace(cfg, **values)
        assert planned(cfg).peak == change["peak"]


def test_the_table_agrees_with_single_plans(capsys, tmp_path):
    """Size included: Wan I2V at 720p needs 90 GB for Stage III on 16 GPUs, which 80 GB do not hold."""
    run("table=true", "gpus=16", f"out={tmp_path / 'table.json'}")
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert {(r["model"], r["stage"]) for r in rows} >= {("wan2.1-i2v-14b", s) for s in "0123"}
    assert not any(r["model"].startswith("tiny") for r in rows)
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 2
    sizes = {"wan2.1-i2v-14b": "480x832x81", "wan2.1-i2v-14b-720p": "720x1280x81", "hunyuanvideo-t2v": "720x1280x129"}
    for name, size in sizes.items():
        record = one(load(["stage=3", f"model={name}", "gpu=h200"], "plan"))[1]
        row = next(r for r in rows if (r["model"], r["stage"]) == (name, "3"))
        assert row["size"] == record["size"] == size
        assert row["gpus"]["h200"] == row["gpus"]["h200"] | {
            "peak": record["plan"]["peak"],
            "fits": True,
            "changes": {},
        }
    with pytest.raises(SystemExit) as stop:
        run("model=wan2.1-i2v-14b-720p")
    assert stop.value.code == 1
    assert re.search(r"sum: the peak +90\.\d+   DOES NOT FIT\n", capsys.readouterr().out)


def test_all_stages_are_planned_in_turn(capsys, tmp_path):
    """Each part is the plan of its stage alone, and the last lines are their sum."""
    words = ["model=wan2.1-t2v-14b", "gpus=8", "gpu=h200", "micro_batch=1", f"out={tmp_path / 'plan.json'}"]
    alone = []
    for stage in "123":
        run(f"stage={stage}", *words, *["lr=1e-6"] * (stage == "2"))
        text = capsys.readouterr().out.split("\nin the next command, ")[0]
        alone.append((json.loads((tmp_path / "plan.json").read_text()), text))
    run("stage=all", *words, "stage2.lr=1e-6")
    out, record = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    assert record["stages"] == [one for one, _ in alone] and out.startswith("\n".join(text for _, text in alone))
    plans = [one["plan"] for one, _ in alone]
    days, peak = sum(p["seconds"] * p["iters"] / 86400 for p in plans), max(p["peak"] for p in plans)
    assert (
        f"stages 1, 2 and 3 together: {days:.2f} days, {8 * days:.1f} GPU-days; the largest peak is {peak / 1e9:.1f}"
        in out
    )
    last = out.splitlines()[-1]
    start = "next: torchrun --nproc-per-node=8 -m fastlightgen.train stage=all"
    assert last.startswith(f"{start} run=runs/wan2.1-t2v-14b model=MODEL ")
    assert " stage2.lr=1e-06 " in last and "stage3" not in last
    with pytest.raises(SystemExit) as stop:
        run("stage=all", "gpus=1", "gpu=4090")
    assert stop.value.code == 1


def test_a_model_of_the_built_in_world_is_planned_at_the_size_of_its_clips(capsys, tmp_path):
    """Its memory is the one that training prints for the same settings; in megabytes nothing is 0.00."""
    run("model=tiny", "gpu=cpu", "gpus=1", "engine=local", "stage=3", f"out={tmp_path / 'plan.json'}")
    out, record = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    trained = plan_of(load(["stage=3", "run=r"]), 1, 1, "cpu")
    clip = ShapesSource(0).largest()
    net = network(config_of("tiny"), tuple(clip.x0.shape[2:]), clip.cond.text.shape[1], fused=False)
    assert record["size"] == "20x20x8" and record["plan"]["peak"] == budget(net, trained).peak < 1e9
    assert ", MB (planned" in out and "GFLOP" in out and not re.search(r" 0\.0+\b", out)


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "wan2.1-i2v-14b", "hunyuanvideo-t2v"])
def test_a_folder_of_any_format_is_planned_as_its_preset(name, tmp_path, capsys):
    """A network of diffusers, a pipeline, an original network: every key has the preset's value, size among them."""
    network = config_of(name)
    (tmp_path / "pipe" / "transformer").mkdir(parents=True)
    (tmp_path / "pipe" / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    (tmp_path / "pipe" / "transformer" / "config.json").write_text(json.dumps(network))
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "config.json").write_text(json.dumps(original_config(network)))
    records = []
    for model in (name, tmp_path / "pipe", tmp_path / "pipe" / "transformer", tmp_path / "original"):
        run(f"model={model}", "stage=2", "gpu=h200", f"out={tmp_path / 'plan.json'}")
        records.append(json.loads((tmp_path / "plan.json").read_text()) | {"model": "", "out": ""})
    assert records[1] == records[2] == records[3] == records[0]
    assert records[0]["size"] == preset(name)["inference"]["size"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["size=480x832"], "size=480x832: wanted HEIGHTxWIDTHxFRAMES in pixels, for example size=480x832x81"),
        (["size=480x832x80"], "size: 80 frames; wanted 4 n + 1, for example 81"),
        (["sequence_parallel=16"], "sequence_parallel=16: does not divide the network's 40 heads; use one of 1, 2"),
        (["sequence_parallel=3"], "sequence_parallel=3: gpus=16 is not a multiple of it"),
        (["prefix=30"], "prefix=30: 12 blocks are dropped from there, but the network has 40; wanted at most 28"),
        (["offload=all", "zero=2"], "offload=all: weights can wait in host memory under zero=3 only, not zero=2"),
        (["zero=0"], "zero=0: wanted >= 1 and <= 3"),
        (["critics=5"], "critics=5: unknown key"),
        (["stage=2", "ratio=3"], "ratio=3: ratio is a key of method=f3, not of method=fastlightgen"),
        (["engine=local"], "gpus=16: engine=local is one process; use gpus=1"),
        (["gpu=v100"], "gpu=v100: wanted one of h100, h200, b200, a100-40, a100-80, l40s, 4090, 5090, mi300x, cpu"),
        (["lrx=1"], "lrx=1: unknown key"),
        (["table=true", "out=/nonexistent/x.json"], "out=/nonexistent/x.json: there is no folder /nonexistent"),
    ],
)
def test_errors_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*words)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1

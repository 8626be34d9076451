"""The memory check of train: it plans as the plan command does, and refuses runs that do not fit."""

import re
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import KEPT, config, run_train, small_wan, write_ranking

from fastlightgen.config import load, main, method_for, plan_for, preset
from fastlightgen.models.families import network
from fastlightgen.models.folder.weights import save_model
from fastlightgen.planner import fit
from fastlightgen.planner.budget import budget, load_network
from fastlightgen.planner.step import undropped
from fastlightgen.train import train
from fastlightgen.world.source import ShapesSource

CPU, SOURCE = torch.device("cpu"), ShapesSource(0)


@pytest.fixture
def models(tmp_path) -> Path:
    """Write a teacher, a ranking of its blocks and a Stage II model."""
    save_model(small_wan(), tmp_path / "teacher")
    write_ranking(tmp_path / "stage1" / "importance.json")
    save_model(small_wan(), tmp_path / "stage2" / "model", pruned_path=KEPT)
    return tmp_path


def configured(stage: int, models: Path, *words: str):
    teacher = f"{'init' if stage == 0 else 'model'}={models / 'teacher'}"
    return config(stage, f"run={models}", teacher, *words)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_plan_of_a_stage_is_the_planners(stage, models, capsys):
    cfg = configured(stage, models, "batch=4")
    found, keep = method_for(cfg).subject(cfg, None)
    whole = {"patch_size": (1, 2, 2), "kept_attention_heads": None}
    assert found == small_wan().config | whole and keep == (KEPT if stage > 1 else ())
    fit.check_fit(cfg, SOURCE, CPU)
    clip = SOURCE.largest()
    net = network(found, tuple(clip.x0.shape[2:]), clip.cond.text.shape[1], fused=False)
    plan = plan_for(cfg, gpu="cpu", gpus=1, gpus_per_node=1, previews=False)
    b = budget(net, plan, keep)
    assert budget(net, fit.plan_of(cfg, 1, 1, "cpu"), keep) == b
    said = capsys.readouterr().out
    assert said.startswith(f"stage {stage}, planned: {b.peak / 1e6:.3g} MB per process (") and said.count("\n") == 1


def test_a_batch_is_divided_as_the_engine_divides_it():
    cfg = config(3, "engine=deepspeed", "zero=2", "batch=32", "micro_batch=2", "ratio=3")
    plan = fit.plan_of(cfg, 8, 4, "h100")
    assert (plan.gpus, plan.gpus_per_node, plan.micro, plan.accumulation) == (8, 4, 2, 2)
    assert (plan.ratio, plan.zero, plan.dropped) == (3, 2, 0.3)
    assert fit.plan_of(config(2, "engine=deepspeed", "batch=32", "p=1"), 8, 8, "cpu").micro == 4


def test_a_stage_that_does_not_fit(models, monkeypatch, capsys):
    """One error line names the planned memory, the free memory and the first change; no network is built."""
    cfg = configured(2, models, "batch=512")
    monkeypatch.setattr(fit, "host_free", lambda: int(0.5e9))
    with pytest.raises(ValueError, match=r"^fit: the plan is 1\.\d+ GB of host memory, 500 MB are free; use ") as stop:
        fit.check_fit(cfg, SOURCE, CPU)
    message = str(stop.value)
    assert "\n" not in message and "checkpointing=true" in message and message.endswith("with fit=warn")
    capsys.readouterr()
    for choice, said in (("warn", "warning: fit: the plan is"), ("off", "")):
        fit.check_fit(configured(2, models, "batch=512", f"fit={choice}"), SOURCE, CPU)
        out = capsys.readouterr().out
        assert said in out and (choice == "warn" or not out)
    monkeypatch.setattr(fit, "host_free", lambda: int(0.2e9))  # less than an empty process takes
    with pytest.raises(ValueError, match="still too much: more or larger devices|no key makes it smaller"):
        fit.check_fit(cfg, SOURCE, CPU)


@pytest.mark.parametrize("stage", ["0", "2", "3"])
def test_one_process_with_the_whole_batch_is_told_of_micro_batch(stage):
    """The default batch counts the clips of all processes; one 80 GB GPU has room for one of the 16 at a time."""
    model = "wan2.1-t2v-1.3b"
    cfg = load([f"stage={stage}", "run=r", f"model={model}"])
    net, plan = load_network(preset(model)["network"], "480x832x81", 0), fit.plan_of(cfg, 1, 1, "h100")
    keep = undropped(30, 0.3)
    assert (plan.dtype, plan.checkpointing) == ("bfloat16", True)
    message = fit.misfit(cfg, net, plan, keep, budget(net, plan, keep), int(80e9), int(2e12))
    assert plan.micro == cfg.batch == 16 and "; use micro_batch=1, which makes it " in message
    assert "GB per process; config=configs/recipes/wan2.1-1.3b-1x80gb.yaml is made for 1 x h100; or start" in message
    one = replace(plan, micro_batch=1)
    assert one.accumulation == 16 and budget(net, one, keep).peak < 80e9  # 16 passes, one optimizer step


def test_a_gpu_that_is_too_small(models, monkeypatch):
    cfg = configured(3, models, "batch=4096", "engine=deepspeed", "dtype=bfloat16")
    monkeypatch.setattr(fit, "gpu_free", lambda device: int(1.6e9))
    monkeypatch.setattr(fit, "kind_of", lambda device: "4090")
    with pytest.raises(
        ValueError, match=r"^fit: the plan is \d\.\d+ GB per GPU, 1\.6 GB are free; use .*micro_batch=1"
    ):
        fit.check_fit(cfg, SOURCE, torch.device("cuda"))
    monkeypatch.setattr(fit, "gpu_free", lambda device: int(80e9))
    monkeypatch.setattr(fit, "host_free", lambda: 1000)
    with pytest.raises(ValueError, match="kB of host memory.*use a larger host or fewer processes per host; or start"):
        fit.check_fit(cfg, SOURCE, torch.device("cuda"))


def test_the_command_exits_with_one_line(models, monkeypatch, capsys):
    monkeypatch.setattr(fit, "host_free", lambda: 1000)
    words = [f"run={models / 'new'}", f"model={models / 'teacher'}", "progress=false"]
    with pytest.raises(SystemExit) as stop:
        main(train, "train", ["stage=1", *words])
    err = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and re.match(r"error: fit: the plan is \d{3} MB of host memory, 1 kB are free;", err)
        and err.count("\n") == 1
    )
    assert not (models / "new").exists()
    run_train("stage=1", *words, "clips=2", "batch=2", "timesteps=1", "fit=off", "threads=1")
    before = {p: p.read_bytes() for p in (models / "new").rglob("*") if p.is_file()}
    with pytest.raises(SystemExit):
        main(train, "train", ["stage=2", *words, "seed=5"])
    assert {p: p.read_bytes() for p in (models / "new").rglob("*") if p.is_file()} == before
    assert not (models / "new" / "stage2").exists()


@pytest.mark.parametrize("stage", [2, 3])
def test_a_stage_is_planned_ahead_as_in_its_turn(stage, models, capsys):
    """A plan ahead assumes that the middle two of four blocks are dropped, which the ranking here does too."""
    cfg = configured(stage, models)
    fit.check_fit(cfg, SOURCE, CPU)
    fit.check_fit(replace(cfg, run=f"{models}/new"), SOURCE, CPU, 0.5)
    now, ahead = (line.split(":") for line in capsys.readouterr().out.splitlines())
    assert now[1].split(" of ")[0] == ahead[1].split(" of ")[0]  # the free memory may change
    assert ahead[0] == f"stage {stage}, planned ahead, with blocks yet to be chosen"
    config, keep = method_for(cfg).subject(replace(cfg, run=f"{models}/new"), partial(undropped, ratio=0.5))
    assert (config, keep) == method_for(cfg).subject(cfg, None)


def test_stage_3_is_refused_before_stage_1_runs(models, monkeypatch, capsys):
    monkeypatch.setattr(fit, "misfit", lambda cfg, *rest: "fit: stage 3 is too large" if cfg.stage == "3" else "")
    with pytest.raises(SystemExit):
        main(train, "train", ["stage=all", f"run={models / 'new'}", f"model={models / 'teacher'}", "progress=false"])
    assert "error: fit: stage 3 is too large\n" in capsys.readouterr().err
    assert not (models / "new" / "stage1" / "importance.json").exists()


def test_a_missing_input_is_named_and_ends_the_look(tmp_path, monkeypatch, capsys):
    """All ranks skip the check, also those that can read their inputs."""
    fit.check_fit(config(3, f"run={tmp_path}"), SOURCE, CPU)
    out = capsys.readouterr().out
    assert out.startswith("fit: not looked at: ") and f"{tmp_path}/stage2/model" in out and out.count("\n") == 1
    monkeypatch.setattr(fit.ranks, "gathered", lambda flag: [flag, 1])
    fit.check_fit(load(["stage=1", "run=unused"]), SOURCE, CPU)
    assert capsys.readouterr().out == "fit: not looked at: another rank cannot read its inputs\n"


def test_a_size_that_the_planner_refuses_is_an_error(models, monkeypatch):
    """Three ranks cannot divide the two heads of the small network."""
    monkeypatch.setattr(fit.ranks, "size", lambda: 3)
    monkeypatch.setattr(fit.ranks, "gathered", lambda mine: [mine] * 3)
    cfg = configured(2, models, "engine=deepspeed", "sequence_parallel=3")
    with pytest.raises(ValueError, match=r"^sequence_parallel=3: does not divide the network's 2 heads; use one of 1"):
        fit.check_fit(cfg, SOURCE, CPU)


def test_ranks_of_this_host_are_counted(monkeypatch):
    """Three of five ranks run on this host; this one is the last."""
    monkeypatch.setattr(fit.ranks, "gathered", lambda mine: [mine, 1, mine, 2, mine])
    monkeypatch.setattr(fit.ranks, "rank", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert fit.local_ranks() == 3


def test_the_shipped_demo_is_neither_refused_nor_slowed(capsys):
    cfg = load(["stage=1", "run=unused"])
    fit.check_fit(cfg, SOURCE, CPU)  # reads the preset once
    began = time.process_time()
    fit.check_fit(cfg, SOURCE, CPU)
    assert time.process_time() - began < 0.05
    assert capsys.readouterr().out.count("\n") == 2


def test_memory_that_a_control_group_leaves(tmp_path, monkeypatch):
    """The smallest of the process's control groups counts: limit less anonymous memory; `max` is no limit."""
    job = tmp_path / "fs" / "slurm" / "job_7"
    job.mkdir(parents=True)
    for folder, limit in ((job, "max"), (job.parent, "9000")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.stat").write_text("file 4000\nanon 2500\n")
    (tmp_path / "self").write_text("0::/slurm/job_7\n")
    (tmp_path / "meminfo").write_text("MemTotal: 50 kB\nMemAvailable:       7 kB\n")
    monkeypatch.setattr(fit, "CGROUP", tmp_path / "fs")
    monkeypatch.setattr(fit, "SELF", tmp_path / "self")
    monkeypatch.setattr(fit, "MEMINFO", tmp_path / "meminfo")
    assert fit.group_memory() == 6500 and fit.host_free() == 6500
    (job.parent / "memory.max").write_text("max\n")
    assert fit.host_free() == 7 * 1024

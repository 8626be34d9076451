"""The rivals of Stage II as commands: both families, a resumed run, the planner, Stage III after them."""

import json
import shutil

import pytest
import torch
from helpers import BLOCKS, KEPT, assert_same, result, run_train, small_wan
from method_cases import OWN, TEACHER, built, compare_with_plan, crash_after

from fastlightgen.config import load, main
from fastlightgen.engine.log import read_metrics
from fastlightgen.evaluate import evaluate
from fastlightgen.models.folder.weights import load_model, read_card, save_model
from fastlightgen.plan import plan

HUNYUAN = [0, 2, 3]  # kept of 2 double and 3 single blocks
RIVALS = {
    "icmd": ["mca_start=0.5", "mca_every=2"],
    "f3 attention": ["recover=true", "clips=2", "timesteps=1"],
    "f3 block": ["f3=block", "recover=true", "clips=2", "timesteps=1", "ratio=0.4"],
}


def words_of(method: str) -> list[str]:
    return [f"method={method.partition(' ')[0]}", *RIVALS[method]]


def models_of(method: str, models: list[str]) -> list[str]:
    """The words that a method reads: f3 measures its own ranking."""
    return models[:1] if method.startswith("f3") else models


def train(models: list[str], method: str, run, *more: str) -> list[dict]:
    common = ["stage=2", "batch=2", "shift=3", "progress=false", "threads=1", "iters=4", "lr=1e-3", "log_every=1"]
    given = dict(w.split("=", 1) for w in (*common, *models_of(method, models), *words_of(method), f"run={run}", *more))
    run_train(*(f"{k}={v}" for k, v in given.items()))
    return read_metrics(run / "stage2" / "metrics.jsonl")


@pytest.mark.parametrize("family", ["wan", "hunyuan"])
@pytest.mark.parametrize("method", RIVALS)
def test_it_trains_a_pruned_network_that_samples(method, family, request, tmp_path):
    models = request.getfixturevalue(f"ranked_{family}")
    lines = train(models, method, tmp_path, "sample_every=4")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    stage = built("stage=2", *models_of(method, models), *words_of(method), f"run={tmp_path}")
    assert all(line[stage.loss_key] > 0 for line in lines)  # the alarm of a diverging loss watches this key
    card, net = read_card(tmp_path / "stage2/model"), load_model(tmp_path / "stage2/model")
    assert (card["stage"], card["guidance"], card["shift"], card["ladder"]) == (2, OWN, 3.0, None)
    assert "pruned_path" not in card and net.num_blocks == len(card["kept_blocks"])
    if method == "icmd":
        assert card["kept_blocks"] == (KEPT if family == "wan" else HUNYUAN)
    for block in card.get("silent", {}):  # training kept them silent
        for layer, _ in net.blocks[int(block)].attention_outputs():
            assert not layer.weight[:, :16].any()
    assert ("silent" in card) == (method == "f3 attention")
    assert list((tmp_path / "stage2/samples").iterdir())


def test_the_discriminator_comes_late(ranked_wan, tmp_path):
    """From half of the steps on; no step before it updates the discriminator."""
    lines = train(ranked_wan, "icmd", tmp_path)
    assert ["discriminator_loss" in line for line in lines] == [False, False, True, True]
    assert ["student_mca" in line for line in lines] == [False, False, True, True]


@pytest.mark.parametrize("method", RIVALS)
def test_bfloat16_is_close_to_float32(method, ranked_wan, tmp_path):
    """Autocast rounds to 8 bits; losses are means, whose error is smaller."""
    lines = {t: train(ranked_wan, method, tmp_path / t, f"dtype={t}") for t in ("float32", "bfloat16")}
    for a, b in zip(lines["float32"], lines["bfloat16"], strict=True):
        wanted = {k: v for k, v in a.items() if k.endswith("loss")}
        assert {k: b[k] for k in wanted} == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize("crash_at", [2, 4])
@pytest.mark.parametrize("method", RIVALS)
def test_a_killed_run_continues_with_the_same_bits(method, crash_at, ranked_wan, tmp_path, monkeypatch, capsys):
    """Killed in iteration 2, when step 1 is saved and has no discriminator, or in iteration 4, when step 3 has one."""
    words = ["iters=5", "save_every=1", "keep=1"]
    train(ranked_wan, method, tmp_path / "whole", *words)
    before = crash_at - 1 if method != "icmd" or crash_at == 2 else 4  # steps 1 to 3, the third with two updates
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="^2$"):
        crash_after(patch, before)
        train(ranked_wan, method, tmp_path / "killed", *words)
    assert "error: out of memory; " in capsys.readouterr().err
    assert not (tmp_path / "killed/stage2/model").exists()
    train(ranked_wan, method, tmp_path / "killed", *words)
    assert_same(result(tmp_path / "killed", 2), result(tmp_path / "whole", 2))


@pytest.mark.parametrize("method", RIVALS)
def test_it_is_planned_for_a_real_model(method, tmp_path):
    out = tmp_path / "plan.json"
    words = ["stage=2", "model=wan2.1-t2v-1.3b", *words_of(method), "gpus=8", f"out={out}"]
    main(plan, "plan", words)
    record = json.loads(out.read_text())
    assert record["method"] == method.partition(" ")[0] and record["plan"]["peak"] > 0
    if method == "icmd":  # 21 blocks of the student; from half of the steps on 3 x 30 more of the teacher
        assert record["plan"]["calls"] == 21 + 30 + 0.5 * 3 * 30


def test_its_walks_over_double_and_single_blocks_are_planned(ranked_hunyuan):
    """The way to the latent leaves out gradients of the text in the first block, which the planner counts."""
    words = ["stage=2", *ranked_hunyuan, *words_of("icmd"), "mca_start=0"]
    compare_with_plan(built(*words, dtype=torch.float32), HUNYUAN, tolerance=5e-3)


AFTER = {"regression": [], "dmd2": ["ratio=2", "critic_start=0", "fake_arch=pruned"], "lcm": ["target=ema"]}
AFTER |= {"fastlightgen": ["strong=original", "ratio=2", "critic_start=0"]}


@pytest.mark.parametrize("after", AFTER)
def test_stage_3_starts_from_its_result(after, ranked_wan, tmp_path):
    """The student, its averaged target and a pruned critic have the pruned network's weights; the teacher is whole."""
    train(ranked_wan, "icmd", tmp_path)
    given = ["stage=3", f"method={after}", ranked_wan[0], f"stage2_model={tmp_path / 'stage2/model'}", *AFTER[after]]
    stage = built(*given, dtype=torch.float32)
    made = load_model(tmp_path / "stage2/model")
    x_t, t, cond, _ = small_wan().example_inputs(2)
    with torch.no_grad():
        wanted = made(x_t, t, cond)
        assert torch.equal(stage.student(x_t, t, cond), wanted)
        if after == "lcm":
            assert torch.equal(stage.target(x_t, t, cond), wanted)
        if "fake" in stage.roles:
            assert torch.equal(stage.nets.fake(x_t, t, cond), wanted)
        if after != "fastlightgen":
            assert stage.teacher.num_blocks == BLOCKS
        else:
            assert torch.equal(stage.nets.original(x_t, t, cond), small_wan(seed=TEACHER)(x_t, t, cond))
    assert stage.card["kept_blocks"] == KEPT
    run_train(*given, f"run={tmp_path}", "batch=2", "shift=3", "iters=2", "steps=2", "progress=false", "sample_every=0")
    assert read_card(tmp_path / "stage3/model")["kept_blocks"] == KEPT


def test_a_student_of_stage_3_can_start_there(ranked_wan, tmp_path):
    """start_model: the teachers are Stage II's, the student is the rival's."""
    train(ranked_wan, "icmd", tmp_path)
    stage2 = save_model(small_wan(seed=1), tmp_path / "two", pruned_path=KEPT)
    stage = built("stage=3", ranked_wan[0], f"stage2_model={stage2}", f"start_model={tmp_path / 'stage2/model'}")
    x_t, t, cond, _ = small_wan().example_inputs(2)
    with torch.no_grad():
        assert torch.equal(stage.student.float()(x_t, t, cond), load_model(tmp_path / "stage2/model")(x_t, t, cond))
    dropped = save_model(small_wan().prune([0, 1]), tmp_path / "other", stage=2, kept_blocks=[0, 1])
    with pytest.raises(ValueError, match=r"its pruned path keeps blocks \[0, 1\], wanted \[0, 3\]"):
        built("stage=3", ranked_wan[0], f"stage2_model={stage2}", f"start_model={dropped}")


def test_the_result_is_evaluated(ranked_wan, tmp_path):
    """path=pruned and path=full are the same model."""
    save_model(small_wan().prune(KEPT), tmp_path / "model", stage=2, kept_blocks=KEPT, steps=2, world=2)
    scores = []
    for path in ("full", "pruned"):
        out = tmp_path / f"{path}.json"
        words = [
            f"model={tmp_path / 'model'}",
            f"out={out}",
            f"path={path}",
            "clips=4",
            "noises=1",
            "show=1",
            "threads=1",
        ]
        main(evaluate, "evaluate", words)
        record = json.loads(out.read_text())
        assert (record["num_blocks"], record["kept_blocks"]) == (len(KEPT), KEPT)
        scores.append(record["scores"])
    assert scores[0] == scores[1]


@pytest.mark.parametrize("method", RIVALS)
def test_help_lists_it_with_its_own_keys(method, capsys):
    with pytest.raises(SystemExit):
        load(["--help", "all", "stage=2", *words_of(method)[:1]])
    out = capsys.readouterr().out
    assert words_of(method)[0] in out and "\n  kappa_unpruned" not in out


def test_the_paper_s_settings_of_icmd():
    """App. D for a released network; the built-in world has its own schedule."""
    cfg = load(["stage=2", "run=r", "method=icmd", "model=hunyuanvideo-t2v"])
    assert (cfg.iters, cfg.batch, cfg.lr, 2 * cfg.lr, cfg.shift) == (30000, 8, 5e-6, 1e-5, 7.0)
    assert (cfg.icd, cfg.mca, cfg.adversarial_steps) == (0.1, 1.0, range(9000, 30000))
    ours, rival = load(["stage=2", "run=r"]), load(["stage=2", "run=r", "method=icmd"])
    assert rival.lr == 2e-3  # the best of its trials
    for key in ("batch", "shift", "iters", "lr_schedule", "warmup"):
        assert getattr(ours, key) == getattr(rival, key), key
    rival = load(["stage=2", "run=r", "method=f3"])
    for key in ("batch", "shift", "iters", "lr", "lr_schedule", "warmup", "guided", "alpha"):
        assert getattr(ours, key) == getattr(rival, key), key


def test_f3_without_training_is_one_command(ranked_wan, tmp_path, capsys):
    """No log and no checkpoint; the model samples, and a second start finds it complete."""
    run_train("stage=2", "method=f3", ranked_wan[0], f"run={tmp_path}", "shift=3", "batch=2", "clips=2", "timesteps=1")
    said = capsys.readouterr()
    assert "trains nothing" in said.out
    assert [line.split()[:4] for line in said.err.splitlines()] == ["attention between frames: 100%".split()]
    card = read_card(tmp_path / "stage2/model")
    assert len(card["silent"]) == 1 and card["kept_blocks"] == list(range(BLOCKS)) and card["world"] == 2
    assert not (tmp_path / "stage2/start").exists() and (tmp_path / "stage2/attention.json").is_file()
    run_train("stage=2", "method=f3", ranked_wan[0], f"run={tmp_path}", "shift=3", "batch=2", "clips=2", "timesteps=1")
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_train("stage=3", ranked_wan[0], f"run={tmp_path}", "shift=3", "batch=2", "iters=2", "critic_start=0")
    assert "silenced the self-attention of 1 blocks" in capsys.readouterr().err


def test_a_checkpoint_of_another_method_is_refused(ranked_wan, tmp_path, capsys):
    """A discriminator that reads other blocks, and a checkpoint without one."""
    runs = {name: tmp_path / name for name in ("own", "fewer", "none")}
    more = {"own": [], "fewer": ["mca_every=4"], "none": ["mca=0"]}
    for name, run in runs.items():
        train(ranked_wan, "icmd", run, "iters=2", "save_every=2", *more[name])
        shutil.rmtree(run / "stage2/model")
        (run / "stage2/checkpoints").rename(tmp_path / f"checkpoints-{name}")
    capsys.readouterr()
    for other, name in (
        ("fewer", "discriminator/heads.1.norm.bias is missing, wanted [16]"),
        ("none", "discriminator/heads.0.norm.bias is missing, wanted [16]"),
    ):
        shutil.rmtree(runs["own"] / "stage2/checkpoints", ignore_errors=True)
        shutil.copytree(tmp_path / f"checkpoints-{other}", runs["own"] / "stage2/checkpoints")
        with pytest.raises(SystemExit):
            train(ranked_wan, "icmd", runs["own"], "iters=2", "save_every=2")
        error = capsys.readouterr().err
        assert f"step-000002: {name}; the checkpoint is of another method or model: use another run=" in error
        assert len(error.strip().splitlines()) == 1

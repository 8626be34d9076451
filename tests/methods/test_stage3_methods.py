"""The rivals as commands: both families, the planner, a resumed run, help, and the errors that users see."""

import json
import shutil

import pytest
import torch
from helpers import BLOCKS, KEPT, assert_same, result, run_train, small_hunyuan, small_wan
from method_cases import built, compare_with_plan, crash_after, planned

from fastlightgen import flow
from fastlightgen.config import ConfigError, load, main, preset
from fastlightgen.engine.log import read_metrics
from fastlightgen.models.folder.weights import load_model, read_card, save_model
from fastlightgen.plan import plan

CRITIC = ["ratio=2", "lr_fake=1e-3", "critic_start=0"]
RIVALS = {
    "regression": [],
    "dmd2": CRITIC,
    "lcm": ["target=ema"],
    "magicdistillation": [*CRITIC, "lora_rank=2"],
}


def words_of(method: str) -> list[str]:
    return [f"method={method}", *RIVALS[method]]


def train(models: list[str], method: str, run, *more: str) -> list[dict]:
    common = ["stage=3", "batch=2", "shift=3", "progress=false", "threads=1", "iters=4", "lr=1e-3", "log_every=1"]
    given = dict(w.split("=", 1) for w in (*common, *models, *words_of(method), f"run={run}", *more))
    if given.get("student") == "full":
        given.pop("stage2_model")
    run_train(*(f"{k}={v}" for k, v in given.items()))
    return read_metrics(run / "stage3" / "metrics.jsonl")


@pytest.mark.parametrize("student", ["pruned", "full"])
@pytest.mark.parametrize("family", ["wan", "hunyuan"])
@pytest.mark.parametrize("method", RIVALS)
def test_it_trains_a_student_that_samples(method, family, student, request, tmp_path):
    """The result is a model folder like the student's: the ladder, its sampler, no guidance, the blocks kept."""
    models = request.getfixturevalue(family)
    lines = train(models, method, tmp_path, f"student={student}", "sample_every=4", "steps=2", "sampler=ode")
    stage = built(*models, *words_of(method), f"student={student}")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line[stage.loss_key] > 0 for line in lines)  # the alarm of a diverging loss watches this key
    card, folder = read_card(tmp_path / "stage3/model"), tmp_path / "stage3/model"
    blocks = BLOCKS if family == "wan" else 5
    kept = list(range(blocks)) if student == "full" else KEPT if family == "wan" else [0, 2, 3]
    assert (card["stage"], card["kept_blocks"], card["ladder"]) == (3, kept, flow.ladder(2, 3.0))
    assert (card["sampler"], card["guidance"], card["shift"]) == ("ode", 1.0, 3.0)
    assert load_model(folder).num_blocks == len(kept)
    assert list((tmp_path / "stage3/samples").iterdir())


@pytest.mark.parametrize("method", RIVALS)
def test_bfloat16_is_close_to_float32(method, wan, tmp_path):
    """Autocast rounds to 8 bits; losses are means, whose error is smaller. The best of the looks becomes the result."""
    best = ["iters=2", "choose=best", "choose_every=1", "choose_clips=8"]
    lines = {t: train(wan, method, tmp_path / t, *best, f"dtype={t}") for t in ("float32", "bfloat16")}
    for a, b in zip(lines["float32"], lines["bfloat16"], strict=True):
        assert {k: v for k, v in b.items() if k.endswith("loss")} == pytest.approx(
            {k: v for k, v in a.items() if k.endswith("loss")}, rel=0.02
        )
    assert read_card(tmp_path / "bfloat16/stage3/model")["chosen"]["score"] > 0


@pytest.mark.parametrize("method", RIVALS)
def test_a_killed_run_continues_with_the_same_bits(method, wan, tmp_path, monkeypatch, capsys):
    words = ["iters=5", "save_every=2", "ema=0.9", "keep=1"]
    train(wan, method, tmp_path / "whole", *words)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="^2$"):
        crash_after(patch, 3 if method in ("regression", "lcm") else 5)  # in iteration 4; step 2 is saved
        train(wan, method, tmp_path / "killed", *words)
    assert "error: out of memory; " in capsys.readouterr().err
    assert not (tmp_path / "killed/stage3/model").exists()
    train(wan, method, tmp_path / "killed", *words)
    assert_same(result(tmp_path / "killed", 3), result(tmp_path / "whole", 3))


@pytest.mark.parametrize("method", RIVALS)
def test_it_is_planned_for_a_real_model(method, tmp_path):
    """30% of 30 blocks are dropped; a student with all blocks costs more."""
    calls = {}
    for student in ("pruned", "full"):
        out = tmp_path / f"{student}.json"
        words = ["stage=3", "model=wan2.1-t2v-1.3b", f"method={method}", f"student={student}", "gpus=8", f"out={out}"]
        main(plan, "plan", words)
        record = json.loads(out.read_text())
        assert record["method"] == method and record["plan"]["peak"] > 0
        calls[student] = record["plan"]["calls"]
    assert calls["full"] > calls["pruned"] >= 21


@pytest.mark.parametrize("student", ["pruned", "full"])
@pytest.mark.parametrize("method", RIVALS)
def test_its_walks_over_double_and_single_blocks_are_planned(method, student, hunyuan):
    """The operations and evaluations of a step in HunyuanVideo's class.

    With dmd2 the plan leaves out that this class reads the null prompt anew in every walk, and counts gradients of the
    text in the first block, which the way to the latent does not need. For adapters see test_stage_cost.py.
    """
    tolerance = {"dmd2": 1e-3, "magicdistillation": 0.03}.get(method, 0)
    ladder = ["steps=1", "count=generator"] if CRITIC[0] in RIVALS[method] else ["steps=1"]
    words = [*hunyuan, *words_of(method), *ladder, f"student={student}"]
    compare_with_plan(built(*words, dtype=torch.float32), [0, 2, 3], tolerance)


def test_clips_of_two_batches_in_one_walk():
    """They double operations and kept tensors; each block is gathered as often as for one batch."""
    stage = built("method=dmd2", "student=full", "model=tiny", dtype=torch.float32)
    step = planned(stage)
    critic = next(p.cost for p in step.passes if p.net == "fake" and p.joined == 2)
    to_latent = next(p.cost for p in step.passes if p.net == "fake" and p.beside)  # the student's, of one batch
    assert critic.forward == 2 * to_latent.forward and critic.narrow == 2 * to_latent.narrow
    assert (critic.gathers, critic.grad_gathers) == (12, 12) == (to_latent.gathers, to_latent.grad_gathers)
    assert critic.calls == 24 and to_latent.backward < to_latent.forward * 2
    student = next(p.cost for p in step.passes if p.net == "student" and p.cost.grad_calls)
    waiting = student.kept_bytes(4) + to_latent.kept_bytes(4)  # the student's graph waits while the critic's is walked
    assert step.activations(4).kept == max(critic.kept_bytes(4), waiting)


@pytest.mark.parametrize("method", RIVALS)
def test_help_lists_it_with_its_own_keys(method, capsys):
    with pytest.raises(SystemExit):
        load(["--help", "all", "stage=3", f"method={method}"])
    out = capsys.readouterr().out
    assert f"method={method}" in out and "\n  guidance" in out and "\n  beta2" not in out


@pytest.mark.parametrize("method", RIVALS)
def test_the_settings_of_the_built_in_world_are_those_of_stage_3(method):
    """A rival takes the preset's schedule and sampler, so that a comparison changes one key. A tuned one has its lr."""
    ours, rival = load(["stage=3", "run=r"]), load(["stage=3", "run=r", f"method={method}"])
    tuned = preset("tiny")["methods"].get(method, {})
    for key in ("batch", "shift", "sampler", "steps", "iters", "lr", "ema"):
        assert getattr(rival, key) == tuned.get(key, getattr(ours, key)), key


def test_errors_are_one_line(wan, hunyuan, tmp_path):
    method = "method=regression"
    stage2 = next(w for w in wan if w.startswith("stage2_model="))
    for given, message in (
        ([method, "student=full", stage2], f"{stage2}: student=full starts from the teacher; leave stage2_model out"),
        (
            [method, "guidance=3", "teacher_guidance=embedded"],
            "guidance=3.0: teacher_guidance=embedded reads the released scale; leave guidance out",
        ),
        ([method, "beta2=1"], "beta2=1: beta2 is a key of method=fastlightgen, not of method=regression"),
        ([method, "student=half"], "student=half: wanted one of pruned, full"),
    ):
        with pytest.raises(ConfigError) as error:
            load(["stage=3", "run=r", *given])
        assert str(error.value) == message


def test_models_that_do_not_fit_are_refused(wan, hunyuan, tmp_path):
    other = save_model(small_wan(blocks=5), tmp_path / "deep", pruned_path=[0, 1])
    reads = save_model(small_hunyuan(guidance_embeds=True), tmp_path / "reads")
    model, full = wan[0], "student=full"
    for given, message in (
        ([model, f"stage2_model={other}"], f"stage2_model={other}: num_layers is 5, wanted 4 as in {model}; give a mo"),
        ([model, hunyuan[1]], f"{hunyuan[1]}: _class_name is HunyuanVideoTransformer3DModel, wanted WanTransformer3D"),
        ([model, full, f"start_model={other}"], f"start_model={other}: num_layers is 5, wanted 4 as in {model}; give"),
        (
            [model, full, f"start_model={tmp_path}/no"],
            f"start_model={tmp_path}/no: there is no model f",
        ),
        ([f"model={reads}", full], "teacher_guidance=null: this model reads its guidance of 6 as a number and may ha"),
        ([model, full, "teacher_guidance=embedded"], "teacher_guidance=embedded: no guidance was distilled into this"),
        ([model, f"run={tmp_path}"], f"{tmp_path}/stage2/model: there is no Stage II model; run stage=2 with the same"),
    ):
        with pytest.raises(ValueError) as error:
            built("method=regression", *given)
        assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_guidance_distilled_teacher_guides_by_its_own_scale(tmp_path):
    """teacher_guidance=embedded: teacher and student read the released scale, 6, and no null prompt is evaluated."""
    reads = save_model(small_hunyuan(guidance_embeds=True), tmp_path / "reads")
    stage = built("method=regression", f"model={reads}", "student=full", "teacher_guidance=embedded")
    stage.teacher.block_calls = 0
    loss, _ = stage.loss(0)
    assert loss.item() < 1e-25 and stage.teacher.block_calls == 5  # the student is still the teacher, up to rounding
    assert stage.batches(0).cond.guidance.tolist() == [6.0, 6.0] and stage.sampler()["guidance"] == 6.0


def test_a_run_folder_keeps_its_method(wan, tmp_path, capsys):
    """A checkpoint of one method does not start another one."""
    train(wan, "regression", tmp_path, "iters=1")
    with pytest.raises(SystemExit):
        run_train("stage=3", *wan, f"run={tmp_path}", "batch=2", "shift=3", "iters=1", "critic_start=0")
    assert "was made with another configuration (method: regression -> fastlightgen" in capsys.readouterr().err


def test_a_checkpoint_of_another_method_is_refused(wan, tmp_path, capsys):
    """A discriminator that a LoRA critic trained is none of a critic with weights of its own, and the reverse."""
    runs = {method: tmp_path / method for method in ("dmd2", "magicdistillation")}
    for method, run in runs.items():
        train(wan, method, run, "iters=2", "save_every=2")
        shutil.rmtree(run / "stage3/model")
        (run / "stage3/checkpoints").rename(tmp_path / f"checkpoints-{method}")
    capsys.readouterr()
    for method, other, name in (
        ("dmd2", "magicdistillation", "fake/adapters.0_attn1_to_k_down is [2, 16], wanted missing"),
        ("magicdistillation", "dmd2", "fake/adapters.0_attn1_to_k_down is missing, wanted [2, 16]"),
    ):
        shutil.copytree(tmp_path / f"checkpoints-{other}", runs[method] / "stage3/checkpoints")
        with pytest.raises(SystemExit):
            train(wan, method, runs[method], "iters=2", "save_every=2")
        error = capsys.readouterr().err
        assert f"step-000002: {name}; the checkpoint is of another method or model: use another run=" in error
        assert len(error.strip().splitlines()) == 1

"""teacher_guidance=embedded: every network reads the released scale, and no null prompt is evaluated."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from helpers import batches, config, run_train, small_hunyuan, small_wan, write_ranking

from fastlightgen.config import ConfigError, load, method_for
from fastlightgen.guidance import well_guided
from fastlightgen.models.families import network
from fastlightgen.models.folder.weights import read_card, save_model
from fastlightgen.ops import dmd_gradient
from fastlightgen.pipelines.export import call_of
from fastlightgen.plan import one
from fastlightgen.planner.step import step_cost
from fastlightgen.stages import distill, prune
from fastlightgen.stages import guided as guided_part
from fastlightgen.stages.build import Builder

KEEP, PRUNED, N = [0, 2, 3], [1, 4], 5  # of 2 double and 3 single blocks
SCALE = 6.0  # HunyuanVideo's released guidance
EMBEDDED = "teacher_guidance=embedded"
CPU = torch.device("cpu")


class Source:
    """Small clips; their null prompt is poisoned, so that a network that reads it predicts nan."""

    name, description = "test", {}

    def batch(self, step: int, size: int, rows=None):
        batch = batches(size)(step)
        return replace(batch, null=replace(batch.null, text=torch.full_like(batch.null.text, torch.nan)))

    def held_out(self, start: int, size: int):
        return self.batch(start, size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_model(small_hunyuan(guidance_embeds=True), root / "teacher")
    stage2 = small_hunyuan(guidance_embeds=True, seed=1)
    save_model(stage2, root / "stage2", stage=2, pruned_path=KEEP, teacher_guidance="embedded")
    save_model(small_wan(), root / "wan", stage=2, pruned_path=KEEP, teacher_guidance="embedded")
    write_ranking(root / "importance.json", PRUNED, N)
    return root


def built(folder, stage: int, *words: str):
    own = [f"stage2_model={folder}/stage2"] if stage == 3 else [f"importance={folder}/importance.json"]
    cfg = config(stage, f"model={folder}/teacher", *own, *words)
    return {2: prune, 3: distill}[stage].build(cfg, Builder(cfg, Source(), CPU))


def guided(cond, size: int = 2):
    return replace(cond, guidance=torch.full((size,), SCALE))


@pytest.mark.parametrize("strong", ["stage2", "original"])
@torch.no_grad()
def test_the_real_prediction_is_eq_9_without_the_null_term(folder, strong, monkeypatch):
    """v_p + beta2 (v_u - v_p), from separate forwards at the released scale; the null prompt is never read."""
    stage, seen = built(folder, 3, EMBEDDED, f"strong={strong}", "beta1=2.5", "beta2=0.4"), []
    nets, cond = stage.nets, batches(2)(0).cond
    monkeypatch.setattr(guided_part, "dmd_gradient", lambda *given: seen.append(given) or dmd_gradient(*given))
    calls = nets.teacher.block_calls
    loss, _ = stage.student_loss(0)
    calls = nets.teacher.block_calls - calls
    assert calls == (N + len(KEEP) - 1 if strong == "stage2" else len(KEEP)) and loss.isfinite()
    [(_, x_t, t, v_fake, *real, beta1, beta2)] = seen
    weak = copy.deepcopy(nets.teacher).prune(KEEP)
    v_p = weak(x_t, t, guided(cond))
    v_u = (nets.original or nets.teacher)(x_t, t, guided(cond))
    assert torch.equal(real[0], v_p) and torch.equal(real[2], v_u)
    assert torch.equal(v_fake, nets.fake_net(x_t, t, guided(cond)))
    b = beta2.view(-1, 1, 1, 1, 1)
    assert len(set(b.flatten().tolist())) == 2 and b.min() >= 0.3 and b.max() <= 0.5
    torch.testing.assert_close(well_guided(*real, beta1, beta2), v_p + b * (v_u - v_p), rtol=1e-6, atol=1e-6)
    assert (weak(x_t, t, cond) - v_p).abs().max() > 1e-3  # a scale of 1, which the other choice reads, is not the same


@torch.no_grad()
def test_stage_2_follows_the_teacher_at_its_scale(folder):
    stage = built(folder, 2, EMBEDDED, "text_dropout=0", "alpha=1")
    batch = batches(2)(0)
    x_t, t, _, _ = prune.noised(stage.batches(0), stage.cfg, stage.cfg.seed, prune.DRAWS, 0)
    teacher = small_hunyuan(guidance_embeds=True)
    v_target = teacher(x_t, t, guided(batch.cond))
    v_p = copy.deepcopy(teacher).prune(KEEP)(x_t, t, guided(batch.cond))
    loss, record = stage.loss(0)
    assert record["distill_unpruned"] == 0  # the network is still the teacher
    assert loss.item() == pytest.approx((v_p - v_target).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["null", "embedded"])
def test_the_planner_counts_the_walks_that_run(folder, kind):
    """An iteration of one student and two critic updates; the guidance adds two evaluations per kept block."""
    save_model(small_hunyuan(guidance_embeds=True), folder / kind, pruned_path=KEEP, stage=2, teacher_guidance=kind)
    words = [f"stage2_model={folder / kind}", f"teacher_guidance={kind}", "steps=1", "count=generator", "ratio=2"]
    stage = built(folder, 3, *words)
    x0, cond = batches(2)(0).x0, batches(2)(0).cond
    net = network(stage.nets.teacher.config, tuple(x0.shape[2:]), cond.text.shape[1], fused=False)
    planned = step_cost(net, method_for(stage.cfg).walks(net, KEEP, stage.cfg), stage.cfg)
    nets = [stage.nets.student, stage.nets.teacher, stage.nets.fake_net]
    for n in nets:
        n.block_calls = 0
    for update in stage.updates(0):
        update.loss()
    assert sum(n.block_calls for n in nets) == planned.total("calls")
    assert stage.nets.teacher.block_calls == N + len(KEEP) - 1 + 2 * len(KEEP) * (kind == "null")


def test_both_stages_as_commands(folder, tmp_path, capsys):
    """The student's card names the scale that it reads, and an export calls the stock pipeline with it."""
    words = [f"run={tmp_path}", f"model={folder}/teacher", "batch=2", "shift=3", "threads=1", "progress=false"]
    words += ["iters=2", "log_every=1", "sample_every=2", EMBEDDED]
    run_train("stage=2", f"importance={folder}/importance.json", *words)
    assert read_card(tmp_path / "stage2/model")["teacher_guidance"] == "embedded"
    run_train("stage=3", "ratio=1", "critic_start=0", *words)
    card = read_card(tmp_path / "stage3/model")
    assert (card["guidance"], card["teacher_guidance"]) == (SCALE, "embedded")
    made = json.loads((tmp_path / "stage3/model/config.json").read_text())
    assert call_of(card, made) == {"num_inference_steps": 4, "guidance_scale": SCALE, "true_cfg_scale": 1.0}
    with pytest.raises(SystemExit):
        run_train("stage=3", "critic_start=0", *words, "teacher_guidance=null", "overwrite=true")
    error = capsys.readouterr().err
    assert "teacher_guidance=null: Stage II learned with teacher_guidance=embedded; give both stages" in error


def test_models_without_embedded_guidance_are_refused(folder):
    with pytest.raises(ValueError, match="^teacher_guidance=embedded: no guidance was distilled into this model"):
        built(folder, 3, EMBEDDED, f"stage2_model={folder}/wan")
    with pytest.raises(ValueError, match="^teacher_guidance=embedded: no guidance was distilled into this model"):
        one(load(["stage=3", "model=wan2.1-t2v-14b", EMBEDDED], "plan"))
    null, embedded = (
        one(load(["stage=3", "model=hunyuanvideo-t2v", f"teacher_guidance={kind}", "critic_start=0"], "plan"))[1][
            "plan"
        ]["calls"]
        for kind in ("null", "embedded")
    )
    assert null - embedded == pytest.approx(2 * 42 / 5)  # 42 blocks are kept, every fifth step trains
    with pytest.raises(ConfigError, match="guided=2.0: teacher_guidance=embedded guides the target too; use guided=1"):
        load(["stage=2", "run=r", EMBEDDED, "guided=2"])

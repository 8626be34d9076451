"""choose=best: the score by hand, the weights of the best step as the result, the same result after an interruption."""

from types import SimpleNamespace

import pytest
import torch
from helpers import KEPT, assert_same, config, result, run_train, small_wan, write_inputs, write_shapes
from safetensors.torch import load_file

from fastlightgen import train as command
from fastlightgen.config import Evaluate
from fastlightgen.data.cache import Cache
from fastlightgen.data.source import CacheSource
from fastlightgen.engine import choice
from fastlightgen.engine.choice import Choice
from fastlightgen.engine.local import LocalEngine
from fastlightgen.engine.log import read_metrics
from fastlightgen.metrics.frechet import features
from fastlightgen.metrics.kernel import kernel_distance
from fastlightgen.metrics.latent import latent_features
from fastlightgen.rng import generator
from fastlightgen.stages.distill import Distill
from fastlightgen.world.codec import Codec
from fastlightgen.world.score import REFERENCE_CLIPS, REFERENCE_START
from fastlightgen.world.source import ShapesSource

CPU = torch.device("cpu")
SCORES = {2: 0.5, 4: 0.2, 6: 0.3, 7: 0.25}  # after so many updates of the student


@pytest.fixture
def words(tmp_path):
    """Seven iterations, each with an update of the student."""
    return ["stage=3", *write_inputs(tmp_path)[3], "ratio=1", "sample_every=0"]


@pytest.fixture
def scores(monkeypatch):
    monkeypatch.setattr(Choice, "score", lambda self, stage: SCORES[self.engine.count["student"]])


@torch.no_grad()
def test_the_score_is_the_kernel_distance_of_clips_sampled_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "REAL", 24)
    cfg = config(3, "batch=3", "choose=best", "choose_clips=8", "seed=5")
    engine, source, net = LocalEngine(CPU, "float32"), ShapesSource(5), small_wan().prune(KEPT)
    made = command.choice_of(cfg, engine, source, SimpleNamespace(path=tmp_path))
    how = {"model": net, "times": [1.0, 0.75], "guidance": 1.0, "kind": "stochastic"}
    found = made.score(SimpleNamespace(sampler=lambda: how))

    clips = []
    for first, size in ((2_000_000, 3), (2_000_003, 3), (2_000_006, 2)):
        batch = source.held_out(first, size)
        noise = torch.randn(batch.x0.shape, generator=generator(5, choice.PURPOSE, first))
        x0 = noise - net(noise, 1.0, batch.cond)
        again = torch.randn(batch.x0.shape, generator=generator(5 + first, 0))
        x = 0.25 * x0 + 0.75 * again
        clips.append(Codec().decode(x - 0.75 * net(x, 0.75, batch.cond)))
    real = Codec().decode(source.held_out(2_000_008, 24).x0)
    assert found == pytest.approx(kernel_distance(features(real), features(torch.cat(clips))), rel=1e-4)
    # an evaluation's prompts start at 0, its real clips at REFERENCE_START
    assert min(made.prompts) > REFERENCE_START + REFERENCE_CLIPS > Evaluate(model="tiny", out="o").clips


@pytest.mark.parametrize("ema", ["ema=0", "ema=0.5"])
def test_the_result_has_the_weights_of_the_best_step(words, scores, tmp_path, capsys, ema):
    """They are those of a run that ends there; training itself is the same with and without the choice."""
    words = [*words, ema]
    run_train(*words, f"run={tmp_path}/best", "choose=best", "choose_every=2")
    run_train(*words, f"run={tmp_path}/last")
    run_train(*words, f"run={tmp_path}/four", "iters=4")
    best, last, four = (result(tmp_path / name, 3) for name in ("best", "last", "four"))
    assert_same(best["model"], four["model"])
    assert not torch.equal(*(r["model"]["blocks.0.attn1.to_q.weight"] for r in (best, last)))
    assert_same(best["state"], last["state"])
    assert best["card"]["chosen"] == {"step": 4, "updates": 4, "score": 0.2} and "chosen" not in last["card"]
    looks = read_metrics(tmp_path / "best/stage3/choices.jsonl")
    assert looks == [{"step": n, "updates": n, "score": score} for n, score in SCORES.items()]
    assert "choose: the result is the student of step 4 (4 updates)" in capsys.readouterr().out


def test_the_bar_says_that_clips_are_compared(words, scores, tmp_path, capsys):
    words = [*(w for w in words if w != "progress=false"), "progress=true"]
    run_train(*words, f"run={tmp_path}/r", "choose=best", "choose_every=2")
    lines = [line for line in capsys.readouterr().err.splitlines() if "comparing clips with real ones" in line]
    assert len(lines) == len(SCORES) and lines[0].startswith("stage 3, comparing clips with real ones:")


@pytest.mark.parametrize("last", [2, 3, 4, 5, 6])
def test_an_interrupted_run_chooses_the_same(words, scores, tmp_path, monkeypatch, last):
    """A run that breaks after any step, with checkpoints at 3 and 6, ends with the same choice and the same log."""
    words = [*words, "choose=best", "choose_every=2", "ema=0.5"]
    run_train(*words, f"run={tmp_path}/whole")

    def check(self, done):
        if done == last:
            raise ValueError("stopped by the test")

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Distill, "check", check)
        run_train(*words, f"run={tmp_path}/broken")
    run_train(*words, f"run={tmp_path}/broken")
    assert_same(result(tmp_path / "broken", 3), result(tmp_path / "whole", 3))
    looks = [read_metrics(tmp_path / f"{name}/stage3/choices.jsonl") for name in ("broken", "whole")]
    assert looks[0] == looks[1]


def test_the_weights_on_disk_carry_their_record(words, scores, tmp_path, monkeypatch):
    """One file holds both, so that no moment has the weights of one step and the score of another."""
    monkeypatch.setattr(Choice, "save", lambda self, stage, folder: stage.save(folder, self.engine.save_model))
    run_train(*words, f"run={tmp_path}/r", "choose=best", "choose_every=2", "ema=0")
    run_train(*words, f"run={tmp_path}/four", "iters=4", "ema=0")
    four = load_file(tmp_path / "four/stage3/model/diffusion_pytorch_model.safetensors")
    assert_same(load_file(tmp_path / "r/stage3/best.safetensors"), four)
    engine = SimpleNamespace(count={"student": 7})
    made = Choice(config(3, "choose_every=2"), engine, ShapesSource(0), tmp_path / "r/stage3", features)
    for step, best in ((7, {"step": 4, "updates": 4, "score": 0.2}), (3, {})):
        made.start(step)
        assert (made.best, made.looked) == (best, 6)


def test_of_a_cache_the_latents_are_compared(tmp_path):
    def source(clips: int) -> CacheSource:
        write_shapes(tmp_path / f"{clips}", clips)
        return CacheSource(Cache(tmp_path / f"{clips}"), 0)

    cfg, engine, place = (
        config(3, "choose=best", "batch=8"),
        LocalEngine(CPU, "float32"),
        SimpleNamespace(path=tmp_path),
    )
    made = command.choice_of(cfg, engine, source(90), place)
    assert made.features is latent_features and len(made.prompts) == len(made.real) == 9
    net = small_wan().prune(KEPT)
    how = {"model": net, "times": [1.0], "guidance": 1.0, "kind": "stochastic"}
    assert made.score(SimpleNamespace(sampler=lambda: how)) > 0  # random weights
    with pytest.raises(
        ValueError, match="choose=best: data=shapes holds out 7 clips; wanted 8 or more, which takes 80"
    ):
        command.choice_of(cfg, engine, source(70), place)


def test_only_one_process_can_choose(tmp_path):
    with pytest.raises(
        ValueError, match="^choose=best: works with engine=local only; use choose=last, and keep_every="
    ):
        command.choice_of(config(3, "choose=best"), object(), ShapesSource(0), SimpleNamespace(path=tmp_path))
    assert command.choice_of(config(3), object(), ShapesSource(0), SimpleNamespace(path=tmp_path)) is None
    assert command.choice_of(config(2), object(), ShapesSource(0), SimpleNamespace(path=tmp_path)) is None

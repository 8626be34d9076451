"""score=frechet against clips sampled by hand from shorter networks, and a Frechet distance in numpy; it resumes."""

import copy
import json
import os
import signal

import numpy as np
import pytest
import torch
from helpers import batches, config, empty_sweep, run_train, small_hunyuan, small_wan

from fastlightgen.config import ConfigError
from fastlightgen.metrics.latent import latent_features
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.families import network
from fastlightgen.models.folder.weights import save_model
from fastlightgen.planner.step import step_cost
from fastlightgen.rng import generator, normal_like
from fastlightgen.stages.generated import Generated
from fastlightgen.stages.rank import rank, walks

WORDS = ["score=frechet", "clips=3", "batch=2", "score_steps=2"]
SIZES = [2, 1]  # clips of the two batches
TIMES = [1.0, 0.75, 0.0]  # 1 and 1/2 through the shift 3 of the built-in world: 3 u / (1 + 2 u)


def sweeps():
    """Stand in for the scores on disk; the list keeps the tables."""
    tables = []

    class Open:
        def __init__(self, *shape):
            self.sweep = empty_sweep(shape[0], shape[1], shape[3])
            tables.append(self.sweep.table)

        def __enter__(self):
            return self.sweep

        def __exit__(self, *_):
            return None

    return Open, tables


@torch.no_grad()
def clips(model: VideoDiT, keep, guidance: float) -> torch.Tensor:
    """Euler steps in float64 of a network that has only the blocks `keep`."""
    net, made = copy.deepcopy(model).double().prune(keep), []
    for number, size in enumerate(SIZES):
        batch = batches(2)(number)
        x = normal_like(batch.x0[:size], generator(0, 27, 2 * number)).double()
        batch = batch.map(lambda x, size=size: (x.double() if x.is_floating_point() else x)[:size])
        cond, null = batch.cond, batch.null
        for t, after in zip(TIMES, TIMES[1:]):
            v = net(x, t, cond)
            v = v if guidance == 1 else net(x, t, null) + guidance * (v - net(x, t, null))
            x = x + (after - t) * v
        made.append(x)
    return torch.cat(made)


def distance(real: np.ndarray, made: np.ndarray) -> float:
    """The Frechet distance in units of the real clips, by the eigenvalues of the product of both covariances."""
    mean, std = real.mean(0), np.maximum(real.std(0, ddof=1), 0.02)
    a, b = (real - mean) / std, (made - mean) / std
    covs = [np.cov(x, rowvar=False) for x in (a, b)]
    root = np.sqrt(np.maximum(np.linalg.eigvals(covs[0] @ covs[1]).real, 0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + covs[0].trace() + covs[1].trace() - 2 * root


@pytest.mark.parametrize("guidance", [1.0, -1.0])
def test_the_score_by_hand(guidance):
    """A negative guidance is the model's own, which is 2 here."""
    model, (opened, tables) = small_wan(seed=3).requires_grad_(False), sweeps()
    record = rank(config(1, *WORDS, f"score_guidance={guidance}", "ratio=0.5"), model, batches(2), [1.0] * 4, opened)
    real = torch.cat([batches(2)(0).x0, batches(2)(1).x0[:1]])
    real = latent_features(real).numpy()
    w = 2.0 if guidance < 0 else guidance
    keeps = [[j for j in range(4) if j != i] for i in range(4)] + [[0, 1, 2, 3], record["kept"]]
    wanted = [distance(real, latent_features(clips(model, keep, w)).numpy()) for keep in keeps]
    # Sampled in float32, compared through the logarithms of small energies.
    assert [u["score"] for u in record["units"]] == pytest.approx(wanted[:4], rel=1e-3)
    assert record["baseline_score"] == pytest.approx(wanted[4], rel=1e-3)
    assert record["pruned_score"] == pytest.approx(wanted[5], rel=1e-3)
    order = sorted(range(4), key=wanted.__getitem__)
    assert record["pruned"] == sorted(order[:2]) and record["ranking"] == order[::-1]
    assert (record["score_kind"], record["num_samples"]) == ("frechet", 3)
    assert [table.shape for table in tables] == [(5, 3, 60), (1, 3, 60)] and not any(t.isnan().any() for t in tables)


@pytest.mark.parametrize(
    ("make", "words", "prompts"),
    [
        (small_wan, [], 2),
        (small_wan, ["score_guidance=1"], 1),
        (small_wan, ["search=iterative", "ratio=0.5"], 2),
        (small_hunyuan, [], 2),
        (lambda: small_hunyuan(guidance_embeds=True), ["score_guidance=6"], 1),  # it reads the scale
    ],
)
def test_the_planner_counts_what_runs(make, words, prompts):
    """The planner leaves out the last set alone: all dropped blocks together."""
    model, cfg, (opened, _) = make().requires_grad_(False), config(1, *WORDS, *words), sweeps()
    cost = network(model.config, (2, 4, 4), 16)
    declared = walks(cost, [], cfg)
    planned = step_cost(cost, declared, cfg)
    model.block_calls = 0
    record = rank(cfg, model, batches(2), [1.0] * model.num_blocks, opened)
    last = prompts * cfg.score_steps * len(record["kept"])
    assert model.block_calls == len(SIZES) * (planned.total("calls") + last)
    assert (declared.count, declared.clips) == (2, 2)


def test_clips_that_are_not_finite_are_refused():
    model, (opened, _) = small_wan(), sweeps()
    with torch.no_grad():
        model.blocks[0].ffn.net[2].bias.fill_(1e30)
    clips = Generated(config(1, *WORDS), model, batches(2), latent_features)
    with pytest.raises(
        ValueError, match=r"^score=frechet: the clips are not finite when blocks \[0, 1\] run .* use score="
    ):
        clips.scores([[0, 1]], "x", opened)


def test_what_is_refused():
    with pytest.raises(ConfigError, match="^clips=1: score=frechet needs 2 or more$"):
        config(1, "score=frechet", "clips=1")


def test_a_signal_costs_no_clips(tmp_path, monkeypatch, capsys):
    """The command in the middle of a sweep: the features stay, and the ranking is that of an undisturbed run."""
    model = save_model(small_wan(seed=3), tmp_path / "m", steps=2, guidance=2.0, shift=3.0)
    words = ["stage=1", f"model={model}", *WORDS, "progress=false", "threads=1", "ratio=0.5"]
    walked, real = [], VideoDiT.walk

    def counted(at: int = 0):
        walked.clear()

        def walk(self, *args):
            walked.append(1)
            if len(walked) == at:
                os.kill(os.getpid(), signal.SIGINT)
            return real(self, *args)

        monkeypatch.setattr(VideoDiT, "walk", walk)

    counted()
    run_train(*words, f"run={tmp_path}/whole")
    per_set = 2 * len(SIZES)  # 2 steps of 2 batches
    assert len(walked) == per_set * (5 + 1)
    said = capsys.readouterr().out
    assert "score=frechet: each candidate makes 3 clips in 2 steps: less than 10 s" in said
    counted(7)  # the 4th set of the first batch
    with pytest.raises(SystemExit):
        run_train(*words, f"run={tmp_path}/cut")
    assert capsys.readouterr().err.startswith("SIGINT: saved 8 of 15 scores (stage 1: skip each block)")
    counted()
    run_train(*words, f"run={tmp_path}/cut")
    assert len(walked) == per_set * 6 - 8
    whole, cut = (json.loads((tmp_path / run / "stage1/importance.json").read_text()) for run in ("whole", "cut"))
    assert whole == cut and not (tmp_path / "cut/stage1/scores.safetensors").exists()

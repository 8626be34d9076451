"""evaluate data=CACHE: a network on the held-out clips of a latent cache, against formulas."""

import json
import shutil

import pytest
import torch
from helpers import small_wan, write_shapes
from runs import Page

from fastlightgen.config import main
from fastlightgen.data.cache import Cache
from fastlightgen.data.source import CacheSource
from fastlightgen.evaluate import evaluate
from fastlightgen.evaluation import latents
from fastlightgen.evaluation.sets import differences
from fastlightgen.metrics.kernel import kernel_distance
from fastlightgen.metrics.latent import latent_features
from fastlightgen.models.folder.weights import load_model, save_model
from fastlightgen.models.sample import sample
from fastlightgen.report import write_report
from fastlightgen.rng import generator

CLIPS = 70  # of the cache; the last 7 are held out


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    root = tmp_path_factory.mktemp("latents")
    write_shapes(root / "cache", CLIPS)
    for name, seed in (("student", 0), ("teacher", 1)):
        save_model(small_wan(2, seed), root / name, steps=2, guidance=2.0, shift=3.0)
    words = [f"model={root / 'student'}", f"teacher={root / 'teacher'}", f"data={root / 'cache'}", "batch=4"]
    words += [f"out={root / 'o.json'}", "threads=1", "progress=false", "device=cpu", "seed=3"]
    main(evaluate, "evaluate", words)
    return root, json.loads((root / "o.json").read_text())


def made(root, name: str) -> torch.Tensor:
    """The latents of a network for the held-out clips, sampled here, clips 0 to 3 and 4 to 6 together."""
    source, net, out = CacheSource(Cache(root / "cache"), 3), load_model(root / name), []
    for first, count in ((0, 4), (4, 3)):
        batch = source.held_out(first, count)
        noise = torch.stack(
            [torch.randn(batch.x0.shape[1:], generator=generator(3, latents.PURPOSE, first + i)) for i in range(count)]
        )
        plan = {"times": [1.0, 0.75], "guidance": 2.0, "kind": "ode"}  # shift 3: 3 s / (1 + 2 s) at s = 1, 1/2
        out.append(sample(net, batch.cond, batch.null, noise, **plan, seed=3 + first))
    return torch.cat(out)


def test_the_scores_are_those_of_the_sampled_latents(evaluated):
    root, record = evaluated
    x0, theirs = made(root, "student").double(), made(root, "teacher").double()
    real = CacheSource(Cache(root / "cache"), 3).held_out(0, 7).x0.double()
    assert record["clips"] == 7 and record["intervals"] == record["against_teacher"] == {}
    scores = record["scores"]
    frames = real.shape[2]
    wanted = (x0[:, :, 1:] - x0[:, :, :-1]).square().sum() / (real[:, :, 1:] - real[:, :, :-1]).square().sum()
    assert scores["motion"] == pytest.approx(float(wanted), rel=1e-5) and frames > 1
    wanted = x0.flatten(1).var(1).mean() / real.flatten(1).var(1).mean()
    assert scores["contrast"] == pytest.approx(float(wanted), rel=1e-5)
    away = (x0 - theirs).flatten(1).square().sum(1) / theirs.flatten(1).square().sum(1)
    assert scores["to_teacher"] == pytest.approx(float(away.mean()), rel=1e-5)
    wanted = kernel_distance(latent_features(real), latent_features(x0.float()))
    assert scores["kid"] == pytest.approx(wanted, rel=1e-4)
    assert "to_teacher" not in record["teacher"]["scores"] and record["teacher"]["seconds_per_clip"] > 0


def test_the_report_shows_them(evaluated, tmp_path):
    root, record = evaluated
    (tmp_path / "evaluate").mkdir()
    shutil.copy(root / "o.json", tmp_path / "evaluate" / "cache.json")
    text = Page(write_report(tmp_path)).text
    assert f"{record['scores']['motion']:.4g}" in text and f"{record['teacher']['scores']['motion']:.4g}" in text
    assert "against 7 clips of" in text and "7 clips are too few to rank" in text
    assert f"On 7 clips of {root}/cache that training held out, {root}/student is not ranked: the clips are too" in text


def test_the_clips_themselves_have_no_distance(evaluated):
    """Still and blurred clips have no motion and less detail."""
    root, _ = evaluated
    x0 = CacheSource(Cache(root / "cache"), 3).held_out(0, 7).x0
    real, same, still, blurred = (latents.Sampled(None, root, {}, None) for _ in range(4))
    for subject, clips in (
        (real, x0),
        (same, x0),
        (still, x0[:, :, :1].expand_as(x0)),
        (blurred, torch.nn.functional.avg_pool3d(x0, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)),
    ):
        latents.note(subject, clips)
    same, still, blurred = (latents.scores_of(latents.statistics(s.values(real))) for s in (same, still, blurred))
    assert (same["motion"], same["detail"], same["contrast"]) == pytest.approx((1, 1, 1))
    # 7 clips in 60 dimensions: roots of zero eigenvalues that rounding moved by 1e-16, sqrt(1e-16) each
    assert same["frechet"] == pytest.approx(0, abs=1e-4) and still["motion"] == 0
    assert blurred["detail"] < 0.5 and min(still["frechet"], blurred["frechet"]) > same["frechet"] + 1


def test_a_blurred_network_is_worse_than_a_sharp_one_beyond_noise():
    """64 clips each: paired differences of the energies; one network against itself differs in nothing."""
    draw = torch.Generator().manual_seed(0)
    x0, other = (torch.randn(64, 4, 3, 6, 6, generator=draw) for _ in range(2))
    real, sharp, blurred = (latents.Sampled(None, None, {}, None) for _ in range(3))
    latents.note(real, x0)
    latents.note(sharp, other)
    latents.note(blurred, torch.nn.functional.avg_pool3d(other, (1, 3, 3), 1, (0, 1, 1)))
    found = {name: latents.statistics(s.values(real)) for name, s in (("sharp", sharp), ("blurred", blurred))}
    away = differences(found["blurred"], found["sharp"], latents.GOALS, 0)
    assert {score: away[score]["verdict"] for score in ("detail", "contrast", "kid")} == dict.fromkeys(
        ("detail", "contrast", "kid"), "worse"
    )
    blur, plain = (float(found[name]["detail"][0](torch.arange(64)[None])) for name in ("blurred", "sharp"))
    assert away["detail"]["difference"] == pytest.approx(abs(blur - 1) - abs(plain - 1))
    same = differences(found["sharp"], found["sharp"], latents.GOALS, 0)
    assert {row["verdict"] for row in same.values()} == {"no difference"} and set(same) == set(latents.GOALS)
    few = {name: (statistic, 63) for name, (statistic, _) in found["sharp"].items()}
    assert differences(few, few, latents.GOALS, 0) == {}


def test_refused(evaluated, capsys):
    root, _ = evaluated
    words = [f"model={root / 'student'}", f"data={root / 'cache'}", f"out={root / 'p.json'}", "progress=false"]
    for more, said in (("noises=2", "noises=2: diversity is measured"), ("path=pruned", "names no pruned_path")):
        with pytest.raises(SystemExit):
            main(evaluate, "evaluate", [*words, more])
        assert said in capsys.readouterr().err

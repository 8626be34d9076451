"""Wan2.2 A14B's pipelines with two experts: generate, export and original folders against stock diffusers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import error_line, run_train
from PIL import Image
from students import CLIP, KEEP, PROMPT, STEPS, clip, make_pair, same_noise, stock

from fastlightgen.config import main
from fastlightgen.encode import encode
from fastlightgen.export import export
from fastlightgen.models.folder.experts import experts_of
from fastlightgen.models.folder.pair import load_sampler
from fastlightgen.models.folder.weights import load_model, read_card
from fastlightgen.models.sample import sample
from fastlightgen.pipelines.encoders import Encoders
from fastlightgen.rng import generator

H, W, F = CLIP
LATENT = (1, 16, 3, H // 8, W // 8)
WORDS = ("threads=1", "progress=false")
KINDS = ["a14b", "a14b_i2v"]


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory) -> Path:
    """Students of both experts of both pipelines, as exports, and a picture."""
    root = tmp_path_factory.mktemp("a14b")
    pixels = np.random.default_rng(0).integers(0, 256, (H, W, 3), np.uint8)
    Image.fromarray(pixels).save(root / "p.png")
    for kind in KINDS:
        model = make_pair(pipeline(kind), root / f"{kind}-run")
        words = [f"model={model}", f"pipeline={pipeline(kind)}", f"out={root / kind}", "dtype=float32", "original=true"]
        main(export, "export", [*words, *WORDS])
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_generate_is_the_stock_pipeline(folder: Path, tmp_path, monkeypatch, kind: str):
    """From the same noise, the export in stock diffusers and our command differ by rounding only."""
    pictured = kind == "a14b_i2v"
    got = clip(tmp_path / "a.png", folder / kind, *[f"image={folder / 'p.png'}"] * pictured)
    same_noise(monkeypatch, [torch.randn(LATENT, generator=generator(3, i)) for i in range(STEPS)])
    given = {"image": Image.open(folder / "p.png")} if pictured else {}
    call = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "height": H, "width": W, "num_frames": F}
    pipe, used = stock(folder / kind), list[str]()
    for part in ("transformer", "transformer_2"):
        getattr(pipe, part).register_forward_pre_hook(lambda *_, part=part: used.append(part))
    frames = pipe(prompt=PROMPT, latents=torch.randn(LATENT, generator=generator(3)), **given, **call).frames[0]
    assert used == ["transformer"] * 2 + ["transformer_2"] * 2  # of 1, .9375, .8333, .625 two are above .875 and .9
    assert len(np.unique(got)) > 20
    assert np.abs(got - np.round(frames * 255)).max() <= 1  # a value next to a rounding boundary may move by one level


@pytest.mark.parametrize("second", [None, 2.0])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_teacher_is_the_stock_pipeline(pipeline, kind: str, second: float | None):
    """The latents of both experts under guidance, from one noise, at the stock scheduler's own times."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    source, pipe = pipeline(kind), stock(pipeline(kind))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    encoders, noise = Encoders(source), torch.randn(LATENT, generator=generator(3))
    shared, given = {}, {}
    if kind == "a14b_i2v":
        pixels = np.random.default_rng(0).integers(0, 256, (H, W, 3), np.uint8)
        shared, given = encoders.image(pixels, F), {"image": Image.fromarray(pixels)}
        assert shared.keys() == {"image"}
    call = {
        "num_inference_steps": 6,
        "guidance_scale": 3.0,
        "guidance_scale_2": second,
        "height": H,
        "width": W,
        "num_frames": F,
    }
    wanted = pipe(prompt=PROMPT, latents=noise, output_type="latent", **given, **call).frames
    fields, null = ({k: v[None] for k, v in f.items()} for f in (encoders.text(PROMPT) | shared, encoders.text("")))
    cond, blank = encoders.family.cond(**fields), encoders.family.cond(**fields | null)
    times, pair = pipe.scheduler.sigmas[:-1].tolist(), experts_of(source)
    got = sample(load_sampler(source), cond, blank, noise, times, 3.0, "ode", guidance_2=second)
    assert pair is not None and 0 < sum(t < pair.boundary for t in times) < 6 and wanted.std() > 0.1
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_the_stages_read_a_cache(pipeline, tmp_path):
    """Encoded by the pipeline without CLIP; each stage trains both experts, and the next one starts from both."""
    rng, source = np.random.default_rng(1), pipeline("a14b_i2v")
    for number in range(3):
        (tmp_path / f"videos/{number}").mkdir(parents=True)
        (tmp_path / f"videos/{number}.txt").write_text(PROMPT)
        for k in range(5):
            Image.fromarray(rng.integers(0, 256, (32, 48, 3), np.uint8)).save(tmp_path / f"videos/{number}/{k}.png")
    words = [f"videos={tmp_path / 'videos'}", f"pipeline={source}", f"out={tmp_path / 'cache'}", "workers=0"]
    main(encode, "encode", [*words, "buckets=[32x48]", "frames=5", "dtype=float32", "save_dtype=float32", *WORDS])
    words = [f"data={tmp_path / 'cache'}", f"run={tmp_path / 'run'}", f"model={source}", "shift=5", *WORDS]
    words += ["batch=1", "sample_every=0"]
    run_train(*words, "stage=1", "clips=1", "timesteps=1")
    run_train(*words, "stage=2", "iters=1")
    run_train(*words, "stage=3", "iters=2", "critic_start=0", "ratio=1")
    cards = [read_card(tmp_path / "run/stage3/model" / expert) for expert in ("high", "low")]
    assert [(c["expert"], c["boundary"], len(c["kept_blocks"])) for c in cards] == [("high", 0.9, 3), ("low", 0.9, 3)]
    words = [f"model={tmp_path / 'run/stage3/model'}", f"pipeline={source}", f"out={tmp_path / 'out'}", "dtype=float32"]
    main(export, "export", [*words, *WORDS])
    text = (tmp_path / "out/README.md").read_text()
    assert "| boundary | 0.9 |" in text and "| `transformer_2`: network | 3 of 4 `blocks` |" in text


def test_mistakes(pipeline, folder: Path, tmp_path, capsys):
    """One line each: a model and a pipeline of different releases."""
    old, new = pipeline("wan_t2v"), pipeline("a14b")
    for model, source, message in (
        (folder / "a14b-run", old, "has one network, as Wan2.1 has, and the model two experts, as Wan2.2 A14B has"),
        (old, new, "has two experts, as Wan2.2 A14B has, and the model one network, as Wan2.1 has; give the pipeline"),
    ):
        words = [f"model={model}", f"pipeline={source}", f"out={tmp_path / 'x'}", *WORDS]
        assert message in error_line(capsys, lambda *w: main(export, "export", list(w)), *words)
    for kept, other, said in (
        ("a14b_i2v", "wan_i2v", "reads CLIP tokens, as Wan2.1's, and the pipeline has no"),
        ("wan_i2v", "a14b_i2v", "reads no CLIP tokens, as Wan2.2's, and the pipeline has an"),
    ):
        shutil.copytree(pipeline(kept), mixed := tmp_path / kept)
        shutil.rmtree(mixed / "transformer")
        shutil.copytree(pipeline(other) / "transformer", mixed / "transformer")
        with pytest.raises(ValueError, match=f"its network {said} image_encoder/; give a network and a pipeline"):
            Encoders(mixed)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_form_holds_the_same_experts(folder: Path, kind: str):
    pairs = [experts_of(folder / form) for form in (f"{kind}-run", kind, f"{kind}/original")]
    assert {pair.boundary for pair in pairs} == {0.875 if kind == "a14b" else 0.9}
    for expert, blocks in (("high", 3), ("low", 2)):
        nets = [load_model(pair.of(expert)) for pair in pairs]
        inputs = nets[0].example_inputs(batch=2)[:3]
        assert all(net.num_blocks == blocks and torch.equal(nets[0](*inputs), net(*inputs)) for net in nets)
    config = json.loads((folder / kind / "original/low_noise_model/config.json").read_text())
    assert config["model_type"] == ("t2v" if kind == "a14b" else "i2v") and config["num_layers"] == 2
    index = json.loads((folder / kind / "model_index.json").read_text())
    assert index["boundary_ratio"] == pairs[0].boundary and index["transformer_2"][1] == "WanTransformer3DModel"
    kept = [read_card(folder / kind / part)["kept_blocks"] for part in ("transformer", "transformer_2")]
    assert kept == [KEEP, [1, 3]]

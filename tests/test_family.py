"""A third, invented family: with one record and one call to `register`, every command and stage works with it.

Shapes: B batch, F H W latent, L tokens, T text tokens, D hidden, S mood.
"""

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import counted, run_train
from PIL import Image
from ribbon import (
    FRAMES,
    HEIGHT,
    LATENT,
    RIBBON,
    TEXT_TOKENS,
    WIDTH,
    RibbonCond,
    RibbonConfig,
    RibbonModel,
    stock_inputs,
)

from fastlightgen import flow
from fastlightgen.config import main
from fastlightgen.data.source import CacheSource
from fastlightgen.encode import encode
from fastlightgen.export import export
from fastlightgen.generate import generate
from fastlightgen.models.base import Cond, Stream
from fastlightgen.models.encoding import pixels
from fastlightgen.models.families import FAMILIES, block_counts, build, network, recognise, register
from fastlightgen.models.folder.weights import load_model, read_card
from fastlightgen.pipelines.encoders import Encoders
from fastlightgen.planner.budget import load_network
from fastlightgen.rng import generator
from fastlightgen.world.source import open_source

diffusers = pytest.importorskip("diffusers")
from diffusers import FlowMatchEulerDiscreteScheduler  # noqa: E402
from ribbon_stock import RibbonPipeline, RibbonText, RibbonTransformer, RibbonVAE  # noqa: E402

PROMPTS = ("a red ribbon turns", "blue and green", "so grey", "a yellow field")
WORDS = ("progress=false", "threads=1")


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    register(RIBBON)
    with pytest.MonkeyPatch.context() as patch:
        for stock in (RibbonPipeline, RibbonTransformer):
            patch.setattr(diffusers, stock.__name__, stock, raising=False)
        yield
    del FAMILIES["ribbon"]


def film(seed: int) -> np.ndarray:
    """Frames [5, 32, 64, 3] that the VAE reproduces: one colour per patch of 16 x 16, frames 1 to 4 equal."""
    colours = np.random.default_rng(seed).integers(0, 256, (2, 2, 4, 3), np.uint8)
    return colours.repeat(16, 1).repeat(16, 2)[[0, 1, 1, 1, 1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the pipeline, its cache, a run of stages 0 to 3 and the export."""
    root = tmp_path_factory.mktemp("ribbon")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = RibbonVAE(), RibbonText(), RibbonTransformer(), FlowMatchEulerDiscreteScheduler(shift=3.0)
        RibbonPipeline(*parts).save_pretrained(root / "pipeline")
    for number, prompt in enumerate(PROMPTS):
        (root / "videos" / f"{number}").mkdir(parents=True)
        (root / "videos" / f"{number}.txt").write_text(prompt)
        for k, picture in enumerate(film(number)):
            Image.fromarray(picture).save(root / "videos" / f"{number}" / f"{k}.png")
    types = ["dtype=float32", "save_dtype=float32", "workers=0"]
    main(encode, "encode", [f"videos={root}/videos", f"pipeline={root}/pipeline", f"out={root}/cache", *types, *WORDS])

    common = [f"data={root}/cache", f"run={root}/run", f"pipeline={root}/pipeline", "batch=2", "shift=3", *WORDS]
    run_train(*common, f"model={root}/pipeline", "stage=0", f"init={root}/pipeline", "iters=60", "lr=2e-2")
    common += [f"model={root}/run/stage0/model", "log_every=1"]
    run_train(*common, "stage=1", "clips=1", "timesteps=2")
    run_train(*common, "stage=2", "iters=3")
    run_train(*common, "stage=3", "iters=4", "ratio=2", "critic_start=0", "steps=3", "sampler=ode")
    main(export, "export", [
        f"model={root}/run/stage3/model", f"pipeline={root}/pipeline", f"out={root}/out", "dtype=float32",
        "original=true", *WORDS,
    ])  # fmt: skip
    return root


def test_the_cache_holds_what_the_encoders_make(folder: Path):
    encoders, source = Encoders(folder / "pipeline"), open_source(f"{folder}/cache", 0)
    assert isinstance(source, CacheSource) and len(source.cache) == len(PROMPTS)
    for number, prompt in enumerate(PROMPTS):
        clip, stored = encoders.clip(film(number), prompt), source.cache.read([number])
        assert clip["latents"].shape == (8, *LATENT) and stored.keys() == clip.keys()
        assert all(torch.equal(stored[key][0], value) for key, value in clip.items())
        video = pixels(film(number))
        # The VAE averages 1024 equal numbers, summed one by one in float32: error at most 1024 x 2^-24 = 6e-5.
        torch.testing.assert_close(encoders.decode(clip["latents"]), video, rtol=0, atol=1e-4)
    frame, text = encoders.numbers(HEIGHT * WIDTH, FRAMES)
    assert (frame, text) == (clip["latents"].numel() + clip["image"].numel(), clip["text"].numel())
    about = source.description
    assert (about["family"], about["image_condition"], about["text_tokens"]) == ("ribbon", "first_frame", TEXT_TOKENS)
    assert (about["fps"], about["frames"], about["shift"], about["scale"]) == (8, FRAMES, [pytest.approx(0.2)], [3.0])


def test_a_dropped_prompt_takes_its_mood_along(folder: Path):
    batch = open_source(f"{folder}/cache", 0).batch(0, 2)
    assert type(batch.cond) is type(batch.null) is RibbonCond
    mixed = batch.drop_text(torch.tensor([True, False]))
    for key in ("text", "text_len", "mood"):
        value, null, own = (vars(c)[key] for c in (mixed, batch.null, batch.cond))
        assert torch.equal(value[0], null[0]) and torch.equal(value[1], own[1]) and not torch.equal(null, own)
    assert mixed.image is batch.cond.image is batch.null.image


@torch.no_grad()
def test_the_walk_is_one_call_per_stream():
    model = build(RibbonModel(RibbonConfig()).config, seed=1)
    x_t, t, cond, null = model.example_inputs(batch=2)
    streams = [Stream(cond, [0, 2, 3]), Stream(null), Stream(cond)]
    for v, stream in zip(model.walk(x_t, t, streams), streams, strict=True):
        torch.testing.assert_close(v, model(x_t, t, stream.cond, stream.keep), rtol=1e-5, atol=1e-5)
    assert torch.equal(model(x_t, t, cond, [0, 2, 3]), model.prune([0, 2, 3])(x_t, t, cond))


def test_the_plan_counts_this_network():
    """Parameters and operations of matrix products equal torch's counts."""
    model = build({"_class_name": "RibbonTransformer"}, seed=1)
    net = load_network(model.config, f"{HEIGHT}x{WIDTH}x{FRAMES}", 0)
    assert net.params == sum(p.numel() for p in model.parameters()) and net.latent == LATENT
    x_t, t, cond, _ = model.example_inputs()
    work = [net.text, net.embed, net.unembed, *(w for b in net.blocks for w in (b.shared, b.private, b.prompt))]
    assert counted(lambda: model(x_t, t, cond)) == sum(w.forward for w in work)
    assert network(model.config, LATENT) == net and block_counts(model.config) == {"blocks": 4}
    with pytest.raises(ValueError, match=r"height is 48; wanted a multiple of 32 \(VAE 16, patch 2\), for example 480"):
        load_network(model.config, "48x64x5", 0)


@torch.no_grad()
def test_the_stages_trained_it(folder: Path):
    source = open_source(f"{folder}/cache", 0)
    batch = source.batch(0, 3)
    noise, t = torch.randn(batch.x0.shape, generator=generator(1)), 0.8
    x_t = flow.add_noise(batch.x0, noise, t)
    before, after = (
        float((load_model(folder / model)(x_t, t, batch.cond) - (noise - batch.x0)).square().mean())
        for model in ("pipeline", "run/stage0/model")
    )
    assert after < 0.8 * before  # 0.70: it was trained on these clips
    cards = {stage: read_card(folder / f"run/stage{stage}/model") for stage in (0, 2, 3)}
    assert all((card["family"], card["vae"]) == ("ribbon", source.description["vae"]) for card in cards.values())
    assert cards[3]["kept_blocks"] == cards[2]["pruned_path"] and len(cards[3]["kept_blocks"]) == 3
    assert (cards[3]["ladder"], cards[3]["sampler"]) == ([1.0, pytest.approx(6 / 7), pytest.approx(0.6)], "ode")
    assert load_model(folder / "run/stage3/model").num_blocks == 3
    assert (folder / "run/stage3/samples/step-000004.gif").is_file()  # decoded by the pipeline's VAE


@torch.no_grad()
def test_the_export_is_the_same_network(folder: Path):
    """Compare with the stock class as the command does, but for a batch of two; check the written files."""
    model, stock = (
        load_model(folder / "run/stage3/model"),
        RibbonTransformer.from_pretrained(folder / "out/transformer"),
    )
    x_t, t, cond, _ = model.example_inputs(batch=2, seed=5)
    v, v_stock = model(x_t, t, cond), stock(**stock_inputs(model.cfg, x_t, t, cond))[0]
    torch.testing.assert_close(v[:, :, 1:], v_stock[:, :, 1:], rtol=1e-5, atol=1e-5)  # frame 0 is given
    torch.testing.assert_close(x_t[:, :, :1] - t.view(-1, 1, 1, 1, 1) * v[:, :, :1], cond.image, rtol=1e-4, atol=1e-5)
    original = load_model(folder / "out/original")
    assert json.loads((folder / "out/original/config.json").read_text())["_class_name"] == "RibbonNet"
    assert all(torch.equal(a, b) for a, b in zip(original.parameters(), model.parameters(), strict=True))
    card = json.loads((folder / "out/fastlightgen.json").read_text())
    assert card["call"] == {"num_inference_steps": 3, "true_cfg_scale": 1.0}
    assert "call it with `true_cfg_scale=1.0`" in (folder / "out/README.md").read_text()


@torch.no_grad()
def test_generate_samples_as_the_stock_parts_do(folder: Path):
    """From the same seed, the command and a loop over the exported parts give the same frames."""
    Image.fromarray(film(9)[0]).save(folder / "first.png")
    words = [f"model={folder}/out", "prompt=a red ribbon", f"image={folder}/first.png", f"out={folder}/a.png", "seed=4"]
    main(generate, "generate", [*words, *WORDS])
    sheet = np.asarray(Image.open(folder / "a.png")).astype(int).reshape(HEIGHT, FRAMES, WIDTH, 3).transpose(1, 0, 2, 3)

    pipe = RibbonPipeline.from_pretrained(folder / "out")
    text, length, mood = pipe.encode_prompt("a red ribbon", TEXT_TOKENS)
    image = (pipe.vae.encode(pixels(film(9)[:1])[None]).latent_dist.mode() - 0.2) * 3.0
    x = torch.randn((1, 8, *LATENT), generator=generator(4))
    pipe.scheduler.set_timesteps(3)
    for t in pipe.scheduler.timesteps:
        x = torch.cat([image, x[:, :, 1:]], 2)
        times = torch.tensor([[0.0, float(t)]])
        v = pipe.transformer(x, times, mood[None], text[None], length[None])[0]
        x = pipe.scheduler.step(v, t, x, return_dict=False)[0]
    x = torch.cat([image, x[:, :, 1:]], 2)
    video = pipe.vae.decode(x / 3.0 + 0.2)[0][0].clamp(-1, 1)
    wanted = (video * 127.5 + 127.5).round().int().permute(1, 2, 3, 0).numpy()
    assert np.abs(sheet - wanted).max() <= 1 and len(np.unique(sheet)) > 10  # a value at a rounding boundary can differ
    assert np.abs(sheet[0] - film(9)[0]).max() <= 1  # the given frame


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["size=48x64x5"], "size=48x64x5: height and width must be multiples of 32, frames 4k+1 (5, 9, ... 81)"),
        (["image="], "image=: this pipeline needs a picture"),
    ],
)
def test_mistakes(folder: Path, capsys, words: list[str], message: str):
    given = dict(w.split("=", 1) for w in (f"model={folder}/out", "prompt=x", f"image={folder}/first.png", *words))
    with pytest.raises(SystemExit) as stop:
        main(generate, "generate", [*(f"{k}={v}" for k, v in given.items()), f"out={folder}/b.png", *WORDS])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_weights_and_names_are_distinguished():
    model = build({"_class_name": "RibbonTransformer"}, seed=0)
    assert recognise(model.state_dict()) == "Ribbon (diffusers format)"
    assert recognise(["ribbon.mood_in.weight"]) == "Ribbon (original format)"
    with pytest.raises(AssertionError, match="ribbon"):
        register(RIBBON)
    with pytest.raises(ValueError, match="_class_name is 'Flux'; supported: WanTransformer3DModel, .*RibbonNet"):
        build({"_class_name": "Flux"})
    assert {f.name for f in fields(RibbonCond)} - {f.name for f in fields(Cond)} == {"mood"}

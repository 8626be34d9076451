"""Wan2.2 TI2V's pipelines, text-to-video and image-to-video: generate, encode and export against stock diffusers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import error_line, run_train
from PIL import Image
from students import CLIP, PROMPT, STEPS, changed, clip, film, make_student, same_noise, stock, write_films

from fastlightgen.config import main
from fastlightgen.encode import encode
from fastlightgen.export import export
from fastlightgen.generate import generate
from fastlightgen.models.folder.weights import load_model, save_model
from fastlightgen.pipelines.encoders import Encoders
from fastlightgen.rng import generator

H, W, F = CLIP
LATENT = (1, 48, 3, H // 16, W // 16)
WORDS = ("threads=1", "progress=false")


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory) -> Path:
    """Students of both pipelines as exports, a picture, and a cache of the image-to-video pipeline."""
    root = tmp_path_factory.mktemp("ti2v")
    Image.fromarray(film(0)[0]).save(root / "p.png")
    for kind in ("ti2v", "ti2v_i2v"):
        model = make_student(pipeline(kind), root / f"{kind}-student")
        words = [f"model={model}", f"pipeline={pipeline(kind)}", f"out={root / kind}", "dtype=float32", "original=true"]
        main(export, "export", [*words, *WORDS])
    write_films(root / "videos", [PROMPT] * 3)
    words = [f"videos={root / 'videos'}", f"pipeline={pipeline('ti2v_i2v')}", f"out={root / 'cache'}", "workers=0"]
    sizes = [f"buckets=[{H}x{W}]", f"frames={F}", "dtype=float32", "save_dtype=float32"]
    main(encode, "encode", [*words, *sizes, *WORDS])
    return root


@pytest.mark.parametrize("kind", ["ti2v", "ti2v_i2v"])
def test_generate_is_the_stock_pipeline(folder: Path, tmp_path, monkeypatch, kind: str):
    """From the same noise, a student's export in stock diffusers and our command differ by rounding only."""
    pictured = kind == "ti2v_i2v"
    got = clip(tmp_path / "a.png", folder / kind, *[f"image={folder / 'p.png'}"] * pictured)
    same_noise(monkeypatch, [torch.randn(LATENT, generator=generator(3, i)) for i in range(STEPS)])
    given = {"image": Image.open(folder / "p.png")} if pictured else {}
    call = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "height": H, "width": W, "num_frames": F}
    noise = torch.randn(LATENT, generator=generator(3))
    frames = stock(folder / kind)(prompt=PROMPT, latents=noise, **given, **call).frames[0]
    assert len(np.unique(got)) > 20
    assert np.abs(got - np.round(frames * 255)).max() <= 1  # a value next to a rounding boundary may move by one level


def test_the_text_pipeline_also_takes_a_picture(folder: Path, tmp_path):
    """Both folders hold the same weights, so the same picture gives the same file."""
    picture = f"image={folder / 'p.png'}"
    a, b = (clip(tmp_path / f"{kind}.png", folder / kind, picture) for kind in ("ti2v", "ti2v_i2v"))
    assert np.array_equal(a, b) and not np.array_equal(a, clip(tmp_path / "c.png", folder / "ti2v"))


@torch.no_grad()
def test_a_cache_holds_the_stock_latents(pipeline, folder: Path):
    """Normalised latents of the clip; frame 0 and the condition are the picture's own, as the stock pipeline has it."""
    encoders, frames = Encoders(pipeline("ti2v_i2v")), film(1)
    got = encoders.clip(frames, PROMPT)
    vae, video = encoders.vae, torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 127.5 - 1
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    whole, first = ((vae.encode(v).latent_dist.mode()[0] - mean) / std for v in (video, video[:, :, :1]))
    noise = torch.zeros(LATENT)
    still = video[:, :, 0]
    _, condition, mask = encoders.pipe.prepare_latents(
        still, 1, 48, H, W, F, dtype=torch.float32, device="cpu", latents=noise
    )
    assert got["latents"].shape == LATENT[1:] and got["image"].shape == (49, 1, *LATENT[3:])
    torch.testing.assert_close(got["latents"], torch.cat([first, whole[:, 1:]], 1), rtol=0, atol=2e-5)
    torch.testing.assert_close(got["image"][1:], condition[0], rtol=0, atol=2e-5)
    assert torch.equal(got["image"][:1], 1 - mask[0, :, :1])  # their mask is 0 where the frame is given
    assert torch.equal(got["image"][1:], got["latents"][:, :1])
    back, wanted = encoders.decode(got["latents"]), vae.decode((got["latents"] * std + mean)[None]).sample[0]
    torch.testing.assert_close(back, wanted, rtol=0, atol=1e-4)
    assert encoders.numbers(H * W, F) == (got["latents"].numel() + got["image"].numel(), got["text"].numel())


def test_first_frames_in_a_cache_of_the_text_pipeline(pipeline):
    """Both pipelines hold the same VAE and text encoder."""
    plain, given = (Encoders(pipeline("ti2v"), first_frame=first) for first in (False, True))
    wanted = Encoders(pipeline("ti2v_i2v")).clip(film(1), PROMPT)
    got, without = given.clip(film(1), PROMPT), plain.clip(film(1), PROMPT)
    assert got.keys() == wanted.keys() == without.keys() | {"image"}
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    assert torch.equal(got["latents"][:, 1:], without["latents"][:, 1:])
    assert [e.description()["image_condition"] for e in (plain, given)] == [None, "first_frame"]
    with pytest.raises(ValueError, match="first_frame=true: WanPipeline of .* takes no first frame; leave"):
        Encoders(pipeline("wan_t2v"), first_frame=True)


def test_the_stages_read_the_cache(pipeline, folder: Path, tmp_path):
    words = [f"data={folder / 'cache'}", f"run={tmp_path}", f"model={pipeline('ti2v_i2v')}", "shift=5", *WORDS]
    words += ["data_check=off"]
    run_train(*words, "stage=1", "clips=1", "batch=1", "timesteps=1")
    run_train(*words, "stage=2", "iters=1", "batch=1")
    card = json.loads((tmp_path / "stage2/model/fastlightgen.json").read_text())
    assert card["family"] == "wan-ti2v" and card["num_blocks"] == 4


@torch.no_grad()
def test_the_original_format_is_the_same_network(folder: Path):
    config = json.loads((folder / "ti2v/original/config.json").read_text())
    assert (config["_class_name"], config["model_type"], config["in_dim"], config["out_dim"]) == (
        "WanModel", "ti2v", 48, 48,
    )  # fmt: skip
    ours, original = load_model(folder / "ti2v-student"), load_model(folder / "ti2v/original")
    inputs = ours.example_inputs(batch=2)[:3]
    assert torch.equal(ours(*inputs), original(*inputs)) and original.family == "wan-ti2v"
    assert json.loads((folder / "ti2v/model_index.json").read_text())["expand_timesteps"] is True
    assert "expand_timesteps" not in json.loads((folder / "ti2v/transformer/config.json").read_text())


def test_mistakes(pipeline, folder: Path, tmp_path, capsys):
    old, new = pipeline("wan_t2v"), pipeline("ti2v")
    pair = "model_index.json describes {}, transformer/config.json {}; copy the folder again"
    cases = {
        changed(new, tmp_path / "a", transformer=old / "transformer"): pair.format("Wan2.2 TI2V", "Wan"),
        changed(old, tmp_path / "b", transformer=new / "transformer"): pair.format("Wan", "Wan2.2 TI2V"),
        changed(new, tmp_path / "c", vae=old / "vae"): "vae: makes latents of 16 channels, 8 pixels wide, and this "
        "network reads 48 channels, 16 pixels wide; copy the VAE",
    }
    for source, message in cases.items():
        words = [f"model={source}", f"prompt={PROMPT}", f"size={H}x{W}x{F}", f"out={tmp_path}/x.png", *WORDS]
        assert message in error_line(capsys, lambda *w: main(generate, "generate", list(w)), *words)
    # A checkpoint of 2.1 given as 2.2, and the reverse.
    for config, weights in ((old, new), (new, old)):
        mixed = changed(config / "transformer", tmp_path / f"mixed-{config.name}")
        name = "diffusion_pytorch_model.safetensors"
        shutil.copyfile(weights / "transformer" / name, mixed / name)
        with pytest.raises(ValueError, match="do not fit config.json: patch_embedding.weight is .*, wanted") as error:
            load_model(mixed)
        assert "\n" not in str(error.value)
    # A cache of another VAE.
    save_model(load_model(old), tmp_path / "old")
    words = [f"data={folder / 'cache'}", f"run={tmp_path}/run", f"model={tmp_path / 'old'}", "shift=5", *WORDS]
    line = error_line(capsys, run_train, "stage=1", *words)
    assert "made with family wan-ti2v, the model has wan; encode the videos again" in line

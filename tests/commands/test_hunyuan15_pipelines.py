"""HunyuanVideo-1.5's pipelines, text-to-video and image-to-video: generate, encode and export; stock diffusers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import error_line, run_train
from PIL import Image
from safetensors.torch import load_file
from students import STEPS, changed, clip, film, make_student, same_noise, stock, write_films

from fastlightgen.config import main
from fastlightgen.encode import encode
from fastlightgen.export import export
from fastlightgen.generate import generate
from fastlightgen.models.folder.released import sampling
from fastlightgen.models.folder.weights import load_model, save_model
from fastlightgen.models.hunyuan15.config import Hunyuan15Cond
from fastlightgen.pipelines.encoders import Encoders
from fastlightgen.rng import generator
from fastlightgen.speed import speed

SIZE = H, W, F = 64, 64, 9  # the stock image-to-video pipeline makes clips of this size from a square picture
LATENT = (1, 32, 3, H // 16, W // 16)
PROMPT = 'a red ball moves right, and a sign says "GO"'
WORDS = ("threads=1", "progress=false")
KINDS = ("hunyuan15_t2v", "hunyuan15_i2v")


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory) -> Path:
    """Students of both pipelines as exports, a picture, and a cache of the image-to-video pipeline."""
    root = tmp_path_factory.mktemp("hunyuan15")
    Image.fromarray(film(0, SIZE)[0]).save(root / "p.png")
    for kind in KINDS:
        model = make_student(pipeline(kind), root / f"{kind}-student")
        words = [f"model={model}", f"pipeline={pipeline(kind)}", f"out={root / kind}", "dtype=float32"]
        main(export, "export", [*words, "original=true" if kind == KINDS[0] else "original=false", *WORDS])
    write_films(root / "videos", ["no quoted words", PROMPT, PROMPT], SIZE)
    words = [f"videos={root / 'videos'}", f"pipeline={pipeline(KINDS[1])}", f"out={root / 'cache'}", "workers=0"]
    sizes = [f"buckets=[{H}x{W}]", f"frames={F}", "dtype=float32", "save_dtype=float32"]
    main(encode, "encode", [*words, *sizes, *WORDS])
    return root


def by_stock(pipe, picture: Path | None, steps: int, **call) -> np.ndarray:
    """The frames that the stock pipeline makes from the same noise, in levels from 0 to 255."""
    given = {"height": H, "width": W} if picture is None else {"image": Image.open(picture)}
    given |= {"latents": torch.randn(LATENT, generator=generator(3)), "num_frames": F, "num_inference_steps": steps}
    return 255 * pipe(prompt=PROMPT, **given, **call).frames[0]


@pytest.mark.parametrize("kind", KINDS)
def test_generate_is_the_stock_pipeline(folder: Path, tmp_path, monkeypatch, kind: str):
    """From the same noise, a student's export in stock diffusers and our command differ by rounding only."""
    picture = folder / "p.png" if kind == KINDS[1] else None
    got = clip(tmp_path / "a.png", folder / kind, *[f"image={picture}"] * bool(picture), prompt=PROMPT, size=SIZE)
    same_noise(monkeypatch, [torch.randn(LATENT, generator=generator(3, i)) for i in range(STEPS)])
    frames = by_stock(stock(folder / kind), picture, STEPS)
    assert len(np.unique(got)) > 20
    assert np.abs(got - np.round(frames)).max() <= 1  # a value next to a rounding boundary may move by one level


@pytest.mark.parametrize("kind", KINDS)
def test_the_guided_teacher_is_the_stock_pipeline(pipeline, folder: Path, tmp_path, kind: str):
    """With the released guidance 6, of which the pipeline's guider knows, and a negative prompt."""
    picture = folder / "p.png" if kind == KINDS[1] else None
    words = ["steps=3", "negative=blurry", *[f"image={picture}"] * bool(picture)]
    got = clip(tmp_path / "a.png", pipeline(kind), *words, prompt=PROMPT, size=SIZE)
    frames = by_stock(stock(pipeline(kind)), picture, 3, negative_prompt="blurry")
    assert np.abs(got - np.round(frames)).max() <= 1


def test_the_guider_says_the_guidance(pipeline, tmp_path):
    """That of a CFG-distilled pipeline, whose network is the same, says 1."""
    assert sampling(pipeline(KINDS[0])).values["guidance"] == 6.0
    distilled = changed(pipeline(KINDS[0]), tmp_path / "distilled")
    (distilled / "guider/guider_config.json").write_text('{"guidance_scale": 1.0}')
    found = sampling(distilled)
    assert found.values["guidance"] == 1.0 and found.sources["guidance"].endswith("guider/guider_config.json")
    (distilled / "guider/guider_config.json").write_text('{"guidance_scale": "much"}')
    with pytest.raises(ValueError, match="guider_config.json: guidance_scale") as error:
        sampling(distilled)
    assert "\n" not in str(error.value)


def test_the_export_turns_the_guider_off(folder: Path):
    for kind in KINDS:
        assert stock(folder / kind).guider.guidance_scale == 1.0
        card = json.loads((folder / kind / "fastlightgen.json").read_text())
        assert card["call"] == {"num_inference_steps": STEPS}
        readme = (folder / kind / "README.md").read_text()
        assert "its part `guider` has `guidance_scale=1.0`" in readme
        assert ("height=" in readme) == (kind == KINDS[0])  # the other takes the size of the picture


@torch.no_grad()
def test_a_cache_holds_the_stock_inputs(pipeline, folder: Path):
    """Latents, text, quoted words and the picture's tokens, as the stock pipeline computes them."""
    encoders, frames = Encoders(pipeline(KINDS[1])), film(1, SIZE)
    got, pipe = encoders.clip(frames, PROMPT), encoders.pipe
    video, scale = torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 127.5 - 1, pipe.vae.config.scaling_factor
    torch.testing.assert_close(got["latents"], pipe.vae.encode(video).latent_dist.mode()[0] * scale, rtol=0, atol=2e-5)
    first = Image.fromarray(frames[0])
    condition, mask = pipe.prepare_cond_latents_and_mask(
        torch.zeros(LATENT), first, 1, H, W, torch.float32, torch.device("cpu")
    )
    torch.testing.assert_close(got["image"], torch.cat([condition, mask], 1)[0], rtol=0, atol=2e-5)
    text, own, glyphs, theirs = pipe.encode_prompt(PROMPT)
    assert (int(got["text_len"]), int(got["text_2_len"])) == (int(own.sum()), int(theirs.sum()))
    assert int(theirs.sum()) == len('Text "GO". ') + 1  # ByT5: a token per byte, and the end
    for name, values, valid in (("text", text, own), ("text_2", glyphs, theirs)):
        assert torch.equal(got[name], (values * valid[..., None])[0])
    embeds = pipe.encode_image(first, 1, torch.device("cpu"), torch.float32)[0]
    assert torch.equal(got["image_embeds"], embeds) and embeds.shape == (729, 8)
    torch.testing.assert_close(
        encoders.decode(got["latents"]), pipe.vae.decode(got["latents"][None] / scale).sample[0], rtol=0, atol=1e-4
    )
    inputs = sum(got[key].numel() for key in ("latents", "image", "image_embeds", "text_2"))
    assert encoders.numbers(H * W, F) == (inputs, got["text"].numel())
    assert int(encoders.text("no quoted words", frames[0])["text_2_len"]) == 0
    plain = Encoders(pipeline(KINDS[0]))
    clip = plain.clip(frames, PROMPT)
    assert "image" not in clip
    assert plain.numbers(H * W, F) == (clip["latents"].numel() + clip["text_2"].numel(), clip["text"].numel())


def test_a_long_prompt_in_bfloat16_keeps_its_length(pipeline):
    """The pipeline's masks have the type of the text encoder, in which 256 + 1 is 256."""
    prompt = f'a red ball moves right, and a sign says "{"x" * 250}"' + " and a blue square" * 80
    wide, narrow = (Encoders(pipeline(KINDS[0]), dtype=dtype).text(prompt) for dtype in (torch.float32, torch.bfloat16))
    lengths = [(int(found["text_len"]), int(found["text_2_len"])) for found in (wide, narrow)]
    assert lengths[0] == lengths[1] and lengths[0][0] > 300 and lengths[0][0] % 4 and lengths[0][1] == 256


def test_the_stages_read_the_cache(pipeline, folder: Path, tmp_path):
    words = [f"data={folder / 'cache'}", f"run={tmp_path}", f"model={pipeline(KINDS[1])}", "shift=5", *WORDS]
    words += ["data_check=off", "batch=1"]
    run_train(*words, "stage=1", "clips=1", "timesteps=1")
    run_train(*words, "stage=2", "iters=2")
    run_train(*words, "stage=3", "iters=1", "ratio=1", "critic_start=0", "steps=2")
    card = json.loads((tmp_path / "stage3/model/fastlightgen.json").read_text())
    assert card["family"] == "hunyuan15" and card["num_blocks"] == 3


@torch.no_grad()
def test_the_original_format_is_the_same_network(folder: Path):
    config = json.loads((folder / KINDS[0] / "original/config.json").read_text())
    found = [config[k] for k in ("_class_name", "in_channels", "ideal_task", "ideal_resolution", "patch_size")]
    assert found == ["HunyuanVideo_1_5_DiffusionTransformer", 32, "t2v", "480p", [1, 1, 1]]
    ours, original = load_model(folder / f"{KINDS[0]}-student"), load_model(folder / KINDS[0] / "original")
    inputs = ours.example_inputs(batch=2)[:3]
    assert torch.equal(ours(*inputs), original(*inputs)) and original.family == "hunyuan15"


@torch.no_grad()
def test_onnxruntime_predicts_what_the_network_predicts(folder: Path, tmp_path):
    """With the token counts of the pipeline; the file masks the padding that the network cuts off."""
    ort = pytest.importorskip("onnxruntime")
    model = folder / f"{KINDS[1]}-student"
    main(export, "export", [f"model={model}", "to=onnx", f"out={tmp_path / 'o'}", f"size={H}x{W}x5", *WORDS])
    session = ort.InferenceSession(str(tmp_path / "o/step.onnx"), providers=["CPUExecutionProvider"])
    shapes = {i.name: tuple(i.shape) for i in session.get_inputs()}
    assert (shapes["text"], shapes["text_2"], shapes["image_embeds"]) == ((1, 1000, 32), (1, 256, 1472), (1, 729, 8))
    net, g = load_model(model).eval(), torch.Generator().manual_seed(0)
    given = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    for own, glyphs in ((7, 0), (1000, 13)):
        given |= {"t": torch.tensor([0.37]), "text_len": torch.tensor([own]), "text_2_len": torch.tensor([glyphs])}
        found = session.run(None, {name: value.numpy() for name, value in given.items()})[0]
        cond = Hunyuan15Cond(**{name: value for name, value in given.items() if name not in ("x_t", "t")})
        wanted = net(given["x_t"], given["t"], cond)
        assert np.abs(found - wanted.numpy()).max() <= 1e-4 and wanted.abs().max() > 0.1


def test_speed_beside_the_stock_pipeline(pipeline, folder: Path, tmp_path, capsys):
    """Its picture decides the size, so another size is no comparison."""
    words = [f"model={folder / KINDS[1]}-student", f"pipeline={pipeline(KINDS[1])}", "turns=1", *WORDS]
    words += [f"image={folder / 'p.png'}", f"prompt={PROMPT}", "device=cpu", f"out={tmp_path / 'speed.json'}"]
    main(speed, "speed", [*words, f"size={H}x{W}x5"])
    own, theirs = json.loads((tmp_path / "speed.json").read_text())["records"]
    assert own["evaluations"] == theirs["evaluations"] == STEPS and theirs["parts"]["network"]["median"] > 0
    line = error_line(capsys, lambda *w: main(speed, "speed", list(w)), *words, "size=32x48x5")
    assert "HunyuanVideo15ImageToVideoPipeline chose" in line


def test_bfloat16_exports_are_compared_too(pipeline, folder: Path, tmp_path):
    model = folder / f"{KINDS[1]}-student"
    main(export, "export", [f"model={model}", f"pipeline={pipeline(KINDS[1])}", f"out={tmp_path / 'b'}", *WORDS])
    weights = load_file(tmp_path / "b/transformer/diffusion_pytorch_model.safetensors")
    assert weights["proj_out.weight"].dtype == torch.bfloat16


def test_mistakes(pipeline, folder: Path, tmp_path, capsys):
    from diffusers import AutoencoderKLHunyuanVideo15

    old, new = pipeline("hunyuan_t2v"), pipeline(KINDS[0])
    pair = "model_index.json describes {}, transformer/config.json {}; copy the folder again"
    first, second = "HunyuanVideo-1.5", "HunyuanVideo"
    narrow = AutoencoderKLHunyuanVideo15(
        block_out_channels=(16, 16, 32, 32, 32), layers_per_block=1, latent_channels=16
    )
    narrow.save_pretrained(tmp_path / "narrow")
    cases = {
        changed(new, tmp_path / "a", transformer=old / "transformer"): pair.format(first, second),
        changed(old, tmp_path / "b", transformer=new / "transformer"): pair.format(second, first),
        changed(
            new, tmp_path / "c", vae=tmp_path / "narrow"
        ): "vae: makes latents of 16 channels, 16 pixels wide, and this "
        "network reads 32 channels, 16 pixels wide; copy the VAE",
    }
    for source, message in cases.items():
        words = [f"model={source}", f"prompt={PROMPT}", f"size={H}x{W}x{F}", f"out={tmp_path}/x.png", *WORDS]
        assert message in error_line(capsys, lambda *w: main(generate, "generate", list(w)), *words)
    # The other family's checkpoint.
    for config, weights, title in ((old, new, first), (new, old, second)):
        mixed = changed(config / "transformer", tmp_path / f"mixed-{config.name}")
        name = "diffusion_pytorch_model.safetensors"
        shutil.copyfile(weights / "transformer" / name, mixed / name)
        with pytest.raises(ValueError, match=rf"{title} \(diffusers format\)") as error:
            load_model(mixed)
        assert "\n" not in str(error.value)
    # A cache of another family, and of another VAE.
    save_model(load_model(old), tmp_path / "old")
    words = [f"data={folder / 'cache'}", f"run={tmp_path}/run", "shift=5", *WORDS]
    line = error_line(capsys, run_train, "stage=1", *words, f"model={tmp_path / 'old'}")
    assert "made with family hunyuan15, the model has hunyuan; encode the videos again" in line
    line = error_line(capsys, run_train, "stage=1", *words, f"model={new}")
    assert "its clips have a first frame, the model wants no first frame; encode the videos again" in line
    save_model(load_model(pipeline(KINDS[1])), tmp_path / "vae", vae="0123456789abcdef")
    line = error_line(capsys, run_train, "stage=1", *words, f"model={tmp_path / 'vae'}")
    assert "the model has 0123456789abcdef; encode the videos again" in line

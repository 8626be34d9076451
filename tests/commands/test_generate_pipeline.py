"""generate with real pipelines (this package's network and sampler, stock encoders and VAE) against stock pipelines."""

import json

import numpy as np
import pytest
import torch
from helpers import error_line
from PIL import Image
from students import STEPS, make_student, same_noise, stock

from fastlightgen.config import main
from fastlightgen.export import export
from fastlightgen.generate import generate
from fastlightgen.pipelines.encoders import Encoders
from fastlightgen.rng import generator

H, W, F = 32, 48, 9
LATENT = (1, 16, 3, H // 8, W // 8)
PROMPT = "a red ball moves right"
LONG = f"{PROMPT}, and a purple zebra with a telescope watches it"  # beyond Hunyuan's template


def run(*words: str) -> None:
    main(generate, "generate", [*words, "threads=1", "progress=false"])


def sheet(path) -> np.ndarray:
    """Cut a png sheet into frames [B, F, H, W, 3]."""
    picture = np.asarray(Image.open(path)).astype(int)
    return picture.reshape(picture.shape[0] // H, H, F, W, 3).transpose(0, 2, 1, 3, 4)


@pytest.fixture(scope="module")
def exported(pipeline, tmp_path_factory):
    """kind -> (student folder, its export)."""
    done = {}

    def get(kind: str):
        if kind not in done:
            root, source = tmp_path_factory.mktemp(kind), pipeline(kind)
            model, out = make_student(source, root / "model"), root / "out"
            words = [f"model={model}", f"pipeline={source}", f"out={out}", "dtype=float32", "progress=false"]
            main(export, "export", words)
            done[kind] = model, out
        return done[kind]

    return get


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (H, W, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    return tmp_path / "p.png"


def noises(seed: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The noise that our sampler starts from, and the noise that it adds after each step."""
    return torch.randn(LATENT, generator=generator(seed)), [
        torch.randn(LATENT, generator=generator(seed, i)) for i in range(STEPS)
    ]


def difference(path, frames: np.ndarray) -> int:
    """Largest difference, in levels of 1/255, between our sheet and the stock pipeline's frames in [0, 1]."""
    got, wanted = sheet(path), np.round(frames * 255).astype(int)
    assert got.shape == wanted.shape and len(np.unique(got)) > 20
    return np.abs(got - wanted).max()


def test_text_to_video_is_the_stock_pipelines(exported, tmp_path, monkeypatch, capsys):
    """With the same seed, a student's export in stock diffusers and our command differ by rounding only."""
    _, out = exported("wan_t2v")
    run(f"model={out}", f"prompt={PROMPT}", f"out={tmp_path / 'a.png'}", f"size={H}x{W}x{F}", "seed=3")
    printed = capsys.readouterr().out
    assert "1 clip(s), 4 steps, guidance 1; load " in printed
    assert all(f" {part} " in printed for part in ("text", "sample", "decode", "write"))
    noise, fresh = noises(3)
    same_noise(monkeypatch, fresh)
    size = {"height": H, "width": W, "num_frames": F}
    frames = stock(out)(prompt=PROMPT, latents=noise, num_inference_steps=STEPS, guidance_scale=1.0, **size).frames
    levels = difference(tmp_path / "a.png", frames)
    print(f"largest pixel difference: {levels}/255")
    assert levels <= 1  # float32: a value next to a rounding boundary may move by one level


def test_image_to_video_is_the_stock_pipelines(exported, picture, tmp_path, monkeypatch):
    """As above with a first frame; the model folder with the teacher's pipeline gives the same file as the export."""
    model, out = exported("wan_i2v")
    words = [f"prompt={PROMPT}", f"image={picture}", f"size={H}x{W}x{F}", "seed=1"]
    run(f"model={out}", f"out={tmp_path / 'a.png'}", *words)
    run(f"model={model}", f"pipeline={out}", f"out={tmp_path / 'b.png'}", *words)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    noise, fresh = noises(1)
    same_noise(monkeypatch, fresh)
    call = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "height": H, "width": W, "num_frames": F}
    frames = stock(out)(image=Image.open(picture), prompt=PROMPT, latents=noise, **call).frames
    assert difference(tmp_path / "a.png", frames) <= 1


@pytest.mark.parametrize("kind", ["hunyuan_t2v", "hunyuan_i2v", "hunyuan_i2v_token"])
def test_hunyuan_is_the_stock_pipelines(exported, picture, tmp_path, monkeypatch, kind):
    """Students of the three variants; the stock pipelines get the same noise as our sampler."""
    _, out = exported(kind)
    words, given = [f"prompt={LONG}", f"size={H}x{W}x{F + 4 * (kind == 'hunyuan_i2v')}", "seed=1"], {}
    if kind != "hunyuan_t2v":
        words, given = [*words, f"image={picture}"], {"image": Image.open(picture)}
    run(f"model={out}", f"out={tmp_path / 'a.png'}", *words)
    call = json.loads((out / "fastlightgen.json").read_text())["call"]
    frames = F + 4 * (kind == "hunyuan_i2v")  # latent_concat drops the four frames of the first latent frame
    shape = (1, 16, (frames - 1) // 4 + 1, H // 8, W // 8)
    first = int(kind == "hunyuan_i2v_token")  # token_replace steps without the first frame
    same_noise(monkeypatch, [torch.randn(shape, generator=generator(1, i))[:, :, first:] for i in range(STEPS)])
    noise, size = torch.randn(shape, generator=generator(1)), {"height": H, "width": W, "num_frames": frames}
    wanted = stock(out)(prompt=LONG, latents=noise, output_type="np", **given, **call, **size).frames
    assert difference(tmp_path / "a.png", wanted) <= 1


def test_teacher_with_guidance(pipeline, tmp_path):
    """A pipeline folder alone: the shift comes from its scheduler, and guidance steers away from `negative`."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder = pipeline("wan_t2v")
    words = [f"model={folder}", f"prompt={PROMPT}", f"size={H}x{W}x{F}", "steps=3", "guidance=4", "negative=a blue cat"]
    run(*words, f"out={tmp_path / 'a.png'}")
    pipe = stock(folder)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()  # Euler steps at the sampling times of shift 3
    sigmas = [3 * u / (1 + 2 * u) for u in (1, 2 / 3, 1 / 3)]
    honest = pipe.scheduler.set_timesteps
    pipe.scheduler.set_timesteps = lambda *_, device: honest(sigmas=sigmas, device=device)
    call = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": H, "width": W, "num_frames": F}
    frames = pipe(prompt=PROMPT, negative_prompt="a blue cat", latents=noises(0)[0], **call).frames
    assert difference(tmp_path / "a.png", frames) <= 1
    run(*(w.replace("negative=a blue cat", "negative=a red ball") for w in words), f"out={tmp_path / 'b.png'}")
    assert (sheet(tmp_path / "a.png") != sheet(tmp_path / "b.png")).any()
    official = Encoders(folder).official_negative
    for name, negative in (("c", "official"), ("d", official)):
        run(*(w.replace("a blue cat", negative) for w in words), f"out={tmp_path / f'{name}.png'}")
    assert (tmp_path / "c.png").read_bytes() == (tmp_path / "d.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_many_prompts(exported, tmp_path, capsys):
    """Every line of a prompt file gives the same clip as that prompt alone with the same seed."""
    _, out = exported("wan_t2v")
    (tmp_path / "list.txt").write_text(f"a blue cat\n\n{PROMPT}\n")
    words = [f"model={out}", f"size={H}x{W}x5", "seed=2"]
    run(*words, f"prompts={tmp_path / 'list.txt'}", f"out={tmp_path / 'many' / 'c.png'}")
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == ["c-000.png", "c-001.png"]
    run(*words, f"prompt={PROMPT}", f"out={tmp_path / 'one.png'}")
    assert (tmp_path / "many" / "c-001.png").read_bytes() == (tmp_path / "one.png").read_bytes()
    assert (tmp_path / "many" / "c-000.png").read_bytes() != (tmp_path / "one.png").read_bytes()
    (tmp_path / "list.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n")
    run(*words, f"prompts={tmp_path / 'list.jsonl'}", f"out={tmp_path / 'd.gif'}")
    with Image.open(tmp_path / "d-000.gif") as gif:
        assert gif.n_frames == 5 and gif.size == (W, H)


@pytest.mark.parametrize(
    "words, message",
    [
        (["size=30x48x9"], "size=30x48x9: height and width must be multiples of 16, frames 4k+1"),
        (["size=32x48x8"], "frames 4k+1"),
        (["size=32x48"], "size=32x48: wanted HEIGHTxWIDTHxFRAMES, for example 480x832x81"),
        (["image=p.png"], "image=p.png: this pipeline takes no picture: leave image= out"),
        (["prompts=list.txt"], "prompt is required: give prompt=TEXT or prompts=FILE, one of them"),
    ],
)
def test_mistakes(exported, tmp_path, capsys, words, message):
    _, out = exported("wan_t2v")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(f"model={out}", f"prompt={PROMPT}", f"out={tmp_path / 'a.png'}", *words)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1


def test_clips_larger_than_the_memory_are_refused_before_the_network_is_read(exported, tmp_path, capsys, monkeypatch):
    _, out = exported("wan_t2v")
    words = [f"model={out}", f"prompt={PROMPT}", f"out={tmp_path / 'a.png'}", f"size={H}x{W}x{F}", "count=7"]
    need = 7 * H * W * F * 3 * 8  # float32, twice
    monkeypatch.setattr("fastlightgen.generate.host_free", lambda: need - 1)
    monkeypatch.setattr("fastlightgen.generate.load_sampler", None)
    assert f"count=7 size={H}x{W}x{F}: the clips alone take" in error_line(capsys, run, *words)


def test_mistakes_of_folders_and_lists(exported, pipeline, tmp_path, capsys):
    model, out = exported("wan_t2v")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"text": "x"}\n')
    (tmp_path / "none.txt").write_text("\n")
    end = [f"out={tmp_path / 'a.png'}", f"size={H}x{W}x{F}"]
    for words, message in (
        ([f"model={out}", f"prompts={tmp_path / 'bad.jsonl'}"], "line 2 has no 'prompt'; wanted {\"prompt\""),
        ([f"model={out}", f"prompts={tmp_path / 'none.txt'}"], "is empty; write one prompt per line"),
        ([f"model={out}", f"prompts={tmp_path / 'absent.txt'}"], "absent.txt: not found"),
        ([f"model={model}", f"prompt={PROMPT}"], "makes latents of real videos; give pipeline=FOLDER"),
        (["model=tiny", f"prompt={PROMPT}"], "size=32x48x9: clips of the built-in world have one size"),
        (["model=tiny", f"pipeline={out}", f"prompt={PROMPT}"], "its network has in_channels 16, the model 25"),
        ([f"model={out}", f"pipeline={pipeline('wan_i2v')}", f"prompt={PROMPT}"], "this pipeline needs a picture"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(*words, *end)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and message in err and err.count("\n") == 1, err

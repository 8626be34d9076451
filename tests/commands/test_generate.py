"""The generate command: its files, and that frames depend only on the seed, the prompt and the picture."""

import numpy as np
import pytest
import torch
from helpers import KEPT, small_wan
from PIL import Image

from fastlightgen.config import main
from fastlightgen.data.frames import read_image
from fastlightgen.generate import generate
from fastlightgen.models.base import Cond
from fastlightgen.models.folder.weights import save_model
from fastlightgen.rng import generator
from fastlightgen.world.builtin import BuiltIn
from fastlightgen.world.captions import tokenise
from fastlightgen.world.codec import Codec, condition
from fastlightgen.world.shapes import WORLD

PROMPT = "a red ball moves right fast then stops"
FRAMES, SIZE = 8, 20
FPS, SCALE = BuiltIn.fps, BuiltIn.scale


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    student = small_wan().prune(KEPT)
    few = {"ladder": [1.0, 0.75], "sampler": "stochastic", "guidance": 1.0}
    save_model(student, root / "student", stage=3, shift=3.0, world=WORLD, **few)
    save_model(small_wan(), root / "teacher", stage=0, steps=2, guidance=2.0, shift=3.0, world=WORLD)
    return root


def run(folders, out, *words: str, model: str = "student", prompt: str = PROMPT):
    main(
        generate,
        "generate",
        [f"model={folders / model}", f"prompt={prompt}", f"out={out}", "threads=1", "progress=false", *words],
    )
    return np.asarray(Image.open(out)) if out.suffix == ".png" else None


def by_hand(net, seed: int, count: int, times: list[float], guidance: float, stochastic: bool) -> torch.Tensor:
    """Text-only clips [count, F, 3, H, W], sampled one clip at a time with plain forwards; the noise is shared."""
    noise = torch.randn(count, 12, FRAMES, SIZE // 2, SIZE // 2, generator=generator(seed))
    (text, _), (null, _) = tokenise([PROMPT]), tokenise([""])
    x, image = noise, torch.zeros(1, 13, FRAMES, SIZE // 2, SIZE // 2)
    for i, t in enumerate(times):
        v = []
        for b in range(count):
            v_c = net(x[b : b + 1], t, Cond(text, image=image))
            v_n = net(x[b : b + 1], t, Cond(null, image=image))
            v.append(v_n + guidance * (v_c - v_n))
        x0 = x - t * torch.cat(v)
        if i + 1 < len(times):
            # ODE: the same noise estimate x1 = x0 + v again; stochastic: fresh noise
            x1 = torch.randn(noise.shape, generator=generator(seed, i)) if stochastic else x0 + torch.cat(v)
            x = (1 - times[i + 1]) * x0 + times[i + 1] * x1
    return Codec().decode(x0)


def sheet(clips: torch.Tensor) -> np.ndarray:
    """A sheet with a row per clip and a column per frame; every pixel is SCALE wide."""
    pixels = (clips.clamp(0, 1) * 255).round().byte().permute(0, 1, 3, 4, 2).numpy()
    rows = [np.concatenate(list(clip), 1) for clip in pixels]
    return np.kron(np.concatenate(rows, 0), np.ones((SCALE, SCALE, 1), np.uint8))


@pytest.mark.parametrize(
    "model, words, times, guidance, stochastic",
    [
        ("student", [], [1.0, 0.75], 1.0, True),
        ("student", ["sampler=ode", "force=true"], [1.0, 0.75], 1.0, False),
        ("student", ["steps=3", "guidance=1.5", "force=true"], [1.0, 2 / (7 / 3), 1 / (5 / 3)], 1.5, True),
        ("teacher", [], [1.0, 0.75], 2.0, False),
        ("teacher", ["steps=1", "guidance=1"], [1.0], 1.0, False),
    ],
)
@torch.no_grad()
def test_the_sheet_shows_the_clips_sampled_by_hand(folders, tmp_path, model, words, times, guidance, stochastic):
    got = run(folders, tmp_path / "new" / "a.png", *words, "seed=3", "count=2", model=model)
    net = small_wan() if model == "teacher" else small_wan().prune(KEPT)
    wanted = sheet(by_hand(net, 3, 2, times, guidance, stochastic))
    assert got.shape == (2 * SIZE * SCALE, FRAMES * SIZE * SCALE, 3)
    # float32 in another batch shape: a value next to a rounding boundary may move by one level
    assert np.abs(got.astype(int) - wanted).max() <= 1 and (got != wanted).mean() < 1e-2
    assert len(np.unique(got)) > 20


@pytest.mark.parametrize("words", ["steps=3", "guidance=1.5", "sampler=ode", "steps=3 guidance=1.5 sampler=ode"])
def test_a_student_is_refused_with_settings_that_it_was_not_trained_for(folders, tmp_path, words, capsys):
    trained = "this student was trained for steps=2 guidance=1 sampler=stochastic"
    with pytest.raises(SystemExit):
        run(folders, tmp_path / "a.png", *words.split())
    assert capsys.readouterr().err == f"error: {words}: {trained}; leave {words} out, or give force=true\n"
    run(folders, tmp_path / "a.png", "steps=2", "guidance=1", "sampler=stochastic")  # its own, written out


def test_same_seed_same_frames(folders, tmp_path):
    a = run(folders, tmp_path / "a.png", "seed=5")
    assert np.array_equal(a, run(folders, tmp_path / "b.png", "seed=5"))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert not np.array_equal(a, run(folders, tmp_path / "c.png", "seed=6"))
    assert not np.array_equal(a, run(folders, tmp_path / "d.png", "seed=5", prompt=PROMPT.replace("red", "blue")))


def test_gif_and_mp4_hold_the_clip(folders, tmp_path):
    whole = run(folders, tmp_path / "a.png", "seed=1", "count=2")
    rows = whole.reshape(2, SIZE * SCALE, FRAMES, SIZE * SCALE, 3).transpose(2, 1, 0, 3, 4)
    frames = rows.reshape(FRAMES, SIZE * SCALE, 2 * SIZE * SCALE, 3).astype(float)  # the clips side by side
    run(folders, tmp_path / "a.gif", "seed=1", "count=2")
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == FRAMES and gif.info["duration"] == 1000 // FPS // 10 * 10 and gif.info["loop"] == 0
        shown = []
        for i in range(FRAMES):
            gif.seek(i)
            shown.append(np.asarray(gif.convert("RGB")).astype(float))
    assert np.abs(np.stack(shown) - frames).mean() < 8  # a palette of 256 colours
    av = pytest.importorskip("av")
    run(folders, tmp_path / "a.mp4", "seed=1", "count=2")
    with av.open(str(tmp_path / "a.mp4")) as film:
        assert film.streams.video[0].average_rate == FPS
        shown = np.stack([f.to_ndarray(format="rgb24") for f in film.decode(video=0)]).astype(float)
    assert shown.shape == frames.shape and np.abs(shown - frames).mean() < 16  # H.264 at half the colour resolution


def test_a_picture_becomes_the_first_frame_condition(folders, tmp_path):
    """Pictures are cropped to the centre square and averaged: a 64x32 picture with a red left quarter is all blue."""
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:, :16] = (255, 0, 0)
    picture[:, 16:] = (0, 0, 255)
    Image.fromarray(picture).save(tmp_path / "p.png")
    small = read_image(str(tmp_path / "p.png"), SIZE, SIZE)
    assert small.shape == (3, SIZE, SIZE) and small[2].min() == 1 and small[:2].max() == 0
    noisy = np.random.default_rng(0).integers(0, 256, (2 * SIZE, 2 * SIZE, 3), np.uint8)
    Image.fromarray(noisy).save(tmp_path / "n.png")
    means = noisy.reshape(SIZE, 2, SIZE, 2, 3).mean((1, 3)).transpose(2, 0, 1) / 255
    assert (
        np.abs(read_image(str(tmp_path / "n.png"), SIZE, SIZE).numpy() - means).max() < 1.01 / 255
    )  # rounded up along each axis
    # one step without guidance is x - v(x): compute it with the condition written out
    got = run(folders, tmp_path / "a.png", f"image={tmp_path / 'p.png'}", "steps=1", "force=true")
    first = Codec().encode(small.expand(1, FRAMES, -1, -1, -1))
    image = condition(first, torch.ones(1, dtype=torch.bool))
    assert image[:, 0, 0].min() == 1 and image[:, :, 1:].abs().max() == 0
    noise = torch.randn(1, 12, FRAMES, SIZE // 2, SIZE // 2, generator=generator(0))
    with torch.no_grad():
        v = small_wan().prune(KEPT)(noise, 1.0, Cond(tokenise([PROMPT])[0], image=image))
    assert np.abs(got.astype(int) - sheet(Codec().decode(noise - v))).max() <= 1
    assert not np.array_equal(got, run(folders, tmp_path / "b.png", "steps=1", "force=true"))


@pytest.mark.parametrize(
    "out, words, prompt, said",
    [
        ("a.avi", [], PROMPT, "the suffix is '.avi'; wanted one of .mp4, .gif, .png"),
        ("a.png", [], "a green elephant", "unknown word 'elephant'"),
        (
            "a.png",
            ["negative=official", "guidance=2", "force=true"],
            PROMPT,
            "negative=official: nobody publishes one for this model",
        ),
        ("a.png", ["image=nowhere.png"], PROMPT, "image=nowhere.png: cannot be read as a picture"),
    ],
)
def test_mistakes_are_one_line(folders, tmp_path, capsys, out, words, prompt, said):
    with pytest.raises(SystemExit) as stop:
        run(folders, tmp_path / out, *words, prompt=prompt)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and err.count("\n") == 1
    assert not (tmp_path / out).exists()

"""The built-in world and its codec: purity, truth, captions, rendering."""

from collections import Counter

import numpy as np
import pytest
import torch

from fastlightgen.data.frames import to_uint8
from fastlightgen.world import codec
from fastlightgen.world import shapes as synthetic
from fastlightgen.world.shapes import Shapes, coverage, tokenise


@pytest.fixture(scope="module")
def clips():
    return Shapes(split="test").batch(range(1024))


def test_a_clip_depends_on_its_index_only():
    world = Shapes(seed=3)
    many, one = world.batch([5, 7, 11]), world.batch([7])
    assert torch.equal(many.video[1], one.video[0]) and many.captions[1] == one.captions[0]
    assert many.has_first[1] == one.has_first[0]
    for other in (Shapes(seed=4), Shapes(seed=3, split="test")):
        assert not torch.equal(other.batch([7]).video[0], one.video[0])


def test_splits_do_not_overlap():
    train, test = (synthetic.uniforms(0, split, range(2000), 4) for split in ("train", "test"))
    assert len(np.unique(np.concatenate([train, test]), axis=0)) == 4000


def test_uniforms_match_a_scalar_hash():
    # the splitmix64 finaliser in Python integers, which cannot wrap by accident
    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    key = mix((2 * 9 + 1 + 1) * golden % 2**64)  # seed 9, split "test"
    expected = [(mix((mix((key + 6 * golden) % 2**64) + (s + 1) * golden) % 2**64) >> 11) * 2.0**-53 for s in range(3)]
    assert synthetic.uniforms(9, "test", [6], 3)[0].tolist() == expected


def test_captioned_attributes_are_uniform(clips):
    # a class of probability p in n clips has count n p +- 4.5 sqrt(n p (1-p)): about one false alarm in 10^4 tests
    for name, classes in (("main_colour", 6), ("main_kind", 3), ("direction", 4), ("speed", 2), ("change", 5)):
        count, p, n = Counter(clips.truth[name].tolist()), 1 / classes, len(clips.captions)
        assert all(abs(count[k] - n * p) < 4.5 * (n * p * (1 - p)) ** 0.5 for k in range(classes)), (name, count)
    assert abs((clips.truth["companion_colour"] >= 0).mean() - 0.5) < 4.5 * 0.5 / 32
    assert abs(clips.has_first.float().mean() - 0.5) < 4.5 * 0.5 / 32


def test_main_shape_follows_its_caption_and_stays_inside(clips):
    t = clips.truth
    step = np.diff(t["path"], axis=1)
    axis = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
    for i, text in enumerate(clips.captions[:200]):
        words = text.split()
        first = np.array(axis[words[4]]) * t["pixels_per_frame"][i]
        after = words[words.index("then") + 1 :][:2]
        if after[0] == "turns":
            second = -first if after[1] == "back" else np.array(axis[after[1]]) * t["pixels_per_frame"][i]
        else:
            second = first if after[0] == "goes" else 0 * first
        turn = t["turn_frame"][i]
        np.testing.assert_allclose(step[i], [first] * turn + [second] * (7 - turn), atol=1e-12)
        assert abs(t["pixels_per_frame"][i] / {"slowly": 0.7, "fast": 1.5}[words[5]] - 1) <= 0.08
    margin = np.minimum(t["path"], 16 - t["path"]).min((1, 2)) - t["radius"]
    assert margin.min() > -1e-9 and t["radius"].min() > 2.3


def test_companion_is_another_colour_and_in_view_at_the_end(clips):
    t, there = clips.truth, clips.truth["companion_colour"] >= 0
    assert (t["companion_colour"] != t["main_colour"]).all()
    last = t["companion_path"][there, -1]
    assert last.min() > 1.0 and last.max() < 15.0
    apart = np.linalg.norm(t["companion_path"] - t["path"], axis=-1)[there, -2:]
    assert (apart > t["radius"][there, None]).mean() > 0.99
    # entering companions are out of view before their enter frame, and partly visible in it
    late = there & (t["companion_enters"] > 0)
    assert 0.35 < late.sum() / there.sum() < 0.65
    for i in np.flatnonzero(late)[:50]:
        depth = np.minimum(t["companion_path"][i], 16 - t["companion_path"][i]).min(1) + t["companion_radius"][i]
        enters = t["companion_enters"][i]
        assert (depth[:enters] <= 1e-9).all() and depth[enters] > 0.9


def test_coverage_against_supersampling():
    centre, radius, size, n = np.array([7.3, 8.9]), 2.7, 16, 40
    fine = (np.arange(size * n) + 0.5) / n
    dx, dy = np.abs(fine - centre[0])[None, :], np.abs(fine - centre[1])[:, None]
    exact = {
        1: (dx <= 0.95 * radius) & (dy <= 0.95 * radius),
        2: ((dx <= radius) & (dy <= 0.35 * radius)) | ((dx <= 0.35 * radius) & (dy <= radius)),
        0: dx**2 + dy**2 <= radius**2,
    }
    for kind, inside in exact.items():
        share = inside.reshape(size, n, size, n).mean((1, 3))
        # 1 / n per edge for the sampling; the ball's ramp is not the exact area: below .12 of a pixel
        got = coverage(np.array(kind), centre, np.array(radius), size)
        assert np.abs(got - share).max() < (0.12 if kind == 0 else 0.05), kind


def test_pixels_show_the_palette_on_a_dark_background(clips):
    t, v = clips.truth, clips.video.numpy()
    assert v.dtype == np.float32 and v.min() >= 0 and v.max() <= 1
    x, y = np.floor(t["path"]).astype(int)[:, 3].T
    centre = v[np.arange(len(v)), 3, :, y, x]
    ratio = centre / synthetic.PALETTE[t["main_colour"]]
    solid = t["main_kind"] < 2  # the arms of a cross are narrower than two pixels
    assert ratio[solid].min() > 0.93 and ratio[solid].max() < 1.001
    assert np.median(v, axis=(1, 3, 4)).max() < 0.4


def test_tokens():
    text, lengths = tokenise(["a red ball moves up fast then stops", ""])
    assert text.shape == (2, 16, 48) and text.dtype == torch.float32 and lengths.tolist() == [9, 1]
    assert not text[0, 9:].any() and not text[1, 1:].any()
    assert torch.equal(text[0, 8, :32], text[1, 0, :32])  # both end with the end token
    every, n = tokenise([" ".join(synthetic.WORDS[:9]), " ".join(synthetic.WORDS[10:])])
    words = torch.cat([every[0, :10], every[1, : n[1] - 1]])
    assert torch.equal(words[:, :32] @ words[:, :32].T, 32 * torch.eye(len(synthetic.WORDS)))
    assert words[:, 32:].square().mean() == 1  # unit root mean square of both parts


def test_errors_name_the_remedy():
    with pytest.raises(ValueError, match="unknown word 'mauve'.*purple"):
        tokenise(["a mauve ball"])
    with pytest.raises(ValueError, match="got 16 words, wanted at most 15"):
        tokenise(["a " * 16])
    with pytest.raises(ValueError, match="split: got 'val', wanted one of train, test"):
        Shapes(split="val")
    with pytest.raises(ValueError, match="frames, size: got 8, 14"):
        Shapes(size=14)
    Shapes(frames=7, size=16)


def test_codec_is_exact_and_orthonormal(clips):
    c, x = codec.Codec(), clips.video[:64]
    z = c.encode(x)
    assert z.shape == (64, 12, 8, 8, 8)
    # fp32 rounding of numbers up to 11 (latents) and 1 (pixels), a few operations each
    torch.testing.assert_close(c.decode(z), x, rtol=0, atol=1e-6)
    noise = torch.randn(2, 12, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(c.encode(c.decode(noise)), noise, rtol=0, atol=2e-6)
    # the low band of one 2x2 patch by hand, and the energy of a difference
    by_hand = (x[0, 2, 1, 4:6, 6:8].sum() / 2 - codec.LOW_MEAN) * codec.SCALE
    torch.testing.assert_close(z[0, 4, 2, 2, 3], by_hand, rtol=1e-5, atol=1e-6)
    energy = (x[1] - x[0]).double().square().sum() * codec.SCALE**2
    torch.testing.assert_close((z[1] - z[0]).double().square().sum(), energy, rtol=1e-5, atol=0)


def test_latents_of_the_world_are_standard(clips):
    z = codec.Codec().encode(clips.video)
    assert abs(z.std() - 1) < 0.02 and abs(z[:, ::4].mean()) < 0.1


def test_condition_channels():
    z = torch.randn(2, 12, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    out = codec.condition(z, torch.tensor([True, False]))
    assert out.shape == (2, 13, 3, 4, 4) and not out[1].any() and not out[0, :, 1:].any()
    assert (out[0, 0, 0] == 1).all() and torch.equal(out[0, 1:, 0], z[0, :, 0])


def test_to_uint8():
    assert to_uint8(torch.tensor([-0.5, 0.0, 0.5, 1.0, 7.0])).tolist() == [0, 0, 128, 255, 255]

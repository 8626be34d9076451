"""The picture: coverage and patterns against supersampling, the camera, and the energy of a bit."""

from statistics import NormalDist

import numpy as np
import pytest
import torch

from fastlightgen.flow import ladder, rollout
from fastlightgen.world import drawing
from fastlightgen.world.chance import signs, uniforms
from fastlightgen.world.codec import SCALE, Codec
from fastlightgen.world.drawing import CELLS, DARK, MOSAIC, PALETTE, coverage, mosaic, tiles
from fastlightgen.world.shapes import Shapes

SIZE, FRAMES, MARGIN = 20, 8, 4
N = 40  # samples per side of a pixel


def fine(size: int = SIZE) -> np.ndarray:
    """Sample positions along one side of a picture."""
    return (np.arange(size * N) + 0.5) / N


def inside(kind: int, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Which samples a shape at the origin covers."""
    x, y = np.abs(x), np.abs(y)
    return [
        x**2 + y**2 <= radius**2,
        (x <= 0.95 * radius) & (y <= 0.95 * radius),
        ((x <= radius) & (y <= 0.35 * radius)) | ((x <= 0.35 * radius) & (y <= radius)),
    ][kind]


def shrink(x: np.ndarray) -> np.ndarray:
    """Means over the samples of each pixel."""
    return x.reshape(x.shape[0] // N, N, x.shape[1] // N, N).mean((1, 3))


@pytest.fixture(scope="module")
def clips():
    return Shapes(split="test").batch(range(256))


def test_coverage_against_supersampling():
    centre, radius, size = np.array([7.3, 8.9]), 2.7, 16
    x, y = fine(size)[None, :] - centre[0], fine(size)[:, None] - centre[1]
    for kind in range(3):
        # 1 / N per edge for the sampling; the ball's ramp is not the exact area: below .12 of a pixel
        got = coverage(np.array(kind), centre, np.array(radius), size)
        error = np.abs(got - shrink(inside(kind, x, y, radius))).max()
        assert error < (0.12 if kind == 0 else 0.05), kind


def test_patterns_move_with_the_shapes(clips):
    """Inside the main shape, every frame shows its 4 x 4 cells around the true centre, in one brightness per clip."""
    t, bits = clips.truth, signs(0, "test", range(256), 2 * CELLS**2)
    for i in range(12):
        kind, radius = int(t["main_kind"][i]), t["radius"][i]
        pattern = bits[i, CELLS**2 :].reshape(CELLS, CELLS)  # rows from top to bottom; the first 16 are the companion's
        ratios, shades = [], []
        for f in range(FRAMES):
            x, y = (fine() - t["path"][i, f, k] for k in (0, 1))
            column, row = (np.clip(np.floor((d / radius + 1) * CELLS / 2).astype(int), 0, CELLS - 1) for d in (x, y))
            shade = shrink(np.where(pattern[row[:, None], column[None, :]] > 0, 1.0, DARK))
            # Pixels well inside: samples may miss a sliver at an edge, and a ball's edge is a ramp.
            full = shrink(inside(kind, x[None, :], y[:, None], radius - 0.8 if kind == 0 else 0.95 * radius)) == 1
            shades.append(shade[full])
            ratios.append(clips.video[i, f].numpy()[:, full] / PALETTE[t["main_colour"][i]][:, None])
        shade, shown = np.concatenate(shades), np.concatenate(ratios, 1)
        assert shade.size > 8 * 4 and np.ptp(shade) > 0.05  # cells of both kinds are seen
        bright = (shown * shade).sum() / 3 / (shade**2).sum()
        assert 0.94 - 1e-3 < bright < 1 + 1e-3
        # A pixel shows up to four cells; each edge is off by at most half a sample: 0.2 * 2 edges * 0.5 / 40 = .005.
        assert np.abs(shown - bright * shade).max() < 0.006, i


def test_the_mosaic_moves_with_the_camera(clips):
    """Frame f is frame 0 shifted by whole pixels, up to the ground's gradient, which stays on the screen.

    The gradient is linear in x and y, so it adds the same constant to all pixels of a shifted difference.
    """
    t, video = clips.truth, clips.video.double().numpy()
    moved = 0
    for i in range(64):
        free = np.ones((FRAMES, SIZE, SIZE), bool)  # pixels that show the background
        for path, radius, there in (
            (t["path"], t["radius"], True),
            (t["companion_path"], t["companion_radius"], t["companion_colour"][i] >= 0),
        ):
            near = np.abs(np.arange(SIZE) + 0.5 - path[i, :, :, None]) < radius[i] + 1  # [F,2,size]
            free &= ~(near[:, 1, :, None] & near[:, 0, None, :] & there)
        free &= (video[i] > 0.02 + 1e-6).all(1)  # the floor of the background hides tiles
        for f in range(1, FRAMES):
            dx, dy = t["camera"][i, f] - t["camera"][i, 0]
            ys, xs = (slice(max(0, -d), SIZE - max(0, d)) for d in (dy, dx))  # of frame f
            y0, x0 = (slice(max(0, d), SIZE - max(0, -d)) for d in (dy, dx))  # of frame 0
            both = free[f, ys, xs] & free[0, y0, x0]
            left = (video[i, f, :, ys, xs] - video[i, 0, :, y0, x0])[:, both]
            assert both.sum() > 30 and np.ptp(left, axis=1).max() < 1e-6, (i, f)
            moved += bool(dx or dy)
    assert moved > 64 * 4  # 8 of 9 cameras move, in the first or second frame
    steps = np.diff(t["camera"], axis=1)
    assert (np.abs(steps) <= 1).all() and (steps[:, :-1] * steps[:, 1:] == 0).all()  # one pixel every second frame
    assert np.abs(t["camera"]).max() == MARGIN and (t["camera"][:, -1].std(0) > 2).all()


def test_every_tile_size_shows_its_levels():
    """One size alone: equal pixels inside each tile, the two levels, and tiles that continue into the margin."""
    count = tiles(MARGIN, SIZE)
    assert count == 28**2 + 14**2 + 7**2
    start, bits = 0, signs(0, "train", [0], count)
    for side, level in MOSAIC:
        n = 28 // side
        alone, other = np.zeros_like(bits), bits[0, start : start + n * n].reshape(n, n)
        alone[0, start : start + n * n] = bits[0, start : start + n * n]
        shown = mosaic(alone, np.array([[[-MARGIN, -MARGIN], [MARGIN, 1]]]), MARGIN, SIZE)[0]
        by_hand = level * np.array([[other[y // side, x // side] for x in range(28)] for y in range(28)])
        assert np.array_equal(shown[0], by_hand[:SIZE, :SIZE])
        assert np.array_equal(shown[1], by_hand[5 : 5 + SIZE, 8 : 8 + SIZE])
        start += n * n


def energies(world: Shapes, clip: int, flipped: list[int]) -> np.ndarray:
    """The energy of bits in the latents of a clip: a quarter of the squared change when one is flipped."""
    b = len(flipped) + 1
    u = np.repeat(uniforms(0, world.split, [clip], 104), b, 0)
    bits = np.repeat(signs(0, world.split, [clip], 2 * CELLS**2 + tiles(MARGIN, SIZE)), b, 0)
    bits[np.arange(1, b), flipped] *= -1
    video = torch.from_numpy(world._render(u, bits, world._truth(u))).permute(0, 1, 4, 2, 3)
    z = Codec().encode(video)
    return ((z[1:] - z[:1]) / 2).square().sum((1, 2, 3, 4)).numpy()


@pytest.mark.parametrize("camera", ["still", "moving"])
def test_the_energy_of_a_tile(clips, camera):
    """A = 3 F (SCALE s a)^2 for the tiles of a lone shape's clip that stay in the picture and that nothing hides."""
    world, t = Shapes(split="test"), clips.truth
    pan = np.abs(t["camera"][:, -1]).min(1) if camera == "moving" else -np.abs(t["camera"][:, -1]).max(1)
    clip = int(np.flatnonzero((pan >= (3 if camera == "moving" else 0)) & (t["companion_colour"] < 0))[0])
    start = 2 * CELLS**2
    for side, level in MOSAIC:
        n, middle = 28 // side, range(8 // side, 20 // side)  # of the tiles that no camera leaves behind
        found = energies(world, clip, [start + row * n + column for row in middle for column in middle])
        wanted = 3 * FRAMES * (SCALE * side * level) ** 2
        assert wanted == pytest.approx({1: 0.6, 2: 1.2, 4: 3.0}[side], rel=0.02)  # as drawing.py says
        assert found.max() < wanted * (1 + 1e-9)
        assert np.isclose(found, wanted, rtol=1e-9).mean() > 0.1, (side, found)
        start += n * n


def test_the_energy_of_a_cell(clips):
    """Means over shapes; where a shape is hidden, or outside of a cross, a cell has less."""
    world, main, other = Shapes(split="test"), [], []
    for clip in range(16):
        found = energies(world, clip, list(range(2 * CELLS**2)))
        main.append(found[CELLS**2 :].mean())
        if clips.truth["companion_colour"][clip] >= 0:
            other.append(found[: CELLS**2].mean())
        else:
            assert not found[: CELLS**2].any()
    assert np.mean(main) == pytest.approx(0.8, abs=0.2) and np.mean(other) == pytest.approx(0.4, abs=0.2)


@pytest.mark.parametrize(("steps", "shift", "kept"), [(4, 3.0, (0.35, 0.52, 0.75)), (4, 5.0, (0.17, 0.28, 0.50))])
def test_few_steps_lose_the_weak_bits(steps, shift, kept):
    """What drawing.py says of the exact posterior. A lone bit +-d has the mean d tanh((1 - t) d x_t / t^2)."""
    noise = torch.tensor([NormalDist().inv_cdf((i + 0.5) / 4001) for i in range(4001)], dtype=torch.float64)
    for (side, level), share in zip(MOSAIC, kept, strict=True):
        d = (3 * FRAMES) ** 0.5 * SCALE * side * level

        def velocity(x, t, d=d):
            return (x - d * torch.tanh((1 - t) * d * x / t**2)) / t

        few, many = (rollout(velocity, noise, ladder(n, shift), "ode", torch.empty) for n in (steps, 28))
        assert (few**2).mean() / d**2 == pytest.approx(share, abs=0.006)
        assert (many**2).mean() / d**2 > 0.985


def test_light_is_linear():
    """A gradient is linear in x and y, and stays between its two ends."""
    ends = np.array([[[0.1, 0.2, 0.3], [0.3, 0.1, 0.35]]])
    shown = drawing.light(ends, np.array([0.7]), SIZE)[0]
    np.testing.assert_allclose(np.diff(shown, 2, axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(np.diff(shown, 2, axis=1), 0, atol=1e-12)
    assert (shown >= ends[0].min(0)).all() and (shown <= ends[0].max(0)).all()

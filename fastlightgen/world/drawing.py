"""Draws the built-in world: shapes that carry a pattern, before a mosaic that a moving camera passes.

B clips, F frames, H = W = size; positions are (x, y) in pixels; pixel (row i, column j) has its centre at (j+.5, i+.5).
"""

import numpy as np
from numpy.typing import NDArray

PALETTE = np.array(  # RGB in [0, 1], one row per colour
    [
        [0.93, 0.17, 0.15],
        [0.16, 0.78, 0.22],
        [0.17, 0.34, 0.96],
        [0.98, 0.84, 0.16],
        [0.74, 0.22, 0.90],
        [0.16, 0.84, 0.90],
    ]
)

# A few-step sampler decides a bit of the picture well only if the bit is strong. Let the two values of a bit be +-d in
# the latents of a clip, where the noise has variance 1; the bit's energy is A = |d|^2. A tile of s x s pixels with the
# levels +-a has A = 3 colours * F frames * (SCALE s a)^2 where no shape hides it: 0.6, 1.2 and 3.0 at F = 8. In 4 Euler
# steps even the exact posterior keeps only .35, .52 and .75 of that energy (shift 3; at shift 5 .17, .28, .50), in 28
# steps .99 or more. A cell of a pattern has 0.8 on average, that of a companion 0.4.
MOSAIC = ((1, 0.053), (2, 0.037), (4, 0.0295))  # (pixels per side, level) of the tiles
CELLS = 4  # a shape's pattern has 4 x 4 cells
DARK = 0.8  # brightness of a pattern's dark cells; that of the bright ones is 1


def overlap(d: NDArray, low: NDArray, high: NDArray) -> NDArray:
    """Length of the overlap of pixels [d - .5, d + .5] with the interval [low, high]."""
    return np.clip(np.minimum(d + 0.5, high) - np.maximum(d - 0.5, low), 0.0, 1.0)


def coverage(kind: NDArray, centre: NDArray, radius: NDArray, size: int) -> NDArray:
    """Return the covered share of each pixel, [..., size, size], from kind [...], centre [..., 2] and radius r [...].

    square: |x|, |y| <= .95 r.  cross: a plus sign with arm length r and half-width .35 r.  Both are exact. The ball's
    edge is approximated by a ramp one pixel wide.
    """
    grid = np.arange(size) + 0.5
    dx, dy = grid - centre[..., 0:1], grid - centre[..., 1:2]
    radius = np.asarray(radius)[..., None]
    kind = np.asarray(kind)[..., None]
    # A cross is a tall box plus a wide box without their common centre; for a square both boxes are equal. The coverage
    # of a box is the product of its overlaps in x and y.
    wide = np.where(kind == 1, 0.95, 1.0) * radius
    thin = np.where(kind == 1, 0.95, 0.35) * radius
    wide_x, wide_y, thin_x, thin_y = (overlap(d, -half, half) for half in (wide, thin) for d in (dx, dy))
    boxes = wide_y[..., :, None] * thin_x[..., None, :] + thin_y[..., :, None] * (wide_x - thin_x)[..., None, :]
    distance = np.sqrt(dy[..., :, None] ** 2 + dx[..., None, :] ** 2)
    ball = np.clip(radius[..., None] - distance + 0.5, 0.0, 1.0)
    return np.where(kind[..., None] == 0, ball, boxes)


def carried(pattern: NDArray, centre: NDArray, radius: NDArray, size: int) -> NDArray:
    """Brightness [B,F,size,size] of shapes whose cells are bright (1) or dark (-1): `pattern` [B,4,4], centre [B,F,2].

    The cells divide the square of the shape's extent and move with it. A pixel takes the mean brightness over its area;
    outside the square that is (1 + DARK) / 2.
    """
    edges = np.linspace(-1, 1, CELLS + 1) * radius[:, None]  # [B,5]
    low, high = edges[:, None, None, :-1], edges[:, None, None, 1:]
    grid = (np.arange(size) + 0.5)[:, None]
    across, down = (overlap(grid - centre[:, :, None, None, k], low, high) for k in (0, 1))  # [B,F,size,4]
    signs = np.einsum("bfhi,bij,bfwj->bfhw", down, pattern, across, optimize=True)
    return (1 + DARK) / 2 + (1 - DARK) / 2 * signs


def tiles(margin: int, size: int) -> int:
    """Number of tiles of the mosaic, which is larger than the picture by `margin` pixels on each side."""
    return sum((-(-(size + 2 * margin) // side)) ** 2 for side, _ in MOSAIC)


def mosaic(bits: NDArray, offset: NDArray, margin: int, size: int) -> NDArray:
    """Levels [B,F,size,size] of tiles with the signs `bits` [B,tiles], seen by a camera at `offset` [B,F,2].

    Each size of tiles covers the area by itself; the levels add up. The camera moves by whole pixels, at most `margin`
    of them, because a shift by half a pixel would blur the tiles.
    """
    width, rest = size + 2 * margin, bits
    levels = np.zeros((width, width))
    for side, level in MOSAIC:
        n = -(-width // side)
        own, rest = rest[:, : n * n].reshape(-1, n, n), rest[:, n * n :]
        levels = levels + level * own.repeat(side, 1).repeat(side, 2)[:, :width, :width]
    rows, columns = (offset[:, :, k, None] + margin + np.arange(size) for k in (1, 0))  # [B,F,size]
    return levels[np.arange(len(bits))[:, None, None, None], rows[..., :, None], columns[..., None, :]]


def light(ends: NDArray, angle: NDArray, size: int) -> NDArray:
    """A gradient [B,size,size,3] between two colours `ends` [B,2,3] along a direction [B]."""
    y, x = np.meshgrid(*[(np.arange(size) + 0.5) / size * 2 - 1] * 2, indexing="ij")
    along = np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y
    mix = (0.5 + 0.35 * along)[..., None]
    return ends[:, 0, None, None] * (1 - mix) + ends[:, 1, None, None] * mix

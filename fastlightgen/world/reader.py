"""Recognises the coloured shapes of a clip of the built-in world: colour, kind and motion, for scoring.

The reader is deterministic. `read` uses pixels only; the scores compare its result with captions afterwards.
B clips, F frames, C = 6 colours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastlightgen.world.captions import CHANGES, DIRECTIONS, KINDS, SPEEDS, parse
from fastlightgen.world.drawing import PALETTE, coverage
from fastlightgen.world.shapes import PIXELS_PER_FRAME, SPEED_JITTER, TURN_FRAMES, main_path

# Visible area in pixels from which a colour counts as present: the smallest shape has 10, an edge where two colours
# blend into a third one about 1.5.
PRESENT = 4.0
# A mask rises from 0 to 1 between these shares of a colour's full chroma. They are symmetric about 0.5, so that
# anti-aliased edges do not shift the centroids.
_LOW, _HIGH = 0.25, 0.75
_RADII = np.arange(2.1, 3.91, 0.2)  # pixels: radii of the templates for recognising kinds; shapes have 2.3 to 3.7


@dataclass
class Reading:
    """The reader's result for each clip and colour. Class indices are -1 if the colour is absent."""

    present: NDArray  # bool [B,C]
    mass: NDArray  # [B,F,C] visible area in pixels
    path: NDArray  # [B,F,C,2] centroids (x, y) in pixels; meaningless while the mass is near zero
    kind: NDArray  # [B,C] index into KINDS
    direction: NDArray  # [B,C] index into DIRECTIONS
    speed: NDArray  # [B,C] index into SPEEDS
    change: NDArray  # [B,C] index into CHANGES
    rms: NDArray  # [B,C,direction,speed,change] pixels: RMS distance to the nearest path of that class
    turn_frame: NDArray  # [B,C,direction,speed,change]: turn frame of that nearest path


def _chroma(rgb: NDArray) -> NDArray:
    """Project colours [..., 3] to [..., 2], orthogonal to grey: the grey mosaic of the background becomes zero."""
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    return np.stack([(2 * r - g - b) / 6**0.5, (g - b) / 2**0.5], -1)


def _ramp(share: NDArray) -> NDArray:
    """Map a share of full chroma to a mask value: 0 below _LOW, 1 above _HIGH, linear between."""
    return np.clip((share - _LOW) / (_HIGH - _LOW), 0.0, 1.0)


def masks(video: Tensor) -> NDArray:
    """Return soft masks [B,F,C,H,W] of each colour in [B,F,3,H,W]: 1 where a pixel has the colour's full chroma."""
    chroma = _chroma(np.moveaxis(video.detach().cpu().float().numpy(), 2, -1))
    background = np.median(chroma, axis=(1, 2, 3))  # of the clip: shapes cover less than half of the pixels
    chroma = chroma - background[:, None, None, None]
    target = _chroma(PALETTE.astype(np.float32)) - background[:, None]  # [B,C,2]
    along = np.einsum("bfhwk,bck->bfchw", chroma, target)
    length = np.linalg.norm(target, axis=-1)[:, None, :, None, None]
    cosine = along / length / (np.linalg.norm(chroma, axis=-1)[:, :, None] + 1e-6)
    # A softmax over colours assigns each pixel to its nearest hue; 20 is sharp enough, because neighbouring colours
    # of the palette are at least 44 degrees apart.
    hue = np.exp(20 * (cosine - cosine.max(2, keepdims=True)))
    return _ramp(along / length**2) * hue / hue.sum(2, keepdims=True)


def _centroids(mask: NDArray) -> tuple[NDArray, NDArray]:
    """Return masses [B,F,C] and centroids [B,F,C,2] of masks [B,F,C,H,W].

    The first of three passes weights pixels by the squared mask, the others by the mask near the last centroid.
    """
    grid = np.arange(mask.shape[-1]) + 0.5  # pixel centres
    weight = mask**2
    for step in range(3):
        mass = weight.sum((-1, -2))
        x, y = (weight.sum(-2) * grid).sum(-1), (weight.sum(-1) * grid).sum(-1)
        path = np.stack([x, y], -1) / (mass[..., None] + 1e-6)
        if step < 2:  # ignore distant specks of noise: the largest shape reaches 5 pixels from its centre
            dx, dy = grid - path[..., 0:1], grid - path[..., 1:2]
            weight = mask * np.clip(6.4 - np.sqrt(dx[..., None, :] ** 2 + dy[..., :, None] ** 2), 0.0, 1.0)
    return mass, path


def _kinds(mask: NDArray, mass: NDArray, path: NDArray, present: NDArray) -> NDArray:
    """Return the kinds [B,C]: for each present colour the kind whose rendered template is nearest to the mask.

    A template follows the centroids and has one radius for all frames of the clip.
    """
    kind = np.full(present.shape, -1)
    b, c = np.nonzero(present)  # M pairs of a clip and a colour
    own, mass, path = mask[b, :, c], mass[b, :, c], path[b, :, c]  # [M,F,...]
    weight = 1 - np.clip(mask.sum(2)[b] - own, 0, 1)  # ignore pixels that another shape covers
    unhidden = (mass >= 0.75 * mass.max(1, keepdims=True))[..., None, None]  # frames that show most of the shape
    errors = np.empty((len(b), len(KINDS), len(_RADII)))
    for k in range(len(KINDS)):
        for i, radius in enumerate(_RADII):
            template = _ramp(coverage(np.full(mass.shape, k), path, np.full(mass.shape, radius), mask.shape[-1]))
            errors[:, k, i] = (unhidden * weight * (own - template) ** 2).sum((1, 2, 3))
    kind[b, c] = errors.min(2).argmin(1)
    return kind


def _fit(mass: NDArray, path: NDArray) -> tuple[NDArray, NDArray]:
    """Fit every path class to centroids [B,F,C,2] by least squares.

    Return (RMS distance [B,C,4,2,5] in pixels, turn frame of the best fit, same shape). A class (direction, speed,
    change) contains the paths start + s * unit path with any start, any turn frame and s within the speed's jitter.
    """
    frames = mass.shape[1]
    shape = (len(DIRECTIONS), len(CHANGES), len(TURN_FRAMES))
    d, change, turn = (a.ravel() for a in np.indices(shape))
    unit = main_path(d, np.ones(len(d)), change, np.array(TURN_FRAMES)[turn], frames)  # [H,F,2], H = 60 hypotheses
    w = np.minimum(mass, PRESENT) + 1e-6  # frames without the colour get almost no weight
    w = w / w.sum(1, keepdims=True)
    # With weighted means removed the best start drops out: residual^2 = pp - 2 s up + s^2 uu, least at s = up / uu.
    centred = path - np.einsum("bfc,bfck->bck", w, path)[:, None]
    uu = np.einsum("bfc,hf->bch", w, (unit**2).sum(-1)) - (np.einsum("bfc,hfk->bchk", w, unit) ** 2).sum(-1)
    up = np.einsum("bfc,bfck,hfk->bch", w, centred, unit, optimize=True)
    pp = np.einsum("bfc,bfck->bc", w, centred**2)[..., None, None]
    low, high = PIXELS_PER_FRAME * (1 - SPEED_JITTER), PIXELS_PER_FRAME * (1 + SPEED_JITTER)
    s = np.clip((up / np.maximum(uu, 1e-9))[..., None], low, high)  # [B,C,H,speed] pixels per frame
    residual = np.sqrt(np.maximum(pp - 2 * s * up[..., None] + s**2 * uu[..., None], 0))
    # [B,C,H,speed] -> [B,C,direction,speed,change,turn]; the best turn frame represents the class
    residual = np.moveaxis(residual.reshape(*residual.shape[:2], *shape, len(SPEEDS)), -1, 3)
    return residual.min(-1), np.array(TURN_FRAMES)[residual.argmin(-1)]


def read(video: Tensor) -> Reading:
    """Read clips [B,F,3,H,W]."""
    mask = masks(video)
    mass, path = _centroids(mask)
    present = np.median(mass[:, -4:], axis=1) >= PRESENT  # companions may enter late: every shape is in the last frames
    rms, turn_frame = _fit(mass, path)
    best = np.unravel_index(rms.reshape(*present.shape, -1).argmin(-1), rms.shape[2:])
    direction, speed, change = (np.where(present, index, -1) for index in best)
    return Reading(present, mass, path, _kinds(mask, mass, path, present), direction, speed, change, rms, turn_frame)


def _stated(captions: Sequence[str]) -> dict[str, NDArray]:
    """Class indices [B] stated by captions; without a companion other_colour = other_kind = -1."""
    rows = [(*s[:5], *(s.other or (-1, -1))) for s in map(parse, captions)]
    names = ("colour", "kind", "direction", "speed", "change", "other_colour", "other_kind")
    return dict(zip(names, np.array(rows).reshape(-1, len(names)).T, strict=True))


def _heading(direction: NDArray, change: NDArray) -> NDArray:
    """The motion after a change, as captions word it: 0..3 turns to DIRECTIONS[i], 4 goes on, 5 stops, 6 turns back."""
    return np.choose(np.clip(change, 0, None), [4, 5, (direction + 1) % 4, (direction - 1) % 4, 6])


def adherence(reading: Reading, captions: Sequence[str]) -> tuple[NDArray, dict[str, float]]:
    """Return the share of a caption's statements that its clip fulfils [B], and the mean of each attribute.

    If a shape's colour is absent, all its attributes count as wrong. `companion` (the companion's kind) counts only if
    the caption has a companion; `cast` means that exactly the colours of the caption are present.
    """
    stated, rows = _stated(captions), np.arange(len(captions))
    c, other = stated["colour"], stated["other_colour"]
    seen = reading.present[rows, c]
    cast = np.zeros_like(reading.present)
    cast[rows, c] = True
    cast[rows[other >= 0], other[other >= 0]] = True
    heading = _heading(reading.direction, reading.change)[rows, c]
    # Attributes of an absent colour are -1, which equals no stated index; `change` needs `seen`, as _heading clips -1.
    right = {
        "colour": seen,
        "kind": reading.kind[rows, c] == stated["kind"],
        "direction": reading.direction[rows, c] == stated["direction"],
        "speed": reading.speed[rows, c] == stated["speed"],
        "change": seen & (heading == _heading(stated["direction"], stated["change"])),
        "cast": (reading.present == cast).all(1),
        "companion": np.where(other >= 0, reading.kind[rows, other] == stated["other_kind"], np.nan),
    }
    table = np.stack([value.astype(np.float64) for value in right.values()])  # [attribute, B]; nan: does not count
    count = (~np.isnan(table)).sum(1)
    return np.nanmean(table, 0), {
        name: float(np.nansum(row) / n) if n else float("nan") for name, row, n in zip(right, table, count, strict=True)
    }


def tracking_error(reading: Reading, captions: Sequence[str]) -> NDArray:
    """[B] RMS pixels from the main colour's path to the nearest path that fits the caption; nan if it is absent."""
    stated, rows = _stated(captions), np.arange(len(captions))
    error = reading.rms[rows, stated["colour"], stated["direction"], stated["speed"], stated["change"]]
    return np.where(reading.present[rows, stated["colour"]], error, np.nan)


def exact_error(reading: Reading, truth: dict[str, NDArray]) -> NDArray:
    """[B] RMS pixels from the main colour's path to the true path; nan if the colour is absent."""
    rows = np.arange(len(truth["path"]))
    error = ((reading.path[rows, :, truth["main_colour"]] - truth["path"]) ** 2).sum(-1).mean(-1) ** 0.5
    return np.where(reading.present[rows, truth["main_colour"]], error, np.nan)


def motion(reading: Reading, captions: Sequence[str]) -> NDArray:
    """[B] path length of the main colour, divided by the length that the caption implies; nan if it is absent."""
    stated, rows = _stated(captions), np.arange(len(captions))
    colour = stated["colour"]
    length = np.linalg.norm(np.diff(reading.path[rows, :, colour], axis=1), axis=-1).sum(-1)
    turn = reading.turn_frame[rows, colour, stated["direction"], stated["speed"], stated["change"]]
    # A shape that stops moves only until its turn frame; all others move in every frame.
    steps = np.where(stated["change"] == CHANGES.index("stops"), turn, reading.path.shape[1] - 1)
    return np.where(reading.present[rows, colour], length / (steps * PIXELS_PER_FRAME[stated["speed"]]), np.nan)


def first_frame_psnr(video: Tensor, first: Tensor, has_first: Tensor) -> tuple[float, Tensor]:
    """PSNR in dB (peak 1) of frame 0 against `first` [B,3,H,W]: (mean over clips with has_first, all clips [B])."""
    mse = (video[:, 0].float() - first.float()).square().mean((1, 2, 3))
    psnr = -10 * torch.log10(mse.clamp_min(1e-10))  # at most 100 dB
    return float(psnr[has_first].mean()), psnr

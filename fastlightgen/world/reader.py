"""Reads clips of the built-in world back: which coloured shapes are there, what they are and how they move.

Deterministic and blind: `read` sees pixels only, captions enter afterwards. B clips, F frames, C = 6 colours.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastlightgen.world.shapes import (
    CHANGES,
    COLOURS,
    DIRECTIONS,
    KINDS,
    PALETTE,
    PIXELS_PER_FRAME,
    SPEED_JITTER,
    SPEEDS,
    TURN_FRAMES,
    coverage,
    main_path,
)

PRESENT = 2.5  # pixels; the smallest whole shape has 7.5, an edge where two colours blend into a third about 1
_LOW, _HIGH = (
    0.25,
    0.75,
)  # a mask rises between these shares of a colour's full chroma: symmetric, so centroids stay put
_RADII = np.arange(1.6, 3.21, 0.2)


@dataclass
class Reading:
    """What was seen of each colour. Class indices are -1 where the colour is absent."""

    present: NDArray  # bool [B,C]
    mass: NDArray  # [B,F,C] pixels
    path: NDArray  # [B,F,C,2] centroids (x, y); meaningless where the mass is near zero
    kind: NDArray  # [B,C]
    direction: NDArray  # [B,C]
    speed: NDArray  # [B,C]
    change: NDArray  # [B,C]
    rms: NDArray  # [B,C,direction,speed,change] px: to the nearest path of that class (any start, turn frame, jitter)
    turn_frame: NDArray  # the same shape: that path's turn frame


class Said(NamedTuple):
    """A caption's class indices; `shapes.caption(*said)` writes it back."""

    colour: int
    kind: int
    direction: int
    speed: int
    change: int
    other: tuple[int, int] | None  # the companion's (colour, kind)


_GRAMMAR = re.compile(
    r"a (\w+) (\w+) moves (\w+) (\w+) then (goes on|stops|turns (?:back|{}))(?: with a (\w+) (\w+))?".format(
        "|".join(DIRECTIONS)
    )
)


def parse(text: str) -> Said:
    """The inverse of `shapes.caption`."""
    match = _GRAMMAR.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        colour, kind, direction, speed, then, *other = match.groups()
        d = DIRECTIONS.index(direction)
        changes = ["goes on", "stops", f"turns {DIRECTIONS[(d + 1) % 4]}", f"turns {DIRECTIONS[d - 1]}", "turns back"]
        companion = (COLOURS.index(other[0]), KINDS.index(other[1])) if other[0] else None
        return Said(COLOURS.index(colour), KINDS.index(kind), d, SPEEDS.index(speed), changes.index(then), companion)
    except ValueError:
        example = "a red ball moves right fast then turns up with a blue cross"
        raise ValueError(f"caption: got {text!r}, wanted a sentence like {example!r}") from None


def _chroma(rgb: NDArray) -> NDArray:
    """[..., 3] -> [..., 2]: the part orthogonal to grey, so gradients and textures of a grey background vanish."""
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    return np.stack([(2 * r - g - b) / 6**0.5, (g - b) / 2**0.5], -1)


def _ramp(share: NDArray) -> NDArray:
    return np.clip((share - _LOW) / (_HIGH - _LOW), 0.0, 1.0)


def masks(video: Tensor) -> NDArray:
    """[B,F,3,H,W] -> soft masks [B,F,C,H,W]: how much of a colour's chroma is there, shared out by hue."""
    chroma = _chroma(np.moveaxis(video.detach().cpu().float().numpy(), 2, -1))
    background = np.median(chroma, axis=(1, 2, 3))
    chroma = chroma - background[:, None, None, None]
    target = _chroma(PALETTE.astype(np.float32)) - background[:, None]  # [B,C,2]
    along = np.einsum("bfhwk,bck->bfchw", chroma, target)
    length = np.linalg.norm(target, axis=-1)[:, None, :, None, None]
    cosine = along / length / (np.linalg.norm(chroma, axis=-1)[:, :, None] + 1e-6)
    hue = np.exp(20 * (cosine - cosine.max(2, keepdims=True)))  # neighbouring colours are 42 degrees apart or more
    return _ramp(along / length**2) * hue / hue.sum(2, keepdims=True)


def _centroids(mask: NDArray) -> tuple[NDArray, NDArray]:
    """Masses [B,F,C] and centroids [B,F,C,2]: first of the squared mask, then twice within a window around the last."""
    grid = np.arange(mask.shape[-1]) + 0.5
    weight = mask**2
    for step in range(3):
        mass = weight.sum((-1, -2))
        x, y = (weight.sum(-2) * grid).sum(-1), (weight.sum(-1) * grid).sum(-1)
        path = np.stack([x, y], -1) / (mass[..., None] + 1e-6)
        if step < 2:  # far specks of noise would pull a centroid: the largest shape reaches 4 px
            dx, dy = grid - path[..., 0:1], grid - path[..., 1:2]
            weight = mask * np.clip(5.2 - np.sqrt(dx[..., None, :] ** 2 + dy[..., :, None] ** 2), 0.0, 1.0)
    return mass, path


def _kinds(mask: NDArray, mass: NDArray, path: NDArray, present: NDArray) -> NDArray:
    """[B,C] the kind whose rendered template, at the centroids and one radius for the clip, is nearest to the mask."""
    kind = np.full(present.shape, -1)
    b, c = np.nonzero(present)
    own, mass, path = mask[b, :, c], mass[b, :, c], path[b, :, c]  # [M,F,...]
    weight = 1 - np.clip(mask.sum(2)[b] - own, 0, 1)  # what another shape hides says nothing
    whole = (mass >= 0.75 * mass.max(1, keepdims=True))[..., None, None]
    errors = np.empty((len(b), len(KINDS), len(_RADII)))
    for k in range(len(KINDS)):
        for i, radius in enumerate(_RADII):
            template = _ramp(coverage(np.full(mass.shape, k), path, np.full(mass.shape, radius), mask.shape[-1]))
            errors[:, k, i] = (whole * weight * (own - template) ** 2).sum((1, 2, 3))
    kind[b, c] = errors.min(2).argmin(1)
    return kind


def _fit(mass: NDArray, path: NDArray) -> tuple[NDArray, NDArray]:
    """Least squares of every path class to centroids [B,F,C,2]: (rms [B,C,4,2,5], turn frame of the best, same shape).

    A class member is start + s * unit path with any start, any turn frame and s within the speed's jitter.
    """
    frames = mass.shape[1]
    shape = (len(DIRECTIONS), len(CHANGES), len(TURN_FRAMES))
    d, change, turn = (a.ravel() for a in np.indices(shape))
    unit = main_path(d, np.ones(len(d)), change, np.array(TURN_FRAMES)[turn], frames)  # [H,F,2]
    w = np.minimum(mass, PRESENT) + 1e-6  # a frame without the colour does not count
    w = w / w.sum(1, keepdims=True)
    centred = path - np.einsum("bfc,bfck->bck", w, path)[:, None]
    uu = np.einsum("bfc,hf->bch", w, (unit**2).sum(-1)) - (np.einsum("bfc,hfk->bchk", w, unit) ** 2).sum(-1)
    up = np.einsum("bfc,bfck,hfk->bch", w, centred, unit, optimize=True)
    pp = np.einsum("bfc,bfck->bc", w, centred**2)[..., None, None]
    low, high = PIXELS_PER_FRAME * (1 - SPEED_JITTER), PIXELS_PER_FRAME * (1 + SPEED_JITTER)
    s = np.clip((up / np.maximum(uu, 1e-9))[..., None], low, high)  # [B,C,H,speed]
    residual = np.sqrt(np.maximum(pp - 2 * s * up[..., None] + s**2 * uu[..., None], 0))
    residual = np.moveaxis(residual.reshape(*residual.shape[:2], *shape, len(SPEEDS)), -1, 3)
    return residual.min(-1), np.array(TURN_FRAMES)[residual.argmin(-1)]


def read(video: Tensor) -> Reading:
    """Everything the reader sees in clips [B,F,3,H,W]."""
    mask = masks(video)
    mass, path = _centroids(mask)
    present = np.median(mass[:, -4:], axis=1) >= PRESENT  # by the last frames every shape is in view
    rms, turn_frame = _fit(mass, path)
    best = np.unravel_index(rms.reshape(*present.shape, -1).argmin(-1), rms.shape[2:])
    direction, speed, change = (np.where(present, index, -1) for index in best)
    return Reading(present, mass, path, _kinds(mask, mass, path, present), direction, speed, change, rms, turn_frame)


def _said(captions: Sequence[str]) -> dict[str, NDArray]:
    """Class indices [B] of captions; a caption without companion has other_colour = other_kind = -1."""
    rows = [(*s[:5], *(s.other or (-1, -1))) for s in map(parse, captions)]
    names = ("colour", "kind", "direction", "speed", "change", "other_colour", "other_kind")
    return dict(zip(names, np.array(rows).reshape(-1, len(names)).T, strict=True))


def _heading(direction: NDArray, change: NDArray) -> NDArray:
    """The caption's word for a change: 0..3 turns towards DIRECTIONS, 4 goes on, 5 stops, 6 turns back."""
    return np.choose(np.clip(change, 0, None), [4, 5, (direction + 1) % 4, (direction - 1) % 4, 6])


def adherence(reading: Reading, captions: Sequence[str]) -> tuple[NDArray, dict[str, float]]:
    """Share of a caption's statements that the clip fulfils: (per clip [B], mean of every attribute).

    The attributes of a shape whose colour is absent count as wrong; `companion` (its kind) only where it is captioned.
    """
    said, rows = _said(captions), np.arange(len(captions))
    c, other = said["colour"], said["other_colour"]
    seen = reading.present[rows, c]
    cast = np.zeros_like(reading.present)
    cast[rows, c] = True
    cast[rows[other >= 0], other[other >= 0]] = True
    heading = _heading(reading.direction, reading.change)[rows, c]
    right = {
        "colour": seen,
        "kind": reading.kind[rows, c] == said["kind"],
        "direction": reading.direction[rows, c] == said["direction"],
        "speed": reading.speed[rows, c] == said["speed"],
        "change": seen & (heading == _heading(said["direction"], said["change"])),
        "cast": (reading.present == cast).all(1),
        "companion": np.where(other >= 0, reading.kind[rows, other] == said["other_kind"], np.nan),
    }
    table = np.stack([value.astype(np.float64) for value in right.values()])
    count = (~np.isnan(table)).sum(1)
    return np.nanmean(table, 0), {
        name: float(np.nansum(row) / n) if n else float("nan") for name, row, n in zip(right, table, count, strict=True)
    }


def tracking_error(reading: Reading, captions: Sequence[str]) -> NDArray:
    """[B] RMS px from the main colour's path to the nearest one the caption allows; nan where the colour is absent."""
    s, rows = _said(captions), np.arange(len(captions))
    error = reading.rms[rows, s["colour"], s["direction"], s["speed"], s["change"]]
    return np.where(reading.present[rows, s["colour"]], error, np.nan)


def exact_error(reading: Reading, truth: dict[str, NDArray]) -> NDArray:
    """[B] RMS px from the main colour's path to the true one; nan where the colour is absent."""
    rows = np.arange(len(truth["path"]))
    error = ((reading.path[rows, :, truth["main_colour"]] - truth["path"]) ** 2).sum(-1).mean(-1) ** 0.5
    return np.where(reading.present[rows, truth["main_colour"]], error, np.nan)


def motion(reading: Reading, captions: Sequence[str]) -> NDArray:
    """[B] path length of the main colour over the length the caption implies; nan where the colour is absent."""
    s, rows = _said(captions), np.arange(len(captions))
    length = np.linalg.norm(np.diff(reading.path[rows, :, s["colour"]], axis=1), axis=-1).sum(-1)
    turn = reading.turn_frame[rows, s["colour"], s["direction"], s["speed"], s["change"]]
    steps = np.where(s["change"] == CHANGES.index("stops"), turn, reading.path.shape[1] - 1)
    return np.where(reading.present[rows, s["colour"]], length / (steps * PIXELS_PER_FRAME[s["speed"]]), np.nan)


def first_frame_psnr(video: Tensor, first: Tensor, has_first: Tensor) -> tuple[float, Tensor]:
    """PSNR in dB (peak 1, at most 100) of frame 0 against the given frames [B,3,H,W]: (mean where given, all [B])."""
    mse = (video[:, 0].float() - first.float()).square().mean((1, 2, 3))
    psnr = -10 * torch.log10(mse.clamp_min(1e-10))
    return float(psnr[has_first].mean()), psnr

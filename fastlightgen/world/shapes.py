"""The built-in world: clips of a coloured shape that moves and then changes its motion, with captions and ground truth.

A clip is a pure function of (seed, split, index): its random numbers come from a counter-based hash, so it is the same
in every batch, order and process. The attributes that a caption states (colour, kind, direction, speed, change,
companion) are uniform. The caption leaves open: background and its mosaic, camera, patterns of the shapes, sizes,
start, turn frame, speed jitter, companion's motion. Few-step samplers fail at the mosaic and the patterns; see
world/drawing.py.

B clips, F frames, H = W = size; positions are (x, y) in pixels; pixel (row i, column j) has its centre at (j+.5, i+.5).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fastlightgen.world.captions import caption
from fastlightgen.world.chance import SPLITS, signs, uniforms
from fastlightgen.world.drawing import CELLS, PALETTE, carried, coverage, light, mosaic, tiles

WORLD = 2  # version of pixels, captions, tokens and codec: raise it if any changes; files of another one are refused
STEPS = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])  # unit (x, y) of DIRECTIONS; y points down
PIXELS_PER_FRAME = np.array([0.75, 1.65])  # of SPEEDS
SPEED_JITTER = 0.08  # a clip's speed differs from PIXELS_PER_FRAME by up to 8 %
TURN_FRAMES = (3, 4, 5)  # frames at which the motion can change
SMALLEST = 3.0  # pixels: radius of the smallest main shape

_TRIES = 8  # candidate paths of a companion; the first one that the main shape does not hide is used
_SLOTS = 40 + 8 * _TRIES  # random numbers per clip: 40 for the clip, 8 for each candidate path


@dataclass
class Clips:
    """B clips with captions. `truth` holds class indices, radii and speeds [B] and positions [B,F,2]."""

    video: torch.Tensor  # float32 [B,F,3,H,W] in [0,1]
    captions: list[str]
    has_first: torch.Tensor  # bool [B]: the first frame is given as a condition
    truth: dict[str, NDArray]


def main_path(direction: NDArray, speed: NDArray, change: NDArray, turn: NDArray, frames: int) -> NDArray:
    """Positions [B,F,2] relative to frame 0; steps before frame `turn` follow `direction`, later ones `change`."""
    first = STEPS[direction] * speed[:, None]
    turned = [STEPS[(direction + quarter) % 4] * speed[:, None] for quarter in (1, -1)]
    second = np.stack([first, 0 * first, *turned, -first])  # in the order of CHANGES
    second = second[change, np.arange(len(change))]
    before = np.arange(frames - 1) < turn[:, None]
    steps = np.where(before[..., None], first[:, None], second[:, None])
    return np.concatenate([np.zeros((len(turn), 1, 2)), np.cumsum(steps, 1)], 1)


class Shapes:
    """An unlimited, seeded source of clips: `Shapes(seed=0).batch(range(16))`."""

    def __init__(
        self, frames: int = 8, size: int = 20, seed: int = 0, first_frame_prob: float = 0.5, split: str = "train"
    ) -> None:
        longest = PIXELS_PER_FRAME[-1] * (1 + SPEED_JITTER) * (frames - 1)  # pixels
        smallest = longest + 2 * SMALLEST
        if frames <= TURN_FRAMES[-1] + 1 or size % 2 or size < smallest:
            wanted = f"frames > {TURN_FRAMES[-1] + 1} and an even size >= {smallest:.1f}"
            raise ValueError(f"frames, size: got {frames}, {size}; wanted {wanted}")
        if split not in SPLITS:
            raise ValueError(f"split: got {split!r}, wanted one of {', '.join(SPLITS)}")
        self.frames, self.size, self.seed, self.split = frames, size, seed, split
        self.first_frame_prob = first_frame_prob

    def batch(self, indices: Sequence[int]) -> Clips:
        """Return the clips with these indices."""
        u = uniforms(self.seed, self.split, indices, _SLOTS)
        truth = self._truth(u)
        stated = (truth[k].tolist() for k in ("main_colour", "main_kind", "direction", "speed", "change"))
        others = zip(truth["companion_colour"].tolist(), truth["companion_kind"].tolist())
        captions = [
            caption(colour, kind, direction, speed, change, None if other[0] < 0 else other)
            for colour, kind, direction, speed, change, other in zip(*stated, others)
        ]
        bits = signs(self.seed, self.split, indices, 2 * CELLS**2 + tiles(self.frames // 2, self.size))
        video = torch.from_numpy(self._render(u, bits, truth).astype(np.float32)).permute(0, 1, 4, 2, 3).contiguous()
        return Clips(video, captions, torch.from_numpy(u[:, 0] < self.first_frame_prob), truth)

    def _truth(self, u: NDArray) -> dict[str, NDArray]:
        """Draw all attributes of the clips from u [B, slots]; each slot serves one purpose (0 is has_first)."""

        def pick(slot: int, n: int) -> NDArray:
            return (u[:, slot] * n).astype(np.int64)

        colour, kind, direction, speed, change = pick(1, 6), pick(2, 3), pick(3, 4), pick(4, 2), pick(5, 5)
        turn = np.array(TURN_FRAMES)[pick(6, len(TURN_FRAMES))]
        pixels = PIXELS_PER_FRAME[speed] * (1 + SPEED_JITTER * (2 * u[:, 7] - 1))
        path = main_path(direction, pixels, change, turn, self.frames)
        low, high = path.min(1), path.max(1)
        # In small pictures the longest paths leave too little room for the largest shapes: these are then smaller.
        radius = np.minimum(SMALLEST + 0.7 * u[:, 8], (self.size - (high - low).max(1)) / 2)
        room = self.size - (high - low) - 2 * radius[:, None]  # free start positions, pixels in x and y
        path = path + (radius[:, None] - low + u[:, 9:11] * room)[:, None]

        with_other = u[:, 11] < 0.5
        other_colour = np.where(with_other, (colour + 1 + pick(12, 5)) % 6, -1)  # never the main colour
        other_radius = 2.3 + 0.9 * u[:, 14]
        other_path, enters = self._companion(u, path, radius, other_radius)
        # Along each axis the camera stands still or moves by one pixel every second frame.
        pan = np.stack([pick(28, 3), pick(29, 3)], 1) - 1
        camera = pan[:, None] * ((np.arange(self.frames) + pick(30, 2)[:, None]) // 2)[..., None]
        return {
            "main_colour": colour, "main_kind": kind, "direction": direction, "speed": speed, "change": change,
            "turn_frame": turn, "path": path, "radius": radius, "pixels_per_frame": pixels,
            "companion_colour": other_colour, "companion_kind": np.where(with_other, pick(13, 3), -1),
            "companion_path": other_path, "companion_radius": other_radius, "companion_enters": enters,
            "camera": camera,
        }  # fmt: skip

    def _companion(self, u: NDArray, path: NDArray, radius: NDArray, other_radius: NDArray) -> tuple[NDArray, NDArray]:
        """Return the companions' paths [B,F,2] and enter frames [B]: visible from frame 0, or entering at frame 1 to 3.

        A companion moves straight and bounces off the walls, or enters straight through one.
        """
        b, f, r = len(u), np.arange(self.frames), other_radius[:, None, None]
        v = u[:, 40:].reshape(b, _TRIES, 8)  # eight random numbers per candidate path
        # Inside from the start: a random place, angle and speed. Folding the line at the walls makes it bounce.
        angle, pace = 2 * np.pi * v[..., 0], 0.5 + 1.0 * v[..., 1]
        velocity = pace[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)
        room = self.size - 2 * r
        line = v[..., 2:4][:, :, None] * room[..., None] + velocity[:, :, None] * f[:, None]
        inside = r[..., None] + room[..., None] - np.abs(line % (2 * room[..., None]) - room[..., None])
        # Entering: along one axis the shape's edge appears at frame `enters`; its centre is inside in the last frames.
        enters = 1 + (u[:, 16] * 3).astype(np.int64)
        depth = -r + (1.25 + 0.6 * v[..., 4])[..., None] * (f - enters[:, None, None] + 1)
        depth = np.where((v[..., 5] < 0.5)[..., None], depth, self.size - depth)  # from either of two opposite walls
        axis = (v[..., 6] < 0.5).astype(np.int64)[..., None]
        entering = np.stack([np.where(axis == k, depth, inside[..., k]) for k in (0, 1)], -1)
        late = u[:, 15] < 0.5  # half of the companions enter
        paths = np.where(late[:, None, None, None], entering, inside)

        # Take the first candidate that the main shape hides in at most a quarter of its frames and not in the last two;
        # without such a candidate, the one hidden least. Hidden: more than a quarter of its width is covered.
        apart = np.linalg.norm(paths - path[:, None], axis=-1)
        seen = (f >= np.where(late, enters, 0)[:, None])[:, None]
        hidden = (apart < radius[:, None, None] + 0.5 * r) & seen
        # Share of the visible frames that are hidden, plus 1 if one of the last two is.
        share = hidden.sum(-1) / np.broadcast_to(seen, hidden.shape).sum(-1) + hidden[..., -2:].any(-1)
        choice = np.where((share <= 0.25).any(1), (share <= 0.25).argmax(1), share.argmin(1))
        return paths[np.arange(b), choice], np.where(late, enters, 0)

    def _render(self, u: NDArray, bits: NDArray, t: dict[str, NDArray]) -> NDArray:
        """Draw the clips with the attributes t and the signs of patterns and mosaic: [B,F,H,W,3] in [0,1]."""
        b, cells = len(u), CELLS**2
        ends = (0.15 + 0.17 * u[:, 19:21])[..., None] + 0.05 * (2 * u[:, 21:27].reshape(b, 2, 3) - 1)
        ground = light(ends, 2 * np.pi * u[:, 27], self.size)[:, None]
        tiled = mosaic(bits[:, 2 * cells :], t["camera"], self.frames // 2, self.size)
        # The floor changes one value in a thousand: dark ground below dark tiles. The sum stays below 0.49.
        video = np.maximum(ground + tiled[..., None], 0.02)
        ones = np.ones((1, self.frames), np.int64)
        shapes = [("companion", "companion_path", "companion_radius", 17), ("main", "path", "radius", 18)]
        for number, (name, path, radius, slot) in enumerate(shapes):  # the main shape is drawn last, on top
            colour = PALETTE[t[f"{name}_colour"]] * (0.94 + 0.06 * u[:, slot, None])
            kinds, radii = t[f"{name}_kind"][:, None] * ones, t[radius][:, None] * ones
            alpha = coverage(kinds, t[path], radii, self.size)[..., None]
            alpha = alpha * (t[f"{name}_colour"] >= 0)[:, None, None, None, None]  # zero without a companion
            pattern = bits[:, cells * number : cells * (number + 1)].reshape(b, CELLS, CELLS)
            shade = carried(pattern, t[path], t[radius], self.size)[..., None]
            video = video + alpha * (shade * colour[:, None, None, None] - video)
        return video

"""The built-in world: clips of a coloured shape that moves, then changes its motion, with captions and exact truth.

A clip is a pure function of (seed, split, index): its numbers come from a counter-based hash, so a clip is the same in
every batch, order and process. What the caption says (colour, kind, direction, speed, change, companion) is uniform;
the rest is open: background, sizes, start, turn frame, speed jitter and the companion's motion.

B clips, F frames, H = W = size; positions are (x, y) in pixels; pixel (row i, column j) has its centre at (j+.5, i+.5).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
PALETTE = np.array(
    [
        [0.93, 0.17, 0.15],
        [0.16, 0.78, 0.22],
        [0.17, 0.34, 0.96],
        [0.98, 0.84, 0.16],
        [0.74, 0.22, 0.90],
        [0.16, 0.84, 0.90],
    ]
)
KINDS = ("ball", "square", "cross")
DIRECTIONS = ("right", "down", "left", "up")  # clockwise on the screen, so a quarter turn is +-1
STEPS = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
SPEEDS = ("slowly", "fast")
PIXELS_PER_FRAME = np.array([0.7, 1.5])
SPEED_JITTER = 0.08
CHANGES = ("on", "stops", "clockwise", "counter", "back")
TURN_FRAMES = (3, 4, 5)
SPLITS = ("train", "test")

END = "<end>"
WORDS = (*"a moves then goes on stops turns back with".split(), END, *COLOURS, *KINDS, *DIRECTIONS, *SPEEDS)
TOKENS = 16
TEXT_DIM = 48  # 32 for the word, 16 for the position

_TRIES = 8  # candidate paths of a companion; the first one that the main shape does not hide is taken
_SLOTS = 40 + 8 * _TRIES


@dataclass
class Clips:
    """B clips. `truth` holds numpy arrays: class indices, radii and speeds [B], positions [B,F,2]."""

    video: torch.Tensor  # float32 [B,F,3,H,W] in [0,1]
    captions: list[str]
    has_first: torch.Tensor  # bool [B]: the first frame is given as condition
    truth: dict[str, NDArray]


def _mix(x: NDArray) -> NDArray:
    """The splitmix64 finaliser: a bijection of uint64 whose output bits look independent."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seed: int, split: str, indices: Sequence[int], slots: int) -> NDArray:
    """[B, slots] numbers in [0, 1), each a hash of (seed, split, index, slot)."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    key = _mix(np.array([2 * seed + SPLITS.index(split) + 1], np.uint64) * golden)
    clip = _mix(key + np.asarray(indices, np.uint64) * golden)
    bits = _mix(clip[:, None] + (np.arange(slots, dtype=np.uint64) + np.uint64(1)) * golden)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def coverage(kind: NDArray, centre: NDArray, radius: NDArray, size: int) -> NDArray:
    """Share of every pixel that a shape covers: [..., size, size] from kind [...], centre [..., 2], radius [...].

    square: |x|, |y| <= .95 r.  cross: a plus of arm length r and half-width .35 r.  Both are exact; the ball's edge is
    the usual one-pixel ramp across the circle.
    """
    grid = np.arange(size) + 0.5
    dx, dy = grid - centre[..., 0:1], grid - centre[..., 1:2]
    radius = np.asarray(radius)[..., None]

    def overlap(d: NDArray, half: NDArray) -> NDArray:  # of a unit pixel at distance d with [-half, half]
        return np.clip(np.minimum(d + 0.5, half) - np.maximum(d - 0.5, -half), 0.0, 1.0)

    kind = np.asarray(kind)[..., None]
    # square and cross are products of 1-d overlaps: a cross is tall + wide - their common centre
    wide = np.where(kind == 1, 0.95, 1.0) * radius
    thin = np.where(kind == 1, 0.95, 0.35) * radius
    wide_x, wide_y, thin_x, thin_y = overlap(dx, wide), overlap(dy, wide), overlap(dx, thin), overlap(dy, thin)
    boxes = wide_y[..., :, None] * thin_x[..., None, :] + thin_y[..., :, None] * (wide_x - thin_x)[..., None, :]
    distance = np.sqrt(dy[..., :, None] ** 2 + dx[..., None, :] ** 2)
    ball = np.clip(radius[..., None] - distance + 0.5, 0.0, 1.0)
    return np.where(kind[..., None] == 0, ball, boxes)


def main_path(direction: NDArray, speed: NDArray, change: NDArray, turn: NDArray, frames: int) -> NDArray:
    """[B,F,2] positions relative to frame 0. Steps before frame `turn` follow `direction`, the others the change."""
    first = STEPS[direction] * speed[:, None]
    turned = [STEPS[(direction + quarter) % 4] * speed[:, None] for quarter in (1, -1)]
    second = np.stack([first, 0 * first, *turned, -first])
    second = second[change, np.arange(len(change))]
    before = np.arange(frames - 1) < turn[:, None]
    steps = np.where(before[..., None], first[:, None], second[:, None])
    return np.concatenate([np.zeros((len(turn), 1, 2)), np.cumsum(steps, 1)], 1)


def caption(
    colour: int, kind: int, direction: int, speed: int, change: int, other: tuple[int, int] | None = None
) -> str:
    """The caption of class indices; `other` is the companion's (colour, kind)."""
    turns = [f"turns {DIRECTIONS[(direction + 1) % 4]}", f"turns {DIRECTIONS[(direction - 1) % 4]}"]
    then = ["goes on", "stops", *turns, "turns back"][change]
    text = f"a {COLOURS[colour]} {KINDS[kind]} moves {DIRECTIONS[direction]} {SPEEDS[speed]} then {then}"
    return text if other is None else f"{text} with a {COLOURS[other[0]]} {KINDS[other[1]]}"


def tokenise(captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """A toy text encoder: (float32 [B,16,48], int64 [B] lengths). An end token closes every caption; "" is it alone.

    A token is a 32-dim word vector (a row of the Hadamard matrix, so words are orthogonal and entries are +-1) and a
    16-dim one-hot position times 4: both parts have unit root mean square. Positions beyond the length are zeros.
    """
    text = torch.zeros(len(captions), TOKENS, TEXT_DIM)
    lengths = torch.zeros(len(captions), dtype=torch.int64)
    for row, words in enumerate(c.split() + [END] for c in captions):
        unknown = [w for w in words if w not in WORDS]
        if unknown:
            known = " ".join(w for w in WORDS if w != END)
            raise ValueError(f"prompt: unknown word {unknown[0]!r}; this world knows: {known}")
        if len(words) > TOKENS:
            raise ValueError(f"prompt: got {len(words) - 1} words, wanted at most {TOKENS - 1}; shorten it")
        ids = torch.tensor([WORDS.index(w) + 1 for w in words])
        lengths[row] = len(words)
        text[row, : len(words), :32] = _HADAMARD[ids]
        text[row, : len(words), 32:] = 4.0 * torch.eye(TOKENS)[: len(words)]
    return text, lengths


def pool(text: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """The mean token [B,48] of `tokenise`d captions, for networks that also read a pooled text (HunyuanVideo)."""
    return text.sum(1) / length[:, None]


def _hadamard(n: int) -> torch.Tensor:
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


_HADAMARD = _hadamard(32)


class Shapes:
    """An unlimited seeded source of clips: `Shapes(seed=0).batch(range(16))`."""

    def __init__(
        self, frames: int = 8, size: int = 16, seed: int = 0, first_frame_prob: float = 0.5, split: str = "train"
    ) -> None:
        longest = PIXELS_PER_FRAME[-1] * (1 + SPEED_JITTER) * (frames - 1)
        if frames <= TURN_FRAMES[-1] + 1 or size % 2 or size - longest < 4.5:
            wanted = f"frames > {TURN_FRAMES[-1] + 1} and an even size >= {longest + 4.5:.0f}"
            raise ValueError(f"frames, size: got {frames}, {size}; wanted {wanted}")
        if split not in SPLITS:
            raise ValueError(f"split: got {split!r}, wanted one of {', '.join(SPLITS)}")
        self.frames, self.size, self.seed, self.split = frames, size, seed, split
        self.first_frame_prob = first_frame_prob

    def batch(self, indices: Sequence[int]) -> Clips:
        """The clips with these indices."""
        u = uniforms(self.seed, self.split, indices, _SLOTS)
        truth = self._truth(u)
        said = (truth[k].tolist() for k in ("main_colour", "main_kind", "direction", "speed", "change"))
        others = zip(truth["companion_colour"].tolist(), truth["companion_kind"].tolist())
        captions = [caption(c, k, d, s, then, None if o[0] < 0 else o) for c, k, d, s, then, o in zip(*said, others)]
        video = torch.from_numpy(self._render(u, truth).astype(np.float32)).permute(0, 1, 4, 2, 3).contiguous()
        return Clips(video, captions, torch.from_numpy(u[:, 0] < self.first_frame_prob), truth)

    def _truth(self, u: NDArray) -> dict[str, NDArray]:
        def pick(slot: int, n: int) -> NDArray:
            return (u[:, slot] * n).astype(np.int64)

        colour, kind, direction, speed, change = pick(1, 6), pick(2, 3), pick(3, 4), pick(4, 2), pick(5, 5)
        turn = np.array(TURN_FRAMES)[pick(6, len(TURN_FRAMES))]
        pixels = PIXELS_PER_FRAME[speed] * (1 + SPEED_JITTER * (2 * u[:, 7] - 1))
        path = main_path(direction, pixels, change, turn, self.frames)
        low, high = path.min(1), path.max(1)
        # the longest paths leave less room than the largest shape needs: those shapes are a little smaller
        radius = np.minimum(2.4 + 0.6 * u[:, 8], (self.size - (high - low).max(1)) / 2)
        room = self.size - (high - low) - 2 * radius[:, None]
        path = path + (radius[:, None] - low + u[:, 9:11] * room)[:, None]

        with_other = u[:, 11] < 0.5
        other_colour = np.where(with_other, (colour + 1 + pick(12, 5)) % 6, -1)
        other_radius = 1.8 + 0.8 * u[:, 14]
        other_path, enters = self._companion(u, path, radius, other_radius)
        return {
            "main_colour": colour, "main_kind": kind, "direction": direction, "speed": speed, "change": change,
            "turn_frame": turn, "path": path, "radius": radius, "pixels_per_frame": pixels,
            "companion_colour": other_colour, "companion_kind": np.where(with_other, pick(13, 3), -1),
            "companion_path": other_path, "companion_radius": other_radius, "companion_enters": enters,
        }  # fmt: skip

    def _companion(self, u: NDArray, path: NDArray, radius: NDArray, other_radius: NDArray) -> tuple[NDArray, NDArray]:
        """Straight paths that bounce off the walls, from frame 0 or entering at 1..3: ([B,F,2], enter frame [B])."""
        b, f, r = len(u), np.arange(self.frames), other_radius[:, None, None]
        v = u[:, 40:].reshape(b, _TRIES, 8)
        # inside from the start: a random place, angle and speed; the walls fold the straight line back
        angle, pace = 2 * np.pi * v[..., 0], 0.4 + 0.8 * v[..., 1]
        velocity = pace[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)
        room = self.size - 2 * r
        line = v[..., 2:4][:, :, None] * room[..., None] + velocity[:, :, None] * f[:, None]
        inside = r[..., None] + room[..., None] - np.abs(line % (2 * room[..., None]) - room[..., None])
        # entering: along one axis the edge appears at frame `enters` and the centre is inside by the last frames
        enters = 1 + (u[:, 16] * 3).astype(np.int64)
        depth = -r + (1.0 + 0.5 * v[..., 4])[..., None] * (f - enters[:, None, None] + 1)
        depth = np.where((v[..., 5] < 0.5)[..., None], depth, self.size - depth)
        axis = (v[..., 6] < 0.5).astype(np.int64)[..., None]
        entering = np.stack([np.where(axis == k, depth, inside[..., k]) for k in (0, 1)], -1)
        late = u[:, 15] < 0.5
        paths = np.where(late[:, None, None, None], entering, inside)

        # take the first candidate that the main shape hides in at most a quarter of its frames, and not in the last two
        apart = np.linalg.norm(paths - path[:, None], axis=-1)
        seen = (f >= np.where(late, enters, 0)[:, None])[:, None]
        hidden = (apart < radius[:, None, None] + 0.5 * r) & seen
        share = hidden.sum(-1) / np.broadcast_to(seen, hidden.shape).sum(-1) + hidden[..., -2:].any(-1)
        choice = np.where((share <= 0.25).any(1), (share <= 0.25).argmax(1), share.argmin(1))
        return paths[np.arange(b), choice], np.where(late, enters, 0)

    def _render(self, u: NDArray, t: dict[str, NDArray]) -> NDArray:
        video = np.repeat(self._background(u)[:, None], self.frames, 1)
        ones = np.ones((1, self.frames), np.int64)
        shapes = [("companion", "companion_path", "companion_radius", 17), ("main", "path", "radius", 18)]
        for name, path, radius, slot in shapes:  # the main shape is drawn last: it is on top
            colour = PALETTE[t[f"{name}_colour"]] * (0.94 + 0.06 * u[:, slot, None])
            kinds, radii = t[f"{name}_kind"][:, None] * ones, t[radius][:, None] * ones
            alpha = coverage(kinds, t[path], radii, self.size)[..., None]
            alpha = alpha * (t[f"{name}_colour"] >= 0)[:, None, None, None, None]
            video = video + alpha * (colour[:, None, None, None] - video)
        return video

    def _background(self, u: NDArray) -> NDArray:
        """[B,H,W,3]: a dark gradient between two nearly grey colours and two faint plane waves (stripes or cloth)."""
        y, x = np.meshgrid(*[(np.arange(self.size) + 0.5) / self.size * 2 - 1] * 2, indexing="ij")
        b = len(u)
        ends = (0.09 + 0.19 * u[:, 19:21])[..., None] + 0.05 * (2 * u[:, 21:27].reshape(b, 2, 3) - 1)
        angle = 2 * np.pi * u[:, 27:30, None, None]
        along = np.cos(angle) * x + np.sin(angle) * y  # one direction for the gradient, two for the waves
        mix = (0.5 + 0.35 * along[:, 0])[..., None]
        base = ends[:, 0, None, None] * (1 - mix) + ends[:, 1, None, None] * mix
        strength = (0.035 * u[:, 30:32] ** 2)[..., None, None]
        phase = (4 + 8 * u[:, 32:34, None, None]) * along[:, 1:] + 2 * np.pi * u[:, 34:36, None, None]
        waves = strength * np.sin(phase)
        return np.clip(base + waves.sum(1)[..., None], 0.03, 0.4)

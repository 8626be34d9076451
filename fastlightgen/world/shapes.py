"""The built-in world: clips of a coloured shape that moves and then changes its motion, with captions and ground truth.

A clip is a pure function of (seed, split, index): its random numbers come from a counter-based hash, so it is the same
in every batch, order and process. The attributes that a caption states (colour, kind, direction, speed, change,
companion) are uniform. The caption leaves open: background, sizes, start, turn frame, speed jitter, companion's motion.

B clips, F frames, H = W = size; positions are (x, y) in pixels; pixel (row i, column j) has its centre at (j+.5, i+.5).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
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
KINDS = ("ball", "square", "cross")
DIRECTIONS = ("right", "down", "left", "up")  # clockwise on the screen: a quarter turn adds or subtracts 1
STEPS = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])  # unit (x, y) of each direction; y points down
SPEEDS = ("slowly", "fast")
PIXELS_PER_FRAME = np.array([0.7, 1.5])  # of each speed
SPEED_JITTER = 0.08  # a clip's speed differs from PIXELS_PER_FRAME by up to 8 %
CHANGES = ("on", "stops", "clockwise", "counter", "back")
TURN_FRAMES = (3, 4, 5)  # frames at which the motion can change
SPLITS = ("train", "test")

END = "<end>"
WORDS = (*"a moves then goes on stops turns back with".split(), END, *COLOURS, *KINDS, *DIRECTIONS, *SPEEDS)
TOKENS = 16
TEXT_DIM = 48  # 32 channels for the word, 16 for the position

_TRIES = 8  # candidate paths of a companion; the first one that the main shape does not hide is used
_SLOTS = 40 + 8 * _TRIES  # random numbers per clip: 40 for the clip, 8 for each candidate path


@dataclass
class Clips:
    """B clips with captions. `truth` holds class indices, radii and speeds [B] and positions [B,F,2]."""

    video: torch.Tensor  # float32 [B,F,3,H,W] in [0,1]
    captions: list[str]
    has_first: torch.Tensor  # bool [B]: the first frame is given as a condition
    truth: dict[str, NDArray]


def _mix(x: NDArray) -> NDArray:
    """The splitmix64 finaliser: a bijection of uint64 whose output bits look independent."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seed: int, split: str, indices: Sequence[int], slots: int) -> NDArray:
    """Return [B, slots] numbers in [0, 1), each a hash of (seed, split, index, slot)."""
    golden = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, splitmix64's increment
    key = _mix(np.array([2 * seed + SPLITS.index(split) + 1], np.uint64) * golden)
    clip = _mix(key + np.asarray(indices, np.uint64) * golden)
    bits = _mix(clip[:, None] + (np.arange(slots, dtype=np.uint64) + np.uint64(1)) * golden)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53  # the upper 53 bits fill a float64's mantissa


def coverage(kind: NDArray, centre: NDArray, radius: NDArray, size: int) -> NDArray:
    """Return the covered share of each pixel, [..., size, size], from kind [...], centre [..., 2] and radius r [...].

    square: |x|, |y| <= .95 r.  cross: a plus sign with arm length r and half-width .35 r.  Both are exact. The ball's
    edge is approximated by a ramp one pixel wide.
    """
    grid = np.arange(size) + 0.5
    dx, dy = grid - centre[..., 0:1], grid - centre[..., 1:2]
    radius = np.asarray(radius)[..., None]

    def overlap(d: NDArray, half: NDArray) -> NDArray:
        """Length of the overlap of a pixel [d - .5, d + .5] with the interval [-half, half]."""
        return np.clip(np.minimum(d + 0.5, half) - np.maximum(d - 0.5, -half), 0.0, 1.0)

    kind = np.asarray(kind)[..., None]
    # A cross is a tall box plus a wide box without their common centre; for a square both boxes are equal. The coverage
    # of a box is the product of its overlaps in x and y.
    wide = np.where(kind == 1, 0.95, 1.0) * radius
    thin = np.where(kind == 1, 0.95, 0.35) * radius
    wide_x, wide_y, thin_x, thin_y = overlap(dx, wide), overlap(dy, wide), overlap(dx, thin), overlap(dy, thin)
    boxes = wide_y[..., :, None] * thin_x[..., None, :] + thin_y[..., :, None] * (wide_x - thin_x)[..., None, :]
    distance = np.sqrt(dy[..., :, None] ** 2 + dx[..., None, :] ** 2)
    ball = np.clip(radius[..., None] - distance + 0.5, 0.0, 1.0)
    return np.where(kind[..., None] == 0, ball, boxes)


def main_path(direction: NDArray, speed: NDArray, change: NDArray, turn: NDArray, frames: int) -> NDArray:
    """Positions [B,F,2] relative to frame 0; steps before frame `turn` follow `direction`, later ones `change`."""
    first = STEPS[direction] * speed[:, None]
    turned = [STEPS[(direction + quarter) % 4] * speed[:, None] for quarter in (1, -1)]
    second = np.stack([first, 0 * first, *turned, -first])  # in the order of CHANGES
    second = second[change, np.arange(len(change))]
    before = np.arange(frames - 1) < turn[:, None]
    steps = np.where(before[..., None], first[:, None], second[:, None])
    return np.concatenate([np.zeros((len(turn), 1, 2)), np.cumsum(steps, 1)], 1)


def caption(
    colour: int, kind: int, direction: int, speed: int, change: int, other: tuple[int, int] | None = None
) -> str:
    """Return the caption for class indices; `other` is the companion's (colour, kind)."""
    turns = [f"turns {DIRECTIONS[(direction + 1) % 4]}", f"turns {DIRECTIONS[(direction - 1) % 4]}"]
    then = ["goes on", "stops", *turns, "turns back"][change]
    text = f"a {COLOURS[colour]} {KINDS[kind]} moves {DIRECTIONS[direction]} {SPEEDS[speed]} then {then}"
    return text if other is None else f"{text} with a {COLOURS[other[0]]} {KINDS[other[1]]}"


def tokenise(captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode captions as tokens: (float32 [B,16,48], int64 lengths [B]). An end token closes every caption, also "".

    A token consists of a 32-channel word vector, a row of the Hadamard matrix, and a 16-channel one-hot position times
    4. Words are therefore orthogonal, and both parts have a root mean square of 1. Tokens beyond the length are zeros.
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
        ids = torch.tensor([WORDS.index(w) + 1 for w in words])  # row 0 of the matrix, all ones, is no word
        lengths[row] = len(words)
        text[row, : len(words), :32] = _HADAMARD[ids]
        text[row, : len(words), 32:] = 4.0 * torch.eye(TOKENS)[: len(words)]
    return text, lengths


def pool(text: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """The mean token [B,48] of captions from `tokenise`, for networks that read a pooled text (HunyuanVideo)."""
    return text.sum(1) / length[:, None]


def _hadamard(n: int) -> torch.Tensor:
    """Sylvester's Hadamard matrix [n, n], n a power of two: entries are +-1, rows are orthogonal."""
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


_HADAMARD = _hadamard(32)


class Shapes:
    """An unlimited, seeded source of clips: `Shapes(seed=0).batch(range(16))`."""

    def __init__(
        self, frames: int = 8, size: int = 16, seed: int = 0, first_frame_prob: float = 0.5, split: str = "train"
    ) -> None:
        longest = PIXELS_PER_FRAME[-1] * (1 + SPEED_JITTER) * (frames - 1)  # pixels; the shape itself needs 4.5 more
        if frames <= TURN_FRAMES[-1] + 1 or size % 2 or size - longest < 4.5:
            wanted = f"frames > {TURN_FRAMES[-1] + 1} and an even size >= {longest + 4.5:.0f}"
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
        video = torch.from_numpy(self._render(u, truth).astype(np.float32)).permute(0, 1, 4, 2, 3).contiguous()
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
        # The longest paths leave too little room for the largest shape, so the shape is then a little smaller.
        radius = np.minimum(2.4 + 0.6 * u[:, 8], (self.size - (high - low).max(1)) / 2)
        room = self.size - (high - low) - 2 * radius[:, None]  # free start positions, pixels in x and y
        path = path + (radius[:, None] - low + u[:, 9:11] * room)[:, None]

        with_other = u[:, 11] < 0.5
        other_colour = np.where(with_other, (colour + 1 + pick(12, 5)) % 6, -1)  # never the main colour
        other_radius = 1.8 + 0.8 * u[:, 14]
        other_path, enters = self._companion(u, path, radius, other_radius)
        return {
            "main_colour": colour, "main_kind": kind, "direction": direction, "speed": speed, "change": change,
            "turn_frame": turn, "path": path, "radius": radius, "pixels_per_frame": pixels,
            "companion_colour": other_colour, "companion_kind": np.where(with_other, pick(13, 3), -1),
            "companion_path": other_path, "companion_radius": other_radius, "companion_enters": enters,
        }  # fmt: skip

    def _companion(self, u: NDArray, path: NDArray, radius: NDArray, other_radius: NDArray) -> tuple[NDArray, NDArray]:
        """Return the companions' paths [B,F,2] and enter frames [B]: visible from frame 0, or entering at frame 1 to 3.

        A companion moves straight and bounces off the walls, or enters straight through one.
        """
        b, f, r = len(u), np.arange(self.frames), other_radius[:, None, None]
        v = u[:, 40:].reshape(b, _TRIES, 8)  # eight random numbers per candidate path
        # Inside from the start: a random place, angle and speed. Folding the line at the walls makes it bounce.
        angle, pace = 2 * np.pi * v[..., 0], 0.4 + 0.8 * v[..., 1]
        velocity = pace[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)
        room = self.size - 2 * r
        line = v[..., 2:4][:, :, None] * room[..., None] + velocity[:, :, None] * f[:, None]
        inside = r[..., None] + room[..., None] - np.abs(line % (2 * room[..., None]) - room[..., None])
        # Entering: along one axis the shape's edge appears at frame `enters`; its centre is inside in the last frames.
        enters = 1 + (u[:, 16] * 3).astype(np.int64)
        depth = -r + (1.0 + 0.5 * v[..., 4])[..., None] * (f - enters[:, None, None] + 1)
        depth = np.where((v[..., 5] < 0.5)[..., None], depth, self.size - depth)  # from either of two opposite walls
        axis = (v[..., 6] < 0.5).astype(np.int64)[..., None]
        entering = np.stack([np.where(axis == k, depth, inside[..., k]) for k in (0, 1)], -1)
        late = u[:, 15] < 0.5  # half of the companions enter
        paths = np.where(late[:, None, None, None], entering, inside)

        # Take the first candidate that the main shape hides in at most a quarter of its frames and not in the last two;
        # without such a candidate, the one hidden least.
        apart = np.linalg.norm(paths - path[:, None], axis=-1)
        seen = (f >= np.where(late, enters, 0)[:, None])[:, None]
        hidden = (apart < radius[:, None, None] + 0.5 * r) & seen
        # Share of the visible frames that are hidden, plus 1 if one of the last two is.
        share = hidden.sum(-1) / np.broadcast_to(seen, hidden.shape).sum(-1) + hidden[..., -2:].any(-1)
        choice = np.where((share <= 0.25).any(1), (share <= 0.25).argmax(1), share.argmin(1))
        return paths[np.arange(b), choice], np.where(late, enters, 0)

    def _render(self, u: NDArray, t: dict[str, NDArray]) -> NDArray:
        """Draw the clips with the attributes t: [B,F,H,W,3] in [0,1]."""
        video = np.repeat(self._background(u)[:, None], self.frames, 1)
        ones = np.ones((1, self.frames), np.int64)
        shapes = [("companion", "companion_path", "companion_radius", 17), ("main", "path", "radius", 18)]
        for name, path, radius, slot in shapes:  # the main shape is drawn last, on top
            colour = PALETTE[t[f"{name}_colour"]] * (0.94 + 0.06 * u[:, slot, None])
            kinds, radii = t[f"{name}_kind"][:, None] * ones, t[radius][:, None] * ones
            alpha = coverage(kinds, t[path], radii, self.size)[..., None]
            alpha = alpha * (t[f"{name}_colour"] >= 0)[:, None, None, None, None]  # zero without a companion
            video = video + alpha * (colour[:, None, None, None] - video)
        return video

    def _background(self, u: NDArray) -> NDArray:
        """Return [B,H,W,3]: a dark gradient between two nearly grey colours, with two faint plane waves as texture."""
        y, x = np.meshgrid(*[(np.arange(self.size) + 0.5) / self.size * 2 - 1] * 2, indexing="ij")
        b = len(u)
        # Two end colours [B,2,3]: a grey level and a small tint for each.
        ends = (0.09 + 0.19 * u[:, 19:21])[..., None] + 0.05 * (2 * u[:, 21:27].reshape(b, 2, 3) - 1)
        angle = 2 * np.pi * u[:, 27:30, None, None]
        along = np.cos(angle) * x + np.sin(angle) * y  # one direction for the gradient, two for the waves
        mix = (0.5 + 0.35 * along[:, 0])[..., None]
        base = ends[:, 0, None, None] * (1 - mix) + ends[:, 1, None, None] * mix
        strength = (0.035 * u[:, 30:32] ** 2)[..., None, None]
        phase = (4 + 8 * u[:, 32:34, None, None]) * along[:, 1:] + 2 * np.pi * u[:, 34:36, None, None]
        waves = strength * np.sin(phase)
        return np.clip(base + waves.sum(1)[..., None], 0.03, 0.4)

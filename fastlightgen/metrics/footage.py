"""What can be measured of one clip of any video, uint8 [F,H,W,3], without a network and without a caption.

Frames are measured one after the other, so that a clip of 81 large frames needs no memory beyond its own.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlightgen.metrics import video
from fastlightgen.metrics.natural import Moments, patch_features, patch_size

LOOKED = 16  # frames, evenly spread, whose look is measured
COMPARED = 64  # frames, evenly spread, that repetition compares with each other
BLOCK, REACH = 16, 7  # pixels: sides of the blocks that movement follows, and how far it looks for them
SIDE = 128  # pixels of the shorter side of the pictures that movement compares
PAIRS = 8  # per second, of the pictures that movement compares, as VBench's dynamic degree
LOOK = {
    "brightness": video.brightness,
    "contrast": video.contrast,
    "saturation": video.saturation,
    "colourfulness": video.colourfulness,
    "sharpness": video.sharpness,
}
MEANING = {  # score: (format, goal, meaning); the goals are those of metrics.scores
    "naturalness": ("{:.2f}", "low", "distance of fine contrast to that of the most similar real clips, after NIQE"),
    "movement": ("{:.1f}", "real", "speed of the picture's parts, % of its shorter side per second; 0: frozen"),
    "repetition": ("{:.3f}", "low", "how exactly frames return to an earlier state; 1: a loop"),
    "flicker": ("{:.3f}", "low", "grey levels that regions change by and change back in the next frame"),
    "colour_drift": ("{:.2f}", "low", "distance of the mean colours of the first and last frame, CIELAB"),
    "chroma_drift": ("{:+.2f}", "real", "how much more vivid the last frame is than the first; above 0: colours burn"),
    "temporal_flickering": ("{:.4f}", "real", "VBench score: 1 for a still, lower: more change"),
    "motion_smoothness": ("{:.4f}", "real", "how well neighbours predict a frame; 1 for a still"),
    "brightness": ("{:.1f}", "real", "mean grey level, 0 to 255"),
    "contrast": ("{:.1f}", "real", "deviation of the grey level within a frame"),
    "saturation": ("{:.3f}", "real", "mean strength of colours"),
    "colourfulness": ("{:.1f}", "real", "0 grey, 33 moderate, 82 high"),
    "sharpness": ("{:.0f}", "real", "variance of the Laplacian; blur lowers it, noise raises it"),
}

OF_SETS = {  # scores of a set of clips; those over a network begin with network_
    "unlike": ("{:.2f}", "low", "how far a clip is from the real ones in its worst score, in their deviations"),
    "frechet": ("{:.2f}", "low", "Frechet distance to the real clips"),
    "kid": ("{:.4f}", "low", "kernel distance to the real clips; about 0 for real ones"),
    "precision": ("{:.1%}", "high", "share of the clips that look like some real clip"),
    "recall": ("{:.1%}", "high", "share of the real clips that look like some clip"),
    "coverage": ("{:.1%}", "high", "share of the real clips with a clip among their neighbours"),
}


def meaning(score: str) -> tuple[str, str, str]:
    """(format, goal, meaning) of a score of `evaluate videos=`."""
    form, goal, text = MEANING.get(score) or OF_SETS[score.removeprefix("network_")]
    return form, goal, f"{text}, over the network" if score.startswith("network_") else text


def values_of(frames: Tensor, fps: float) -> dict[str, float]:
    """All scores of a clip but naturalness, which needs real clips (`contrasts`)."""
    looked = [_clip(frames[i : i + 1]) for i in spread(len(frames), LOOKED)]
    look = {name: sum(float(measure(f)) for f in looked) / len(looked) for name, measure in LOOK.items()}
    drift, chroma = colour_drift(frames)
    return {
        "movement": movement(frames, fps),
        "repetition": repetition(frames),
        "flicker": flicker(frames),
        "colour_drift": drift,
        "chroma_drift": chroma,
        "temporal_flickering": _mean_over(frames, 2, 1, video.temporal_flickering),
        "motion_smoothness": _mean_over(frames, 3, 2, video.motion_smoothness_lin),
    } | look


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers 0 ... count - 1, evenly spread, with the first and the last."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _clip(frames: Tensor) -> Tensor:
    """Frames [F,H,W,3] as the clip [1,F,3,H,W] in [0,1] that metrics.video measures."""
    return (frames.permute(0, 3, 1, 2)[None]).float() / 255


def _mean_over(frames: Tensor, size: int, step: int, measure: Callable[[Tensor], Tensor]) -> float:
    """The mean of a measure over groups of `size` frames, one group every `step` frames; nan if the clip is shorter."""
    found = [float(measure(_clip(frames[i : i + size]))) for i in range(0, len(frames) - size + 1, step)]
    return sum(found) / len(found) if found else math.nan


def grey_of(frames: Tensor) -> Tensor:
    """Grey levels 0..255 of frames [n,H,W,3]: float32 [n,H,W]."""
    return frames.float() @ torch.tensor(video.GREY, dtype=torch.float32, device=frames.device)


def shrunk(pictures: Tensor, side: int) -> Tensor:
    """Pictures [n,H,W] averaged down so that the shorter side has at most `side` pixels."""
    shorter = min(pictures.shape[-2:])
    if shorter <= side:
        return pictures
    size = [max(1, round(n * side / shorter)) for n in pictures.shape[-2:]]
    return F.interpolate(pictures[:, None], size=size, mode="area")[:, 0]


def contrasts(frames: Tensor) -> Moments:
    """What naturalness compares: moments of the patches of LOOKED / 2 frames; none of a small picture."""
    if not (patch := patch_size(*frames.shape[1:3])):
        return Moments.of(torch.zeros(0, 36, dtype=torch.float64))
    return Moments.of(patch_features(grey_of(frames[spread(len(frames), LOOKED // 2)]), patch))


def movement(frames: Tensor, fps: float) -> float:
    """Mean speed of the blocks of the picture, in % of its shorter side per second, by block matching.

    Blocks of 16 x 16 pixels of a picture of 128 lines, shifted by at most 7. A block counts as moved only if the shift
    explains it clearly better than standing still, so that noise and flat areas do not move.
    """
    lag = max(1, round(fps / PAIRS))
    if len(frames) <= lag:
        return math.nan
    steps = [
        _displacement(shrunk(grey_of(frames[i : i + 1]), SIDE), shrunk(grey_of(frames[i + lag : i + lag + 1]), SIDE))
        for i in range(0, len(frames) - lag, lag)
    ]
    side = min(SIDE, *frames.shape[1:3])
    return sum(steps) / len(steps) / side * 100 * fps / lag


def _displacement(before: Tensor, after: Tensor) -> float:
    """Mean displacement of the blocks between two pictures [1,H,W], in pixels."""
    block = min(BLOCK, *before.shape[-2:])
    wide = F.pad(after[:, None], (REACH,) * 4, mode="replicate")[:, 0]
    height, width = before.shape[-2:]
    shifts = [(dy, dx) for dy in range(-REACH, REACH + 1) for dx in range(-REACH, REACH + 1)]
    places = ((REACH + dy, REACH + dx) for dy, dx in shifts)
    costs = torch.cat(
        [F.avg_pool2d((before - wide[:, y : y + height, x : x + width]).abs(), block) for y, x in places]
    )  # mean |difference| of each block under each shift: [shifts, rows, columns]
    still = costs[shifts.index((0, 0))]
    best, which = costs.min(0)
    length = torch.tensor([math.hypot(dy, dx) for dy, dx in shifts])[which]
    return float(torch.where(best < 0.9 * still - 0.5, length, 0).mean())


def flicker(frames: Tensor) -> float:
    """Mean |x[i-1] - 2 x[i] + x[i+1]| / 4 of the mean grey levels x of 4 x 4 regions; nan for under 3 frames.

    A lamp that is d levels brighter in every second frame gives d / 2. Steady motion and fading give little.
    """
    if len(frames) < 3:
        return math.nan
    regions = torch.cat([F.adaptive_avg_pool2d(grey_of(f[None]), 4) for f in frames])
    return float(regions.diff(n=2, dim=0).abs().mean() / 4)


def repetition(frames: Tensor) -> float:
    """How exactly the frames of the second half return to an earlier frame after they had left it; 1: a loop.

    For frame s, the largest 1 - D[t,s] / max_u D[u,s] over t < u < s, with D the mean |difference| of small pictures.
    A frame that was never more than a grey level away has not left. A clip that runs back counts as well.
    """
    small = torch.cat([shrunk(grey_of(frames[i : i + 1]), 32) for i in spread(len(frames), COMPARED)]).flatten(1)
    n = len(small)
    if n < 4:
        return math.nan
    apart = torch.cdist(small, small, p=1) / small.shape[1]
    found = []
    for s in range(n // 2, n):
        gone = apart[:s, s].flip(0).cummax(0).values.flip(0)[1:]  # [t]: the largest D[u,s] of t < u < s
        back = 1 - apart[: s - 1, s] / gone[: s - 1]
        found.append(float(back[gone[: s - 1] > 1].clamp_min(0).amax()) if bool((gone[: s - 1] > 1).any()) else 0.0)
    return sum(found) / len(found)


def colour_drift(frames: Tensor) -> tuple[float, float]:
    """(distance of the mean colours of the first and the last frame, gain of the mean chroma), in CIELAB."""
    first, last = (lab(f.double() / 255).flatten(0, 1) for f in (frames[0], frames[-1]))
    chroma = [float(x[:, 1:].norm(dim=1).mean()) for x in (first, last)]
    return float((last.mean(0) - first.mean(0)).norm()), chroma[1] - chroma[0]


def lab(rgb: Tensor) -> Tensor:
    """sRGB in [0,1] [...,3] as CIELAB under D65 (IEC 61966-2-1, CIE 15)."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = rgb.new_tensor(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    x = linear @ to_xyz.T / to_xyz.sum(1)  # relative to white
    f = torch.where(x > (6 / 29) ** 3, x.clamp_min(1e-12) ** (1 / 3), x / (3 * (6 / 29) ** 2) + 4 / 29)
    return torch.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)

"""Frechet distance between sets of clips, over hand-made features: no weights, no randomness, no captions.

The features measure position and motion of saturated pixels, colours, contrast, sharpness, and differences between
frames (the features of a random network barely depend on motion). Video is [B,F,3,H,W] in [0,1]; D features per clip.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastlightgen.metrics.intervals import Statistic, value

_LUMA = (0.299, 0.587, 0.114)  # Rec. 601 weights of red, green, blue
MIN_DEVIATION = 0.02  # features are pixel levels, shares of the frame and logarithms: 2 % of each is small


def features(video: Tensor) -> Tensor:
    """Return the features of [B,F,3,H,W] as float64 [B,D]; needs F >= 5, because the largest lag is 4 frames."""
    v = video.detach().double()
    luma = (v * v.new_tensor(_LUMA).view(3, 1, 1)).sum(2)  # [B,F,H,W]
    saturation = v.amax(2) - v.amin(2)  # [B,F,H,W], 0 for grey
    parts = [*_salient(v, saturation), *_colours(v, luma, saturation), *_edges(v, luma), *_differences(v)]
    return torch.cat([p.reshape(len(v), -1) for p in parts], 1)


def _log(x: Tensor) -> Tensor:
    """A logarithm that is finite at 0."""
    return (x + 1e-4).log()


def _salient(v: Tensor, saturation: Tensor) -> list[Tensor]:
    """Area, place, width, mean colour and motion of the saturated pixels."""
    weight = (saturation - 0.2).clamp_min(0)  # a grey background has no weight
    mass = weight.sum((-1, -2)) + 1e-3  # [B,F]
    y, x = (torch.linspace(0, 1, n, dtype=v.dtype, device=v.device) for n in v.shape[-2:])  # shares of the frame
    cx, cy = (weight.sum(-2) * x).sum(-1) / mass, (weight.sum(-1) * y).sum(-1) / mass  # centroid [B,F]
    square_distance = (x - cx[..., None])[..., None, :] ** 2 + (y - cy[..., None])[..., None] ** 2
    spread = (weight * square_distance).sum((-1, -2)) / mass  # [B,F] variance about the centroid
    colour = (v * weight[:, :, None]).sum((1, 3, 4)) / mass.sum(1, keepdim=True)
    path = torch.stack([cx, cy], -1)  # [B,F,2]
    mid, last = path.shape[1] // 2, path.shape[1] - 1
    step = path.diff(dim=1)
    pace = step.norm(dim=-1)  # [B,F-1]
    # Distances over several lags tell straight paths from paths that turn or jitter.
    lags = [(path[:, k:] - path[:, :-k]).norm(dim=-1).mean(1) for k in (1, 2, 4)]
    ends = (path[:, last] - path[:, 0]).norm(dim=-1)
    shape = [
        _log(mass.mean(1)),
        mass[:, last] - mass[:, 0],
        mass.diff(dim=1).abs().mean(1),
        mass.std(1),
        spread.sqrt().mean(1),
    ]
    place = [path[:, 0], path[:, mid], path[:, last], step.mean(1), colour]
    halves = [pace[:, :mid].mean(1), pace[:, mid:].mean(1)]  # speed before and after the middle: stops, starts
    turns = [step.diff(dim=1).norm(dim=-1).mean(1), step.diff(dim=1).norm(dim=-1).amax(1)]
    return [*shape, *place, *lags, ends, *halves, pace.amin(1), pace.amax(1), *turns]


def _colours(v: Tensor, luma: Tensor, saturation: Tensor) -> list[Tensor]:
    """Means and standard deviations of the channels, percentiles of luma (contrast) and of saturation."""
    levels = v.new_tensor([0.02, 0.25, 0.5, 0.75, 0.9, 0.98])
    percentiles = [x.flatten(1).quantile(levels, dim=1).T for x in (luma, saturation)]
    return [v.mean((1, 3, 4)), v.transpose(1, 2).flatten(2).std(-1), *percentiles]


def _edges(v: Tensor, luma: Tensor) -> list[Tensor]:
    """Sharpness: energy of gradient and Laplacian, and the steepest edges."""
    dx, dy = luma.diff(dim=-1).abs(), luma.diff(dim=-2).abs()
    laplace = luma.diff(n=2, dim=-1)[..., 1:-1, :] + luma.diff(n=2, dim=-2)[..., 1:-1]
    steep = v.diff(dim=-1).abs().flatten(1).quantile(v.new_tensor([0.5, 0.9, 0.98]), dim=1).T
    return [
        _log(dx.square().mean((1, 2, 3))),
        _log(dy.square().mean((1, 2, 3))),
        _log(laplace.square().mean((1, 2, 3))),
        steep,
    ]


def _differences(v: Tensor) -> list[Tensor]:
    """Energy of frame differences at lags 1, 2, 4, of extreme steps and of second differences; flicker."""
    energy = [_log((v[:, k:] - v[:, :-k]).square().mean((1, 2, 3, 4))) for k in (1, 2, 4)]
    first = v.diff(dim=1)
    per_step = _log(first.square().mean((2, 3, 4)))  # [B,F-1]
    second = _log(v.diff(n=2, dim=1).square().mean((1, 2, 3, 4)))
    flicker = first.abs().flatten(1).median(1).values  # the median pixel belongs to the background
    # The ratios of energies (differences of logarithms) depend on the order of the frames, not on contrast.
    return [*energy, per_step.amin(1), per_step.amax(1), second, second - energy[0], energy[1] - energy[0], flicker]


def gaussian_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Frechet distance of two normal distributions: ||mean_a - mean_b||^2 + Tr(A + B - 2 (A^1/2 B A^1/2)^1/2).

    Tr((A^1/2 B A^1/2)^1/2) equals the usual Tr((A B)^1/2), but needs eigenvalues of symmetric matrices only.
    """
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T  # A^1/2; rounding can make tiny eigenvalues negative
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def normalise(reference: Tensor, feats: Tensor) -> Tensor:
    """Features in units of the reference: minus its mean, divided by its standard deviation.

    A feature's standard deviation counts as at least MIN_DEVIATION: real backgrounds do not move at all, so without
    this minimum an invisible flicker would dominate every distance.
    """
    return (feats - reference.mean(0)) / reference.std(0).clamp_min(MIN_DEVIATION)


def raw(reference: Tensor, feats: Tensor) -> Tensor:
    """Features as they are: those of a network, whose published distances (FID, FVD) are taken of the plain numbers."""
    return feats


Units = Callable[[Tensor, Tensor], Tensor]  # `normalise` or `raw`


def frechet_statistic(reference: Tensor, feats: Tensor, units: Units = normalise) -> Statistic:
    """The Frechet distance of resampled features [n,D] to reference features [N,D]."""
    a, b = units(reference, feats), units(reference, reference)
    mean, cov = b.mean(0), b.T.cov()

    def statistic(rows: Tensor) -> Tensor:
        sets = (a[row] for row in rows)
        return torch.tensor([gaussian_distance(x.mean(0), x.T.cov(), mean, cov) for x in sets], dtype=torch.float64)

    return statistic


def frechet(reference: Tensor, feats: Tensor) -> float:
    """Frechet distance of feature sets [N,D] and [M,D], normalised by the reference; it is therefore not symmetric."""
    return value(frechet_statistic(reference, feats), len(feats))

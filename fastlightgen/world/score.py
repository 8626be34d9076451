"""Scores generated clips of the built-in world."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fastlightgen.metrics import video
from fastlightgen.metrics.frechet import features, frechet
from fastlightgen.world import reader
from fastlightgen.world.shapes import Clips, Shapes

REFERENCE_START, REFERENCE_CLIPS = 1_000_000, 2048  # real clips for the Frechet distance, never used as conditions


@lru_cache
def reference_features(seed: int) -> Tensor:
    """Features of the real clips that the Frechet distance compares with."""
    world = Shapes(seed=seed, split="test")
    starts = range(REFERENCE_START, REFERENCE_START + REFERENCE_CLIPS, 256)
    return torch.cat([features(world.batch(range(s, s + 256)).video) for s in starts])


def score(generated: Tensor, asked: Clips, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """(scores, adherence by attribute) of clips [B,F,3,H,W] made for the captions and first frames of `asked`."""
    generated = generated.float().cpu().clamp(0, 1)
    reading = reader.read(generated)
    adherence, attributes = reader.adherence(reading, asked.captions)
    psnr, _ = reader.first_frame_psnr(generated, asked.video[:, 0], asked.has_first)
    scores = {
        "adherence": float(adherence.mean()),
        "first_frame_psnr": psnr,
        "tracking_error": float(np.nanmean(reader.tracking_error(reading, asked.captions))),
        "motion": float(np.nanmean(reader.motion(reading, asked.captions))),
        "frechet": frechet(reference_features(seed), features(generated)),
        "temporal_flickering": float(video.temporal_flickering(generated).mean()),
        "motion_smoothness": float(video.motion_smoothness_lin(generated).mean()),
        "saturation": float(video.saturation(generated).mean()),
        "sharpness": float(video.sharpness(generated).mean()),
    }
    return scores, attributes

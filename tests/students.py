"""Pruned few-step students of the very small pipelines (pipelines.py), and shared noise for both samplers."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastlightgen.config import main
from fastlightgen.flow import ladder
from fastlightgen.generate import generate
from fastlightgen.models.folder.experts import experts_of
from fastlightgen.models.folder.weights import load_model, save_model

KEEP, STEPS, SHIFT = [0, 2, 3], 4, 5.0
CLIP, PROMPT = (64, 96, 9), "a red ball moves right"  # height, width, frames


def make_student(pipeline: Path, folder: Path, sampler: str = "stochastic", source: str = "a teacher") -> Path:
    """A model folder like that of Stage III, with the random weights of the pipeline's network."""
    card = {"ladder": ladder(STEPS, SHIFT), "shift": SHIFT, "guidance": 1.0, "sampler": sampler}
    student = load_model(pipeline / "transformer").prune(KEEP)
    return save_model(student, folder, stage=3, kept_blocks=KEEP, source=source, **card)


def make_pair(pipeline: Path, folder: Path, sampler: str = "stochastic") -> Path:
    """A folder with students of both experts, like the result of Stage III; they keep other blocks."""
    pair = experts_of(pipeline)
    assert pair is not None
    for expert, keep in (("high", KEEP), ("low", [1, 3])):
        card = {"ladder": ladder(STEPS, SHIFT), "shift": SHIFT, "guidance": 1.0, "sampler": sampler}
        card |= {"expert": expert, "boundary": pair.boundary, "stage": 3, "kept_blocks": keep, "source": "a teacher"}
        save_model(load_model(pair.of(expert)).prune(keep), folder / expert, **card)
    return folder


Size = tuple[int, int, int]


def clip(out: Path, model: Path, *words: str, prompt: str = PROMPT, size: Size = CLIP) -> np.ndarray:
    """The frames [F, H, W, 3] that the command makes."""
    height, width, frames = size
    given = [f"model={model}", f"prompt={prompt}", f"out={out}", f"size={height}x{width}x{frames}", "seed=3"]
    main(generate, "generate", [*given, "threads=1", "progress=false", *words])
    return np.asarray(Image.open(out)).astype(int).reshape(height, frames, width, 3).transpose(1, 0, 2, 3)


def film(seed: int, size: Size = CLIP) -> np.ndarray:
    """Random frames [F, H, W, 3]."""
    height, width, frames = size
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)


def write_films(folder: Path, captions: list[str], size: Size = CLIP) -> None:
    """Films 0, 1, ... as folders of pictures, each beside its caption."""
    for number, caption in enumerate(captions):
        (folder / f"{number}").mkdir(parents=True)
        (folder / f"{number}.txt").write_text(caption)
        for k, picture in enumerate(film(number, size)):
            Image.fromarray(picture).save(folder / f"{number}" / f"{k:02}.png")


def changed(source: Path, out: Path, **parts: Path) -> Path:
    """A copy of a pipeline folder with other parts."""
    shutil.copytree(source, out)
    for name, part in parts.items():
        shutil.rmtree(out / name)
        shutil.copytree(part, out / name)
    return out


def stock(folder: Path):
    """The folder, loaded by stock diffusers."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same_noise(patch, noises: list[torch.Tensor]) -> None:
    """Make the stock scheduler's steps use these noises instead of drawing from the global generator."""
    draws = itertools.cycle(noises)
    module = "diffusers.schedulers.scheduling_flow_match_euler_discrete"
    patch.setattr(f"{module}.randn_tensor", lambda *_, **__: next(draws))

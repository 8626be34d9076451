"""Checks before a stage starts: of the cache, of the teacher on its clips, and of the time shift.

Shapes: x0, noise, x_t, v [B, C, F, H, W]; t [B].
"""

import math
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from fastlightgen import flow
from fastlightgen.config import StageConfig
from fastlightgen.data.source import Source
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.experts import Model
from fastlightgen.models.folder.released import sampling
from fastlightgen.parallel.log import say
from fastlightgen.rng import generator, normal_like

TIMES, CLIPS = (0.1, 0.3, 0.5), 4
# Largest accepted ratio of the teacher's error to a plain filter's. The shipped teacher has 0.25 on its own clips, as
# nothing predicts their mosaic. On latents of another VAE it has 1.2 (channels in another order) or 0.9 (a scale that
# is off by a factor of three). A mean that is off by one standard deviation gives 0.4, which is not noticed.
SUSPECT = 0.5


def check_source(source: Source, model: Model, card: dict, data: str) -> None:
    """Raise if the cache is of another family, of other sizes, or of another VAE than the network's card names."""
    made, config = source.description, model.config
    pairs = [
        ("family", made.get("family"), model.family),
        ("in_channels (latents and condition)", made.get("in_channels"), config["in_channels"]),
        ("text_dim", made.get("text_dim"), model.cfg.text_width),
        ("vae", made.get("vae"), card.get("vae")),
    ]
    for name, got, wanted in pairs:
        if got is not None and wanted is not None and got != wanted:
            raise ValueError(
                f"data={data}: made with {name} {got}, the model has {wanted}; "
                f"encode the videos again with this model's own pipeline"
            )
    first = {True: "a first frame", False: "no first frame"}
    given, takes = made.get("image_condition") is not None, model.cfg.pictured
    if "image_condition" in made and takes is not None and given != takes:
        raise ValueError(
            f"data={data}: its clips have {first[given]}, the model wants {first[takes]}; encode the videos again with "
            "this model's own pipeline"
        )


def check_expert(cfg: StageConfig, card: dict) -> None:
    """Raise if the network was trained as another expert, or for other times."""
    for key, wanted in (("expert", cfg.expert), ("boundary", cfg.boundary)):
        if (got := card.get(key)) is not None and got != wanted:
            raise ValueError(
                f"{key}={wanted}: the network was trained with {key}={got}; give {key}={got}, or the network before "
                "its training"
            )


def require_embedded(embeds: bool) -> None:
    """Raise if a network for teacher_guidance=embedded reads no guidance scale."""
    if not embeds:
        raise ValueError(
            "teacher_guidance=embedded: no guidance was distilled into this model, it reads no scale; "
            "use teacher_guidance=null"
        )


def relative_error(x0_hat: Tensor, x0: Tensor) -> float:
    """Return mean |x0_hat - x0|^2 / variance of x0: 0 if exact, 1 for the best constant x0_hat."""
    return float((x0_hat - x0).square().mean() / x0.var())


def filter_error(x0: Tensor, t: float) -> float:
    """Return the relative error of the best linear filter x0_hat = c x_t, which knows nothing of videos.

    With s = mean x0^2 the best c leaves mean |x0_hat - x0|^2 = s t^2 / ((1 - t)^2 s + t^2).
    """
    s = float(x0.square().mean())
    return t * t / ((1 - t) ** 2 * s + t * t) * s / float(x0.var())


@torch.no_grad()
def teacher_errors(model: VideoDiT, source: Source, seed: int) -> dict[float, tuple[float, float]]:
    """Return t -> (relative error of the teacher, of the filter): means over CLIPS held-out clips, or repeated ones."""
    out = {}
    for k, t in enumerate(TIMES):
        errors = []
        for i in range(CLIPS):
            batch = source.held_out(i, 1).to(model.device)
            x_t = flow.add_noise(batch.x0, normal_like(batch.x0, generator(seed, 11, k, i)), t)
            x0_hat = flow.x0_from_velocity(x_t, model(x_t, t, batch.cond).float(), t)
            errors.append((relative_error(x0_hat, batch.x0), filter_error(batch.x0, t)))
        ours, filters = zip(*errors, strict=True)
        out[t] = sum(ours) / CLIPS, sum(filters) / CLIPS
    return out


def check_teacher(cfg: StageConfig, model: VideoDiT, source: Source) -> None:
    """Warn or raise (data_check) if the teacher cannot reproduce the clips: the commonest silent failure."""
    if cfg.data_check == "off" or "family" not in source.description:  # only a cache can be of another VAE
        return
    if cfg.bounds[0] > max(TIMES):
        say(
            f"the teacher predicts at times from {cfg.bounds[0]:g} on, where hardly anything is left of a clip to check"
        )
        return
    with torch.autocast(model.device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
        errors = teacher_errors(model, source, cfg.seed)
    shown = "; ".join(f"t={t:g}: {e:.3f} (a plain filter: {f:.3f})" for t, (e, f) in errors.items())
    clips = min(CLIPS, source.num_held_out)  # a short list is repeated, with other noise
    say(f"the teacher's x0 error on {clips} held-out clip{'s' * (clips != 1)}, relative to their variance: {shown}")
    # The geometric mean over t of the teacher's error, relative to the filter's.
    ratio = math.exp(sum(math.log(max(e, 1e-12) / f) for e, f in errors.values()) / len(errors))
    if ratio < SUSPECT:
        return
    message = (
        f"data={cfg.data}: the teacher does not know these latents (its x0 error is {ratio:.2f} times that of a plain "
        f"filter, wanted below {SUSPECT}); check that the cache was made with its pipeline"
    )
    if cfg.data_check == "stop":
        raise ValueError(f"{message}, or go on with data_check=warn")
    say(f"warning: {message}")


def shift_of_teacher(cfg: Any) -> list[str]:
    """Say so if the teacher's own sampler takes another time shift than the training of its student."""
    try:
        own = sampling(cfg.model)
    except ValueError:  # no known network; building the stage stops at it
        return []
    shift, sections = own.values["shift"], {"all": ("stage1.", "stage2.", "stage3."), "0": ()}.get(cfg.stage, ("",))
    trained = {f"{section}shift": attrgetter(f"{section}shift")(cfg) for section in sections}
    others = ", ".join(f"{key}={value}" for key, value in trained.items() if value != shift)
    if not others:
        return []
    where = f"the teacher itself is sampled with shift={shift} ({own.sources['shift']})"
    return [f"  {where}; training takes {others}, which suits a student with few steps (docs/method.md, Time shift)"]

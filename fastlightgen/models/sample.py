"""Sampling clips from a teacher or a student."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastlightgen.flow import ladder, rollout
from fastlightgen.guidance import guided
from fastlightgen.models.base import Cond, Stream
from fastlightgen.models.experts import Model, networks_of, predictor
from fastlightgen.rng import generator, normal_like


@dataclass
class Wish:
    """A request for clips: their conditions and the shape of their latents, batch first."""

    shape: tuple[int, ...]
    cond: Cond
    null: Cond
    hint: Tensor | None = None  # image latent that HunyuanVideo's image-to-video mixes into the first noise

    def start(self, seed: int, device: torch.device) -> Tensor:
        """Draw the noise at t = 1; a hint has the weight 0.001, as in diffusers' pipeline."""
        noise = torch.randn(self.shape, generator=generator(seed)).to(device)
        return noise if self.hint is None else 0.999 * noise + 0.001 * self.hint.to(device)

    def to(self, device: torch.device) -> "Wish":
        return replace(self, cond=self.cond.map(lambda x: x.to(device)), null=self.null.map(lambda x: x.to(device)))


@torch.no_grad()
def sample(
    model: Model,
    cond: Cond,
    null: Cond | None,
    noise: Tensor,
    times: list[float],
    guidance: float,
    kind: str,
    seed: int = 0,
    keep: Sequence[int] | None = None,
    tick: Callable[[], object] = bool,
    guidance_2: float | None = None,
) -> Tensor:
    """Sample x0 latents [B, C, F, H, W] from noise down the ladder `times`; `tick` is called after every step.

    Guidance 1 needs one prediction per step, other scales need two. A network that reads the scale always needs one.
    `guidance_2`: that of the low-noise expert of two; None: the same.
    """
    if model.embeds_guidance:
        cond = replace(cond, guidance=noise.new_full((len(noise),), guidance))

    def predict(x: Tensor, t: float) -> Tensor:
        scale = guidance if guidance_2 is None or predictor(model, t) is networks_of(model)[0] else guidance_2
        if scale == 1.0 or model.embeds_guidance:
            v = model(x, t, cond, keep)
        else:
            assert null is not None, "guidance needs the null prompt"
            v_c, v_n = model.walk(x, t, [Stream(cond, keep), Stream(null, keep)])
            v = guided(v_c, v_n, scale)
        tick()
        return v

    def renoise(i: int) -> Tensor:
        return normal_like(noise, generator(seed, i))

    return model.with_given(rollout(predict, noise, times, kind, renoise), cond)


PREVIEW_STEPS = 8


def preview_plan(card: dict, shift: float, released: dict) -> dict:
    """Arguments of `sample` for quick, rough previews of a many-step network during training."""
    return sampling_plan(card | {"shift": shift}, PREVIEW_STEPS, -1.0, "ode", released, force=True)


def sampling_plan(card: dict, steps: int, guidance: float, kind: str, released: dict, *, force: bool = False) -> dict:
    """Arguments of `sample`. The model folder's card fills in the values that the user left open (0, negative, "auto").

    `card`: contents of fastlightgen.json. `released`: settings of the family's released weights, used if the card lacks
    them. A student is refused with settings that it was not trained for, unless `force`.
    """
    card = released | {k: v for k, v in card.items() if v is not None}
    student = "ladder" in card
    if student and not force:
        refuse_changes(card, steps, guidance, kind)
    own_2 = {"guidance_2": card["guidance_2"]} if guidance < 0 and not student and "guidance_2" in card else {}
    return own_2 | {
        "times": card["ladder"] if student and not steps else ladder(steps or card["steps"], card["shift"]),
        "guidance": float(card["guidance"]) if guidance < 0 else guidance,
        "kind": card.get("sampler", "ode") if kind == "auto" else kind,
    }


def plan_record(plan: dict, embeds_guidance: bool) -> dict[str, Any]:
    """A plan as evaluations record it."""
    steps, evaluations = len(plan["times"]), num_evaluations(plan, embeds_guidance)
    return {"kind": plan["kind"], "steps": steps, "guidance": plan["guidance"], "evaluations": evaluations}


def num_evaluations(plan: dict, embeds_guidance: bool) -> int:
    """Network evaluations per clip."""
    return len(plan["times"]) * per_step(plan, embeds_guidance)


def per_step(plan: dict, embeds_guidance: bool) -> int:
    """Network evaluations per step: two with guidance, unless the network embeds the guidance."""
    return 1 if plan["guidance"] == 1.0 or embeds_guidance else 2


def refuse_changes(card: dict, steps: int, guidance: float, kind: str) -> None:
    """Raise ValueError if a student is asked for steps, a guidance or a sampler that it was not trained for."""
    own = {
        "steps": f"{len(card['ladder'])}",
        "guidance": f"{card['guidance']:g}",
        "sampler": card.get("sampler", "ode"),
    }
    asked = {"steps": f"{steps or own['steps']}", "guidance": own["guidance"] if guidance < 0 else f"{guidance:g}"}
    asked["sampler"] = own["sampler"] if kind == "auto" else kind
    if changed := " ".join(f"{key}={value}" for key, value in asked.items() if value != own[key]):
        trained = " ".join(f"{key}={value}" for key, value in own.items())
        raise ValueError(f"{changed}: this student was trained for {trained}; leave {changed} out, or give force=true")

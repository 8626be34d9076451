"""Sampling clips from a teacher or a student."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastlightgen import guidance as mix
from fastlightgen.flow import ladder, rollout
from fastlightgen.models.base import Cond, Stream, VideoDiT
from fastlightgen.rng import generator, normal_like


@dataclass
class Wish:
    """One clip to make: its conditions and the shape of its latents, batch first."""

    shape: tuple[int, ...]
    cond: Cond
    null: Cond
    hint: Tensor | None = None  # a thousandth of it stands in the first noise, as HunyuanVideo's image to video has it

    def start(self, seed: int, device: torch.device) -> Tensor:
        """What sampling starts from."""
        noise = torch.randn(self.shape, generator=generator(seed)).to(device)
        return noise if self.hint is None else 0.999 * noise + 0.001 * self.hint.to(device)

    def to(self, device: torch.device) -> "Wish":
        return replace(self, cond=self.cond.map(lambda x: x.to(device)), null=self.null.map(lambda x: x.to(device)))


@torch.no_grad()
def sample(
    model: VideoDiT,
    cond: Cond,
    null: Cond | None,
    noise: Tensor,
    times: list[float],
    guidance: float,
    kind: str,
    seed: int = 0,
    keep=None,
    tick: Callable[[], object] = bool,
) -> Tensor:
    """x0 latents [B, C, F, H, W] from noise down `times`; guidance 1 needs one prediction per step, others two.

    A network that was distilled from guidance reads its scale, and then one prediction is enough as well. `tick` is
    called before every step.
    """
    single = guidance == 1.0 or model.embeds_guidance
    if model.embeds_guidance:
        cond = replace(cond, guidance=noise.new_full((len(noise),), guidance))

    def predict(x: Tensor, t: float) -> Tensor:
        tick()
        if single:
            return model(x, t, cond, keep)
        v_c, v_n = model.walk(x, t, [Stream(cond, keep), Stream(null, keep)])
        return mix.cfg(v_c, v_n, guidance)

    def renoise(i: int) -> Tensor:
        return normal_like(noise, generator(seed, i))

    return rollout(predict, noise, times, kind, renoise)


PREVIEW_STEPS = 8


def preview_plan(card: dict, shift: float, released: dict) -> dict:
    """How a many-step network is shown while it trains: in few steps, rough but quick."""
    return sampling_plan(card | {"shift": shift}, PREVIEW_STEPS, -1.0, "ode", released)


def sampling_plan(card: dict, steps: int, guidance: float, kind: str, released: dict) -> dict:
    """Fill in what the user left open (0, negative, "auto") from the model folder's card: arguments of `sample`.

    `released`: the settings of the family's released weights, for folders without fastlightgen.json.
    """
    card = released | {k: v for k, v in card.items() if v is not None}
    student = "ladder" in card
    return {
        "times": card["ladder"] if student and not steps else ladder(steps or card["steps"], card["shift"]),
        "guidance": float(card["guidance"]) if guidance < 0 else guidance,
        "kind": card.get("sampler", "ode") if kind == "auto" else kind,
    }

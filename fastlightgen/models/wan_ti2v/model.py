"""Wan2.2 TI2V's transformer: text-to-video, and image-to-video with a given first frame, in one network.

A given first frame replaces latent frame 0, and its tokens have t = 0. `Cond.image` holds it as [B, 1 + C, F, H, W]:
a mask, 1 in the clips whose first frame is given, then its latent; only frame 0 is read. None: no clip has one.

With an image the hidden states are [B, F, N, D], N tokens per frame, and modulations [B, F, 1, D], one per frame.
Shapes: B batch, F H W latent, L = F N tokens, D hidden.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastlightgen.models.base import Cond, State, Tables
from fastlightgen.models.wan.model import WanBlock, WanModel, WanPrompt, WanTables
from fastlightgen.models.wan_ti2v.config import TI2VConfig
from fastlightgen.parallel.sequence import Cut


@dataclass(frozen=True, eq=False)
class TI2VTables(WanTables):
    """Wan's tables, the embeddings of t = 0, and the latent and time, which `unembed` needs."""

    clean_temb: Tensor  # [B, D]
    clean_mod: Tensor  # [B, 6, D]
    x_t: Tensor  # [B, C, F, H, W]
    t: Tensor  # [B]

    def part(self, cut: Cut) -> "TI2VTables":
        part = super().part(cut)
        return replace(part, x_t=cut.part(self.x_t))


@dataclass(frozen=True, eq=False)
class TI2VPrompt(WanPrompt):
    """A condition as the blocks read it."""

    given: Tensor | None  # is the first frame given? bool [B]; None: of no clip


def given_of(image: Tensor) -> Tensor:
    """The clips whose first frame is given: bool [B]."""
    return image[:, 0, 0, 0, 0] > 0.5


def at_start(given: Tensor, first: Tensor, x: Tensor) -> Tensor:
    """x [B, C, F, H, W] with the latent `first` [B, C, 1, H, W] as frame 0 of the clips in `given`."""
    return torch.cat([torch.where(given.view(-1, 1, 1, 1, 1), first.to(x.dtype), x[:, :, :1]), x[:, :, 1:]], 2)


def per_frame(value: Tensor, clean: Tensor, given: Tensor, frames: int) -> Tensor:
    """[B, F, ...] of an embedding of t [B, ...]: that of t = 0, `clean`, in the given frames."""
    first = torch.where(given.view(-1, *[1] * (value.dim() - 1)), clean, value)
    return torch.cat([first[:, None], value[:, None].expand(-1, frames - 1, *value.shape[1:])], 1)


class TI2VBlock(WanBlock):
    """Wan's block, with a modulation per frame if a first frame is given."""

    def modulation(self, tables: TI2VTables, prompt: TI2VPrompt) -> tuple[Tensor, ...]:
        if prompt.given is None:
            return super().modulation(tables, prompt)
        mod = per_frame(tables.mod, tables.clean_mod, prompt.given, tables.grid[0])
        return (self.scale_shift_table + mod)[:, :, None].unbind(3)


class TI2VModel(WanModel):
    """Wan2.2 TI2V; loads and saves diffusers' WanTransformer3DModel weights unchanged."""

    family = "wan-ti2v"
    block = TI2VBlock
    cfg: TI2VConfig

    def tables(self, x_t: Tensor, t: Tensor) -> TI2VTables:
        both = super().tables(x_t, torch.cat([t, 0 * t]))
        (temb, clean_temb), (mod, clean_mod) = both.temb.chunk(2), both.mod.chunk(2)
        return TI2VTables(both.rope, both.grid, temb, mod, clean_temb, clean_mod, x_t, t)

    def prompt(self, cond: Cond, tables: Tables) -> TI2VPrompt:
        text = self.condition_embedder.text(cond.text.to(self.dtype))
        return TI2VPrompt(cond, text, None, None if cond.image is None else given_of(cond.image))

    def embed(self, x_t: Tensor, prompt: Any) -> State:
        if prompt.given is not None:
            x_t = at_start(prompt.given, prompt.cond.image[:, 1:, :1], x_t)
        x = self.patch_embedding(x_t.to(self.dtype))
        tokens = x.flatten(2).transpose(1, 2)
        return State(tokens if prompt.given is None else tokens.unflatten(1, (x.shape[2], -1)))

    def image_tokens(self, state: State, tables: Tables) -> Tensor:
        return state.settled().x.flatten(1, -2)

    def last_modulation(self, prompt: TI2VPrompt, tables: TI2VTables) -> tuple[Tensor, ...]:
        if prompt.given is None:
            return super().last_modulation(prompt, tables)
        temb = per_frame(tables.temb, tables.clean_temb, prompt.given, tables.grid[0])
        return (self.scale_shift_table + temb[:, :, None])[:, :, None].unbind(3)

    def unembed(self, state: State, prompt: Any, tables: Any) -> Tensor:
        v, image = super().unembed(state, prompt, tables), prompt.cond.image
        if prompt.given is None:
            return v
        # The network's output for a given frame is unused. With v = (x_t - image) / t there, x0 is the image, the loss
        # against noise - x0 is zero without gradient, and every sampler ends in the image.
        first, t = tables.x_t[:, :, :1], tables.t.view(-1, 1, 1, 1, 1).to(tables.x_t.dtype)
        return at_start(prompt.given, (first - image[:, 1:, :1].to(first.dtype)) / t, v)

    def with_given(self, x: Tensor, cond: Cond) -> Tensor:
        return x if cond.image is None else at_start(given_of(cond.image), cond.image[:, 1:, :1], x)

    def _check(self, x_t: Tensor, cond: Cond) -> None:
        super()._check(x_t, replace(cond, image=None))
        if cond.image is not None:
            shape = tuple(cond.image.shape)
            batch, channels, _, *area = x_t.shape
            wanted = (batch, channels + 1, 1, *area)
            if (*shape[:2], *shape[3:]) != (*wanted[:2], *area) or not shape[2]:
                raise ValueError(f"Wan2.2 TI2V: image is {shape}, wanted {wanted}: a mask and the latent of frame 0")

    def example_inputs(self, batch: int = 1, seed: int = 0, size: tuple[int, int, int] | None = None):
        x_t, t, cond, null = super().example_inputs(batch, seed, size)
        first = torch.randn(x_t[:, :, :1].shape, generator=torch.Generator().manual_seed(seed + 1)).to(x_t)
        image = torch.cat([torch.ones_like(first[:, :1]), first], 1)  # every first frame is given
        return x_t, t, replace(cond, image=image), replace(null, image=image)

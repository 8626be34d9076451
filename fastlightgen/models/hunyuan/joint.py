"""What the networks of HunyuanVideo and HunyuanVideo-1.5 have in common: latent, text and output of joint attention.

Shapes: B batch, L = F H W / patch image tokens (frame slowest), T text tokens, D hidden.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastlightgen.models.base import Cond, State, Tables, VideoDiT
from fastlightgen.models.hunyuan.blocks import HunyuanPrompt, state_of
from fastlightgen.models.hunyuan.layers import EPS, JointConfig, Modulation, TextRefiner
from fastlightgen.ops import norm_modulate, rope_factors
from fastlightgen.parallel.sequence import Cut


@dataclass(frozen=True, eq=False)
class HunyuanTables(Tables):
    """Positions, and the latent and time: the prompt embeds t, and `unembed` of token_replace needs both."""

    x_t: Tensor  # [B, C, F, H, W]
    t: Tensor  # [B]

    def part(self, cut: Cut) -> "HunyuanTables":
        part = super().part(cut)
        assert isinstance(part, HunyuanTables)
        return replace(part, x_t=cut.part(self.x_t))


class JointModel(VideoDiT):
    """A network of double blocks, under the names of diffusers' keys."""

    cfg: JointConfig
    x_embedder: nn.ModuleDict
    context_embedder: TextRefiner
    transformer_blocks: nn.ModuleList
    norm_out: Modulation
    proj_out: nn.Linear

    @property
    def dtype(self) -> torch.dtype:
        return self.proj_out.weight.dtype

    def grid(self, x_t: Tensor) -> tuple[int, int, int]:
        """Number of patches along (F, H, W) of the latent."""
        frames, rows, columns = (n // p for n, p in zip(x_t.shape[2:], self.cfg.patch, strict=True))
        return frames, rows, columns

    def hidden_bytes(self, x_t: Tensor) -> int:
        """Bytes of the image tokens alone; the text tokens are few beside them."""
        return len(x_t) * math.prod(self.grid(x_t)) * self.cfg.dim * self.proj_out.weight.element_size()

    def shared_flops(self, x_t: Tensor, text: int) -> int:
        """Multiply-adds of a block's projections, feed-forward and attention, over image and `text` text tokens."""
        cfg, tokens, size = self.cfg, math.prod(self.grid(x_t)) + text, len(x_t)
        dim, inner, attended = cfg.dim, cfg.ffn_width, cfg.heads * cfg.attention_head_dim
        return size * tokens * (4 * dim * attended + 2 * dim * inner) + 2 * size * tokens * tokens * attended

    def tables(self, x_t: Tensor, t: Tensor) -> HunyuanTables:
        grid = self.grid(x_t)
        wide = torch.promote_types(self.dtype, torch.float32)
        rope = rope_factors(grid, self.cfg.rope_axes_dim, self.cfg.rope_theta, x_t.device, wide)
        return HunyuanTables(rope, grid, x_t, t)

    def trimmed(self, name: str, text: Tensor, lengths: Tensor | None, least: int) -> tuple[Tensor, Tensor | None]:
        """A text [B, T, C] without the padding that no text of the batch reaches, and which tokens [B, T] are valid.

        Texts of equal length (or a single text) need no mask (None), and attention without a mask has faster kernels.
        `least`: the smallest length that is allowed.
        """
        if lengths is None:
            return text, None
        lengths = lengths.expand(len(text))
        longest, shortest = text.shape[1], least - 1
        if not torch.compiler.is_exporting():  # lengths are inputs of a traced network: it keeps padding and mask
            longest, shortest = int(lengths.max()), int(lengths.min())
            if not least <= shortest <= longest <= text.shape[1]:
                raise ValueError(
                    f"{self.cfg.title}: {name} is {shortest} to {longest}, wanted {least} to {text.shape[1]} tokens"
                )
        text = text[:, :longest]
        valid = torch.arange(longest, device=text.device) < lengths[:, None] if shortest < longest else None
        return text, valid

    def embed(self, x_t: Tensor, prompt: HunyuanPrompt) -> State:
        image = prompt.cond.image
        return self.embedded(x_t if image is None else torch.cat([x_t, image.to(x_t.dtype)], 1), prompt.text)

    def embedded(self, x: Tensor, text: Tensor, given: int = 0) -> State:
        """Sequences of image and text; the first `given` frames have a modulation, so a sequence, of their own."""
        x = self.x_embedder["proj"](x.to(self.dtype))
        sizes = [given, x.shape[2] - given] if given else [x.shape[2]]
        parts = [State(frames.flatten(2).transpose(1, 2)) for frames in x.split(sizes, 2)]
        return state_of([*parts, State(text)])

    def unembed(self, state: State, prompt: HunyuanPrompt, tables: HunyuanTables) -> Tensor:
        (f, h, w), p, x = tables.grid, self.cfg.patch_size, self.image_tokens(state, tables)
        scale, shift = self.norm_out(prompt.temb)
        v = self.proj_out(norm_modulate(x, scale, shift, EPS)).view(-1, f, h, w, self.cfg.out_channels, p, p)
        return v.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)  # [B, F, h, w, C, p, p] -> [B, C, F, H, W]

    def check(self, x_t: Tensor, conds: list[Cond]) -> None:
        """Raise ValueError for inputs that the network would misread, or that would fail far from their cause."""
        for cond in {id(c): c for c in conds}.values():
            self._check(x_t, cond)

    def _check(self, x_t: Tensor, cond: Cond) -> None:
        raise NotImplementedError

    def check_channels(self, x_t: Tensor, extra: int) -> None:
        """Raise unless the latent and `extra` condition channels fit the network."""
        channels, cfg = x_t.shape[1] + extra, self.cfg
        if channels != cfg.in_channels:
            raise ValueError(
                f"{cfg.title}: {channels} channels (latent + condition), this network takes {cfg.in_channels}"
            )
        if any(n % p for n, p in zip(x_t.shape[2:], cfg.patch, strict=True)):
            raise ValueError(
                f"{cfg.title}: latent size {tuple(x_t.shape[2:])} is not a multiple of the patch {cfg.patch}"
            )

    def check_image(self, x_t: Tensor, image: Tensor | None) -> None:
        """Raise unless the condition channels have the latent's size."""
        if image is not None and image[:, 0].shape != x_t[:, 0].shape:
            shape, wanted = tuple(image.shape), tuple(x_t.shape)
            raise ValueError(
                f"{self.cfg.title}: image is {shape}, the latent {wanted}; only the channels (axis 1) may differ"
            )

    def check_width(self, name: str, got: Tensor | None, width: int) -> None:
        """Raise unless an embedding is there and has this width."""
        if got is None or got.shape[-1] != width:
            given = "missing" if got is None else f"{got.shape[-1]} wide"
            raise ValueError(f"{self.cfg.title}: {name} embedding is {given}, this network takes {width}")

    def check_batch(self, x_t: Tensor, cond: Cond, names: tuple[str, ...]) -> None:
        """Raise unless these conditions are one for each clip, or one for all."""
        for name in names:
            got = getattr(cond, name, None)
            if got is not None and len(got) not in (1, len(x_t)):
                raise ValueError(
                    f"{self.cfg.title}: {name} has batch {len(got)}, the latent {len(x_t)}; make them equal"
                )

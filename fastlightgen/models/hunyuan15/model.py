"""HunyuanVideo-1.5's transformer (text-to-video and image-to-video in one class), with diffusers' parameter names.

The blocks' text sequence holds the tokens of the picture, of the quoted words and of the prompt, in this order. They
have no positions, so padding may stay behind each part; diffusers moves it to the end.
Shapes: B batch, L = F H W image tokens (frame slowest), T text tokens, D hidden.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlightgen.blocks import check_keep
from fastlightgen.models.base import Cond, State
from fastlightgen.models.hunyuan.blocks import DoubleBlock, HunyuanPrompt
from fastlightgen.models.hunyuan.joint import HunyuanTables, JointModel
from fastlightgen.models.hunyuan.layers import Modulation, TextRefiner
from fastlightgen.models.hunyuan15.config import Hunyuan15Cond, Hunyuan15Config
from fastlightgen.models.hunyuan15.layers import GlyphEmbedder, PictureEmbedder, TimeEmbedder

PROMPT, GLYPHS, PICTURE = range(3)  # rows of the embedding of a token's kind


def full(cond: Cond) -> Hunyuan15Cond:
    """The condition as this family's class; that of the built-in world has no second text."""
    return cond if isinstance(cond, Hunyuan15Cond) else Hunyuan15Cond(**vars(cond))


class Hunyuan15Model(JointModel):
    """HunyuanVideo-1.5; loads and saves diffusers' HunyuanVideo15Transformer3DModel weights unchanged."""

    family = "hunyuan15"
    config_class = "HunyuanVideo15Transformer3DModel"
    cfg: Hunyuan15Config

    def __init__(self, cfg: Hunyuan15Config):
        super().__init__()
        self.cfg = cfg
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv3d(cfg.in_channels, cfg.dim, cfg.patch, cfg.patch)})
        self.image_embedder = PictureEmbedder(cfg.image_embed_dim, cfg.dim)
        self.context_embedder = TextRefiner(cfg)
        self.context_embedder_2 = GlyphEmbedder(cfg.text_embed_2_dim, cfg.dim)
        self.time_embed = TimeEmbedder(cfg.dim)
        self.cond_type_embed = nn.Embedding(3, cfg.dim)
        self.transformer_blocks = nn.ModuleList([DoubleBlock(cfg) for _ in range(cfg.num_layers)])
        self.norm_out = Modulation(cfg.dim, 2)
        self.proj_out = nn.Linear(cfg.dim, cfg.out_channels * math.prod(cfg.patch))

    # VideoDiT has an attribute here; the list itself has diffusers' name.
    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        return self.transformer_blocks

    def prune(self, keep: Sequence[int]) -> "Hunyuan15Model":
        keep = sorted(check_keep(keep, self.num_blocks))
        self.transformer_blocks = nn.ModuleList([self.transformer_blocks[i] for i in keep])
        return self

    @property
    def config(self) -> dict:
        return {"_class_name": self.config_class} | replace(self.cfg, num_layers=self.num_blocks).record()

    def block_flops(self, x_t: Tensor, cond: Cond) -> list[int]:
        cond = full(cond)
        lengths = ((cond.text, cond.text_len), (cond.text_2, cond.text_2_len), (cond.image_embeds, None))
        # A walk leaves out the padding behind the longest text.
        text = sum(x.shape[1] if n is None else int(n.max()) for x, n in lengths if x is not None)
        block = 2 * (self.shared_flops(x_t, text) + 2 * len(x_t) * 6 * self.cfg.dim**2)
        return [block] * self.num_blocks

    def prompt(self, cond: Cond, tables: HunyuanTables) -> HunyuanPrompt:
        cond, t, size, kinds = full(cond), tables.t, len(tables.t), self.kinds(tables.t.device)
        text, valid = self.trimmed("text_len", cond.text.to(self.dtype).expand(size, -1, -1), cond.text_len, 1)
        parts = [(self.context_embedder(text, t, valid) + kinds[PROMPT], valid)]
        if cond.text_2 is not None:
            # Without quoted words in the batch this embeds no tokens. It is called all the same: ranks must gather the
            # same weights.
            glyphs = cond.text_2.to(self.dtype).expand(size, -1, -1)
            glyphs, valid = self.trimmed("text_2_len", glyphs, cond.text_2_len, 0)
            parts.insert(0, (self.context_embedder_2(glyphs) + kinds[GLYPHS], valid))
        if cond.image_embeds is not None:
            picture = self.image_embedder(cond.image_embeds.to(self.dtype).expand(size, -1, -1))
            parts.insert(0, (picture + kinds[PICTURE], None))
        temb = F.silu(self.time_embed(t, self.dtype))
        mask = None
        if any(valid is not None for _, valid in parts):
            masks = [valid if valid is not None else x.new_ones(x.shape[:2], dtype=torch.bool) for x, valid in parts]
            mask = F.pad(torch.cat(masks, 1), (tables.tokens, 0), value=True)[:, None, None]
        return HunyuanPrompt(cond, torch.cat([x for x, _ in parts], 1), temb, None, mask)

    def kinds(self, device: torch.device) -> Tensor:
        """The embeddings [3, D] of the three kinds of text tokens."""
        return self.cond_type_embed(torch.arange(3, device=device))

    def embed(self, x_t: Tensor, prompt: HunyuanPrompt) -> State:
        if prompt.cond.image is not None:
            return super().embed(x_t, prompt)
        batch, _, *size = x_t.shape
        blank = x_t.new_zeros(batch, self.cfg.extra_channels, *size)
        return self.embedded(torch.cat([x_t, blank], 1), prompt.text)

    def _check(self, x_t: Tensor, cond: Cond) -> None:
        cond, cfg = full(cond), self.cfg
        self.check_channels(x_t, cfg.extra_channels if cond.image is None else cond.image.shape[1])
        self.check_image(x_t, cond.image)
        self.check_width("text", cond.text, cfg.text_embed_dim)
        if cond.text_2 is not None:
            self.check_width("text_2", cond.text_2, cfg.text_embed_2_dim)
        if cond.image_embeds is not None:
            self.check_width("image_embeds", cond.image_embeds, cfg.image_embed_dim)
        self.check_batch(x_t, cond, ("text", "text_len", "text_2", "text_2_len", "image_embeds"))
        if cond.guidance is not None:
            raise ValueError(f"{cfg.title}: guidance is given, but this network reads none; leave it out")

    def example_inputs(self, batch: int = 1, seed: int = 0, size: tuple[int, int, int] | None = None):
        cfg, g, (f, h, w) = self.cfg, torch.Generator().manual_seed(seed), size or (3, 8, 8)

        def draw(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, generator=g).to(self.device)

        def length(least: int, most: int) -> Tensor:
            return torch.randint(least, most + 1, (batch,), generator=g).to(self.device)

        def prompt() -> Hunyuan15Cond:
            text, glyphs = draw(16, cfg.text_embed_dim), draw(6, cfg.text_embed_2_dim)
            return Hunyuan15Cond(text, length(1, 16), image, embeds, text_2=glyphs, text_2_len=length(0, 6))

        image = draw(cfg.extra_channels, f, h, w) if cfg.pictured else None
        embeds = draw(9, cfg.image_embed_dim) if cfg.pictured else None
        x_t, t = draw(cfg.out_channels, f, h, w), torch.rand(batch, generator=g).clamp(0.02, 0.98).to(self.device)
        return x_t, t, prompt(), prompt()

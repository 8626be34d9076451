"""HunyuanVideo's transformer (text-to-video, two kinds of image-to-video), with diffusers' parameter names.

Shapes: B batch, L = F H W / 4 image tokens (frame slowest), T text tokens, D hidden.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlightgen.blocks import check_keep
from fastlightgen.models.base import Cond, State, Tables
from fastlightgen.models.hunyuan.blocks import DoubleBlock, HunyuanPrompt, SingleBlock
from fastlightgen.models.hunyuan.joint import HunyuanTables, JointModel
from fastlightgen.models.hunyuan.layers import HunyuanConfig, Modulation, TextRefiner, TimeTextEmbedder, joined


class HunyuanModel(JointModel):
    """HunyuanVideo; loads and saves diffusers' HunyuanVideoTransformer3DModel weights unchanged."""

    family = "hunyuan"
    config_class = "HunyuanVideoTransformer3DModel"
    cfg: HunyuanConfig

    def __init__(self, cfg: HunyuanConfig):
        super().__init__()
        self.cfg = cfg
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv3d(cfg.in_channels, cfg.dim, cfg.patch, cfg.patch)})
        self.context_embedder = TextRefiner(cfg)
        self.time_text_embed = TimeTextEmbedder(cfg.dim, cfg.pooled_projection_dim, cfg.guidance_embeds)
        self.transformer_blocks = nn.ModuleList([DoubleBlock(cfg) for _ in range(cfg.num_layers)])
        self.single_transformer_blocks = nn.ModuleList([SingleBlock(cfg) for _ in range(cfg.num_single_layers)])
        self.norm_out = Modulation(cfg.dim, 2)
        self.proj_out = nn.Linear(cfg.dim, cfg.out_channels * math.prod(cfg.patch))

    # VideoDiT has an attribute here. This is a read-only view of two lists; `prune` replaces the lists themselves.
    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        """All blocks in one list: the double blocks, then the single ones."""
        return nn.ModuleList([*self.transformer_blocks, *self.single_transformer_blocks])

    @property
    def num_blocks(self) -> int:
        return len(self.transformer_blocks) + len(self.single_transformer_blocks)

    def units(self) -> list[dict]:
        kinds = {"double": self.transformer_blocks, "single": self.single_transformer_blocks}
        names = [(kind, i) for kind, blocks in kinds.items() for i in range(len(blocks))]
        return [{"name": f"{kind}.{i}", "kind": kind, "index": index} for index, (kind, i) in enumerate(names)]

    def prune(self, keep: Sequence[int]) -> "HunyuanModel":
        keep, doubles = sorted(check_keep(keep, self.num_blocks)), len(self.transformer_blocks)
        both = self.transformer_blocks, self.single_transformer_blocks
        self.transformer_blocks, self.single_transformer_blocks = (
            nn.ModuleList([block for i, block in enumerate(blocks, start) if i in keep])
            for start, blocks in zip((0, doubles), both, strict=True)
        )
        return self

    @property
    def config(self) -> dict:
        doubles, singles = len(self.transformer_blocks), len(self.single_transformer_blocks)
        cfg = replace(self.cfg, num_layers=doubles, num_single_layers=singles)
        return {"_class_name": self.config_class} | cfg.record()

    @property
    def replaces_first(self) -> bool:
        """True if the picture replaces latent frame 0 (token_replace)."""
        return self.cfg.image_condition_type == "token_replace"

    def block_flops(self, x_t: Tensor, cond: Cond) -> list[int]:
        # A walk leaves out the padding behind the longest text.
        text = cond.text.shape[1] if cond.text_len is None else int(cond.text_len.max())
        size, dim, shared = len(x_t), self.cfg.dim, self.shared_flops(x_t, text)
        rows = size * (2 if self.replaces_first else 1)  # rows in the image's modulation layer: one more at t = 0
        double, single = 2 * (shared + (rows + size) * 6 * dim * dim), 2 * (shared + rows * 3 * dim * dim)
        return [double] * len(self.transformer_blocks) + [single] * len(self.single_transformer_blocks)

    def prompt(self, cond: Cond, tables: HunyuanTables) -> HunyuanPrompt:
        assert cond.pooled is not None
        t, size = tables.t, len(tables.t)
        text, valid = self.trimmed("text_len", cond.text.to(self.dtype).expand(size, -1, -1), cond.text_len, 1)
        mask = None if valid is None else F.pad(valid, (tables.tokens, 0), value=True)[:, None, None]
        pooled = cond.pooled.to(self.dtype).expand(size, -1)
        guidance = None
        if self.cfg.guidance_embeds:  # scale 1 gives the prediction for the prompt alone, which Eq. 9 mixes
            guidance = t.new_ones(size) if cond.guidance is None else cond.guidance.expand(size)
        temb = F.silu(self.time_text_embed(t, pooled, guidance))
        first = F.silu(self.time_text_embed(0 * t, pooled)) if self.replaces_first else None
        return HunyuanPrompt(cond, self.context_embedder(text, t, valid), temb, first, mask)

    def embed(self, x_t: Tensor, prompt: HunyuanPrompt) -> State:
        if not self.replaces_first:
            return super().embed(x_t, prompt)
        image = prompt.cond.image
        assert image is not None
        return self.embedded(torch.cat([image[:, :, :1].to(x_t.dtype), x_t[:, :, 1:]], 2), prompt.text, given=1)

    def image_tokens(self, state: State, tables: Tables) -> Tensor:
        state = state.settled()
        return joined([state.x, *(s.x for s in state.others)])[:, : math.prod(tables.grid)]

    def unembed(self, state: State, prompt: HunyuanPrompt, tables: HunyuanTables) -> Tensor:
        v = super().unembed(state, prompt, tables)
        if not self.replaces_first:
            return v
        # Frame 0 is the image, and the network's output for it is unused. With v = (x_t - image) / t there, x0 is the
        # image, the loss against noise - x0 is zero without gradient, and every sampler ends in the image.
        x_t, t, image = tables.x_t[:, :, :1], tables.t.view(-1, 1, 1, 1, 1), prompt.cond.image
        assert image is not None
        given = (x_t - image[:, :, :1].to(x_t.dtype)) / t.to(x_t.dtype)
        return torch.cat([given, v[:, :, 1:]], 2)

    def with_given(self, x: Tensor, cond: Cond) -> Tensor:
        if not self.replaces_first or cond.image is None:
            return x
        return torch.cat([cond.image[:, :, :1].to(x.dtype), x[:, :, 1:]], 2)

    def _check(self, x_t: Tensor, cond: Cond) -> None:
        cfg, image = self.cfg, cond.image
        self.check_channels(x_t, 0 if image is None or self.replaces_first else image.shape[1])
        if not self.replaces_first:
            self.check_image(x_t, image)
        elif image is None or image[:, :, :1].shape != x_t[:, :, :1].shape:
            shape = None if image is None else tuple(image.shape)
            raise ValueError(f"Hunyuan: image is {shape}; token_replace wants {tuple(x_t[:, :, :1].shape)}, frame 0")
        self.check_width("text", cond.text, cfg.text_embed_dim)
        self.check_width("pooled", cond.pooled, cfg.pooled_projection_dim)
        self.check_batch(x_t, cond, ("text", "text_len", "pooled", "guidance"))
        if cond.guidance is not None and not cfg.guidance_embeds:
            raise ValueError("Hunyuan: guidance is given, but this network has no guidance embedding; leave it out")

    def example_inputs(self, batch: int = 1, seed: int = 0, size: tuple[int, int, int] | None = None):
        cfg, g = self.cfg, torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, generator=g).to(self.device)

        def prompt() -> Cond:
            lengths = torch.randint(1, 17, (batch,), generator=g).to(self.device)
            text, pooled = draw(16, cfg.text_embed_dim), draw(cfg.pooled_projection_dim)
            return Cond(text, lengths, image, pooled=pooled, guidance=guidance)

        f, h, w = size or (3, 8, 8)
        extra = cfg.in_channels - cfg.out_channels
        image = draw(cfg.out_channels, 1, h, w) if self.replaces_first else draw(extra, f, h, w) if extra else None
        guidance = torch.full((batch,), 6.0, device=self.device) if cfg.guidance_embeds else None
        x_t, t = draw(cfg.out_channels, f, h, w), torch.rand(batch, generator=g).clamp(0.02, 0.98).to(self.device)
        return x_t, t, prompt(), prompt()

"""HunyuanVideo's transformer (text-to-video, two kinds of image-to-video), with diffusers' parameter names.

Shapes: B batch, L = F H W / 4 image tokens (frame slowest), T text tokens, D hidden.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlightgen.blocks import check_keep
from fastlightgen.models.base import Cond, State, Tables, VideoDiT
from fastlightgen.models.hunyuan.blocks import DoubleBlock, HunyuanPrompt, SingleBlock, state_of
from fastlightgen.models.hunyuan.layers import (
    EPS,
    HunyuanConfig,
    Modulation,
    TextRefiner,
    TimeTextEmbedder,
    joined,
)
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


class HunyuanModel(VideoDiT):
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
    def dtype(self) -> torch.dtype:
        return self.proj_out.weight.dtype

    @property
    def replaces_first(self) -> bool:
        """True if the picture replaces latent frame 0 (token_replace)."""
        return self.cfg.image_condition_type == "token_replace"

    def grid(self, x_t: Tensor) -> tuple[int, int, int]:
        """Number of patches along (F, H, W) of the latent."""
        frames, rows, columns = (n // p for n, p in zip(x_t.shape[2:], self.cfg.patch, strict=True))
        return frames, rows, columns

    def hidden_bytes(self, x_t: Tensor) -> int:
        """Bytes of the image tokens alone; the text tokens are few beside them."""
        return len(x_t) * math.prod(self.grid(x_t)) * self.cfg.dim * self.proj_out.weight.element_size()

    def block_flops(self, x_t: Tensor, cond: Cond) -> list[int]:
        # A walk leaves out the padding behind the longest text.
        text = cond.text.shape[1] if cond.text_len is None else int(cond.text_len.max())
        cfg, tokens, size = self.cfg, math.prod(self.grid(x_t)) + text, len(x_t)
        dim, inner, attended = cfg.dim, cfg.ffn_width, cfg.heads * cfg.attention_head_dim
        # Multiply-adds of the products that both kinds of blocks have: projections, feed-forward, attention.
        shared = size * tokens * (4 * dim * attended + 2 * dim * inner) + 2 * size * tokens * tokens * attended
        rows = size * (2 if self.replaces_first else 1)  # rows in the image's modulation layer: one more at t = 0
        double, single = 2 * (shared + (rows + size) * 6 * dim * dim), 2 * (shared + rows * 3 * dim * dim)
        return [double] * len(self.transformer_blocks) + [single] * len(self.single_transformer_blocks)

    def tables(self, x_t: Tensor, t: Tensor) -> HunyuanTables:
        grid = self.grid(x_t)
        wide = torch.promote_types(self.dtype, torch.float32)
        rope = rope_factors(grid, self.cfg.rope_axes_dim, self.cfg.rope_theta, x_t.device, wide)
        return HunyuanTables(rope, grid, x_t, t)

    def prompt(self, cond: Cond, tables: HunyuanTables) -> HunyuanPrompt:
        assert cond.pooled is not None
        t, size = tables.t, len(tables.t)
        text = cond.text.to(self.dtype).expand(size, -1, -1)
        valid = mask = None
        if cond.text_len is not None:
            lengths = cond.text_len.expand(size)
            longest, shortest = text.shape[1], 0
            if not torch.compiler.is_exporting():  # lengths are inputs of a traced network: it keeps padding and mask
                longest, shortest = int(lengths.max()), int(lengths.min())
                if not 1 <= shortest <= longest <= text.shape[1]:
                    raise ValueError(
                        f"Hunyuan: text_len is {shortest} to {longest}, wanted 1 to {text.shape[1]} tokens"
                    )
            # Cut off the padding that no text of the batch reaches. Texts of equal length (or a single text) then need
            # no mask, and attention without a mask has faster kernels.
            text = text[:, :longest]
            if shortest < longest:
                valid = torch.arange(longest, device=t.device) < lengths[:, None]
                mask = F.pad(valid, (tables.tokens, 0), value=True)[:, None, None]
        pooled = cond.pooled.to(self.dtype).expand(size, -1)
        guidance = None
        if self.cfg.guidance_embeds:  # scale 1 gives the prediction for the prompt alone, which Eq. 9 mixes
            guidance = t.new_ones(size) if cond.guidance is None else cond.guidance.expand(size)
        temb = F.silu(self.time_text_embed(t, pooled, guidance))
        first = F.silu(self.time_text_embed(0 * t, pooled)) if self.replaces_first else None
        return HunyuanPrompt(cond, self.context_embedder(text, t, valid), temb, first, mask)

    def embed(self, x_t: Tensor, prompt: HunyuanPrompt) -> State:
        image = prompt.cond.image
        if image is not None:
            image = image.to(x_t.dtype)
            replaced = self.replaces_first
            x_t = torch.cat([image[:, :, :1], x_t[:, :, 1:]], 2) if replaced else torch.cat([x_t, image], 1)
        x = self.x_embedder["proj"](x_t.to(self.dtype))
        # token_replace: the given frame has its own modulation, so its tokens are a separate sequence.
        sizes = [1, x.shape[2] - 1] if self.replaces_first else [x.shape[2]]
        parts = [State(frames.flatten(2).transpose(1, 2)) for frames in x.split(sizes, 2)]
        return state_of([*parts, State(prompt.text)])

    def image_tokens(self, state: State, tables: Tables) -> Tensor:
        state = state.settled()
        return joined([state.x, *(s.x for s in state.others)])[:, : math.prod(tables.grid)]

    def unembed(self, state: State, prompt: HunyuanPrompt, tables: HunyuanTables) -> Tensor:
        (f, h, w), p, x = tables.grid, self.cfg.patch_size, self.image_tokens(state, tables)
        scale, shift = self.norm_out(prompt.temb)
        v = self.proj_out(norm_modulate(x, scale, shift, EPS)).view(-1, f, h, w, self.cfg.out_channels, p, p)
        v = v.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)  # [B, F, h, w, C, p, p] -> [B, C, F, H, W]
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

    def check(self, x_t: Tensor, conds: list[Cond]) -> None:
        """Raise ValueError for inputs that the network would misread, or that would fail far from their cause."""
        for cond in {id(c): c for c in conds}.values():
            self._check(x_t, cond)

    def _check(self, x_t: Tensor, cond: Cond) -> None:
        cfg, image = self.cfg, cond.image
        channels = x_t.shape[1] + (0 if image is None or self.replaces_first else image.shape[1])
        if channels != cfg.in_channels:
            raise ValueError(f"Hunyuan: {channels} channels (latent + condition), this network takes {cfg.in_channels}")
        if any(n % p for n, p in zip(x_t.shape[2:], cfg.patch, strict=True)):
            raise ValueError(f"Hunyuan: latent size {tuple(x_t.shape[2:])} is not a multiple of the patch {cfg.patch}")
        if self.replaces_first:
            if image is None or image[:, :, :1].shape != x_t[:, :, :1].shape:
                shape = None if image is None else tuple(image.shape)
                raise ValueError(
                    f"Hunyuan: image is {shape}; token_replace wants {tuple(x_t[:, :, :1].shape)}, frame 0"
                )
        elif image is not None and image[:, 0].shape != x_t[:, 0].shape:
            shape, wanted = tuple(image.shape), tuple(x_t.shape)
            raise ValueError(f"Hunyuan: image is {shape}, the latent {wanted}; only the channels (axis 1) may differ")
        for name, got, width in (
            ("text", cond.text, cfg.text_embed_dim),
            ("pooled", cond.pooled, cfg.pooled_projection_dim),
        ):
            if got is None or got.shape[-1] != width:
                given = "missing" if got is None else f"{got.shape[-1]} wide"
                raise ValueError(f"Hunyuan: {name} embedding is {given}, this network takes {width}")
        for name in ("text", "text_len", "pooled", "guidance"):
            got = getattr(cond, name)
            if got is not None and len(got) not in (1, len(x_t)):
                raise ValueError(f"Hunyuan: {name} has batch {len(got)}, the latent {len(x_t)}; make them equal")
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

"""The parts of HunyuanVideo's transformer below its blocks: configuration, text refiner, embedders, attention.

Module names follow diffusers' keys. Shapes: B batch, L image tokens, T text tokens, D hidden, h heads, d channels each.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlightgen.models.config import NetworkConfig, check_heads
from fastlightgen.models.layers import Embedder, FeedForward, Gelu, sinusoids
from fastlightgen.models.streams import Tables
from fastlightgen.ops import Rope, add_residual, attend, qk_norm_rope

EPS = 1e-6  # epsilon of every norm
TIME_CHANNELS = 256  # width of the sinusoids of time and guidance
VARIANTS = (None, "latent_concat", "token_replace")  # how the first frame is given; None: text-to-video


@dataclass(frozen=True)
class JointConfig(NetworkConfig):
    """The fields of config.json that HunyuanVideo and HunyuanVideo-1.5 share, of double blocks and text refiner."""

    title: ClassVar[str]  # the family's name in messages

    in_channels: int = 16
    out_channels: int = 16
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    num_layers: int = 20
    num_refiner_layers: int = 2
    mlp_ratio: float = 4.0
    patch_size: int = 2
    patch_size_t: int = 1
    qk_norm: str = "rms_norm"
    text_embed_dim: int = 4096
    rope_theta: float = 256.0
    rope_axes_dim: tuple[int, int, int] = (16, 56, 56)
    kept_attention_heads: int | None = None  # heads that width pruning left in the blocks; None: all

    def __post_init__(self):
        object.__setattr__(self, "rope_axes_dim", tuple(self.rope_axes_dim))
        self.one_of("patch_size_t", 1)
        self.one_of("qk_norm", "rms_norm")
        check_heads(self.title, self.kept_attention_heads, self.num_attention_heads)
        axes = self.rope_axes_dim
        if len(axes) != 3 or sum(axes) != self.attention_head_dim or any(n % 2 for n in axes):
            raise ValueError(
                f"{self.title} config: rope_axes_dim is {list(axes)}; "
                f"wanted three even numbers that sum to attention_head_dim, {self.attention_head_dim}"
            )

    def one_of(self, name: str, *wanted: object) -> None:
        """Raise unless a field has one of these values."""
        if (got := getattr(self, name)) not in wanted:
            options = ", ".join(map(repr, wanted))
            raise ValueError(f"{self.title} config: {name} is {got!r}; supported: {options}")

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def heads(self) -> int:
        return self.kept_attention_heads or self.num_attention_heads

    @property
    def ffn_width(self) -> int:
        return int(self.dim * self.mlp_ratio)

    def narrowed(self, heads: int, ffn_width: int) -> "JointConfig":
        ratio = ffn_width / self.dim
        if int(self.dim * ratio) < ffn_width:  # the quotient was rounded down
            ratio = math.nextafter(ratio, math.inf)
        left = heads if heads < self.num_attention_heads else None
        return replace(self, kept_attention_heads=left, mlp_ratio=ratio)

    @property
    def text_width(self) -> int:
        return self.text_embed_dim

    @property
    def patch(self) -> tuple[int, int, int]:
        return self.patch_size_t, self.patch_size, self.patch_size


@dataclass(frozen=True)
class HunyuanConfig(JointConfig):
    """The fields of diffusers' HunyuanVideoTransformer3DModel config.json."""

    title = "Hunyuan"

    num_single_layers: int = 40
    guidance_embeds: bool = True
    pooled_projection_dim: int = 768
    image_condition_type: str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.one_of("image_condition_type", *VARIANTS)

    @property
    def released(self) -> dict[str, float]:
        return {"steps": 50, "guidance": 6.0 if self.guidance_embeds else 1.0, "shift": 7.0}

    @property
    def embeds_guidance(self) -> bool:
        return self.guidance_embeds

    @property
    def given_frames(self) -> int:
        return int(self.image_condition_type == "token_replace")


def joined(parts: list[Tensor]) -> Tensor:
    """Concatenate sequences [B, L, D] along the tokens."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class Modulation(nn.Module):
    """A linear layer from SiLU(time embedding) to n vectors [B, D]: shifts, scales and gates."""

    takes_float8 = False  # see models/float8.py

    def __init__(self, dim: int, n: int):
        super().__init__()
        self.n, self.linear = n, nn.Linear(dim, n * dim)

    def forward(self, temb: Tensor) -> tuple[Tensor, ...]:
        return self.linear(temb).chunk(self.n, 1)


class Attention(nn.Module):
    """Queries, keys and values, with an RMS norm per head; a single block has its own output layer (`out` False)."""

    def __init__(self, cfg: JointConfig, heads: int, qk_norm: bool = True, out: bool = False):
        super().__init__()
        dim, inner, self.heads = cfg.dim, heads * cfg.attention_head_dim, heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner) for _ in range(3))
        if qk_norm:
            self.norm_q, self.norm_k = (nn.RMSNorm(cfg.attention_head_dim, eps=EPS) for _ in range(2))
        if out:
            self.to_out = nn.ModuleList([nn.Linear(inner, dim)])

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, L, h, d], without norm or rotation."""
        return self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1))

    def turned(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values with q and k normed; the first tokens, as many as `rope` has, are also rotated."""
        q, k = qk_norm_rope(self.to_q(x), self.to_k(x), self.norm_q.weight, self.norm_k.weight, rope, EPS)
        return self.split(q), self.split(k), self.split(self.to_v(x))


class SingleAttention(Attention):
    """Attention of a single block: image and text tokens in one sequence."""

    def forward(self, h: Tensor, tables: Tables, mask: Tensor | None) -> Tensor:
        return tables.attend(*self.turned(h, tables.rope), mask)


class JointAttention(Attention):
    """Attention of a double block: image and text tokens attend to each other, with separate projections."""

    def __init__(self, cfg: JointConfig):
        super().__init__(cfg, cfg.heads, out=True)
        dim, inner = cfg.dim, cfg.heads * cfg.attention_head_dim
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, inner) for _ in range(3))
        self.to_add_out = nn.Linear(inner, dim)
        self.norm_added_q, self.norm_added_k = (nn.RMSNorm(cfg.attention_head_dim, eps=EPS) for _ in range(2))

    def forward(self, image: Tensor, text: Tensor, tables: Tables, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = self.turned(image, tables.rope)
        # Text tokens have no position: their q and k are normed, not rotated.
        tq, tk, tv = (self.split(layer(text)) for layer in (self.add_q_proj, self.add_k_proj, self.add_v_proj))
        q, k = torch.cat([q, self.norm_added_q(tq)], 1), torch.cat([k, self.norm_added_k(tk)], 1)
        y, n = tables.attend(q, k, torch.cat([v, tv], 1), mask), image.shape[1]
        return self.to_out[0](y[:, :n]), self.to_add_out(y[:, n:])


class TimeTextEmbedder(nn.Module):
    """Embeds time, a pooled text and, in guidance-distilled networks, the guidance scale into one vector [B, D]."""

    def __init__(self, dim: int, pooled: int, guidance: bool = False):
        super().__init__()
        self.timestep_embedder, self.text_embedder = Embedder(TIME_CHANNELS, dim), Embedder(pooled, dim)
        if guidance:
            self.guidance_embedder = Embedder(TIME_CHANNELS, dim)

    def forward(self, t: Tensor, pooled: Tensor, guidance: Tensor | None = None) -> Tensor:
        time = embed(self.timestep_embedder, sinusoids(t, TIME_CHANNELS).to(pooled.dtype))
        if guidance is not None:
            time = time + embed(self.guidance_embedder, sinusoids(guidance, TIME_CHANNELS).to(pooled.dtype))
        return time + embed(self.text_embedder, pooled)


def embed(layers: Embedder, x: Tensor) -> Tensor:
    return layers.linear_2(F.silu(layers.linear_1(x)))


class SiluFeedForward(FeedForward):
    """The refiner's feed-forward: SiLU instead of GELU, under the same keys."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.net[0]
        assert isinstance(first, Gelu)
        return self.net[2](F.silu(first.proj(x)))


class RefinerBlock(nn.Module):
    """Self-attention and feed-forward over the text tokens, each added with a gate from the time embedding."""

    def __init__(self, cfg: JointConfig):
        super().__init__()
        dim = cfg.dim
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(cfg, cfg.num_attention_heads, qk_norm=False, out=True)
        self.ff = SiluFeedForward(dim, 4 * dim, dim)  # the factor is 4 for every mlp_ratio, as in diffusers
        self.norm_out = Modulation(dim, 2)

    def forward(self, x: Tensor, temb: Tensor, mask: Tensor | None) -> Tensor:
        gate1, gate2 = self.norm_out(temb)
        x = add_residual(x, self.attn.to_out[0](attend(*self.attn.qkv(self.norm1(x)), mask)), gate1)
        return add_residual(x, self.ff(self.norm2(x)), gate2)


class Refiner(nn.Module):
    """The list of refiner blocks; a separate module so that the keys read `token_refiner.refiner_blocks`."""

    def __init__(self, cfg: JointConfig):
        super().__init__()
        self.refiner_blocks = nn.ModuleList([RefinerBlock(cfg) for _ in range(cfg.num_refiner_layers)])


class TextRefiner(nn.Module):
    """Turns the language model's tokens into text tokens [B, T, D], with gates from time and the mean token."""

    def __init__(self, cfg: JointConfig):
        super().__init__()
        self.time_text_embed = TimeTextEmbedder(cfg.dim, cfg.text_embed_dim)
        self.proj_in = nn.Linear(cfg.text_embed_dim, cfg.dim)
        self.token_refiner = Refiner(cfg)

    def forward(self, text: Tensor, t: Tensor, valid: Tensor | None) -> Tensor:
        """`valid` [B, T]: True for text, False for padding, whose outputs are never read; None: no padding."""
        if valid is None:
            mean, mask = text.mean(1), None
        else:
            weight = valid.to(torch.promote_types(text.dtype, torch.float32))[..., None]
            mean, mask = ((text * weight).sum(1) / weight.sum(1)).to(text.dtype), valid[:, None, None]
        temb = F.silu(self.time_text_embed(t, mean))
        x = self.proj_in(text)
        for block in self.token_refiner.refiner_blocks:
            x = block(x, temb, mask)
        return x

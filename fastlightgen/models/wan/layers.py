"""The parts of Wan2.1's transformer outside its blocks: configuration, embedders, positions.

Module names follow diffusers' keys. Shapes: B batch, L tokens, D hidden.
"""

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from fastlightgen.models.config import NetworkConfig, check_heads
from fastlightgen.models.layers import Embedder, FeedForward, sinusoids

TEXT_TOKENS = 512  # the released networks read texts padded to this number of tokens


@dataclass(frozen=True)
class WanConfig(NetworkConfig):
    """The fields of diffusers' WanTransformer3DModel config.json."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: float = 1e-6
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None
    kept_attention_heads: int | None = None  # heads that width pruning left in the blocks; None: all

    def __post_init__(self):
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        for name, got, wanted in (
            ("patch_size", self.patch_size[0], 1),
            ("qk_norm", self.qk_norm, "rms_norm_across_heads"),
            ("pos_embed_seq_len", self.pos_embed_seq_len, None),
        ):
            if got != wanted:
                raise ValueError(f"Wan config: {name} is {got!r}; only {wanted!r} is supported")
        check_heads("Wan", self.kept_attention_heads, self.num_attention_heads)
        if self.added_kv_proj_dim != (None if self.image_dim is None else self.dim):
            # add_k_proj and add_v_proj read the image embedder's output, which is `dim` wide.
            raise ValueError(
                f"Wan config: added_kv_proj_dim is {self.added_kv_proj_dim}; it must be {self.dim} (heads x head_dim) "
                f"with an image_dim and null without one (it is {self.image_dim})"
            )

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def heads(self) -> int:
        return self.kept_attention_heads or self.num_attention_heads

    @property
    def ffn_width(self) -> int:
        return self.ffn_dim

    def narrowed(self, heads: int, ffn_width: int) -> "WanConfig":
        left = heads if heads < self.num_attention_heads else None
        return replace(self, kept_attention_heads=left, ffn_dim=ffn_width)

    @property
    def text_width(self) -> int:
        return self.text_dim

    @property
    def released(self) -> dict[str, float]:
        return {"steps": 50, "guidance": 5.0, "shift": 5.0}


class ImageEmbedder(nn.Module):
    """Turns CLIP's image tokens [B, I, image_dim] into [B, I, D]."""

    def __init__(self, cfg: WanConfig):
        super().__init__()
        assert cfg.image_dim is not None
        self.norm1, self.norm2 = nn.LayerNorm(cfg.image_dim), nn.LayerNorm(cfg.dim)
        self.ff = FeedForward(cfg.image_dim, cfg.image_dim, cfg.dim, approximate="none")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.ff(self.norm1(x)))


class ConditionEmbedder(nn.Module):
    """Embeds time, text and image tokens."""

    def __init__(self, cfg: WanConfig):
        super().__init__()
        self.freq_dim = cfg.freq_dim
        self.time_embedder = Embedder(cfg.freq_dim, cfg.dim)
        self.time_proj = nn.Linear(cfg.dim, 6 * cfg.dim)
        self.text_embedder = Embedder(cfg.text_dim, cfg.dim)
        if cfg.image_dim is not None:
            self.image_embedder = ImageEmbedder(cfg)

    def time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Embed t [B] as (temb [B, D], modulation [B, 6, D])."""
        wave = sinusoids(t, self.freq_dim).to(self.time_proj.weight.dtype)
        temb = self.time_embedder.linear_2(F.silu(self.time_embedder.linear_1(wave)))
        return temb, self.time_proj(F.silu(temb)).unflatten(1, (6, -1))

    def text(self, text: Tensor) -> Tensor:
        return self.text_embedder.linear_2(F.gelu(self.text_embedder.linear_1(text), approximate="tanh"))


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """Number of a head's channels that encode the frame, the row and the column."""
    space = 2 * (head_dim // 6)
    return head_dim - 2 * space, space, space

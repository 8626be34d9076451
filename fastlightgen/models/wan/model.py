"""Wan2.1's video transformer (text-to-video and image-to-video), with the parameter names of diffusers' class.

Shapes: B batch, L = F H W / 4 tokens (frame slowest), D hidden, T text tokens, I image tokens.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastlightgen.models.base import Block, Cond, Job, Prompt, State, Tables, VideoDiT, gradient
from fastlightgen.models.layers import FeedForward
from fastlightgen.models.streams import Prunable
from fastlightgen.models.wan.layers import TEXT_TOKENS, ConditionEmbedder, WanConfig, rope_axes
from fastlightgen.ops import add_residual, attend, gate_residual_norm_modulate, qk_norm_rope, rope_factors


@dataclass(frozen=True, eq=False)
class WanTables(Tables):
    """Positions and the embeddings of time, in float32 also for a 16-bit network."""

    temb: Tensor  # time embedding [B, D]
    mod: Tensor  # time projection [B, 6, D]


@dataclass(frozen=True, eq=False)
class WanPrompt(Prompt):
    """A condition as Wan's blocks read it."""

    image: Tensor | None  # embedded CLIP tokens [B, I, D]


class Attention(nn.Module):
    """Attention with an RMS norm of q and k over all heads together; cross-attention may have image keys as well."""

    def __init__(self, cfg: WanConfig, added_kv: int | None = None):
        super().__init__()
        dim, inner, self.heads, self.eps = cfg.dim, cfg.heads * cfg.attention_head_dim, cfg.heads, cfg.eps
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(inner, dim)])
        self.norm_q, self.norm_k = nn.RMSNorm(inner, eps=cfg.eps), nn.RMSNorm(inner, eps=cfg.eps)
        if added_kv is not None:
            self.add_k_proj, self.add_v_proj = nn.Linear(added_kv, inner), nn.Linear(added_kv, inner)
            self.norm_added_k = nn.RMSNorm(inner, eps=cfg.eps)

    def to_itself(self, x: Tensor, tables: Tables) -> Tensor:
        """Self-attention, with q and k rotated by their positions."""
        q, k = self.to_q(x), self.to_k(x)
        q, k = qk_norm_rope(q, k, self.norm_q.weight, self.norm_k.weight, tables.rope, self.eps)
        return self.to_out[0](tables.attend(*map(self._split, (q, k, self.to_v(x)))))

    def query(self, x: Tensor) -> Tensor:
        """The cross-attention's queries [B, L, heads, head_dim]."""
        return self._split(self.norm_q(self.to_q(x)))

    def keys(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, T, heads, head_dim] of the text."""
        return self._split(self.norm_k(self.to_k(context))), self._split(self.to_v(context))

    def image_keys(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, I, heads, head_dim] of the image tokens."""
        return self._split(self.norm_added_k(self.add_k_proj(image))), self._split(self.add_v_proj(image))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1))


class WanBlock(Block):
    """Self-attention, cross-attention and feed-forward, with adaLN-single modulation."""

    def __init__(self, cfg: WanConfig):
        super().__init__()
        dim = cfg.dim
        self.eps = cfg.eps
        self.attn1 = Attention(cfg)
        self.attn2 = Attention(cfg, cfg.added_kv_proj_dim)
        self.norm2 = nn.LayerNorm(dim, eps=cfg.eps) if cfg.cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(dim, cfg.ffn_dim, dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def attention_outputs(self) -> list[tuple[nn.Module, bool]]:
        return [(self.attn1.to_out[0], True)]

    def prunable(self) -> list[Prunable]:
        found = [Prunable("ffn", {"ffn.net.0.proj": "ffn.net.0"}, {"ffn.net.2": 0})]
        for name, attention in (("attn1", self.attn1), ("attn2", self.attn2)):
            norms = {"norm_q": "to_q", "norm_k": "to_k"}
            layers = ["to_q", "to_k", "to_v"]
            if hasattr(attention, "add_k_proj"):
                layers += ["add_k_proj", "add_v_proj"]
                norms |= {"norm_added_k": "add_k_proj"}
            own = [f"{name}.{layer}" for layer in layers]
            norms = {f"{name}.{norm}": f"{name}.{layer}" for norm, layer in norms.items()}
            rows = attention.to_q.out_features // attention.heads
            found.append(Prunable("heads", dict(zip(own, own, strict=True)), {f"{name}.to_out.0": 0}, rows, norms))
        return found

    def read(self, prompt: WanPrompt) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the text and of the image tokens."""
        keys = self.attn2.keys(prompt.text) if prompt.text_keys is None else self.constant_keys(prompt)
        return [keys] if prompt.image is None else [keys, self.attn2.image_keys(prompt.image)]

    def constant_keys(self, prompt: WanPrompt) -> tuple[Tensor, Tensor]:
        """Keys and values of a text that is the same in every row and every walk: computed once, from one row."""
        text, text_keys = prompt.text, prompt.text_keys
        assert text_keys is not None
        if self not in text_keys:
            with torch.no_grad():
                text_keys[self] = self.attn2.keys(text[:1])
        k, v = text_keys[self]
        return k.expand(len(text), -1, -1, -1), v.expand(len(text), -1, -1, -1)

    def modulation(self, tables: Any, prompt: Any) -> tuple[Tensor, ...]:
        """Shift, scale and gate of the self-attention, then those of the feed-forward: [B, D] each."""
        return (self.scale_shift_table + tables.mod).unbind(1)

    def run(self, job: Job, tables: WanTables, keys: dict[WanPrompt, Any], settle: bool = False) -> list[State]:
        # Prompts of one job started from the same image, so they have the same modulation.
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(tables, job.prompts[0])
        # A family with a time per frame has hidden states [B, F, L / F, D]; attention reads them as [B, L, D].
        x, h = gate_residual_norm_modulate(*job.state.parts(), scale1, shift1, self.eps)
        y = self.attn1.to_itself(h.flatten(1, -2), tables).view_as(x)
        # The text enters in the loop below. Until there, the cross-attention's query included, all prompts share.
        if isinstance(self.norm2, nn.LayerNorm):
            x, h = gate_residual_norm_modulate(x, y, gate1, None, None, self.eps, self.norm2.weight, self.norm2.bias)
        else:
            x = h = add_residual(x, y, gate1)
        q = self.attn2.query(h.flatten(1, -2))
        out = []
        for prompt, grad in zip(job.prompts, job.grads, strict=True):
            with gradient(grad):
                y = attend(q, *keys[prompt][0])
                for image in keys[prompt][1:]:
                    y = y + attend(q, *image)
                y = self.attn2.to_out[0](y).view_as(x)
                x_2, h = gate_residual_norm_modulate(x, y, None, scale2, shift2, self.eps)
                out.append(State(self.ffn.onto(x_2, gate2, h)) if settle else State(x_2, self.ffn(h), gate2))
        return out


class WanModel(VideoDiT):
    """Wan2.1; loads and saves diffusers' WanTransformer3DModel weights unchanged."""

    family = "wan"
    config_class = "WanTransformer3DModel"
    block = WanBlock
    cfg: WanConfig

    def __init__(self, cfg: WanConfig):
        super().__init__()
        self.cfg = cfg
        self.patch_embedding = nn.Conv3d(cfg.in_channels, cfg.dim, cfg.patch_size, cfg.patch_size)
        self.condition_embedder = ConditionEmbedder(cfg)
        self.blocks = nn.ModuleList([self.block(cfg) for _ in range(cfg.num_layers)])
        self.proj_out = nn.Linear(cfg.dim, cfg.out_channels * math.prod(cfg.patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, cfg.dim) / cfg.dim**0.5)

    @property
    def config(self) -> dict:
        return {"_class_name": self.config_class} | replace(self.cfg, num_layers=self.num_blocks).record()

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def hidden_bytes(self, x_t: Tensor) -> int:
        tokens = math.prod(n // p for n, p in zip(x_t.shape[2:], self.cfg.patch_size, strict=True))
        return len(x_t) * tokens * self.cfg.dim * self.patch_embedding.weight.element_size()

    def block_flops(self, x_t: Tensor, cond: Cond) -> list[int]:
        dim, ffn, text = self.cfg.dim, self.cfg.ffn_dim, cond.text.shape[1]
        inner = self.cfg.heads * self.cfg.attention_head_dim
        tokens = math.prod(n // p for n, p in zip(x_t.shape[2:], self.cfg.patch_size, strict=True))
        image = 0 if cond.image_embeds is None else cond.image_embeds.shape[1]
        context = text + image
        # In multiply-adds; the final factor 2 counts both operations.
        linear = tokens * (6 * dim * inner + 2 * dim * ffn) + context * 2 * dim * inner
        attention = 2 * tokens * (tokens + context) * inner
        return [2 * len(x_t) * (linear + attention)] * self.num_blocks

    def tables(self, x_t: Tensor, t: Tensor) -> WanTables:
        temb, mod = self.condition_embedder.time(t)
        frames, rows, columns = (n // p for n, p in zip(x_t.shape[2:], self.cfg.patch_size, strict=True))
        grid = frames, rows, columns
        wide = torch.promote_types(self.dtype, torch.float32)
        rope = rope_factors(grid, rope_axes(self.cfg.attention_head_dim), device=x_t.device, dtype=wide)
        # Modulations are sums of these and a table, in float32 as in diffusers: 8 bits are too few for scale and gate.
        return WanTables(rope, grid, temb.to(wide), mod.to(wide))

    def merge_key(self, cond: Cond) -> int:
        """Streams with the same image start from the same hidden states: the text first enters in a cross-attention."""
        return id(cond.image)

    def prompt(self, cond: Cond, tables: Tables) -> WanPrompt:
        image = cond.image_embeds
        if image is not None:
            image = self.condition_embedder.image_embedder(image.to(self.dtype))
        return WanPrompt(cond, self.condition_embedder.text(cond.text.to(self.dtype)), image)

    def embed(self, x_t: Tensor, prompt: Prompt) -> State:
        image = prompt.cond.image
        x = x_t if image is None else torch.cat([x_t, image.to(x_t.dtype)], 1)
        return State(self.patch_embedding(x.to(self.dtype)).flatten(2).transpose(1, 2))

    def last_modulation(self, prompt: Any, tables: Any) -> tuple[Tensor, ...]:
        """Shift and scale [B, D] of the last norm."""
        return (self.scale_shift_table + tables.temb[:, None]).unbind(1)

    def unembed(self, state: State, prompt: Prompt, tables: WanTables) -> Tensor:
        shift, scale = self.last_modulation(prompt, tables)
        _, h = gate_residual_norm_modulate(*state.parts(), scale, shift, self.cfg.eps)
        (f, h_p, w_p), (_, ph, pw) = tables.grid, self.cfg.patch_size
        # [B, F, h, w, ph, pw, C] -> [B, C, F, h ph, w pw]
        x = self.proj_out(h).view(-1, f, h_p, w_p, ph, pw, self.cfg.out_channels)
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def check(self, x_t: Tensor, conds: list[Cond]) -> None:
        """Raise ValueError for inputs that the network would misread, or that would fail far from their cause."""
        for cond in {id(c): c for c in conds}.values():
            self._check(x_t, cond)

    def _check(self, x_t: Tensor, cond: Cond) -> None:
        cfg = self.cfg
        channels = x_t.shape[1] + (0 if cond.image is None else cond.image.shape[1])
        if channels != cfg.in_channels:
            raise ValueError(f"Wan: {channels} channels (latent + condition), this network takes {cfg.in_channels}")
        if any(n % p for n, p in zip(x_t.shape[2:], cfg.patch_size, strict=True)):
            raise ValueError(f"Wan: latent size {tuple(x_t.shape[2:])} is not a multiple of the patch {cfg.patch_size}")
        if cond.text.shape[-1] != cfg.text_dim:
            raise ValueError(f"Wan: text embedding is {cond.text.shape[-1]} wide, this network takes {cfg.text_dim}")
        for name, got in (("text", cond.text), ("image_embeds", cond.image_embeds)):
            if got is not None and got.shape[0] not in (1, x_t.shape[0]):
                raise ValueError(f"Wan: {name} has batch {got.shape[0]}, the latent {x_t.shape[0]}; make them equal")
        if cond.image is not None and cond.image[:, 0].shape != x_t[:, 0].shape:
            shape, wanted = tuple(cond.image.shape), tuple(x_t.shape)
            raise ValueError(f"Wan: image is {shape}, the latent {wanted}; only the channels (axis 1) may differ")
        if (cond.image_embeds is None) != (cfg.image_dim is None):
            raise ValueError(f"Wan: image_embeds must be given exactly when image_dim is set (it is {cfg.image_dim})")
        if cfg.added_kv_proj_dim is not None and cond.text.shape[1] != TEXT_TOKENS:
            # diffusers assumes that the last 512 tokens are the text, and silently misreads any other length.
            raise ValueError(f"Wan I2V: {cond.text.shape[1]} text tokens; pad the text embedding to {TEXT_TOKENS}")

    def example_inputs(self, batch: int = 1, seed: int = 0, size: tuple[int, int, int] | None = None):
        cfg, g = self.cfg, torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, generator=g).to(self.device)

        f, h, w = size or (3, 8, 8)
        tokens = TEXT_TOKENS if cfg.added_kv_proj_dim is not None else 16
        extra = cfg.in_channels - cfg.out_channels
        shared = {
            "image": draw(extra, f, h, w) if extra else None,
            "image_embeds": draw(257, cfg.image_dim) if cfg.image_dim is not None else None,
        }
        x_t, t = draw(cfg.out_channels, f, h, w), torch.rand(batch, generator=g).clamp(0.02, 0.98).to(self.device)
        return x_t, t, Cond(draw(tokens, cfg.text_dim), **shared), Cond(draw(tokens, cfg.text_dim), **shared)

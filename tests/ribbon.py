"""A third, invented family, Ribbon, which tests/test_family.py takes through every command.

Ribbon differs from Wan and HunyuanVideo where families can differ: a VAE with 8 channels and strides 4 x 16 x 16, a
condition with a field `mood`, a time t per token (the tokens of a given first frame are clean, t = 0), a checkpoint
format of its own.
Shapes: B batch, F H W latent, L tokens, T text tokens, D hidden, S mood.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlightgen.models.base import Block, Cond, Job, Prompt, State, Tables, VideoDiT
from fastlightgen.models.config import NetworkConfig
from fastlightgen.models.cost import Block as BlockCost
from fastlightgen.models.cost import Network, Saved, Work, attention, biased, last_norm, linear
from fastlightgen.models.encoding import Encoding, pixels, wide
from fastlightgen.models.family import Clips, Family
from fastlightgen.models.geometry import Geometry
from fastlightgen.models.keys import Format, Source, Table, fused, named
from fastlightgen.models.layers import sinusoids
from fastlightgen.ops import attend, rope_factors

GEOMETRY = Geometry(channels=8, frame_stride=4, pixel_stride=16, patch=2)
HEIGHT, WIDTH, FRAMES, TEXT_TOKENS, MOOD = 32, 64, 5, 12, 3
LATENT = (2, 2, 4)  # of 5 frames of 32 x 64 pixels


@dataclass(frozen=True)
class RibbonConfig(NetworkConfig):
    in_channels: int = 8
    num_attention_heads: int = 2
    attention_head_dim: int = 8
    num_layers: int = 4
    text_dim: int = 6
    mood_dim: int = MOOD

    text_width = property(lambda self: self.text_dim)
    given_frames = property(lambda self: 1)
    released = property(lambda self: {"steps": 6, "guidance": 2.0, "shift": 3.0})
    dim = property(lambda self: self.num_attention_heads * self.attention_head_dim)


@dataclass(frozen=True, eq=False)
class RibbonCond(Cond):
    text_fields = (*Cond.text_fields, "mood")
    mood: Tensor | None = None  # [B, S]


@dataclass(frozen=True, eq=False)
class RibbonTables(Tables):
    x_t: Tensor
    t: Tensor  # [B]


@dataclass(frozen=True, eq=False)
class RibbonPrompt(Prompt):
    temb: Tensor  # one embedding of time and mood per token [B, L, D]
    mask: Tensor | None  # [B, 1, 1, L + T]


class RibbonBlock(Block):
    def __init__(self, cfg: RibbonConfig):
        super().__init__()
        self.heads = cfg.num_attention_heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(cfg.dim, cfg.dim) for _ in range(4))
        self.mod = nn.Linear(cfg.dim, 3 * cfg.dim)

    def read(self, prompt: Prompt) -> tuple[Tensor, Tensor]:
        return self.to_k(prompt.text), self.to_v(prompt.text)

    def run(self, job: Job, tables: Tables, read: dict, settle: bool = False) -> list[State]:
        (prompt,) = job.prompts
        x = job.state.settled().x
        shift, scale, gate = self.mod(prompt.temb).chunk(3, -1)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        key, value = (torch.cat(pair, 1) for pair in zip((self.to_k(h), self.to_v(h)), read[prompt], strict=True))
        q, k, v = (y.unflatten(2, (self.heads, -1)) for y in (self.to_q(h), key, value))
        return [State(x + gate * self.to_out(attend(q, k, v, prompt.mask)))]


class RibbonModel(VideoDiT):
    family, config_class = "ribbon", "RibbonTransformer"
    cfg: RibbonConfig

    def __init__(self, cfg: RibbonConfig):
        super().__init__()
        self.cfg, area = cfg, GEOMETRY.patch**2
        self.x_in, self.text_in = nn.Linear(cfg.in_channels * area, cfg.dim), nn.Linear(cfg.text_dim, cfg.dim)
        self.time_in, self.mood_in = nn.Linear(8, cfg.dim), nn.Linear(cfg.mood_dim, cfg.dim)
        self.blocks = nn.ModuleList([RibbonBlock(cfg) for _ in range(cfg.num_layers)])
        self.proj_out = nn.Linear(cfg.dim, cfg.in_channels * area)

    @property
    def config(self) -> dict:
        return {"_class_name": self.config_class} | asdict(replace(self.cfg, num_layers=self.num_blocks))

    def hidden_bytes(self, x_t: Tensor) -> int:
        return len(x_t) * math.prod(GEOMETRY.grid(x_t.shape[2:])) * self.cfg.dim * 4

    def tables(self, x_t: Tensor, t: Tensor) -> RibbonTables:
        grid = GEOMETRY.grid(tuple(x_t.shape[2:]))
        return RibbonTables(rope_factors(grid, (2, 2, 4)), grid, x_t, t)

    def prompt(self, cond: Cond, tables: RibbonTables) -> RibbonPrompt:
        frames, rows, columns = tables.grid
        t = tables.t[:, None].repeat(1, frames)
        t[:, 0] = 0  # the given frame is clean
        time = self.time_in(sinusoids(t.flatten(), 8)).view(len(t), frames, -1).repeat_interleave(rows * columns, 1)
        temb = F.silu(time + self.mood_in(cond.mood)[:, None])
        valid = torch.arange(cond.text.shape[1]) < cond.text_len[:, None]
        mask = F.pad(valid, (math.prod(tables.grid), 0), value=True)[:, None, None]
        return RibbonPrompt(cond, self.text_in(cond.text), temb, mask)

    def embed(self, x_t: Tensor, prompt: Prompt) -> State:
        x = torch.cat([prompt.cond.image, x_t[:, :, 1:]], 2)
        x = x.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 2, 3, 5, 1, 4, 6)  # [B, F, H/2, W/2, C, 2, 2]
        return State(self.x_in(x.flatten(4).flatten(1, 3)))

    def unembed(self, state: State, prompt: Prompt, tables: RibbonTables) -> Tensor:
        x = state.settled().x
        v = self.proj_out(F.layer_norm(x, x.shape[-1:])).view(len(x), *tables.grid, -1, 2, 2)
        v = v.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
        given = (tables.x_t[:, :, :1] - prompt.cond.image) / tables.t.view(-1, 1, 1, 1, 1)
        return torch.cat([given, v[:, :, 1:]], 2)

    def check(self, x_t: Tensor, conds: list[Cond]) -> None:
        assert all(isinstance(cond, RibbonCond) and cond.mood is not None for cond in conds), conds

    def example_inputs(self, batch: int = 1, seed: int = 0, size: tuple[int, int, int] | None = None):
        g, (f, h, w) = torch.Generator().manual_seed(seed), size or LATENT

        def draw(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, generator=g)

        x_t, image, t = draw(8, f, h, w), draw(8, 1, h, w), torch.rand(batch, generator=g).clamp(0.02, 0.98)
        lengths = torch.randint(1, TEXT_TOKENS + 1, (2, batch), generator=g)
        prompts = (RibbonCond(draw(TEXT_TOKENS, self.cfg.text_dim), n, image, mood=draw(MOOD)) for n in lengths)
        return x_t, t, *prompts


def ribbon_cost(cfg: Mapping, latent: tuple[int, int, int], text: int, use_fused: bool, part) -> Network:
    tokens, dim = math.prod(GEOMETRY.grid(latent)), cfg["num_attention_heads"] * cfg["attention_head_dim"]
    square, six, patch = (dim, dim), (dim, 3 * dim), (8 * 4, dim)
    block = BlockCost(
        kind="block",
        params=biased(*[square] * 4, six),
        weights=4 * dim * dim + 3 * dim * dim,
        widths=8 * dim + 4 * dim,
        shared=Work(linear(tokens, *[square] * 4, six), attention(tokens, tokens + text, dim)),
        private=Work(),
        prompt=Work(linear(text, square, square)),
        self_attention=attention(tokens, tokens + text, dim),
        attention_out=Saved(tokens * dim, 0),
        saved=Saved(12 * tokens * dim, 0),
        prompt_saved=Saved(2 * text * dim, 0),
        working=8 * tokens * dim,
        gradients=2 * tokens * dim,
    )
    outside = biased(patch, (cfg["text_dim"], dim), (8, dim), (cfg["mood_dim"], dim), (dim, 8 * 4))
    return Network(
        family="ribbon",
        blocks=(block,) * cfg["num_layers"],
        outside_params=outside,
        tables=Work(),
        text=Work(linear(text, (cfg["text_dim"], dim)) + linear(latent[0], (8, dim)) + linear(1, (MOOD, dim))),
        embed=Work(entry=linear(tokens, patch)),
        unembed=Work(linear(tokens, (dim, 8 * 4))),
        hidden=tokens * dim,
        width=dim,
        heads=cfg["num_attention_heads"],
        saved=Saved(tokens * 64, 0),
        last=last_norm(tokens * dim, use_fused),
        merges=False,
        latent=latent,
    )


def ribbon_table(config: Mapping) -> Table:
    """The key table: the original stores q, k and v of a block as one tensor."""
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    outside = ("x_in", "text_in", "time_in", "mood_in", "proj_out")
    whole = named({name: f"ribbon.{name}" for name in outside})
    split: Table = {}
    for i in range(config["num_layers"]):
        whole |= named({"to_out": "out", "mod": "mod"}, f"blocks.{i}.", f"strips.{i}.")
        split |= fused([f"blocks.{i}.{n}" for n in ("to_q", "to_k", "to_v")], f"strips.{i}.qkv", [dim] * 3)
    return {ours: Source(theirs) for ours, theirs in whole.items()} | split


class RibbonEncoding(Encoding):
    geometry, text_tokens = GEOMETRY, TEXT_TOKENS
    condition = "first_frame"

    def normalisation(self) -> tuple[Tensor, Tensor]:
        return wide([self.pipe.vae.config.shift]), wide([self.pipe.vae.config.scale])

    def text(self, prompt: str, first) -> dict[str, Tensor]:
        text, length, mood = self.pipe.encode_prompt(prompt, self.text_tokens)
        return {"text": text, "text_len": length, "mood": mood}

    def image(self, first, frames: int) -> dict[str, Tensor]:
        shift, scale = self.normalisation()
        return {"image": (self.pipe.vae.encode(pixels(first[None])[None]).latent_dist.mode()[0] - shift) * scale}

    def put_given(self, clip: dict[str, Tensor]) -> None:
        clip["latents"][:, :1] = clip["image"]

    def extra_numbers(self, frame: int) -> int:
        return self.geometry.channels * frame


def stock_inputs(cfg: RibbonConfig, x_t: Tensor, t: Tensor, cond: RibbonCond) -> dict:
    times = t[:, None].repeat(1, x_t.shape[2])
    times[:, 0] = 0
    x = torch.cat([cond.image, x_t[:, :, 1:]], 2)
    text = {"encoder_hidden_states": cond.text, "text_length": cond.text_len}
    return {"hidden_states": x, "timestep": 1000 * times, "mood": cond.mood, **text}


RIBBON = Family(
    name="ribbon",
    title="Ribbon",
    config=RibbonConfig,
    network=RibbonModel,
    lists={"blocks": "num_layers"},
    cost=ribbon_cost,
    text_tokens=TEXT_TOKENS,
    cond=RibbonCond,
    signs={"mood_in.": "diffusers", "ribbon.mood_in.": "original"},
    original=Format(
        network="RibbonNet",
        keys=ribbon_table,
        lists={"strips": "blocks"},
        same={"heads": "num_attention_heads", "depth": "num_layers", "text": "text_dim", "mood": "mood_dim"},
        width="width",
        heads="heads",
        defaults={},
        fixed={},
    ),
    geometry=GEOMETRY,
    clips=Clips(fps=8, frames=FRAMES, buckets=((HEIGHT, WIDTH),)),
    pipelines={"RibbonPipeline": True},
    libraries=("ribbon_stock",),
    encoding=RibbonEncoding,
    interface=("in_channels", "text_dim", "mood_dim"),
    stock_inputs=stock_inputs,
    sets_sigmas=False,
    cfg_argument="true_cfg_scale",
    vae_memory=(1e6, 1e6),
)

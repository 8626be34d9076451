"""A third, invented family: with one record and one call to `register`, every command and stage works with it.

Ribbon differs from Wan and HunyuanVideo where families can differ: a VAE with 8 channels and strides 4 x 16 x 16, a
condition with a field `mood`, a time t per token (the tokens of a given first frame are clean, t = 0), a checkpoint
format of its own. Its "stock" classes are tiny diffusers classes that share no code with the network below.
Shapes: B batch, F H W latent, L tokens, T text tokens, D hidden, S mood.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import counted, run_train
from PIL import Image
from torch import Tensor, nn

from fastlightgen import flow
from fastlightgen.config import main
from fastlightgen.data.source import CacheSource
from fastlightgen.encode import encode
from fastlightgen.export import export
from fastlightgen.generate import generate
from fastlightgen.models.base import Block, Cond, Job, Prompt, State, Stream, Tables, VideoDiT
from fastlightgen.models.config import NetworkConfig
from fastlightgen.models.cost import Block as BlockCost
from fastlightgen.models.cost import Network, Saved, Work, attention, biased, last_norm, linear
from fastlightgen.models.encoding import Encoding, pixels, wide
from fastlightgen.models.families import FAMILIES, block_counts, build, network, recognise, register
from fastlightgen.models.family import Clips, Family
from fastlightgen.models.folder.weights import load_model, read_card
from fastlightgen.models.geometry import Geometry
from fastlightgen.models.keys import Format, Source, Table, fused, named
from fastlightgen.models.layers import sinusoids
from fastlightgen.ops import attend, rope_factors
from fastlightgen.pipelines.encoders import Encoders
from fastlightgen.planner.budget import load_network
from fastlightgen.rng import generator
from fastlightgen.world.source import open_source

diffusers = pytest.importorskip("diffusers")
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin  # noqa: E402
from diffusers.configuration_utils import ConfigMixin, register_to_config  # noqa: E402

GEOMETRY = Geometry(channels=8, frame_stride=4, pixel_stride=16, patch=2)
HEIGHT, WIDTH, FRAMES, TEXT_TOKENS, MOOD = 32, 64, 5, 12, 3
LATENT = (2, 2, 4)  # of 5 frames of 32 x 64 pixels


# The family: configuration, network, cost, keys, encoding, record.


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
    libraries=("test_family",),
    encoding=RibbonEncoding,
    interface=("in_channels", "text_dim", "mood_dim"),
    stock_inputs=stock_inputs,
    sets_sigmas=False,
    cfg_argument="true_cfg_scale",
    vae_memory=(1e6, 1e6),
)


# The stock classes, which the tests add to `diffusers`.


class RibbonTransformer(ModelMixin, ConfigMixin):
    """The same network, written a second time without this package."""

    @register_to_config
    def __init__(
        self, in_channels=8, num_attention_heads=2, attention_head_dim=8, num_layers=4, text_dim=6, mood_dim=3
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.x_in, self.text_in = nn.Linear(4 * in_channels, dim), nn.Linear(text_dim, dim)
        self.time_in, self.mood_in = nn.Linear(8, dim), nn.Linear(mood_dim, dim)
        names = ("to_q", "to_k", "to_v", "to_out")
        layers = [{n: nn.Linear(dim, dim) for n in names} | {"mod": nn.Linear(dim, 3 * dim)} for _ in range(num_layers)]
        self.blocks = nn.ModuleList(nn.ModuleDict(block) for block in layers)
        self.proj_out = nn.Linear(dim, 4 * in_channels)

    def forward(self, hidden_states, timestep, mood, encoder_hidden_states, text_length, return_dict=True):
        (b, c, f, h, w), heads = hidden_states.shape, self.config.num_attention_heads
        patches = F.unfold(hidden_states.transpose(1, 2).reshape(b * f, c, h, w), 2, stride=2)  # [B F, 4 C, H W / 4]
        x = self.x_in(patches.transpose(1, 2).reshape(b, -1, 4 * c))
        freq = torch.tensor([10000 ** (-i / 4) for i in range(4)])
        wave = timestep.float()[..., None] * freq
        time = self.time_in(torch.cat([wave.cos(), wave.sin()], -1).to(x.dtype))  # [B, F, D]
        emb = F.silu((time + self.mood_in(mood)[:, None]).repeat_interleave(h * w // 4, 1))
        text = self.text_in(encoder_hidden_states)
        read = torch.ones(b, 1, 1, x.shape[1] + text.shape[1], dtype=torch.bool)
        for i, n in enumerate(text_length.tolist()):
            read[i, ..., x.shape[1] + n :] = False
        for block in self.blocks:
            shift, scale, gate = block["mod"](emb).chunk(3, -1)
            y = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
            q, k, v = (
                block[n](z).view(b, -1, heads, x.shape[-1] // heads).transpose(1, 2)
                for n, z in (("to_q", y), ("to_k", torch.cat([y, text], 1)), ("to_v", torch.cat([y, text], 1)))
            )
            scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~read, -torch.inf)
            x = x + gate * block["to_out"]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        out = self.proj_out(F.layer_norm(x, x.shape[-1:])).view(b * f, -1, 4 * c).transpose(1, 2)
        return (F.fold(out, (h, w), 2, stride=2).view(b, f, c, h, w).transpose(1, 2),)


class RibbonVAE(ModelMixin, ConfigMixin):
    """Averages colours over patches of 16 x 16 pixels and over 1 (first) or 4 frames, as 8 channels."""

    @register_to_config
    def __init__(self, shift=0.2, scale=3.0):
        super().__init__()
        self.mix = nn.Parameter(torch.linalg.qr(torch.randn(8, 3))[0])

    def encode(self, video: Tensor):
        parts = [video[:, :, :1], video[:, :, 1:]][: 1 + (video.shape[2] > 1)]
        means = [F.avg_pool3d(v, (min(4, v.shape[2]), 16, 16)) for v in parts]
        z = torch.einsum("zc,bcfhw->bzfhw", self.mix, torch.cat(means, 2))
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: z))

    def decode(self, z: Tensor, return_dict: bool = True):
        colours = torch.einsum("zc,bzfhw->bcfhw", self.mix, z).repeat_interleave(16, 3).repeat_interleave(16, 4)
        return (torch.cat([colours[:, :, :1], colours[:, :, 1:].repeat_interleave(4, 2)], 2),)

    def enable_tiling(self) -> None:
        """Tiling is not needed at this size."""


class RibbonText(ModelMixin, ConfigMixin):
    """Encodes every letter as a vector, and the prompt's mood: fraction of vowels, fraction of spaces, length."""

    @register_to_config
    def __init__(self, text_dim=6):
        super().__init__()
        self.letters = nn.Parameter(torch.randn(256, text_dim))


class RibbonPipeline(DiffusionPipeline):
    def __init__(self, vae, text_encoder, transformer, scheduler):
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, transformer=transformer, scheduler=scheduler)

    def encode_prompt(self, prompt: str, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        letters = list(prompt.encode()[: tokens - 1]) + [0]
        text = F.pad(self.text_encoder.letters[letters], (0, 0, 0, tokens - len(letters)))
        mood = torch.tensor([sum(map(prompt.count, "aeiou")), prompt.count(" "), len(prompt)]) / max(1, len(prompt))
        return text, torch.tensor(len(letters)), mood.float()


# One run through all commands, and checks of its results.


PROMPTS = ("a red ribbon turns", "blue and green", "so grey", "a yellow field")
WORDS = ("progress=false", "threads=1")


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    register(RIBBON)
    with pytest.MonkeyPatch.context() as patch:
        for stock in (RibbonPipeline, RibbonTransformer):
            patch.setattr(diffusers, stock.__name__, stock, raising=False)
        yield
    del FAMILIES["ribbon"]


def film(seed: int) -> np.ndarray:
    """Frames [5, 32, 64, 3] that the VAE reproduces: one colour per patch of 16 x 16, frames 1 to 4 equal."""
    colours = np.random.default_rng(seed).integers(0, 256, (2, 2, 4, 3), np.uint8)
    return colours.repeat(16, 1).repeat(16, 2)[[0, 1, 1, 1, 1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the pipeline, its cache, a run of stages 0 to 3 and the export."""
    root = tmp_path_factory.mktemp("ribbon")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = RibbonVAE(), RibbonText(), RibbonTransformer(), FlowMatchEulerDiscreteScheduler(shift=3.0)
        RibbonPipeline(*parts).save_pretrained(root / "pipeline")
    for number, prompt in enumerate(PROMPTS):
        (root / "videos" / f"{number}").mkdir(parents=True)
        (root / "videos" / f"{number}.txt").write_text(prompt)
        for k, picture in enumerate(film(number)):
            Image.fromarray(picture).save(root / "videos" / f"{number}" / f"{k}.png")
    types = ["dtype=float32", "save_dtype=float32", "workers=0"]
    main(encode, "encode", [f"videos={root}/videos", f"pipeline={root}/pipeline", f"out={root}/cache", *types, *WORDS])

    common = [f"data={root}/cache", f"run={root}/run", f"pipeline={root}/pipeline", "batch=2", "shift=3", *WORDS]
    run_train(*common, f"model={root}/pipeline", "stage=0", f"init={root}/pipeline", "iters=60", "lr=2e-2")
    common += [f"model={root}/run/stage0/model", "log_every=1"]
    run_train(*common, "stage=1", "clips=1", "timesteps=2")
    run_train(*common, "stage=2", "iters=3")
    run_train(*common, "stage=3", "iters=4", "ratio=2", "critic_start=0", "steps=3", "sampler=ode")
    main(export, "export", [
        f"model={root}/run/stage3/model", f"pipeline={root}/pipeline", f"out={root}/out", "dtype=float32",
        "original=true", *WORDS,
    ])  # fmt: skip
    return root


def test_the_cache_holds_what_the_encoders_make(folder: Path):
    encoders, source = Encoders(folder / "pipeline"), open_source(f"{folder}/cache", 0)
    assert isinstance(source, CacheSource) and len(source.cache) == len(PROMPTS)
    for number, prompt in enumerate(PROMPTS):
        clip, stored = encoders.clip(film(number), prompt), source.cache.read([number])
        assert clip["latents"].shape == (8, *LATENT) and stored.keys() == clip.keys()
        assert all(torch.equal(stored[key][0], value) for key, value in clip.items())
        video = pixels(film(number))
        # The VAE averages 1024 equal numbers, summed one by one in float32: error at most 1024 x 2^-24 = 6e-5.
        torch.testing.assert_close(encoders.decode(clip["latents"]), video, rtol=0, atol=1e-4)
    frame, text = encoders.numbers(HEIGHT * WIDTH, FRAMES)
    assert (frame, text) == (clip["latents"].numel() + clip["image"].numel(), clip["text"].numel())
    about = source.description
    assert (about["family"], about["image_condition"], about["text_tokens"]) == ("ribbon", "first_frame", TEXT_TOKENS)
    assert (about["fps"], about["frames"], about["shift"], about["scale"]) == (8, FRAMES, [pytest.approx(0.2)], [3.0])


def test_a_dropped_prompt_takes_its_mood_along(folder: Path):
    batch = open_source(f"{folder}/cache", 0).batch(0, 2)
    assert type(batch.cond) is type(batch.null) is RibbonCond
    mixed = batch.drop_text(torch.tensor([True, False]))
    for key in ("text", "text_len", "mood"):
        value, null, own = (vars(c)[key] for c in (mixed, batch.null, batch.cond))
        assert torch.equal(value[0], null[0]) and torch.equal(value[1], own[1]) and not torch.equal(null, own)
    assert mixed.image is batch.cond.image is batch.null.image


@torch.no_grad()
def test_the_walk_is_one_call_per_stream():
    model = build(RibbonModel(RibbonConfig()).config, seed=1)
    x_t, t, cond, null = model.example_inputs(batch=2)
    streams = [Stream(cond, [0, 2, 3]), Stream(null), Stream(cond)]
    for v, stream in zip(model.walk(x_t, t, streams), streams, strict=True):
        torch.testing.assert_close(v, model(x_t, t, stream.cond, stream.keep), rtol=1e-5, atol=1e-5)
    assert torch.equal(model(x_t, t, cond, [0, 2, 3]), model.prune([0, 2, 3])(x_t, t, cond))


def test_the_plan_counts_this_network():
    """Parameters and operations of matrix products equal torch's counts."""
    model = build({"_class_name": "RibbonTransformer"}, seed=1)
    net = load_network(model.config, f"{HEIGHT}x{WIDTH}x{FRAMES}", 0)
    assert net.params == sum(p.numel() for p in model.parameters()) and net.latent == LATENT
    x_t, t, cond, _ = model.example_inputs()
    work = [net.text, net.embed, net.unembed, *(w for b in net.blocks for w in (b.shared, b.private, b.prompt))]
    assert counted(lambda: model(x_t, t, cond)) == sum(w.forward for w in work)
    assert network(model.config, LATENT) == net and block_counts(model.config) == {"blocks": 4}
    with pytest.raises(ValueError, match=r"height is 48; wanted a multiple of 32 \(VAE 16, patch 2\), for example 480"):
        load_network(model.config, "48x64x5", 0)


@torch.no_grad()
def test_the_stages_trained_it(folder: Path):
    source = open_source(f"{folder}/cache", 0)
    batch = source.batch(0, 3)
    noise, t = torch.randn(batch.x0.shape, generator=generator(1)), 0.8
    x_t = flow.add_noise(batch.x0, noise, t)
    before, after = (
        float((load_model(folder / model)(x_t, t, batch.cond) - (noise - batch.x0)).square().mean())
        for model in ("pipeline", "run/stage0/model")
    )
    assert after < 0.8 * before  # 0.70: it was trained on these clips
    cards = {stage: read_card(folder / f"run/stage{stage}/model") for stage in (0, 2, 3)}
    assert all((card["family"], card["vae"]) == ("ribbon", source.description["vae"]) for card in cards.values())
    assert cards[3]["kept_blocks"] == cards[2]["pruned_path"] and len(cards[3]["kept_blocks"]) == 3
    assert (cards[3]["ladder"], cards[3]["sampler"]) == ([1.0, pytest.approx(6 / 7), pytest.approx(0.6)], "ode")
    assert load_model(folder / "run/stage3/model").num_blocks == 3
    assert (folder / "run/stage3/samples/step-000004.gif").is_file()  # decoded by the pipeline's VAE


@torch.no_grad()
def test_the_export_is_the_same_network(folder: Path):
    """Compare with the stock class as the command does, but for a batch of two; check the written files."""
    model, stock = (
        load_model(folder / "run/stage3/model"),
        RibbonTransformer.from_pretrained(folder / "out/transformer"),
    )
    x_t, t, cond, _ = model.example_inputs(batch=2, seed=5)
    v, v_stock = model(x_t, t, cond), stock(**stock_inputs(model.cfg, x_t, t, cond))[0]
    torch.testing.assert_close(v[:, :, 1:], v_stock[:, :, 1:], rtol=1e-5, atol=1e-5)  # frame 0 is given
    torch.testing.assert_close(x_t[:, :, :1] - t.view(-1, 1, 1, 1, 1) * v[:, :, :1], cond.image, rtol=1e-4, atol=1e-5)
    original = load_model(folder / "out/original")
    assert json.loads((folder / "out/original/config.json").read_text())["_class_name"] == "RibbonNet"
    assert all(torch.equal(a, b) for a, b in zip(original.parameters(), model.parameters(), strict=True))
    card = json.loads((folder / "out/fastlightgen.json").read_text())
    assert card["call"] == {"num_inference_steps": 3, "true_cfg_scale": 1.0}
    assert "call it with `true_cfg_scale=1.0`" in (folder / "out/README.md").read_text()


@torch.no_grad()
def test_generate_samples_as_the_stock_parts_do(folder: Path):
    """From the same seed, the command and a loop over the exported parts give the same frames."""
    Image.fromarray(film(9)[0]).save(folder / "first.png")
    words = [f"model={folder}/out", "prompt=a red ribbon", f"image={folder}/first.png", f"out={folder}/a.png", "seed=4"]
    main(generate, "generate", [*words, *WORDS])
    sheet = np.asarray(Image.open(folder / "a.png")).astype(int).reshape(HEIGHT, FRAMES, WIDTH, 3).transpose(1, 0, 2, 3)

    pipe = RibbonPipeline.from_pretrained(folder / "out")
    text, length, mood = pipe.encode_prompt("a red ribbon", TEXT_TOKENS)
    image = (pipe.vae.encode(pixels(film(9)[:1])[None]).latent_dist.mode() - 0.2) * 3.0
    x = torch.randn((1, 8, *LATENT), generator=generator(4))
    pipe.scheduler.set_timesteps(3)
    for t in pipe.scheduler.timesteps:
        x = torch.cat([image, x[:, :, 1:]], 2)
        times = torch.tensor([[0.0, float(t)]])
        v = pipe.transformer(x, times, mood[None], text[None], length[None])[0]
        x = pipe.scheduler.step(v, t, x, return_dict=False)[0]
    x = torch.cat([image, x[:, :, 1:]], 2)
    video = pipe.vae.decode(x / 3.0 + 0.2)[0][0].clamp(-1, 1)
    wanted = (video * 127.5 + 127.5).round().int().permute(1, 2, 3, 0).numpy()
    assert np.abs(sheet - wanted).max() <= 1 and len(np.unique(sheet)) > 10  # a value at a rounding boundary can differ
    assert np.abs(sheet[0] - film(9)[0]).max() <= 1  # the given frame


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["size=48x64x5"], "size=48x64x5: height and width must be multiples of 32, frames 4k+1 (5, 9, ... 81)"),
        (["image="], "image=: this pipeline needs a picture"),
    ],
)
def test_mistakes(folder: Path, capsys, words: list[str], message: str):
    given = dict(w.split("=", 1) for w in (f"model={folder}/out", "prompt=x", f"image={folder}/first.png", *words))
    with pytest.raises(SystemExit) as stop:
        main(generate, "generate", [*(f"{k}={v}" for k, v in given.items()), f"out={folder}/b.png", *WORDS])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_weights_and_names_are_distinguished():
    model = build({"_class_name": "RibbonTransformer"}, seed=0)
    assert recognise(model.state_dict()) == "Ribbon (diffusers format)"
    assert recognise(["ribbon.mood_in.weight"]) == "Ribbon (original format)"
    with pytest.raises(AssertionError, match="ribbon"):
        register(RIBBON)
    with pytest.raises(ValueError, match="_class_name is 'Flux'; supported: WanTransformer3DModel, .*RibbonNet"):
        build({"_class_name": "Flux"})
    assert {f.name for f in fields(RibbonCond)} - {f.name for f in fields(Cond)} == {"mood"}

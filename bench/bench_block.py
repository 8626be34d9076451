"""Time one block of Wan 14B and of HunyuanVideo against diffusers' block with the same weights, forward and backward.

Our block runs as in the middle of a walk: it adds the pending residual of the block before, and leaves its own residual
to the next block. That is as much work as diffusers' block does. Both must agree before the timing starts. Without
diffusers only our block is timed; without a GPU the sizes are small.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import kernels
import pytest
import torch
import torch.nn.functional as F
from device_time import sampled
from kernels import DEVICE, DTYPE, GPU, draw
from peers import failing, imported, with_cudnn
from torch import Tensor, nn

from fastlightgen.models.base import Block, Cond, Job, Prompt, State, Tables
from fastlightgen.models.hunyuan.blocks import DoubleBlock, HunyuanPrompt, SingleBlock
from fastlightgen.models.hunyuan.layers import HunyuanConfig
from fastlightgen.models.wan.layers import WanConfig, rope_axes
from fastlightgen.models.wan.model import WanBlock, WanPrompt, WanTables
from fastlightgen.ops import rope_factors

pytestmark = kernels.RECORDED
OURS = ["cuda", "triton", "reference"]
# eager, eager cuDNN and torch.compile: diffusers' block. torch takes its own FlashAttention, ours asks for cuDNN's.
CONTENDERS = ["cuda", "eager", "eager cuDNN", "triton", "torch.compile", "reference"]
ROUNDS = 10 if GPU else 2


@dataclass
class Pair:
    """Our block and diffusers' block with the same weights; `theirs` takes the sequences of hidden states."""

    block: Block
    peer: nn.Module | None  # None without diffusers: then our block runs alone, unchecked
    theirs: Callable[..., Tensor | tuple[Tensor, ...]]
    prompt: Prompt
    tables: Tables
    x: list[Tensor]  # the sequences of hidden states, as diffusers keeps them
    joined: bool = False  # does our block join the sequences into one?

    def inputs(self) -> list[Tensor]:
        return [torch.cat(self.x, 1)] if self.joined else self.x

    def ours(self, x: list[Tensor], y: list[Tensor | None], gate: Tensor | None) -> list[State]:
        first, *others = [State(a, b, None if b is None else gate) for a, b in zip(x, y)]
        job = Job(State(*first.parts(), others=tuple(others)), [self.prompt], [True])
        state = self.block([job], self.tables)[0][0]
        return [state, *state.others]

    def agree(self) -> None:
        with torch.no_grad():
            got = [s.settled().x for s in self.ours(self.inputs(), [None] * 2, None)]
            want = self.theirs(*self.x)
        got, want = (torch.cat(v, 1) if isinstance(v, (list, tuple)) else v for v in (got, want))
        # bfloat16 rounds to 1 part in 256. diffusers rounds after each operation; our fused operators do not.
        tolerance = 1e-4 if DTYPE == torch.float32 else 0.1
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


THEIRS = "diffusers.models.transformers.transformer_"


def diffusers(name: str) -> ModuleType | None:
    """A module of diffusers, or None if it cannot be imported, for whatever reason."""
    return None if failing(THEIRS + name) else imported(THEIRS + name)


def made(block: Callable[..., nn.Module], *args: object) -> nn.Module:
    """A block with random weights, made on the device: the host would take seconds for 350M numbers."""
    with torch.device(DEVICE):
        return block(*args).to(DTYPE)


def wan() -> Pair:
    theirs = diffusers("wan")
    cfg = WanConfig() if GPU else WanConfig(num_attention_heads=4, attention_head_dim=32, ffn_dim=352)
    grid, tokens = ((21, 30, 52), 512) if GPU else ((1, 2, 3), 4)
    block = made(WanBlock, cfg)
    args = cfg.dim, cfg.ffn_dim, cfg.num_attention_heads, cfg.qk_norm, cfg.cross_attn_norm, cfg.eps
    peer = theirs and made(theirs.WanTransformerBlock, *args)
    x, text, mod = draw(1, grid[0] * grid[1] * grid[2], cfg.dim), draw(1, tokens, cfg.dim), draw(1, 6, cfg.dim)
    rope = rope_factors(grid, rope_axes(cfg.attention_head_dim), device=torch.device(DEVICE))
    latent = torch.empty(1, 1, grid[0], 2 * grid[1], 2 * grid[2], device=DEVICE)
    rotary = theirs and theirs.WanRotaryPosEmbed(cfg.attention_head_dim, (1, 2, 2), 1024).to(DEVICE)(latent)
    prompt, tables = WanPrompt(Cond(text), text, None), WanTables(rope, grid, mod[:, 0], mod)
    return Pair(block, peer, lambda x: peer(x, text, mod, rotary), prompt, tables, [x])


def hunyuan(double: bool) -> Pair:
    module = diffusers("hunyuan_video")
    small = {"num_attention_heads": 4, "attention_head_dim": 32, "rope_axes_dim": (8, 12, 12)}
    cfg = HunyuanConfig() if GPU else HunyuanConfig(**small)
    grid, tokens = ((33, 34, 60), 256) if GPU else ((1, 2, 3), 4)
    block = made(DoubleBlock if double else SingleBlock, cfg)
    kind = module and (module.HunyuanVideoTransformerBlock if double else module.HunyuanVideoSingleTransformerBlock)
    peer = kind and made(kind, cfg.num_attention_heads, cfg.attention_head_dim, cfg.mlp_ratio)
    x, text, emb = draw(1, grid[0] * grid[1] * grid[2], cfg.dim), draw(1, tokens, cfg.dim), draw(1, cfg.dim)
    rope = rope_factors(grid, cfg.rope_axes_dim, cfg.rope_theta, torch.device(DEVICE))
    latent = torch.empty(1, 1, grid[0], 2 * grid[1], 2 * grid[2], device=DEVICE)
    rotary = module and module.HunyuanVideoRotaryPosEmbed(2, 1, cfg.rope_axes_dim, cfg.rope_theta)(latent)
    prompt = HunyuanPrompt(Cond(text), text, F.silu(emb), None, None)
    theirs = lambda x, text: peer(x, text, emb, None, rotary)  # noqa: E731
    return Pair(block, peer, theirs, prompt, Tables(rope, grid), [x, text], joined=not double)


PAIRS = {"wan-14b": wan, "hunyuan-double": lambda: hunyuan(True), "hunyuan-single": lambda: hunyuan(False)}


@lru_cache(1)  # one pair at a time: the benches of a network follow each other
def pair_of(network: str) -> Pair:
    torch.manual_seed(0)
    pair = PAIRS[network]()
    if pair.peer is not None:
        pair.peer.load_state_dict(pair.block.state_dict())
    return pair


def timed(pair: Pair, name: str, backward: bool) -> Callable[[], object]:
    """One call of one contender."""
    ours = name in OURS
    inputs = [x.detach().requires_grad_(backward) for x in (pair.inputs() if ours else pair.x)]
    if ours:
        y, gate = [torch.randn_like(x).requires_grad_(backward) for x in inputs], draw(1, inputs[0].shape[-1])
        wanted = [*inputs, *y, *pair.block.parameters()]

        def forward() -> list[Tensor]:
            return [v for s in pair.ours(inputs, y, gate) for v in (s.x, s.y)]
    else:
        call = kernels.compiled(pair.theirs) if name == "torch.compile" else pair.theirs
        call = with_cudnn(call) if name == "eager cuDNN" else call
        wanted = [*inputs, *pair.peer.parameters()]

        def forward() -> list[Tensor]:
            out = call(*inputs)
            return [out] if isinstance(out, Tensor) else list(out)

    if not backward:
        return torch.no_grad()(forward)
    with torch.no_grad():
        seeds = [torch.randn_like(v) for v in forward()]
    return lambda: torch.autograd.grad(forward(), wanted, seeds)


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("way", ["forward", "forward+backward"])
@pytest.mark.parametrize("network", PAIRS)
def bench_block(benchmark, monkeypatch, network: str, way: str, name: str):
    if name in OURS:
        kernels.use(monkeypatch, name)
    pair = pair_of(network)
    if pair.peer is None and name not in OURS:
        pytest.skip(failing(THEIRS + ("wan" if network.startswith("wan") else "hunyuan_video")))
    if pair.peer is not None and name in OURS:
        pair.agree()
    try:
        call = timed(pair, name, way != "forward")
        samples = sampled([call], ROUNDS)
    except torch.OutOfMemoryError:
        pytest.skip("the block does not fit this GPU's memory")
    kernels.record(benchmark, f"{network} block {way}", name, samples)

"""HunyuanVideo's two kinds of blocks: double (separate image and text tokens) and single (one sequence of both).

Shapes: B batch, L image tokens, T text tokens, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastlightgen.models.base import Block, Job, Prompt, State, Tables
from fastlightgen.models.hunyuan.layers import (
    EPS,
    HunyuanConfig,
    JointAttention,
    JointConfig,
    Modulation,
    SingleAttention,
    joined,
)
from fastlightgen.models.layers import FeedForward, gelu_of, linear_onto
from fastlightgen.models.streams import Prunable
from fastlightgen.ops import gate_residual_norm_modulate

Modulations = list[tuple[Tensor, ...]]  # per sequence of a state: shifts, scales and gates


@dataclass(frozen=True, eq=False)
class HunyuanPrompt(Prompt):
    """A condition as HunyuanVideo's blocks read it."""

    temb: Tensor  # SiLU of the embedding of time, pooled text and guidance [B, D]
    first: Tensor | None  # the same at t = 0, for the tokens of the given frame (token_replace)
    mask: Tensor | None  # [B, 1, 1, L + T]: True for tokens that attention may read


class HunyuanBlock(Block):
    """A state has one sequence per modulation: tokens of the given frame (token_replace), of the image, of the text."""

    def run(self, job: Job, tables: Tables, read: dict[Prompt, Modulations], settle: bool = False) -> list[State]:
        (prompt,) = job.prompts  # the text enters before the first block, so every state has one prompt
        state = job.state
        return [state_of(self.residual([state, *state.others], read[prompt], tables, prompt.mask, settle))]

    def residual(
        self, parts: list[State], mods: Modulations, tables: Tables, mask: Tensor | None, settle: bool
    ) -> list[State]:
        """Compute the block for all sequences of a state; the residuals at its end may be deferred."""
        raise NotImplementedError


def state_of(parts: list[State]) -> State:
    """Combine sequences into one state."""
    return parts[0]._replace(others=tuple(parts[1:]))


def norms(parts: list[State], scales: Sequence[Tensor], shifts: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Compute, per sequence, x' = x + gate y and h = LayerNorm(x') (1 + scale) + shift; returns all x' and all h."""
    triples = zip(parts, scales, shifts, strict=True)
    pairs = [gate_residual_norm_modulate(*s.parts(), scale, shift, EPS) for s, scale, shift in triples]
    return [x for x, _ in pairs], [h for _, h in pairs]


def cut(y: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Undo `joined`: split y into sequences as long as those of `like`."""
    return list(y.split([x.shape[1] for x in like], 1))


class DoubleBlock(HunyuanBlock):
    """Joint attention of image and text tokens, then a feed-forward for each."""

    def __init__(self, cfg: JointConfig):
        super().__init__()
        dim, inner = cfg.dim, cfg.ffn_width
        self.norm1, self.norm1_context = Modulation(dim, 6), Modulation(dim, 6)
        self.attn = JointAttention(cfg)
        self.ff, self.ff_context = FeedForward(dim, inner, dim), FeedForward(dim, inner, dim)

    def attention_outputs(self) -> list[tuple[nn.Module, bool]]:
        return [(self.attn.to_out[0], True), (self.attn.to_add_out, True)]

    def prunable(self) -> list[Prunable]:
        # Image and text attend to each other, so a head goes from the projections of both.
        own = [f"attn.{layer}" for layer in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")]
        outputs = {"attn.to_out.0": 0, "attn.to_add_out": 0}
        heads = Prunable(
            "heads", dict(zip(own, own, strict=True)), outputs, self.attn.to_q.out_features // self.attn.heads
        )
        ffn = [Prunable("ffn", {f"{n}.net.0.proj": f"{n}.net.0"}, {f"{n}.net.2": 0}) for n in ("ff", "ff_context")]
        return [heads, *ffn]

    def read(self, prompt: HunyuanPrompt) -> Modulations:
        first = [] if prompt.first is None else [self.norm1(prompt.first)]
        return [*first, self.norm1(prompt.temb), self.norm1_context(prompt.temb)]

    def residual(
        self, parts: list[State], mods: Modulations, tables: Tables, mask: Tensor | None, settle: bool
    ) -> list[State]:
        shift1, scale1, gate1, shift2, scale2, gate2 = zip(*mods, strict=True)
        x, h = norms(parts, scale1, shift1)
        image, text = self.attn(joined(h[:-1]), h[-1], tables, mask)
        x, h = norms(list(map(State, x, [*cut(image, x[:-1]), text], gate1)), scale2, shift2)
        if settle and len(x) == 2:
            text = State(self.ff_context.onto(x[1], gate2[1], h[1]))
            # The image's product comes last: a checkpoint need not recompute the last operation.
            return [State(self.ff.onto(x[0], gate2[0], h[0])), text]
        y = [*cut(self.ff(joined(h[:-1])), x[:-1]), self.ff_context(h[-1])]
        return list(map(State, x, y, gate2))


class SingleBlock(HunyuanBlock):
    """Attention and feed-forward side by side, over image and text tokens in one sequence."""

    def __init__(self, cfg: HunyuanConfig):
        super().__init__()
        dim, inner = cfg.dim, cfg.ffn_width
        self.norm = Modulation(dim, 3)
        self.attn = SingleAttention(cfg, cfg.heads)
        attended = cfg.heads * cfg.attention_head_dim
        self.proj_mlp, self.proj_out = nn.Linear(dim, inner), nn.Linear(attended + inner, dim)

    def prunable(self) -> list[Prunable]:
        own, attended = [f"attn.{layer}" for layer in ("to_q", "to_k", "to_v")], self.attn.to_q.out_features
        heads = Prunable("heads", dict(zip(own, own, strict=True)), {"proj_out": 0}, attended // self.attn.heads)
        # `proj_mlp` is computed inside another operation; its input is that of the attention.
        return [heads, Prunable("ffn", {"proj_mlp": "attn"}, {"proj_out": attended})]

    def attention_outputs(self) -> list[tuple[nn.Module, bool]]:
        return [(self.proj_out, False)]  # it reads the feed-forward too

    def read(self, prompt: HunyuanPrompt) -> Modulations:
        first = [] if prompt.first is None else [self.norm(prompt.first)]
        return [*first, self.norm(prompt.temb)]

    def residual(
        self, parts: list[State], mods: Modulations, tables: Tables, mask: Tensor | None, settle: bool
    ) -> list[State]:
        if len(parts) > len(mods):  # the first single block that runs appends the text to the image's sequence
            *given, image, text = parts
            parts = [*given, State(joined([image.settled().x, text.settled().x]))]
        shift, scale, gate = zip(*mods, strict=True)
        x, h = norms(parts, scale, shift)
        tokens = joined(h)
        y = torch.cat([self.attn(tokens, tables, mask), gelu_of(self.proj_mlp, tokens)], 2)
        if settle and len(x) == 1:
            return [State(linear_onto(self.proj_out, x[0], gate[0], y))]
        return list(map(State, x, cut(self.proj_out(y), x), gate))

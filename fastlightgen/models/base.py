"""One walk, many streams: the only block loop in the project.

A model supplies `embed(x_t, t, cond) -> State`, an ordered list `blocks` and `unembed(State) -> v`. A stream is one
prediction of the same weights for the same noisy latent: a condition, a set of blocks and whether it carries gradient.
Streams with one condition stay merged until the first block that only some of them run; a skipped block costs nothing.

Shapes: x_t, v [B, C, F, H, W] latents; t [B] in (0, 1]; hidden states [B, L, D].
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastlightgen.blocks import check_keep


@dataclass(frozen=True, eq=False)
class Cond:
    """What a prediction is conditioned on, as batched tensors. `image` holds the condition channels."""

    text: Tensor
    text_len: Tensor | None = None
    image: Tensor | None = None
    image_embeds: Tensor | None = None
    pooled: Tensor | None = None
    guidance: Tensor | None = None

    def map(self, fn) -> "Cond":
        """Apply fn to every tensor."""
        return Cond(**{k: fn(v) for k, v in vars(self).items() if v is not None})


@dataclass(frozen=True, eq=False)
class Stream:
    """One prediction of a walk. `keep`: indices of the blocks that run (None: all of them)."""

    cond: Cond
    keep: Sequence[int] | None = None
    grad: bool = False


@dataclass(frozen=True, eq=False)
class State:
    """What travels through the blocks: the hidden states and the tables that every block reads."""

    x: Tensor  # hidden states [B, L, D]
    temb: Tensor  # time embedding [B, D]
    mod: Tensor  # time projection [B, 6, D]
    rope: Tensor  # complex rotations [1, L, 1, head_dim / 2]
    text: Tensor  # text context [B, T, D]
    image: Tensor | None  # image context [B, I, D]
    grid: tuple[int, int, int]  # patches along (F, H, W)

    def detach(self) -> "State":
        return replace(self, **{k: v.detach() for k, v in vars(self).items() if isinstance(v, Tensor)})


def gradient(on: bool):
    """Nothing for a grad stream (the caller's mode rules), no_grad for the others."""
    return nullcontext() if on else torch.no_grad()


class VideoDiT(nn.Module):
    """A video diffusion transformer whose blocks can be skipped, walked by several streams at once, or pruned."""

    blocks: nn.ModuleList
    block_calls: int = 0  # block evaluations since the counter was last set to 0

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    def embed(self, x_t: Tensor, t: Tensor, cond: Cond) -> State:
        raise NotImplementedError

    def unembed(self, state: State) -> Tensor:
        raise NotImplementedError

    def forward(self, x_t: Tensor, t: Tensor | float, cond: Cond, keep: Sequence[int] | None = None) -> Tensor:
        """v for one condition; `keep` names the blocks that run."""
        return self.walk(x_t, t, [Stream(cond, keep, grad=True)])[0]

    def walk(self, x_t: Tensor, t: Tensor | float, streams: Sequence[Stream]) -> list[Tensor]:
        """v for every stream. Each block is visited once, and once called for all the streams that run it."""
        t = torch.as_tensor(t, dtype=torch.float32, device=x_t.device).expand(x_t.shape[0])
        keeps = [check_keep(s.keep, self.num_blocks) for s in streams]

        # Streams with the same condition start as one group: [state, member indices].
        groups: list[tuple[State, list[int]]] = []
        for cond in {id(s.cond): s.cond for s in streams}.values():
            members = [i for i, s in enumerate(streams) if s.cond is cond]
            with gradient(any(streams[i].grad for i in members)):
                groups.append((self.embed(x_t, t, cond), members))

        for index, block in enumerate(self.blocks):
            running, waiting = [], []
            for state, members in groups:
                inside = [i for i in members if index in keeps[i]]
                outside = [i for i in members if index not in keeps[i]]
                if inside and outside:  # fork: a side without a grad stream leaves the graph
                    sides = [(self._side(state, part, streams), part) for part in (inside, outside)]
                    running.append(sides[0])
                    waiting.append(sides[1])
                else:
                    (running if inside else waiting).append((state, members))
            if running:
                grads = [any(streams[i].grad for i in members) for _, members in running]
                states = block([state for state, _ in running], grads)
                self.block_calls += len(states)
                running = [(state, members) for state, (_, members) in zip(states, running, strict=True)]
            groups = running + waiting

        out: list[Tensor | None] = [None] * len(streams)
        for state, members in groups:
            with gradient(any(streams[i].grad for i in members)):
                v = self.unembed(state)
            for i in members:
                out[i] = v if streams[i].grad else v.detach()
        return out

    @staticmethod
    def _side(state: State, members: list[int], streams: Sequence[Stream]) -> State:
        return state if any(streams[i].grad for i in members) else state.detach()

    def prune(self, keep: Sequence[int]) -> "VideoDiT":
        """Delete the blocks outside `keep` for good, in place; the others keep their order."""
        keep = sorted(check_keep(keep, self.num_blocks))
        self.blocks = nn.ModuleList([self.blocks[i] for i in keep])
        return self

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

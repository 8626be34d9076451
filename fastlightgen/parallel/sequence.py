"""Sequence parallelism (DeepSpeed-Ulysses, arXiv 2309.14509): the ranks of a group share the tokens of one clip.

Every rank has the whole latent and its conditions. A walk cuts them along rows or columns, so that each rank works on
a smaller latent whose positions are the true ones. Only attention needs the others: there each rank has all tokens of
a share of the heads. At its end the predicted v is whole again on every rank, and so is the loss.

Why gradients are exact. Let theta_r be rank r's copy of the weights. Every exchange passes gradients back as its true
adjoint, so a backward pass from the loss on every rank leaves d(sum of all ranks' losses) / d theta_r on rank r. The
mean over the ranks, which an engine takes anyway, is then the derivative of the mean loss by weights that are one; and
as all ranks of a group have the same loss, that is the mean over the groups: one process with the same global batch.

Shapes: B batch, n image tokens of this rank, L of all ranks, T text tokens, D hidden, h heads of d channels, s ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fastlightgen.ops import attend
from fastlightgen.parallel.shares import divisors, token_shares


class Exchange(torch.autograd.Function):
    """Some rows of x [rows, ...] to each rank, and each rank's in return. The adjoint is the way back."""

    @staticmethod
    def forward(ctx, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.way_back = received, sent, group
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return Exchange.apply(grad, *ctx.way_back), None, None, None


class Network(Protocol):
    """A network whose walk a group can share; its `cfg` has num_attention_heads."""

    cfg: Any
    sequence: "SequenceGroup | None"


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share the tokens of one clip."""

    group: dist.ProcessGroup
    rank: int  # in the group
    size: int

    def share(self, net: Network) -> None:
        """From now on the group's ranks call this network together, each with its part of the tokens."""
        if net.cfg.num_attention_heads % self.size:
            raise ValueError(
                f"sequence_parallel={self.size}: does not divide the network's {net.cfg.num_attention_heads} heads; "
                f"use one of {divisors(net.cfg.num_attention_heads)}"
            )
        net.sequence = self

    def cut(self, grid: tuple[int, int, int]) -> "Cut":
        """What each rank works on, of a latent of so many patches."""
        axis, sizes = token_shares(grid, self.size)
        return Cut(self, axis, sizes, [grid[0] * grid[3 - axis] * n for n in sizes])


@dataclass(frozen=True, eq=False)
class Cut:
    """Which part of a latent each rank of a group works on."""

    sequence: SequenceGroup
    axis: int  # of the grid of patches (F, H, W)
    sizes: list[int]  # patches along it, per rank
    tokens: list[int]  # per rank

    def along(self, x: Tensor, axis: int) -> Tensor:
        """This rank's part of what has one or more entries per patch along `axis`."""
        rank, per = self.sequence.rank, x.shape[axis] // sum(self.sizes)
        return x.narrow(axis, per * sum(self.sizes[:rank]), per * self.sizes[rank])

    def part(self, x: Tensor) -> Tensor:
        """This rank's part of a latent or of condition channels [B, C, F, H, W]."""
        return self.along(x, self.axis + 2)

    def whole(self, v: Tensor) -> Tensor:
        """All ranks' parts of a latent, on every rank."""
        size, n = self.sequence.size, v.shape[self.axis + 2]
        per = n // self.sizes[self.sequence.rank]
        x = v.movedim(self.axis + 2, 0).expand(size, n, -1, -1, -1, -1).flatten(0, 1)
        return self._exchange(x, [n] * size, [per * m for m in self.sizes]).movedim(0, self.axis + 2).contiguous()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention among the tokens of all ranks: `attend` of [B, n + T, h, d], whose last T are alike on every rank.

        The ranks' image tokens stand one after the other, which attention does not notice; text tokens come last.
        """
        size, rank, n = self.sequence.size, self.sequence.rank, self.tokens[self.sequence.rank]
        text = q.shape[1] - n

        # Tokens first, so that what arrives is in place: [s n, 3, B, h/s, d] out, [L, 3, B, h/s, d] in.
        parts = [x.unflatten(2, (size, -1)).permute(2, 1, 0, 3, 4) for x in (q, k, v)]  # [s, n + T, B, h/s, d]
        out = torch.stack([x[:, :n] for x in parts], 2).flatten(0, 1)
        x = self._exchange(out, [n] * size, self.tokens)
        if text:
            x = torch.cat([x, torch.stack([x[rank, n:] for x in parts], 1)])
        q, k, v = (part.transpose(0, 1) for part in x.unbind(1))
        y = attend(q, k, v, mask).transpose(0, 1)  # [L + T, B, D/s]

        # Back: to each rank its tokens and the text, from each rank its heads.
        if text:
            *image, last = y.split([*self.tokens, text])
            y = torch.cat([part for x in image for part in (x, last)])
        y = self._exchange(y, [m + text for m in self.tokens], [n + text] * size)
        return y.unflatten(0, (size, n + text)).permute(2, 1, 0, 3).flatten(2)

    def _exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        return Exchange.apply(x, list(sent), list(received), self.sequence.group)

"""Sequence parallelism (DeepSpeed-Ulysses, arXiv 2309.14509): the ranks of a group share the tokens of one clip.

Every rank starts with the full latent and its conditions. A walk cuts them along rows or columns: each rank works on
a smaller latent, with the positions that it has in the full one. Only attention exchanges data: there each rank has
the tokens of all ranks, for some of the heads. At the end of the walk every rank has the full v, and so the same loss.

Why gradients are exact. Let theta_r be rank r's copy of the weights, and L_s the loss of rank s. The backward pass of
an exchange is its exact adjoint. So a backward pass on all ranks leaves d(sum_s L_s) / d theta_r on rank r. The engine
takes the mean of these gradients over the ranks: the derivative of the mean loss with respect to the common weights.
All ranks of a group have the same loss, so this is the mean over the groups, as in one process with the same batch.

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
    """Send `sent[s]` rows of x [rows, ...] to each rank s and receive `received[s]` rows from it.

    The adjoint is the exchange in the other direction.
    """

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
    """A network that a group of ranks can walk together; its `cfg` has `heads`."""

    cfg: Any
    sequence: "SequenceGroup | None"


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share the tokens of one clip."""

    group: dist.ProcessGroup
    rank: int  # index of this rank in the group
    size: int

    def attach(self, net: Network) -> None:
        """Make all later walks of this network walks of the group, each rank with its part of the tokens."""
        if net.cfg.heads % self.size:
            raise ValueError(
                f"sequence_parallel={self.size}: does not divide the network's {net.cfg.heads} heads; "
                f"use one of {divisors(net.cfg.heads)}"
            )
        net.sequence = self

    def cut(self, grid: tuple[int, int, int]) -> "Cut":
        """Divide a latent with this grid of patches (F, H, W) among the ranks."""
        axis, sizes = token_shares(grid, self.size)
        # axis is 1 or 2, so that 3 - axis is the other one of H and W, which stays complete.
        return Cut(self, axis, sizes, [grid[0] * grid[3 - axis] * n for n in sizes])


@dataclass(frozen=True, eq=False)
class Cut:
    """A division of a latent among the ranks of a group."""

    sequence: SequenceGroup
    axis: int  # the axis of the grid of patches (F, H, W) that is cut
    sizes: list[int]  # patches along the axis, per rank
    tokens: list[int]  # image tokens, per rank

    def along(self, x: Tensor, axis: int) -> Tensor:
        """Return this rank's part of a tensor that has one or more entries per patch along `axis`."""
        rank, per = self.sequence.rank, x.shape[axis] // sum(self.sizes)
        return x.narrow(axis, per * sum(self.sizes[:rank]), per * self.sizes[rank])

    def part(self, x: Tensor) -> Tensor:
        """Return this rank's part of a latent or of condition channels [B, C, F, H, W]."""
        return self.along(x, self.axis + 2)

    def whole(self, v: Tensor) -> Tensor:
        """Join the parts of a latent of all ranks, on every rank."""
        size, n = self.sequence.size, v.shape[self.axis + 2]
        per = n // self.sizes[self.sequence.rank]  # entries of the latent per patch along the axis
        # Every rank gets a copy of this part: an all-gather of unequal sizes, with a gradient.
        x = v.movedim(self.axis + 2, 0).expand(size, n, -1, -1, -1, -1).flatten(0, 1)
        return self._exchange(x, [n] * size, [per * m for m in self.sizes]).movedim(0, self.axis + 2).contiguous()

    def joined(self, x: Tensor) -> Tensor:
        """Join the image tokens [B, n, D] of all ranks, on every rank, in order of rank."""
        size, n = self.sequence.size, x.shape[1]
        rows = x.transpose(0, 1).expand(size, n, -1, -1).flatten(0, 1)  # every rank gets a copy of this part
        return self._exchange(rows, [n] * size, self.tokens).transpose(0, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention among the tokens of all ranks; q, k, v are [B, n + T, h, d], returns [B, n + T, D].

        The last T tokens are the text, equal on every rank. The image tokens are joined in order of rank, not in the
        order of the full latent, which makes no difference to attention.
        """
        size, rank, n = self.sequence.size, self.sequence.rank, self.tokens[self.sequence.rank]
        text = q.shape[1] - n

        # Tokens on the first axis, so that received rows need no reordering: [s n, 3, B, h/s, d] sent,
        # [L, 3, B, h/s, d] received. The text is not sent: this rank cuts its own heads from it.
        parts = [x.unflatten(2, (size, -1)).permute(2, 1, 0, 3, 4) for x in (q, k, v)]  # [s, n + T, B, h/s, d]
        out = torch.stack([x[:, :n] for x in parts], 2).flatten(0, 1)
        x = self._exchange(out, [n] * size, self.tokens)
        if text:
            x = torch.cat([x, torch.stack([x[rank, n:] for x in parts], 1)])
        q, k, v = (part.transpose(0, 1) for part in x.unbind(1))
        y = attend(q, k, v, mask).transpose(0, 1)  # [L + T, B, D/s]

        # The way back: send each rank its tokens and the text, for this rank's heads.
        if text:
            *image, last = y.split([*self.tokens, text])
            y = torch.cat([part for x in image for part in (x, last)])
        y = self._exchange(y, [m + text for m in self.tokens], [n + text] * size)
        return y.unflatten(0, (size, n + text)).permute(2, 1, 0, 3).flatten(2)

    def _exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Exchange rows with the other ranks of the group; see `Exchange`."""
        return Exchange.apply(x, list(sent), list(received), self.sequence.group)

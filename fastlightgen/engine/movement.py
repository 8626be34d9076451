"""How much of the float32 master weights' movement reaches the bfloat16 weights that the network computes with."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastlightgen.engine import shards
from fastlightgen.parallel import ranks
from fastlightgen.rng import generator

SAMPLES = 2**16  # weights per role and rank, drawn with replacement; chance then moves the share by a few percent
DRAWS = 8  # the purpose of the random positions


class Movement:
    """A fixed sample of this rank's part of a role's weights, and their values at the start."""

    def __init__(self, net: nn.Module, seed: int):
        self.params = [p for p in net.parameters() if p.requires_grad]
        sizes = [shards.parts(p)[0].numel() for p in self.params]
        gen = generator(seed, DRAWS, ranks.rank())
        drawn = torch.randint(sum(sizes), (SAMPLES,), generator=gen).sort().values
        ends = torch.tensor(sizes).cumsum(0)
        bounds = torch.searchsorted(drawn, ends).tolist()  # number of drawn positions before the end of each weight
        self.places = [
            drawn[first:last] - (end - size)
            for first, last, end, size in zip([0, *bounds[:-1]], bounds, ends.tolist(), sizes, strict=True)
        ]
        self.start = self.now()

    @torch.no_grad()
    def now(self) -> tuple[Tensor, Tensor]:
        """Return the sampled masters and the sampled weights that the network computes with, on the CPU in float64."""
        sampled: tuple[list[Tensor], list[Tensor]] = ([], [])
        for p, places in zip(self.params, self.places, strict=True):
            if len(places):  # another rank may hold all of a small weight
                for values, part in zip(sampled, shards.parts(p), strict=True):
                    values.append(part[places.to(part.device)])
        masters, weights = (torch.cat(values).to("cpu", torch.float64) for values in sampled)
        return masters, weights

    def products(self) -> tuple[float, float]:
        """Return <weights' movement, masters' movement> and |masters' movement|^2, both since the start."""
        masters, weights = (now - start for now, start in zip(self.now(), self.start, strict=True))
        return (weights @ masters).item(), (masters @ masters).item()


def realised(movements: Sequence[Movement]) -> list[float | None]:
    """Return of each role the share of its masters' movement that its weights show; None before the first step.

    The share is <w, m> / <m, m>, where w and m are the movements of weights and masters since the start, over the
    samples of all ranks, which call this together. It is 0 if no weight has moved yet, and 1 on average if rounding
    loses nothing. Chance may lift it a little above 1.
    """
    sums = ranks.mean([number for movement in movements for number in movement.products()])
    pairs = zip(sums[::2], sums[1::2], strict=True)
    return [shown / moved if moved else None for shown, moved in pairs]

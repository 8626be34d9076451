"""Two networks that sample as one (Wan2.2 A14B): `high` predicts at the times t >= boundary, `low` below it.

The design, which keeps everything else a matter of one network:
- An expert is an ordinary network of its family. Its training is an ordinary run with a range of times: [boundary, 1]
  for `high`, [0, boundary) for `low`. Draws of t, of scores and of guards stay inside (`Run.bounds`).
- A run of both experts is two runs, RUN/high and then RUN/low, each with its own stages, ranking and checkpoints.
- The rungs of a student's ladder belong to the experts by the same boundary. `high` leaves the ladder at its own rungs
  and needs nobody else. `low` starts from noise, and its frozen partner, the finished `high` student, takes the first
  rungs. So one network more is resident in Stage III of `low`, and nowhere else.
- `TwoExperts` is what samples: it picks the network by the time of the step. Rollouts, clips and commands call it as a
  model.
- On disk a pair is two model folders (folder/experts.py); an export writes them as transformer/ and transformer_2/.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from fastlightgen.models.base import Cond, Stream, VideoDiT
from fastlightgen.models.config import NetworkConfig


class TwoExperts(nn.Module):
    """Both experts, called as one network at one time for the whole batch."""

    def __init__(self, high: VideoDiT, low: VideoDiT, boundary: float):
        super().__init__()
        self.high, self.low, self.boundary = high, low, boundary

    def at(self, t: float | Tensor) -> VideoDiT:
        """The expert for a time: a number, or a tensor whose times all lie on one side of the boundary."""
        if isinstance(t, Tensor):
            above = (t >= self.boundary).flatten().tolist()
            assert len(set(above)) == 1, "one call is of one expert"
            return self.high if above[0] else self.low
        return self.high if t >= self.boundary else self.low

    def forward(self, x_t: Tensor, t: float | Tensor, cond: Cond, keep: Sequence[int] | None = None) -> Tensor:
        return self.at(t)(x_t, t, cond, keep)

    def walk(self, x_t: Tensor, t: float | Tensor, streams: Sequence[Stream]) -> list[Tensor]:
        return self.at(t).walk(x_t, t, streams)

    def with_given(self, x: Tensor, cond: Cond) -> Tensor:
        return self.low.with_given(x, cond)

    @property
    def family(self) -> str:
        return self.high.family

    @property
    def cfg(self) -> NetworkConfig:
        return self.high.cfg

    @property
    def config(self) -> dict:
        """config.json of the high-noise expert; the other one may have another number of blocks."""
        return self.high.config

    @property
    def released(self) -> dict[str, float]:
        return self.high.released

    @property
    def embeds_guidance(self) -> bool:
        return self.high.embeds_guidance

    @property
    def num_blocks(self) -> int:
        """The blocks of both."""
        return self.high.num_blocks + self.low.num_blocks

    def block_flops(self, x_t: Tensor, cond: Cond) -> list[int]:
        """Those of one step of the larger expert."""
        return max((net.block_flops(x_t, cond) for net in (self.high, self.low)), key=sum)

    @property
    def block_calls(self) -> int:
        return self.high.block_calls + self.low.block_calls


Model = VideoDiT | TwoExperts  # whatever samples


def networks_of(model: Model) -> list[VideoDiT]:
    """One network, or both experts."""
    return [model.high, model.low] if isinstance(model, TwoExperts) else [model]


def predictor(model: Model, t: float) -> VideoDiT:
    """The network that predicts at a time."""
    return model.at(t) if isinstance(model, TwoExperts) else model

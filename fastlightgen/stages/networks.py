"""The networks of Stage III, and the predictions that its losses take of them.

Shapes: x_t, v [B, C, F, H, W]; t [B].
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastlightgen.data.source import Batch
from fastlightgen.models.base import Cond, Stream, VideoDiT
from fastlightgen.models.lora import lora_on
from fastlightgen.models.streams import TextKeys


@dataclass
class Networks:
    """The four predictions of Stage III. `fake_net` may be `teacher` itself with LoRA adapters switched on."""

    student: VideoDiT  # G, pruned
    teacher: VideoDiT  # the Stage II network, frozen: weak with `keep`, strong with all blocks
    keep: Sequence[int]
    fake_net: VideoDiT
    fake_keep: Sequence[int] | None
    fake_trained: nn.Module  # what the critic's optimizer holds
    lora: bool
    original: VideoDiT | None  # the strong teacher where it is not the Stage II network
    null_keys: TextKeys = field(default_factory=dict)  # the frozen teacher's keys and values of the null prompt

    def fake(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with lora_on(self.fake_net) if self.lora else nullcontext():
            return self.fake_net(x_t, t, cond, self.fake_keep)

    @torch.no_grad()
    def real(self, x_t: Tensor, t: Tensor, batch: Batch) -> list[Tensor]:
        """v_p(c), v_p(null), v_u(c): one walk of the Stage II weights."""
        streams = [Stream(batch.cond, self.keep), Stream(batch.null, self.keep, text_keys=self.null_keys)]
        if self.original is None:
            return self.teacher.walk(x_t, t, [*streams, Stream(batch.cond)])
        return [*self.teacher.walk(x_t, t, streams), self.original(x_t, t, batch.cond)]

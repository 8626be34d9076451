"""The networks of Stage III and their predictions.

Shapes: x_t, v [B, C, F, H, W]; t [B].
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastlightgen.data.source import Batch
from fastlightgen.guidance import guided
from fastlightgen.models.base import Cond, Features, Stream, VideoDiT
from fastlightgen.models.lora import lora_on
from fastlightgen.models.streams import TextKeys
from fastlightgen.stages.discriminator import Discriminator


@dataclass
class Networks:
    """The networks behind the four predictions of Stage III. With LoRA `fake_net` is the teacher plus adapters."""

    student: VideoDiT  # G, pruned
    teacher: VideoDiT  # the Stage II network, frozen: weak with `keep`, strong with all blocks
    keep: Sequence[int] | None  # the blocks of the pruned path; None: all
    fake_net: VideoDiT
    fake_keep: Sequence[int] | None  # the blocks that the critic runs; None: all that it has
    fake_trained: nn.Module  # the module that the critic's optimizer trains
    lora: bool
    original: VideoDiT | None  # the strong teacher, if it is not the Stage II network
    scale: float | None = None  # teacher_guidance=embedded: the scale that all of them read; None: the null prompt
    null_keys: TextKeys = field(default_factory=dict)  # the frozen teacher's keys and values of the null prompt
    discriminator: Discriminator | None = None  # a part of fake_net
    trained: nn.Module | None = None  # the module that the student's optimizer trains; None: the student
    partner: VideoDiT | None = None  # of the expert for the lower times: the frozen student that begins its rollouts
    alpha_strong: float = 1.0  # lora: strength of the adapters in the critic's prediction
    alpha_weak: float = 0.0  # lora: strength of the same adapters in the teacher's (`guidance` and `plain`)

    def adapted(self, net: VideoDiT, strength: float) -> AbstractContextManager[None]:
        """Context in which the adapters have a strength; without adapters it does nothing."""
        return lora_on(net, strength) if self.lora and strength else nullcontext()

    def fake(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return the critic's prediction."""
        with self.adapted(self.fake_net, self.alpha_strong):
            return self.fake_net(x_t, t, cond, self.fake_keep)

    def judged(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """Return the critic's prediction, and its discriminator's logits [heads, B] of the same walk."""
        assert self.discriminator is not None
        features = Features(self.discriminator.blocks)
        with self.adapted(self.fake_net, self.alpha_strong):
            (v,) = self.fake_net.walk(x_t, t, [Stream(cond, self.fake_keep, grad=True, features=features)])
        return v, self.discriminator(features)

    @torch.no_grad()
    def real(self, x_t: Tensor, t: Tensor, batch: Batch) -> list[Tensor]:
        """Return v_p(c), v_p(null), v_u(c), from one walk of the Stage II network.

        With embedded guidance v_p(c) is guided already and stands for v_p(null) too, so that Eq. 9 becomes
        v_p(c) + beta2 (v_u(c) - v_p(c)), whatever beta1.
        """
        if self.scale is not None:
            v_pc, v_uc = self.matching(x_t, t, batch)
            return [v_pc, v_pc, v_uc]
        streams = [Stream(batch.cond, self.keep), Stream(batch.null, self.keep, text_keys=self.null_keys)]
        if self.original is None:
            return self.teacher.walk(x_t, t, [*streams, Stream(batch.cond)])
        return [*self.teacher.walk(x_t, t, streams), self.original(x_t, t, batch.cond)]

    @torch.no_grad()
    def matching(self, x_t: Tensor, t: Tensor, batch: Batch) -> list[Tensor]:
        """Return v_p(c), v_u(c)."""
        weak = Stream(batch.cond, self.keep)
        if self.original is None:
            return self.teacher.walk(x_t, t, [weak, Stream(batch.cond)])
        return [*self.teacher.walk(x_t, t, [weak]), self.original(x_t, t, batch.cond)]

    @torch.no_grad()
    def guidance(self, x_t: Tensor, t: Tensor, batch: Batch) -> list[Tensor]:
        """Return v_p(c), v_p(null)."""
        null = Stream(batch.null, self.keep, text_keys=None if self.alpha_weak else self.null_keys)
        with self.adapted(self.teacher, self.alpha_weak):
            return self.teacher.walk(x_t, t, [Stream(batch.cond, self.keep), null])

    def plain(self, x_t: Tensor, t: Tensor, batch: Batch, scale: float) -> list[Tensor]:
        """Return v(c), v(null) for plain guidance; with scale 1 no null prompt is evaluated, and v(c) stands for it."""
        if scale != 1:
            return self.guidance(x_t, t, batch)
        with torch.no_grad(), self.adapted(self.teacher, self.alpha_weak):
            return self.teacher.walk(x_t, t, [Stream(batch.cond, self.keep)]) * 2


@torch.no_grad()
def guided_prediction(net: VideoDiT, x_t: Tensor, t: Tensor, cond: Cond, null: Cond, scale: float) -> Tensor:
    """A frozen network's prediction with classifier-free guidance, as a target for a network that needs none.

    Guidance distillation (Meng et al. 2022, arXiv 2210.03142, their first stage) for one fixed scale. A clip whose
    prompt was dropped gets the plain prediction of the empty prompt, whatever the scale.
    """
    if scale == 1:
        return net(x_t, t, cond)
    v_cond, v_null = net.walk(x_t, t, [Stream(cond), Stream(null)])
    return guided(v_cond, v_null, scale)

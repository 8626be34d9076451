"""diffusers' Wan transformer with the calls that the stages make of our networks: a training step as others write it.

Every prediction is a call of its own, skipped blocks are taken out of the list of blocks for the call. Shapes:
x_t, v [B, C, F, H, W]; t [B].
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastlightgen.models.base import Cond, Stream, VideoDiT, gradient


class Stock(nn.Module):
    """diffusers' WanTransformer3DModel in the place of our WanModel."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    @classmethod
    def of(cls, ours: VideoDiT) -> "Stock":
        """The same configuration and the same weights, on the same device."""
        from diffusers import WanTransformer3DModel

        config = {key: value for key, value in ours.config.items() if not key.startswith("_")}
        with torch.device(ours.device):
            model = WanTransformer3DModel(**config)
        model.load_state_dict(ours.state_dict())
        return cls(model)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.blocks

    @property
    def num_blocks(self) -> int:
        return len(self.model.blocks)

    @property
    def checkpointing(self) -> bool:
        return self.model.is_gradient_checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        (self.model.enable_gradient_checkpointing if on else self.model.disable_gradient_checkpointing)()

    def prune(self, keep: Sequence[int]) -> "Stock":
        self.model.blocks = nn.ModuleList([self.model.blocks[i] for i in keep])
        return self

    def walk(self, x_t: Tensor, t: Tensor | float, streams: Sequence[Stream]) -> list[Tensor]:
        out = []
        for stream in streams:
            with gradient(stream.grad):
                out.append(self(x_t, t, stream.cond, stream.keep))
        return out

    def forward(self, x_t: Tensor, t: Tensor | float, cond: Cond, keep: Sequence[int] | None = None) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float32, device=x_t.device).expand(len(x_t))
        blocks = self.model.blocks
        if keep is not None:
            self.model.blocks = nn.ModuleList([blocks[i] for i in keep])
        try:
            return self.model(x_t, 1000 * t, cond.text, return_dict=False)[0]
        finally:
            self.model.blocks = blocks

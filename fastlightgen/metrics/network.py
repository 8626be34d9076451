"""Features of clips from a network that the user gives as a file, for the distances that publications report."""

from typing import Any

import torch
from torch import Tensor

# The file i3d_torchscript.pt, with which FVD is usually computed, asks for these; it then scales and resizes by itself.
OPTIONS = ("rescale", "resize", "return_features")


class Network:
    """A network that gets one clip as float32 [1,3,F,H,W] in 0..255 and returns its features [1,D]."""

    def __init__(self, run: Any, name: str, device: torch.device) -> None:
        self.run, self.name, self.device = run, name, device
        schema = getattr(getattr(run, "forward", None), "schema", None)
        known = {argument.name for argument in schema.arguments} if schema else set()
        self.options = {option: True for option in OPTIONS if option in known}

    @torch.no_grad()
    def features(self, frames: Tensor) -> Tensor:
        """The features [D], float64, of frames uint8 [F,H,W,3]."""
        clip = frames.to(self.device).permute(3, 0, 1, 2)[None].float()
        try:
            found = self.run(clip, **self.options)
        except RuntimeError as err:
            said = " ".join(str(err).split())
            raise ValueError(
                f"{self.name}: failed on a clip {list(clip.shape)}: ...{said[-300:]}; give size="
            ) from None
        if not isinstance(found, Tensor) or found.numel() != found.shape[-1] or not torch.isfinite(found).all():
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{self.name}: returned {got} for one clip; wanted finite features [1,D]")
        return found.flatten().double().cpu()

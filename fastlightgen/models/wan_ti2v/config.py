"""The configuration of Wan2.2 TI2V's transformer, and the files that describe one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastlightgen.models.wan.layers import WanConfig

CHANNELS = 48  # channels of a latent of Wan2.2's VAE, which only this network reads
MARK = "expand_timesteps"  # the key that says so elsewhere: in diffusers' model_index.json, and in our config.json


def is_ti2v(values: Mapping) -> bool:
    """Does a config.json, an original config.json or a model_index.json of Wan describe this network?"""
    own = values.get("in_channels") == values.get("out_channels") == CHANNELS
    return own or bool(values.get(MARK)) or values.get("model_type") == "ti2v"


@dataclass(frozen=True)
class TI2VConfig(WanConfig):
    """The fields of diffusers' WanTransformer3DModel config.json, and the mark."""

    expand_timesteps: bool = True

    def __post_init__(self):
        super().__post_init__()
        for name, got, wanted in (
            ("in_channels", self.in_channels, self.out_channels),
            ("image_dim", self.image_dim, None),
            (MARK, self.expand_timesteps, True),
        ):
            if got != wanted:
                raise ValueError(f"Wan2.2 TI2V config: {name} is {got!r}; only {wanted!r} is supported")

    def record(self) -> dict[str, Any]:
        """Contents of config.json: the mark, which diffusers' class does not know, only if the channels do not tell."""
        values = super().record()
        mark = values.pop(MARK)
        return values if is_ti2v(values) else values | {MARK: mark}

    @property
    def given_frames(self) -> int:
        return 1

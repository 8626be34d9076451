"""The record of a model family: everything that the rest of the program asks about one kind of network."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from torch import Tensor

from fastlightgen.models.base import Cond, VideoDiT
from fastlightgen.models.config import NetworkConfig
from fastlightgen.models.cost import Network
from fastlightgen.models.encoding import Encoding
from fastlightgen.models.geometry import Geometry
from fastlightgen.models.keys import Format
from fastlightgen.parallel.shares import Part

# Configuration, latent (F, H, W), text tokens, fused kernels or not, this GPU's part of the tokens -> cost.
Cost = Callable[[Mapping, tuple[int, int, int], int, bool, Part], Network]
# Configuration, x_t, t, condition -> arguments of the forward method of diffusers' class.
StockInputs = Callable[[Any, Tensor, Tensor, Cond], dict[str, Any]]


@dataclass(frozen=True)
class Clips:
    """The clips that a family's released weights were trained on."""

    fps: float  # frames per second
    frames: int
    buckets: tuple[tuple[int, int], ...]  # height and width in pixels; the first is the usual one

    @property
    def size(self) -> str:
        """The usual size, as commands read it."""
        height, width = self.buckets[0]
        return f"{height}x{width}x{self.frames}"


@dataclass(frozen=True, kw_only=True)
class Family:
    """One folder of models/ describes itself with this record, and one line of families.py registers it."""

    name: str  # in fastlightgen.json and in caches
    title: str  # in messages

    # The network.
    config: type[NetworkConfig]
    network: type[VideoDiT]
    lists: Mapping[str, str]  # the network's lists of blocks in order, and the key of config.json that counts each
    cost: Cost
    text_tokens: int  # of a prompt, where the planner is not given a number
    cond: type[Cond] = Cond

    # Its weights on disk.
    signs: Mapping[str, str]  # prefix of a key that only this family's weights have -> the format they are in
    original: Format | None = None  # the format of the original repository
    unused: Callable[[Mapping], set[str]] = lambda config: set()  # keys that files may hold and the network leaves

    # Its pipelines in diffusers.
    geometry: Geometry
    clips: Clips
    pipelines: Mapping[str, bool]  # pipeline class -> does it start from a first frame?
    encoding: type[Encoding]
    packages: Mapping[str, str] = field(default_factory=dict)  # packages that its pipelines need -> what for
    interface: tuple[str, ...]  # keys of config.json that the pipeline's other parts depend on
    stock_inputs: StockInputs
    sets_sigmas: bool  # its pipelines hand 1 - i / N to the scheduler; others give it N and leave it the spacing
    cfg_argument: str  # argument of its pipelines that scales classifier-free guidance: 1 turns it off
    vae_memory: tuple[float, float]  # bytes of the VAE in float32: weights, widest moment of decoding in tiles

    @property
    def config_class(self) -> str:
        """The network's class in diffusers: `_class_name` of config.json."""
        return self.network.config_class

    def settings(self, config: Mapping) -> NetworkConfig:
        """A diffusers configuration, with defaults for what it leaves out."""
        check_config(config, self.config)
        return self.config(**{f.name: config[f.name] for f in fields(self.config) if f.name in config})


def check_config(config: Mapping, kind: type[NetworkConfig]) -> None:
    """No key that the network does not know (diffusers' own notes start with _), and whole numbers where sizes are."""
    defaults = {f.name: None if f.default is MISSING else f.default for f in fields(kind)}
    for key, value in config.items():
        if key not in defaults and not key.startswith("_") and value is not None:
            raise ValueError(
                f"config.json: {key}={value!r} is not a key of this network; remove it if the weights do without it"
            )
        least = 0 if key.endswith("_layers") else 1  # a student may have lost all blocks of a list
        if type(defaults.get(key)) is int and not (type(value) is int and value >= least):
            raise ValueError(f"config.json: {key} is {value!r}; wanted a whole number from {least} up")

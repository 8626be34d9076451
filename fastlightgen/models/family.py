"""The record of a model family: the classes, functions and constants that the rest of the program needs to know."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from torch import Tensor

from fastlightgen.files.schema import Shape, flag, inside, items, maybe, number, shown, text, whole
from fastlightgen.models.base import Cond, VideoDiT
from fastlightgen.models.config import NetworkConfig
from fastlightgen.models.cost import Network
from fastlightgen.models.encoding import Encoding
from fastlightgen.models.geometry import Geometry
from fastlightgen.models.graph import Comfy
from fastlightgen.models.keys import Format
from fastlightgen.parallel.shares import Part

DEEPEST, LARGEST = 1_000, 1_000_000  # number of blocks, size of a dimension

# (configuration, latent (F, H, W), number of text tokens, fused kernels?, this GPU's part of the tokens) -> cost.
Cost = Callable[[Mapping, tuple[int, int, int], int, bool, Part], Network]
# (configuration, x_t, t, condition) -> arguments of the forward method of diffusers' class.
StockInputs = Callable[[Any, Tensor, Tensor, Cond], dict[str, Any]]


@dataclass(frozen=True)
class Clips:
    """The clips that a family's released weights were trained on."""

    fps: float  # frames per second
    frames: int
    buckets: tuple[tuple[int, int], ...]  # (height, width) in pixels; the first is the default

    @property
    def size(self) -> str:
        """The default size as commands write it: HEIGHTxWIDTHxFRAMES."""
        height, width = self.buckets[0]
        return f"{height}x{width}x{self.frames}"

    def at(self, size: str) -> "Clips":
        """The same clips at another size, in landscape and in portrait."""
        height, width, frames = map(int, size.split("x"))
        return replace(self, frames=frames, buckets=((height, width), (width, height)))

    def of(self, card: Mapping[str, Any]) -> "Clips":
        """The clips of a trained model's card; these for a model that names none."""
        own = card.get("clips")
        return replace(self.at(own["size"]), fps=own["fps"]) if own else self


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: its folder in models/ fills in this record, and families.py registers it."""

    name: str  # the name in fastlightgen.json and in caches
    title: str  # the name in messages

    # The network.
    config: type[NetworkConfig]
    network: type[VideoDiT]
    lists: Mapping[str, str]  # block lists of the network, in order -> the key of config.json with their length
    cost: Cost
    text_tokens: int  # tokens of a prompt, if the planner has no other number
    cond: type[Cond] = Cond
    # A family that shares its classes in diffusers with another one says which config.json, original config.json and
    # model_index.json are its own; the registry asks it first. None: all that name its classes.
    owns: Callable[[Mapping], bool] | None = None

    # Its weights on disk.
    signs: Mapping[str, str]  # prefix of a key that only this family's weights have -> name of their format
    original: Format | None = None  # the format of the original repository
    unused: Callable[[Mapping], set[str]] = lambda config: set()  # keys that files may hold and loading skips

    # Its pipelines in diffusers.
    geometry: Geometry
    clips: Clips
    # Pipeline class -> True if it starts from a first frame, False if not, None if it takes one or none.
    pipelines: Mapping[str, bool | None]
    negatives: Mapping[str, str] = field(default_factory=dict)  # pipeline class -> negative prompt that is published
    encoding: type[Encoding]
    libraries: tuple[str, ...] = ()  # modules of its pipelines' classes, beside diffusers and transformers
    packages: Mapping[str, str] = field(default_factory=dict)  # extra packages of the pipelines -> reason, for errors
    interface: tuple[str, ...]  # keys of config.json that must match the pipeline's other parts
    stock_inputs: StockInputs
    sets_sigmas: bool  # True: its pipelines pass sigmas 1 - i / N to the scheduler; False: they pass N alone
    cfg_argument: str  # argument of its pipelines that scales classifier-free guidance; 1 turns it off
    converted_shift: float | None = None  # the time shift that diffusers' converter writes for each of its models
    guider: str = ""  # a part of its pipelines that has `cfg_argument` as a setting, where they do not take it
    sized: frozenset[str] = frozenset()  # pipeline classes that take no height and width: the picture decides
    comfy: Comfy | None = None  # what ComfyUI assumes of its networks
    vae_memory: tuple[float, float]  # bytes of the VAE in float32: its weights, and the peak of tiled decoding
    tiled_frames: int = 0  # frames of the clip with that peak, if tiles divide the picture alone; 0: it is any clip's

    @property
    def config_class(self) -> str:
        """The network's class in diffusers: `_class_name` of config.json."""
        return self.network.config_class

    def settings(self, config: Mapping) -> NetworkConfig:
        """Check a diffusers configuration and fill in defaults for absent keys."""
        check_config(config, self.config)
        return self.config(**{f.name: config[f.name] for f in fields(self.config) if f.name in config})


def check_config(config: Mapping, kind: type[NetworkConfig]) -> None:
    """Raise ValueError for an unknown key (except diffusers' notes, which start with _) or a value of another kind."""
    types = get_type_hints(kind)
    for key, value in config.items():
        if key.startswith("_"):
            continue
        if key not in types:
            if value is None:
                continue
            raise ValueError(
                f"config.json: {key}={shown(value)} is not a key of this network; remove it if the weights do "
                "without it"
            )
        if found := shape_of(key, types[key])(list(value) if isinstance(value, tuple) else value):
            raise ValueError(f"config.json: {inside(key, found)}")


def shape_of(key: str, kind: Any) -> Shape:
    """The shape of a key's values, from its type in the configuration's class."""
    if isinstance(kind, UnionType):
        inner = next(k for k in get_args(kind) if k is not NoneType)
        return maybe(shape_of(key, inner))
    if get_origin(kind) is tuple:
        args = get_args(kind)
        most, least = (LARGEST, 0) if args[-1] is ... else (len(args), len(args))
        return items(whole(1, LARGEST), most=most, least=least)
    if kind is int:  # pruning may delete all blocks of a list
        return whole(0, DEEPEST) if key.endswith("_layers") else whole(1, LARGEST)
    return {float: number(0, LARGEST), bool: flag, str: text(100)}[kind]

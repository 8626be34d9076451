"""The registry of model families, and functions that find the family of a config.json, a pipeline or a checkpoint."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from fastlightgen.models.base import Cond, VideoDiT
from fastlightgen.models.cost import Network
from fastlightgen.models.family import Family
from fastlightgen.models.hunyuan.family import HUNYUAN
from fastlightgen.models.hunyuan15.family import HUNYUAN15
from fastlightgen.models.wan.family import WAN
from fastlightgen.models.wan_ti2v.family import WAN_TI2V
from fastlightgen.parallel.shares import WHOLE, Part

# `recognise` takes the first family with a sign: HunyuanVideo-1.5's weights also have HunyuanVideo's text refiner.
FAMILIES: dict[str, Family] = {family.name: family for family in (WAN, WAN_TI2V, HUNYUAN15, HUNYUAN)}
DEFAULT = WAN.config_class  # the class of a config.json without _class_name
# Prefixes of keys that no video transformer has -> the kind of network that has them.
OTHERS = {"down_blocks.": "a UNet", "decoder.": "a VAE", "encoder.": "an encoder"}


def register(family: Family) -> None:
    """Add a family to the registry; every command then knows it."""
    for other in FAMILIES.values():
        shared = other.config_class == family.config_class or other.pipelines.keys() & family.pipelines.keys()
        assert other.name != family.name and (family.owns or not shared), family.name
    FAMILIES[family.name] = family


def owner(values: Mapping, named: Iterable[Family]) -> Family | None:
    """The family of a file with these values, among those whose class it names."""
    found = sorted(named, key=lambda family: family.owns is None)
    return next((family for family in found if family.owns is None or family.owns(values)), None)


def family_of(config: Mapping) -> Family:
    """The family of a diffusers config.json."""
    name = config.get("_class_name", DEFAULT)
    if family := owner(config, [f for f in FAMILIES.values() if f.config_class == name]):
        return family
    known = [f.config_class for f in FAMILIES.values()]
    known += [f.original.network for f in FAMILIES.values() if f.original]
    raise ValueError(f"config.json: _class_name is {name!r}; supported: {', '.join(dict.fromkeys(known))}")


def family_of_original(config: Mapping) -> Family | None:
    """The family of an original repository's config.json; None if it is no such file."""
    name = config.get("_class_name", "")
    return owner(config, [f for f in FAMILIES.values() if f.original and f.original.network == name])


def family_of_pipeline(index: Mapping) -> Family | None:
    """The family of a pipeline's model_index.json; None if no family lists its class."""
    return owner(index, [f for f in FAMILIES.values() if index.get("_class_name") in f.pipelines])


def cond_of(description: Mapping) -> type[Cond]:
    """The class of the conditions in a cache with this description."""
    name = description.get("family")
    return FAMILIES[name].cond if name in FAMILIES else Cond  # the stage reports the unknown family later


def cond_fields(description: Mapping) -> list[str]:
    """The condition fields that a cache with this description may hold."""
    return [f.name for f in fields(cond_of(description)) if f.name != "guidance"]  # a sampler sets guidance


def original_files() -> list[str]:
    """Names of weight files that the families' original repositories use."""
    return [name for f in FAMILIES.values() if f.original for name in f.original.files]


def recognise(keys: Iterable[str]) -> str:
    """Name the kind of network that has these keys, for messages; "" if it is unknown."""
    signs = {sign: f"{f.title} ({form} format)" for f in FAMILIES.values() for sign, form in f.signs.items()} | OTHERS
    known = list(keys)
    return next((name for sign, name in signs.items() if any(key.startswith(sign) for key in known)), "")


def build(config: Mapping, seed: int | None = None) -> VideoDiT:
    """Build a network from a diffusers config; `seed` fixes its random weights, None draws them from torch's state."""
    family = family_of(config)
    cfg = family.settings(config)
    if seed is None:
        return family.network(cfg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return family.network(cfg)


def narrowed(config: Mapping, heads: int, ffn_width: int) -> dict[str, Any]:
    """config.json of the same network with fewer heads in its blocks, and a narrower feed-forward."""
    family = family_of(config)
    return {"_class_name": family.config_class} | family.settings(config).narrowed(heads, ffn_width).record()


def block_counts(config: Mapping) -> dict[str, int]:
    """Number of blocks in each block list of a network, by the list's name in diffusers."""
    return {name: config[key] for name, key in family_of(config).lists.items()}


def depth(config: Mapping) -> int:
    """Number of blocks of a network."""
    return sum(block_counts(config).values())


def network(
    config: Mapping, latent: tuple[int, int, int], text_tokens: int = 0, fused: bool = True, part: Part = WHOLE
) -> Network:
    """The cost of the network of a diffusers config.json; `text_tokens` 0 stands for the family's usual number.

    `fused`: the fused GPU kernels run, which keep only their inputs for the backward pass. The reference operators on
    the CPU also keep intermediate results, many of them in float32.
    """
    family = family_of(config)
    source = (family.cost, config, latent, text_tokens or family.text_tokens, fused)
    try:
        return replace(family.cost(*source[1:], part), source=source, part=part)
    except KeyError as err:
        raise ValueError(
            f"config.json: {err.args[0]} is missing; wanted a {family.config_class} configuration of diffusers"
        ) from None


def image_states(net: Network) -> int:
    """Elements of the hidden states of all image tokens, also where processes share them: kept states are joined."""
    return math.prod(FAMILIES[net.family].geometry.grid(net.latent)) * net.width

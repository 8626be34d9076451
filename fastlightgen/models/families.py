"""The registry of model families, and which of them a diffusers config.json or pipeline class means."""

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace

import torch

from fastlightgen.models.base import Cond, VideoDiT
from fastlightgen.models.cost import Network
from fastlightgen.models.family import Family
from fastlightgen.models.hunyuan.family import HUNYUAN
from fastlightgen.models.wan.family import WAN
from fastlightgen.parallel.shares import WHOLE, Part

FAMILIES: dict[str, Family] = {family.name: family for family in (WAN, HUNYUAN)}
DEFAULT = WAN.config_class  # of a config.json without _class_name
# Prefixes of keys that no video transformer has, and the network that has them.
OTHERS = {"down_blocks.": "a UNet", "decoder.": "a VAE", "encoder.": "an encoder"}


def register(family: Family) -> None:
    """Make one more family known everywhere."""
    for other in FAMILIES.values():
        shared = other.pipelines.keys() & family.pipelines.keys()
        assert other.name != family.name and other.config_class != family.config_class and not shared, family.name
    FAMILIES[family.name] = family


def family_of(config: Mapping) -> Family:
    """The family of the network that a diffusers config.json describes."""
    name = config.get("_class_name", DEFAULT)
    for family in FAMILIES.values():
        if family.config_class == name:
            return family
    known = [f.config_class for f in FAMILIES.values()]
    known += [f.original.network for f in FAMILIES.values() if f.original]
    raise ValueError(f"config.json: _class_name is {name!r}; supported: {', '.join(known)}")


def family_of_original(config: Mapping) -> Family | None:
    """The family of the network that an original repository's config.json describes; None if it is none of those."""
    formats = {f.original.network: f for f in FAMILIES.values() if f.original}
    return formats.get(config.get("_class_name", ""))


def family_of_pipeline(name: str) -> Family | None:
    """The family of a pipeline class of diffusers."""
    return next((family for family in FAMILIES.values() if name in family.pipelines), None)


def cond_of(description: Mapping) -> type[Cond]:
    """The class of the conditions in a cache that describes itself so."""
    name = description.get("family")
    return FAMILIES[name].cond if name in FAMILIES else Cond  # a stage refuses the cache of an unknown family itself


def cond_fields(description: Mapping) -> list[str]:
    """The fields of the conditions that such a cache may hold."""
    return [f.name for f in fields(cond_of(description)) if f.name != "guidance"]  # which a sampler adds


def recognise(keys: Iterable[str]) -> str:
    """The network that has such keys, in words; "" if it is unknown."""
    signs = {sign: f"{f.title} ({form} format)" for f in FAMILIES.values() for sign, form in f.signs.items()} | OTHERS
    known = list(keys)
    return next((name for sign, name in signs.items() if any(key.startswith(sign) for key in known)), "")


def build(config: Mapping, seed: int | None = None) -> VideoDiT:
    """A network from a diffusers config; random weights are drawn from `seed`."""
    family = family_of(config)
    cfg = family.settings(config)
    if seed is None:
        return family.network(cfg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return family.network(cfg)


def block_counts(config: Mapping) -> dict[str, int]:
    """How many blocks each list of a network has."""
    return {name: config[key] for name, key in family_of(config).lists.items()}


def depth(config: Mapping) -> int:
    """How many blocks a network has."""
    return sum(block_counts(config).values())


def network(
    config: Mapping, latent: tuple[int, int, int], text_tokens: int = 0, fused: bool = True, part: Part = WHOLE
) -> Network:
    """The cost of the network that a diffusers config.json describes; text_tokens 0: the family's usual number.

    `fused`: with the kernels of a GPU, which keep their inputs; the CPU's reference operators are torch's own, which
    keep what lies between them too, much of it in float32.
    """
    family = family_of(config)
    source = (family.cost, config, latent, text_tokens or family.text_tokens, fused)
    try:
        return replace(family.cost(*source[1:], part), source=source)
    except KeyError as err:
        raise ValueError(
            f"config.json: {err.args[0]} is missing; wanted a {family.config_class} configuration of diffusers"
        ) from None

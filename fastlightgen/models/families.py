"""The model families: which network and which cost a diffusers config.json describes."""

from collections.abc import Mapping
from dataclasses import fields, replace

import torch

from fastlightgen.models.base import VideoDiT
from fastlightgen.models.cost import Network
from fastlightgen.models.folder.original import BY_ORIGINAL
from fastlightgen.models.hunyuan.cost import hunyuan
from fastlightgen.models.hunyuan.model import HunyuanConfig, HunyuanModel
from fastlightgen.models.wan.cost import wan
from fastlightgen.models.wan.model import WanConfig, WanModel
from fastlightgen.parallel.shares import WHOLE, Part

NETWORKS = {  # _class_name of config.json
    WanModel.config_class: (WanConfig, WanModel),
    HunyuanModel.config_class: (HunyuanConfig, HunyuanModel),
}


def build(config: Mapping, seed: int | None = None) -> VideoDiT:
    """A network from a diffusers config; random weights are drawn from `seed`."""
    cfg, network = settings(config)
    if seed is None:
        return network(cfg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return network(cfg)


def settings(config: Mapping) -> tuple[WanConfig | HunyuanConfig, type[VideoDiT]]:
    """A diffusers config, with defaults for what it leaves out, and the class that takes it."""
    name = config.get("_class_name", WanModel.config_class)
    if name not in NETWORKS:
        raise ValueError(f"config.json: _class_name is {name!r}; supported: {', '.join([*NETWORKS, *BY_ORIGINAL])}")
    kind, network = NETWORKS[name]
    check_config(config, kind)
    return kind(**{f.name: config[f.name] for f in fields(kind) if f.name in config}), network


def check_config(config: Mapping, kind: type) -> None:
    """No key that the network does not know (diffusers' own notes start with _), and whole numbers where sizes are."""
    defaults = {f.name: f.default for f in fields(kind)}
    for key, value in config.items():
        if key not in defaults and not key.startswith("_") and value is not None:
            raise ValueError(
                f"config.json: {key}={value!r} is not a key of this network; remove it if the weights do without it"
            )
        least = 0 if key.endswith("_layers") else 1  # a student may have lost all its single blocks
        if type(defaults.get(key)) is int and not (type(value) is int and value >= least):
            raise ValueError(f"config.json: {key} is {value!r}; wanted a whole number from {least} up")


COSTS = {WanModel.config_class: (wan, 512), HunyuanModel.config_class: (hunyuan, 256)}


def network(
    config: Mapping, latent: tuple[int, int, int], text_tokens: int = 0, fused: bool = True, part: Part = WHOLE
) -> Network:
    """The cost of the network that a diffusers config.json describes; text_tokens 0: what its family is used with.

    `fused`: with the kernels of a GPU, which keep their inputs; the CPU's reference operators are torch's own, which
    keep what lies between them too, much of it in float32.
    """
    name = config.get("_class_name", "WanTransformer3DModel")
    if name not in COSTS:
        raise ValueError(f"config.json: _class_name is {name!r}; wanted one of {', '.join(COSTS)}")
    make, tokens = COSTS[name]
    source = (make, config, latent, text_tokens or tokens, fused)
    try:
        return replace(make(*source[1:], part), source=source)
    except KeyError as err:
        raise ValueError(f"config.json: {err.args[0]} is missing; wanted a {name} configuration of diffusers") from None

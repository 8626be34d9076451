"""The original repositories' model folders (Wan2.1, HunyuanVideo): their configurations read, their format written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlightgen.atomic import write_json
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.folder.files import replacing, write_tensors
from fastlightgen.models.hunyuan.keys import hunyuan_keys
from fastlightgen.models.keys import Piece, Table, inverse
from fastlightgen.models.wan.keys import wan_table

SHARD_BYTES = 5 * 10**9
IMAGE_DIM = 1280  # of CLIP ViT-H, written into the original Wan's code


@dataclass(frozen=True)
class Format:
    """An original network class beside diffusers' class for the same network."""

    original: str
    diffusers: str
    keys: Callable[[Mapping], Table]  # diffusers configuration -> key table
    same: dict[str, str]  # original field -> diffusers field with the same values
    width: str  # original field for heads x head_dim
    heads: str
    defaults: dict[str, Any]  # what the original class takes where config.json says nothing
    fixed: dict[str, Any]  # original fields that are supported with this value only


WAN = Format(
    original="WanModel",
    diffusers="WanTransformer3DModel",
    keys=wan_table,
    same={
        "patch_size": "patch_size",
        "in_dim": "in_channels",
        "out_dim": "out_channels",
        "ffn_dim": "ffn_dim",
        "freq_dim": "freq_dim",
        "text_dim": "text_dim",
        "num_heads": "num_attention_heads",
        "num_layers": "num_layers",
        "cross_attn_norm": "cross_attn_norm",
        "eps": "eps",
    },
    width="dim",
    heads="num_heads",
    defaults={"model_type": "t2v", "dim": 2048, "ffn_dim": 8192, "num_heads": 16, "num_layers": 32},
    fixed={"text_len": 512, "qk_norm": True, "window_size": [-1, -1]},
)
HUNYUAN = Format(
    original="HYVideoDiffusionTransformer",
    diffusers="HunyuanVideoTransformer3DModel",
    keys=hunyuan_keys,
    same={
        "in_channels": "in_channels",
        "out_channels": "out_channels",
        "heads_num": "num_attention_heads",
        "mlp_width_ratio": "mlp_ratio",
        "mm_double_blocks_depth": "num_layers",
        "mm_single_blocks_depth": "num_single_layers",
        "rope_dim_list": "rope_axes_dim",
        "rope_theta": "rope_theta",
        "guidance_embed": "guidance_embeds",
        "text_states_dim": "text_embed_dim",
        "text_states_dim_2": "pooled_projection_dim",
        "i2v_condition_type": "image_condition_type",
    },
    width="hidden_size",
    heads="heads_num",
    defaults={"hidden_size": 3072, "heads_num": 24},  # the others are those of diffusers' class
    fixed={
        "patch_size": [1, 2, 2],
        "qk_norm": True,
        "qk_norm_type": "rms",
        "qkv_bias": True,
        "mlp_act_type": "gelu_tanh",
        "text_projection": "single_refiner",
        "use_attention_mask": True,
    },
)
BY_ORIGINAL = {f.original: f for f in (WAN, HUNYUAN)}
BY_DIFFUSERS = {f.diffusers: f for f in (WAN, HUNYUAN)}


def from_original(config: Mapping) -> dict:
    """The diffusers configuration of the network that an original config.json describes."""
    f = BY_ORIGINAL[config["_class_name"]]
    known = {f.width, *f.same, *f.fixed, *f.defaults}
    for key, value in config.items():
        if key not in known and not key.startswith("_") and value is not None:
            raise ValueError(f"config.json: {key}={value!r} is not a key of {f.original} that is known here; remove it")
        if key in f.fixed and value != f.fixed[key]:
            raise ValueError(f"config.json: {key} is {value!r}; only {f.fixed[key]!r} is supported")
    values = f.defaults | dict(config)
    width, heads = values[f.width], values[f.heads]
    if not (type(width) is type(heads) is int and heads > 0 and width % heads == 0):
        raise ValueError(f"config.json: {f.width} is {width!r}; it must be a multiple of {f.heads}, which is {heads!r}")
    out = {"_class_name": f.diffusers, "attention_head_dim": width // heads}
    out |= {ours: values[theirs] for theirs, ours in f.same.items() if theirs in values}
    if f is WAN:
        if values["model_type"] not in ("t2v", "i2v"):
            raise ValueError(f"config.json: model_type is {values['model_type']!r}; only 't2v' and 'i2v' are supported")
        if values["model_type"] == "i2v":
            out |= {"image_dim": IMAGE_DIM, "added_kv_proj_dim": width}
    return out


def original_config(config: Mapping) -> dict:
    """config.json of the original repository for the network of a diffusers configuration."""
    f = BY_DIFFUSERS[config["_class_name"]]
    out = {"_class_name": f.original, f.width: config["num_attention_heads"] * config["attention_head_dim"]}
    out |= {theirs: config[ours] for theirs, ours in f.same.items()}
    if f is WAN:
        image = config["image_dim"]
        if image not in (None, IMAGE_DIM):
            raise ValueError(f"{f.original}: image_dim is {image}; the original network's is {IMAGE_DIM}")
        out |= {"model_type": "t2v" if image is None else "i2v", "text_len": f.fixed["text_len"]}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in out.items()}


def key_table(config: Mapping) -> Table:
    """Key in diffusers' format -> its place in the original checkpoint, for a whole diffusers configuration."""
    return BY_DIFFUSERS[config["_class_name"]].keys(config)


def to_original(model: VideoDiT) -> dict[str, Tensor]:
    """The weights under the original repository's keys; what it does not fuse is the model's own memory."""
    state = model.state_dict()
    return {key: assembled(state, pieces) for key, pieces in inverse(key_table(model.config)).items()}


def assembled(state: Mapping[str, Tensor], pieces: list[Piece]) -> Tensor:
    """One original tensor from the tensors that it is made of."""
    if pieces[0].stop is None:
        return state[pieces[0].key]
    return torch.cat([state[p.key][p.offset : p.offset + p.stop - p.start] for p in pieces])


def save_original(model: VideoDiT, dir: Path, dtype: torch.dtype | None = None) -> Path:
    """Write the model as a folder of the original repository, whole or not at all."""
    folder, config, state = Path(dir), original_config(model.config), model.state_dict()
    parts = inverse(key_table(model.config))

    def get(key: str) -> Tensor:
        return assembled(state, parts[key]).detach().to("cpu", dtype).contiguous()

    sizes = {}
    for key, pieces in parts.items():
        tensors = {p.key: state[p.key] for p in pieces}.values()
        sizes[key] = sum(v.numel() * (dtype or v.dtype).itemsize for v in tensors)
    with replacing(folder) as temporary:
        write_tensors(temporary, sizes, get, SHARD_BYTES)
        write_json(temporary / "config.json", config)
    return folder

"""The original repositories' model folders: their configurations are read, and their format is written."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastlightgen.atomic import write_json
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.families import family_of, family_of_original
from fastlightgen.models.folder.files import replacing, write_tensors
from fastlightgen.models.keys import Format, Piece, Table, inverse

SHARD_BYTES = 5 * 10**9


def from_original(config: Mapping) -> dict:
    """The diffusers configuration of the network that an original config.json describes."""
    family = family_of_original(config)
    assert family is not None and family.original is not None, config.get("_class_name")
    f = family.original
    known = {f.width, *f.same, *f.fixed, *f.defaults}
    for key, value in config.items():
        if key not in known and not key.startswith("_") and value is not None:
            raise ValueError(f"config.json: {key}={value!r} is not a key of {f.network} that is known here; remove it")
        if key in f.fixed and value != f.fixed[key]:
            raise ValueError(f"config.json: {key} is {value!r}; only {f.fixed[key]!r} is supported")
    values = f.defaults | dict(config)
    width, heads = values[f.width], values[f.heads]
    if not (type(width) is type(heads) is int and heads > 0 and width % heads == 0):
        raise ValueError(f"config.json: {f.width} is {width!r}; it must be a multiple of {f.heads}, which is {heads!r}")
    out = {"_class_name": family.config_class, "attention_head_dim": width // heads}
    out |= {ours: values[theirs] for theirs, ours in f.same.items() if theirs in values}
    return out | f.read(values)


def original_config(config: Mapping) -> dict:
    """config.json of the original repository for the network of a diffusers configuration."""
    f = format_of(config)
    out = {"_class_name": f.network, f.width: config["num_attention_heads"] * config["attention_head_dim"]}
    out |= {theirs: config[ours] for theirs, ours in f.same.items()} | f.write(config)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in out.items()}


def format_of(config: Mapping) -> Format:
    """The original repository's format of the network that a diffusers configuration describes."""
    family = family_of(config)
    if family.original is None:
        raise ValueError(f"{family.title}: has no format but diffusers'; leave original= out")
    return family.original


def key_table(config: Mapping) -> Table:
    """Key in diffusers' format -> its place in the original checkpoint, for a complete diffusers configuration."""
    return format_of(config).keys(config)


def to_original(model: VideoDiT) -> dict[str, Tensor]:
    """The weights under the original repository's keys; what it does not fuse is the model's own memory."""
    state = model.state_dict()
    return {key: assembled(state, pieces) for key, pieces in inverse(key_table(model.config)).items()}


def assembled(state: Mapping[str, Tensor], pieces: list[Piece]) -> Tensor:
    """One original tensor from the tensors that it is made of."""
    rows = [piece.of(state[piece.key]) for piece in pieces]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


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

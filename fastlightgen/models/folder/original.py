"""Model folders of the original repositories: convert their configurations both ways, and write their format."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from fastlightgen.atomic import write_json
from fastlightgen.files.border import read_json
from fastlightgen.files.kinds import CONFIG, WEIGHT_MAP
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.families import family_of, family_of_original
from fastlightgen.models.folder.card import write_card
from fastlightgen.models.folder.files import mapped, replacing, write_tensors
from fastlightgen.models.keys import Format, Piece, Table, inverse

SHARD_BYTES = 5 * 10**9


def read_config(folder: Path) -> dict:
    """config.json of a model folder, converted to diffusers' format if it is in an original one."""
    config = read_json(folder / "config.json", CONFIG, "wanted the keys of a network: copy the folder again")
    if not (family := family_of_original(config)):
        return config
    assert family.original is not None
    return from_original(config, stored_keys(folder) if family.original.marks else ())


def stored_keys(folder: Path) -> list[str]:
    """The keys of a folder's weights; [] if there are none, or only pickles."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        return list(read_json(index, WEIGHT_MAP, "copy the folder again")["weight_map"])
    keys: list[str] = []
    for file in sorted(folder.glob("*.safetensors")):
        with mapped(file) as (found, _):
            keys += found
    return keys


def from_original(config: Mapping, keys: Iterable[str] = ()) -> dict:
    """Convert an original config.json to diffusers' configuration of the same network; `keys`: of its weights."""
    family = family_of_original(config)
    assert family is not None and family.original is not None, config.get("_class_name")
    form = family.original
    known = {form.width, *form.same, *form.fixed, *form.defaults}
    for key, value in config.items():
        if key not in known and not key.startswith("_") and value is not None:
            raise ValueError(f"config.json: {key}={value!r} is not a key of {form.network}; remove it")
        if key in form.fixed and value != form.fixed[key]:
            raise ValueError(f"config.json: {key} is {value!r}; only {form.fixed[key]!r} is supported")
    values = form.defaults | dict(config)
    if known_keys := list(keys):
        values |= {mark: any(k.startswith(start) for k in known_keys) for start, mark in form.marks.items()}
    width, heads = values[form.width], values[form.heads]
    if not (type(width) is type(heads) is int and heads > 0 and width % heads == 0):
        raise ValueError(
            f"config.json: {form.width} is {width!r}; it must be a multiple of {form.heads}, which is {heads!r}"
        )
    out = {"_class_name": family.config_class, "attention_head_dim": width // heads}
    out |= {key: values[original] for original, key in form.same.items() if original in values}
    return out | form.read(values)


def original_config(config: Mapping) -> dict:
    """Convert a diffusers configuration to the original repository's config.json.

    Raises ValueError if that file, which has no key for some settings, would be read back as another network.
    """
    form = format_of(config)
    out = {"_class_name": form.network, form.width: config["num_attention_heads"] * config["attention_head_dim"]}
    out |= {original: config[key] for original, key in form.same.items()} | form.write(config)
    out = {key: list(value) if isinstance(value, tuple) else value for key, value in out.items()}
    family = family_of(config)
    stored = [source.key for source in form.keys(config).values()]
    own, read = (asdict(family.settings(c)) for c in (config, from_original(out, stored)))
    for key, value in own.items():
        if read[key] != value:
            raise ValueError(
                f"{form.network}: {key} is {value!r}, and the original format has {read[key]!r} there and no key for "
                "it; use to=diffusers without original="
            )
    return out


def format_of(config: Mapping) -> Format:
    """The original repository's format for the network of a diffusers configuration."""
    family = family_of(config)
    if family.original is None:
        raise ValueError(f"{family.title}: has no format but diffusers'; use to=diffusers without original=")
    return family.original


def key_table(config: Mapping) -> Table:
    """Key in diffusers' format -> its place in the original checkpoint, for a complete diffusers configuration."""
    return format_of(config).keys(config)


def to_original(model: VideoDiT, table: Table | None = None) -> dict[str, Tensor]:
    """The weights under another format's keys, the original repository's if no table is given.

    Tensors that it does not fuse share the model's memory.
    """
    state, table = model.state_dict(), key_table(model.config) if table is None else table
    return {key: assembled(state, pieces) for key, pieces in inverse(table).items()}


def assembled(state: Mapping[str, Tensor], pieces: list[Piece]) -> Tensor:
    """Build one original tensor from its pieces."""
    rows = [piece.of(state[piece.key]) for piece in pieces]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def save_original(model: VideoDiT, dir: Path, dtype: torch.dtype | None = None, **card) -> Path:
    """Write the model in the original repository's format, completely or not at all; returns the folder.

    `card`: keys for fastlightgen.json, which tells `generate` how to sample a student in this format too.
    """
    folder, config, state = Path(dir), original_config(model.config), model.state_dict()
    parts = inverse(key_table(model.config))

    def get(key: str) -> Tensor:
        return assembled(state, parts[key]).detach().to("cpu", dtype).contiguous()

    sizes = {}  # bytes per original tensor; several pieces may come from one tensor, which counts once
    for key, pieces in parts.items():
        tensors = {p.key: state[p.key] for p in pieces}.values()
        sizes[key] = sum(v.numel() * (dtype or v.dtype).itemsize for v in tensors)
    with replacing(folder) as temporary:
        write_tensors(temporary, sizes, get, SHARD_BYTES)
        write_json(temporary / "config.json", config)
        write_card(temporary, model, card)
    return folder

"""Renumber a LoRA file that was trained on the unpruned teacher, so that it fits a student.

Tensor names begin with `transformer.blocks.3.` (diffusers, PEFT), `diffusion_model.blocks.3.` (original) or
`lora_unet_blocks_3_` (musubi). In place of `blocks` they have a block list of the family, by diffusers' or the original
name.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fastlightgen.files.border import parsed
from fastlightgen.files.tensors import open_tensors, write_tensors
from fastlightgen.models.families import FAMILIES
from fastlightgen.models.folder.experts import PIPELINE_PARTS

BlockMap = dict[str, dict[int, int]]  # block list in diffusers' class -> {index in the teacher: index in the student}
Remapped = tuple[str, int, int]  # the name of a renumbered file, the blocks that it still changes, and those it lost

LORA = {PIPELINE_PARTS[0]: "lora", PIPELINE_PARTS[1]: "lora_2"}  # network: its LoRA's folder, and the key for its file

METADATA = "lora_adapter_metadata"  # the metadata key under which diffusers stores PEFT's configuration


def list_names() -> dict[str, str]:
    """Every name of a block list in LoRA files -> diffusers' name for it."""
    names = {name: name for family in FAMILIES.values() for name in family.lists}
    for family in FAMILIES.values():
        names |= family.original.lists if family.original else {}
    return names


def name_pattern(lists: Iterable[str]) -> re.Pattern:
    """The pattern of names of tensors and modules inside a block."""
    return re.compile(
        r"(?P<head>(?:base_model\.model\.|transformer\.|diffusion_model\.|lora_unet_)*)"
        rf"(?P<list>{'|'.join(map(re.escape, lists))})"
        r"(?P<joint>[._])(?P<index>\d+)(?=[._])"
    )


@dataclass
class Renumber:
    """Maps a name in a LoRA file to its name after pruning; None for a name in a dropped block."""

    blocks: BlockMap
    teacher: dict[str, int]  # block list -> number of blocks in the teacher
    kept: set[str] = field(default_factory=set)  # kept blocks whose names were mapped so far
    dropped: set[str] = field(default_factory=set)  # dropped blocks whose names were mapped so far

    def __post_init__(self) -> None:
        self.names = list_names()
        self.pattern = name_pattern(self.names)

    def __call__(self, name: str) -> str | None:
        found = self.pattern.match(name)
        if not found:
            return name
        where, index = self.names[found["list"]], int(found["index"])
        if where not in self.blocks or index >= self.teacher[where]:
            known = ", ".join(f"{n} {k}" for k, n in self.teacher.items())
            raise ValueError(f"{name}: no such block in the teacher ({known}); give a LoRA that was trained on it")
        new = self.blocks[where].get(index)
        (self.dropped if new is None else self.kept).add(f"{where}.{index}")
        if new is None:
            return None
        return f"{found['head']}{found['list']}{found['joint']}{new}{name[found.end() :]}"


def remap_lora(key: str, file: Path, folder: Path, blocks: BlockMap, teacher: dict[str, int]) -> Remapped:
    """Write the LoRA for the student into `folder`; `key`: the one that gave the file, for errors."""
    renumber = Renumber(blocks, teacher)
    try:
        with open_tensors(file) as f:
            named = [(new, old) for old in f.keys() if (new := renumber(old)) is not None]
            tensors = {new: f.get_tensor(old) for new, old in named}
            metadata = dict(f.metadata() or {"format": "pt"})
        if len(tensors) < len(named):
            raise ValueError("two names stand for one layer; save it again")
        if bad := next((new for new, v in tensors.items() if not v.isfinite().all()), None):
            raise ValueError(f"{bad} holds numbers that are not finite")
        if METADATA in metadata:
            settings = parsed(metadata[METADATA], None, METADATA, "save the LoRA without its metadata")
            metadata[METADATA] = json.dumps(remap_settings(settings, renumber))
    except (OSError, SafetensorError) as err:
        raise ValueError(f"{key}={file}: cannot be read as safetensors ({err}); give a .safetensors file") from None
    except ValueError as err:
        raise ValueError(f"{key}={file}: {err}") from None
    if not renumber.kept:
        dropped = f"{len(renumber.dropped)} blocks, all of them dropped" if renumber.dropped else "no block"
        raise ValueError(f"{key}={file}: changes {dropped}: nothing is left for the student; leave {key}= out")
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / f"{file.stem}.safetensors", tensors, metadata)
    return f"{file.stem}.safetensors", len(renumber.kept), len(renumber.dropped)


def remap_settings(value: Any, renumber: Renumber) -> Any:
    """Renumber the module names in PEFT's configuration (rank_pattern, alpha_pattern, target_modules)."""

    def module(name: str) -> str | None:  # the pattern wants a dot after the block's index
        new = renumber(f"{name}.")
        return None if new is None else new[:-1]

    if isinstance(value, dict):
        if any(k.endswith("layers_to_transform") and v is not None for k, v in value.items()):
            raise ValueError("layers_to_transform cannot be renumbered; save the LoRA without its metadata")
        return {new: remap_settings(v, renumber) for k, v in value.items() if (new := module(k)) is not None}
    if isinstance(value, list):
        return [remap_settings(v, renumber) for v in value if not isinstance(v, str) or module(v) is not None]
    return module(value) if isinstance(value, str) else value

"""Latent caches: safetensors shards, an index that describes them, and the null prompt. Written whole, read checked.

A cache folder holds index.json {format, description, shards: [{file, clips, sha256}]}, null.safetensors and the shards;
a shard holds one stacked tensor per field: `latents` [n, C, F, H, W] (already normalised) and fields of Cond.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
FIELDS = ("latents", "text", "text_len", "image", "image_embeds", "pooled")


def write_cache(
    folder: str | Path, shards: Iterable[Mapping[str, Tensor]], null: Mapping[str, Tensor], **description
) -> None:
    """Write a cache; `null` holds the fields of Cond of the null prompt of one clip."""
    folder = Path(folder)
    if (folder / "index.json").exists():
        raise ValueError(f"{folder}: already holds a latent cache; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, shard in enumerate(shards):
        file = folder / f"shard-{number:05d}.safetensors"
        _save(shard, file)
        entries.append({"file": file.name, "clips": len(shard["latents"]), "sha256": _sha256(file)})
    _save(null, folder / "null.safetensors")
    index = {"format": FORMAT, "description": description, "shards": entries}
    temporary = folder / "index.json.tmp"
    temporary.write_text(json.dumps(index, indent=1))
    os.replace(temporary, folder / "index.json")  # last: a folder without an index is no cache


class Cache:
    """Random access to the clips of a cache folder."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            text = (self.folder / "index.json").read_text()
            index = json.loads(text)
            version = index["format"]
            shards = [(str(s["file"]), int(s["clips"])) for s in index["shards"]]
            self.description = index["description"]
        except (OSError, KeyError, TypeError, ValueError) as err:
            raise ValueError(f"{self.folder}/index.json: not a latent cache ({type(err).__name__}: {err})") from None
        if version != FORMAT:
            raise ValueError(f"{self.folder}: cache format {version}, this version reads {FORMAT}")
        if any(Path(name).name != name or name == ".." for name, _ in shards):
            raise ValueError(f"{self.folder}/index.json: names files outside its folder")
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.where = [(self.folder / name, row) for name, clips in shards for row in range(clips)]
        try:
            self.null = load_file(self.folder / "null.safetensors")
        except (OSError, SafetensorError) as err:
            raise ValueError(f"{self.folder}/null.safetensors: cannot be read ({err})") from None

    def __len__(self) -> int:
        return len(self.where)

    def read(self, indices: list[int]) -> dict[str, Tensor]:
        """The fields of some clips, stacked; only their rows are read from disk."""
        rows: dict[str, list[Tensor]] = {}
        for file, row in (self.where[i] for i in indices):
            try:
                with safe_open(file, framework="pt") as shard:
                    for key in shard.keys():
                        rows.setdefault(key, []).append(shard.get_slice(key)[row])
            except (OSError, IndexError, SafetensorError) as err:
                raise ValueError(f"{file}: damaged or missing ({err}); make the cache again") from None
        strangers = sorted(rows.keys() - set(FIELDS))
        if strangers or "latents" not in rows:
            raise ValueError(
                f"{self.folder}: fields {sorted(rows)}; wanted latents and fields among {', '.join(FIELDS)}"
            )
        return {key: torch.stack(values) for key, values in rows.items()}


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    temporary = file.with_suffix(".tmp")
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
    os.replace(temporary, file)


def _sha256(file: Path) -> str:
    h = hashlib.sha256()
    with open(file, "rb") as f:
        while chunk := f.read(1 << 20):
            h.update(chunk)
    return h.hexdigest()

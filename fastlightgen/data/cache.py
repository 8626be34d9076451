"""Latent caches: safetensors shards, an index, and the null prompt. Files appear complete; reading verifies checksums.

A cache folder holds index.json {format, description, shards: [{file, clips, size, sha256, head}], null}, the shards,
null.safetensors, and, if the model's authors publish a negative prompt, negative.safetensors.

A shard holds n clips of equal size, one stacked tensor per field: `latents` [n, C, F, H, W], normalised, and
fields of the family's Cond. A shard's metadata holds the description and, for every clip, its origin and a checksum. A
text may be stored with fewer tokens than description.text_tokens; reading pads it with zeros.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from fastlightgen.atomic import write_json
from fastlightgen.files.border import opened, parsed, read_json, regular, unread
from fastlightgen.files.kinds import INDEX, SAMPLES
from fastlightgen.files.tensors import open_tensors, save_tensors
from fastlightgen.models.families import cond_fields

FORMAT, READS = 2, (1, 2)  # written, readable; format 1 has no sizes and no checksums of clips
NULL, NEGATIVE = "null.safetensors", "negative.safetensors"
AGAIN = "make the cache again"
HEADER = 100 << 20  # bytes; safetensors refuses a longer header
META = "fastlightgen"  # the only metadata key of a shard: safetensors writes several keys in random order


def write_cache(
    folder: str | Path, shards: Iterable[Mapping[str, Tensor]], null: Mapping[str, Tensor], **description
) -> None:
    """Write a cache; `null` holds the null prompt's Cond fields for one clip."""
    folder = Path(folder)
    if (folder / "index.json").exists():
        raise ValueError(f"{folder}: already holds a latent cache; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, shard in enumerate(shards):
        about: list[dict] = [{}] * len(shard["latents"])
        entries.append(write_shard(folder / f"shard-{number:05d}.safetensors", shard, about, description))
    save_tensors(folder / NULL, null)
    write_index(folder, entries, description)


def write_shard(file: Path, shard: Mapping[str, Tensor], about: Sequence[dict], description: dict) -> dict:
    """Write one shard and return its index entry; `about` holds the origin of each clip."""
    samples = [
        a | {"crc32": crc32({k: v[row] for k, v in shard.items()})} for row, a in enumerate(about)
    ]  # fmt: skip
    save_tensors(file, shard, {META: json.dumps({"description": description, "samples": samples})})
    size = list(shard["latents"].shape[1:])
    return {"file": file.name, "clips": len(samples), "size": size, "sha256": sha256(file), "head": head(file)}


def write_index(folder: Path, entries: Sequence[dict], description: dict) -> None:
    """Write index.json. It must be the last file: only a folder with an index counts as a cache."""
    index = {"format": FORMAT, "description": description, "shards": list(entries), "null": sha256(folder / NULL)}
    write_json(folder / "index.json", index)


class Cache:
    """Random access to the clips of a cache folder; verifies each clip's checksum at its first read."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / "index.json"
        index = read_json(path, INDEX, "give the folder of a latent cache, or make it again")
        if index["format"] not in READS:
            reads = " and ".join(map(str, READS))
            raise ValueError(f"{self.folder}: cache format {index['format']}, this version reads {reads}")
        shards = [(s["file"], s["clips"], tuple(s.get("size", ()))) for s in index["shards"]]
        self.description = index["description"]
        check_files(self.folder, {s["file"]: s["clips"] for s in index["shards"]}, len(shards))
        self.heads = {self.folder / s["file"]: s["head"] for s in index["shards"] if "head" in s}
        self.digest = sha256(path)[:16]  # runs record it as data_hash
        self.where = [(self.folder / name, row) for name, clips, _ in shards for row in range(clips)]
        self.sizes = [size for _, clips, size in shards for _ in range(clips)]
        self._samples: dict[Path, list[dict]] = {}  # metadata of the shards read so far
        self._checked: set[int] = set()  # clips with a verified checksum
        self.null, _ = self.prompt(NULL)
        if "null" in index and sha256(self.folder / NULL) != index["null"]:
            raise ValueError(f"{self.folder / NULL}: is damaged, or of another cache; {AGAIN}")

    def __len__(self) -> int:
        return len(self.where)

    def groups(self) -> list[list[int]]:
        """The clip indices of each size, the most frequent size first."""
        found: dict[tuple, list[int]] = {}
        for i, size in enumerate(self.sizes):
            found.setdefault(size, []).append(i)
        return sorted(found.values(), key=lambda group: (-len(group), group[0]))

    def read(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Read clips of equal size and stack their fields; reads only their rows from disk."""
        clips = [self._fill(self._read(i)) for i in indices]
        known = ["latents", *cond_fields(self.description)]
        unknown = {key for clip in clips for key in clip} - set(known)
        if unknown or any("latents" not in clip or clip.keys() != clips[0].keys() for clip in clips):
            got = sorted({key for clip in clips for key in clip})
            raise ValueError(f"{self.folder}: fields {got}; wanted latents and fields among {', '.join(known)}")
        return {key: torch.stack([clip[key] for clip in clips]) for key in clips[0]}

    def prompt(self, name: str) -> tuple[dict[str, Tensor], str]:
        """The fields for one clip and the text of a prompt: of NULL or of NEGATIVE."""
        if name == NEGATIVE and not (self.folder / name).is_file():
            raise ValueError(
                f"negative=official: {self.folder} holds no {name}; run the same encode command again, which adds the "
                "prompt that the model's authors publish, or leave negative= out"
            )
        try:
            with open_tensors(self.folder / name) as file:
                fields = {key: file.get_tensor(key) for key in file.keys()}
                about = origins(file, self.folder / name)
        except (OSError, SafetensorError) as err:
            raise ValueError(f"{self.folder}/{name}: cannot be read ({err})") from None
        return self._fill(fields), about.get("prompt", self.description.get("null_prompt", ""))

    def sample(self, index: int) -> dict:
        """The origin of a clip: file, source, caption, start, end, as far as its shard records them."""
        file, row = self.where[index]
        with open_tensors(file) as shard:
            return self._about(file, shard)[row]

    def _read(self, index: int) -> dict[str, Tensor]:
        file, row = self.where[index]
        try:
            with open_tensors(file) as shard:
                clip = {key: shard.get_slice(key)[row] for key in shard.keys()}
                about = self._about(file, shard)
        except (OSError, IndexError, KeyError, ValueError, SafetensorError) as err:
            raise ValueError(f"{file}: damaged or missing ({err}); {AGAIN}") from None
        if index not in self._checked:
            wanted = about[row].get("crc32") if row < len(about) else None  # None in format 1
            if wanted is not None and crc32(clip) != wanted:
                raise ValueError(f"{file}: clip {row} is damaged (its checksum is wrong); {AGAIN}")
            self._checked.add(index)
        return clip

    def _about(self, file: Path, shard) -> list[dict]:
        """The origin and checksum of each clip of an open shard."""
        if file not in self._samples:
            if file in self.heads and head(file) != self.heads[file]:
                raise ValueError("is damaged, or a shard of another cache")
            self._samples[file] = origins(shard, file).get("samples", [])
        return self._samples[file]

    def _fill(self, clip: dict[str, Tensor]) -> dict[str, Tensor]:
        """Pad a clip's text with zeros to the length that the network expects."""
        tokens = self.description.get("text_tokens")
        if tokens is None or "text" not in clip:
            return clip
        return clip | {"text": F.pad(clip["text"], (0, 0, 0, tokens - len(clip["text"])))}


def crc32(clip: Mapping[str, Tensor]) -> int:
    """A checksum over the bytes of a clip's fields, in the order of their names."""
    value = 0
    for key in sorted(clip):
        value = zlib.crc32(clip[key].contiguous().reshape(-1).view(torch.uint8).numpy().data, value)
    return value


def head(file: Path) -> str:
    """A hash of a safetensors file's header, which holds the checksums of all clips: it stands for the whole file."""
    with opened(file) as f:
        size = int.from_bytes(f.read(8), "little")
        return hashlib.sha256(f.read(min(size, HEADER))).hexdigest()[:16]


def origins(shard: Any, file: Path) -> dict:
    """What the metadata of an open file says: the origin and checksum of each clip, or a prompt's text."""
    about: dict = parsed((shard.metadata() or {}).get(META, "{}"), SAMPLES, f"{file}, metadata", AGAIN)
    return about


def check_files(folder: Path, clips: Mapping[str, int], count: int) -> None:
    """Check the shards that an index names: each once, inside the folder, and large enough for its clips."""
    index = folder / "index.json"
    # A downloaded cache must not make us read files elsewhere.
    if any(Path(name).name != name or name == ".." for name in clips):
        raise ValueError(f"{index}: names files outside its folder")
    if len(clips) < count:
        raise ValueError(f"{index}: names a shard twice; {AGAIN}")
    for name, rows in clips.items():
        try:
            size = regular(folder / name, kind="shard").stat().st_size
        except OSError as err:
            raise ValueError(f"{folder / name}: {unread(err)}; {AGAIN}") from None
        if rows > size:
            raise ValueError(f"{index}: says that {name} holds {rows} clips, but it has {size} bytes; {AGAIN}")


def sha256(file: Path) -> str:
    h = hashlib.sha256()
    with opened(file) as f:
        while chunk := f.read(1 << 20):
            h.update(chunk)
    return h.hexdigest()

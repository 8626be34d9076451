"""Making a latent cache that can be stopped at any moment, by one process or many.

The list is cut into parts of `shard` rows. A part is done when parts/NNNNN.json names its shards, one for every size
that occurs in it, and what was skipped. Which process makes a part, when, and after how many interruptions does not
matter: the files are the same to the byte. Whoever sees all parts done writes skipped.json and then index.json.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from fastlightgen.atomic import write_json
from fastlightgen.config import diff
from fastlightgen.data.cache import save_tensors, sha256, write_index, write_shard
from fastlightgen.data.lists import Row

Clip = tuple[dict[str, Tensor], dict]  # the fields, and where they came from


class Writer:
    """A cache folder in the making; `settings` is everything that decides its content."""

    def __init__(self, folder: str | Path, settings: dict, rows: Sequence[Row], shard: int, rank: int = 0):
        self.folder, self.description, self.rank = Path(folder), settings["description"], rank
        self.parts = [range(k, min(k + shard, len(rows))) for k in range(0, len(rows), shard)]
        self.settings = json.loads(json.dumps(settings | {"shard": shard, "rows": len(rows), "list": list_hash(rows)}))
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "parts").mkdir(exist_ok=True)

    @contextmanager
    def opened(self):
        """This rank's place in the folder, refused to a second process and to another configuration."""
        with locked(self.folder / f".lock-{self.rank}") as free:
            if not free:
                raise ValueError(f"out={self.folder}: another process makes it as rank={self.rank}; wait for it")
            with locked(self.folder / ".lock", wait=True):
                self._claim()
            yield self

    def _claim(self) -> None:
        path = self.folder / "encode.json"
        if not path.is_file():
            if (self.folder / "index.json").exists():
                raise ValueError(f"out={self.folder}: holds another latent cache; choose another folder")
            write_json(path, self.settings)
            return
        try:
            before = json.loads(path.read_text())
        except ValueError as err:
            raise ValueError(f"{path}: cannot be read ({err}); delete {self.folder} and start anew") from None
        if changes := diff(before, self.settings):
            raise ValueError(
                f"out={self.folder} was begun with another configuration ({'; '.join(changes[:4])}); "
                "choose another out=, or delete that folder"
            )

    @property
    def complete(self) -> bool:
        return (self.folder / "index.json").is_file()

    def part_file(self, number: int) -> Path:
        return self.folder / "parts" / f"{number:05d}.json"

    def done(self, number: int) -> dict | None:
        """The record of a finished part whose shards are whole; None if it has to be made."""
        try:
            record = json.loads(self.part_file(number).read_text())
            whole = all(sha256(self.folder / s["file"]) == s["sha256"] for s in record["shards"])
        except (OSError, ValueError, KeyError):
            return None
        return record if whole else None

    def write_part(self, number: int, clips: Iterable[Clip], skipped: list[dict]) -> None:
        """One shard for every size, then the record that makes them count."""
        sizes: dict[tuple, list[Clip]] = {}
        for clip in clips:
            sizes.setdefault(tuple(clip[1]["resolution"]), []).append(clip)
        shards = []
        for (height, width), group in sorted(sizes.items()):
            about = [a for _, a in group]
            file = self.folder / f"shard-{number:05d}-{height}x{width}.safetensors"
            shards.append(write_shard(file, stack([fields for fields, _ in group]), about, self.description))
        write_json(self.part_file(number), {"shards": shards, "skipped": skipped})

    def write_null(self, null: dict[str, Tensor]) -> None:
        with locked(self.folder / ".lock", wait=True):  # every process makes the same one
            save_tensors(self.folder / "null.safetensors", trim(null, int(null["text_len"])))

    def finish(self) -> dict | None:
        """Counts of clips and skipped rows once every part is there, whoever made them; None before."""
        with locked(self.folder / ".lock", wait=True):
            records = [r for number in range(len(self.parts)) if (r := self._record(number)) is not None]
            if len(records) < len(self.parts) or not (self.folder / "null.safetensors").is_file():
                return None
            shards = [s for r in records for s in r["shards"]]
            skipped = [s for r in records for s in r["skipped"]]
            write_json(self.folder / "skipped.json", skipped)
            clips = sum(s["clips"] for s in shards)
            if not clips:
                first = f"{skipped[0]['file']}: {skipped[0]['reason']}"
                raise ValueError(f"out={self.folder}: not one of {len(skipped)} clips could be encoded; first {first}")
            if not self.complete:
                write_index(self.folder, shards, self.description)
                for leftover in self.folder.rglob("*.tmp"):  # of processes that were killed
                    leftover.unlink()
        return {"clips": clips, "skipped": len(skipped)}

    def _record(self, number: int) -> dict | None:
        path = self.part_file(number)
        return json.loads(path.read_text()) if path.is_file() else None


@contextmanager
def locked(path: Path, wait: bool = False):
    """Hold a lock file; yields False if another process holds it and we do not wait."""
    with open(path, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def stack(clips: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Fields of several clips; their texts are cut to the longest, the zeros after it are no news."""
    longest = max(int(c["text_len"]) for c in clips)
    clips = [trim(c, longest) for c in clips]
    return {key: torch.stack([c[key] for c in clips]) for key in clips[0]}


def trim(clip: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    return clip | {"text": clip["text"][: max(1, length)]}


def list_hash(rows: Sequence[Row]) -> str:
    """Of names, captions and times, not of where the list lies."""
    known = [{k: v for k, v in asdict(row).items() if k not in ("file", "problem")} for row in rows]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


def free_bytes(folder: Path) -> int:
    """Room on the disk that will hold `folder`."""
    place = folder
    while not place.exists():
        place = place.parent
    stat = os.statvfs(place)
    return stat.f_bavail * stat.f_frsize

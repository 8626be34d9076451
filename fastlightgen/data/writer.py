"""Writes a latent cache with one process or many; any process can be stopped at any moment and started again.

The list is cut into parts of `shard` rows. A part is done when parts/NNNNN.json exists; it names the part's shards (one
for every size in it) and the skipped rows. The files are equal to the byte, no matter which process writes a part and
how often it was interrupted. The process that finds all parts done writes skipped.json and then index.json.
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
from fastlightgen.data.cache import META, NULL, save_tensors, sha256, write_index, write_shard
from fastlightgen.data.lists import Row

Clip = tuple[dict[str, Tensor], dict]  # the fields, and the clip's origin for the shard's metadata


class Writer:
    """A cache folder being written; `settings` holds everything that decides its content."""

    def __init__(self, folder: str | Path, settings: dict, rows: Sequence[Row], shard: int, rank: int = 0):
        self.folder, self.description, self.rank = Path(folder), settings["description"], rank
        self.parts = [range(k, min(k + shard, len(rows))) for k in range(0, len(rows), shard)]
        # Through JSON, so that the settings compare equal with those read from encode.json.
        self.settings = json.loads(json.dumps(settings | {"shard": shard, "rows": len(rows), "list": list_hash(rows)}))
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "parts").mkdir(exist_ok=True)

    @contextmanager
    def opened(self):
        """Hold this rank's lock on the folder; refuse a second process of this rank and another configuration."""
        with locked(self.folder / f".lock-{self.rank}") as free:
            if not free:
                raise ValueError(f"out={self.folder}: another process writes it as rank={self.rank}; wait for it")
            with locked(self.folder / ".lock", wait=True):  # one process at a time reads or writes encode.json
                self._claim()
            yield self

    def _claim(self) -> None:
        """Write encode.json with the settings, or compare them with those of an earlier process."""
        path = self.folder / "encode.json"
        if not path.is_file():
            if (self.folder / "index.json").exists():
                raise ValueError(f"out={self.folder}: holds another latent cache; choose another folder")
            write_json(path, self.settings)
            return
        try:
            before = json.loads(path.read_text())
        except ValueError as err:
            raise ValueError(f"{path}: cannot be read ({err}); delete {self.folder} and start again") from None
        if changes := diff(before, self.settings):
            raise ValueError(
                f"out={self.folder} was started with another configuration ({'; '.join(changes[:4])}); "
                "choose another out=, or delete that folder"
            )

    @property
    def complete(self) -> bool:
        return (self.folder / "index.json").is_file()

    def part_file(self, number: int) -> Path:
        return self.folder / "parts" / f"{number:05d}.json"

    def done(self, number: int) -> dict | None:
        """Return the record of a finished part with intact shards, or None if the part must be written."""
        try:
            record = json.loads(self.part_file(number).read_text())
            intact = all(sha256(self.folder / s["file"]) == s["sha256"] for s in record["shards"])
        except (OSError, ValueError, KeyError):
            return None
        return record if intact else None

    def write_part(self, number: int, clips: Iterable[Clip], skipped: list[dict]) -> None:
        """Write one shard for every size, then the record that marks the part as done."""
        sizes: dict[tuple, list[Clip]] = {}  # (height, width): its clips
        for clip in clips:
            sizes.setdefault(tuple(clip[1]["resolution"]), []).append(clip)
        shards = []
        for (height, width), group in sorted(sizes.items()):
            about = [a for _, a in group]
            file = self.folder / f"shard-{number:05d}-{height}x{width}.safetensors"
            shards.append(write_shard(file, stack([fields for fields, _ in group]), about, self.description))
        write_json(self.part_file(number), {"shards": shards, "skipped": skipped})

    def lacks(self, name: str) -> bool:
        return not (self.folder / name).is_file()

    def write_prompt(self, name: str, fields: dict[str, Tensor], text: str) -> None:
        """Write the null prompt (NULL) or the official negative one (NEGATIVE), with its text."""
        with locked(self.folder / ".lock", wait=True):  # every process writes the same file
            fields = trim(fields, int(fields["text_len"]))
            save_tensors(self.folder / name, fields, {META: json.dumps({"prompt": text})})

    def finish(self) -> dict | None:
        """Write the index if all parts are done and return the counts of clips and skipped rows; else return None."""
        with locked(self.folder / ".lock", wait=True):
            records = [r for number in range(len(self.parts)) if (r := self._record(number)) is not None]
            if len(records) < len(self.parts) or self.lacks(NULL):
                return None
            # In the order of the parts, so that the index does not depend on who finished first.
            shards = [s for r in records for s in r["shards"]]
            skipped = [s for r in records for s in r["skipped"]]
            write_json(self.folder / "skipped.json", skipped)
            clips = sum(s["clips"] for s in shards)
            if not clips:
                first = f"{skipped[0]['file']}: {skipped[0]['reason']}"
                raise ValueError(f"out={self.folder}: not one of {len(skipped)} clips could be encoded; first {first}")
            if not self.complete:  # another process may have been faster
                write_index(self.folder, shards, self.description)
                for leftover in self.folder.rglob("*.tmp"):  # from processes that were killed while writing
                    leftover.unlink()
        return {"clips": clips, "skipped": len(skipped)}

    def _record(self, number: int) -> dict | None:
        path = self.part_file(number)
        return json.loads(path.read_text()) if path.is_file() else None


@contextmanager
def locked(path: Path, wait: bool = False):
    """Hold a lock file. Without `wait`, yield False if another process holds it."""
    with open(path, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def stack(clips: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack the fields of clips, trimming the zero padding of texts to the longest text."""
    longest = max(int(c["text_len"]) for c in clips)
    clips = [trim(c, longest) for c in clips]
    return {key: torch.stack([c[key] for c in clips]) for key in clips[0]}


def trim(clip: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """Cut a clip's text to `length` tokens, at least one."""
    return clip | {"text": clip["text"][: max(1, length)]}


def list_hash(rows: Sequence[Row]) -> str:
    """A hash of the rows' names, captions and times; it does not depend on the location of the list."""
    known = [{k: v for k, v in asdict(row).items() if k not in ("file", "problem")} for row in rows]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk that will hold `folder`."""
    place = folder
    while not place.exists():  # the nearest existing parent lies on the same disk
        place = place.parent
    stat = os.statvfs(place)
    return stat.f_bavail * stat.f_frsize

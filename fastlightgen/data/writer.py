"""Writes a latent cache with one process or many; any process can be stopped at any moment and started again.

The list is cut into parts of `shard` rows. A part is done when parts/NNNNN.json exists; it names the part's shards (one
for every size in it) and the skipped rows. The files are equal to the byte, no matter which process writes a part and
how often it was interrupted. The process that finds all parts done writes skipped.json and then index.json.

A cache grows: another list keeps the parts with clips ("earlier") and adds parts for the rows that are not in them. A
clip is known by the hash of its file, its times and its caption. encode.json holds the settings and this plan. A folder
without any clip keeps neither.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlightgen.atomic import locked, write_json
from fastlightgen.config import diff
from fastlightgen.data.cache import META, NEGATIVE, NULL, origins, sha256, write_index, write_shard
from fastlightgen.data.lists import Row
from fastlightgen.data.video import source_hash
from fastlightgen.files.border import read_json
from fastlightgen.files.kinds import ENCODE, INDEX, PART
from fastlightgen.files.tensors import open_tensors, save_tensors
from fastlightgen.parallel.log import bar, say

# Files of processes that were killed while writing. Other names are not ours.
LEFTOVERS = ("shard-*.tmp", "null*.tmp", "negative*.tmp", ".*.json.tmp", "parts/.*.json.tmp")
OWN = re.compile(r"\.lock.*|\..*\.tmp|.*\.tmp|parts|skipped\.json|encode\.json|(null|negative|shard-.*)\.safetensors")
Clip = tuple[dict[str, Tensor], dict]  # the fields, and the clip's origin for the shard's metadata
# The keys of encode.json that say which clips there are. The others are settings, which do not change.
PLAN = ("min_dover", "rows", "list", "earlier", "first", "added")


class Writer:
    """A cache folder being written; `settings` holds everything that decides how a clip is encoded."""

    def __init__(
        self,
        folder: str | Path,
        settings: dict,
        rows: Sequence[Row],
        shard: int,
        rank: int = 0,
        progress: bool = False,
    ):
        self.folder, self.description, self.rank = Path(folder), settings["description"], rank
        self.rows, self.shard, self.progress = rows, shard, progress
        # Through JSON, so that the settings compare equal with those read from encode.json.
        self.settings = json.loads(json.dumps(settings | {"shard": shard}))
        self.plan: dict[str, Any] = {}  # filled by `opened`, as are the next two
        self.earlier: list[int] = []  # the parts of earlier lists
        self.parts: dict[int, Sequence[int]] = {}  # the parts of this list: number -> rows
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "parts").mkdir(exist_ok=True)

    @contextmanager
    def opened(self) -> Iterator["Writer"]:
        """Hold this rank's lock on the folder; refuse a second process of this rank and another configuration."""
        with locked(self.folder / f".lock-{self.rank}") as free:
            if not free:
                raise ValueError(f"out={self.folder}: another process writes it as rank={self.rank}; wait for it")
            with locked(self.folder / ".lock", wait=True):  # one process at a time reads or writes encode.json
                self._claim()
            yield self

    def _claim(self) -> None:
        """Write the plan for this list to encode.json, or take the one that an earlier process wrote."""
        before, min_dover = self._recorded(), self.settings["min_dover"]
        mine: dict[str, Any] = {"min_dover": min_dover, "rows": len(self.rows), "list": list_hash(self.rows)}
        same, changes = False, []
        if before:
            same = all(before.get(k) == mine[k] for k in mine)
            changes = diff(*({k: v for k, v in d.items() if k not in PLAN} for d in (before, self.settings)))
            if (changes or not same) and not any(self.folder.glob("shard-*.safetensors")):
                self._forget()
                before = None
        if before is None:
            if (self.folder / "index.json").exists():
                raise ValueError(f"out={self.folder}: holds another latent cache; choose another folder")
            if foreign := sorted(p.name for p in self.folder.iterdir() if not OWN.fullmatch(p.name)):
                raise ValueError(f"out={self.folder}: holds other files ({foreign[0]}); choose a new or empty folder")
            plan = mine
        elif changes:
            raise ValueError(
                f"out={self.folder} was started with another configuration ({'; '.join(changes[:4])}); "
                "choose another out=, or delete that folder"
            )
        elif same and all(self._present(n) for n in before.get("earlier", [])):
            plan = {k: before[k] for k in PLAN if k in before}
        else:
            plan = mine | self._grown(before)
        self.plan = self.settings | plan
        if self.plan != before:
            write_json(self.folder / "encode.json", self.plan)
        self.earlier, self.parts = plan.get("earlier", []), self._parts(plan)

    def _parts(self, plan: dict) -> dict[int, Sequence[int]]:
        """Cut the rows that a plan adds into parts."""
        added = plan.get("added", range(plan["rows"]))
        starts = range(0, len(added), self.shard)
        return {n: added[k : k + self.shard] for n, k in enumerate(starts, plan.get("first", 0))}

    def _grown(self, before: dict) -> dict:
        """Plan another list on top of what the folder holds: keep the intact parts with clips, add the new rows."""
        old = [*before.get("earlier", []), *self._parts(before)]
        with bar(len(old), "checking finished parts", self.progress) as progress:
            earlier = []
            for number in old:
                earlier += [number] if (self.done(number) or {}).get("shards") else []
                progress.update()
        known = Counter(key for number in earlier for key in self._clips(number))
        held, added = known.total(), []
        with bar(len(self.rows), "looking for new clips", self.progress) as progress:
            for i, row in enumerate(self.rows):
                if not row.problem and known[key := key_of(row)]:
                    known[key] -= 1
                else:
                    added.append(i)
                progress.update()
        stay = f"; {known.total()} of its clips are not in this list and stay in it" if known.total() else ""
        say(f"out={self.folder}: holds {held - known.total()} of {len(self.rows)} listed clips already{stay}")
        return {"earlier": earlier, "first": max(old, default=-1) + 1, "added": added}

    def _clips(self, number: int) -> Iterator[tuple]:
        """Yield what identifies each clip of a finished part."""
        for shard in self._record(number)["shards"]:
            with open_tensors(self.folder / shard["file"]) as file:
                for about in origins(file, self.folder / shard["file"])["samples"]:
                    yield about["source"], about["start"], about["end"], about["caption"]

    def _recorded(self) -> dict | None:
        """Read encode.json; None if there is none."""
        path = self.folder / "encode.json"
        return read_json(path, ENCODE, f"delete {self.folder} and start again") if path.exists() else None

    def _forget(self) -> None:
        """Remove the configuration and the records of a folder without any clip."""
        parts = (self.folder / "parts").glob("*.json")
        for file in (*parts, *(self.folder / name for name in (NULL, NEGATIVE, "encode.json"))):
            file.unlink(missing_ok=True)  # encode.json last: without it the other files would count for any settings

    def _check_plan(self) -> None:
        """Raise if another process has given the folder another plan meanwhile, or has found no clip at all."""
        if (now := self._recorded()) is None:
            raise ValueError(f"out={self.folder}: not one clip could be encoded; see {self.folder / 'skipped.json'}")
        if now != self.plan:
            raise ValueError(f"out={self.folder}: another process has begun another list or configuration here")

    @property
    def complete(self) -> bool:
        """Does the index hold the clips of all parts, and do their files exist?"""
        try:
            shards = read_json(self.folder / "index.json", INDEX)["shards"]
        except ValueError:
            return False
        numbers = [*self.earlier, *self.parts]
        return all(map(self._present, numbers)) and shards == [s for n in numbers for s in self._record(n)["shards"]]

    def _present(self, number: int) -> bool:
        """Do the record of a part and its shards exist? `done` also verifies them."""
        return self.part_file(number).is_file() and all(
            (self.folder / s["file"]).is_file() for s in self._record(number)["shards"]
        )

    def part_file(self, number: int) -> Path:
        return self.folder / "parts" / f"{number:05d}.json"

    def done(self, number: int) -> dict | None:
        """Return the record of a finished part with intact shards, or None if the part must be written."""
        try:
            record = self._record(number)
            intact = all(sha256(self.folder / s["file"]) == s["sha256"] for s in record["shards"])
        except (OSError, ValueError, KeyError):
            return None
        return record if intact else None

    def write_part(self, number: int, clips: Iterable[Clip], skipped: list[dict]) -> None:
        """Write one shard for every size, then the record that marks the part as done."""
        self._check_plan()
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
            self._check_plan()
            if self.lacks(NULL) or not all(self.part_file(n).is_file() for n in self.parts):
                return None
            # In the order of the parts, so that the index does not depend on who finished first.
            shards = [s for n in (*self.earlier, *self.parts) for s in self._record(n)["shards"]]
            skipped = [s for n in self.parts for s in self._record(n)["skipped"]]
            write_json(self.folder / "skipped.json", skipped)
            clips = sum(s["clips"] for s in shards)
            if not clips:
                self._forget()
                first = f"{skipped[0]['file']}: {skipped[0]['reason']}"
                raise ValueError(
                    f"out={self.folder}: not one of {len(skipped)} clips could be encoded; first {first}"
                    f"{longest(skipped)}"
                )
            if not self.complete:  # another process may have been faster
                write_index(self.folder, shards, self.description)
                for leftover in [p for pattern in LEFTOVERS for p in self.folder.glob(pattern)]:
                    leftover.unlink()
        return {"clips": clips, "skipped": len(skipped), "hint": longest(skipped)}

    def _record(self, number: int) -> dict:
        record: dict = read_json(self.part_file(number), PART, "delete it and run the same command again")
        return record


def longest(skipped: Sequence[dict]) -> str:
    """Say which length all clips have that were too short; "" if there is none."""
    lengths = [s["frames"] for s in skipped if s.get("frames")]
    return f"; {len(lengths)} of them too short: frames={min(lengths)} takes them" if lengths else ""


def key_of(row: Row) -> tuple:
    """What identifies a clip: the hash of its file, its times and its caption."""
    return source_hash(row.file), row.start, row.end, row.caption


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

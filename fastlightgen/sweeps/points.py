"""From lists of values to students, and to the stages that they share."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastlightgen.config import ConfigError, fingerprint, load, method_for, result_of
from fastlightgen.config.stages import CHOOSES, METHODS

STAGES = ("1", "2", "3")
INPUTS = {"1": "importance", "2": "stage2_model"}  # the key that names the result of a stage


@dataclass
class Part:
    """A stage to train: its folder, its command line, and the parts before it."""

    stage: str
    folder: Path
    words: list[str]
    cfg: Any
    after: list["Part"] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return result_of(self.folder, int(self.stage)).exists()


@dataclass
class Point:
    """A combination of values: its name without the seed, its seed, its last part, the file of its scores."""

    name: str
    seed: int
    parts: list[Part]
    scores: Path


def words_of(stage: str, point: Mapping[str, str]) -> list[str]:
    """The words of a point that a stage understands: stageN.key, or a key whose value the stage accepts."""
    method = point.get(f"stage{stage}.method", point.get("method", ""))
    own = method if stage in CHOOSES and method in METHODS[stage] else ""
    out = {}
    for key, value in point.items():
        prefix, _, name = key.rpartition(".")
        if prefix == f"stage{stage}" or (not prefix and accepts(stage, own, point.get("model", "tiny"), key, value)):
            out[name] = value
    return [f"{key}={value}" for key, value in out.items()]


@cache
def accepts(stage: str, method: str, model: str, key: str, value: str) -> bool:
    """Does a stage have this key, and may it have this value? `ratio` is a share in Stage I, a number in Stage III."""
    if key == "method":
        return bool(method)
    words = [f"stage={stage}", "run=x", f"model={model}", *([f"method={method}"] if method else [])]
    try:
        load([*(word for word in words if word.partition("=")[0] != key), f"{key}={value}"])
    except ConfigError:
        return False
    return True


def check(point: Mapping[str, str]) -> None:
    """Raise if no stage takes a key, or its value."""
    taken = {word for stage in STAGES for word in words_of(stage, point)}
    for key, value in point.items():
        if f"{key.rpartition('.')[2]}={value}" not in taken:
            raise ConfigError(f"{key}={value}: no stage takes this; `fastlightgen train --help all` lists the keys")


def parts_of(run: Path, point: Mapping[str, str], known: dict[Path, Part]) -> list[Part]:
    """The stages of a point, in order, each shared with the points for which it would be the same."""
    out: dict[str, Part] = {}
    for stage in STAGES:
        words = [f"stage={stage}", *words_of(stage, point)]
        cfg = load([*words, f"run={run}"])
        needed = method_for(cfg).needs(cfg)
        after = [out[needed]] if needed in out else []
        inputs = [f"{INPUTS[one.stage]}={result_of(one.folder, int(one.stage))}" for one in after]
        before = "".join(one.folder.name for one in after)
        key = sha256(f"{fingerprint(cfg)} {before}".encode()).hexdigest()[:10]
        folder = run / "parts" / f"stage{stage}-{key}"
        known.setdefault(folder, Part(stage, folder, [*words, f"run={folder}", *inputs], cfg, after))
        out[stage] = known[folder]
    used = [out["3"]]
    for part in used:  # grows as it goes
        used += [one for one in part.after if one not in used]
    return used[::-1]


def points_of(run: Path, swept: Mapping[str, list[str]], seeds: Sequence[int]) -> list[Point]:
    """Every combination of the lists, for every seed."""
    known: dict[Path, Part] = {}
    several = [key for key, values in swept.items() if len(values) > 1]
    out = []
    for values in itertools.product(*swept.values()):
        point = dict(zip(swept, values, strict=True))
        check(point)
        name = " ".join(f"{key}={point[key]}" for key in several) or "student"
        for seed in seeds:
            parts = parts_of(run, point | {"seed": str(seed)}, known)
            file = re.sub(r"[^\w.=-]+", "_", f"{name} seed={seed}")
            out.append(Point(name, seed, parts, run / "scores" / f"{file}.json"))
    return out


def unique(points: Sequence[Point]) -> list[Part]:
    return list({part.folder: part for point in points for part in point.parts}.values())

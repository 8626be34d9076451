"""From lists of values, or rows of a table, to models, and to the stages that they share."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastlightgen.config import ConfigError, fingerprint, load, method_for, result_of
from fastlightgen.config.fields import clipped
from fastlightgen.config.limits import MOST_POINTS
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
    def result(self) -> Path:
        return result_of(self.folder, int(self.stage))

    @property
    def done(self) -> bool:
        return self.result.exists()

    @property
    def dropped(self) -> float | None:
        """The share of the blocks that its Stage I drops; None without one."""
        shares = [self.cfg.ratio if self.stage == "1" else None, *(part.dropped for part in self.after)]
        return next((share for share in shares if share is not None), None)


@dataclass
class Point:
    """A model to evaluate: its name without the seed, what makes it, how it is sampled, the file of its scores.

    Without parts it is the model that all stages start from, and has no training seed.
    """

    name: str
    parts: list[Part]
    start: str  # the model that all stages start from
    plan: tuple[str, ...]  # words for `evaluate`, which the name of the file shows
    where: tuple[str, ...]  # more words for it, which change no score
    scores: Path

    @property
    def model(self) -> str:
        return str(self.parts[-1].result) if self.parts else self.start

    @property
    def scorable(self) -> bool:
        return not self.parts or self.parts[-1].cfg.data == "shapes"


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


def check(point: Mapping[str, str], last: str = "3") -> None:
    """Raise if no stage up to the last takes a key, or its value."""
    taken = {word for stage in upto(last) for word in words_of(stage, point)}
    for key, value in point.items():
        if f"{key.rpartition('.')[2]}={value}" not in taken:
            raise ConfigError(
                f"{clipped(key)}={clipped(value)}: no stage takes this; `fastlightgen train --help all` lists the keys"
            )


def upto(last: str) -> tuple[str, ...]:
    return tuple(stage for stage in STAGES if stage <= last)


def parts_of(run: Path, point: Mapping[str, str], known: dict[Path, Part], last: str = "3") -> list[Part]:
    """The stages of a point, in order, each shared with the points for which it would be the same."""
    out: dict[str, Part] = {}
    for stage in upto(last):
        words = [f"stage={stage}", *words_of(stage, point)]
        cfg = load([*words, f"run={run}"])
        needed = method_for(cfg).needs(cfg)
        after = [out[needed]] if needed in out else []
        inputs = [f"{INPUTS[one.stage]}={one.result}" for one in after]
        before = "".join(one.folder.name for one in after)
        key = sha256(f"{fingerprint(cfg)} {before}".encode()).hexdigest()[:10]
        folder = run / "parts" / f"stage{stage}-{key}"
        known.setdefault(folder, Part(stage, folder, [*words, f"run={folder}", *inputs], cfg, after))
        out[stage] = known[folder]
    used = [out[last]] if out else []
    for part in used:  # grows as it goes
        used += [one for one in part.after if one not in used]
    return used[::-1]


def point_of(
    run: Path,
    name: str,
    keys: Mapping[str, str],
    known: dict[Path, Part],
    last: str = "3",
    plan: Sequence[str] = (),
) -> Point:
    """One model. `last`: the stage that makes it, "0" for the model that all stages start from."""
    parts, start = parts_of(run, keys, known, last), keys.get("model", "tiny")
    made = parts[-1].folder.name if parts else Path(start).name
    where = tuple(f"{key}={keys[key]}" for key in ("device", "threads") if key in keys)
    return Point(name, parts, start, tuple(plan), where, run / "scores" / f"{'-'.join([made, *plan])}.json")


def points_of(run: Path, swept: Mapping[str, list[str]], seeds: Sequence[int], clips: int) -> list[Point]:
    """Every combination of the lists, for every seed, evaluated on `clips` clips."""
    if (count := len(seeds) * math.prod(map(len, swept.values()))) > MOST_POINTS:
        raise ConfigError(f"the lists and seeds make {count} students, wanted at most {MOST_POINTS}")
    known: dict[Path, Part] = {}
    several = [key for key, values in swept.items() if len(values) > 1]
    out = []
    for values in itertools.product(*swept.values()):
        keys = dict(zip(swept, values, strict=True))
        check(keys)
        name = " ".join(f"{key}={keys[key]}" for key in several) or "student"
        own = [keys | {"seed": str(seed)} for seed in seeds]
        out += [point_of(run, name, one, known, plan=(f"clips={clips}",)) for one in own]
    return out


def unique(points: Sequence[Point]) -> list[Part]:
    return list({part.folder: part for point in points for part in point.parts}.values())

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
from fastlightgen.config.layers import CONFIG, leaves, misfit
from fastlightgen.config.limits import MOST_POINTS
from fastlightgen.config.recipes import file_keys
from fastlightgen.config.stages import CHOOSES, DEFAULT, METHODS, root
from fastlightgen.models.folder.experts import experts_of

SHAPES = "shapes"  # the built-in world
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
    where: tuple[str, ...]  # more words for it: the device, and the data, which the folder of the last part names
    scores: Path

    @property
    def model(self) -> str:
        return str(self.parts[-1].result) if self.parts else self.start

    @property
    def data(self) -> str:
        """Where its clips come from: the built-in world, or a latent cache, which holds some out."""
        return str(self.parts[-1].cfg.data) if self.parts else SHAPES

    @property
    def scorable(self) -> bool:
        """Does it sample alone? One of two experts does not."""
        return not self.parts or not self.parts[-1].cfg.boundary


def words_of(stage: str, point: Mapping[str, str]) -> list[str]:
    """The words of a point that a stage understands: a key whose value fits it, and stageN.key, which wins."""
    method = method_of(stage, point)
    out = {key: value for key, value in point.items() if "." not in key and not fault(stage, method, key, value)}
    for key, value in point.items():
        section, _, name = key.rpartition(".")
        if section == f"stage{stage}":
            out[name] = value
    return [f"{key}={value}" for key, value in out.items()]


def method_of(stage: str, point: Mapping[str, str]) -> str:
    """The method of a stage that a point names; "" if it names none of this stage."""
    method = point.get(f"stage{stage}.method", point.get("method", ""))
    return method if stage in CHOOSES and method in METHODS[stage] else ""


@cache
def fault(stage: str, method: str, key: str, value: str) -> str:
    """Why a stage cannot take a key with this value; "" if it can. `ratio`: a share in Stage I, a number in Stage III.

    Rules between several keys are no concern here: the stage checks them when it is loaded.
    """
    if key == "method":
        known = ", ".join(name for one in CHOOSES for name in METHODS[one] if name != DEFAULT)
        return "" if method else f"method={clipped(value)}: wanted one of {DEFAULT}, {known}"
    return misfit(root(stage, {stage: method or DEFAULT}), key, value)


def strings(keys: Mapping[str, Any]) -> dict[str, str]:
    """The keys of YAML as words of a command line have them."""
    return {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in keys.items()}


def under(own: Mapping[str, str], more: Mapping[str, str]) -> dict[str, str]:
    """The keys of a file, and over them those of the user, also over those of the stages that take them."""
    return {k: v for k, v in own.items() if not (replaced(k, own, more) or lacked(k, v, own, more))} | dict(more)


def replaced(key: str, own: Mapping[str, str], more: Mapping[str, str]) -> bool:
    """Does the user give a key for a stage's own (`iters` for stage3.iters)? Its stage may not take it: ratio=2."""
    section, _, name = key.rpartition(".")
    if not section or name not in more:
        return False
    stage = section.removeprefix("stage")
    method = method_of(stage, more) or ("" if name == "method" else method_of(stage, own))
    return not fault(stage, method, name, more[name])


def lacked(key: str, value: str, own: Mapping[str, str], more: Mapping[str, str]) -> bool:
    """Does a file give a stage a key that the method of the user lacks?"""
    section, _, name = key.rpartition(".")
    stage = section.removeprefix("stage")
    method = method_of(stage, more) if section else ""
    return method not in ("", method_of(stage, own) or DEFAULT) and bool(fault(stage, method, name, value))


def with_recipe(point: Mapping[str, str]) -> dict[str, str]:
    """A point with the keys of its config=FILE written out: later changes of the file concern no stage of it."""
    given = {key: value for key, value in point.items() if key != CONFIG}
    if CONFIG not in point:
        return {"model": "tiny", "data": SHAPES} | given
    keys = strings(file_keys(point[CONFIG], "train", {"stage": "all"}))
    own = {key: value for key, value in keys.items() if key not in ("run", "stage", "seed")}  # the sweep has its own
    return {"model": "tiny", "data": SHAPES} | under(own, given)


def check(point: Mapping[str, str], last: str = "3") -> None:
    """Raise if no stage up to the last takes a key, or its value."""
    for key, value in point.items():
        if why := refusal(key, value, point, last):
            raise ConfigError(why)


def refusal(key: str, value: str, point: Mapping[str, str], last: str) -> str:
    """Why no stage up to the last takes a key of a point, in the words of a stage that has the key; "" if one does."""
    shown, (section, _, name) = f"{clipped(key)}={clipped(value)}", key.rpartition(".")
    if key == "stage":
        return f"{shown}: a sweep runs stages 1 to 3; leave it out"
    if section and name == CONFIG:
        return f"{shown}: a recipe is for all stages; give config={clipped(value)}"
    if section:
        known = [f"stage{stage}" for stage in upto(last)]
        return "" if section in known else f"{shown}: wanted {' or '.join(f'{k}.{clipped(name)}' for k in known)}"
    methods = {stage: method_of(stage, point) for stage in upto(last)}
    faults = {stage: fault(stage, method, key, value) for stage, method in methods.items()}
    if not all(faults.values()):
        return ""
    having = [n for n, method in methods.items() if key in leaves(root(n, {n: method or DEFAULT}))]
    brackets = f"; to compare several values, leave the brackets out: {key}={value[1:-1]}" if value[0] == "[" else ""
    return faults[having[0] if having else last] + (brackets if having else "")


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
    if experts_of(start):
        raise ConfigError(f"model={clipped(start)}: has two experts; a sweep distils one network")
    made = parts[-1].folder.name if parts else Path(start).name
    where = tuple(f"{key}={keys[key]}" for key in ("device", "threads") if key in keys)
    if parts and (data := parts[-1].cfg.data) != SHAPES:
        where += (f"data={data}",)
    return Point(name, parts, start, tuple(plan), where, run / "scores" / f"{'-'.join([made, *plan])}.json")


def points_of(run: Path, swept: Mapping[str, list[str]], seeds: Sequence[int], clips: int) -> list[Point]:
    """Every combination of the lists, for every seed, evaluated on `clips` clips."""
    if (count := len(seeds) * math.prod(map(len, swept.values()))) > MOST_POINTS:
        raise ConfigError(f"the lists and seeds make {count} students, wanted at most {MOST_POINTS}")
    known: dict[Path, Part] = {}
    several = [key for key, values in swept.items() if len(values) > 1]
    out = []
    for values in itertools.product(*swept.values()):
        given = dict(zip(swept, values, strict=True))
        check(keys := with_recipe(given))
        name = " ".join(f"{key}={given[key]}" for key in several) or "student"
        own = [keys | {"seed": str(seed)} for seed in seeds]
        out += [point_of(run, name, one, known, plan=(f"clips={clips}",)) for one in own]
    if len(found := {point.data: None for point in out}) > 1:
        raise ConfigError(
            f"data={clipped(','.join(found))}: a table compares models on the same clips; sweep one at a time"
        )
    return out


def unique(points: Sequence[Point]) -> list[Part]:
    return list({part.folder: part for point in points for part in point.parts}.values())

"""Dataclass fields that document and check themselves, and the errors that users see."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar

from omegaconf import MISSING

REQUIRED = MISSING  # the default of a key that the user must give
MOST = 1_000_000_000  # the largest number of a key without a limit of its own, and the negative of the smallest


class UserError(ValueError):
    """A mistake of the user: the command prints it as one line without a traceback and exits with code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class ConfigError(UserError):
    """A configuration that cannot be used: names key, value and remedy."""


def field(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    lo: float | None = None,  # lo <= value
    hi: float | None = None,  # value <= hi
    above: float | None = None,  # above < value
    below: float | None = None,  # value < below
    numbers: bool = True,  # False: changing it does not change what a run computes, see `fingerprint`
    everyday: bool = False,  # True: --help shows it; False: --help all
) -> Any:
    """A dataclass field that documents and checks itself. A range holds for every number of a list."""
    meta: dict[str, Any] = {"help": help, "choices": choices, "numbers": numbers, "everyday": everyday}
    meta["range"] = {"lo": lo, "hi": hi, "above": above, "below": below}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


def section(cls: type, help: str, *, numbers: bool = True) -> Any:
    """A field that holds the keys of another dataclass: `stage2.lr=1e-4`."""
    return dataclasses.field(default_factory=cls, metadata={"help": help, "numbers": numbers})


def with_default(f: dataclasses.Field, value: Any) -> Any:
    """The same field with another default."""
    return dataclasses.field(default=value, metadata=f.metadata)


def type_of(f: dataclasses.Field[Any]) -> Any:
    """The type of a field's values: a class, or list[float]."""
    return f.type


def default_of(f: dataclasses.Field) -> Any:
    return f.default if f.default_factory is NO_DEFAULT else f.default_factory()


def limits(f: dataclasses.Field) -> str:
    """The allowed values of a field in words: "one of a, b" or ">= 0 and < 1" or ""."""
    if f.metadata["choices"]:
        return f"one of {', '.join(f.metadata['choices'])}"
    signs = {"lo": ">=", "above": ">", "hi": "<=", "below": "<"}
    bounds = [f"{signs[k]} {show(f.metadata['range'][k])}" for k in signs if f.metadata["range"][k] is not None]
    return " and ".join(bounds)


def check_value(f: dataclasses.Field, value: Any, key: str) -> None:
    """Check one value: choices, range, two numbers in a pair."""
    shown = clipped(show(value))
    if value == "" and default_of(f) != "":
        raise ConfigError(f"{key}= is empty; {f.metadata['help']}: give {key}=...")
    if f.metadata["choices"] and value not in f.metadata["choices"]:
        raise ConfigError(f"{key}={shown}: wanted {limits(f)}")
    if isinstance(value, list) and len(value) != 2:
        raise ConfigError(f"{key}={shown}: wanted two numbers, for example {key}={show(default_of(f))}")
    for x in value if isinstance(value, list) else [value]:
        if isinstance(x, str | bool):
            continue
        if not math.isfinite(x):
            raise ConfigError(f"{key}={shown}: wanted a finite number")
        r = f.metadata["range"]
        fits = (r["lo"] is None or x >= r["lo"]) and (r["hi"] is None or x <= r["hi"])
        if not (fits and (r["above"] is None or x > r["above"]) and (r["below"] is None or x < r["below"])):
            raise ConfigError(f"{key}={shown}: wanted {limits(f)}")
        low = next((r[key] for key in ("lo", "above") if r[key] is not None), -MOST)
        if not low <= x <= next((r[key] for key in ("hi", "below") if r[key] is not None), MOST):
            raise ConfigError(f"{key}={shown}: wanted a number from {-MOST} to {MOST}")


def clipped(text: str) -> str:
    """A user's text in a message, cut off where it is too long to be read."""
    return text if len(text) <= 200 else f"{text[:197]}..."


def show(value: Any) -> str:
    """A value as a user types it."""
    if isinstance(value, list):
        return f"[{','.join(show(v) for v in value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(kw_only=True)
class Checked:
    """A dataclass that checks its values whenever it is made: from a command line, a file or Python."""

    origins: ClassVar[Mapping[str, str]] = {}  # key -> what set it, see `load`; a key that nothing set has its default

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if not is_dataclass(value) and value != REQUIRED:
                check_value(f, value, f.name)
        self.check()

    def check(self) -> None:
        """Check rules between several keys."""

    def check_ordered(self, *keys: str) -> None:
        for key in keys:
            low, high = getattr(self, key)
            if low >= high:
                raise ConfigError(f"{key}={show([low, high])}: the first number must be below the second")

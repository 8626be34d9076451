"""Shapes of values that a file may hold. A shape finds what is wrong with a value, and says where.

KEPT = record({"kept": items(whole(0, 10_000), least=1, rising=True)}, {"note": text()})
KEPT({"kept": [3, 3]}) -> "kept: is not rising at 3"
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

Shape = Callable[[Any], str]  # value -> what is wrong with it, "" if nothing is
NUMBERS = 1e300  # a larger number overflows in the first product


def shown(value: Any) -> str:
    """A value in a message: short, without control characters."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    out = ascii(value) if isinstance(value, str) else {True: "true", False: "false", None: "null"}.get(value, value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        out = value
    out = str(out)
    return out if len(out) <= 60 else f"{out[:57]}..."


def wrong(value: Any, wanted: str) -> str:
    return f"is {shown(value)}, wanted {wanted}"


def inside(key: str | int, found: str) -> str:
    """What is wrong inside a container, with the place: kept[2], stage3.lr."""
    place = f"[{key}]" if isinstance(key, int) else shown(key).strip("'")
    if not found.startswith(("is ", "has ")):  # the place has more parts
        return f"{place}{'' if found.startswith('[') else '.'}{found}"
    return f"{place}: {found}"


def whole(low: int = 0, high: int = 2**53) -> Shape:
    def check(value: Any) -> str:
        fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return "" if fits else wrong(value, f"a whole number from {low} to {high}")

    return check


def number(low: float = -NUMBERS, high: float = NUMBERS, above: bool = False, finite: bool = True) -> Shape:
    """A number from low to high; `above`: larger than low; not `finite`: nan and inf pass too."""

    def check(value: Any) -> str:
        kind = isinstance(value, int | float) and not isinstance(value, bool)
        if kind and not finite and isinstance(value, float) and not math.isfinite(value):
            return ""
        if kind and low <= value <= high and not (above and value == low):
            return ""
        bounds = "" if (low, high) == (-NUMBERS, NUMBERS) else f" {'above' if above else 'from'} {low:g} to {high:g}"
        return wrong(value, f"a number{bounds}")

    return check


def text(longest: int = 10_000) -> Shape:
    def check(value: Any) -> str:
        if not isinstance(value, str):
            return wrong(value, "a text")
        return f"has {len(value)} characters, wanted {longest} at most" if len(value) > longest else ""

    return check


def name(longest: int = 255) -> Shape:
    """A text without control characters, such as the name of a file."""
    plain = text(longest)
    return lambda value: (
        plain(value) or ("" if value.isprintable() else wrong(value, "a name without control characters"))
    )


def like(pattern: str, wanted: str) -> Shape:
    """A text that matches a pattern as a whole."""
    return lambda value: "" if isinstance(value, str) and re.fullmatch(pattern, value) else wrong(value, wanted)


def flag(value: Any) -> str:
    return "" if isinstance(value, bool) else wrong(value, "true or false")


def anything(value: Any) -> str:
    return ""


def one_of(*values: Any) -> Shape:
    def check(value: Any) -> str:
        return "" if any(type(value) is type(v) and value == v for v in values) else wrong(value, f"one of {values}")

    return check


def either(*shapes: Shape) -> Shape:
    """Any of some shapes; the message is that of the last."""

    def check(value: Any) -> str:
        found = ""
        for shape in shapes:
            if not (found := shape(value)):
                return ""
        return found

    return check


def maybe(shape: Shape) -> Shape:
    """The shape, or null."""
    return lambda value: "" if value is None else shape(value)


def items(shape: Shape, most: int = 1_000_000, least: int = 0, rising: bool = False, falling: bool = False) -> Shape:
    """A list of values of one shape; `rising` and `falling` also exclude equal neighbours."""

    def check(value: Any) -> str:
        if not isinstance(value, list):
            return wrong(value, "a list")
        if not least <= len(value) <= most:
            return f"has {len(value)} entries, wanted {least} to {most}"
        for i, item in enumerate(value):
            if found := shape(item):
                return inside(i, found)
        for before, after in zip(value, value[1:], strict=False):
            if (rising and after <= before) or (falling and after >= before):
                return f"is not {'rising' if rising else 'falling'} at {shown(after)}"
        return ""

    return check


def table(shape: Shape, most: int = 100_000) -> Shape:
    """An object whose values have one shape, under any keys."""

    def check(value: Any) -> str:
        if not isinstance(value, dict):
            return wrong(value, "an object")
        if len(value) > most:
            return f"has {len(value)} entries, wanted {most} at most"
        return next((inside(key, found) for key, item in value.items() if (found := shape(item))), "")

    return check


def record(needed: Mapping[str, Shape], optional: Mapping[str, Shape] | None = None, rest: Shape = anything) -> Shape:
    """An object with the keys of `needed`, perhaps those of `optional`, and others of the shape `rest`."""
    known = {**needed, **(optional or {})}

    def check(value: Any) -> str:
        if not isinstance(value, dict):
            return wrong(value, "an object")
        if absent := [key for key in needed if key not in value]:
            return f"has no {absent[0]!r}"
        return next((inside(k, found) for k, item in value.items() if (found := known.get(k, rest)(item))), "")

    return check

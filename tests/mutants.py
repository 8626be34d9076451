"""Hostile values, and the copies of a value in which one of them stands in the place of every part."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

HOSTILE: list[Any] = [
    None, True, -1, 0, 1e308, 10**9, 10**30, 2.5, float("nan"), "", "3", "../x", "\x1b]0;x", "x" * 20_000, [], [None],
    {}, {"a": {}}, [1, 1, 1], [3, 2, 1], [[[]]], ["evil", "Code"],
]  # fmt: skip


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield (*path, key)
        yield from places(item, (*path, key))


def mutants(value: Any, hostile_values: Sequence[Any] = HOSTILE) -> Iterator[Any]:
    yield from hostile_values
    for path in places(value):
        for hostile in [*hostile_values, ...]:
            out = copy.deepcopy(value)
            holder = out
            for key in path[:-1]:
                holder = holder[key]
            if hostile is not ...:
                holder[path[-1]] = hostile
            else:
                del holder[path[-1]]
            yield out

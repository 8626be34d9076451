"""Block calls for a sharded engine: every tensor is an argument or a result of the module call itself.

A sharded engine hooks module calls. It looks for tensors among the arguments and results, not inside jobs and states.
It replaces them by tensors of its own, whose backward hooks run when the block's backward pass begins and ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from fastlightgen.models.streams import AnyPrompt, AnyTables, Cond, Job, State, Tables

T = TypeVar("T")


@dataclass(eq=False)
class Results:
    """Carries the states out of a flat call, whose return value holds only their tensors."""

    states: list[list[State]]


class FlatModule(nn.Module, Generic[AnyPrompt, AnyTables]):
    """A module that `flat_call` can call; a direct call, without `results`, returns the states themselves."""

    def forward(
        self,
        jobs: list[Job[AnyPrompt]],
        tables: AnyTables,
        recompute: str | None = None,
        results: Results | None = None,
        *tensors: Tensor,
    ) -> list[list[State]] | tuple[Tensor, ...]:
        if tensors:  # an engine's hook may have replaced some of them: compute with these
            jobs, tables = with_tensors((jobs, tables), tensors)
        states = self.run_jobs(jobs, tables, recompute)
        if results is None:
            return states
        results.states = states
        return tuple(tensors_of(states))

    def run_jobs(self, jobs: list[Job[AnyPrompt]], tables: AnyTables, recompute: str | None) -> list[list[State]]:
        """The forward pass; see `Block.run_jobs`."""
        raise NotImplementedError


def flat_call(module: nn.Module, jobs: list[Job], tables: Tables, recompute: str | None) -> list[list[State]]:
    """Call `module.run_jobs(jobs, tables, recompute)` through the module, with all tensors as arguments and results."""
    results = Results([])
    tensors = module(jobs, tables, recompute, results, *tensors_of((jobs, tables)))
    return with_tensors(results.states, tensors)


_NAMES: dict[type, tuple[str, ...]] = {}  # type -> field names: a cache, since every block call asks for every value


def names(value: object) -> tuple[str, ...]:
    """The fields to search for tensors: those of a dataclass, except a Cond, whose tensors belong to the caller."""
    kind = type(value)
    if kind not in _NAMES:
        _NAMES[kind] = ()
        if is_dataclass(value) and not isinstance(value, Cond):
            _NAMES[kind] = tuple(f.name for f in fields(value))
    return _NAMES[kind]


def tensors_of(value: object) -> list[Tensor]:
    """The distinct tensors in nested lists, tuples and dataclasses."""
    out: dict[int, Tensor] = {}
    collect(value, out)
    return list(out.values())


def collect(value: object, out: dict[int, Tensor]) -> None:
    """Add the tensors in `value` to `out`, by id."""
    # Not nested in `tensors_of`: a recursive inner function is a reference cycle, which would keep the tensors alive
    # until the next garbage collection.
    if isinstance(value, Tensor):
        out[id(value)] = value
    elif isinstance(value, list | tuple):
        for item in value:
            collect(item, out)
    else:
        for name in names(value):
            collect(getattr(value, name), out)


def with_tensors(value: T, tensors: Sequence[Tensor]) -> T:
    """Copy `value` with its tensors, in the order of `tensors_of`, replaced by `tensors`.

    A tensor that occurs twice is replaced by the same tensor twice. If nothing changes, `value` itself is returned.
    """
    old = tensors_of(value)
    if all(a is b for a, b in zip(old, tensors, strict=True)):
        return value
    return rebuilt(value, {id(a): b for a, b in zip(old, tensors, strict=True)})


def rebuilt(value: Any, done: dict[int, Any]) -> Any:
    """Copy `value`, replacing each object whose id is a key of `done`; `done` collects the copies made on the way."""
    if id(value) not in done:
        if isinstance(value, State):
            done[id(value)] = State(*(rebuilt(v, done) for v in value))
        elif isinstance(value, list | tuple):
            done[id(value)] = type(value)(rebuilt(v, done) for v in value)
        elif names(value):
            done[id(value)] = replace(value, **{name: rebuilt(getattr(value, name), done) for name in names(value)})
        else:
            return value
    return done[id(value)]

"""Block calls as a sharded engine has to see them: every tensor is an argument or a result of the module call itself.

A sharded engine hooks module calls. It looks for tensors among the arguments and results, not inside jobs and states,
and puts its own tensors in their place to learn when the block's backward pass begins and ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from fastlightgen.models.streams import AnyPrompt, AnyTables, Cond, Job, State, Tables

T = TypeVar("T")


@dataclass(eq=False)
class Results:
    """Carries the states out of a flat call, which returns their tensors alone."""

    states: list[list[State]]


class FlatModule(nn.Module, Generic[AnyPrompt, AnyTables]):
    """A module that `flat_call` can call; called without `results`, it returns its states as they are."""

    def forward(
        self,
        jobs: list[Job[AnyPrompt]],
        tables: AnyTables,
        recompute: str | None = None,
        results: Results | None = None,
        *tensors: Tensor,
    ) -> list[list[State]] | tuple[Tensor, ...]:
        if tensors:
            jobs, tables = with_tensors((jobs, tables), tensors)
        states = self.run_jobs(jobs, tables, recompute)
        if results is None:
            return states
        results.states = states
        return tuple(tensors_of(states))

    def run_jobs(self, jobs: list[Job[AnyPrompt]], tables: AnyTables, recompute: str | None) -> list[list[State]]:
        raise NotImplementedError


def flat_call(module: nn.Module, jobs: list[Job], tables: Tables, recompute: str | None) -> list[list[State]]:
    """`module.run_jobs(jobs, tables, recompute)` as a module call with all tensors in sight."""
    results = Results([])
    tensors = module(jobs, tables, recompute, results, *tensors_of((jobs, tables)))
    return with_tensors(results.states, tensors)


_NAMES: dict[type, tuple[str, ...]] = {}  # by type: looked up for every value of every block call


def names(value: object) -> tuple[str, ...]:
    """The fields in which tensors are looked for: those of a dataclass, but not of a Cond, which is the caller's."""
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
    # No inner function: one that calls itself is a reference cycle, which would hold tensors until Python looks for it.
    if isinstance(value, Tensor):
        out[id(value)] = value
    elif isinstance(value, list | tuple):
        for item in value:
            collect(item, out)
    else:
        for name in names(value):
            collect(getattr(value, name), out)


def with_tensors(value: T, tensors: Sequence[Tensor]) -> T:
    """`value` with the tensors that `tensors_of` finds replaced, in that order; a shared tensor stays shared."""
    old = tensors_of(value)
    if all(a is b for a, b in zip(old, tensors, strict=True)):
        return value
    return rebuilt(value, {id(a): b for a, b in zip(old, tensors, strict=True)})


def rebuilt(value: Any, done: dict[int, Any]) -> Any:
    """A copy of `value` in which the objects whose ids `done` knows are replaced."""
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

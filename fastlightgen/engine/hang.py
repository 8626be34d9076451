"""Where every rank is, and one line that names the odd one when they wait for each other in vain.

The training thread notes the places that it passes, the same ones on every rank. A second thread of each rank writes
the latest to the ranks' common store and ends a run in which nothing has moved for too long.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fastlightgen.models.base import VideoDiT
from fastlightgen.parallel import ranks

PART = 1 / 3  # of `timeout`, after which a collective gives up without knowing why
BEATS, PAUSE = 8, 5.0  # how often a rank tells its place in that time, and at least once in so many seconds
SILENCE = 24  # half pauses without a word after which a rank's process counts as stopped


@dataclass
class Here:
    """What the training thread of this rank is doing."""

    stage: int = 0
    step: int = 0
    role: str = ""
    work: str = ""
    block: tuple | None = None  # network, index, blocks, the blocks that each stream of the walk runs (None: all)
    count: int = 0  # places passed; alike on ranks that are at the same place
    moved: float = 0.0

    def at(self, work: str, block: tuple | None = None, **context) -> None:
        """It passes here: a few assignments."""
        self.work, self.block = work, block
        for key, value in context.items():
            setattr(self, key, value)
        self.count += 1
        self.moved = time.monotonic()

    def text(self) -> str:
        where = f"stage {self.stage}, step {self.step}" if self.step else f"the start of stage {self.stage}"
        if self.role:
            where += f", update of {self.role}"
        if self.block is None:
            return f"{where}, {self.work}"
        network, index, count, keeps = self.block
        inside = [str(k + 1) for k, keep in enumerate(keeps) if keep is None or index in keep]
        return f"{where}, {self.work}, {network}, block {index} of {count} (stream {'+'.join(inside)} of {len(keeps)})"


HERE = Here()


def keeps_of(args: tuple) -> list[list[int] | None]:
    """The blocks of every stream, by the arguments of a network's call."""
    streams = args[2] if isinstance(args[2], list | tuple) else [(args[3:] or (None,))[0]]
    return [None if k is None else sorted(k) for k in (getattr(s, "keep", s) for s in streams)]


def note_walks(net: VideoDiT, name: str) -> None:
    """Note every walk of a network and every block in it, forward and backward, before its weights are gathered."""
    keeps: list[list] = [[]]

    def walk(_, args: tuple) -> None:
        keeps[0] = keeps_of(args)
        HERE.at(f"{name} starts a walk of {len(keeps[0])} streams")

    def forward(index: int, *_) -> None:
        HERE.at("forward", (name, index, net.num_blocks, keeps[0]))

    def after(index: int, _, args: tuple, out) -> None:
        place = (name, index, net.num_blocks, keeps[0])
        for x in out if isinstance(out, tuple) else ():
            if isinstance(x, Tensor) and x.requires_grad:
                x.register_hook(lambda _: HERE.at("backward", place))
                return

    net.register_forward_pre_hook(walk, prepend=True)
    for index, block in enumerate(net.blocks):
        block.register_forward_pre_hook(partial(forward, index), prepend=True)
        block.register_forward_hook(partial(after, index))


@dataclass(frozen=True)
class Place:
    """Where another rank was when it last told."""

    count: int
    text: str
    silent: bool = False  # even its watching thread stands still


def verdict(places: Sequence[Place], seconds: float) -> str:
    """One line: the ranks that have come less far than the others, or where all of them wait."""
    most = max(p.count for p in places)
    behind = [r for r, p in enumerate(places) if p.count < most]
    odd = behind or [r for r, p in enumerate(places) if p.silent]
    others = [r for r in range(len(places)) if r not in odd]
    told = f"nothing has moved for {seconds:.0f} s: "
    if not odd or not others:
        told += f"all {len(places)} ranks are at {places[0].text}"
    else:
        named = [
            f"rank {r} of {len(places)} {'has stopped, last seen' if places[r].silent else 'is'} at {places[r].text}"
            for r in odd[:3]
        ]
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        told += f"{'; '.join(named)}{more}, while {one_or_all(others, places)} at {places[others[0]].text}"
    return f"{told}; {ranks.GO_ON}"


def one_or_all(others: list[int], places: Sequence[Place]) -> str:
    return f"rank {others[0]} waits" if len(others) == 1 else f"the other {len(others)} wait"


class HangWatch:
    """Watches the ranks inside its context; a single process has nobody to wait for."""

    def __init__(self, timeout: float, stage: int):
        self.limit = timeout * PART
        self.pause = min(PAUSE, self.limit / BEATS)
        self.stage, self.ended, self.beats = stage, threading.Event(), 0
        self.thread: threading.Thread | None = None

    def __enter__(self) -> "HangWatch":
        HERE.count = 0
        HERE.at("the networks", stage=self.stage, step=0, role="")
        if ranks.size() > 1:
            self.thread = threading.Thread(target=self._run, name="hang", daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        if self.thread:
            self.thread.join()

    def _run(self) -> None:
        try:
            store = own_store()
            while not self.ended.wait(self.pause):
                self._beat(store)
                if self._late(2 * self.pause):
                    self._end(store)
        except RuntimeError:  # the store has gone with the process that held it
            while not self.ended.wait(self.pause):
                if self._late(0):
                    tell(f"rank {ranks.rank()} of {ranks.size()} waits at {HERE.text()}, and the ranks' store has gone")
                    os._exit(2)

    def _beat(self, store) -> None:
        self.beats += 1
        store.set(f"flg/place/{self.stage}/{ranks.rank()}", json.dumps([self.beats, HERE.count, HERE.text()]))

    def _late(self, more: float) -> bool:
        return time.monotonic() - HERE.moved > self.limit + more  # `more`: time for the others to tell their places

    def _end(self, store) -> None:
        """The first rank that is sure tells; the others wait until it has."""
        before = self._places(store)
        for _ in range(SILENCE):
            time.sleep(self.pause / 2)
            self._beat(store)  # or another rank would take this one for a stopped process
            if all(new[0] != old[0] for new, old in zip(self._places(store), before, strict=True)):
                break
        if not self._late(2 * self.pause):  # it was slow, and goes on
            return
        if store.add("flg/hang", 1) > 1:
            store.wait(["flg/hang/told"], timedelta(seconds=60))
            os._exit(2)
        after = self._places(store)
        places = [
            Place(count, text, silent=beat == old and r != ranks.rank())
            for r, ((old, *_), (beat, count, text)) in enumerate(zip(before, after, strict=True))
        ]
        tell(verdict(places, time.monotonic() - HERE.moved))
        store.set("flg/hang/told", "1")
        os._exit(2)

    def _places(self, store) -> list[list]:
        keys = [f"flg/place/{self.stage}/{r}" for r in range(ranks.size())]
        return [json.loads(store.get(k)) if store.check([k]) else [0, -1, "an unknown place"] for k in keys]


def own_store() -> dist.TCPStore:
    """A second connection to the ranks' store; the training thread may block the first one while it waits."""
    store: Any = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False)


def tell(line: str) -> None:
    print(f"\nerror: {line}", file=sys.stderr, flush=True)
    sys.stdout.flush()

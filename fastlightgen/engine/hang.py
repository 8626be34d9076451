"""Hang detection: one error line names the rank that stands still while the others wait for it.

The training thread notes the places that it passes; the sequence of places is the same on every rank. On each rank a
second thread copies the latest place to the ranks' common store, and ends the run if nothing moves for too long.
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

# A hang is reported after this fraction of `timeout`. At `timeout` itself a collective fails without naming a rank.
FRACTION = 1 / 3
BEATS, PAUSE = 8, 5.0  # a rank writes its place 8 times in that span, and at least every 5 seconds
SILENCE = 24  # half pauses without a new beat after which a rank's process counts as stopped


@dataclass
class Here:
    """The place that the training thread of this rank has reached; one object per process, `HERE`."""

    stage: int = 0
    step: int = 0
    role: str = ""
    work: str = ""
    # (network's name, index of the block, number of blocks, per stream the blocks that it runs or None for all)
    block: tuple | None = None
    count: int = 0  # places passed so far; equal on ranks that are at the same place
    moved: float = 0.0  # time.monotonic() at the latest place, seconds

    def at(self, work: str, block: tuple | None = None, **context) -> None:
        """Note a new place. The training thread calls this often, so it only assigns a few fields."""
        self.work, self.block = work, block
        for key, value in context.items():
            setattr(self, key, value)
        self.count += 1
        self.moved = time.monotonic()

    def text(self) -> str:
        """Describe the place; indices of streams count from 1."""
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
    """Return the blocks that each stream runs (None: all), from the arguments of `VideoDiT.forward`.

    args is (x_t, t, streams) for a walk and (x_t, t, cond, keep) for a plain call.
    """
    streams = args[2] if isinstance(args[2], list | tuple) else [(args[3:] or (None,))[0]]
    return [None if k is None else sorted(k) for k in (getattr(s, "keep", s) for s in streams)]


def note_walks(net: VideoDiT, name: str) -> None:
    """Add hooks that note every walk of a network and every block of it, forward and backward.

    `prepend` puts them before DeepSpeed's hooks: a rank that hangs in a gather has then noted the block it gathers for.
    """
    keeps: list[list] = [[]]  # of the current walk; a list of one entry, because the closures below share it

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
                return  # one output is enough: its gradient arrives before the block's backward begins

    net.register_forward_pre_hook(walk, prepend=True)
    for index, block in enumerate(net.blocks):
        block.register_forward_pre_hook(partial(forward, index), prepend=True)
        block.register_forward_hook(partial(after, index))


@dataclass(frozen=True)
class Place:
    """The place that a rank last wrote to the store."""

    count: int
    text: str
    silent: bool = False  # True if even the rank's watching thread has stopped writing


def verdict(places: Sequence[Place], seconds: float) -> str:
    """Return the error line. It names the ranks that are behind the others, or else those that are silent."""
    most = max(p.count for p in places)
    behind = [r for r, p in enumerate(places) if p.count < most]
    odd = behind or [r for r, p in enumerate(places) if p.silent]
    others = [r for r in range(len(places)) if r not in odd]
    line = f"nothing has moved for {seconds:.0f} s: "
    if not odd or not others:
        line += f"all {len(places)} ranks are at {places[0].text}"
    else:
        named = [
            f"rank {r} of {len(places)} {'has stopped, last seen' if places[r].silent else 'is'} at {places[r].text}"
            for r in odd[:3]
        ]
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        line += f"{'; '.join(named)}{more}, while {one_or_all(others, places)} at {places[others[0]].text}"
    return f"{line}; {ranks.GO_ON}"


def one_or_all(others: list[int], places: Sequence[Place]) -> str:
    """Return the subject and verb for the ranks that wait."""
    return f"rank {others[0]} waits" if len(others) == 1 else f"the other {len(others)} wait"


class HangWatch:
    """Context that ends this rank when nothing moves for `limit` seconds. With a single process it does nothing."""

    def __init__(self, timeout: float, stage: int):
        self.limit = timeout * FRACTION  # seconds
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
        except RuntimeError:  # the process that held the store has ended
            while not self.ended.wait(self.pause):
                if self._late(0):
                    print_error(
                        f"rank {ranks.rank()} of {ranks.size()} waits at {HERE.text()}, and the process that held the "
                        f"ranks' store has ended; {ranks.GO_ON}"
                    )
                    os._exit(2)

    def _beat(self, store) -> None:
        """Write this rank's place to the store. A growing number of beats shows that the process is alive."""
        self.beats += 1
        store.set(f"flg/place/{self.stage}/{ranks.rank()}", json.dumps([self.beats, HERE.count, HERE.text()]))

    def _late(self, grace: float) -> bool:
        """Has this rank stood still for the limit, plus `grace` seconds in which the others write their places?"""
        return time.monotonic() - HERE.moved > self.limit + grace

    def _end(self, store) -> None:
        """Report the hang and exit with code 2. The first rank to get here reports; the others wait for its line."""
        before = self._places(store)
        for _ in range(SILENCE):
            time.sleep(self.pause / 2)
            self._beat(store)  # without new beats another rank would take this process for stopped
            if all(new[0] != old[0] for new, old in zip(self._places(store), before, strict=True)):
                break
        if not self._late(2 * self.pause):  # the training thread was slow and has moved on
            return
        if store.add("flg/hang", 1) > 1:  # another rank reports
            store.wait(["flg/hang/reported"], timedelta(seconds=60))
            os._exit(2)
        after = self._places(store)
        places = [
            Place(count, text, silent=beat == old and r != ranks.rank())
            for r, ((old, *_), (beat, count, text)) in enumerate(zip(before, after, strict=True))
        ]
        print_error(verdict(places, time.monotonic() - HERE.moved))
        store.set("flg/hang/reported", "1")
        os._exit(2)

    def _places(self, store) -> list[list]:
        """Read [beats, count, text] of every rank from the store."""
        keys = [f"flg/place/{self.stage}/{r}" for r in range(ranks.size())]
        return [json.loads(store.get(k)) if store.check([k]) else [0, -1, "an unknown place"] for k in keys]


def own_store() -> dist.TCPStore:
    """Open a second connection to the ranks' store. The training thread may hold the first one while it waits."""
    store: Any = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False)


def print_error(line: str) -> None:
    """Print the line on a row of its own, below a progress bar, and flush: os._exit does not."""
    print(f"\nerror: {line}", file=sys.stderr, flush=True)
    sys.stdout.flush()

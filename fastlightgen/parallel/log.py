"""Output on screen: lines, progress bars, and sizes for people to read. Only rank 0 prints."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from fastlightgen.parallel import ranks

EVERY = 10.0  # seconds between two lines of a bar without a terminal; later a 60th of the time so far


def bar(
    total: int, title: str, shown: bool, start: int = 0, unit: str = "it", scale: bool = False, delay: float = 0.0
) -> tqdm:
    """Return a progress bar with ETA; `scale` writes large numbers as 1.2M, `delay` hides the bar for some seconds.

    On a terminal it redraws every 0.5 s. Elsewhere it prints whole lines: one every 10 s or more rarely, and one at the
    end.
    """
    keys: dict[str, Any] = {"total": total, "initial": start, "desc": title, "unit": unit, "unit_scale": scale}
    hidden = not shown or ranks.rank() > 0
    if sys.stderr.isatty():
        return tqdm(**keys, disable=hidden, delay=delay, mininterval=0.5, dynamic_ncols=True)
    # ncols=0 leaves out the picture of a bar; a delay below the resolution of the clock leaves out the line "0 of N".
    return Lines(**keys, disable=hidden, delay=delay or 1e-9, mininterval=EVERY, miniters=1, ncols=0, file=OwnLines())


class Lines(tqdm):
    """A bar that prints lines, ever more rarely: a run of hours fills no log."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        self.mininterval = max(EVERY, self.format_dict["elapsed"] / 60)
        super().display(msg, pos)


class OwnLines:
    """A file for tqdm that gives every state of a bar a line of its own, and leaves out carriage returns."""

    last = ""

    def write(self, text: str) -> None:
        line = text.strip()
        if line and line != self.last:
            sys.stderr.write(f"{line}\n")
            self.last = line

    def flush(self) -> None:
        sys.stderr.flush()


@contextmanager
def meanwhile(progress: tqdm, title: str, work: str) -> Iterator[None]:
    """While the bar `title` stands still, name the work that takes the time."""
    progress.set_description(f"{title}, {work}")
    yield
    progress.set_description(title, refresh=False)


def say(text: str) -> None:
    """Print a line on rank 0, above a progress bar if there is one."""
    if ranks.rank() == 0:
        tqdm.write(text)


def size(value: float) -> str:
    """Bytes with three digits: 812 kB, 1.23 MB, 61.2 GB; 1 GB is 1e9 bytes."""
    return scaled(value, (" bytes", " kB", " MB", " GB", " TB"))


def count(value: float) -> str:
    """A number with three digits: 412, 35K, 1.23M, 14.3B."""
    return scaled(value, ("", "K", "M", "B"))


def scaled(value: float, units: Sequence[str]) -> str:
    step = 0
    while value >= 999.5 and step + 1 < len(units):
        value, step = value / 1000, step + 1
    return f"{value:.3g}{units[step]}"

"""Output on screen: lines and progress bars. Only rank 0 prints."""

import sys

from tqdm import tqdm

from fastlightgen.parallel import ranks


def bar(total: int, title: str, shown: bool, start: int = 0) -> tqdm:
    """Return a progress bar with ETA. It redraws every 0.5 s on a terminal, every 15 s in a log file."""
    every = 0.5 if sys.stderr.isatty() else 15.0
    return tqdm(
        total=total,
        initial=start,
        desc=title,
        disable=not shown or ranks.rank() > 0,
        mininterval=every,
        dynamic_ncols=True,
    )


def say(text: str) -> None:
    """Print a line on rank 0, above a progress bar if there is one."""
    if ranks.rank() == 0:
        tqdm.write(text)

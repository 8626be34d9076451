"""What a run shows on screen: lines and progress bars; of several processes rank 0 speaks."""

import sys

from tqdm import tqdm

from fastlightgen.parallel import ranks


def bar(total: int, title: str, shown: bool, start: int = 0) -> tqdm:
    """A progress bar with ETA; on a terminal it moves twice a second, in a log file four times a minute."""
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
    """A line for the user that leaves a progress bar whole; of several processes the first one speaks."""
    if ranks.rank() == 0:
        tqdm.write(text)

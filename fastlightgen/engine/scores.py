"""The scores of Stage I on disk, so that an interrupted sweep goes on where it stopped.

A sweep measures a table [block sets, samples], or [block sets, clips, D] where a score is made of D features.
RUN/stage1/scores.safetensors holds the tables of all sweeps so far, with NaN where nothing is computed yet. It is
written after every walk. A finished stage removes it.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastlightgen.data.cache import META
from fastlightgen.engine.folder import SCORES, StageFolder
from fastlightgen.engine.hang import HERE
from fastlightgen.engine.loop import saved_and_stopped
from fastlightgen.files.kinds import DATA
from fastlightgen.files.tensors import read_metadata, read_tensors, save_tensors, summed
from fastlightgen.parallel import ranks
from fastlightgen.parallel.log import bar, say

ANEW = "delete it to start Stage I anew"
FIRST = "sweep-0000"  # the single skips, by far the longest sweep of the default search


def measured(stage: Path) -> tuple[int, int]:
    """How many scores of the first sweep the folder of an unfinished Stage I holds, and of how many; (0, 0): none."""
    try:
        table = read_tensors(stage / SCORES)[FIRST]
    except (ValueError, KeyError):  # there is none, or Stage I will refuse it
        return 0, 0
    return count(table), total(table)


class Scores:
    """Keeps the tables of Stage I. All ranks create one together; rank 0 reads and writes the file."""

    def __init__(self, folder: StageFolder, data: str, signals: Sequence[str], overwrite: bool, progress: bool):
        """`data`: the name of the source, which changes with its clips. `signals`: see `interruptible`."""
        self.file, self.data = folder.scores, data
        self.signals, self.overwrite, self.bar = signals, overwrite, partial(bar, shown=progress)
        self.tables: dict[str, Tensor] = {}  # number of the sweep -> its table; filled from the file on rank 0 only
        self.sweeps = 0  # sweeps begun by this process
        error = ""
        if ranks.rank() == 0:
            try:
                self._read()
            except ValueError as err:
                error = str(err)
        if error := ranks.from_first(error):
            raise ValueError(error)

    @contextmanager
    def sweep(self, sets: int, samples: int, title: str, width: int = 0) -> Iterator["Sweep"]:
        """Open the next sweep, with a progress bar that counts scores; `width`: numbers of a score, 0: it is one."""
        name = f"sweep-{self.sweeps:04d}"
        self.sweeps += 1
        table = torch.full((sets, samples, width) if width else (sets, samples), torch.nan)
        if ranks.size() > 1 and ranks.rank():
            table.zero_()  # the sum below is then rank 0's table
        elif name in self.tables:
            if self.tables[name].shape != table.shape:
                raise damaged(self.file, f"its table {name} is {tuple(self.tables[name].shape)}")
            table = self.tables[name]
        self.tables[name] = table = ranks.summed(table)
        done = count(table)
        if done:
            say(f"{title}: continues with {done} of {total(table)} scores")
        with self.bar(total(table), title, start=done) as progress:
            yield Sweep(self, table, title, progress)

    def save(self) -> None:
        """Write all tables."""
        if ranks.rank() == 0:
            save_tensors(self.file, self.tables, {META: json.dumps({"data": self.data})} | summed(self.tables))

    def clear(self) -> None:
        """Remove the file, once the result is written."""
        self.file.unlink(missing_ok=True)

    def _read(self) -> None:
        if not self.file.exists():
            return
        try:
            self.tables = read_tensors(self.file)
        except ValueError as err:
            raise damaged(self.file, str(err)) from None
        data = read_metadata(self.file, META, DATA, ANEW)["data"]
        if data != self.data:
            raise ValueError(
                f"{self.file}: holds scores of other clips (data_hash {data}, the clips now have {self.data}); "
                "delete it to start Stage I anew"
            )


class Sweep:
    """The table of a sweep that is open: `table` holds the scores so far, NaN where they are missing."""

    def __init__(self, scores: Scores, table: Tensor, title: str, progress: tqdm):
        self.scores, self.table, self.title, self.progress = scores, table, title, progress

    def tick(self, scores: int) -> None:
        """Show scores of a walk that has not ended."""
        self.progress.update(scores)

    def note(self) -> None:
        """Save the table after a walk. If a rank got a signal, end the run. All ranks call this."""
        HERE.at("saving the scores of a walk")
        self.scores.save()
        done = count(self.table)
        self.progress.update(done - self.progress.n)
        if ranks.anyone(bool(self.scores.signals)):
            what = f"{done} of {total(self.table)} scores ({self.title})"
            raise saved_and_stopped(what, self.scores.signals, self.scores.overwrite)


def count(table: Tensor) -> int:
    """Return how many scores of a table are known."""
    return int((~table.isnan()).reshape(*table.shape[:2], -1).all(-1).sum())


def total(table: Tensor) -> int:
    """Return how many scores a table has."""
    return table.shape[0] * table.shape[1]


def damaged(file: object, why: str) -> ValueError:
    return ValueError(f"{file}: cannot be read ({why}); {ANEW}")

"""The run folder: it records the configuration of each stage, and a lock keeps a second process out."""

import fcntl
import math
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch
import yaml

import fastlightgen
from fastlightgen.atomic import lock_file, write_text
from fastlightgen.config import diff, folder_name, result_of
from fastlightgen.engine import checkpoint
from fastlightgen.files.border import check, read_json, read_yaml
from fastlightgen.files.kinds import IMPORTANCE, RUN
from fastlightgen.models.folder.files import verify_model
from fastlightgen.parallel import ranks
from fastlightgen.parallel.log import say
from fastlightgen.parallel.threads import usable_cores

CONFIG, LOCK = "config.yaml", ".lock"  # files of the run folder
SCORES = "scores.safetensors"  # in stage1/, while Stage I is not finished
LENGTH = "iters"  # the key that may change between two starts of a stage
CLIPS = "data_hash"  # names the clips of a cache, which may grow between two starts
RESTORE = "restore it or use another run="
TYPE, USED = "dtype", "dtype_used"  # with dtype=auto a record holds the type that was computed in, too
# Keys that a folder may be older than, with the value that it was made with.
BEFORE = {"fp8": "off", "queries": 256, "score_steps": 8, "score_guidance": -1.0, "candidates": 4, "recovery": ""}
BEFORE |= {"expert": "auto", "boundary": 0.0}
ANEW = "use another run=, or overwrite=true to delete it and start anew"


class StageFolder:
    """DIR/stageN or DIR/decoder, opened for one configuration. `complete` is True if the stage's result already exists.

    `config` is the full resolved configuration, `numbers` the names of the keys that affect the computed numbers.
    `auto_type`: nobody chose the type in it; dtype=auto stands for it.
    """

    _lock = None  # an open file; only rank 0 holds it
    _before: bytes | None = None  # the content of config.yaml when the folder was opened
    _new: Sequence[Path] = ()  # folders that this start has made, the innermost first

    def __init__(
        self,
        run: str,
        number: int | str,
        config: dict,
        numbers: Iterable[str],
        overwrite: bool = False,
        auto_type: bool = False,
    ):
        self.run, self.path = Path(run), Path(run) / folder_name(number)
        self.checkpoints = self.path / "checkpoints"
        self.scores = self.path / SCORES
        self.result, self.auto_type = result_of(run, number), auto_type
        error: str | None = None
        self.complete = False
        if ranks.rank() == 0:
            try:
                self._open(number, config, numbers, overwrite)
            except ValueError as err:
                error = str(err)
        error, self.complete = ranks.from_first([error, self.complete])
        if error:
            self.close()
            raise ValueError(error)

    def _open(self, number: int | str, config: dict, numbers: Iterable[str], overwrite: bool) -> None:
        self._new = [p for p in (self.path, *self.path.parents) if not p.exists()]
        self.run.mkdir(parents=True, exist_ok=True)
        self._lock = lock_file(self.run / LOCK)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"run={self.run}: another process is using this folder; wait for it or choose another"
            ) from None
        if overwrite:
            shutil.rmtree(self.path, ignore_errors=True)
        elif self.result.exists() or self.scores.exists() or checkpoint.steps(self.checkpoints):
            self._check(number, config, numbers)  # else nothing was computed yet
        self.complete = self.result.exists()
        if self.complete and number != "decoder" and (why := damage_of(self.result)):
            raise ValueError(f"{self.result}: is damaged ({why}); delete it, and the same command makes it again")
        if not self.complete:
            self.path.mkdir(parents=True, exist_ok=True)
            file = self.run / CONFIG
            self._before = file.read_bytes() if file.is_file() else None
            self._record(number, config)

    def undo(self) -> None:
        """Leave nothing behind of a start that ended before the stage wrote anything."""
        if self._lock is None or self.path not in self._new or any(self.path.iterdir()):
            return
        file = self.run / CONFIG
        if self._before is None:
            file.unlink(missing_ok=True)
        else:
            write_text(file, self._before.decode())
        if self.run in self._new:
            (self.run / LOCK).unlink(missing_ok=True)
        for folder in self._new:
            with suppress(OSError):  # somebody else has put something into it
                folder.rmdir()

    def close(self) -> None:
        if self._lock:
            self._lock.close()

    def _check(self, number: int | str, config: dict, numbers: Iterable[str]) -> None:
        """Raise if the folder was made with another configuration. Only the length of training may change."""
        made_with = as_used(read_run(self.run).get(folder_name(number), {}))
        before, now = made_with.get(LENGTH), config.get(LENGTH)
        compared = [k for k in numbers if k != LENGTH or before is None]
        changes = diff({k: made_with.get(k, BEFORE.get(k)) for k in compared}, {k: config[k] for k in compared})
        changes.sort(key=lambda change: not change.startswith("method:"))  # another method explains the other changes
        if changes:
            raise ValueError(f"{self.path} was made with another configuration ({'; '.join(changes[:4])}); {ANEW}")
        if now is not None and before not in (None, now):
            self._lengthen(before, now, config.get("lr_schedule") == "cosine")
        if made_with.get(CLIPS) not in (None, config.get(CLIPS)):
            how = "its result is of the earlier ones" if self.result.exists() else "it goes on with the new ones"
            say(f"warning: the clips of data= have changed since {self.path} was begun; {how}")

    def _lengthen(self, before: int, iters: int, cosine: bool) -> None:
        """Let a stage, finished or not, go on to another number of steps; raise if that is not possible."""
        steps = checkpoint.steps(self.checkpoints)
        if not steps:
            raise ValueError(
                f"{LENGTH}={iters}: {self.path} was finished with {LENGTH}={before}, and {self.checkpoints} holds no "
                f"checkpoint to go on from; {ANEW}"
            )
        if iters < (reached := steps[-1]):
            raise ValueError(
                f"{LENGTH}={iters}: {self.path} has reached step {reached} already; "
                f"give {LENGTH}={reached} or more, or {ANEW}"
            )
        kept = ""
        if self.result.exists():
            # Rename it before the new length is recorded: a stage with a result of another length would count as done.
            older = self.path / f"{self.result.name}-{before:06d}"
            shutil.rmtree(older, ignore_errors=True)
            self.result.rename(older)
            kept = f"; the result of {before} steps is now {older}"
        say(f"{self.path}: {LENGTH} was {before}, is now {iters}: goes on from step {reached}{kept}")
        if cosine:
            rate = 0.5 + 0.5 * math.cos(math.pi * reached / iters)
            say(
                f"warning: lr_schedule=cosine: the fall to 0 now ends at step {iters}, not {before}, so the learning "
                f"rate goes on at {rate:.2f} of lr; the result is not that of {iters} steps from the beginning"
            )

    def _record(self, number: int | str, config: dict) -> None:
        """Add this stage's resolved configuration, the hardware, the versions and the commit to DIR/config.yaml."""
        shown = config | {TYPE: "auto", USED: config[TYPE]} if self.auto_type else config
        before = read_run(self.run)
        record = before | {
            folder_name(number): shown,
            "seed": config["seed"],
            "hardware": before.get("hardware", {}) | {folder_name(number): hardware(config.get("device", "auto"))},
            "versions": versions(),
            "git_commit": commit(),
        }
        write_text(self.run / CONFIG, yaml.safe_dump(record, sort_keys=False))


def damage_of(result: Path) -> str:
    """What is wrong with a stage's result, "" if nothing is: a ranking, or a model folder, whose weights are read."""
    try:
        if result.is_dir():
            verify_model(result)
        else:
            read_json(result, IMPORTANCE, "")
    except ValueError as err:
        return str(err).replace(f"{result}/", "").partition("; ")[0]  # without the remedy
    return ""


def read_run(run: Path) -> dict:
    """Read DIR/config.yaml; {} if it does not exist."""
    path = run / CONFIG
    if not path.is_file():
        return {}
    found: dict = read_yaml(path, RESTORE) or {}
    check(found, RUN, str(path), RESTORE)
    return found


def as_used(record: dict) -> dict:
    """A stage's record with the type that it computed in, in place of dtype=auto."""
    return {k: v for k, v in record.items() if k != USED} | ({TYPE: record[USED]} if USED in record else {})


def hardware(device: str) -> str:
    """The processes of a stage, and the GPU of each, or the CPU cores of this host. `device`: the key."""
    if device != "cpu" and torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        own = f"{gpu.name} of {gpu.total_memory / 2**30:.0f} GiB each"
    else:
        own = f"{usable_cores()} CPU cores"
    return f"{ranks.size()} process{'es' * (ranks.size() > 1)}, {own}"


def versions() -> dict[str, str]:
    """The versions of this package and of the libraries that a run's numbers may depend on."""
    own = {"fastlightgen": fastlightgen.__version__, "torch": str(torch.__version__)}
    own |= {"cuda": torch.version.cuda} if torch.version.cuda else {}
    for name in ("diffusers", "transformers", "deepspeed"):
        with suppress(metadata.PackageNotFoundError):
            own[name] = metadata.version(name)
    return own


def commit() -> str | None:
    """Return the git commit of the source tree, or None outside a repository."""
    here = Path(__file__).parent
    try:
        out = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None

"""The run folder: it records the configuration of each stage, and a lock keeps a second process out."""

import fcntl
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch
import yaml

import fastlightgen
from fastlightgen.atomic import write_text
from fastlightgen.config import diff
from fastlightgen.engine import checkpoint
from fastlightgen.parallel import ranks


class StageFolder:
    """DIR/stageN, opened for one configuration. `complete` is True if the stage's result already exists.

    `config` is the full resolved configuration, `numbers` the names of the keys that affect the computed numbers.
    """

    _lock = None  # an open file; only rank 0 holds it

    def __init__(self, run: str, number: int, config: dict, numbers: Iterable[str], overwrite: bool = False):
        self.run, self.path = Path(run), Path(run) / f"stage{number}"
        self.checkpoints = self.path / "checkpoints"
        self.result = self.path / ("importance.json" if number == 1 else "model")
        error: str | None = None
        self.complete = False
        if ranks.rank() == 0:
            try:
                self._open(number, config, numbers, overwrite)
            except ValueError as err:
                error = str(err)
        error, self.complete = ranks.from_first([error, self.complete])
        if error:
            raise ValueError(error)

    def _open(self, number: int, config: dict, numbers: Iterable[str], overwrite: bool) -> None:
        self.run.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.run / ".lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"run={self.run}: another process is using this folder; wait for it or choose another"
            ) from None
        if overwrite:
            shutil.rmtree(self.path, ignore_errors=True)
        elif self.result.exists() or checkpoint.steps(self.checkpoints):  # else nothing was computed yet
            self._check(number, config, numbers)
        self.complete = self.result.exists()
        if not self.complete:
            self.path.mkdir(parents=True, exist_ok=True)
            self._record(number, config)

    def close(self) -> None:
        if self._lock:
            self._lock.close()

    def _check(self, number: int, config: dict, numbers: Iterable[str]) -> None:
        """Raise if the folder was made with another configuration."""
        made_with = read_run(self.run).get(f"stage{number}", {})
        changes = diff({k: made_with.get(k) for k in numbers}, {k: config[k] for k in numbers})
        changes.sort(key=lambda change: not change.startswith("method:"))  # another method explains the other changes
        if changes:
            self.close()
            raise ValueError(
                f"{self.path} was made with another configuration ({'; '.join(changes[:4])}); "
                "use another run=, or overwrite=true to delete it and start anew"
            )

    def _record(self, number: int, config: dict) -> None:
        """Add this stage's resolved configuration, the versions and the commit to DIR/config.yaml."""
        record = read_run(self.run) | {
            f"stage{number}": config,
            "seed": config["seed"],
            "versions": {"fastlightgen": fastlightgen.__version__, "torch": str(torch.__version__)},
            "git_commit": commit(),
        }
        write_text(self.run / "config.yaml", yaml.safe_dump(record, sort_keys=False))


def read_run(run: Path) -> dict:
    """Read DIR/config.yaml; {} if it does not exist."""
    path = run / "config.yaml"
    if not path.is_file():
        return {}
    try:
        return yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as err:
        raise ValueError(
            f"{path}: cannot be read ({str(err).splitlines()[0]}); restore it or use another run="
        ) from None


def commit() -> str | None:
    """Return the git commit of the source tree, or None outside a repository."""
    here = Path(__file__).parent
    try:
        out = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None

"""Writers that copy the log to TensorBoard and Weights & Biases."""

import importlib.util
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from fastlightgen.config import Run


class Writer(Protocol):
    """Receives every record of the log."""

    def write(self, record: dict) -> None:
        """Log the numbers of a record under its `step`."""

    def close(self) -> None: ...


def check_installed(cfg: Run) -> None:
    """Raise if a requested writer is not installed. Called before the networks are loaded, which takes long."""
    for key, value in {"tensorboard": "true" * cfg.tensorboard, "wandb": cfg.wandb}.items():
        spec = importlib.util.find_spec(key)
        if value and (spec is None or spec.origin is None):  # a folder of that name has no origin: not the package
            raise ValueError(
                f"{key}={value}: {key} is not installed; pip install 'fastlightgen[watch]', or leave {key}= out"
            )


class TensorBoard:
    """Writes event files. After a resume TensorBoard hides the old records of steps that are computed again."""

    def __init__(self, folder: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=start + 1)

    def write(self, record: dict) -> None:
        for key, value in record.items():
            if key != "step":
                self.writer.add_scalar(key, value, record["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """One W&B run per stage folder. Its id is kept in the folder, so that a resumed stage continues the same W&B run.

    W&B itself drops records of steps that it already has.
    """

    def __init__(self, project: str, folder: Path, config: dict):
        import wandb

        file = folder / "wandb-id"
        if not file.exists():
            file.write_text(uuid.uuid4().hex[:12])
        name = f"{folder.parent.name} {folder.name}"
        try:
            self.run = wandb.init(
                project=project, id=file.read_text(), name=name, resume="allow", dir=str(folder), config=config
            )
        except wandb.Error as err:
            raise ValueError(
                f"wandb={project}: cannot start ({err}); run `wandb login`, set WANDB_MODE=offline or leave wandb= out"
            ) from None

    def write(self, record: dict) -> None:
        self.run.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def close(self) -> None:
        self.run.finish()


def open_writers(cfg: Run, folder: Path, start: int) -> list[Writer]:
    """Open the writers that the configuration asks for."""
    writers: list[Writer] = [TensorBoard(folder / "tensorboard", start)] if cfg.tensorboard else []
    return [*writers, WandB(cfg.wandb, folder, asdict(cfg))] if cfg.wandb else writers

"""Writers that copy the log to TensorBoard, Weights & Biases and Trackio."""

import importlib.util
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from fastlightgen.config import Run
from fastlightgen.files.border import read_text


class Writer(Protocol):
    """Receives every record of the log."""

    def write(self, record: dict) -> None:
        """Log the numbers of a record under its `step`."""

    def clips(self, step: int, file: Path) -> None:
        """Log the clips made at a step, a .gif."""

    def close(self) -> None: ...


def check_installed(cfg: Run) -> None:
    """Raise if a requested writer is not installed. Called before the networks are loaded, which takes long."""
    for key, value in {"tensorboard": "true" * cfg.tensorboard, "wandb": cfg.wandb, "trackio": cfg.trackio}.items():
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

    def clips(self, step: int, file: Path) -> None:
        """Log the file as it is: TensorBoard plays a .gif among its images. torch's add_video would need moviepy."""
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        width, height = Image.open(file).size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=file.read_bytes())
        self.writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag="clips", image=image)]), step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """One W&B run per stage folder. Its id is kept in the folder, so that a resumed stage continues the same W&B run.

    W&B itself drops records of steps that it already has.
    """

    def __init__(self, project: str, folder: Path, config: dict):
        import wandb

        name, key = f"{folder.parent.name} {folder.name}", own_id(folder / "wandb-id")
        self.video = wandb.Video
        try:
            self.run = wandb.init(project=project, id=key, name=name, resume="allow", dir=str(folder), config=config)
        except wandb.Error as err:
            raise ValueError(
                f"wandb={project}: cannot start ({err}); run `wandb login`, set WANDB_MODE=offline or leave wandb= out"
            ) from None

    def write(self, record: dict) -> None:
        self.run.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def clips(self, step: int, file: Path) -> None:
        self.run.log({"clips": self.video(str(file), format="gif")}, step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """One Trackio run per stage folder, found again by its name, which ends in an id that is kept in the folder.

    Trackio keeps what it is given twice. So the folder also keeps the last step that it was given, and a resumed stage
    leaves out the steps up to it, which are computed again with the same numbers.
    """

    def __init__(self, project: str, folder: Path, config: dict):
        import trackio

        self.file, self.video = folder / "trackio-step", trackio.Video
        self.known = int(read_text(self.file)) if self.file.exists() else 0
        name = f"{folder.parent.name} {folder.name} {own_id(folder / 'trackio-id')}"
        try:
            self.run = trackio.init(project=project, name=name, resume="allow", config=config, embed=False)
        except Exception as err:  # it has no base class of its own errors
            raise ValueError(
                f"trackio={project}: cannot start ({err}); try another name, or leave trackio= out"
            ) from None

    def write(self, record: dict) -> None:
        self._log({k: v for k, v in record.items() if k != "step"}, record["step"])

    def clips(self, step: int, file: Path) -> None:
        self._log({"clips": self.video(str(file))}, step)

    def _log(self, values: dict, step: int) -> None:
        if step > self.known:
            self.run.log(values, step=step)
            self.file.write_text(str(step))

    def close(self) -> None:
        self.run.finish()


def own_id(file: Path) -> str:
    """The id in a file, drawn when it is first asked for."""
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:12])
    return read_text(file)


def open_writers(cfg: Run, folder: Path, start: int) -> list[Writer]:
    """Open the writers that the configuration asks for."""
    writers: list[Writer] = [TensorBoard(folder / "tensorboard", start)] if cfg.tensorboard else []
    if cfg.wandb:
        writers.append(WandB(cfg.wandb, folder, asdict(cfg)))
    if cfg.trackio:
        writers.append(Trackio(cfg.trackio, folder, asdict(cfg)))
    return writers

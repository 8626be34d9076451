"""Writes clips as .mp4, .gif or a .png sheet, and reads pictures. Frames are uint8 [B, F, H, W, 3]."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastlightgen.atomic import check_place, claimed, put
from fastlightgen.files.border import picture


def write_clips(path: Path, frames: NDArray, fps: int, crf: str = "") -> None:
    """Write all clips of a batch into one file, which appears complete or not at all. `crf`: quality of an mp4."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with claimed(temporary := path.with_name(f".tmp-{path.name}")):
        if crf:
            write_mp4(temporary, frames, fps, {"crf": crf})
        else:
            WRITERS[path.suffix](temporary, frames, fps)
        put(temporary, path)


def check_suffix(out: str) -> Path:
    """Return `out` as a path; raise ValueError if no writer exists for its suffix."""
    path = Path(out)
    if path.suffix not in WRITERS:
        raise ValueError(f"out={out}: the suffix is {path.suffix!r}; wanted one of {', '.join(WRITERS)}")
    if path.suffix == ".mp4":
        _av(path)  # fails here, before any sampling, if PyAV is missing
    check_place(out)
    return path


def read_image(path: str, height: int, width: int) -> torch.Tensor:
    """Read a picture as [3, height, width] in [0, 1]: its centre is cropped to that shape and resized."""
    from PIL import Image

    try:
        image = picture(path)
    except ValueError as err:
        raise ValueError(f"image={err}") from None
    scale = min(image.width / width, image.height / height)  # the largest crop of that shape
    w, h = round(width * scale), round(height * scale)
    left, top = (image.width - w) // 2, (image.height - h) // 2
    kind = Image.Resampling.BOX if scale >= 1 else Image.Resampling.BICUBIC  # average down, interpolate up
    small = image.crop((left, top, left + w, top + h)).resize((width, height), kind)
    return torch.from_numpy(np.asarray(small).astype(np.float32) / 255).permute(2, 0, 1)


def in_rows(frames: NDArray) -> NDArray:
    """Place the clips side by side: [B, F, H, W, 3] -> [F, H, B W, 3]."""
    return np.concatenate(list(frames), 2)


def write_gif(path: Path, frames: NDArray, fps: int) -> None:
    from PIL import Image

    pictures = [Image.fromarray(f) for f in in_rows(frames)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=1000 // fps, loop=0)  # ms; forever


def write_sheet(path: Path, frames: NDArray, fps: int) -> None:
    """Write a picture with one row per clip and one column per frame."""
    from PIL import Image

    Image.fromarray(np.concatenate([np.concatenate(list(clip), 1) for clip in frames], 0)).save(path)


def write_mp4(path: Path, frames: NDArray, fps: int, options: dict[str, str] | None = None) -> None:
    av = _av(path)
    with av.open(str(path), "w") as container:
        film = in_rows(frames)
        stream = container.add_stream("libx264", rate=fps, options=options or {})
        stream.height, stream.width, stream.pix_fmt = film.shape[1], film.shape[2], "yuv420p"
        for picture in film:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())  # flush the pictures that the encoder still holds


def _av(path: Path):
    try:
        import av
    except ImportError:
        raise ValueError(
            f"out={path}: mp4 needs PyAV (pip install 'fastlightgen[video]'); .gif and .png do not"
        ) from None
    return av


WRITERS = {".mp4": write_mp4, ".gif": write_gif, ".png": write_sheet}


def to_uint8(video: Tensor) -> Tensor:
    """Convert pixels in [0,1] to uint8, clamped and rounded."""
    return (video.clamp(0, 1) * 255).round().to(torch.uint8)

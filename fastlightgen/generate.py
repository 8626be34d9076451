"""python -m fastlightgen.generate model=DIR prompt=... out=FILE.mp4|gif|png ...: sample clips of one prompt."""

import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastlightgen.config import Generate, main
from fastlightgen.data.codec import Codec, condition, to_uint8
from fastlightgen.data.synthetic import Shapes, pool, tokenise
from fastlightgen.engine.local import pick_device
from fastlightgen.engine.log import say
from fastlightgen.models.base import Cond
from fastlightgen.models.sample import sample, sampling_plan
from fastlightgen.models.weights import load_model, read_card, trained_folder
from fastlightgen.rng import generator

SCALE, FPS = 16, 6  # a clip of the built-in world is 16 pixels wide: enlarge it to be seen


def generate(cfg: Generate) -> None:
    """Sample `count` clips of the built-in world for one prompt."""
    out = Path(cfg.out)
    if out.suffix not in WRITERS:
        raise ValueError(f"out={cfg.out}: the suffix is {out.suffix!r}; wanted one of {', '.join(WRITERS)}")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    clock = time.perf_counter()
    folder = trained_folder(cfg.model)
    model = load_model(folder, pick_device(cfg.device)).requires_grad_(False)
    plan = sampling_plan(read_card(folder), cfg.steps, cfg.guidance, cfg.sampler, model.released)
    loaded = time.perf_counter() - clock

    world = Shapes()
    first = read_image(cfg.image, world.size) if cfg.image else torch.zeros(3, world.size, world.size)
    # The codec works frame by frame, so the first frame can stand for all of them.
    latents = Codec().encode(first.expand(cfg.count, world.frames, -1, -1, -1))
    image = condition(latents, torch.full((cfg.count,), bool(cfg.image))).to(model.device)

    def repeated(x: torch.Tensor) -> torch.Tensor:
        return x.expand(cfg.count, *x.shape[1:]).to(model.device)

    (text, length), (null, null_length) = tokenise([cfg.prompt]), tokenise([""])
    cond, blank = (
        Cond(repeated(words), repeated(n), image, pooled=repeated(pool(words, n)))
        for words, n in ((text, length), (null, null_length))
    )
    noise = torch.randn(latents.shape, generator=generator(cfg.seed)).to(model.device)
    clock = time.perf_counter()
    x0 = sample(model, cond, blank, noise, **plan, seed=cfg.seed)
    sampled = time.perf_counter() - clock
    clock = time.perf_counter()
    frames = to_uint8(Codec().decode(x0.float().cpu())).permute(0, 1, 3, 4, 2).numpy()  # [B, F, H, W, 3]
    frames = frames.repeat(SCALE, 2).repeat(SCALE, 3)
    out.parent.mkdir(parents=True, exist_ok=True)
    WRITERS[out.suffix](out, frames)
    say(
        f"{out}: {cfg.count} clip(s), {len(plan['times'])} steps, guidance {plan['guidance']:g}; "
        f"load {loaded:.2f} s, sample {sampled:.2f} s, write {time.perf_counter() - clock:.2f} s"
    )


def read_image(path: str, size: int) -> torch.Tensor:
    """A picture as [3, size, size] in [0, 1]: its centre square, averaged down."""
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as err:
        raise ValueError(f"image={path}: cannot be read as a picture ({err})") from None
    side = min(picture.size)
    left, top = ((n - side) // 2 for n in picture.size)
    small = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small).astype(np.float32) / 255).permute(2, 0, 1)


def in_rows(frames: NDArray) -> NDArray:
    """[B, F, H, W, 3] -> [F, H, B W, 3]: the clips side by side."""
    return np.concatenate(list(frames), 2)


def write_gif(path: Path, frames: NDArray) -> None:
    from PIL import Image

    pictures = [Image.fromarray(f) for f in in_rows(frames)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=1000 // FPS, loop=0)


def write_sheet(path: Path, frames: NDArray) -> None:
    """One row per clip, one column per frame."""
    from PIL import Image

    Image.fromarray(np.concatenate([np.concatenate(list(clip), 1) for clip in frames], 0)).save(path)


def write_mp4(path: Path, frames: NDArray) -> None:
    try:
        import av
    except ImportError:
        raise ValueError(
            f"out={path}: mp4 needs PyAV (pip install 'fastlightgen[video]'); .gif and .png do not"
        ) from None
    with av.open(str(path), "w") as container:
        film = in_rows(frames)
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = film.shape[1], film.shape[2], "yuv420p"
        for picture in film:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


WRITERS = {".mp4": write_mp4, ".gif": write_gif, ".png": write_sheet}


if __name__ == "__main__":
    main(generate, "generate")

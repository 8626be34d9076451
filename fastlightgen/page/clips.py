"""Clips of a run: those of the evaluation, a row per prompt, and those made during training, a column per step."""

import base64
import io
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastlightgen.files.border import regular
from fastlightgen.files.tensors import read_tensors
from fastlightgen.page.html import note

ROMAN = {0: "0", 2: "II", 3: "III"}
STEPS = 4  # sets of clips shown per stage
WIDTH, FRAMES = 768, 24  # most pixels and frames of a set; larger ones are reduced
LOOKS = {"clips_motion": "motion", "clips_contrast": "contrast", "clips_brightness": "brightness"}  # of samples.jsonl


def sprite(number: int, video: NDArray[np.uint8], lossy: bool = False) -> str:
    """Embed clips [K, F, H, W, 3] as a hidden picture with a row per clip and a column per frame."""
    from PIL import Image

    k, f, h, w, _ = video.shape
    sheet, file = Image.fromarray(video.transpose(0, 2, 1, 3, 4).reshape(k * h, f * w, 3)), io.BytesIO()
    if lossy:
        sheet.save(file, "JPEG", quality=85, subsampling=0)
    else:
        sheet.save(file, "PNG", optimize=True)
    source = f"data:image/{'jpeg' if lossy else 'png'};base64,{base64.b64encode(file.getvalue()).decode()}"
    size = f'data-frames="{f}" data-h="{h}" data-w="{w}"'
    return f'<img class="sprite" hidden alt="" data-id="{number}" {size} src="{source}">'


def canvas(number: int, clip: int, label: str) -> str:
    return f'<canvas role="img" data-s="{number}" data-k="{clip}" aria-label="{escape(label)}"></canvas>'


def evaluated(files: dict[str, Path], evals: dict[str, dict]) -> str:
    """A grid of playing clips: a row per prompt, a column per model. `files`: the clips of each model."""
    evals = {n: e for n, e in evals.items() if e["shown"] and files[n].is_file()}
    if not evals:
        return ""
    heads = "".join(f'<div class="{"student" * (n == "student")}">{escape(e["title"])}</div>' for n, e in evals.items())
    values = {n: files[n].with_suffix(".values.safetensors") for n in evals}
    kept: dict[str, Any] = {n: read_tensors(path).get("adherence", []) for n, path in values.items() if path.is_file()}
    rows = []
    longest: list[dict] = max((e["shown"] for e in evals.values()), key=len)  # models may show different numbers
    for k, clip in enumerate(longest):
        given = ' <span class="tag">first frame given</span>' if clip["has_first"] else ""
        cells = ""
        for s, (name, e) in enumerate(evals.items()):
            if k >= len(e["shown"]):
                cells += "<i></i>"
                continue
            label = f"{e['title']}: {clip['caption']}"
            if k < len(kept.get(name, [])):
                label += f"; adherence of this clip {kept[name][k]:.0%}"
            title = f'<figcaption class="{"student" * (name == "student")}">{escape(e["title"])}</figcaption>'
            cells += f"<figure>{canvas(s, k, label)}{title}</figure>"
        rows.append(f'<div class="row"><p>{escape(clip["caption"])}{given}</p>{cells}</div>')
    grid = f'<div class="row head" aria-hidden="true"><p></p>{heads}</div>{"".join(rows)}'
    sheets = "".join(sprite(s, video_of(files[n])) for s, n in enumerate(evals))
    return f'<div class="clips" style="--n:{len(evals)}">{grid}</div>{sheets}'


def video_of(file: Path) -> NDArray[np.uint8]:
    """The clips [K, F, H, W, 3] that an evaluation kept."""
    video = read_tensors(file).get("video")
    if video is None or video.dtype != torch.uint8 or video.dim() != 5 or video.shape[-1] != 3 or not video.numel():
        raise ValueError(f"{file}: holds no clips; evaluate again")
    return video.numpy()


def during_training(run: Path, looks: dict[int, list[dict]], first: int) -> str:
    """Clips of RUN/stageN/samples, at most STEPS sets per stage.

    `looks`: stage -> the lines of samples.jsonl; `first`: the number of the first picture.
    """
    out, number = "", first
    for stage, lines in looks.items():
        files = spread(sorted((run / f"stage{stage}" / "samples").glob("step-*.gif")), STEPS)
        of_step = {line["step"]: line for line in lines}
        shown = ""
        for file in files:
            if (video := read_gif(file)) is None:
                continue
            step = int(file.stem.removeprefix("step-"))
            numbers = of_step.get(step, {})
            text = ", ".join(f"{name} {numbers[key]:.3g}" for key, name in LOOKS.items() if key in numbers)
            label = (
                f"Stage {ROMAN[stage]}, step {step}: clips of held-out prompts side by side{'; ' * bool(text)}{text}"
            )
            title = f"<figcaption><b>step {step:,}</b> {text}</figcaption>"
            shown += f"<figure>{canvas(number, 0, label)}{title}</figure>{sprite(number, video[None], lossy=True)}"
            number += 1
        if shown:
            out += f'<h3>Stage {ROMAN[stage]}</h3><div class="clips samples">{shown}</div>'
    if not out:
        return ""
    return f"<p>The same held-out prompts from the same noise at every step, side by side.</p>{out}" + note(
        "Motion: mean difference of neighbouring frames; contrast and brightness: of the grey level; all 0 to 255."
    )


def spread(items: list[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spread, the last one among them."""
    count = min(most, len(items))
    return [items[round((i + 1) * len(items) / count) - 1] for i in range(count)]


def read_gif(path: Path) -> NDArray[np.uint8] | None:
    """The frames [F, H, W, 3], reduced to WIDTH pixels and FRAMES frames; None if the file cannot be read."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(regular(path, 64 << 20, "picture"), formats=["GIF"]) as gif:
            scale = min(1.0, WIDTH / gif.width)
            # Multiples of 8: the blocks of a JPEG then never hold two frames.
            width, height = (max(8, round(n * scale / 8) * 8) for n in gif.size)
            total = getattr(gif, "n_frames", 1)
            frames = []
            for i in [j * total // min(FRAMES, total) for j in range(min(FRAMES, total))]:
                gif.seek(i)
                frames.append(np.asarray(gif.convert("RGB").resize((width, height), Image.Resampling.BOX)))
    except (OSError, EOFError, UnidentifiedImageError, ValueError, SyntaxError):
        return None
    return np.stack(frames)

"""Files damaged at random places, many times: each is refused in one line, or gives what was written.

Truncated, one bit flipped, two pieces of different blocks swapped, a piece duplicated or zeroed, bytes appended.
FLG_DAMAGED=N: N times as many.
"""

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tally
import torch
import yaml
from helpers import small_wan
from PIL import Image

from fastlightgen.data.cache import Cache, write_cache
from fastlightgen.data.lists import read_list
from fastlightgen.engine import checkpoint, damage
from fastlightgen.engine.log import read_metrics
from fastlightgen.files import tensors
from fastlightgen.files.border import picture, read_yaml
from fastlightgen.models.folder.files import CHECKSUMS, WEIGHTS
from fastlightgen.models.folder.manifest import verify_files, write_manifest
from fastlightgen.models.folder.weights import load_model, save_model

EACH = 20 * int(os.environ.get("FLG_DAMAGED", "1"))


def piece(data: bytes, draw: random.Random) -> tuple[int, int]:
    start = draw.randrange(len(data))
    return start, min(len(data), start + draw.randint(1, 600))


def truncated(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def flipped(data: bytes, draw: random.Random) -> bytes:
    out, bit = bytearray(data), draw.randrange(8 * len(data))
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


def swapped(data: bytes, draw: random.Random) -> bytes:
    """Checksums add up blocks of 4 KiB, so that two words may change places within one unseen."""
    size = min(draw.randint(1, 600), len(data) // 2)
    apart = max(size, 4096 if len(data) > 3 * 4096 else 0)
    first = draw.randrange(len(data) - apart - size + 1)
    second = draw.randrange(first + apart, len(data) - size + 1)
    a, b = data[first : first + size], data[second : second + size]
    return data[:first] + b + data[first + size : second] + a + data[second + size :]


def duplicated(data: bytes, draw: random.Random) -> bytes:
    start, stop = piece(data, draw)
    return data[:stop] + data[start:stop] + data[stop:]


def zeroed(data: bytes, draw: random.Random) -> bytes:
    start, stop = piece(data, draw)
    return data[:start] + bytes(stop - start) + data[stop:]


def appended(data: bytes, draw: random.Random) -> bytes:
    return data + draw.randbytes(draw.randint(1, 600))


DAMAGES = [truncated, flipped, swapped, duplicated, zeroed, appended]
Read = Callable[[], Any]


def of_model(folder: Path, name: str) -> tuple[Path, Read]:
    save_model(small_wan(1), folder, steps=2)
    return folder / name, lambda: load_model(folder).state_dict()


def of_checkpoint(folder: Path, name: str) -> tuple[Path, Read]:
    held = {"a": {"w": torch.randn(80, 60), "step": torch.tensor([3])}}
    checkpoint.save(folder, 3, held, {"count": {"a": 3}, "engine": "local"}, keep=1).wait()
    where = checkpoint.path(folder, 3)

    def read() -> Any:
        if why := damage.wrong(where, 3):
            raise ValueError(f"{where / name}: {why}")
        _, meta, files = checkpoint.latest(folder, "local")
        return checkpoint.load(files) | {k: meta[k] for k in ("step", "files", "count")}

    return where / name, read


def of_cache(folder: Path, name: str) -> tuple[Path, Read]:
    shards = [{"latents": torch.randn(2, 4, 2, 6, 6), "text": torch.randn(2, 4, 3)} for _ in range(2)]
    write_cache(folder, shards, {"text": torch.zeros(4, 3)}, fields=["text"])
    return folder / name, lambda: (lambda c: (c.read([0, 1, 2, 3]), c.null))(Cache(folder))


def of_export(folder: Path, name: str) -> tuple[Path, Read]:
    (folder / "part").mkdir(parents=True)
    (folder / "part" / "weights.bin").write_bytes(random.Random(0).randbytes(20_000))
    write_manifest(folder, {})

    def read() -> Any:
        verify_files(folder)
        return (folder / "part" / "weights.bin").read_bytes()

    return folder / "part" / name, read


def of_tensors(folder: Path, name: str) -> tuple[Path, Read]:
    held = {"scores": torch.randn(80, 60), "count": torch.arange(9)}
    tensors.save_tensors(folder / name, held, tensors.summed(held))
    return folder / name, lambda: tensors.read_tensors(folder / name)


def of_picture(folder: Path, name: str) -> tuple[Path, Read]:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    Image.fromarray(pixels).save(folder / name)
    return folder / name, lambda: np.asarray(picture(folder / name).convert("RGB")).shape


def of_text(folder: Path, name: str) -> tuple[Path, Read]:
    row = {"file": "a.mp4", "caption": "a red ball", "start": 1, "end": 2, "dover": 90}
    lists = "file,caption,start,end,dover\n" + 'a.mp4,a red ball,1,2,90\nb.mp4,"a, b",0,1,95\n'
    made = {
        "c.yaml": (yaml.safe_dump({"stage0": {"lr": 1e-4, "betas": [0.9, 0.95]}, "seed": 3}), read_yaml),
        "l.jsonl": (f"{json.dumps(row)}\n{json.dumps(row)}\n", lambda path: read_list(path, 80)),
        "l.csv": (lists, lambda path: read_list(path, 80)),
        "metrics.jsonl": ('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n', read_metrics),
    }  # fmt: skip
    content, read = made[name]
    (folder / name).write_text(content)
    return folder / name, lambda: read(folder / name)


# name -> (what makes the file and reads it, its name, whether what is read must be what was written)
FILES: dict[str, tuple[Callable[[Path, str], tuple[Path, Read]], str, bool]] = {
    "weights": (of_model, WEIGHTS, True),
    "checksums of weights": (of_model, CHECKSUMS, True),
    "configuration of a network": (of_model, "config.json", False),
    "checkpoint": (of_checkpoint, "a.safetensors", True),
    "state of a checkpoint": (of_checkpoint, "state.json", True),
    "shard of a cache": (of_cache, "shard-00001.safetensors", True),
    "null prompt of a cache": (of_cache, "null.safetensors", True),
    "index of a cache": (of_cache, "index.json", False),
    "part of an export": (of_export, "weights.bin", True),
    "scores": (of_tensors, "scores.safetensors", True),
    "picture, PNG": (of_picture, "a.png", False),
    "picture, JPEG": (of_picture, "a.jpg", False),
    "picture, WebP": (of_picture, "a.webp", False),
    "picture, BMP": (of_picture, "a.bmp", False),
    "YAML": (of_text, "c.yaml", False),
    "list, JSON lines": (of_text, "l.jsonl", False),
    "list, CSV": (of_text, "l.csv", False),
    "log": (of_text, "metrics.jsonl", False),
}


def flat(value: Any) -> Iterator[Any]:
    """The parts of what was read, in order, with tensors as bytes."""
    if isinstance(value, torch.Tensor):
        yield str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    elif isinstance(value, dict):
        for key in sorted(value):
            yield key
            yield from flat(value[key])
    elif isinstance(value, list | tuple):
        for part in value:
            yield from flat(part)
    else:
        yield value


@pytest.mark.parametrize("kind", FILES)
def test_damage_is_refused_or_harmless(tmp_path, kind):
    make, name, exact = FILES[kind]
    (tmp_path / "place").mkdir(exist_ok=True)
    file, read = make(tmp_path / "place" if make in (of_picture, of_text, of_tensors) else tmp_path / "made", name)
    whole, refused = file.read_bytes(), 0
    right = list(flat(read()))
    for damaging in DAMAGES:
        draw = random.Random(f"{kind} {damaging.__name__}")
        for _ in range(EACH):
            while (data := damaging(whole, draw)) == whole:
                pass
            file.write_bytes(data)
            said = ""
            try:
                found = list(flat(read()))
                assert found == right or not exact, f"{damaging.__name__}: other values"
            except ValueError as err:
                said = str(err)
                assert "\n" not in said and "\x1b" not in said and len(said) < 2_000, said[:300]
                assert file.name in said or file.parent.name in said or "config" in said, said
            refused += bool(said)
            tally.count(f"files, {damaging.__name__}", bool(said))
    assert refused > len(DAMAGES) * EACH / 20

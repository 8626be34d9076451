"""Make a clip with numpy and a runtime: onnxruntime or ExecuTorch. README.md beside this file says how to call it.

step.onnx or step.pte predicts v = noise - clip from noisy latents x_t at time t; fastlightgen.json holds the times and
the sampler. decoder.onnx or decoder.pte, where there is one, makes frames of latents.
"""

import json
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
KEYS = {"prompt": "", "inputs": "", "out": "", "seed": "0", "noise": "", "threads": "0"}


Run = Callable[[dict[str, Any]], Any]  # the output of a file for its inputs by name, in their order


def by_onnxruntime(file: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=onnxruntime.get_available_providers())
    return lambda given: session.run(None, given)[0]


def by_executorch(file: Path, threads: int) -> Run:
    """The file knows the order of its inputs, and not their names."""
    import torch
    from executorch.runtime import Runtime

    if threads:
        torch.set_num_threads(threads)
    method = Runtime.get().load_program(file).load_method("forward")
    return lambda given: method.execute([torch.from_numpy(value) for value in given.values()])[0].numpy().copy()


def load(part: Path, threads: int) -> Run:
    """The file of a part, step or decoder, for the runtime that it was written for."""
    pte = part.with_suffix(".pte")
    return by_executorch(pte, threads) if pte.exists() else by_onnxruntime(part.with_suffix(".onnx"), threads)


def sample(predict: Run, card: dict, given: dict[str, Any], noises: Iterator[Any]) -> Any:
    """Latents [1, C, F, H, W] after all steps; `noises`: the first noise, then fresh ones."""
    x, times = next(noises), card["ladder"]
    for t, after in zip(times, [*times[1:], 0.0]):
        v = predict({"x_t": x, "t": np.array([t], np.float32), **given})
        if card["sampler"] == "ode" or after == 0:
            x = x + (after - t) * v  # an Euler step
        else:
            x = (1 - after) * (x - t * v) + after * next(noises)  # the estimate of the clip, with fresh noise
    return x


def checksum(path: Path) -> int:
    """CRC-32 of the 64-bit sums of blocks of 4 KiB, and of the rest."""
    total = 0
    with open(path, "rb") as file:
        while data := file.read(1 << 22):
            rest = len(data) // 4096 * 4096
            sums = np.frombuffer(data, np.int64, rest // 8).reshape(-1, 512).sum(1)
            total = zlib.crc32(data[rest:], zlib.crc32(sums.data, total))
    return total


def verify() -> None:
    """Compare the files of this folder with manifest.json, and end with one line if one is damaged."""
    manifest = HERE / "manifest.json"
    recorded = json.loads(manifest.read_text(encoding="utf-8"))["files"] if manifest.is_file() else {}
    for name, record in recorded.items():
        file = HERE / name
        if not file.is_file() or file.stat().st_size != record["size"] or checksum(file) != record["sum"]:
            sys.exit(f"{file}: is damaged or missing; copy the folder again, or delete manifest.json if you changed it")


def draw(shape: list[int], seed: int) -> Iterator[Any]:
    generator = np.random.default_rng(seed)
    while True:
        yield generator.standard_normal(shape, np.float32)


def hadamard(size: int) -> Any:
    """Sylvester's matrix of +1 and -1 with orthogonal rows."""
    h = np.ones((1, 1), np.float32)
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    return h


def read_prompt(prompt: str, inputs: dict[str, list[int]], world: dict) -> dict[str, Any]:
    """The network's inputs for a sentence of the built-in world: a code per word, its place, and no first frame."""
    words = [*prompt.split(), "<end>"]
    unknown = [w for w in words if w not in world["words"]]
    if unknown or len(words) > world["tokens"]:
        known = " ".join(w for w in world["words"] if w != "<end>")
        sys.exit(f"prompt={prompt}: wanted at most {world['tokens'] - 1} of these words: {known}")
    text = np.zeros(inputs["text"], np.float32)
    codes = hadamard(32)
    for place, word in enumerate(words):
        text[0, place, :32] = codes[world["words"].index(word) + 1]
        text[0, place, 32 + place] = 4.0
    made = {"text": text, "text_len": np.array([len(words)], np.int64), "pooled": text.sum(1) / len(words)}
    return {name: made.get(name, np.zeros(shape, np.float32)) for name, shape in inputs.items()}


def frames_of(x: Any, card: dict, threads: int) -> Any:
    """Latents as frames, uint8 [F, H, W, 3], by the folder's decoder or that of the built-in world."""
    if "world" in card:
        return decode(x, card["world"])
    video = load(HERE / "decoder", threads)({"latents": np.ascontiguousarray(x, np.float32)})[0]
    return np.round(np.clip(video, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 3, 0)


def decode(x: Any, world: dict) -> Any:
    """Latents of the built-in world as frames, uint8 [F, H, W, 3]: a Haar transform of 2 x 2 pixels."""
    _, _, f, h, w = x.shape
    bands = x.reshape(3, 4, -1) / world["scale"]
    bands[:, 0] += world["low_mean"]
    pixels = (hadamard(4) / 2 @ bands).reshape(3, 2, 2, f, h, w).transpose(3, 4, 1, 5, 2, 0).reshape(f, 2 * h, 2 * w, 3)
    frames = np.round(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    return frames.repeat(world["enlarge"], 1).repeat(world["enlarge"], 2)


def write_png(path: Path, frames: Any, fps: int) -> None:
    """Write an animated PNG, which browsers play."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    count, height, width, _ = frames.shape
    out = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))]
    out.append(chunk(b"acTL", struct.pack(">II", count, 0)))
    for i, frame in enumerate(frames):
        number = struct.pack(">I", max(0, 2 * i - 1))
        out.append(chunk(b"fcTL", number + struct.pack(">IIIIHHBB", width, height, 0, 0, 1, fps, 0, 0)))
        rows = np.concatenate([np.zeros((height, 1), np.uint8), frame.reshape(height, -1)], 1)  # filter 0 in each row
        data = zlib.compress(rows.tobytes())
        out.append(chunk(b"fdAT", struct.pack(">I", 2 * i) + data) if i else chunk(b"IDAT", data))
    path.write_bytes(b"".join([*out, chunk(b"IEND", b"")]))


def main(given: list[str]) -> None:
    keys = KEYS | dict(word.partition("=")[::2] for word in given)
    if extra := sorted(keys.keys() - KEYS.keys()):
        sys.exit(f"{extra[0]}: unknown; the keys are {', '.join(f'{key}=' for key in KEYS)}")
    verify()
    card = json.loads((HERE / "fastlightgen.json").read_text(encoding="utf-8"))
    world, threads = card.get("world"), int(keys["threads"])
    shows = bool(world) or "decoder" in card
    out = Path(keys["out"] or ("clip.png" if shows else "latents.npy"))
    if (needed := "prompt" if world else "inputs") and not keys[needed]:
        sys.exit(f"{needed} is required: see README.md")
    if out.suffix not in ((".png", ".npy") if shows else (".npy",)):
        sys.exit(f"out={out}: wanted a name that ends in .npy{' or .png' if shows else ''}")
    noises = iter(np.load(keys["noise"])[:, None]) if keys["noise"] else draw(card["latent"], int(keys["seed"]))
    if world:
        arrays = read_prompt(keys["prompt"], card["inputs"], world)
    else:
        folder = Path(keys["inputs"])
        arrays = {name: np.load(folder / f"{name}.npy") for name in card["inputs"]}
        if (hint := folder / "hint.npy").exists():  # of a picture that the first noise has to contain
            noises = iter([0.999 * next(noises) + 0.001 * np.load(hint), *(next(noises) for _ in card["ladder"][1:])])
    x = sample(load(HERE / "step", threads), card, arrays, noises)
    result = frames_of(x, card, threads) if shows else x
    write_png(out, result, card["fps"]) if out.suffix == ".png" else np.save(out, result)
    print(f"{out}: {len(card['ladder'])} steps")


if __name__ == "__main__":
    main(sys.argv[1:])

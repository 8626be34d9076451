"""Seconds of a clip by runtime: python bench/runtimes.py model=STUDENT [threads=2] [rounds=15] [decoders=false].

A student of the built-in world makes one clip by torch, onnxruntime (float32, int8) and, where it is installed,
ExecuTorch, in turn, from the same noise. decoders=true times decoders of the released sizes too, with random weights:
5 frames of 48 x 48 pixels. Writes bench/results/runtimes.json: medians, extremes, bytes, differences.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from decoder import RELEASED
from measured_with import versions

from fastlightgen.atomic import write_json
from fastlightgen.config import SHAPES_PROMPT, main
from fastlightgen.export import export
from fastlightgen.models.folder.weights import load_model, read_json
from fastlightgen.pipelines import executorch_folder, onnx_folder, step_generate
from fastlightgen.pipelines.step_decoder import Decoder
from fastlightgen.pipelines.step_folder import Step
from fastlightgen.pipelines.step_generate import decode, draw, read_prompt, sample

OUT = Path("bench/results/runtimes.json")
Contenders = dict[str, Callable[[], Any]]  # name -> what is timed


def timed(contenders: Contenders, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds, after a call of each that does not count."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds + 1):
        for name, call in contenders.items():
            began = time.perf_counter()
            call()
            if i:
                samples[name].append(time.perf_counter() - began)
    return {name: {"seconds": median(s), "low": min(s), "high": max(s)} for name, s in samples.items()}


def runtimes() -> list[str]:
    return ["onnx", *(["executorch"] if find_spec("executorch") else [])]


def clip(step: step_generate.Run, card: dict, given: dict[str, Any]) -> Any:
    """Frames of a clip, as generate.py makes them."""
    return decode(sample(step, card, given, draw(card["latent"], 0)), card["world"])


@torch.no_grad()
def student(model: str, threads: int, rounds: int, work: Path) -> dict[str, dict[str, Any]]:
    """One clip of a student by every runtime."""
    calls: dict[str, step_generate.Run] = {}
    sizes = {}
    for name, words in {
        "onnx": ["to=onnx"],
        "onnx int8": ["to=onnx", "quant=int8"],
        "executorch": ["to=executorch"],
    }.items():
        if name.split()[0] in runtimes():
            folder = work / name.replace(" ", "-")
            main(export, "export", [f"model={model}", f"out={folder}", f"threads={threads}", *words])
            calls[name] = step_generate.load(folder / "step", threads)
            sizes[name] = next(folder.glob("step.*")).stat().st_size
    card = read_json(folder / "fastlightgen.json")
    given = read_prompt(SHAPES_PROMPT, card["inputs"], card["world"])
    step = Step(load_model(model, dtype=torch.float32).eval(), list(given), 1.0)
    calls = {"torch": lambda inputs: step(*map(torch.from_numpy, inputs.values())).numpy()} | calls
    frames = {name: clip(call, card, given).astype(int) for name, call in calls.items()}
    rows: dict[str, dict[str, Any]] = {**timed({n: lambda c=c: clip(c, card, given) for n, c in calls.items()}, rounds)}
    for name in calls.keys() - {"torch"}:
        off = np.abs(frames[name] - frames["torch"])
        rows[name] |= {"bytes": sizes[name], "levels_largest": int(off.max()), "levels_mean": float(off.mean())}
    return rows


@torch.no_grad()
def decoders(threads: int, rounds: int, work: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Decoders of the released sizes, random weights, by name."""
    import diffusers

    class Plain:  # latents as the VAE has them
        shown = staticmethod(lambda video: video)
        normalisation = staticmethod(lambda: (torch.zeros(()), torch.ones(())))

    latents = {"latents": torch.randn(1, 16, 2, 6, 6, generator=torch.Generator().manual_seed(0))}
    for name, (kind, config) in RELEASED.items():
        decoder = Decoder(getattr(diffusers, kind)(**config).eval().requires_grad_(False), Plain()).eval()  # type: ignore[arg-type]
        calls: Contenders = {"torch": lambda decoder=decoder: decoder(latents["latents"])}
        wanted, found, sizes = decoder(latents["latents"]), {}, {}
        for runtime in runtimes():
            file = work / f"decoder.{'onnx' if runtime == 'onnx' else 'pte'}"
            for old in work.glob("decoder.*"):
                old.unlink()
            if runtime == "onnx":
                onnx_folder.write_program(decoder, latents, "frames", file)
            else:
                executorch_folder.write_program(decoder, latents, file)
            run = step_generate.load(work / "decoder", threads)
            calls[runtime] = lambda run=run: run({"latents": latents["latents"].numpy()})
            found[runtime] = float((torch.from_numpy(calls[runtime]()) - wanted).abs().max())
            sizes[runtime] = file.stat().st_size
        row: dict[str, dict[str, Any]] = {**timed(calls, rounds)}
        for runtime in found:
            row[runtime] |= {"largest": found[runtime], "bytes": sizes[runtime]}
        print(name, {k: round(v["seconds"], 4) for k, v in row.items()}, flush=True)
        yield name, row


if __name__ == "__main__":
    keys = {"threads": "2", "rounds": "15", "decoders": "false"} | dict(word.split("=", 1) for word in sys.argv[1:])
    threads, rounds = int(keys["threads"]), int(keys["rounds"])
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    record: dict[str, Any] = {"threads": threads, "rounds": rounds}
    record |= {
        "versions": versions(**{n: version(n) for n in ("onnxruntime", "executorch", "diffusers") if find_spec(n)})
    }
    with tempfile.TemporaryDirectory() as folder:
        record["student"] = student(keys["model"], threads, rounds, Path(folder))
        for name, row in record["student"].items():
            print(name, {k: round(v, 4) for k, v in row.items()}, flush=True)
        write_json(OUT, record)
        record["decoders"] = {}
        for name, row in decoders(threads, rounds, Path(folder)) if keys["decoders"] == "true" else ():
            record["decoders"][name] = row
            write_json(OUT, record)

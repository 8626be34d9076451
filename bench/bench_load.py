"""Measure the loading of a model folder: bytes per second, and the peak of host memory above the network's size.

FLG_LOAD_BLOCKS=30 FLG_LOAD_MODEL=wan2.1-t2v-1.3b measures a published size; it writes the file and removes it. The
shares of the checks are of minima of FLG_LOAD_TURNS=9 loads each.
"""

import os
import time
from pathlib import Path

import pytest
import torch

from fastlightgen.config import preset
from fastlightgen.files import onepass
from fastlightgen.models.folder import weights
from fastlightgen.models.folder.files import verify_tensor
from fastlightgen.models.folder.weights import build, load_model, save_model

MODEL, BLOCKS = os.environ.get("FLG_LOAD_MODEL", "tiny"), int(os.environ.get("FLG_LOAD_BLOCKS", "12"))
TURNS = int(os.environ.get("FLG_LOAD_TURNS", "9"))


def resident(name: str) -> int:
    """VmRSS (now) or VmHWM (its peak) of this process in bytes, mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def only_copied(key: str, value: torch.Tensor, sums: dict, file: Path, into: torch.Tensor | None = None) -> None:
    """What `verify_tensor` would be without its checks."""
    if into is not None:
        into.copy_(value)


def forgotten(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def cost_of_verifying(folder: Path, cold: bool, compiled: bool = True) -> float:
    """The share of a load that goes into checksums and the search for infinite values.

    From the page cache, or `cold`, from the disk; with the compiled pass, or with torch's three.
    """
    times: dict[bool, list[float]] = {True: [], False: []}
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(onepass, "compiled", lambda: None)
        for turn in range(2 * TURNS):  # in turn, so that a slower moment of the machine meets both
            checked = bool(turn % 2)
            patch.setattr(weights, "verify_tensor", verify_tensor if checked else only_copied)
            if cold:
                forgotten(folder)
            start = time.perf_counter()
            load_model(folder, dtype=torch.bfloat16)
            times[checked].append(time.perf_counter() - start)
    return 1 - min(times[False]) / min(times[True])


@pytest.mark.benchmark(group="load")
def bench_load(benchmark, tmp_path: Path):
    with torch.device("meta"):
        empty = build(preset(MODEL)["network"] | {"num_layers": BLOCKS})
    net = empty.to_empty(device="cpu")
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(0.01)  # what stood in this memory may not be finite, and such weights are refused
    folder = save_model(net, tmp_path / "model", torch.bfloat16)
    del empty, net, p
    load_model("tiny")  # import what only the first load imports
    Path("/proc/self/clear_refs").write_text("5")  # measure the peak from here on
    before = resident("VmRSS")
    model = benchmark.pedantic(load_model, (folder,), {"dtype": torch.bfloat16}, rounds=1)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    over = resident("VmHWM") - before - size
    benchmark.extra_info |= {"network": size, "above": over, "bytes/s": size / benchmark.stats.stats.min}
    ways = {"from the page cache": (False, True), "with torch alone": (False, False), "from the disk": (True, True)}
    found = {way: cost_of_verifying(folder, *how) for way, how in ways.items()}
    benchmark.extra_info["verified"] = found
    print("\nchecks of the values:", ", ".join(f"{share:.1%} of the time {way}" for way, share in found.items()))
    print(f"{MODEL}, {BLOCKS} blocks: network {size / 2**20:.0f} MiB, peak {over / 2**20:.0f} MiB above it")

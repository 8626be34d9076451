"""Measure the loading of a model folder and of a checkpoint: bytes per second, memory, the share of the checks.

FLG_LOAD_BLOCKS=30 FLG_LOAD_MODEL=wan2.1-t2v-1.3b measures a published size; it writes the file and removes it. The
shares of the checks are of minima of FLG_LOAD_TURNS=9 loads each. A load from the disk counts only if the system read
the files from the disk.
"""

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bench_plan import CPU, stage_of

from fastlightgen.config import load, preset
from fastlightgen.engine import checkpoint, damage
from fastlightgen.engine.local import LocalEngine
from fastlightgen.files import onepass
from fastlightgen.models.folder import weights
from fastlightgen.models.folder.files import verify_tensors
from fastlightgen.models.folder.weights import build, load_model, save_model

MODEL, BLOCKS = os.environ.get("FLG_LOAD_MODEL", "tiny"), int(os.environ.get("FLG_LOAD_BLOCKS", "12"))
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
TURNS = int(os.environ.get("FLG_LOAD_TURNS", "9"))


def resident(name: str) -> int:
    """VmRSS (now) or VmHWM (its peak) of this process in bytes, mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def only_copied(values: dict[str, tuple[torch.Tensor, torch.Tensor | None]], sums: dict, file: Path) -> None:
    """What `verify_tensors` would be without its checks."""
    for value, into in values.values():
        if into is not None:
            into.copy_(value)


def fresh_memory() -> None:
    """Let every load write to fresh memory, as the first one in a process does, and not to that of the load before."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)


def forgotten(folder: Path) -> int:
    """Drop a folder's files from the page cache; return their size in bytes."""
    size = 0
    for path in filter(Path.is_file, folder.rglob("*")):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
        size += path.stat().st_size
    return size


def read_from_disk() -> int:
    """Bytes that the system has read from disks for this process."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def share_of_checks(folder: Path, read: Callable[[bool], object], cold: bool) -> float:
    """The share of read(True), which verifies the folder, that read(False) saves; `cold`: from the disk."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(2 * TURNS):  # in turn, so that a slower moment of the machine meets both
        checked = bool(turn % 2)
        size, before = forgotten(folder) if cold else 0, read_from_disk()
        start = time.perf_counter()
        read(checked)
        times[checked].append(time.perf_counter() - start)
        got = read_from_disk() - before
        assert got >= 0.9 * size, f"{got} of {size} bytes came from the disk"
    return 1 - min(times[False]) / min(times[True])


def cost_of_verifying(folder: Path, cold: bool, compiled: bool = True) -> float:
    """The share of a load that goes into checksums and the search for infinite values.

    From the page cache, or `cold`, from the disk; with the compiled pass, or with torch's two.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(onepass, "compiled", lambda: None)

        def read(checked: bool) -> None:
            patch.setattr(weights, "verify_tensors", verify_tensors if checked else only_copied)
            load_model(folder, dtype=torch.bfloat16)

        return share_of_checks(folder, read, cold)


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
    fresh_memory()
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


@pytest.mark.benchmark(group="load")
def bench_resume(benchmark, tmp_path: Path):
    """A checkpoint is verified, then read: the second time from the page cache, if the host's memory holds it."""
    cfg = load(["stage=0", "run=unused", "batch=1", "ema=0.99", "checkpointing=false"])
    stage, engine = stage_of(cfg, (512, 2048, 8, (8, 8, 8), 32)), LocalEngine(CPU, "float32")
    engine.prepare(stage)
    for update in stage.updates(0):
        engine.apply(update, 0)
    engine.save(tmp_path, 1, 1, 0).wait()
    files = checkpoint.latest(tmp_path, "local")[2]

    def read(checked: bool) -> None:
        if checked:
            damage.check(tmp_path, "refuse")
        for tensors in checkpoint.load(files).values():
            for value in tensors.values():
                checkpoint.host_copy(value)

    benchmark.pedantic(read, (True,), rounds=1)
    ways = {"from the page cache": False, "from the disk": True}
    found = {way: share_of_checks(tmp_path, read, cold) for way, cold in ways.items()}
    benchmark.extra_info["verified"] = found
    print("\nchecks of a checkpoint:", ", ".join(f"{share:.1%} of the time {way}" for way, share in found.items()))

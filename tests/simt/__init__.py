"""The CUDA sources and bindings, compiled by the host compiler against a shim, so that kernels run on the CPU.

`extension()` corresponds to `fastlightgen._C` on a machine with a GPU, but works on CPU memory.
"""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch
from locks import alone
from torch import Tensor

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "simt"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]
COMPILER = shutil.which("g++")


def _compile(source: Path, flags: list[str], kind: str) -> Path:
    """Compile an object file, named by a hash of its inputs so that nothing is compiled twice."""
    binding = source.parent.name == "bindings"
    folders = ("bindings", "csrc") if binding else ("bindings", "csrc", "tests/simt")
    headers = [p for f in folders for p in sorted((ROOT / f).rglob("*.h" if binding else "*.*h"))]
    speed = ["-O2", "-DFLG_LAUNCHERS"] if kind == "launchers" else ["-O0" if binding else "-O1"]
    command = [COMPILER, *speed, "-std=c++17", "-fPIC", "-DNDEBUG", "-Wall", *flags]
    command += SANITIZE if kind == "sanitized" and not binding else []
    parts = [" ".join(map(str, command)).encode(), *(p.read_bytes() for p in [source, *headers])]
    out = CACHE / f"{source.stem}-{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}.o"
    if not out.exists():
        part = out.with_suffix(f".{os.getpid()}.o")
        done = subprocess.run([*command, "-x", "c++", "-c", source, "-o", part], capture_output=True, text=True)
        assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
        part.rename(out)
    return out


def build(kind: str = "kernels") -> Path:
    """The shared library, from bindings/, csrc/ and the shim; one process builds it, the others wait.

    kind `kernels`, `sanitized`, or `launchers`: optimised host code, which launches nothing.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with alone(CACHE / "lock"):
        return _build(kind)


def _build(kind: str) -> Path:
    import pybind11

    folders = ["tests/simt/include", "csrc/include", *sorted(p.relative_to(ROOT) for p in ROOT.glob("csrc/ops/*"))]
    flags = ['-DFLG_CUDA_ARCHS="simt"', "-fvisibility=hidden", "-Wno-unknown-pragmas"]
    flags += [f"-I{ROOT / f}" for f in folders] + [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    patterns = ("csrc/ops/*/*.cu", "bindings/*.cpp", "csrc/*.cu", "tests/simt/*.cpp")
    sources = [p for pattern in patterns for p in sorted(ROOT.glob(pattern))]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _compile(source, flags, kind), sources))
    out = CACHE / f"_C-{hashlib.sha256(''.join(map(str, objects)).encode()).hexdigest()[:16]}.so"
    if not out.exists():
        part = out.with_suffix(f".{os.getpid()}.so")
        link = [COMPILER, "-shared", *(SANITIZE if kind == "sanitized" else []), "-o", part, *objects]
        subprocess.run(link, check=True)
        part.rename(out)
    return out


@lru_cache
def path() -> str:
    """The library of this process; FLG_SIMT names the one built with sanitizers."""
    return os.environ.get("FLG_SIMT") or str(build())


@lru_cache
def extension() -> ModuleType:
    return _loaded("_C", path())


@lru_cache
def launchers() -> ModuleType:
    """The launchers for an H100, without kernels: what a call costs the host."""
    return _loaded("launchers._C", str(build("launchers")))


def _loaded(name: str, file: str) -> ModuleType:
    """Load a library under a name of its own: pybind11 returns an earlier module for a name that it knows."""
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def backwards(on: bool) -> None:
    """Run threads, warps and blocks in the opposite order (on) or in order."""
    ctypes.CDLL(path()).simt_backwards(int(on))


def convert(x: Tensor, half: Tensor, bfloat16: Tensor) -> None:
    """Round x to the shim's half and bfloat16; write the results as float32."""
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (x, half, bfloat16))
    ctypes.CDLL(path()).simt_convert(*pointers, ctypes.c_int64(x.numel()))


def runs(rows: int, rows_per_mod: int, workers: int) -> Tensor:
    """First row and row after the last [runs, 2] of every run that split_rows of csrc/include/flg/runs.h makes."""
    library, sizes = ctypes.CDLL(path()), [ctypes.c_int64(n) for n in (rows, rows_per_mod, workers)]
    library.simt_runs.restype = ctypes.c_int64
    bounds = torch.empty(library.simt_runs(*sizes, None), 2, dtype=torch.int64)
    library.simt_runs(*sizes, ctypes.c_void_p(bounds.data_ptr()))
    return bounds


def selftest(kind: int, salt: float, out: Tensor) -> int:
    """Launch the kernel of selftest.cpp; return its cudaError."""
    pointer = ctypes.c_void_p(out.data_ptr())
    return ctypes.CDLL(path()).simt_selftest(ctypes.c_int(kind), ctypes.c_float(salt), pointer)

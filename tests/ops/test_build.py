"""The compiled part without a GPU: what nvcc says about every kernel, what the extension says about itself."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastlightgen.ops import dispatch

ROOT = Path(__file__).parents[2]
KERNELS = sorted((ROOT / "csrc" / "ops").glob("*/*.cu"))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", KERNELS, ids=lambda p: p.stem)
def test_kernels_compile_without_spills(source: Path, tmp_path: Path):
    command = [NVCC, "-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr"]
    command += ["-gencode=arch=compute_90a,code=sm_90a"]
    command += [f"-I{ROOT / 'csrc' / 'include'}", "-Xptxas", "-v", "-cubin", "-o", tmp_path / "out.cubin", source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    assert registers and len(spills) == 2 * len(registers), done.stderr  # stores and loads of each kernel
    assert not any(spills), done.stderr
    assert "C7510" not in done.stderr and "C7508" not in done.stderr, "wgmma was serialised: is NDEBUG set?"


def test_no_torch_header_in_the_compiled_part():
    """One source builds against any torch, and where torch has no CUDA: nothing here may see a Tensor."""
    files = [p for folder in ("csrc", "bindings") for p in (ROOT / folder).rglob("*") if p.is_file()]
    assert len(files) >= 8
    guilty = [p.name for p in files if re.search(r"#include\s*[<\"](torch|ATen|c10)/", p.read_text())]
    assert not guilty


def test_the_extension_agrees_with_the_report():
    parts = dispatch.parts()
    if (extension := dispatch.extension()) is None:
        pytest.skip(f"no C++ extension: {parts['C++ extension'][1]}")
    assert extension.cuda_built() == parts["CUDA kernels"][0] == bool(extension.archs())


@pytest.mark.skipif(not dispatch.parts()["CUDA kernels"][0], reason="the CUDA kernels were not built")
def test_a_launcher_refuses_what_it_cannot_do():
    """cudaErrorInvalidValue (1) before any CUDA call, so this runs without a GPU: misaligned, odd width, no divisor."""
    launch = dispatch.extension().norm_modulate
    good = [64, 64, 64, 64, 0, 16, 1, 16, 16, 1e-6, 0, 0, 0]  # no rows: nothing to do
    assert launch(*good) == 0
    for place, value in ((1, 72), (5, 12), (6, 0), (7, 2)):  # x, dim, rows_per_mod, scale_stride
        assert launch(*[value if i == place else v for i, v in enumerate(good)]) == 1

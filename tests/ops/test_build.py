"""The compiled part without a GPU: nvcc's output for every kernel, and the extension's description of itself."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastlightgen.ops import dispatch

ROOT = Path(__file__).parents[2]
KERNELS = sorted((ROOT / "csrc" / "ops").glob("*/*.cu"))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cuobjdump() -> str | None:
    """The path of the CUDA toolkit's disassembler, or of triton's copy."""
    triton = importlib.util.find_spec("triton")
    own = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton else None
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin") or (
        shutil.which("cuobjdump", path=str(own)) if own else None
    )  # fmt: skip


def compile_for(arch: str, source: Path, folder: Path) -> tuple[Path, str]:
    """Compile a source; return the cubin and ptxas's output."""
    if NVCC is None:
        pytest.skip("nvcc is not installed")
    out = folder / f"{source.stem}.cubin"
    command = [NVCC, "-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    command += [f"-I{ROOT / 'csrc' / 'include'}", "-Xptxas", "-v", "-cubin", "-o", out, source]
    done = subprocess.run(command, capture_output=True, text=True)
    if "Unsupported gpu architecture" in done.stderr:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    assert done.returncode == 0, done.stderr
    return out, done.stderr


@pytest.fixture(scope="module", params=KERNELS, ids=lambda p: p.stem)
def compiled(request, tmp_path_factory) -> tuple[Path, str]:
    return compile_for("90a", request.param, tmp_path_factory.mktemp("cubin"))


# Bytes that a kernel may spill: 0, except on sm_100, which lacks one register in the float16 backward with a gate.
OTHERS = {"80": 0, "100": 4}


@pytest.mark.slow
@pytest.mark.parametrize("arch", OTHERS)
@pytest.mark.parametrize("source", KERNELS, ids=lambda p: p.stem)
def test_other_architectures_do_not_spill(tmp_path, source: Path, arch: str):
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", compile_for(arch, source, tmp_path)[1])]
    assert spills and max(spills) <= OTHERS[arch]


def test_no_kernel_spills(compiled: tuple[Path, str]):
    said = compiled[1]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", said)]
    registers = re.findall(r"Used (\d+) registers", said)
    assert registers and len(spills) == 2 * len(registers), said  # stores and loads of each kernel
    assert not any(spills), said
    assert "C7510" not in said and "C7508" not in said, "wgmma was serialised: is NDEBUG set?"


def test_registers_leave_room_for_the_blocks(compiled: tuple[Path, str]):
    """For 16-bit rows of the tuned widths an SM holds the planned blocks: 20 warps forward, 12 backward."""
    tuned = r"entry function '(\S*(?:bfloat16|half)NS\S*WidthILi(\d+)ELb1\S*)'.*?Used (\d+) registers"
    found = re.findall(tuned, compiled[1], re.S)
    assert found or compiled[0].stem == "dmd_gradient"
    for name, threads, registers in found:
        planned = 384 if "backward" in name else 640
        blocks = planned // int(threads)
        resident = 65536 // (-(-int(registers) // 8) * 8 * 32) // 4 * 4  # warps; registers come in units of 8
        assert resident // (int(threads) // 32) >= blocks, f"{name}: {registers} registers"


def test_global_memory_is_read_128_bits_at_a_time(compiled: tuple[Path, str]):
    """Every kernel loads and stores its tensors in units of 16 bytes; a narrow store means a vector that was split."""
    if (tool := cuobjdump()) is None:
        pytest.skip("cuobjdump is not installed")
    sass = subprocess.run([tool, "--dump-sass", compiled[0]], capture_output=True, text=True, check=True).stdout
    functions = re.split(r"Function : ", sass)[1:]
    assert functions
    for text in functions:
        name = text.split()[0]
        wide = {kind: len(re.findall(rf"{kind}\S*\.128", text)) for kind in ("LDG", "STG")}
        assert wide["LDG"] and wide["STG"], f"{name}: {wide}"
        narrow = re.findall(r"STG\.(?!\S*128)\S+", text)
        scalars = 2 if "dmd_gradient" in name else 0  # a partial sum and the normaliser
        assert len(narrow) <= scalars, f"{name}: {narrow}"
        assert not re.findall(r"\b(?:LDL|STL|RED|ATOM)\b", text) or "dmd_gradient" in name, f"{name}: spills or atomics"


def test_no_torch_header_in_the_compiled_part():
    """The sources must build against any torch, also one without CUDA, so no file may include its headers."""
    files = [p for folder in ("csrc", "bindings") for p in (ROOT / folder).rglob("*") if p.is_file()]
    assert len(files) >= 8
    guilty = [p.name for p in files if re.search(r"#include\s*[<\"](torch|ATen|c10)/", p.read_text())]
    assert not guilty


def test_the_extension_agrees_with_the_report():
    parts = dispatch.parts()
    if (extension := dispatch.extension()) is None:
        pytest.skip(f"no C++ extension: {parts['C++ extension'][1]}")
    assert extension.cuda_built() == parts["CUDA kernels"][0] == bool(extension.archs())


def test_the_interface_is_the_one_that_is_asked_for(simt):
    assert simt.interface == dispatch.INTERFACE


def test_a_launcher_refuses_what_it_cannot_do(simt):
    """Launchers return cudaErrorInvalidValue (1): misaligned, odd width, too wide, no divisor, odd stride."""
    good = [0, 64, 64, 0, 0, 64, 64, 0, 16, 1, 0, 16, 16, 1.0, 1e-6, 0, 0, 0]  # no rows: nothing to do
    assert simt.gate_residual_norm_modulate(*good) == 0
    for place, value in ((2, 72), (8, 12), (8, 5128), (9, 0), (11, 2), (7, -1)):
        assert simt.gate_residual_norm_modulate(*[value if i == place else v for i, v in enumerate(good)]) == 1
    assert simt.gate_residual_norm_modulate_runs(8, 12, 1, 0, 0) == -1
    scalars = [64] * 12
    assert simt.dmd_gradient(*scalars, 0, 16, 0, 0, 0, 0) == 0
    assert simt.dmd_gradient(*scalars, 0, 12, 0, 0, 0, 0) == 1 and simt.dmd_gradient(*scalars, 0, 16, 2, 0, 0, 0) == 1
    tensors, rope = ([64, 64],) * 3, ([64] * 3, [2, 2, 2], [4, 2, 2])
    assert simt.qk_norm_rope(*tensors, *rope, 0, 8, 32, 16, False, 1e-6, 0, 0, 0) == 0
    for tokens, dim, head_dim in ((7, 32, 16), (8, 24, 16), (8, 32, 8)):  # few tokens; no divisor; pairs
        assert simt.qk_norm_rope(*tensors, *rope, 0, tokens, dim, head_dim, False, 1e-6, 0, 0, 0) == 1


@pytest.mark.parametrize("name", sorted({p.parent.name for p in KERNELS}))
def test_the_build_knows_every_operator(name: str):
    assert name in re.search(r"set\(ops ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())[1].split()
    assert f"bind_{name}(m);" in (ROOT / "bindings" / "module.cpp").read_text()

"""The compiled part without a GPU: nvcc's output for every kernel, and the extension's description of itself."""

import json
import re
from pathlib import Path

import machine_code
import pytest
from machine_code import NVCC, ROOT, SOURCES, Kernel, cuobjdump

from fastlightgen.ops import dispatch

WAN_14B = {"dtype": "bfloat16", "dim": 5120}


def compiled_for(arch: str, source: Path, folder: Path) -> tuple[list[Kernel], str]:
    """The kernels of a source and ptxas's output."""
    if NVCC is None or (tool := cuobjdump()) is None:
        pytest.skip("nvcc or cuobjdump is not installed")
    made = machine_code.compile_for(arch, source, folder)
    if made is None:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    return machine_code.kernels(arch, *made, tool), made[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, tuple[list[Kernel], str]]:
    """For sm_90a, by the name of the source."""
    folder = tmp_path_factory.mktemp("cubin")
    return {source.stem: compiled_for("90a", source, folder) for source in SOURCES}


each = pytest.mark.parametrize("name", [source.stem for source in SOURCES])


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "100"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_other_architectures_do_not_spill(tmp_path, source: Path, arch: str):
    assert not [k.name for k in compiled_for(arch, source, tmp_path)[0] if k.spilled]


@each
def test_no_kernel_spills(built, name: str):
    found, said = built[name]
    assert found and not [k.name for k in found if k.spilled], said
    assert "C7510" not in said and "C7508" not in said, "wgmma was serialised: is NDEBUG set?"


@each
def test_registers_leave_room_for_the_blocks(built, name: str):
    """For 16-bit rows of the tuned widths an SM holds the planned blocks: 20 warps forward, 12 backward."""
    tuned = [k for k in built[name][0] if k.dim and k.dtype != "float32"]
    assert tuned or name == "dmd_gradient"
    for k in tuned:
        blocks = (384 if "backward" in k.name else 640) // k.threads
        resident = 65536 // (-(-k.registers // 8) * 8 * 32) // 4 * 4  # warps; registers come in units of 8
        assert resident // (k.threads // 32) >= blocks, f"{k.name} {k.dtype} {k.dim}: {k.registers} registers"


# Most instructions of the loop over rows for Wan 14B. A row has to wait for memory longer than for these.
MOST = {"qk_norm_rope": 320, "qk_norm_rope_backward": 450}


@pytest.mark.parametrize("name", MOST)
def test_instructions_per_row(built, name: str):
    (k,) = (k for k in built["qk_norm_rope"][0] if (k.name, k.dtype, k.dim) == (name, *WAN_14B.values()))
    assert 100 < k.per_row <= MOST[name]


@each
def test_the_next_row_is_loaded_during_this_one(built, name: str):
    """Nothing waits for the loads of the next row before the barrier of this one.

    In qk_norm_rope the wait for a rotation, on the same scoreboard, once waited for them too: an H100 moved 81 % of a
    copy's bytes forward and 72 % backward.
    """
    rows = [k for k in built[name][0] if k.dim and k.dtype != "float32"]
    assert all(k.ahead >= 1 for k in rows), [(k.name, k.dtype, k.dim, k.ahead) for k in rows]


@each
def test_global_memory_is_read_128_bits_at_a_time(built, name: str):
    """Every kernel loads and stores its tensors in units of 16 bytes; a narrow store means a vector that was split."""
    for k in built[name][0]:
        assert k.loads["128"] and k.stores["128"], f"{k.name}: {k.loads} {k.stores}"
        scalars = 2 if name == "dmd_gradient" else 0  # a partial sum and the normaliser
        assert sum(k.stores.values()) - k.stores["128"] <= scalars, f"{k.name}: {k.stores}"
        assert name == "dmd_gradient" or not re.findall(r"\b(?:LDL|STL|RED|ATOM)\b", k.text), f"{k.name}: atomics"


def test_the_written_counts_are_those_of_today(built):
    """bench/results/kernels-static.json, for the same nvcc."""
    written = json.loads(machine_code.RESULTS.read_text())
    if machine_code.nvcc_version() != written["nvcc"]:
        pytest.skip(f"the counts are those of nvcc {written['nvcc']}")
    rows = {
        (row["name"], row["dtype"], row["dim"], row["variant"]): (row["registers"], row["per_row"])
        for row in written["kernels"]
        if row["arch"] == "sm_90a" and row["dim"]
    }
    today = [k for found, _ in built.values() for k in found if k.dim]
    assert rows == {(k.name, k.dtype, k.dim, k.variant): (k.registers, k.per_row) for k in today}, (
        "run python tests/ops/machine_code.py"
    )


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
    good = dict.fromkeys(("x_out", "y", "gate", "gate_stride", "rows", "dtype", "device", "stream"), 0)  # no rows
    good |= {"h": 64, "x": 64, "scale": 64, "shift": 64, "scale_stride": 16, "shift_stride": 16}
    good |= {"dim": 16, "rows_per_mod": 1, "offset": 1.0, "eps": 1e-6}
    assert simt.gate_residual_norm_modulate(good) == 0
    for bad in ({"x": 72}, {"dim": 12}, {"dim": 5128}, {"rows_per_mod": 0}, {"scale_stride": 2}, {"rows": -1}):
        assert simt.gate_residual_norm_modulate(good | bad) == 1
    assert simt.gate_residual_norm_modulate_runs(8, 12, 1, 0, 0) == -1
    names = ("grad normaliser partial x0 x_t v_fake v_weak_cond v_weak_null v_strong_cond t beta1 beta2").split()
    good = dict.fromkeys(names, 64) | dict.fromkeys(("samples", "x_dtype", "v_dtype", "device", "stream"), 0)
    assert simt.dmd_gradient(good | {"size": 16}) == 0
    assert simt.dmd_gradient(good | {"size": 12}) == 1 == simt.dmd_gradient(good | {"size": 16, "x_dtype": 2})
    good = {"out": (64, 64), "x": (64, 64), "weight": (64, 64), "factors": [64] * 3, "size": [2, 2, 2]}
    good |= {"pairs": [4, 2, 2], "rows": 0, "tokens": 8, "dim": 32, "head_dim": 16, "per_head": False, "eps": 1e-6}
    good |= dict.fromkeys(("dtype", "device", "stream"), 0)
    assert simt.qk_norm_rope(good) == 0
    # Few tokens; no divisor; pairs; a head wider than a block's threads serve; an empty grid.
    wide = {"dim": 208, "head_dim": 208, "pairs": [104, 0, 0]}
    for bad in ({"tokens": 7}, {"dim": 24}, {"head_dim": 8}, wide, {"size": [2, 0, 2]}):
        assert simt.qk_norm_rope(good | bad) == 1


def test_a_launcher_names_a_field_that_is_missing_or_wrong(simt):
    given = dict.fromkeys(("out", "x", "weight", "factors", "size", "pairs"), (0, 0, 0))
    with pytest.raises(TypeError, match="wanted 2 items"):
        simt.qk_norm_rope(given | {"stream": 0})
    given |= {"out": (0, 0), "x": (0, 0), "weight": (0, 0)}
    with pytest.raises(TypeError, match="qk_norm_rope: rows is missing"):
        simt.qk_norm_rope(given | {"stream": 0})
    given |= dict.fromkeys(("rows", "tokens", "dim", "head_dim", "per_head", "dtype", "device", "stream"), 0)
    with pytest.raises(TypeError, match="must be real number, not str"):
        simt.qk_norm_rope(given | {"eps": "1e-6"})
    with pytest.raises(TypeError, match="qk_norm_rope: got an unknown field"):
        simt.qk_norm_rope(given | {"eps": 1e-6, "per_heads": 0})


@pytest.mark.parametrize("name", sorted({p.parent.name for p in SOURCES}))
def test_the_build_knows_every_operator(name: str):
    assert name in re.search(r"set\(ops ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())[1].split()
    assert f"bind_{name}(m);" in (ROOT / "bindings" / "module.cpp").read_text()

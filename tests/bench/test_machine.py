"""What bench/gpu.sh says about a machine: one line for each thing that is missing or does not fit."""

import copy

import machine
import order
import pytest

FETCH = "bench/wheels.sh fetches it"
REST = "the compiled kernels are left out, those of Triton and torch remain"
H100 = {
    "torch": {
        "version": "2.11.0+cu130",
        "cuda": "13.0",
        "gpu": {"name": "NVIDIA H100 80GB HBM3", "capability": [9, 0], "memory": 85 << 30, "sms": 132},
    },
    "driver": {"gpu": "NVIDIA H100 80GB HBM3", "version": "580.159.04", "clocks": {}},
    "nvcc": "13.0",
    "cutlass": "/site/cutlass_library/source/include",
    "packages": dict.fromkeys(machine.PACKAGES, "99.0"),
    "tools": {"ncu": "/usr/bin/ncu", "compute-sanitizer": "/usr/bin/compute-sanitizer", "cmake": None, "ninja": None},
}


def changed(**changes) -> list[str]:
    """The lines about an H100 with some entries changed; dots separate the keys of a path."""
    found = copy.deepcopy(H100)
    for path, value in changes.items():
        *parts, last = path.split("__")
        at = found
        for part in parts:
            at = at[part]
        at[last.replace("_", "-") if last.replace("_", "-") in at else last] = value
    return machine.complaints(found)


def test_a_complete_machine_gets_no_line():
    assert changed() == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"torch": {"error": "it is not installed"}}, "torch does not work: it is not installed; nothing can run"),
        ({"torch__version": "2.9.1"}, "torch 2.9.1: the package needs 2.11 or newer; what fails is left out"),
        (
            {"torch__gpu": None, "torch__version": "2.13.0+cpu"},
            "torch 2.13.0+cpu does not see the NVIDIA H100 80GB HBM3; "
            "this is a rehearsal on the CPU, it measures nothing",
        ),
        (
            {"torch__gpu": {"name": "NVIDIA A100", "capability": [8, 0]}},
            "NVIDIA A100 is sm_80, not Hopper: the kernels are built for it; CUTLASS products are left out",
        ),
        (
            {"nvcc": None},
            f"nvcc was not found in CUDA_HOME, /usr/local/cuda or PATH: {REST}",
        ),
        ({"nvcc": "14.0"}, "nvcc 14.0 is newer than torch's CUDA 13.0: the driver may refuse the kernels"),
        (
            {"packages__setuptools": "65.5.0"},
            f"setuptools 65.5.0: the build needs 77 or newer ({FETCH}); {REST}",
        ),
        ({"packages__diffusers": None}, f"diffusers is not installed: its rows are left out ({FETCH})"),
        (
            {"packages__omegaconf": None},
            f"omegaconf is not installed: blocks and steps are left out ({FETCH})",
        ),
        (
            {"cutlass": None},
            f"CUTLASS headers were not found ({FETCH}): the fused linear layers are left out",
        ),
        ({"packages__pytest_xdist": None}, "pytest-xdist is not installed: the tests run in one process"),
        ({"packages__ninja": None}, f"ninja is not installed: {REST}"),
    ],
)  # fmt: skip
def test_each_fault_gets_one_line(changes: dict, line: str):
    assert changed(**changes) == [line]


def test_versions_compare_as_numbers():
    assert machine.number("2.9.1") < machine.number("2.11.0+cu130") < machine.number("2.13")


def test_the_registers_of_the_compiled_kernels():
    """From the module that is installed here, as nvcc's own report of the build says it."""
    modules = sorted((machine.ROOT / "fastlightgen").glob("_C*.so"))
    found = machine.registers(modules[0]) if modules else {}
    if not found:
        pytest.skip("no compiled CUDA kernels, or no disassembler")
    name = next(n for n in found if "forward_kernel<__nv_bfloat16, flg::Width<320, true>, true>" in n)
    assert 32 < found[name]["registers"] <= 255 and found[name]["local"] == 0


def test_own_rows_come_first():
    """At Wan 14B 480p: copy, our kernels and eager torch, before any rival and any other shape."""

    def turn(file, **params):
        return order.phase(file, params)

    main, own = {"shape": "wan-14b-480p", "way": "forward"}, "cuda copy eager".split()
    ours = [turn(f, name=n, **main) for f in order.ROWS for n in own]
    rivals = [turn(f, name=n, **main) for f in order.ROWS for n in ("triton", "torch.compile", "liger layer_norm")]
    others = [turn(f, name=n, shape="hunyuan-720p", way="forward") for f in order.ROWS for n in own]
    assert turn("ceilings") < min(ours)
    assert max(ours) < turn("linear", name="cuda", **main) < turn("attention", name="flash", **main)
    assert turn("attention", **main) < turn("block", name="cuda", network="wan-14b", way="forward") < min(rivals)
    assert max(rivals) < min(others) <= max(others) < turn("steps", stage="stage II", name="ours")

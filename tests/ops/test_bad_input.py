"""Input that kernels do not support is refused in one line or handled; one test for each kind of input."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastlightgen.ops import (
    dispatch,
    dmd_gradient,
    gate_residual_norm_modulate,
    linear_gate_residual,
    linear_gelu_tanh,
    norm_modulate,
    qk_norm_rope,
    rope_factors,
)
from fastlightgen.ops.tables import kernel_takes

ROOT = Path(__file__).parents[2]
ROPE = rope_factors((1, 2, 2), (4, 2, 2))


def draw(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


# Each operator with its tensors by name; the others must fit the first one.
CASES = {
    "norm_modulate": (norm_modulate, {"x": draw(2, 4, 16), "scale": draw(2, 16), "shift": draw(2, 16)}),
    "gate_residual_norm_modulate": (
        gate_residual_norm_modulate,
        {"x": draw(2, 4, 16), "y": draw(2, 4, 16), "gate": draw(2, 16), "scale": draw(2, 16), "shift": draw(2, 16)},
    ),
    "qk_norm_rope": (
        partial(qk_norm_rope, rope=ROPE),
        {"q": draw(2, 4, 16), "k": draw(2, 4, 16), "q_weight": draw(16), "k_weight": draw(16)},
    ),
    "dmd_gradient": (
        partial(dmd_gradient, t=torch.tensor([0.3, 0.6]), beta1=0.5, beta2=1.5),
        {n: draw(2, 4, 16) for n in ("x0", "x_t", "v_fake", "v_weak_cond", "v_weak_null", "v_strong_cond")},
    ),
    "linear_gelu_tanh": (linear_gelu_tanh, {"x": draw(2, 4, 16), "weight": draw(8, 16), "bias": draw(8)}),
    "linear_gate_residual": (
        linear_gate_residual,
        {"x": draw(2, 4, 16), "c": draw(2, 4, 8), "gate": draw(2, 8), "weight": draw(8, 16), "bias": draw(8)},
    ),
}
each = pytest.mark.parametrize("name", CASES)
KERNELS = [name for name in CASES if not name.startswith("linear")]  # operators that the shim can run


def run(name: str, tensors: dict[str, Tensor], backward: bool = True) -> list[Tensor]:
    """Results and, if the operator has them, gradients."""
    leaves = {n: t.detach().requires_grad_(backward and name != "dmd_gradient") for n, t in tensors.items()}
    out = CASES[name][0](**leaves)
    out = list(out) if isinstance(out, tuple) else [out]
    if not out[0].requires_grad:
        return out
    return [*out, *torch.autograd.grad(out, list(leaves.values()), [v.cos() for v in out])]


def same_results(name: str, change) -> None:
    plain = CASES[name][1]
    for got, want in zip(run(name, {n: change(t) for n, t in plain.items()}), run(name, plain), strict=True):
        assert torch.equal(got, want)


def strided(t: Tensor) -> Tensor:
    """The same values with gaps between them."""
    return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]


def shifted(t: Tensor) -> Tensor:
    """The same values 4 bytes past a 16-byte boundary."""
    flat = torch.empty(t.numel() + 5)
    start = next(i for i in range(4) if flat[i:].data_ptr() % 16 == 4)
    flat[start : start + t.numel()] = t.flatten()
    return flat[start : start + t.numel()].view(t.shape)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("change", [strided, shifted])
def test_not_contiguous_or_misaligned_is_copied(simt, name: str, change):
    x = next(iter(CASES[name][1].values()))
    assert not strided(x).is_contiguous() and shifted(x).data_ptr() % 16 == 4
    same_results(name, change)


@each
@pytest.mark.parametrize("change", [strided, shifted])
def test_the_same_on_the_reference(name: str, change):
    for got, want in zip(run(name, {n: change(t) for n, t in CASES[name][1].items()}), run(name, CASES[name][1])):
        torch.testing.assert_close(got, want)  # torch may compute strided memory differently


@each
def test_wrong_dtype_is_refused(name: str):
    op, tensors = CASES[name]
    with pytest.raises(ValueError, match=f"^{name}: .*got torch.int64, wanted a floating-point type; cast it$"):
        op(**{n: t.long() for n, t in tensors.items()})


@each
def test_another_device_is_refused(name: str):
    op, tensors = CASES[name]
    for other in list(tensors)[1:]:
        with pytest.raises(ValueError, match=f"^{name}: {other} got .*meta.*, wanted .*cpu.*; (move|make)"):
            op(**tensors | {other: tensors[other].to("meta")})


@each
def test_wrong_shape_is_refused(name: str):
    op, tensors = CASES[name]
    for other in list(tensors)[1:]:
        short = tensors[other][..., :-1]
        with pytest.raises(ValueError, match=f"^{name}: .*{re.escape(str(tuple(short.shape)))}.*wanted"):
            op(**tensors | {other: short})


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("size", [(0, 4), (2, 0)])
@pytest.mark.parametrize("backend", ["reference", "cuda"])
def test_empty_tensors_give_empty_tensors(request, backend: str, name: str, size: tuple[int, int]):
    if backend == "cuda":
        request.getfixturevalue("simt")
    if name == "qk_norm_rope" and size[1] == 0:
        pytest.skip("fewer tokens than the grid: test_wrong_shape_is_refused")
    tensors = {n: t[: size[0], : size[1]] if t.dim() == 3 else t for n, t in CASES[name][1].items()}
    tensors = {n: t[: size[0]] if t.dim() == 2 else t for n, t in tensors.items()}
    if name == "dmd_gradient" and size[0] == 0:
        tensors["t"] = torch.empty(0)
    if name == "dmd_gradient" and size[0] > 0:
        with pytest.raises(ValueError, match=r"x0 got \(2, 0, 16\), wanted samples with elements"):
            run(name, tensors)
        return
    for value in run(name, tensors):
        assert value.numel() == 0 or not value.any()  # gradients of unused inputs are zero


def test_rows_beyond_32_bits_go_to_the_reference():
    """A grid has at most 2^31 - 1 blocks; offsets inside the kernels are 64 bits wide (the next test)."""
    assert kernel_takes(torch.empty(2**31 - 1, 8, device="meta"))
    assert not kernel_takes(torch.empty(2**31, 8, device="meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_gpu_offsets_beyond_32_bits(monkeypatch, backend: str):
    """The last rows of a tensor with more than 2^32 elements are those of a short one."""
    if reason := dispatch._why_not(backend):
        pytest.skip(reason)
    monkeypatch.setattr(dispatch, "backend_for", lambda device: backend)
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("it takes 34 GB")
    x = torch.ones(1, 2**21 + 3, 2048, dtype=torch.bfloat16, device="cuda")
    mod = torch.randn(1, 2048, device="cuda")
    x[:, -5:] = torch.randn(5, 2048, device="cuda")
    tail = x[:, -5:].clone()
    assert torch.equal(norm_modulate(x, mod, mod)[:, -5:], norm_modulate(tail, mod, mod))
    assert torch.equal(gate_residual_norm_modulate(x, x, mod, mod, mod)[1][:, -5:],
                       gate_residual_norm_modulate(tail, tail, mod, mod, mod)[1])  # fmt: skip


@pytest.mark.parametrize("name", KERNELS)
def test_a_launch_error_names_the_operator_and_says_the_drivers_words(simt, monkeypatch, name: str):
    class Broken:
        """A module whose every launch returns cudaErrorNoKernelImageForDevice (209)."""

        def __getattr__(self, attribute: str):
            if attribute in ("error_string", "dmd_gradient_blocks"):
                return getattr(simt, attribute)
            return (lambda *_: 1) if attribute.endswith("_runs") else (lambda _: 209)

    broken = Broken()
    monkeypatch.setattr(dispatch, "extension", lambda: broken)
    called = "gate_residual_norm_modulate" if name == "norm_modulate" else name  # one kernel
    with pytest.raises(
        RuntimeError, match=rf"^{called}: cudaError 209, .+, for \(2, 4, 16\) torch.float32; set FLG_OPS"
    ):
        run(name, CASES[name][1], backward=False)


BROKEN = {
    "raise ImportError('libcudart.so.13: cannot open shared object file')": "libcudart.so.13: cannot open",
    "def cuda_built(): return True": "no attribute 'interface'",  # built from older sources
    "interface = 1": "it was built from other sources, interface 1 instead of 5",
}


@pytest.mark.parametrize("source", BROKEN)
def test_a_broken_extension_is_said_once_and_done_without(tmp_path, source: str):
    (tmp_path / "_C.py").write_text(source)
    code = f"import fastlightgen; fastlightgen.__path__.insert(0, {str(tmp_path)!r})\n" + (
        "import torch; from fastlightgen.ops import describe, dispatch, norm_modulate\n"
        "for _ in range(3): dispatch.parts(), describe()\n"
        "print(norm_modulate(torch.randn(1, 2, 8), torch.zeros(1, 8), torch.ones(1, 8)).mean().item())"
    )
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and float(done.stdout) == pytest.approx(1.0), done.stderr
    assert done.stderr.count("UserWarning") == 1
    assert BROKEN[source] in done.stderr and "`pip install -e .` rebuilds it" in done.stderr

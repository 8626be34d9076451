"""Linear layers with a fused epilogue: formulas, explicit gradients, and the machine code of the CUTLASS sources."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import rule
import torch
import torch.nn.functional as F
from machine_code import NVCC, ROOT, cuobjdump
from torch import Tensor

from fastlightgen.models.recompute import recomputed
from fastlightgen.ops import dispatch, gemm, linear_gate_residual, linear_gelu_tanh
from fastlightgen.ops.tables import tables

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ORDER = ("c", "gate", "x", "weight", "bias")
SOURCES = ["linear_gate_residual", "linear_gelu_tanh"]


def gate_formula(c: Tensor, gate: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    gate = gate[:, None] if gate.dim() == 2 else gate
    return c + gate.to(c.dtype) * F.linear(x, weight, bias)


def gelu_formula(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    z = F.linear(x, weight, bias)
    return 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))


def case(op: str, shape: tuple[int, int, int, int], bias: bool, dtype: torch.dtype, device: str = "cpu") -> dict:
    """Shapes: samples, rows per sample, inner and outer width."""
    batch, rows, inner, dim = shape
    gen = torch.Generator().manual_seed(inner)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen).bfloat16().to(device, dtype)

    found = {"x": draw(batch, rows, inner), "weight": draw(dim, inner) / inner**0.5}
    found |= {"bias": draw(dim)} if bias else {}
    if op == "linear_gate_residual":
        found |= {"c": draw(batch, rows, dim), "gate": draw(batch, dim).float()}
    return found


OPS = {
    "linear_gate_residual": (linear_gate_residual, gate_formula),
    "linear_gelu_tanh": (linear_gelu_tanh, gelu_formula),
}


def registered(op: str):
    """The registered operator with its explicit gradient, which the public function calls if CUTLASS is built."""
    if op == "linear_gelu_tanh":
        return lambda x, weight, bias=None: torch.ops.fastlightgen.linear_gelu_tanh(x, weight, bias, True)[0]

    def call(c: Tensor, gate: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.ops.fastlightgen.linear_gate_residual(c, *tables("test", c, gate=gate), x, weight, bias)

    return call


def agrees(fused, op: str, inputs: dict) -> None:
    formula = OPS[op][1]
    exact, own = rule.results(formula, inputs, torch.float64), rule.results(formula, inputs)
    got = rule.results(fused, inputs)
    rule.check(got, own, exact, terms=max(inputs["x"].shape[0] * inputs["x"].shape[1], *inputs["weight"].shape))
    assert rule.same(got, rule.results(fused, inputs)), "not the same bits twice"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("explicit", [False, True])
def test_formula_and_gradients(explicit: bool, op: str, bias: bool, dtype: torch.dtype):
    agrees(registered(op) if explicit else OPS[op][0], op, case(op, (3, 5, 24, 16), bias, dtype))


def test_a_gate_for_every_frame():
    """Gates [B, F, 1, N] apply to the rows of their frame, as in broadcasting."""
    gen = torch.Generator().manual_seed(0)
    c, gate, x = (
        torch.randn(*n, generator=gen, dtype=torch.float64) for n in ((2, 3, 5, 8), (2, 3, 1, 8), (2, 3, 5, 4))
    )
    weight, bias = (torch.randn(*n, generator=gen, dtype=torch.float64) for n in ((8, 4), (8,)))
    inputs = [t.requires_grad_() for t in (c, gate, x, weight, bias)]
    fused = registered("linear_gate_residual")
    torch.testing.assert_close(fused(*inputs), c + gate * F.linear(x, weight, bias))
    assert torch.autograd.gradcheck(fused, inputs)


@pytest.mark.parametrize("op", OPS)
def test_the_public_function_compiles_whole(op: str):
    inputs = case(op, (2, 5, 24, 16), True, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(OPS[op][0], backend="aot_eager", fullgraph=True)
    want = rule.results(OPS[op][0], inputs)
    for name, value in rule.results(compiled, inputs).items():
        torch.testing.assert_close(value, want[name])


def test_frozen_parts_get_no_gradient():
    """With a frozen weight, as under adapters, the other gradients do not change."""
    inputs = case("linear_gate_residual", (2, 5, 24, 16), True, torch.float32)
    want = rule.results(registered("linear_gate_residual"), inputs)
    for frozen in (["weight", "bias"], ["gate"], ["x"], ["c", "gate", "bias"]):
        leaves = {k: v.clone().requires_grad_(k not in frozen) for k, v in inputs.items()}
        out = registered("linear_gate_residual")(**leaves)
        seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).bfloat16().to(out.dtype)
        out.backward(seed)
        for name, leaf in leaves.items():
            assert (leaf.grad is None) if name in frozen else torch.equal(leaf.grad, want[f"d{name}"]), name


@pytest.fixture
def products(monkeypatch) -> list[Tensor]:
    """Take the path of a GPU with CUTLASS, but with torch instead of the kernel; record the products."""
    module, done = importlib.import_module("fastlightgen.ops.linear_gate_residual"), []

    def product(out: Tensor, c: Tensor, gate: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        groups = (len(gate), -1, c.shape[-1])
        z = F.linear(*(None if t is None else t.detach() for t in (x, weight, bias)))
        added = gate.detach()[:, None] * z.view(groups)
        out.copy_((c.detach().view(groups) + added).view(c.shape))
        done.append(out)

    monkeypatch.setattr(module, "takes", lambda *_: True)
    monkeypatch.setattr(module, "_product", product)
    return done


def test_the_result_is_filled_in_after_what_the_backward_needs_is_saved(products):
    for dtype in (torch.float32, torch.bfloat16):
        agrees(linear_gate_residual, "linear_gate_residual", case("linear_gate_residual", (3, 5, 24, 16), True, dtype))
    inputs = case("linear_gate_residual", (3, 5, 24, 16), True, torch.float32)
    assert not linear_gate_residual(**inputs).requires_grad
    assert torch.equal(linear_gate_residual(**inputs), linear_gate_residual(**rule.leaves(inputs)))


@pytest.mark.parametrize("recompute", ["all", "attention"])
def test_a_checkpoint_does_not_compute_a_last_product_again(products, recompute: str):
    inputs = case("linear_gate_residual", (3, 5, 24, 16), True, torch.float32)

    def block(c, gate, x, weight, bias):
        return linear_gate_residual(c.sin(), gate, x.cos(), weight, bias)

    want = rule.results(block, inputs)
    products.clear()
    part = rule.Part(block)
    got = rule.results(lambda **a: recomputed(part, part.run, recompute, *(a[k] for k in ORDER)), inputs)
    assert len(products) == 1 and rule.same(got, want)


@pytest.mark.parametrize("family", ["wan", "hunyuan"])
def test_the_networks_checkpoints_end_in_it(products, family: str):
    """One product per block and sequence in the forward pass, none for the image in the backward; same gradients."""
    for needed in ("omegaconf", "safetensors", "tqdm"):  # the other tests of the operators do not need them
        pytest.importorskip(needed)
    import helpers

    net = getattr(helpers, f"small_{family}")().double()
    x_t, t, cond, _ = net.example_inputs(batch=2, size=(2, 4, 4))
    cond = cond.map(lambda v: v.double() if v.is_floating_point() else v)

    def gradients() -> dict[str, Tensor]:
        net.zero_grad()
        net(x_t.double(), t, cond).square().sum().backward()
        return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}

    want = gradients()
    assert not products  # without checkpoints the next norm adds the residual
    net.checkpointing = True
    got = gradients()
    double, lengths = sum(hasattr(block, "ff_context") for block in net.blocks), [out.shape[1] for out in products]
    assert lengths.count(2 * 2 * 2) == (double or net.num_blocks)  # the image's tokens
    assert len(lengths) == net.num_blocks + 2 * double  # only the small product of the text runs twice
    assert got.keys() == want.keys()
    for name, value in want.items():  # float64, sums of a few thousand terms
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9 * float(value.abs().max()) + 1e-15)


def test_bad_input_is_named():
    c, gate, x, weight = torch.randn(2, 3, 8), torch.randn(2, 8), torch.randn(2, 3, 4), torch.randn(8, 4)
    with pytest.raises(ValueError, match=r"linear_gelu_tanh: got x \(2, 3, 4\), weight \(4, 8\), bias None; wanted"):
        linear_gelu_tanh(x, weight.mT)
    with pytest.raises(ValueError, match=r"c got \(2, 2, 8\) torch.float32, wanted \(2, 3, 8\) torch.float32"):
        linear_gate_residual(c[:, :2], gate, x, weight)
    with pytest.raises(ValueError, match=r"gate got \(3, 8\), wanted \[B, D\]"):
        linear_gate_residual(c, torch.randn(3, 8), x, weight)
    with pytest.raises(ValueError, match="got keep=False, but a gradient is needed; pass keep=True"):
        torch.ops.fastlightgen.linear_gelu_tanh(x.requires_grad_(), weight, None, False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 128, 64, 256), (3, 331, 72, 520), (2, 1560, 1536, 8960)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_gpu(monkeypatch, op: str, shape, bias: bool):
    if not dispatch.gemm_built() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"CUTLASS products: {dispatch.parts()['CUTLASS products'][1]}; they are for sm_90a")
    monkeypatch.setattr(dispatch, "backend_for", lambda device: "cuda")
    monkeypatch.setattr(gemm, "faster", lambda *_: True)
    agrees(OPS[op][0], op, case(op, shape, bias, torch.bfloat16, "cuda"))


def cutlass() -> Path | None:
    """The CUTLASS headers that a build uses: FLG_CUTLASS, or those of the nvidia-cutlass wheel."""
    spec = importlib.util.find_spec("cutlass_library")
    wheel = [Path(spec.origin).parent / "source" / "include"] if spec else []
    found = [Path(os.environ["FLG_CUTLASS"])] if "FLG_CUTLASS" in os.environ else wheel
    return next((p for p in found if (p / "cutlass" / "version.h").exists()), None)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("source", SOURCES)
def test_what_nvcc_makes_of_it(tmp_path, source: str):
    """For sm_90a the machine code has wgmma and TMA, no spills, and no warning about a serialised wgmma pipeline."""
    if NVCC is None or (headers := cutlass()) is None:
        pytest.skip("nvcc is not installed" if NVCC is None else "no CUTLASS headers: pip install nvidia-cutlass")
    out = tmp_path / "k.cubin"
    command = [NVCC, "-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-cubin", "-o", out]
    command += ["-gencode=arch=compute_90a,code=sm_90a", "-isystem", headers]
    command += [f"-I{ROOT / 'csrc' / folder}" for folder in ("include", "gemm")]
    nice = ["nice"] if shutil.which("nice") else []
    done = subprocess.run([*nice, *command, ROOT / "csrc" / "gemm" / f"{source}.cu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "C7510" not in done.stderr and "C7508" not in done.stderr, "wgmma was serialised: is NDEBUG set?"
    assert "warning" not in done.stderr, done.stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    assert registers and max(registers) <= 168 and spills and not any(spills), done.stderr  # 384 threads of 65536
    if (tool := cuobjdump()) is None:
        pytest.skip("cuobjdump is not installed; the compiler's report was clean")
    sass = subprocess.run([tool, "--dump-sass", out], capture_output=True, text=True, check=True).stdout
    for instruction in ("HGMMA", "UTMALDG", "UTMASTG"):
        assert instruction in sass, f"no {instruction}"
    assert not re.search(r"\b(?:LDL|STL)\b", sass), "local memory"

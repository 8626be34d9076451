"""RMS norm and rotary embedding of q and k against diffusers' formulas: CPU, CUDA sources on the CPU, GPU."""

import pytest
import rule
import torch
from torch import Tensor

from fastlightgen.ops import dispatch, qk_norm_rope, rope_factors

EPS = 1e-6
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GRID = (2, 2, 3)


def axes(head_dim: int) -> tuple[int, int, int]:
    """Wan's split of the channels: 128 = 44 + 42 + 42, so a vector of eight channels can belong to two axes."""
    space = 2 * (head_dim // 6)
    return head_dim - 2 * space, space, space


def tokens_angle(dims: tuple[int, int, int], theta: float) -> Tensor:
    """The angles [F H W, head_dim / 2], computed token by token."""
    rows = []
    for f in range(GRID[0]):
        for h in range(GRID[1]):
            for w in range(GRID[2]):
                at = zip((f, h, w), dims)
                rows.append([pos * theta ** (-2 * i / dim) for pos, dim in at for i in range(dim // 2)])
    return torch.tensor(rows, dtype=torch.float64)


def formula(head_dim: int):
    """Diffusers' formula with cosines and sines per token, in the dtype of the inputs."""
    angle = tokens_angle(axes(head_dim), 10000.0)

    def one(x: Tensor, weight: Tensor) -> Tensor:
        norm = x.unflatten(-1, (-1, weight.shape[0]))
        norm = norm * torch.rsqrt(norm.pow(2).mean(-1, keepdim=True) + EPS) * weight
        heads = norm.reshape(*x.shape[:2], -1, head_dim)
        image, text = heads[:, : len(angle)], heads[:, len(angle) :]
        cos, sin = (v.repeat_interleave(2, -1)[:, None].to(x.device, x.dtype) for v in (angle.cos(), angle.sin()))
        real, imag = image.unflatten(-1, (-1, 2)).unbind(-1)
        image = image * cos + torch.stack([-imag, real], -1).flatten(-2) * sin
        return torch.cat([image, text], 1).flatten(2)

    return lambda q, k, q_weight, k_weight: (one(q, q_weight), one(k, k_weight))


def case(dim: int, head_dim: int, per_head: bool, text: int, dtype: torch.dtype, device: str = "cpu") -> dict:
    gen = torch.Generator().manual_seed(dim)
    tokens = GRID[0] * GRID[1] * GRID[2] + text

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen).bfloat16().to(device, dtype)

    width = head_dim if per_head else dim
    weights = {"q_weight": 1 + draw(width) / 4, "k_weight": 1 + draw(width) / 4}
    return {"q": draw(2, tokens, dim), "k": draw(2, tokens, dim)} | weights


def agrees(dim: int, head_dim: int, per_head: bool, text: int, dtype: torch.dtype, device: str = "cpu") -> None:
    rope = rope_factors(GRID, axes(head_dim), device=torch.device(device))

    def op(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor):
        factors = rope if q.dtype != torch.float64 else rope_factors(GRID, axes(head_dim), dtype=torch.float64)
        return qk_norm_rope(q, k, q_weight, k_weight, factors, EPS)

    inputs, by_diffusers = case(dim, head_dim, per_head, text, dtype, device), formula(head_dim)
    exact, own = (rule.results(by_diffusers, inputs, d) for d in (torch.float64, None))
    got = rule.results(op, inputs)
    rule.check(got, own, exact, terms=2 * inputs["q"].shape[1] * (dim // head_dim if per_head else 1))
    assert rule.same(got, rule.results(op, inputs)), "not the same bits twice"


CASES = [(64, 16, False, 0), (64, 16, True, 5), (1000, 40, False, 3), (384, 128, True, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("registered", [False, True])
def test_reference(monkeypatch, registered: bool, shape, dtype: torch.dtype):
    if registered:  # skips the short cut for eager CPU calls and uses the explicit gradient
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    agrees(*shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_cuda_sources(simt, shape, dtype: torch.dtype):
    agrees(*shape, dtype)


@pytest.mark.parametrize("shape", [(1536, 128, False, 0), (5120, 128, False, 0), (3072, 128, True, 3)], ids=str)
def test_cuda_sources_at_real_widths(simt, shape):
    agrees(*shape, torch.bfloat16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*CASES, (1536, 128, False, 0), (5120, 128, False, 7), (3072, 128, True, 9)], ids=str)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_gpu(monkeypatch, backend: str, shape, dtype: torch.dtype):
    if reason := dispatch._why_not(backend):
        pytest.skip(reason)
    monkeypatch.setattr(dispatch, "backend_for", lambda device: backend)
    agrees(*shape, dtype, "cuda")


def test_opcheck_and_compile():
    inputs = rule.leaves(case(64, 16, True, 2, torch.float32))
    rope = rope_factors(GRID, axes(16))
    torch.library.opcheck(torch.ops.fastlightgen.qk_norm_rope.default, (*inputs.values(), *rope, EPS))

    def op(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor):
        return qk_norm_rope(q, k, q_weight, k_weight, rope, EPS)

    torch._dynamo.reset()
    want, got = (rule.results(f, inputs) for f in (op, torch.compile(op, backend="aot_eager", fullgraph=True)))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)


def test_bad_input_is_named():
    inputs, rope = case(64, 16, False, 0, torch.float32), rope_factors(GRID, axes(16))
    with pytest.raises(ValueError, match=r"rope got tables for head_dim 16 and 12 tokens, q \(2, 11, 64\)"):
        qk_norm_rope(inputs["q"][:, :11], inputs["k"][:, :11], inputs["q_weight"], inputs["k_weight"], rope)
    with pytest.raises(ValueError, match=r"weights got \(16,\) and \(64,\), wanted \(64,\) or \(16,\) twice"):
        qk_norm_rope(inputs["q"], inputs["k"], inputs["q_weight"][:16], inputs["k_weight"], rope)
    with pytest.raises(ValueError, match=r"k \(2, 12, 64\) torch.float16"):
        qk_norm_rope(inputs["q"], inputs["k"].half(), inputs["q_weight"], inputs["k_weight"], rope)

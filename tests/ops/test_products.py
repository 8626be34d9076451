"""Which products the CUTLASS kernels compute: those of the table of measurements, also under autocast."""

import ctypes
import json
import math
import re

import pytest
import rule
import torch
import torch.nn.functional as F
from machine_code import ROOT
from test_gemm import OPS, case, gelu_formula
from torch import Tensor

from fastlightgen.ops import dispatch, gemm, linear_gelu_tanh, tune


def at(address: int, *shape: int) -> Tensor:
    """The bfloat16 tensor at an address."""
    words = (ctypes.c_int16 * math.prod(shape)).from_address(address)
    return torch.frombuffer(words, dtype=torch.bfloat16).view(shape)


class Launchers:
    """The compiled module's products, computed by torch from the same addresses."""

    def __init__(self):
        self.calls: list[set[str]] = []

    def linear_gelu_tanh(self, f: dict[str, int]) -> int:
        self.calls.append(set(f))
        bias = at(f["bias"], f["dim"]) if f["bias"] else None
        z = F.linear(at(f["x"], f["rows"], f["inner"]), at(f["weight"], f["dim"], f["inner"]), bias)
        at(f["out"], *z.shape).copy_(F.gelu(z, approximate="tanh"))
        if f["z"]:
            at(f["z"], *z.shape).copy_(z)
        return 0

    def linear_gate_residual(self, f: dict[str, int]) -> int:
        self.calls.append(set(f))
        bias = at(f["bias"], f["dim"]) if f["bias"] else None
        z = F.linear(at(f["x"], f["rows"], f["inner"]), at(f["weight"], f["dim"], f["inner"]), bias).float()
        groups = f["rows"] // f["rows_per_mod"]
        words = (ctypes.c_float * (groups * f["dim"])).from_address(f["gate"])
        gate = torch.frombuffer(words, dtype=torch.float32).view(groups, 1, -1)
        out = at(f["c"], *z.shape).float() + (gate * z.view(groups, -1, f["dim"])).view_as(z)
        at(f["out"], *z.shape).copy_(out)
        return 0


@pytest.fixture
def hopper(monkeypatch, tmp_path) -> Launchers:
    """A CPU that passes for a Hopper with CUTLASS, whose measurements are in tmp_path / "products.json"."""
    launchers, table = Launchers(), tmp_path / "products.json"
    table.write_text("[]")
    monkeypatch.setattr(gemm, "MEASURED", table)
    monkeypatch.setattr(gemm, "_hopper", lambda device: True)
    monkeypatch.setattr(dispatch, "compiled", lambda: launchers)
    monkeypatch.setattr(dispatch, "gemm_built", lambda: True)
    monkeypatch.setattr(dispatch, "backend_for", lambda device: "cuda")
    monkeypatch.setattr(dispatch, "queue", lambda x: (0, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "GPU A")
    cached = gemm.faster
    cached.cache_clear()
    yield launchers
    cached.cache_clear()


MEASUREMENT = {"gpu": "GPU A", "op": "linear_gelu_tanh", "dim": 16, "inner": 24, "rows": 10}
MEASUREMENT |= {"us": 9.0, "torch_us": 10.0}


@pytest.mark.parametrize(
    ("rows", "used"),
    [
        ([], False),
        ([{}], True),
        ([{}, {"rows": 99, "us": 11.0}], False),  # slower at one of the sizes
        ([{"gpu": "GPU B"}], False),
        ([{"op": "linear_gate_residual"}], False),
        ([{"dim": 24, "inner": 16}], False),
    ],
)
def test_only_products_that_were_measured_to_be_faster_are_used(hopper, rows: list[dict], used: bool):
    gemm.MEASURED.write_text(json.dumps([MEASUREMENT | row for row in rows]))
    inputs = case("linear_gelu_tanh", (2, 5, 24, 16), True, torch.bfloat16)
    torch.testing.assert_close(linear_gelu_tanh(**inputs), gelu_formula(**inputs), rtol=0.02, atol=0.02)
    assert len(hopper.calls) == used


def test_the_description_counts_them(hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    rows = [{}, {"rows": 99}, {"dim": 32}, {"dim": 64, "us": 11.0}, {"dim": 96, "gpu": "GPU B"}]
    gemm.MEASURED.write_text(json.dumps([MEASUREMENT | row for row in rows]))
    assert gemm.describe().startswith("products: torch's, except 2 measured to be faster (python -m")
    monkeypatch.setattr(dispatch, "gemm_built", lambda: False)
    assert gemm.describe() == "products: torch's"


def test_the_shipped_table_is_well_formed():
    for row in json.loads(gemm.MEASURED.read_text()):
        assert row.keys() == MEASUREMENT.keys() | {"torch"} and row["op"] in OPS and row["us"] > 0 < row["torch_us"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_float32_weights_are_cast_under_autocast(hopper, monkeypatch, op: str, bias: bool):
    """The engine `local` trains float32 weights under autocast: the products run, and their gradients are float32."""
    inputs = case(op, (3, 5, 24, 16), bias, torch.bfloat16)
    inputs |= {name: inputs[name].float() for name in ("weight", "bias") if name in inputs}

    def under_autocast(function):
        def call(**tensors: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return function(**tensors)

        return call

    fused, formula = OPS[op]
    exact, own = rule.results(formula, inputs, torch.float64), rule.results(under_autocast(formula), inputs)
    rule.results(under_autocast(fused), inputs)
    assert not hopper.calls  # nothing was measured
    monkeypatch.setattr(gemm, "faster", lambda *_: True)
    got = rule.results(under_autocast(fused), inputs)
    assert len(hopper.calls) == 1 and got["dweight"].dtype == torch.float32
    rule.check(got, own, exact, terms=24)
    bound = (ROOT / "bindings" / "gemm.cpp").read_text()
    kind = {"linear_gelu_tanh": "GELU", "linear_gate_residual": "RESIDUAL"}[op]
    assert hopper.calls[0] == {"stream", *re.findall(rf"{kind}\((\w+)\)[,}}]", bound)}


def test_tuning_without_a_gpu_says_why():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="there is nothing to measure: operators: .*; CUTLASS products: "):
        tune.main()


def test_tuning_writes_what_it_measured(hopper, monkeypatch):
    """Every product of the released networks; rows of other GPUs stay. With a clock by hand and small tensors."""
    gemm.MEASURED.write_text(json.dumps([MEASUREMENT | {"gpu": gpu} for gpu in ("GPU A", "GPU B")]))
    ticks = iter(range(10**6))
    monkeypatch.setattr(tune, "seconds", lambda call: call() is not None and next(ticks) * 1e-6)
    monkeypatch.setattr(tune, "SHAPES", [(10, 16, 24), (20, 16, 24)])
    monkeypatch.setattr(dispatch, "backend", lambda: "cuda")
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, device, **k: randn(*a, **k))
    monkeypatch.setattr(gemm, "faster", gemm.faster)  # main replaces it; restored at the end
    tune.main()
    rows = json.loads(gemm.MEASURED.read_text())
    assert [(r["gpu"], r["op"], r["dim"], r["inner"], r["rows"]) for r in rows] == [
        ("GPU B", "linear_gelu_tanh", 16, 24, 10),
        *(("GPU A", *product, n) for n in (10, 20) for product in (
            ("linear_gelu_tanh", 24, 16), ("linear_gate_residual", 16, 24))),
    ]  # fmt: skip
    assert all(r["us"] + 1 == pytest.approx(r["torch_us"]) for r in rows)  # the clock ticks once per call, ours first

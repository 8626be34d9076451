"""`python -m fastlightgen.ops.tune` times the CUTLASS products against torch's on this GPU.

It replaces this GPU's rows of products.json, which decides which of the two a network uses (see gemm.py).
"""

import json
import statistics
from collections.abc import Callable
from functools import partial

import torch

from fastlightgen.ops import dispatch, gemm, linear_gate_residual, linear_gelu_tanh
from fastlightgen.ops.linear_gate_residual import reference as residual
from fastlightgen.ops.linear_gelu_tanh import reference as gelu

# Rows, width and inner width of the feed-forward layers: Wan 14B and 1.3B at 480p and 720p, HunyuanVideo at 720p.
SHAPES = [
    *((rows, dim, inner) for rows in (32760, 75600) for dim, inner in ((5120, 13824), (1536, 8960))),
    (119056, 3072, 12288),
]


def seconds(call: Callable[[], object], calls: int = 10) -> float:
    """Seconds of one call. The calls are enqueued together, so the host's share of them is hidden."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def against(ours: Callable[[], object], torchs: Callable[[], object]) -> dict[str, float]:
    """Median microseconds of both over five turns, in which the GPU's clock drifts alike for both."""
    for call in (ours, torchs):
        call()
    turns = [(seconds(ours), seconds(torchs)) for _ in range(5)]
    return {key: 1e6 * statistics.median(turn[i] for turn in turns) for i, key in enumerate(("us", "torch_us"))}


@torch.no_grad()
def measure() -> list[dict]:
    """The rows of this GPU. Run under `faster` = true, so that the kernels are used."""
    rows = []

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    for count, dim, inner in SHAPES:
        wide, narrow, up, down = draw(1, count, inner), draw(1, count, dim), draw(inner, dim), draw(dim, inner)
        gate, bias, wide_bias = draw(1, dim).float(), draw(dim), draw(inner)
        calls: dict[str, tuple[int, int, Callable, Callable, tuple]] = {
            "linear_gelu_tanh": (inner, dim, linear_gelu_tanh, gelu.linear_gelu_tanh, (narrow, up, wide_bias)),
            "linear_gate_residual": (
                dim, inner, linear_gate_residual, residual.linear_gate_residual,
                (narrow, gate, wide, down, bias),
            ),
        }  # fmt: skip
        for op, (out, into, ours, torchs, args) in calls.items():
            product = {"gpu": torch.cuda.get_device_name(), "op": op, "dim": out, "inner": into, "rows": count}
            found = against(partial(ours, *args), partial(torchs, *args))
            rows.append(product | found | {"torch": str(torch.__version__)})
            print(f"{op} {count} x {into} -> {out}: {found['us']:.0f} us, torch {found['torch_us']:.0f} us")
    return rows


def main() -> None:
    if dispatch.backend() != "cuda" or not dispatch.gemm_built():
        why = dispatch.parts()["CUTLASS products"][1]
        raise SystemExit(f"there is nothing to measure: {dispatch.describe()}; CUTLASS products: {why}")
    gemm.faster = lambda *_: True  # type: ignore[assignment]  # this process measures the kernels
    rows = measure()
    others = [row for row in json.loads(gemm.MEASURED.read_text()) if row["gpu"] != torch.cuda.get_device_name()]
    gemm.MEASURED.write_text(json.dumps(others + rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

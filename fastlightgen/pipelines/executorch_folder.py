"""Export for ExecuTorch: a folder with one evaluation of the network (step.pte), its settings, and code for clips.

The network is traced at one size of clips, so that all shapes are static. Weights are float32. XNNPACK computes what it
knows; ExecuTorch's portable kernels, which are slow, compute the rest. So the trace is rewritten: `KNOWN` has in place
of attention and norms the products and sums that XNNPACK knows, a linear layer in place of the patches' convolution,
for which there is no kernel at all, and no tensors of more than six dimensions, which XNNPACK refuses as it loads.
"""

import math
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fastlightgen.config import UserError
from fastlightgen.files.border import shorter
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.families import family_of
from fastlightgen.ops.plain import PLAIN
from fastlightgen.pipelines.step_folder import (
    MOST_FLOPS,
    Step,
    example,
    finish,
    new_folder,
    quiet,
    settings_of,
)

PACKAGE = "executorch"
MOST_DIMS = 6  # of a tensor in XNNPACK
NEAR = 1e-4  # of the largest number of a prediction: XNNPACK's exponentials and roots are approximations
aten = torch.ops.aten
VIEWS = (aten.view.default, aten._unsafe_view.default)


def need_executorch() -> None:
    """Raise if the package is missing. It is imported where it is used."""
    from importlib.util import find_spec

    if find_spec(PACKAGE) is None:
        raise UserError(f"to=executorch: {PACKAGE} is not installed: pip install 'fastlightgen[executorch]'")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale q k^T) v, stored as torch's kernel stores it: heads next to each other."""
    assert not (dropout or causal or enable_gqa)
    scores = (q * (scale or q.shape[-1] ** -0.5)) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores + (torch.where(mask, 0.0, -1e9) if mask.dtype == torch.bool else mask)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).contiguous().transpose(1, 2)


def rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    y = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps))
    return y if weight is None else y * weight


def layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn: bool = True,
) -> Tensor:
    y = rms_norm(x - x.mean(-1, keepdim=True), shape, weight, eps)
    return y if bias is None else y + bias


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """XNNPACK has the exact function alone, which is up to 5e-4 from the tanh formula."""
    if approximate == "none":
        return NotImplemented
    return 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * (x * x * x))))


def patches(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
) -> Tensor:
    """A convolution whose patches do not overlap and have one frame, of one clip, as a linear layer."""
    out, channels, frames, height, width = weight.shape
    if len(x) > 1 or frames > 1 or (frames, height, width) != tuple(stride) or any(padding) or groups > 1:
        raise UserError("to=executorch: knows patches of one frame that do not overlap; use to=onnx")
    _, _, f, h, w = x.shape
    cut = x.reshape(channels, f, h // height, height, w // width, width).permute(1, 2, 4, 0, 3, 5)
    rows = F.linear(cut.reshape(1, -1, channels * height * width), weight.reshape(out, -1), bias)
    return rows.transpose(1, 2).contiguous().reshape(1, out, f, h // height, w // width)


def permute(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Of many dimensions, those that stay neighbours move as one."""
    if x.dim() <= MOST_DIMS:
        return NotImplemented
    dims = [d % x.dim() for d in dims]
    runs: list[list[int]] = []
    for d in dims:
        if runs and d == runs[-1][-1] + 1:
            runs[-1].append(d)
        else:
            runs.append([d])
    before = sorted(runs)
    merged = x.reshape([math.prod(x.shape[d] for d in run) for run in before])
    moved = merged.permute([before.index(run) for run in runs]).contiguous()
    return moved.reshape([x.shape[d] for d in dims])


KNOWN: dict[torch._ops.OperatorBase, Callable] = {
    aten.scaled_dot_product_attention.default: attention,
    aten.rms_norm.default: rms_norm,
    aten.layer_norm.default: layer_norm,
    aten.gelu.default: gelu,
    aten.conv3d.default: patches,
    aten.permute.default: permute,
}


def source(node: fx.Node) -> fx.Node:
    """What an operation reads first."""
    given = node.args[0]
    assert isinstance(given, fx.Node)
    return given


def keeps_order(node: fx.Node) -> bool:
    """Does this operation leave the numbers in their order in memory?"""
    copies = node.target is aten.clone.default and source(node).meta["val"].is_contiguous()
    return node.target in VIEWS or copies


def shortened(graph: fx.Graph) -> None:
    """Let a view of a view be one, so that no shape of many dimensions stands between them."""
    for node in graph.nodes:
        if node.target in VIEWS:
            start = source(node)
            while keeps_order(start):
                start = source(start)
            node.target, node.args = aten.view.default, (start, *node.args[1:])
    graph.eliminate_dead_code()


def traced(model: VideoDiT, inputs: dict[str, Tensor], guidance: float) -> torch.export.ExportedProgram:
    """The network in operations that XNNPACK knows."""
    step = Step(model, list(inputs)[2:], guidance).eval()
    program = torch.export.export(step, tuple(inputs.values()), strict=False)
    program = program.run_decompositions(PLAIN).run_decompositions(KNOWN)
    shortened(program.graph_module.graph)
    program.graph_module.recompile()
    return program


def write_step(model: VideoDiT, inputs: dict[str, Tensor], guidance: float, file: Path) -> None:
    """Trace the network, and write it for XNNPACK with float32 weights."""
    with quiet(), torch.no_grad():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
        from executorch.exir.passes.constant_prop_pass import constant_prop_pass

        program = constant_prop_pass(traced(model, inputs, guidance))
        edge = to_edge_transform_and_lower(
            program,
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
        file.write_bytes(edge.to_executorch().buffer)


def predict(file: Path, inputs: dict[str, Tensor]) -> Tensor:
    """v by ExecuTorch on the CPU."""
    with quiet():
        from executorch.runtime import Runtime

        try:
            method = Runtime.get().load_program(file).load_method("forward")
            return method.execute(list(inputs.values()))[0].clone()
        except Exception as err:  # RuntimeError with a number, or others
            raise ValueError(
                f"to=executorch: its runtime does not run this network ({shorter(err)}); use to=onnx"
            ) from None


@torch.no_grad()
def write_executorch(model: VideoDiT, card: dict, out: Path, size: str, world: bool) -> dict[str, Any]:
    """Write the folder OUT and run it. Return its bytes, and how far a prediction is from the network's.

    `model`: in float32, on the CPU. `world`: it makes clips of the built-in world.
    """
    need_executorch()
    settings = settings_of(model, card, size, world, "executorch")
    inputs = example(model.eval(), settings)
    cond = family_of(model.config).cond(**dict(list(inputs.items())[2:]))
    flops = sum(model.block_flops(inputs["x_t"], cond))
    if flops > MOST_FLOPS:
        raise UserError(
            f"to=executorch: a step is {flops / 1e12:.3g} TFLOP, wanted {MOST_FLOPS / 1e12:g} or fewer, which a CPU "
            "computes in minutes; give a smaller size="
        )
    settings |= {"inputs": {name: list(value.shape) for name, value in list(inputs.items())[2:]}, "weights": "float32"}
    report: dict[str, Any] = {"settings": settings}
    with new_folder(out) as made:
        file = made / "step.pte"
        write_step(model, inputs, settings["guidance"], file)
        v = Step(model, list(inputs)[2:], settings["guidance"])(*inputs.values())
        report["largest"] = (predict(file, inputs) - v).abs().max().item()
        report["scale"], report["bytes"] = v.abs().max().item(), file.stat().st_size
        if not report["largest"] <= NEAR * max(1.0, report["scale"]):
            raise ValueError(f"{out}: ExecuTorch predicts another v, by {report['largest']:.2g}; use to=onnx")
        finish(made, settings, report["bytes"], executorch=version(PACKAGE))
    return report

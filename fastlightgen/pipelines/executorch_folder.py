"""Export for ExecuTorch: a folder with one evaluation of the network (step.pte), its settings, and code for clips.

The network is traced at one size of clips, so that all shapes are static. Weights are float32. XNNPACK computes what it
knows; ExecuTorch's portable kernels, which are slow, compute the rest. So the trace is rewritten (executorch_rules.py).
With `vae=` decoder.pte makes frames of latents.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlightgen.config import UserError
from fastlightgen.files.border import shorter
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.families import family_of
from fastlightgen.ops.plain import PLAIN
from fastlightgen.pipelines.executorch_rules import KNOWN, shortened
from fastlightgen.pipelines.step_decoder import MOST_PIXELS, decoder_example, is_runnable, read_decoder
from fastlightgen.pipelines.step_folder import MOST_FLOPS, Step, example, finish, new_folder, quiet, settings_of

PACKAGE = "executorch"
NEAR = 1e-4  # of the largest number of a prediction: XNNPACK's exponentials and roots are approximations


def need_executorch() -> None:
    """Raise if the package is missing. It is imported where it is used."""
    from importlib.util import find_spec

    if find_spec(PACKAGE) is None:
        raise UserError(f"to=executorch: {PACKAGE} is not installed: pip install 'fastlightgen[executorch]'")


def traced(module: nn.Module, inputs: dict[str, Tensor]) -> torch.export.ExportedProgram:
    """A module in operations that XNNPACK knows."""
    program = torch.export.export(module, tuple(inputs.values()), strict=False)
    program = program.run_decompositions(PLAIN).run_decompositions(KNOWN)
    shortened(program.graph_module.graph)
    program.graph_module.recompile()
    return program


def write_program(module: nn.Module, inputs: dict[str, Tensor], file: Path) -> None:
    """Trace a module, and write it for XNNPACK with float32 weights."""
    with quiet(), torch.no_grad():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
        from executorch.exir.passes.constant_prop_pass import constant_prop_pass

        program = constant_prop_pass(traced(module, inputs))
        edge = to_edge_transform_and_lower(
            program,
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
        file.write_bytes(edge.to_executorch().buffer)


def predict(file: Path, inputs: dict[str, Tensor]) -> Tensor:
    """The output by ExecuTorch on the CPU."""
    with quiet():
        from executorch.runtime import Runtime

        try:
            method = Runtime.get().load_program(file).load_method("forward")
            return method.execute(list(inputs.values()))[0].clone()
        except Exception as err:  # RuntimeError with a number, or others
            raise ValueError(
                f"to=executorch: its runtime does not run this network ({shorter(err)}); use to=onnx"
            ) from None


def compared(file: Path, module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, float]:
    """Run a program; return its bytes, its distance from the module's output, and that output's largest number."""
    wanted = module(*inputs.values())
    largest, scale = (predict(file, inputs) - wanted).abs().max().item(), wanted.abs().max().item()
    if not largest <= NEAR * max(1.0, scale):
        raise ValueError(f"{file.stem}: ExecuTorch computes something else, by {largest:.2g}; use to=onnx")
    return {"largest": largest, "scale": scale, "bytes": file.stat().st_size}


@torch.no_grad()
def write_executorch(model: VideoDiT, card: dict, out: Path, size: str, world: bool, vae: str = "") -> dict[str, Any]:
    """Write the folder OUT and run it. Return its bytes, and how far a prediction is from the network's.

    `model`: in float32, on the CPU. `world`: it makes clips of the built-in world. `vae`: what decodes; "": nothing.
    """
    need_executorch()
    settings = settings_of(model, card, size, world, "executorch")
    inputs = example(model.eval(), settings)
    decoder = read_decoder(vae, model, "image" in inputs) if vae else None
    cond = family_of(model.config).cond(**dict(list(inputs.items())[2:]))
    flops = sum(model.block_flops(inputs["x_t"], cond))
    if flops > MOST_FLOPS:
        raise UserError(
            f"to=executorch: a step is {flops / 1e12:.3g} TFLOP, wanted {MOST_FLOPS / 1e12:g} or fewer, which a CPU "
            "computes in minutes; give a smaller size="
        )
    if decoder and not is_runnable(settings["size"]):
        raise UserError(
            f"to=executorch: a clip of {settings['size']} is decoded in many minutes on a CPU, and vae= is run for a "
            f"comparison; wanted {MOST_PIXELS / 1e6:g} million pixels or fewer in all frames; give a smaller size="
        )
    settings |= {"inputs": {name: list(value.shape) for name, value in list(inputs.items())[2:]}, "weights": "float32"}
    report: dict[str, Any] = {"settings": settings}
    step = Step(model, list(inputs)[2:], settings["guidance"]).eval()
    with new_folder(out) as made:
        file = made / "step.pte"
        write_program(step, inputs, file)
        report |= compared(file, step, inputs)
        if decoder:
            settings["decoder"] = "decoder.pte"
            latents = decoder_example(settings)
            write_program(decoder, latents, made / "decoder.pte")
            report["decoder"] = compared(made / "decoder.pte", decoder, latents)
        finish(made, settings, report["bytes"], executorch=version(PACKAGE))
    return report

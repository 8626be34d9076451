"""Export as ONNX: a folder with one evaluation of the network (step.onnx), its settings, and code that makes clips.

With `vae=` decoder.onnx makes frames of latents.

The network is traced at one size of clips, so that all shapes are static. Weights are float32; `int8` stores those of
the matrix products in 8 bits with one scale per output channel, and onnxruntime quantises the other operand as it runs.
"""

import math
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastlightgen.config import UserError
from fastlightgen.files.border import shorter
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.families import family_of
from fastlightgen.ops.plain import PLAIN
from fastlightgen.pipelines.step_decoder import Decoder, decoder_example, is_runnable, read_decoder
from fastlightgen.pipelines.step_folder import MOST_FLOPS, Step, example, finish, new_folder, quiet, settings_of

OPSET = 23  # the first with an operator for attention
LARGEST = 2 * 10**9  # bytes of weights in the file itself; ONNX allows 2 GiB, larger ones stand beside it
MOST_SCORES = 2e9  # bytes of attention weights in a step that is run for a comparison
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def need_onnx() -> None:
    """Raise if a package is missing. They are imported where they are used."""
    from importlib.util import find_spec

    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UserError(f"to=onnx: {missing[0]} is not installed: pip install 'fastlightgen[onnx]'")


def write_program(module: nn.Module, inputs: dict[str, Tensor], output: str, file: Path) -> None:
    """Trace a module, and write it with float32 weights."""
    with quiet(), torch.no_grad():
        traced = torch.export.export(module, tuple(inputs.values()), strict=False).run_decompositions(PLAIN)
        program = torch.onnx.export(
            traced, (), input_names=list(inputs), output_names=[output], opset_version=OPSET, dynamo=True, verbose=False
        )
        assert program is not None
        for node in program.model.graph.all_nodes():  # notes of the trace: code and folders of this machine
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        program.save(file, external_data=is_large(module))


def is_large(model: nn.Module) -> bool:
    return sum(4 * p.numel() for p in model.parameters()) > LARGEST


def attention_bytes(model: VideoDiT, settings: dict[str, Any]) -> int:
    """Bytes of the attention weights of one block, which onnxruntime holds in float32 on a CPU."""
    tokens = math.prod(family_of(model.config).geometry.grid(tuple(settings["latent"][2:])))
    return 4 * model.cfg.heads * tokens**2


def quantise(source: Path, target: Path, large: bool) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        quantize_dynamic(
            source, target, ["MatMul"], per_channel=True, reduce_range=True, weight_type=QuantType.QInt8,
            use_external_data_format=large,
        )  # fmt: skip


def predict(file: Path, inputs: dict[str, Tensor]) -> Tensor:
    """The output by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors are raised, not logged as well
    given = {name: value.numpy() for name, value in inputs.items()}
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, given)[0])
    except Exception as err:  # its exceptions have no common class
        raise ValueError(f"to=onnx: onnxruntime does not run this network ({shorter(err)}); use to=diffusers") from None


def check_weights(model: nn.Module, file: Path) -> None:
    """Raise if a weight, or its transpose, does not stand in the file bit for bit."""
    import onnx_ir

    def mark(array: Any) -> str:
        return sha256(np.ascontiguousarray(array).data).hexdigest()

    graph = onnx_ir.load(str(file)).graph
    found = {mark(v.const_value.numpy()) for v in graph.initializers.values() if v.const_value is not None}
    for name, value in model.named_parameters():
        forms = (value, value.T) if value.dim() == 2 else (value,)
        if not found & {mark(form.detach().numpy()) for form in forms}:
            raise ValueError(f"{file}: does not hold {name} as it is; export it again")


def compared(file: Path, module: nn.Module, inputs: dict[str, Tensor], exact: bool) -> dict[str, float]:
    """How far onnxruntime's output is from the module's: at most, and relative; raises ValueError for another one.

    `exact`: the file holds float32 weights.
    """
    wanted = module(*inputs.values())
    difference = predict(file, inputs) - wanted
    largest = difference.abs().max().item()
    if not math.isfinite(largest) or (exact and largest > 1e-3 * wanted.abs().max()):
        raise ValueError(f"{file.stem}: onnxruntime computes something else, by {largest:.2g}; use to=diffusers")
    return {"largest": largest, "relative": (difference.norm() / wanted.norm()).item()}


@torch.no_grad()
def write_onnx(
    model: VideoDiT, card: dict, out: Path, quant: str, size: str, world: bool, vae: str = ""
) -> dict[str, Any]:
    """Write the folder OUT and read it back. Return its bytes, and how far a prediction is from the network's.

    `model`: in float32, on the CPU. `world`: it makes clips of the built-in world. `vae`: what decodes; "": nothing.
    """
    need_onnx()
    settings = settings_of(model, card, size, world)
    inputs = example(model.eval(), settings)
    decoder = read_decoder(vae, model, "image" in inputs) if vae else None
    cond = family_of(model.config).cond(**dict(list(inputs.items())[2:]))
    flops = sum(model.block_flops(inputs["x_t"], cond))
    attention = attention_bytes(model, settings)
    runs = flops <= MOST_FLOPS and attention <= MOST_SCORES
    settings |= {"inputs": {name: list(value.shape) for name, value in list(inputs.items())[2:]}, "weights": "float32"}

    report: dict[str, Any] = {"flops": flops, "settings": settings}
    step = Step(model, list(inputs)[2:], settings["guidance"]).eval()
    with new_folder(out) as made:
        file = made / "step.onnx"
        write_program(step, inputs, "v", file)
        if not runs:
            check_weights(model, file)
        if quant == "int8":
            settings["weights"] = "int8"
            plain = made / "plain"
            plain.mkdir()
            for part in made.glob("step.onnx*"):
                part.rename(plain / part.name)
            quantise(plain / file.name, file, is_large(model))
            shutil.rmtree(plain)
        if runs:
            report |= compared(file, step, inputs, quant == "none")
        if decoder:
            report["decoder"] = write_decoder(decoder, settings, made / "decoder.onnx")
        report["bytes"] = sum(part.stat().st_size for part in made.glob("step.onnx*"))
        finish(made, settings, report["bytes"], attention)
    return report


def write_decoder(decoder: Decoder, settings: dict[str, Any], file: Path) -> dict[str, Any]:
    """Write the decoder; return its bytes and, unless the clip is large, how far its frames are from the module's."""
    inputs, report = decoder_example(settings), {}
    write_program(decoder, inputs, "frames", file)
    if is_runnable(settings["size"]):
        report = compared(file, decoder, inputs, exact=True)
    settings["decoder"] = file.name
    return report | {"bytes": sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*"))}

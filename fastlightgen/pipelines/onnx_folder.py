"""Export as ONNX: a folder with one evaluation of the network (step.onnx), its settings, and code that makes clips.

The network is traced at one size of clips, so that all shapes are static. Weights are float32; `int8` stores those of
the matrix products in 8 bits with one scale per output channel, and onnxruntime quantises the other operand as it runs.
"""

import logging
import math
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastlightgen.atomic import claimed, naming, put, write_json, write_text
from fastlightgen.config import UserError
from fastlightgen.files.border import read_text, shorter
from fastlightgen.models.base import Cond, VideoDiT
from fastlightgen.models.families import family_of
from fastlightgen.models.folder.manifest import verify_files, write_manifest
from fastlightgen.ops.plain import PLAIN
from fastlightgen.pipelines.comfyui import shown_card
from fastlightgen.pipelines.onnx_readme import readme
from fastlightgen.pipelines.world import read_size
from fastlightgen.world.builtin import BuiltIn
from fastlightgen.world.captions import TOKENS, WORDS
from fastlightgen.world.codec import LOW_MEAN, SCALE, Codec
from fastlightgen.world.shapes import WORLD

OPSET = 23  # the first with an operator for attention
LARGEST = 2 * 10**9  # bytes of weights in the file itself; ONNX allows 2 GiB, larger ones stand beside it
MOST_FLOPS, MOST_SCORES = 4e12, 2e9  # of a step that is run for a comparison: minutes on a few cores, bytes
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class Step(nn.Module):
    """One evaluation of a network, as a function of tensors alone."""

    def __init__(self, model: VideoDiT, names: list[str], guidance: float):
        super().__init__()
        self.model, self.names, self.guidance = model, names, guidance

    def forward(self, x_t: Tensor, t: Tensor, *given: Tensor) -> Tensor:
        cond = family_of(self.model.config).cond(**dict(zip(self.names, given, strict=True)))
        if self.model.embeds_guidance:
            cond = replace(cond, guidance=t.new_full((1,), self.guidance))
        out = self.model(x_t, t, cond)
        assert isinstance(out, Tensor)
        return out


def need_onnx() -> None:
    """Raise if a package is missing. They are imported where they are used."""
    from importlib.util import find_spec

    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UserError(f"to=onnx: {missing[0]} is not installed: pip install 'fastlightgen[onnx]'")


def settings_of(model: VideoDiT, card: dict, size: str, world: bool) -> dict[str, Any]:
    """fastlightgen.json of the folder, without its inputs; raise for a student that a step alone cannot sample."""
    if not card.get("ladder"):
        raise UserError("to=onnx: wanted a student of Stage III, whose few steps generate.py takes")
    guidance = float(card.get("guidance") or 1.0)
    if guidance != 1.0 and not model.embeds_guidance:
        raise UserError(
            f"to=onnx: this student takes guidance {guidance:g}, two predictions per step, and generate.py makes one; "
            "use to=comfyui or to=diffusers"
        )
    out = shown_card(model, card) | {"guidance": guidance, "sampler": card.get("sampler", "ode")}
    if world:
        shapes = BuiltIn(size).shapes
        out |= {"fps": BuiltIn.fps, "size": f"{shapes.size}x{shapes.size}x{shapes.frames}"}
        latent = [1, Codec.channels, shapes.frames, *2 * [shapes.size // Codec.stride]]
        language = {"words": list(WORDS), "tokens": TOKENS, "low_mean": LOW_MEAN, "scale": SCALE}
        return out | {"latent": latent, "world": language | {"version": WORLD, "enlarge": BuiltIn.scale}}
    family = family_of(model.config)
    clips = family.clips.of(card)
    height, width, frames = read_size(size or clips.size, family.geometry)
    latent = [1, family.geometry.channels, *family.geometry.latent(height, width, frames)]
    return out | {"fps": round(clips.fps), "size": f"{height}x{width}x{frames}", "latent": latent}


def example(model: VideoDiT, settings: dict[str, Any]) -> dict[str, Tensor]:
    """Random inputs of the step, by name, in the shapes that it will take."""
    family = family_of(model.config)
    frames, height, width = settings["latent"][2:]
    x_t, t, cond, _ = model.example_inputs(batch=1, seed=0, size=(frames, height, width))
    given = {name: value for name, value in vars(replace(cond, guidance=None)).items() if value is not None}
    if "world" in settings:  # its conditions have no fields of a family's own
        known = {f.name for f in fields(Cond)}
        given, tokens = {name: value for name, value in given.items() if name in known}, {"text": TOKENS}
    else:
        tokens = family.encoding(Path(), None, model.cfg, cond.image is not None, torch.device("cpu")).tokens
    g = torch.Generator().manual_seed(0)
    given |= {name: torch.randn(1, n, given[name].shape[2], generator=g) for name, n in tokens.items() if name in given}
    return {"x_t": x_t, "t": t} | given


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' own notes."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def write_step(model: VideoDiT, inputs: dict[str, Tensor], guidance: float, file: Path) -> None:
    """Trace the network, and write it with float32 weights."""
    names = list(inputs)[2:]
    with quiet(), torch.no_grad():
        step = Step(model, names, guidance).eval()
        traced = torch.export.export(step, tuple(inputs.values()), strict=False).run_decompositions(PLAIN)
        program = torch.onnx.export(
            traced, (), input_names=list(inputs), output_names=["v"], opset_version=OPSET, dynamo=True, verbose=False
        )
        assert program is not None
        for node in program.model.graph.all_nodes():  # notes of the trace: code and folders of this machine
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        program.save(file, external_data=is_large(model))


def is_large(model: VideoDiT) -> bool:
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
    """v by onnxruntime on the CPU."""
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


def check_weights(model: VideoDiT, file: Path) -> None:
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


@torch.no_grad()
def write_onnx(model: VideoDiT, card: dict, out: Path, quant: str, size: str, world: bool) -> dict[str, Any]:
    """Write the folder OUT and read it back. Return its bytes, and how far a prediction is from the network's.

    `model`: in float32, on the CPU. `world`: it makes clips of the built-in world.
    """
    need_onnx()
    settings = settings_of(model, card, size, world)
    inputs = example(model.eval(), settings)
    cond = family_of(model.config).cond(**dict(list(inputs.items())[2:]))
    flops = sum(model.block_flops(inputs["x_t"], cond))
    attention = attention_bytes(model, settings)
    runs = flops <= MOST_FLOPS and attention <= MOST_SCORES
    settings |= {"inputs": {name: list(value.shape) for name, value in list(inputs.items())[2:]}, "weights": "float32"}

    out.parent.mkdir(parents=True, exist_ok=True)
    made = out.with_name(f".{out.name}.tmp")
    with claimed(out.with_name(f".{out.name}.lock"), wait=False), naming(made):
        shutil.rmtree(made, ignore_errors=True)  # of a process that was killed
        made.mkdir()
        try:
            file = made / "step.onnx"
            write_step(model, inputs, settings["guidance"], file)
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
            report: dict[str, Any] = {"flops": flops, "settings": settings}
            if runs:
                v = Step(model, list(inputs)[2:], settings["guidance"])(*inputs.values())
                difference = predict(file, inputs) - v
                report["largest"] = difference.abs().max().item()
                report["relative"] = (difference.norm() / v.norm()).item()
                if not math.isfinite(report["largest"]) or (
                    quant == "none" and report["largest"] > 1e-3 * v.abs().max()
                ):
                    raise ValueError(
                        f"{out}: onnxruntime predicts another v, by {report['largest']:.2g}; use to=diffusers"
                    )
            report["bytes"] = sum(part.stat().st_size for part in made.glob("step.onnx*"))
            write_json(made / "fastlightgen.json", settings)
            write_text(made / "generate.py", read_text(Path(__file__).with_name("onnx_generate.py")))
            write_text(made / "README.md", readme(settings, report["bytes"], attention))
            write_manifest(made, {})
            verify_files(made)
            put(made, out)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return report

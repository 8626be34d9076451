"""Write the networks of the page that runs in a browser: python docs/play/make.py runs/demo/stage3/model.

A second argument names another folder than docs/play. Each network is one file, compressed by gzip: two uint32 (bytes
of the graph, number of weights), the graph as ONNX, and the three high bytes of its matrices' float32 numbers: the
first byte of all numbers, then the second, then the third, which compresses best. play.json holds the rest: the world's
words and scales, the times and the sampler. The teacher takes the student's times and sampler, and its own guidance.
"""

import gzip
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from onnx.external_data_helper import set_external_data
from onnx.numpy_helper import to_array
from torch import Tensor

from fastlightgen.atomic import write_json
from fastlightgen.flow import ladder
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.folder.weights import load_model, read_card, trained_folder
from fastlightgen.pipelines.onnx_folder import predict, write_program
from fastlightgen.pipelines.step_folder import Step, example, settings_of
from fastlightgen.world import captions

HERE = Path(__file__).resolve().parent
BITS = 9  # of a matrix's mantissas. The teacher has 7, so it stays exact; 7 move some pixels of a student by 3 levels.
WEIGHTS = "weights"  # the name by which the graph asks for its matrices
RUNTIME = "onnxruntime/ort-wasm-simd-threaded.wasm.gz"


def pack(model: VideoDiT, inputs: dict[str, Tensor], file: Path) -> None:
    """Write a network: the graph, and its matrices and kernels rounded to BITS. Other tensors stay as they are."""
    with TemporaryDirectory() as folder:
        write_program(Step(model, list(inputs)[2:], 1.0).eval(), inputs, "v", Path(folder) / "step.onnx")
        step = onnx.load(Path(folder) / "step.onnx")
    parts, count, dropped = [], 0, 23 - BITS
    for tensor in step.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) in (2, 5):
            value = np.ascontiguousarray(to_array(tensor)).ravel().view(np.uint32)
            parts.append((value + (1 << (dropped - 1))) >> dropped << dropped)
            set_external_data(tensor, WEIGHTS, offset=4 * count, length=4 * len(value))
            tensor.ClearField("raw_data")
            count += len(value)
    graph, numbers = step.SerializeToString(), np.concatenate(parts)
    header = np.array([len(graph), count], "<u4").tobytes()
    planes = [(numbers >> shift).astype(np.uint8).tobytes() for shift in (24, 16, 8)]
    file.write_bytes(gzip.compress(b"".join([header, graph, *planes]), 9, mtime=0))


def unpack(file: Path, folder: Path) -> Path:
    """Write the network of `pack` as ONNX, with float32 weights beside it, as the page hands it to the runtime."""
    data = gzip.decompress(file.read_bytes())
    size, count = np.frombuffer(data, "<u4", 2).tolist()
    (folder / "step.onnx").write_bytes(data[8 : 8 + size])
    first, second, third = np.frombuffer(data, np.uint8, 3 * count, 8 + size).reshape(3, count).astype("<u4")
    (folder / WEIGHTS).write_bytes((first << 24 | second << 16 | third << 8).tobytes())
    return folder / "step.onnx"


@torch.no_grad()
def error(model: VideoDiT, inputs: dict[str, Tensor], file: Path) -> float:
    """How far the written network's prediction is from the model's, relative to it."""
    with TemporaryDirectory() as folder:
        found = predict(unpack(file, Path(folder)), inputs)
    v = Step(model, list(inputs)[2:], 1.0)(*inputs.values())
    return ((found - v).norm() / v.norm()).item()


def describe(student: VideoDiT, card: dict, teacher: VideoDiT, teacher_card: dict) -> dict[str, Any]:
    """play.json without the sizes of files: the world, and the three ways to sample that the page shows."""
    settings = settings_of(student, card, "", world=True)
    own = {"times": settings["ladder"], "sampler": settings["sampler"]}
    slow = {"times": ladder(teacher_card["steps"], teacher_card["shift"]), "sampler": "ode"}
    guided = {"network": "teacher", "blocks": teacher.num_blocks, "guidance": teacher_card["guidance"]}
    return {
        "latent": settings["latent"],
        "fps": settings["fps"],
        "world": {name: settings["world"][name] for name in ("words", "tokens", "low_mean", "scale")},
        "choices": {
            "colours": captions.COLOURS,
            "kinds": captions.KINDS,
            "directions": captions.DIRECTIONS,
            "speeds": captions.SPEEDS,
        },
        "ways": {
            "student": {"network": "student", "blocks": student.num_blocks, "guidance": 1.0, **own},
            "teacher": guided | own,
            "slow": guided | slow,
        },
    }


def main(folder: str, out: Path = HERE) -> None:
    places = {"student": trained_folder(folder), "teacher": trained_folder("tiny")}
    models = {name: load_model(place, dtype=torch.float32).requires_grad_(False) for name, place in places.items()}
    cards = {name: read_card(place) for name, place in places.items()}
    page = describe(models["student"], cards["student"], models["teacher"], cards["teacher"])
    page["bytes"] = {RUNTIME: (HERE / RUNTIME).stat().st_size}
    for name, model in models.items():
        inputs, file = example(model.eval(), page), out / f"{name}.net.gz"
        pack(model, inputs, file)
        size = page["bytes"][file.name] = file.stat().st_size
        print(f"{file}: {size:,} bytes; predicts v within {error(model, inputs, file):.1e} of the model's")
    write_json(out / "play.json", page)


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))

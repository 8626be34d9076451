"""What each output of a student costs: python bench/outputs.py model=STUDENT [clips=512] [threads=1] [out=FILE].

The clips of each output are compared with those of the float32 network: the same captions and noise, paired intervals.
`whole=STUDENT`, beside `model` or alone: a student with all of the teacher's blocks, for the LoRA by rank. Writes
bench/results/outputs.json: bytes, errors, scores, differences, seconds per clip. Rounded weights are computed with in
float32.
"""

import copy
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import gguf
import numpy as np
import onnxruntime
import torch
from measured_with import versions
from torch import Tensor

from fastlightgen.atomic import write_json
from fastlightgen.config import Evaluate
from fastlightgen.evaluate import load_subject, measured
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.folder.original import to_original
from fastlightgen.models.folder.weights import load_model, read_card, trained_folder
from fastlightgen.pipelines.comfyui import held, matrices, to_float8
from fastlightgen.pipelines.lora_student import write_lora
from fastlightgen.pipelines.onnx_folder import write_onnx
from fastlightgen.world.score import compared
from fastlightgen.world.subject import Subject, draw

OUT = "bench/results/outputs.json"
RANKS = (4, 16, 64, 0)  # 0: full
REPORTED = ("bytes", "largest", "relative", "after")  # of an export's report
Form = tuple[str, VideoDiT, dict[str, Any]]  # name, the network that it stands for, what its export reports


def with_weights(model: VideoDiT, read: Callable[[str], Tensor]) -> VideoDiT:
    """The network with the weights that a file holds."""
    net = copy.deepcopy(model)
    net.load_state_dict(net.state_dict() | held(model, read)[0])
    return net


class Onnx:
    """The step of an ONNX folder in the place of a network's forward."""

    def __init__(self, folder: Path, threads: int):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(str(folder / "step.onnx"), options)
        self.inputs = json.loads((folder / "fastlightgen.json").read_text())["inputs"]

    def __call__(self, x_t: Tensor, t: Tensor | float, cond: Any, keep: Any = None) -> Tensor:
        """The file takes one clip at a time."""
        times = torch.as_tensor(t, dtype=torch.float32).expand(len(x_t))
        given = {"x_t": x_t, "t": times} | {name: getattr(cond, name) for name in self.inputs}
        arrays = {name: value.numpy() for name, value in given.items()}
        rows = [self.session.run(None, {k: v[i : i + 1] for k, v in arrays.items()})[0] for i in range(len(x_t))]
        return torch.from_numpy(np.concatenate(rows))


def files(model: VideoDiT, card: dict, folder: Path, threads: int) -> Iterator[Form]:
    """The types that outputs hold weights in, and the ONNX folders, written and read back.

    ComfyUI has no network of this size, so that its files cannot be written; the weights are rounded as theirs are.
    """
    state = to_original(model)
    names = {f"{name}.weight" for name in matrices(state)}

    def stored(key: str, quant: str) -> Tensor:
        value = state[key].detach()
        if not quant.startswith("q"):
            value = value.bfloat16()
        if quant == "bfloat16" or key not in names:
            return value
        if quant == "fp8":
            return torch.mul(*map(Tensor.float, to_float8(value)))
        kind = gguf.GGMLQuantizationType[quant.upper()]
        return torch.from_numpy(np.array(gguf.quants.dequantize(gguf.quants.quantize(value.numpy(), kind), kind)))

    for quant in ("bfloat16", "fp8", "q8_0", "q5_1", "q4_0"):
        yield quant, with_weights(model, partial(stored, quant=quant)), {}
    for quant in ("none", "int8"):
        report = write_onnx(copy.deepcopy(model), card, folder / f"onnx-{quant}", quant, "", True)
        net = copy.deepcopy(model)
        net.forward = Onnx(folder / f"onnx-{quant}", threads)
        yield f"onnx {'float32' if quant == 'none' else quant}", net, report


def loras(model: VideoDiT, card: dict, folder: Path) -> Iterator[Form]:
    """A student with all blocks as a LoRA of the teacher, by rank."""
    full = max(min(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Linear))
    for rank in RANKS:
        teacher = load_model(trained_folder("tiny")).requires_grad_(False)
        report = write_lora(model, card, teacher, folder / f"lora-{rank}.safetensors", torch.float32, rank or full)
        report["bytes"] = min(report["files"].values())
        yield f"lora, rank {rank or f'{full} (full)'}", teacher, report  # write_lora has added the LoRA to it


def measure(cfg: Evaluate, subject: Subject, forms: Iterator[Form]) -> list[dict[str, Any]]:
    """Scores of the network and of each output, and the differences."""
    rows: list[dict[str, Any]] = []
    base = None
    for name, net, report in [("float32", subject.model, {}), *forms]:
        used = Subject(name, name, net.eval().requires_grad_(False), subject.folder, subject.plan)
        clips, asked, _ = draw(cfg, used, cfg.clips)
        result = measured(cfg, {}, clips, asked, None)
        base = base or result
        shown = {key: report[key] for key in REPORTED if key in report}
        row = {"output": name, **shown, "scores": result.record["scores"], "seconds per clip": seconds(cfg, used)}
        if result is not base:
            row["against float32"] = compared(result.resampled, base.resampled, cfg.seed)
        rows.append(row)
        scores = {key: round(row["scores"][key], 4) for key in ("adherence", "frechet", "kid", "texture")}
        print(name, json.dumps(shown | scores), f"{row['seconds per clip']:.3f} s a clip", flush=True)
    return rows


def seconds(cfg: Evaluate, subject: Subject) -> float:
    """The median time of one clip alone."""
    return median(draw(cfg, subject, 1, first=i)[2] for i in range(5))


def main() -> None:
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    threads = int(given.get("threads", 1))
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    subjects = [name for name in ("model", "whole") if name in given]
    cfg = Evaluate(model=given[subjects[0]], out="unused.json", clips=int(given.get("clips", 512)), progress=False)
    record: dict[str, Any] = {"clips": cfg.clips, "threads": threads}
    for key in subjects:
        subject, card = load_subject(cfg, given[key], key, key), read_card(Path(given[key]))
        with tempfile.TemporaryDirectory() as place:
            folder, net = Path(place), subject.model
            forms = files(net, card, folder, threads) if key == "model" else loras(net, card, folder)
            record[key] = measure(cfg, subject, forms)
    command = f"python bench/outputs.py {' '.join(sys.argv[1:])}"
    write_json(Path(given.get("out", OUT)), record | {"command": command, "measured with": versions()})


if __name__ == "__main__":
    main()

"""Export for ComfyUI: a network in one file with the original keys, and a workflow with the student's sampler.

ComfyUI reads the depth of a network off its keys, so a pruned one loads; its scheduler `simple` under ModelSamplingSD3
follows a student's ladder, its sampler `lcm` adds fresh noise after each step, and `euler` takes Euler steps. Two
experts are two files and two samplers: the second continues the first one's steps at the boundary.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlightgen.atomic import write_json
from fastlightgen.config import EXPERTS, UserError
from fastlightgen.files.tensors import read_tensors, save_tensors, summed
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.families import family_of
from fastlightgen.models.folder.original import key_table, original_config, to_original
from fastlightgen.models.graph import Comfy, Graph, Link
from fastlightgen.models.keys import Table, inverse
from fastlightgen.ops.float8 import quantised
from fastlightgen.pipelines.scheduler import TOLERANCE

SAMPLERS = {"stochastic": "lcm", "ode": "euler"}
TABLE = 1000  # sigmas that ComfyUI's flow models tabulate
SCALE = "weight_scale"
LOADER = "UNETLoader"


def sigmas(steps: int, shift: float) -> list[float]:
    """The noise levels of scheduler `simple`: every so many of TABLE levels (i + 1) / TABLE, shifted."""
    levels = [(TABLE - int(i * TABLE / steps)) / TABLE for i in range(steps)]
    return [shift * u / (1 + (shift - 1) * u) for u in levels]


def comfy_of(model: VideoDiT, card: dict, to: str = "comfyui") -> Comfy:
    """What ComfyUI needs for this network; raise if it would load as another network or be sampled in another way."""
    family, config = family_of(model.config), model.config
    if family.comfy is None:
        raise UserError(f"to={to}: {family.title} has no such export yet; use to=diffusers")
    original_config(config)
    if not card.get("ladder"):
        raise UserError(f"to={to}: wanted a student of Stage III, whose steps and shift the workflow sets")
    for key, wanted in family.comfy.assumes.items():
        got = tuple(config[key]) if isinstance(config[key], list | tuple) else config[key]
        if got != wanted:
            raise UserError(f"to={to}: the network has {key} {got}, and ComfyUI assumes {wanted}; use to=diffusers")
    if not model.cfg.is_stock:
        raise UserError(f"to={to}: width pruning left fewer heads, which ComfyUI cannot load; use to=diffusers")
    if (error := ladder_error(card)) > TOLERANCE:
        raise UserError(f"to={to}: its scheduler misses the student's ladder by {error:.2g}; use to=diffusers")
    return family.comfy


def table_of(model: VideoDiT) -> Table:
    """The key table of ComfyUI's files of this network."""
    comfy = family_of(model.config).comfy
    return comfy.keys(model.config) if comfy and comfy.keys else key_table(model.config)


def ladder_error(card: dict) -> float:
    """How far the noise levels of scheduler `simple` are from the student's."""
    times = card["ladder"]
    return max(abs(a - b) for a, b in zip(sigmas(len(times), card["shift"]), times, strict=True))


def file_of(out: Path, card: dict) -> Path:
    """OUT itself, or the file of one of two experts: student_high_noise.safetensors."""
    return out.with_stem(f"{out.stem}_{card['expert']}_noise") if card.get("expert") else out


def write_workflow(config: Mapping, card: dict, out: Path, loader: str) -> None:
    """Write OUT.workflow.json: the nodes from the file to a saved video, as ComfyUI's API and canvas take them.

    `loader`: the class of the node that loads a network. A card with a boundary is that of two experts.
    """
    family, graph = family_of(config), Graph()
    assert family.comfy is not None
    clips, extra = family.clips.of(card), {"weight_dtype": "default"} if loader == LOADER else {}

    def network(file: Path) -> Link:
        loaded = graph.add(loader, unet_name=file.name, **extra)
        return graph.add("ModelSamplingSD3", shift=float(card["shift"]), model=loaded)

    guidance, embeds = float(card.get("guidance") or 1.0), family.settings(config).embeds_guidance
    experts = EXPERTS if card.get("boundary") else ()
    networks = [network(file_of(out, {"expert": name})) for name in experts] or [network(out)]
    given = family.comfy.inputs(graph, config, (*clips.buckets[0], clips.frames), guidance)
    common = {
        "steps": len(card["ladder"]),
        "cfg": 1.0 if embeds else guidance,
        "sampler_name": SAMPLERS[card["sampler"]],
        "scheduler": "simple",
        "positive": given.positive,
        "negative": given.negative,
    }
    if experts:
        clip = in_turn(graph, networks, given.latent, sum(t >= card["boundary"] for t in card["ladder"]), common)
    else:
        clip = graph.add("KSampler", model=networks[0], seed=0, denoise=1.0, latent_image=given.latent, **common)
    frames = graph.add("VAEDecode", samples=clip, vae=given.vae)
    video = graph.add("CreateVideo", images=frames, fps=clips.fps)
    graph.add("SaveVideo", video=video, filename_prefix=out.stem, format="mp4", codec="h264")
    write_json(out.with_suffix(".workflow.json"), graph.nodes)


def in_turn(graph: Graph, networks: list[Link], latent: Link, split: int, common: Mapping[str, Any]) -> Link:
    """Two samplers: the first takes `split` steps and leaves the rest of the noise, the second takes the others.

    The seeds differ, because sampler `lcm` draws its fresh noise from a generator that each sampler starts anew.
    """
    high, low = networks
    first = {"add_noise": "enable", "noise_seed": 0, "start_at_step": 0, "end_at_step": split}
    second = {"add_noise": "disable", "noise_seed": 1, "start_at_step": split, "end_at_step": common["steps"]}
    for model, steps, rest in ((high, first, "enable"), (low, second, "disable")):
        latent = graph.add(
            "KSamplerAdvanced", model=model, latent_image=latent, **steps, **common, return_with_leftover_noise=rest
        )
    return latent


def matrices(state: dict[str, Tensor]) -> list[str]:
    """The layers that are quantised: the matrices of the blocks, which hold nearly all parameters."""
    ends = ".weight"
    return [k.removesuffix(ends) for k, v in state.items() if "blocks." in k and k.endswith(ends) and v.dim() == 2]


def to_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight in float8 and its scale: the weight is their product."""
    rows, scale = quantised(weight.reshape(1, -1))  # the whole weight as one row, which has one scale
    return rows.view(weight.shape), scale.view(())


def write_comfyui(model: VideoDiT, card: dict, out: Path, dtype: torch.dtype, quant: str) -> dict[str, Any]:
    """Write the network to OUT, read the file back, and compare. Return the bytes and the differences."""
    comfy, family = comfy_of(model, card), family_of(model.config)
    if quant == "fp8" and not comfy.float8:
        raise UserError(f"quant=fp8: ComfyUI renames the layers of {family.title}; leave quant= out")
    state = {key: value.detach().to("cpu", dtype) for key, value in to_original(model, table_of(model)).items()}
    metadata = {"format": "pt", "fastlightgen": json.dumps(shown_card(model, card))}
    if quant == "fp8":
        layers = matrices(state)
        for name in layers:
            state[f"{name}.weight"], state[f"{name}.{SCALE}"] = to_float8(state[f"{name}.weight"])
        kinds = {name: {"format": "float8_e4m3fn"} for name in layers}
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": kinds})
    save_tensors(out, state, metadata | summed(state))  # verified when it is read back
    del state
    found = read_tensors(out)
    return {"bytes": out.stat().st_size} | compared(model, lambda key: dequantised(key, found))


def shown_card(model: VideoDiT, card: dict) -> dict[str, Any]:
    """What the file says of the student. The depth is its own: a teacher's would override what ComfyUI detects."""
    sampling = ("ladder", "shift", "sampler", "guidance", "steps", "clips", "expert", "boundary")
    keys = [key for key in ("family", "stage", "kept_blocks", *sampling) if card.get(key) is not None]
    return {key: card[key] for key in keys} | {"num_blocks": model.num_blocks}


def held(model: VideoDiT, read: Callable[[str], Tensor]) -> tuple[dict[str, Tensor], float]:
    """The network's tensors that a file holds otherwise, as it holds them, and the largest relative error of a weight.

    `read`: original key -> the tensor in the file, dequantised.
    """
    own = model.state_dict()
    worst = 0.0
    state: dict[str, Tensor] = {}
    for key, pieces in inverse(table_of(model)).items():
        values, start = read(key), 0
        for piece in pieces:
            wanted = piece.of(own[piece.key])
            rows = values[start : start + len(wanted)].reshape(wanted.shape).to(wanted)
            start += len(wanted)
            worst = max(worst, ((rows - wanted).float().norm() / wanted.float().norm().clamp(min=1e-12)).item())
            if not torch.equal(rows, wanted):
                state.setdefault(piece.key, own[piece.key].clone())
                piece.of(state[piece.key]).copy_(rows)
    return state, worst


@torch.no_grad()
def compared(model: VideoDiT, read: Callable[[str], Tensor]) -> dict[str, Any]:
    """The largest relative error of a weight that a file holds, and that of a prediction with its weights."""
    state, worst = held(model, read)
    if not state:
        return {"weights": 0.0, "prediction": 0.0}  # bit for bit the same network
    own = model.state_dict()
    x_t, t, cond, _ = model.eval().example_inputs(batch=1, seed=0)
    before, after = (torch.func.functional_call(model, own | new, (x_t, t, cond)).float() for new in ({}, state))
    return {"weights": worst, "prediction": ((after - before).norm() / before.norm()).item()}


def dequantised(key: str, found: dict[str, Tensor]) -> Tensor:
    scale = found.get(f"{key.removesuffix('.weight')}.{SCALE}") if key.endswith(".weight") else None
    return found[key] if scale is None else found[key].float() * scale

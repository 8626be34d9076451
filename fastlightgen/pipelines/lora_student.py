"""Export a student that has all blocks as a LoRA for its teacher: student minus teacher, of low rank in every layer.

W_student - W_teacher = U S V^T is cut to its `rank` largest singular values: up = U sqrt(S), down = sqrt(S) V^T. Their
product is the nearest matrix of that rank (Eckart and Young 1936). OUT is for diffusers, whose LoRA holds linear layers
alone. OUT.comfyui has the original keys; there, what is no matrix (norms, biases, tables) is held whole.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlightgen.config import UserError
from fastlightgen.files.tensors import read_tensors, save_tensors, summed
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.folder.original import assembled
from fastlightgen.models.keys import Piece, Table, inverse
from fastlightgen.pipelines.comfyui import shown_card, table_of

FULL_RANK = 64  # rank of the LoRA of a student whose weights all trained
EXACT = 1024  # the largest side of a matrix whose singular values are all computed; above, only the largest ones
POWER = 4  # iterations that find these
DOWN, UP = "lora_A.weight", "lora_B.weight"  # ends of PEFT's keys
PEFT, COMFY = "transformer.", "diffusion_model."  # starts of the keys


@dataclass(frozen=True)
class Low:
    """The low-rank form of a difference, and the squared norm of it that the first 1, 2, ... singular values hold."""

    down: Tensor  # [rank, in]
    up: Tensor  # [out, rank]
    energy: Tensor  # [rank]


def factors(change: Tensor, rank: int) -> Low:
    """The `rank` largest singular values of a matrix, padded with zeros if it has fewer."""
    change = change.float()
    if max(change.shape) <= EXACT:
        u, s, v = torch.linalg.svd(change, full_matrices=False)
    else:
        u, s, vectors = torch.svd_lowrank(change, min(rank + 16, *change.shape), POWER)
        v = vectors.mT
    some = min(rank, len(s))
    down, up = change.new_zeros(rank, change.shape[1]), change.new_zeros(change.shape[0], rank)
    down[:some], up[:, :some] = s[:some, None].sqrt() * v[:some], u[:, :some] * s[:some].sqrt()
    energy = torch.zeros(rank, dtype=torch.float64)
    energy[:some] = s[:some].double().square()
    return Low(down, up, energy.cumsum(0))


def check_pair(model: VideoDiT, teacher: VideoDiT, name: str) -> None:
    """Raise unless student and teacher are the same network with other weights."""
    if model.num_blocks != teacher.num_blocks:
        raise UserError(
            f"to=lora: the student has {model.num_blocks} of {teacher.num_blocks} blocks, and a LoRA drops none; use "
            "to=diffusers, comfyui or gguf, or train a student with all blocks (stage=3 method=dmd2 student=full)"
        )
    for key in model.config | teacher.config:
        one, other = model.config.get(key), teacher.config.get(key)
        if one != other and not key.startswith("_"):
            raise UserError(f"teacher={name}: {key} is {other} and the student's {one}; give the student's teacher")


def for_diffusers(lows: Mapping[str, Low]) -> dict[str, Tensor]:
    """The tensors of a LoRA by PEFT's names; their ranks are equal, so that its strength is 1."""
    pairs = {f"{PEFT}{name}": low for name, low in lows.items()}
    downs = {f"{name}.{DOWN}": low.down for name, low in pairs.items()}
    return downs | {f"{name}.{UP}": low.up for name, low in pairs.items()}


def for_comfyui(
    new: Mapping[str, Tensor], old: Mapping[str, Tensor], lows: Mapping[str, Low], table: Table
) -> dict[str, Tensor]:
    """The tensors of a LoRA by the original keys.

    What is no linear layer: NAME.diff is added to NAME or NAME.weight, NAME.diff_b to NAME.bias.
    """
    out: dict[str, Tensor] = {}
    for key, pieces in inverse(table).items():
        name = f"{COMFY}{key.removesuffix('.weight').removesuffix('.bias')}"
        if key.endswith(".weight") and (used := layers(pieces) & lows.keys()):
            down, up = side_by_side(pieces, {layer: lows[layer] for layer in sorted(used)}, new)
            out |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            out[f"{name}.alpha"] = torch.tensor(float(len(down)))  # strength 1
        elif (change := assembled(new, pieces).float() - assembled(old, pieces).float()).any():
            out[f"{name}.diff_b" if key.endswith(".bias") else f"{name}.diff"] = change
    return out


def layers(pieces: Sequence[Piece]) -> set[str]:
    """The layers whose weights make up an original tensor."""
    return {piece.key.removesuffix(".weight") for piece in pieces}


def side_by_side(
    pieces: Sequence[Piece], lows: Mapping[str, Low], state: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """(down, up) of a layer that fuses several: their ranks beside each other, each with its own rows."""
    ups: list[Tensor] = []
    for piece in pieces:
        own = piece.key.removesuffix(".weight")
        height = len(piece.of(state[piece.key]))
        row = [
            piece.of(low.up) if name == own else low.up.new_zeros(height, low.up.shape[1]) for name, low in lows.items()
        ]
        ups.append(torch.cat(row, 1))
    return torch.cat([low.down for low in lows.values()]), torch.cat(ups)


@torch.no_grad()
def write_lora(model: VideoDiT, card: dict, teacher: VideoDiT, out: Path, dtype: torch.dtype, rank: int) -> dict:
    """Write both files, read diffusers' back into the teacher, and compare its prediction with the student's."""
    new, old = model.state_dict(), teacher.state_dict()
    linear = {f"{name}.weight": name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    lows, within, others = dict[str, Low](), 0.0, 0.0  # squared norms of the change in linear layers, and in all else
    for key, value in new.items():
        change = value.float() - old[key].float()
        if not (norm := change.double().square().sum().item()):
            continue
        if key in linear:
            lows[linear[key]], within = factors(change, rank), within + norm
        else:
            others += norm
    if not within + others:
        raise UserError("to=lora: student and teacher have the same weights, nothing to write")
    metadata = {"format": "pt", "fastlightgen": json.dumps(shown_card(model, card) | {"lora_rank": rank})}
    report: dict[str, Any] = {"files": {}, "layers": len(lows), "left": (others / (within + others)) ** 0.5}
    comfyui = for_comfyui(new, old, lows, table_of(model))
    for path, tensors in ((out, for_diffusers(lows)), (out.with_suffix(".comfyui.safetensors"), comfyui)):
        tensors = {key: value.to(dtype).contiguous() for key, value in tensors.items()}
        save_tensors(path, tensors, metadata | summed(tensors))
        report["files"][str(path)] = path.stat().st_size
    ranks = sorted({min(r, rank) for r in (4, 16, 64, rank)}) if lows else []
    held = {r: sum(low.energy[r - 1].item() for low in lows.values()) for r in ranks}
    report["errors"] = {r: max(0.0, 1 - some / within) ** 0.5 for r, some in held.items()}
    return report | predictions(model, teacher, read_tensors(out))


@torch.no_grad()
def predictions(model: VideoDiT, teacher: VideoDiT, tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """How far the teacher's prediction is from the student's, without and with the LoRA, over the student's norm.

    The LoRA stays in the teacher.
    """
    x_t, t, cond, _ = model.eval().example_inputs(batch=1, seed=0)
    wanted, bare = (net(x_t, t, cond).float() for net in (model, teacher.eval()))
    state = teacher.state_dict()
    for key in tensors:
        if key.endswith(f".{DOWN}"):
            name = key.removesuffix(f".{DOWN}")
            weight = state[f"{name.removeprefix(PEFT)}.weight"]
            weight += (tensors[f"{name}.{UP}"].float() @ tensors[key].float()).to(weight)
    after, norm = teacher(x_t, t, cond).float(), wanted.norm()
    return {"before": ((bare - wanted).norm() / norm).item(), "after": ((after - wanted).norm() / norm).item()}

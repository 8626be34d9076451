"""Export: write a diffusers pipeline folder with a student in place of its network.

An export holds transformer/ (the student), scheduler/ (its ladder), model_index.json, README.md, fastlightgen.json and
the other parts unchanged, copied or linked. It is written under a temporary name and compared. manifest.json comes
last; when all files agree with it, the folder is renamed.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from fastlightgen.atomic import claimed, naming, put, write_json
from fastlightgen.config import Run
from fastlightgen.decoder.folder import check_replaces, copy_vae
from fastlightgen.models.base import Block, VideoDiT
from fastlightgen.models.families import block_counts, family_of, family_of_pipeline
from fastlightgen.models.folder.experts import ORIGINAL_PARTS, PIPELINE_PARTS
from fastlightgen.models.folder.index import INDEX, read_index
from fastlightgen.models.folder.manifest import verify_files, write_manifest
from fastlightgen.models.folder.original import original_config, read_config
from fastlightgen.models.folder.weights import save_model, save_original
from fastlightgen.parallel.log import size
from fastlightgen.pipelines.copies import check_parts, copy_parts
from fastlightgen.pipelines.lora_file import LORA, BlockMap, remap_lora
from fastlightgen.pipelines.modelcard import model_card
from fastlightgen.pipelines.origin import name_of
from fastlightgen.pipelines.scheduler import CLASS, scheduler_config, stock_boundary, write_guider

NETWORK, SECOND = NETWORKS = PIPELINE_PARTS  # with two experts the high- and the low-noise one


def is_pipeline(folder: str | Path) -> bool:
    """True if the folder holds model_index.json."""
    return (Path(folder) / INDEX).is_file()


def vae_folder(cfg: Run) -> str:
    """The pipeline folder whose VAE decodes the clips of a training run; "" if there is none."""
    return cfg.pipeline or (cfg.model if is_pipeline(cfg.model) else "")


def parts_of(pipeline: Path) -> dict[str, str]:
    """Read the parts of a pipeline folder, name -> class, and check that it holds them and a network."""
    if not is_pipeline(pipeline):
        raise ValueError(f"pipeline={pipeline}: has no {INDEX}; give a folder that diffusers' save_pretrained wrote")
    index = read_index(pipeline)
    parts = {
        k: v[1] for k, v in index.items() if not k.startswith("_") and isinstance(v, list) and len(v) == 2 and v[1]
    }
    for name in parts:
        if name not in ("scheduler", *NETWORKS) and not (pipeline / name).is_dir():
            raise ValueError(f"{pipeline}: {INDEX} names {name}, and there is no such folder; copy it again")
    if NETWORK not in parts:
        raise ValueError(f"pipeline={pipeline}: wanted a network, `{NETWORK}`; this is {index.get('_class_name')}")
    return parts


def check_number(parts: Mapping[str, str], networks: int, pipeline: Path) -> None:
    """Raise ValueError if the pipeline has two experts and the model one network, or the reverse."""
    if (found := sum(name in parts for name in NETWORKS)) != networks:
        count = {1: "one network, as Wan2.1 has", 2: "two experts, as Wan2.2 A14B has"}
        raise ValueError(
            f"pipeline={pipeline}: has {count[found]}, and the model {count[networks]}; give the pipeline of the "
            "teacher that the model comes from"
        )


def network_config(pipeline: Path, part: str = NETWORK) -> dict:
    """Read transformer/config.json: the configuration of the pipeline's own network."""
    return read_config(pipeline / part)


def check_fits(config: dict, pipeline: Path) -> None:
    """Raise ValueError if the pipeline's other parts do not fit the network with configuration `config`."""
    teacher = network_config(pipeline)
    for key in ("_class_name", *family_of(config).interface):
        got, wanted = (json.loads(json.dumps(c.get(key))) for c in (config, teacher))  # through JSON: tuples are lists
        if got != wanted and (key == "_class_name" or (key in config and key in teacher)):
            raise ValueError(
                f"pipeline={pipeline}: its network has {key} {wanted}, the model {got}; "
                "give the pipeline of the teacher that the model comes from"
            )


def block_map(config: dict, kept: list[int] | None, teacher: dict) -> BlockMap:
    """Per block list, {index of a kept block in the teacher: its index in the model}.

    `kept`: indices into all lists of the teacher together, in order; None: the model has all of its blocks.
    """
    model_counts, teacher_counts = block_counts(config), block_counts(teacher)
    if kept is None or len(kept) == sum(teacher_counts.values()):
        kept = list(range(sum(teacher_counts.values())))
    out: BlockMap = {}
    start = 0
    for name, count in teacher_counts.items():
        old = [i - start for i in kept if start <= i < start + count]
        out[name] = {i: new for new, i in enumerate(old)}
        start += count
    if {name: len(m) for name, m in out.items()} != model_counts or max(kept) >= start:
        raise ValueError(
            f"the model's blocks {model_counts} are not the blocks {kept} of the pipeline's network {teacher_counts}; "
            "give the pipeline of the teacher that the model was pruned from"
        )
    return out


def call_of(card: dict, config: dict) -> dict:
    """Arguments with which a stock pipeline samples the model; a student has guidance 1, so no second prediction."""
    steps = len(card["ladder"]) if card.get("ladder") else card.get("steps")
    call = {"num_inference_steps": steps} if steps else {}
    family = family_of(config)
    if family.guider:  # an export has it in that part
        guidance = {}
    elif family.settings(config).embeds_guidance:  # guidance_scale goes into the network; true guidance stays off
        guidance = {"guidance_scale": card.get("guidance"), family.cfg_argument: 1.0}
    else:
        guidance = {family.cfg_argument: card.get("guidance")}
    return call | {k: v for k, v in guidance.items() if v is not None}


Networks = Mapping[str, tuple[VideoDiT, dict]]  # part of the pipeline -> network and card


def write_pipeline(
    networks: Networks,
    pipeline: Path,
    out: Path,
    verify: Callable[[Path], dict],
    *,
    dtype: torch.dtype | None = None,
    link: bool = False,
    vae: str = "",
    loras: Mapping[str, Path] | None = None,
    original: bool = False,
    progress: bool = True,
) -> dict:
    """Write the export to a temporary folder, let `verify` compare it, and rename it to `out`.

    `networks`: one, or two experts that sample with one ladder, whose cards name their boundary.
    `vae`: the folder of a VAE that takes the place of the pipeline's. `loras`: LoRA files by the part that they change.
    Returns the measurements of `verify`, and `loras`: per part the name of the renumbered file, the number of blocks
    that it still changes, and the number that it lost.
    """
    loras = loras or {}
    parts = parts_of(pipeline)
    check_number(parts, len(networks), pipeline)
    if (lora := loras.get(SECOND)) and SECOND not in networks:
        raise ValueError(f"lora_2={lora}: the model has one network; give the file as lora=")
    blocks, depths = dict[str, BlockMap](), dict[str, dict[str, int]]()
    for part, (model, card) in networks.items():
        check_fits(model.config, pipeline)
        if original:
            original_config(model.config)  # raises before anything is written if that format cannot hold this network
        teacher = network_config(pipeline, part)
        if part in loras and narrower(model, teacher):
            raise ValueError(
                f"{LORA[part]}={loras[part]}: changes rows that width pruning dropped from the model; leave "
                f"{LORA[part]}= out"
            )
        depths[part] = block_counts(teacher)
        blocks[part] = block_map(model.config, card.get("kept_blocks"), teacher)
    model, card = networks[NETWORK]
    family = family_of(model.config)
    student = card.get("ladder") is not None
    replaced = {*networks, *["scheduler", family.guider] * student, *["vae"] * bool(vae)}
    names = [name for name in parts if name not in replaced]
    small = check_replaces(vae, pipeline, encodes_frames(pipeline)) if vae else None
    check_room([net for net, _ in networks.values()], pipeline, names if not link else [], out, dtype, original)
    check_parts(pipeline, names)

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary, report = out.with_name(f".{out.name}.tmp"), dict[str, Any]()
    with ExitStack() as held:
        held.enter_context(claimed(out.with_name(f".{out.name}.lock"), wait=False))
        held.enter_context(naming(temporary))
        held.callback(shutil.rmtree, temporary, ignore_errors=True)  # of a process that was killed, or of this one
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        copied = copy_parts(pipeline, temporary, names, link, progress)
        if small:
            copy_vae(small[0], temporary / "vae")
        index = read_index(pipeline)
        for part, (net, own) in networks.items():
            shown = own | {"block_map": blocks[part], "call": call_of(own, net.config)}
            shown |= {} if net.cfg.is_stock else {"stock": False}
            if shown.get("source"):
                shown["source"] = name_of(shown["source"])  # an export goes to others, to whom a path here says nothing
            save_model(net, temporary / part, dtype, **shown)
            if original:
                own_folder = ORIGINAL_PARTS[NETWORKS.index(part)] if SECOND in networks else ""
                save_original(net, temporary / "original" / own_folder, **shown)
            if part == NETWORK:
                card = shown
        if SECOND in networks:
            index["boundary_ratio"] = stock_boundary(card["ladder"], card["boundary"]) if student else card["boundary"]
        else:
            shutil.copy(temporary / NETWORK / "fastlightgen.json", temporary)
        if student:
            shape = scheduler_config(family, card["ladder"], card["shift"], card.get("sampler", "stochastic"))
            write_json(temporary / "scheduler" / "scheduler_config.json", shape)
            index["scheduler"] = ["diffusers", CLASS]
            if family.guider:
                index[family.guider] = write_guider(temporary, family, card)
        write_json(temporary / INDEX, {k: v for k, v in index.items() if k != "_name_or_path"})
        report["loras"] = {
            part: remap_lora(LORA[part], file, temporary / LORA[part], blocks[part], depths[part])
            for part, file in loras.items()
        }
        text = model_card(
            out.name, family, index["_class_name"], pipeline, card, blocks, depths[NETWORK], report["loras"],
            small[1] if small else None,
        )  # fmt: skip
        (temporary / "README.md").write_text(text)
        report |= verify(temporary)
        write_manifest(temporary, copied)
        verify_files(temporary)
        put(temporary, out)
    return report


def encodes_frames(pipeline: Path) -> bool:
    """True if the pipeline can start from a first frame, which its VAE encodes."""
    index = read_index(pipeline)
    name, family = index.get("_class_name", ""), family_of_pipeline(index)
    return family.pipelines[name] is not False if family else "ImageToVideo" in name


def narrower(model: VideoDiT, teacher: dict) -> bool:
    """True if width pruning made the model of the network with configuration `teacher`."""
    if not any(isinstance(block, Block) and block.prunable() for block in model.blocks):
        return False
    theirs = family_of(teacher).settings(teacher)
    return (model.cfg.heads, model.cfg.ffn_width) != (theirs.heads, theirs.ffn_width)


def check_out(out: Path) -> None:
    """Raise ValueError if `out` exists and is not an empty folder: an export never replaces anything."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"out={out}: exists and is not empty; delete it or give another folder")
    if out.is_dir():
        out.rmdir()


def check_room(
    models: Sequence[VideoDiT],
    pipeline: Path,
    names: list[str],
    out: Path,
    dtype: torch.dtype | None,
    original: bool,
) -> None:
    """Raise ValueError if the disk has too little room for the export."""
    each = dtype.itemsize if dtype else 4  # bytes per parameter
    need = sum(p.numel() for model in models for p in model.parameters()) * each * (1 + original)
    need += sum(f.stat().st_size for n in names for f in (pipeline / n).rglob("*") if f.is_file())
    where = next(p for p in out.absolute().parents if p.is_dir())
    if need > (free := shutil.disk_usage(where).free):
        raise ValueError(f"out={out}: needs {size(need)} and {where} has {size(free)} free; make room, or link=true")

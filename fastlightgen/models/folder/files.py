"""Tensors and JSON on disk: shards found and mapped without reading them, folders written whole or not at all."""

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastlightgen.atomic import write_json

WEIGHTS = "diffusion_pytorch_model.safetensors"
NAMES = (WEIGHTS, "model.safetensors")  # the second: original HunyuanVideo files that were converted
PICKLES = (".pt", ".pth", ".bin")
FIRST_PICKLES = ("mp_rank_00_model_states.pt", "diffusion_pytorch_model.bin")  # they may have others beside them
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as err:
        raise ValueError(f"{path}: cannot be read as JSON ({err})") from None


def digest(path: Path) -> str:
    """Short hash of a file's content."""
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            h.update(chunk)
    return h.hexdigest()[:16]


def weight_files(folder: Path, allow_pt: bool = False) -> list[Path]:
    """The weight files of a folder: one file, or those its index names; pickles only where they are asked for."""
    for name in NAMES:
        if (folder / f"{name}.index.json").is_file():
            return indexed(folder / f"{name}.index.json")
        if (folder / name).is_file():
            return [folder / name]
    shards = sorted(folder.glob(f"{Path(WEIGHTS).stem}-*.safetensors"))
    if shards:
        return shards  # their index is lost; whether they are complete shows when keys are compared
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if not pickles:
        raise ValueError(f"{folder / WEIGHTS}: not found; give a folder with the weights beside config.json")
    if not allow_pt:
        raise ValueError(
            f"{folder}: holds no {WEIGHTS}, only the pickle {pickles[0]}, which is read on request: add allow_pt=true "
            f"(load_model: allow_pt=True)"
        )
    chosen = [name for name in FIRST_PICKLES if name in pickles] or pickles
    if len(chosen) > 1:
        raise ValueError(f"{folder}: {', '.join(chosen)} may all hold the weights; keep one of them in the folder")
    return [folder / chosen[0]]


def indexed(index: Path) -> list[Path]:
    """The shards that an index names, all inside its folder."""
    record = read_json(index)
    shards = record.get("weight_map") if isinstance(record, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index}: has no weight_map; copy the folder again")
    names = sorted({str(name) for name in shards.values()})
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{index}: names files outside its folder")
    other = next((name for name in names if Path(name).suffix != ".safetensors"), None)
    if other is not None:
        raise ValueError(f"{index}: names {other!r}; wanted .safetensors files")
    return [index.parent / name for name in names]


@contextmanager
def mapped(file: Path) -> Iterator[tuple[list[str], Callable[[str], Tensor]]]:
    """(keys in file order, key -> tensor): the tensors are mapped, so that only what is used is read."""
    try:
        if file.suffix in PICKLES:
            tensors = unpickled(file)
            yield list(tensors), tensors.__getitem__
        else:
            with safe_open(file, framework="pt") as f:
                yield f.offset_keys(), f.get_tensor
    except FileNotFoundError:
        raise ValueError(f"{file}: not found") from None
    except (SafetensorError, OSError) as err:
        raise ValueError(f"{file}: damaged or truncated ({err})") from None


def unpickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a torch.save file, mapped; no code in it is run."""
    try:
        record = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as err:
        reason = (str(err).splitlines() or [type(err).__name__])[0]
        raise ValueError(f"{file}: is not a torch.save file of plain tensors, or damaged ({reason})") from None
    for outer in ("module", "model", "state_dict"):  # HunyuanVideo's files hold {"module": tensors}
        if isinstance(record, dict) and isinstance(record.get(outer), dict):
            record = record[outer]
    if not isinstance(record, dict) or not all(isinstance(v, Tensor) for v in record.values()):
        raise ValueError(f"{file}: holds more than tensors; wanted a dictionary of them")
    return record


def read_tensors(files: list[Path]) -> dict[str, Tensor]:
    """All tensors of some files, with one-line errors for absent and damaged ones."""
    out: dict[str, Tensor] = {}
    for file in files:
        with mapped(file) as (keys, get):
            out |= {key: get(key) for key in keys}
    return out


def read_headers(files: list[Path]) -> dict[str, tuple[Path, Tensor]]:
    """Key -> its file and an empty (meta) tensor of its shape and type; no file is absent, damaged or repeats a key."""
    out: dict[str, tuple[Path, Tensor]] = {}
    for file in files:
        with mapped(file) as (keys, get):
            for key in keys:
                if key in out:
                    raise ValueError(f"{file}: {key} stands in {out[key][0].name} too; keep one of the two")
                tensor = get(key)
                if tensor.dtype not in FLOATS:
                    kind = str(tensor.dtype).removeprefix("torch.")
                    raise ValueError(f"{file}: {key} is {kind}, wanted float32, bfloat16 or float16: not quantised")
                out[key] = file, torch.empty_like(tensor, device="meta")
    return out


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `folder` once it is filled; at no moment is there half a folder."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file()):
        raise ValueError(f"{folder}: exists and is not a model folder, so it is not replaced; give another path")
    temporary, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("tmp", "old"))
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_tensors(folder: Path, sizes: Mapping[str, int], get: Callable[[str], Tensor], limit: int) -> None:
    """Write get(key) for every key of `sizes` (bytes), as diffusers does: shards of at most `limit` bytes, one in
    memory at a time, and an index where there are several."""
    shards: list[list[str]] = []
    room = 0
    for key, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(key)
        room -= size
    stem = Path(WEIGHTS).stem
    names: dict[str, str] = {}
    for number, keys in enumerate(shards, 1):
        name = WEIGHTS if len(shards) == 1 else f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        save_file({key: get(key) for key in keys}, folder / name, metadata={"format": "pt"})
        names |= dict.fromkeys(keys, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(names.items()))}
        write_json(folder / f"{WEIGHTS}.index.json", index)

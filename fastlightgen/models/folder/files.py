"""Weight files and JSON on disk: find and map shards without reading them, write a folder completely or not at all."""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastlightgen.atomic import put, write_json
from fastlightgen.files import tensors as files
from fastlightgen.files.border import opened, read_json, regular
from fastlightgen.files.kinds import WEIGHT_MAP
from fastlightgen.files.onepass import read_all

CHECKSUMS = "checksums.json"  # tensor -> its checksum; absent from folders of other programs
WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLED_WEIGHTS = "diffusion_pytorch_model.bin"
PICKLES = (".pt", ".pth", ".bin")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def digest(path: Path) -> str:
    """Hash a file's content: the first 16 hexadecimal digits of its SHA-256."""
    sha = hashlib.sha256()
    with opened(path) as f:
        while chunk := f.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()[:16]


def weight_files(folder: Path, originals: Sequence[str], allow_pt: bool = False) -> list[Path]:
    """Find the weight files of a folder: one file, or the shards that its index names.

    `originals`: names that original repositories use, beside diffusers' own. Pickles are found with `allow_pt` only.
    """
    for name in (WEIGHTS, *(name for name in originals if Path(name).suffix not in PICKLES)):
        if (folder / f"{name}.index.json").is_file():
            return indexed(folder / f"{name}.index.json")
        if (folder / name).is_file():
            return [folder / name]
    shards = sorted(folder.glob(f"{Path(WEIGHTS).stem}-*.safetensors"))
    if shards:
        return shards  # the index is lost; the comparison of keys later shows whether a shard is missing
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if not pickles:
        raise ValueError(f"{folder / WEIGHTS}: not found; give a folder with the weights beside config.json")
    if not allow_pt:
        raise ValueError(
            f"{folder}: holds no {WEIGHTS}, only the pickle {pickles[0]}, which is read on request: add allow_pt=true "
            f"(load_model: allow_pt=True)"
        )
    # A pickle with a known name wins: the folder may also hold pickles of the VAE and the text encoders.
    chosen = [name for name in (*originals, PICKLED_WEIGHTS) if name in pickles] or pickles
    if len(chosen) > 1:
        raise ValueError(f"{folder}: {', '.join(chosen)} may all hold the weights; keep one of them in the folder")
    return [folder / chosen[0]]


def indexed(index: Path) -> list[Path]:
    """The shards that an index file names, checked to be inside its folder."""
    names = sorted(set(read_json(index, WEIGHT_MAP, "copy the folder again")["weight_map"].values()))
    if not names:
        raise ValueError(f"{index}: its weight_map is empty; copy the folder again")
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{index}: names files outside its folder; copy the folder again")
    other = next((name for name in names if Path(name).suffix != ".safetensors"), None)
    if other is not None:
        raise ValueError(f"{index}: names {other!r}; wanted .safetensors files")
    return [index.parent / name for name in names]


@contextmanager
def mapped(file: Path) -> Iterator[tuple[list[str], Callable[[str], Tensor]]]:
    """Open a weight file as (keys in file order, key -> tensor). Tensors are memory-mapped: unused ones stay unread."""
    try:
        regular(file, kind="weight file")
        if file.suffix in PICKLES:
            tensors = unpickled(file)
            yield list(tensors), tensors.__getitem__
        else:
            with files.open_tensors(file) as f:
                yield f.offset_keys(), f.get_tensor
    except FileNotFoundError:
        raise ValueError(f"{file}: not found") from None
    except (SafetensorError, OSError) as err:
        raise ValueError(f"{file}: damaged or truncated ({err})") from None


def unpickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a torch.save file, memory-mapped; code in the pickle is not run."""
    try:
        record = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as err:  # a malformed pickle can end in any error of the reader
        reason = (str(err).splitlines() or [type(err).__name__])[0]
        raise ValueError(f"{file}: is not a torch.save file of plain tensors, or damaged ({reason})") from None
    for outer in ("module", "model", "state_dict"):  # usual wrappers; HunyuanVideo's file is {"module": tensors}
        if isinstance(record, dict) and isinstance(record.get(outer), dict):
            record = record[outer]
    if not isinstance(record, dict) or not all(isinstance(v, Tensor) for v in record.values()):
        raise ValueError(f"{file}: holds more than tensors; wanted a dictionary of them")
    return record


def read_tensors(files: list[Path]) -> dict[str, Tensor]:
    """Read all tensors of some files; raises a one-line ValueError for an absent or damaged file."""
    out: dict[str, Tensor] = {}
    for file in files:
        with mapped(file) as (keys, get):
            out |= {key: get(key) for key in keys}
    return out


def read_checksums(folder: Path) -> dict[str, int]:
    """The checksums of a model folder's tensors; {} if another program wrote it."""
    path = folder / CHECKSUMS
    found: dict[str, int] = read_json(path, files.SHAPE, "copy the folder again") if path.is_file() else {}
    return found


def verify_tensors(values: Mapping[str, tuple[Tensor, Tensor | None]], sums: Mapping[str, int], file: Path) -> None:
    """Raise ValueError if a stored tensor is damaged or holds numbers that are not finite.

    `values`: key -> (the tensor, None or memory for a copy).
    """
    for (key, _), (total, finite) in zip(values.items(), read_all(list(values.values())), strict=True):
        if key in sums:
            try:
                files.check_sum(key, total, sums[key], file)
            except ValueError as err:
                how = f"{again(file.parent)}, or delete {CHECKSUMS} if you changed the weights yourself"
                raise ValueError(f"{err}; {how}") from None
        if not finite:
            raise ValueError(f"{file}: {key} holds numbers that are not finite; copy the folder again, or train again")


def again(folder: Path) -> str:
    """How to get a model folder again: a stage makes its result from its last checkpoint."""
    stage = folder.parent.name.removeprefix("stage")
    if folder.name != "model" or folder.parent.name not in {f"stage{n}" for n in range(4)}:
        return "copy the folder again"
    return f"delete {folder} and type the command of stage={stage} again, which makes it from the last checkpoint"


def verify_model(folder: Path) -> None:
    """Read a model folder that this program wrote; raise ValueError if anything in it is damaged."""
    read_json(folder / "config.json")
    headers, sums = read_headers(weight_files(folder, ())), read_checksums(folder)
    if lost := sorted(sums.keys() - headers.keys()):
        raise ValueError(f"{folder}: {lost[0]} is missing")
    for file in sorted({file for file, _ in headers.values()}):
        with mapped(file) as (keys, get):
            for key in keys:
                verify_tensors({key: (get(key), None)}, sums, file)


def read_headers(files: list[Path]) -> dict[str, tuple[Path, Tensor]]:
    """Key -> its file and a meta tensor of its shape and type.

    Raises ValueError for an absent or damaged file, for a key that occurs twice, and for a type that is not a float.
    """
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
    """Yield an empty temporary folder and rename it to `folder` at the end, so that `folder` is never incomplete."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file()):
        raise ValueError(f"{folder}: exists and is not a model folder, so it is not replaced; give another path")
    temporary, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("tmp", "old"))
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    if folder.exists():
        folder.rename(old)
    put(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def write_tensors(folder: Path, sizes: Mapping[str, int], get: Callable[[str], Tensor], limit: int) -> None:
    """Write get(key) for every key of `sizes` (in bytes) as diffusers does.

    Shards have at most `limit` bytes, and one is in memory at a time. More than one shard gets an index file. The last
    file holds a checksum of every tensor.
    """
    shards: list[list[str]] = []
    room = 0  # bytes left in the last shard
    for key, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(key)
        room -= size
    stem = Path(WEIGHTS).stem
    names: dict[str, str] = {}
    sums: dict[str, int] = {}
    for number, keys in enumerate(shards, 1):
        name = WEIGHTS if len(shards) == 1 else f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        shard = {key: get(key) for key in keys}
        files.write_tensors(folder / name, shard, {"format": "pt"})
        sums |= files.checksums(shard)
        names |= dict.fromkeys(keys, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(names.items()))}
        write_json(folder / f"{WEIGHTS}.index.json", index)
    write_json(folder / CHECKSUMS, sums)

"""Model folders and presets: diffusers' transformer format plus fastlightgen.json, or an original repository's format.

A folder is read in two passes. The first reads config.json and the header of every file, and compares all keys and
shapes with the network, built without memory (meta device). The second copies a few tensors at a time from the mapped
files into the wanted type and device. Memory beside the network: a batch of tensors (BATCH), and the mapped window.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastlightgen.atomic import write_json
from fastlightgen.config import preset, presets
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.families import build, family_of, family_of_original, original_files, recognise
from fastlightgen.models.folder.card import CARD, read_card, write_card
from fastlightgen.models.folder.files import (
    CHECKSUMS,
    WEIGHTS,
    digest,
    mapped,
    read_checksums,
    read_headers,
    read_json,
    read_tensors,
    replacing,
    verify_tensors,
    weight_files,
    write_tensors,
)
from fastlightgen.models.folder.manifest import verify_files
from fastlightgen.models.folder.networks import config_of, model_folder, trained_folder
from fastlightgen.models.folder.original import SHARD_BYTES, key_table, read_config, save_original, to_original
from fastlightgen.models.keys import Source, Table
from fastlightgen.models.lora import merged, plain_parts
from fastlightgen.parallel.log import bar

__all__ = [
    "WEIGHTS",
    "build",
    "config_of",
    "digest",
    "file_values",
    "load_model",
    "load_weights",
    "model_folder",
    "read_card",
    "read_json",
    "read_tensors",
    "save_model",
    "save_original",
    "to_original",
    "trained_folder",
]

Placed = Callable[[nn.Parameter], None]
WINDOW = 2**28  # bytes to copy from a mapped file before mapping it again, which frees the pages read so far
BATCH = 2**25  # bytes to verify and copy together


def load_model(
    path_or_preset: str | Path,
    device=None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    allow_pt: bool = False,
    placed: Callable[[VideoDiT], Placed] | None = None,
) -> VideoDiT:
    """Load a folder's network with its weights, or build a preset's network with random weights drawn from `seed`.

    The folder holds diffusers' transformer format, a pipeline with such a `transformer/`, or the format of the
    family's original repository. All parameters get the type `dtype` (None: float32, whatever the files hold).
    `allow_pt` also reads .pt, .pth and .bin files, as plain tensors. `placed(network)` returns a callback that is
    called with each parameter as it loads: a sharding engine keeps its shard, so that no process ever holds a complete
    network.
    """
    if str(path_or_preset) in presets():
        model = build(preset(str(path_or_preset))["network"], seed).to(device=device, dtype=dtype)
        if placed:
            place = placed(model)
            for p in model.parameters():
                place(p)
        return model
    folder = model_folder(path_or_preset)
    if folder != Path(path_or_preset):  # of a pipeline; the tensors have checksums of their own
        own = (CARD, f"{folder.name}/config.json", f"{folder.name}/{CARD}", f"{folder.name}/{CHECKSUMS}")
        verify_files(Path(path_or_preset), own.__contains__)
    model = without_memory(folder)
    load_weights(model, folder, device, dtype, allow_pt, placed(model) if placed else None)
    return model


def without_memory(folder: Path) -> VideoDiT:
    """Build a folder's network on the meta device."""
    return on_meta(read_config(folder))


def on_meta(config: Mapping) -> VideoDiT:
    """Build a network on the meta device."""
    with torch.device("meta"), Undrawn():
        return build(config)


class Undrawn(TorchFunctionMode):
    """Skip initialisation on the meta device: drawing and scaling there only import sympy, which takes 1.5 s."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.div, Tensor.__truediv__) and isinstance(args[1], int | float):
            return args[0]
        return (torch.empty if func is torch.randn else func)(*args, **(kwargs or {}))


def load_weights(
    model: VideoDiT,
    folder: Path,
    device=None,
    dtype: torch.dtype | None = None,
    allow_pt: bool = False,
    placed: Placed | None = None,
) -> None:
    """Load the folder's weights into `model`, on the meta device or another; keys and shapes must match exactly."""
    state = model.state_dict()
    for key, loaded in loaded_tensors(folder, model.config, state, allow_pt, device or "cpu", dtype):
        value = assign(model, key, loaded)
        if placed and isinstance(value, nn.Parameter):
            placed(value)
    rest = [name for name, v in [*model.named_parameters(), *model.named_buffers()] if v.is_meta]
    assert not rest, f"left without memory: {rest[:3]}; buffers that are not in the state dict must be made on use"


def file_values(
    path: str | Path, keep: Sequence[int] | None = None, allow_pt: bool = False, values: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Read the weights of a model folder again: yield (name, float32 value on the CPU), one tensor at a time.

    `keep`: the blocks of a pruned network (None: all). The names are then those of the pruned network. Without `values`
    nothing is read: yield (name, meta tensor) in the same order.
    """
    folder = model_folder(path)
    net = without_memory(folder)
    config, state = net.config, net.state_dict(keep_vars=True)
    pruned = net if keep is None else net.prune(keep)
    # Pruning renumbers the blocks; the tensors themselves tell which old name became which new one.
    new = {id(tensor): name for name, tensor in pruned.state_dict(keep_vars=True).items()}
    names = {key: new[id(tensor)] for key, tensor in state.items() if id(tensor) in new}
    for key, value in loaded_tensors(folder, config, state, allow_pt, "cpu", torch.float32, names, values):
        yield names[key], value


def loaded_tensors(
    folder: Path,
    config: Mapping,
    state: Mapping[str, Tensor],
    allow_pt: bool,
    device: Any,
    dtype: torch.dtype | None,
    wanted: Collection[str] | None = None,
    read: bool = True,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (key of the network, its verified values in memory of their own), in file order.

    `config` and `state` describe the network; the file's keys and shapes must match them exactly. `wanted`: the keys to
    yield (None: all). Without `read` nothing is read: yield the tensors of `state`.
    """
    files = weight_files(folder, original_files(), allow_pt)
    headers = read_headers(files)
    original = family_of_original(read_json(folder / "config.json"))
    table = key_table(config) if original else {key: Source(key) for key in state}
    unused = family_of(config).unused(config)
    check_fit(folder, state, table, {key: header for key, (_, header) in headers.items()}, unused)

    takers: dict[str, list[str]] = {}  # stored key -> keys of the network that take values from it
    for key, source in table.items():
        if wanted is None or key in wanted:
            takers.setdefault(source.key, []).append(key)
    sums = read_checksums(folder)
    total = sum(v.numel() * v.element_size() for _, v in headers.values())
    with bar(total, "loading weights", True, unit="B", scale=True, delay=5) as progress:
        for window in split(headers, WINDOW):
            file = headers[window[0]][0]
            with mapped(file) as (_, get):
                for batch in split({name: headers[name] for name in window}, BATCH):
                    names = [name for name in batch if name in takers]
                    if read:
                        found = {name: {key: (table[key], state[key]) for key in takers[name]} for name in names}
                        yield from verified({name: get(name) for name in names}, found, sums, file, device, dtype)
                    else:
                        yield from ((key, state[key]) for name in names for key in takers[name])
                    progress.update(sum(headers[n][1].numel() * headers[n][1].element_size() for n in batch))


def verified(
    stored: Mapping[str, Tensor],
    takers: Mapping[str, Mapping[str, tuple[Source, Tensor]]],
    sums: Mapping[str, int],
    file: Path,
    device: Any,
    dtype: torch.dtype | None,
) -> Iterator[tuple[str, Tensor]]:
    """Verify stored tensors and copy each for its takers, key -> (its rows, a tensor of its shape)."""
    whole: dict[str, Tensor] = {}  # the usual case, one taker of all rows on the CPU: verified and copied in one pass
    for name, of in takers.items():
        (source, like), *others = of.values()
        if torch.device(device).type == "cpu" and not others and not source.rows:
            whole[name] = torch.empty(like.shape, dtype=dtype or like.dtype, device="cpu")
    verify_tensors({name: (value, whole.get(name)) for name, value in stored.items()}, sums, file)
    for name, of in takers.items():
        for key, (source, like) in of.items():
            yield key, whole.pop(name) if name in whole else copied(stored[name], source, like, device, dtype)


def check_fit(
    folder: Path, state: Mapping[str, Tensor], table: Table, stored: Mapping[str, Tensor], unused: set
) -> None:
    """Raise a one-line ValueError if the stored keys or shapes differ from the network's; it names the first few."""
    wanted: dict[str, tuple[int, ...]] = {}  # stored key -> shape
    for key, source in table.items():
        shape = tuple(state[key].shape)
        # A fused tensor has as many rows as the last row that an entry names.
        height = max([wanted.get(source.key, (0,))[0], *(stop for _, stop in source.rows)]) if source.rows else None
        wanted[source.key] = shape if height is None else (height, *shape[1:])
    missing, extra = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys() - unused)
    shapes = [key for key in wanted if key in stored and tuple(stored[key].shape) != wanted[key]]
    if not (missing or extra or shapes):
        return
    found, described = recognise(stored), recognise(wanted)
    if found and found != described:
        raise ValueError(
            f"{folder}: holds the weights of {found}, config.json describes {described}; give a matching pair"
        )
    first = [f"missing {missing[:3]}"] * bool(missing) + [f"unexpected {extra[:3]}"] * bool(extra)
    first += [f"{key} is {tuple(stored[key].shape)}, wanted {wanted[key]}" for key in shapes[:2]]
    raise ValueError(f"{folder}: the weights do not fit config.json: {'; '.join(first)}")


def split(headers: Mapping[str, tuple[Path, Tensor]], most: int) -> list[list[str]]:
    """Split the stored keys, in file order, into groups within one file that end once they reach `most` bytes."""
    out: list[list[str]] = []
    last, size = None, 0
    for key, (file, header) in headers.items():
        if file != last or size >= most:
            out.append([])
            last, size = file, 0
        out[-1].append(key)
        size += header.numel() * header.element_size()
    return out


def copied(stored: Tensor, source: Source, like: Tensor, device, dtype: torch.dtype | None) -> Tensor:
    """Copy a tensor of the network, shaped as `like`, out of the mapped tensor `stored`."""
    out = torch.empty(like.shape, dtype=dtype or like.dtype, device=device)
    if not source.rows:
        return out.copy_(stored)
    offset = 0
    for start, stop in source.rows:
        out[offset : offset + stop - start].copy_(stored[start:stop])
        offset += stop - start
    return out


def assign(model: nn.Module, key: str, value: Tensor) -> Tensor:
    """Replace the parameter or buffer `key` of the model by a tensor; returns the new parameter or buffer."""
    parent, _, name = key.rpartition(".")
    module = model.get_submodule(parent)
    old = getattr(module, name)
    new = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
    setattr(module, name, new)
    return new


def save_model(
    model: VideoDiT,
    dir: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    state: Mapping[str, Tensor] | None = None,
    get: Callable[[str], Tensor] | None = None,
    **card,
) -> Path:
    """Write a model folder that stock `from_pretrained` loads, completely or not at all; returns the folder.

    Low-rank adapters are merged into the weights. `card`: keys for fastlightgen.json. For a network sharded over
    processes, `state` holds tensors with the full shapes, and `get(key)` gathers one tensor.
    """
    folder, parts = Path(dir), plain_parts(model)
    state = {key: of[0] for key, of in parts.items()} if state is None else state
    get = get or (lambda key: merged([value.detach() for value in parts[key]]).to("cpu", dtype).contiguous())
    sizes = {key: v.numel() * (dtype or v.dtype).itemsize for key, v in state.items()}
    with replacing(folder) as temporary:
        write_tensors(temporary, sizes, get, max_shard_bytes)
        write_json(temporary / "config.json", model.config)
        write_card(temporary, model, card)
    return folder

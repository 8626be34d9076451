"""Model folders and presets: diffusers' transformer format plus fastlightgen.json, read strictly and written whole."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastlightgen.config import find_preset_weights, preset, presets
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.hunyuan import HunyuanConfig, HunyuanModel
from fastlightgen.models.wan import WanConfig, WanModel

WEIGHTS = "diffusion_pytorch_model.safetensors"
NETWORKS = {  # _class_name of config.json
    WanModel.config_class: (WanConfig, WanModel),
    HunyuanModel.config_class: (HunyuanConfig, HunyuanModel),
}


def build(config: Mapping, seed: int | None = None) -> VideoDiT:
    """A network from a diffusers config; random weights are drawn from `seed`."""
    name = config.get("_class_name", WanModel.config_class)
    if name not in NETWORKS:
        raise ValueError(f"config.json: _class_name is {name!r}; supported: {', '.join(NETWORKS)}")
    config_type, model_type = NETWORKS[name]
    known = {f.name for f in fields(config_type)}
    cfg = config_type(**{k: v for k, v in config.items() if k in known})
    if seed is None:
        return model_type(cfg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_type(cfg)


def load_model(path_or_preset: str | Path, device=None, dtype: torch.dtype | None = None, seed: int = 0) -> VideoDiT:
    """A model folder (diffusers' transformer format), or a preset's network with random weights drawn from `seed`."""
    folder = Path(path_or_preset)
    if str(path_or_preset) in presets():
        model = build(preset(str(path_or_preset))["network"], seed)
    elif (folder / "config.json").is_file():
        model = build(read_json(folder / "config.json"))
        load_weights(model, folder)
    else:
        raise ValueError(
            f"model={path_or_preset}: neither a folder with config.json nor a preset ({', '.join(presets())})"
        )
    return model.to(device=device, dtype=dtype)


def trained_folder(path_or_preset: str) -> Path:
    """The folder with trained weights that `model=` means: itself, or the weights shipped for a preset."""
    if path_or_preset not in presets():
        return Path(path_or_preset)
    folder = find_preset_weights(path_or_preset)
    if folder is None:
        raise ValueError(
            f"model={path_or_preset}: this preset has no weights here; give a model folder or train one with stage=0"
        )
    return folder


def load_weights(model: VideoDiT, folder: Path) -> None:
    """Fill `model` from the folder's safetensors: every key, every shape, nothing else; or fail before touching it."""
    weights = read_tensors(shard_files(folder))
    wanted = model.state_dict()
    missing, extra = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    shapes = [k for k in wanted if k in weights and weights[k].shape != wanted[k].shape]
    if missing or extra or shapes:
        first = [f"missing {missing[:3]}"] * bool(missing) + [f"unexpected {extra[:3]}"] * bool(extra)
        first += [f"{k} is {tuple(weights[k].shape)}, wanted {tuple(wanted[k].shape)}" for k in shapes[:2]]
        raise ValueError(f"{folder}: the weights do not fit config.json: {'; '.join(first)}")
    model.load_state_dict(weights)


def shard_files(folder: Path) -> list[Path]:
    """The weight files of a folder: one file, or those its index names."""
    index = folder / f"{WEIGHTS}.index.json"
    if index.is_file():
        record = read_json(index)
        if not isinstance(record, dict) or not isinstance(record.get("weight_map"), dict):
            raise ValueError(f"{index}: has no weight_map; copy the folder again")
        names = sorted(set(record["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{index}: names files outside its folder")
        return [folder / name for name in names]
    return [folder / WEIGHTS]


def read_tensors(files: list[Path]) -> dict[str, Tensor]:
    """All tensors of some safetensors files, with one-line errors for absent and damaged ones."""
    out = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as f:
                out |= {key: f.get_tensor(key) for key in f.keys()}
        except FileNotFoundError:
            raise ValueError(f"{file}: not found") from None
        except (SafetensorError, OSError) as err:
            raise ValueError(f"{file}: damaged or truncated ({err})") from None
    return out


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as err:
        raise ValueError(f"{path}: cannot be read as JSON ({err})") from None


def read_card(folder: str | Path) -> dict:
    """fastlightgen.json of a model folder; {} for a folder that another program wrote."""
    path = Path(folder) / "fastlightgen.json"
    return read_json(path) if path.is_file() else {}


def save_model(model: VideoDiT, dir: str | Path, dtype: torch.dtype | None = None, **card) -> Path:
    """Write a model folder whole or not at all; stock `from_pretrained` loads it. `card` adds to fastlightgen.json."""
    folder = Path(dir)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file()):
        raise ValueError(f"{folder}: exists and is not a model folder, so it is not replaced; give another path")
    temporary, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("tmp", "old"))
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    state = {k: v.detach().to("cpu", dtype).contiguous() for k, v in model.state_dict().items()}
    save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
    (temporary / "config.json").write_text(json.dumps(model.config, indent=2) + "\n")
    defaults = {
        "family": model.family,
        "stage": None,
        "num_blocks": model.num_blocks,
        "kept_blocks": list(range(model.num_blocks)),
        "ladder": None,
        "shift": None,
        "guidance": None,
        "source": None,
    }
    (temporary / "fastlightgen.json").write_text(json.dumps(defaults | card, indent=2) + "\n")
    # Two renames: at no moment is there half a folder.
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def digest(path: Path) -> str:
    """Short hash of a file's content."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16] if hasattr(hashlib, "file_digest") else _digest(f)


def _digest(f) -> str:  # Python 3.10 has no file_digest
    h = hashlib.sha256()
    while chunk := f.read(1 << 20):
        h.update(chunk)
    return h.hexdigest()[:16]

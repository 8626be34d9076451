"""VAE folders: read one strictly, write one completely or not at all, put one into a pipeline."""

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastlightgen.atomic import write_json
from fastlightgen.decoder.layout import KINDS
from fastlightgen.files.border import read_json
from fastlightgen.files.schema import record
from fastlightgen.models.folder.card import CARD
from fastlightgen.models.folder.files import WEIGHTS, replacing

INDEX = "model_index.json"


def vae_folder(path: str | Path) -> Path:
    """The VAE folder that a folder is or, if it is a pipeline, holds."""
    folder = Path(path)
    return folder / "vae" if (folder / INDEX).is_file() else folder


def read_vae_config(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a VAE and its config.json; raises ValueError for a VAE of another class."""
    folder = vae_folder(path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"vae={path}: has no config.json; give a VAE's folder, or a pipeline's")
    config = read_object(folder / "config.json")
    name = config.get("_class_name")
    if name not in KINDS:
        raise ValueError(f"vae={path}: is a {name}; wanted {' or '.join(KINDS)}")
    if config.get("is_residual") or config.get("patch_size"):
        raise ValueError(f"vae={path}: is the VAE of Wan 2.2 (is_residual); wanted that of Wan 2.1 or HunyuanVideo")
    return folder, config


def read_vae(path: str | Path, device: torch.device | str = "cpu") -> Any:
    """Load a VAE in float32 with diffusers' class; raises ValueError unless its weights are complete."""
    try:
        import diffusers
    except ImportError:
        raise ValueError("a VAE needs diffusers: pip install 'fastlightgen[video]'") from None
    folder, config = read_vae_config(path)
    try:
        with warnings.catch_warnings():  # newer versions of diffusers rename torch_dtype to dtype and warn
            warnings.simplefilter("ignore", FutureWarning)
            vae, found = getattr(diffusers, config["_class_name"]).from_pretrained(
                folder, torch_dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except Exception as err:  # diffusers passes on what safetensors and json raise
        reason = " ".join(str(err).split())[:200]
        raise ValueError(f"vae={path}: cannot be loaded ({type(err).__name__}: {reason}); copy it again") from None
    if wrong := [f"{key} is {kind.replace('_', ' ')}" for kind, names in found.items() for key in list(names)[:1]]:
        raise ValueError(f"vae={path}: {WEIGHTS} does not fit its config.json ({wrong[0]}); copy it again")
    return vae.eval().requires_grad_(False).to(device)


def write_vae(vae: Any, folder: Path, card: Mapping[str, Any]) -> None:
    """Write a folder that diffusers' class loads, with a fastlightgen.json that says how it was made."""
    with replacing(folder) as temporary:
        vae.save_pretrained(temporary)
        write_json(temporary / CARD, dict(card))


def read_vae_card(folder: Path) -> dict[str, Any]:
    """The fastlightgen.json of a VAE folder; {} if there is none."""
    return read_object(folder / CARD) if (folder / CARD).is_file() else {}


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    content: dict[str, Any] = read_json(path, record({}), "copy the folder again")
    return content


def check_replaces(path: str | Path, pipeline: Path, encodes: bool) -> tuple[Path, dict[str, Any]]:
    """Check that a VAE can take the place of a pipeline's; return its folder and its fastlightgen.json.

    `encodes`: the pipeline encodes a first frame, so the VAE needs an encoder.
    """
    folder, config = read_vae_config(path)
    own = read_object(pipeline / "vae" / "config.json")
    if config["_class_name"] != own.get("_class_name"):
        raise ValueError(f"vae={path}: is a {config['_class_name']}, and the pipeline's is a {own.get('_class_name')}")
    kind = KINDS[config["_class_name"]]
    for key in (kind.latent, *kind.space, kind.temporal, kind.spatial):
        got, wanted = config.get(key), own.get(key)
        if got != wanted:
            raise ValueError(
                f"vae={path}: has {key} {got}, and the pipeline's VAE {wanted}; give one that was made from this VAE"
            )
    card = read_vae_card(folder)
    if encodes and not card.get("encoder", True):
        raise ValueError(
            f"vae={path}: has no encoder, and this pipeline encodes a first frame; prune a Wan VAE with drop_layers=0, "
            "which keeps it"
        )
    return folder, card


@torch.no_grad()
def copy_vae(folder: Path, target: Path) -> None:
    """Copy a VAE folder into an export, load it with diffusers' class, and decode a latent with it."""
    shutil.copytree(folder, target, copy_function=shutil.copyfile)
    vae = read_vae(target)
    latent = getattr(vae.config, KINDS[type(vae).__name__].latent)
    frames = vae.decode(torch.zeros(1, latent, 1, 2, 2)).sample
    if not torch.isfinite(frames).all():
        raise ValueError(f"vae={folder}: decodes numbers that are not finite; train it anew")

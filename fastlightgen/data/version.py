"""Versions of the built-in world: a model, a ranking or scores that were made on another version are refused.

`description` is that of the data at hand; only data of the built-in world names a version, under "world".
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastlightgen.config import presets
from fastlightgen.models.folder.networks import config_of
from fastlightgen.models.folder.pair import sampler_card


def check_version(
    where: str | Path, made: str, record: Mapping[str, Any], description: Mapping[str, Any], remedy: str
) -> None:
    """Raise if `record`, which was made ("trained", "measured") on the built-in world, names another version of it."""
    got, wanted = record.get("world", 1), description.get("world")  # files of version 1 name none
    if wanted is not None and got != wanted:
        raise ValueError(
            f"{where}: was {made} on version {got} of the built-in world, this is version {wanted}; {remedy}"
        )


def same_latents(config: Mapping[str, Any], description: Mapping[str, Any]) -> bool:
    """Return False if the data is the built-in world's and a network predicts latents of other channels: real ones."""
    return "world" not in description or config["out_channels"] == description["out_channels"]


def check_latents(config: Mapping[str, Any], description: Mapping[str, Any]) -> None:
    """Raise if a network for real videos is about to train on the built-in world."""
    if not same_latents(config, description):
        raise ValueError(
            f"data=shapes: is the toy's data, with latents of {description['out_channels']} channels; this network has "
            f"{config['out_channels']}. Encode videos for it (python -m fastlightgen.encode videos=FOLDER "
            "pipeline=FOLDER out=CACHE) and give data=CACHE"
        )


def check_model(model: str | Path, description: Mapping[str, Any]) -> None:
    """Raise if a stage trained the model on another version of the built-in world.

    A stage has left its number in the card, and the network predicts latents of that world. Networks of other programs
    and random ones pass, and so do all networks if the data is not that world's.
    """
    if "world" not in description or str(model) in presets():
        return
    card = sampler_card(model)
    if (stage := card.get("stage")) is None or not same_latents(config_of(model), description):
        return
    remedy = f"train it again (stage={stage}) or use the release that made it"
    check_version(model, "trained", card, description, remedy)

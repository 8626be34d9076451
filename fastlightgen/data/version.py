"""Versions of the built-in world: a model, a ranking or scores that were made on another version are refused.

`description` is that of the data at hand; only data of the built-in world names a version, under "world".
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastlightgen.config import presets
from fastlightgen.models.folder.networks import config_of
from fastlightgen.models.folder.weights import read_card


def check_version(
    where: str | Path, made: str, record: Mapping[str, Any], description: Mapping[str, Any], remedy: str
) -> None:
    """Raise if `record`, which was made ("trained", "measured") on the built-in world, names another version of it."""
    got, wanted = record.get("world", 1), description.get("world")  # files of version 1 name none
    if wanted is not None and got != wanted:
        raise ValueError(
            f"{where}: was {made} on version {got} of the built-in world, this is version {wanted}; {remedy}"
        )


def check_model(model: str | Path, description: Mapping[str, Any]) -> None:
    """Raise if a stage trained the model on another version of the built-in world.

    A stage has left its number in the card, and the network predicts latents of that world. Networks of other programs
    and random ones pass, and so do all networks if the data is not that world's.
    """
    if "world" not in description or str(model) in presets():
        return
    card = read_card(model)
    if (stage := card.get("stage")) is None or config_of(model)["out_channels"] != description["out_channels"]:
        return
    remedy = f"train it again (stage={stage}) or use the release that made it"
    check_version(model, "trained", card, description, remedy)

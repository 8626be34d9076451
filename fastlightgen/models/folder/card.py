"""The card of a model folder, fastlightgen.json: which blocks a student kept, and how it is sampled."""

from pathlib import Path
from typing import Any

from fastlightgen.atomic import write_json
from fastlightgen.files.border import read_json
from fastlightgen.files.kinds import CARD as SHAPE
from fastlightgen.models.base import VideoDiT

CARD = "fastlightgen.json"


def read_card(folder: str | Path) -> dict:
    """Read the card of a model or pipeline folder; {} for a folder that another program wrote."""
    places = [Path(folder) / CARD, Path(folder) / "transformer" / CARD]
    return next((read_json(path, SHAPE, "mend it, or copy the folder again") for path in places if path.is_file()), {})


def write_card(folder: Path, model: VideoDiT, values: dict[str, Any]) -> None:
    """Write the card beside the weights of `model`; `values` replace the defaults, which claim nothing."""
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
    write_json(folder / CARD, defaults | values)

"""Models with two experts on disk (Wan2.2 A14B): where the two networks lie, and the time at which they meet.

    pipeline of diffusers   transformer/, transformer_2/, and boundary_ratio in model_index.json
    original repository     high_noise_model/, low_noise_model/; the boundary is that of the released model
    result of a stage       high/, low/, links to the results of both runs; their cards name the boundary

`high` predicts at the times t >= boundary, `low` below it. A preset of such a model has the key `boundary`.
"""

from dataclasses import dataclass
from pathlib import Path

from fastlightgen.config import EXPERTS, preset, presets
from fastlightgen.models.families import family_of
from fastlightgen.models.folder.card import read_card
from fastlightgen.models.folder.index import INDEX, named_parts
from fastlightgen.models.folder.original import read_config

PIPELINE_PARTS, ORIGINAL_PARTS = ("transformer", "transformer_2"), ("high_noise_model", "low_noise_model")


@dataclass(frozen=True)
class Experts:
    """Two model folders, or one preset for both, and the boundary between their times."""

    high: str
    low: str
    boundary: float

    def of(self, expert: str) -> str:
        return self.high if expert == "high" else self.low


def experts_of(model: str | Path) -> Experts | None:
    """The experts of a preset or a folder; None if it holds one network. Raises ValueError if one is missing."""
    name, folder = str(model), Path(model)
    if name in presets():
        boundary = preset(name).get("boundary")
        return None if boundary is None else Experts(name, name, boundary)
    if (folder / INDEX).is_file():
        return of_pipeline(folder)
    if (folder / "config.json").is_file():
        return None
    for parts in (ORIGINAL_PARTS, EXPERTS):
        if any((folder / part / "config.json").is_file() for part in parts):
            high, low = (present(folder, part) for part in parts)
            return checked(folder, high, low, boundary_of(folder, high, low))
    return None


def present(folder: Path, part: str) -> Path:
    """The folder of one expert, if it is a model folder."""
    if not (folder / part / "config.json").is_file():
        raise ValueError(
            f"{folder}: has two experts, and {part}/ holds no model; copy or train it, or give the folder of the other "
            "one alone"
        )
    return folder / part


def of_pipeline(folder: Path) -> Experts | None:
    """The experts of a pipeline folder of diffusers."""
    index = named_parts(folder)
    boundary, part = index.get("boundary_ratio"), index.get(PIPELINE_PARTS[1])
    named = isinstance(part, list) and part[-1:] not in ([], [None])
    if boundary is None and not named:
        if (folder / PIPELINE_PARTS[1]).is_dir():
            raise ValueError(f"{folder}: has a transformer_2/ that {INDEX} does not name; copy the folder again")
        return None
    if not named:
        raise ValueError(
            f"{folder}: {INDEX} has a boundary_ratio, as Wan2.2 A14B has, and no transformer_2; copy the folder again, "
            "or for a pipeline of one network delete boundary_ratio"
        )
    high, low = (present(folder, part) for part in PIPELINE_PARTS)
    if not isinstance(boundary, float) or not 0 < boundary < 1:
        raise ValueError(
            f"{folder}: {INDEX} names two experts and the boundary_ratio {boundary}; wanted a number between 0 and 1, "
            "such as 0.875 (Wan2.2 T2V) or 0.9 (I2V)"
        )
    return checked(folder, high, low, boundary)


def boundary_of(folder: Path, high: Path, low: Path) -> float:
    """The boundary in the cards of two model folders; for the original repository's that of the released model."""
    own = [read_card(place).get("boundary") for place in (high, low)]
    if own[0] != own[1]:
        raise ValueError(f"{folder}: its experts meet at the boundaries {own[0]} and {own[1]}; train one of them again")
    if own[0] is not None:
        return float(own[0])
    config = read_config(high)
    form = family_of(config).original
    if form is None or form.boundary is None:
        raise ValueError(f"{folder}: {family_of(config).title} has no two experts; give the folder of one network")
    return form.boundary(config)


def checked(folder: Path, high: Path, low: Path, boundary: float) -> Experts:
    """The experts, if both are of one network, whatever their numbers of blocks, and of one stage."""
    one, other = (read_config(place) for place in (high, low))
    counts = family_of(one).lists.values()
    for key in one | other:
        if key not in counts and not key.startswith("_") and one.get(key) != other.get(key):
            raise ValueError(
                f"{folder}: its experts have {key} {one.get(key)} and {other.get(key)}; give two of one model"
            )
    if one.get("image_dim") is not None:
        raise ValueError(
            f"{folder}: its experts read CLIP tokens (image_dim {one['image_dim']}), as Wan2.1's network does and none "
            "of Wan2.2; give the weights of Wan2.2, or the network alone"
        )
    stages = [read_card(place).get("stage") for place in (high, low)]
    if stages[0] != stages[1]:
        raise ValueError(
            f"{folder}: its experts come from stages {stages[0]} and {stages[1]}; train the other one as far, or give "
            "the folder of one expert"
        )
    return Experts(str(high), str(low), boundary)


def expert_of(model: str | Path) -> tuple[str, float] | None:
    """The name and the boundary of the expert that a model folder holds; None for any other network."""
    folder = Path(model)
    if str(model) in presets() or not (folder / "config.json").is_file():
        return None
    card = read_card(folder)
    if card.get("expert"):
        return card["expert"], card["boundary"]
    parent = folder.absolute().parent
    for parts in (PIPELINE_PARTS, ORIGINAL_PARTS):
        if folder.name in parts and (pair := experts_of(parent)):
            return EXPERTS[parts.index(folder.name)], pair.boundary
    return None

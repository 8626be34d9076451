"""Load whatever samples: the network of a preset or a folder, or both experts of one, with the card of both."""

from pathlib import Path
from typing import Any

from fastlightgen.config import EXPERTS
from fastlightgen.models.experts import Model, TwoExperts
from fastlightgen.models.folder.experts import PIPELINE_PARTS, Experts, expert_of, experts_of
from fastlightgen.models.folder.networks import model_folder
from fastlightgen.models.folder.weights import load_model, read_card

OWN = ("kept_blocks", "num_blocks", "pruned_path", "expert", "source", "silent", "widths", "chosen")  # of one expert
EQUAL = ("stage", "ladder", "shift", "sampler", "guidance", "steps", "clips", "world")


def networks(model: str | Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """The networks of a model by their names in a pipeline of diffusers: folder and card."""
    pair = experts_of(model)
    if pair is None:
        check_whole(model)
        return {PIPELINE_PARTS[0]: (str(model), read_card(model))}
    common_card(model, pair)  # raises unless they sample alike
    return {
        part: (pair.of(name), read_card(pair.of(name)) | {"expert": name, "boundary": pair.boundary})
        for part, name in zip(PIPELINE_PARTS, EXPERTS, strict=True)
    }


def check_whole(model: str | Path) -> None:
    """Raise ValueError if the folder holds one of two experts."""
    if alone := expert_of(model_folder(model)):
        raise ValueError(
            f"model={model}: is the {alone[0]}-noise expert of two, which makes no clips alone; give the folder that "
            "holds both"
        )


def load_sampler(model: str | Path, device: Any = None, dtype: Any = None, allow_pt: bool = False) -> Model:
    """`load_model`, or both experts."""
    pair = experts_of(model)
    if pair is None:
        check_whole(model)
        return load_model(model, device, dtype, allow_pt=allow_pt)
    high, low = (load_model(place, device, dtype, allow_pt=allow_pt) for place in (pair.high, pair.low))
    return TwoExperts(high, low, pair.boundary)


def sampler_card(model: str | Path) -> dict[str, Any]:
    """The card of a model; of two experts what their cards have in common, which must be all that sampling reads."""
    pair = experts_of(model)
    return read_card(model) if pair is None else common_card(model, pair)


def common_card(model: str | Path, pair: Experts) -> dict[str, Any]:
    high, low = read_card(pair.high), read_card(pair.low)
    for key in EQUAL:
        if high.get(key) != low.get(key):
            raise ValueError(
                f"{model}: its experts were trained for {key} {high.get(key)} and {low.get(key)}; train one of them "
                "again"
            )
    return {key: value for key, value in low.items() if key not in OWN}

"""Write a width-pruned network from the files of the full one, a tensor at a time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlightgen.models.families import narrowed
from fastlightgen.models.folder.networks import model_folder
from fastlightgen.models.folder.weights import file_values, on_meta, save_model, without_memory
from fastlightgen.models.width import cuts


def save_narrowed(
    full: str | Path,
    out: Path,
    keep: Sequence[int],
    saliency: Mapping[str, Tensor],
    heads: int,
    ffn_width: int,
    allow_pt: bool = False,
    **card: Any,
) -> Path:
    """Write the folder `out`: the blocks `keep` of the network in `full`, with fewer heads and neurons, in float32.

    `saliency` is that of the network with these blocks alone, under its own names.
    """
    deep = without_memory(model_folder(full)).prune(keep)
    cut = cuts(deep, saliency, heads, ffn_width)
    narrow = on_meta(narrowed(deep.config, heads, ffn_width))
    state = narrow.state_dict()
    order = [name for name, _ in file_values(full, keep, allow_pt, values=False)]
    values = file_values(full, keep, allow_pt)

    def get(name: str) -> Tensor:
        found, value = next(values)  # the files are read once, from the first tensor to the last
        assert found == name
        return (cut[name].of(value) if name in cut else value).contiguous()

    return save_model(narrow, out, torch.float32, state={name: state[name] for name in order}, get=get, **card)

"""The format of the original Wan2.2 repository's TI2V model: Wan2.1's, with another model type."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastlightgen.models.wan.layers import TEXT_TOKENS
from fastlightgen.models.wan.original import ORIGINAL as WAN
from fastlightgen.models.wan_ti2v.config import MARK


def read(values: Mapping) -> dict[str, Any]:
    """Further diffusers fields: the mark, for networks whose channels do not tell."""
    if values["model_type"] != "ti2v":
        raise ValueError(f"config.json: model_type is {values['model_type']!r}; wanted 'ti2v' with these channels")
    return {MARK: True}


def write(config: Mapping) -> dict[str, Any]:
    """Further original fields: the model type, and the fixed length of the text."""
    return {"model_type": "ti2v", "text_len": TEXT_TOKENS}


ORIGINAL = replace(WAN, read=read, write=write, marks={}, boundary=None)

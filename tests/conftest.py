"""Tests run offline and on few threads, so that they time alike on a laptop and on a shared machine."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub

from collections.abc import Callable
from pathlib import Path

import pipelines
import pytest
import torch

torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> Callable[[str], Path]:
    """`pipeline("wan_t2v")` is the folder of a very small diffusers pipeline; do not write into it."""
    root, built = tmp_path_factory.mktemp("pipelines"), {}

    def folder(kind: str) -> Path:
        if kind not in built:
            built[kind] = pipelines.KINDS[kind](root / kind)
        return built[kind]

    return folder

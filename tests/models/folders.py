"""Helpers for tests that read, edit and damage a small model folder."""

import json
from pathlib import Path

import torch

CONFIG = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 20, "freq_dim": 32, "ffn_dim": 40}
CONFIG |= {"num_layers": 4}


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

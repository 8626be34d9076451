"""One table of hostile values, put in the place of every value of every kind of file, and given to its reader.

A reader accepts a mutant or refuses it in one line that names the file. It never fails in another way.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tally
import torch
from mutants import mutants

from fastlightgen.blocks import read_importance
from fastlightgen.data.cache import Cache, write_cache
from fastlightgen.data.lists import read_list
from fastlightgen.engine import checkpoint, damage
from fastlightgen.engine.log import read_metrics
from fastlightgen.generate import read_prompts
from fastlightgen.methods.f3 import read_attention
from fastlightgen.models.folder.card import read_card
from fastlightgen.models.folder.index import read_index
from fastlightgen.models.folder.weights import config_of, without_memory
from fastlightgen.models.sample import sampling_plan

CARD = {
    "family": "wan", "stage": 3, "num_blocks": 3, "kept_blocks": [0, 1, 3], "ladder": [1.0, 0.9, 0.5], "shift": 3.0,
    "guidance": 1.0, "source": "x", "sampler": "ode", "steps": 4, "world": 2, "pruned_path": [0, 2],
}  # fmt: skip
# That of a network with silenced heads, which method=f3 wrote, and of one that method=icmd has pruned.
SILENT = {
    "family": "wan", "stage": 2, "num_blocks": 3, "kept_blocks": [0, 1, 2], "shift": 3.0, "guidance": 5.0,
    "source": "x", "steps": 50, "silent": {"0": [0, 1], "2": [1]}, "f3": {"f3": "head", "ratio": 0.4, "seed": 0},
}  # fmt: skip
PRUNED = {key: value for key, value in SILENT.items() if key not in ("silent", "f3")} | {"kept_blocks": [0, 2, 3]}
IMPORTANCE = {
    "units": [{"name": f"blocks.{i}", "kind": "block", "index": i, "score": 0.1, "stderr": 0.0} for i in range(3)],
    "kept": [0, 2], "pruned": [1], "baseline_score": 0.1, "num_samples": 4, "search": "x", "score_kind": "y",
}  # fmt: skip
CONFIG = {
    "_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], "num_attention_heads": 2, "attention_head_dim": 12,
    "in_channels": 4, "out_channels": 4, "text_dim": 8, "freq_dim": 8, "ffn_dim": 16, "num_layers": 2,
    "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "image_dim": None,
    "added_kv_proj_dim": None, "rope_max_seq_len": 64, "pos_embed_seq_len": None,
}  # fmt: skip
PIPELINE = {
    "_class_name": "WanPipeline", "_diffusers_version": "0.37.0", "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"], "tokenizer": ["transformers", "T5TokenizerFast"], "boundary_ratio": None,
}  # fmt: skip


def card(path: Path) -> None:
    found = read_card(path.parent)
    if found.get("ladder") or (found.get("steps") and found.get("shift") and found.get("guidance") is not None):
        if found.get("shift") is None or found.get("guidance") is None:
            return
        plan = sampling_plan(found, 0, -1.0, "auto", {"steps": 50, "guidance": 5.0, "shift": 5.0})
        assert all(0 < t <= 1 for t in plan["times"])


def network(path: Path) -> None:
    config_of(path.parent)
    without_memory(path.parent)


def cache(path: Path) -> None:
    found = Cache(path.parent)
    found.read([0])


def state(path: Path) -> None:
    if why := damage.wrong(path.parent, 3):
        raise ValueError(f"state.json: {why}")


def silent(path: Path) -> None:
    """Read by method=f3's recovery, by Stage III and by export."""
    found = read_card(path.parent)
    quiet = {int(block): heads for block, heads in found.get("silent", {}).items()}
    assert all(head >= 0 for heads in quiet.values() for head in heads)
    card(path)


def prompts(path: Path) -> None:
    read_prompts(SimpleNamespace(prompt="", prompts=str(path), image=""))


READERS: dict[str, tuple[str, Any, Callable[[Path], Any]]] = {
    "card": ("fastlightgen.json", CARD, card),
    "card of f3": ("fastlightgen.json", SILENT, silent),
    "card of icmd": ("fastlightgen.json", PRUNED, card),
    "attention of f3": (
        "attention.json",
        {"model": "x", "seed": 0, "mass": [[0.9, 0.1], [0.3, 0.2], [0.05, 0.35]]},
        lambda path: read_attention(str(path), 3, 2),
    ),
    "ranking": ("importance.json", IMPORTANCE, lambda path: read_importance(path, 3)),
    "network": ("config.json", CONFIG, network),
    "pipeline": ("model_index.json", PIPELINE, lambda path: read_index(path.parent)),
    "cache": ("index.json", None, cache),
    "checkpoint": ("state.json", {"step": 3, "files": ["a"], "count": {"student": 3}, "engine": "local"}, state),
    "checkpoint of icmd": (
        "state.json",
        {"step": 3, "files": ["a"], "count": {"student": 3, "discriminator": 2}, "engine": "local"},
        state,
    ),
    "log": ("metrics.jsonl", {"step": 3, "loss": 0.5}, lambda path: read_metrics(path)),
    "prompts": ("p.jsonl", {"prompt": "a cat", "image": "a.png"}, prompts),
    "list": (
        "l.jsonl",
        {"file": "a.mp4", "caption": "b", "start": 1, "end": 2, "dover": 90},
        lambda p: read_list(p, 80),
    ),
}


@pytest.fixture
def original(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Any, Callable[[Path], Any]]:
    """A valid file of a kind, its content and its reader."""
    name, value, read = READERS[request.param]
    if request.param == "cache":
        write_cache(tmp_path, [{"latents": torch.zeros(2, 1, 1, 2, 2)}], {"text": torch.zeros(4, 3)}, world="x")
        value = json.loads((tmp_path / name).read_text())
    if request.param.startswith("checkpoint"):
        folder = checkpoint.path(tmp_path, 3)
        files = {"a": {"w": torch.zeros(4)}}
        checkpoint.save(tmp_path, 3, files, {key: value[key] for key in ("count", "engine")}, keep=1).wait()
        return folder / name, json.loads((folder / name).read_text()), read
    return tmp_path / name, value, read


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value) + "\n")


@pytest.mark.parametrize("original", READERS, indirect=True)
def test_every_mutant_is_read_or_refused_in_one_line(original):
    path, value, read = original
    write(path, value)
    read(path)
    refused = tried = 0
    for mutant in mutants(value):
        write(path, mutant)
        tried += 1
        said = ""
        try:
            read(path)
        except ValueError as err:
            refused += 1
            said = str(err)
            assert "\n" not in said and "\x1b" not in said and len(said) < 1_500, said[:300]
            assert path.name in said or path.parent.name in said or "config" in said, said
        tally.count("JSON, a hostile value in the place of each", bool(said))
    assert tried > 40 and refused > tried / 20


def test_a_changed_counter_of_a_checkpoint_is_seen(tmp_path):
    files = {"a": {"w": torch.zeros(4)}}
    checkpoint.save(tmp_path, 3, files, {"count": {"student": 3}, "engine": "local"}, keep=1).wait()
    folder = checkpoint.path(tmp_path, 3)
    assert damage.wrong(folder, 3) == ""
    record = json.loads((folder / "state.json").read_text())
    write(folder / "state.json", record | {"count": {"student": 2}})
    assert damage.wrong(folder, 3) == "state.json is not what was written"
    write(folder / "state.json", record | {"step": 4, "check": checkpoint.seal(record | {"step": 4})})
    assert damage.wrong(folder, 3) == "state.json is of step 4"

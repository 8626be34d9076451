"""Model folders that loading refuses with a one-line error: pickles, damaged files, wrong keys and shapes."""

import json
from pathlib import Path

import pytest
import torch
from folders import CONFIG, edit, same
from safetensors.torch import load_file, save_file

from fastlightgen.models.folder import weights
from fastlightgen.models.folder.weights import WEIGHTS, build, load_model, save_model


def pickled(folder: Path, name: str = "mp_rank_00_model_states.pt", wrap=lambda state: {"module": state}) -> Path:
    torch.save(wrap(load_file(folder / WEIGHTS)), folder / name)
    (folder / WEIGHTS).unlink()
    return folder / name


def test_pickles_on_request_only(folder: Path):
    file = pickled(folder)
    with pytest.raises(ValueError, match=r"only the pickle mp_rank_00_model_states.pt, .*: add allow_pt=true"):
        load_model(folder)
    assert same(load_model(folder, allow_pt=True), build(CONFIG, seed=1))
    file.rename(folder / "weights.pth")
    assert same(load_model(folder, allow_pt=True), build(CONFIG, seed=1))
    (folder / "other.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"other.pth, weights.pth may all hold the weights; keep one"):
        load_model(folder, allow_pt=True)


class Runs:
    """An object whose unpickling would run a shell command."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("what", ["code", "cut", "list", "legacy"])
def test_pickles_that_are_not_plain_tensors(folder: Path, tmp_path: Path, what: str):
    file = pickled(folder, wrap={"list": list, "code": lambda _: Runs(tmp_path / "ran")}.get(what, dict))
    if what == "cut":
        file.write_bytes(file.read_bytes()[:-2000])
    elif what == "legacy":
        torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    message = "holds more than tensors" if what == "list" else "is not a torch.save file of plain tensors, or damaged"
    with pytest.raises(ValueError, match=rf"mp_rank_00_model_states.pt: {message}") as err:
        load_model(folder, allow_pt=True)
    assert "\n" not in str(err.value) and not (tmp_path / "ran").exists()


def test_a_bad_second_shard_is_seen_before_anything_is_read(folder: Path, monkeypatch):
    save_model(build(CONFIG, seed=1), folder, max_shard_bytes=60_000)
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    monkeypatch.setattr(weights, "assign", lambda *_: pytest.fail("a tensor was loaded"))
    with pytest.raises(ValueError, match=f"{last.name}: damaged or truncated"):
        load_model(folder)


def test_a_key_in_two_shards(folder: Path):
    save_model(build(CONFIG, seed=1), folder, max_shard_bytes=60_000)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file(load_file(second) | {"proj_out.bias": torch.zeros(64)}, second)
    save_file(load_file(first) | {"proj_out.bias": torch.ones(64)}, first)
    with pytest.raises(ValueError, match=rf"proj_out.bias stands in .*{first.name} too; keep one of the two"):
        load_model(folder)


def other_weights(folder: Path, *keys: str) -> None:
    save_file({key: torch.zeros(2) for key in keys}, folder / WEIGHTS)


def truncate(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def change(folder: Path, **tensors) -> None:
    state = {k: v for k, v in (load_file(folder / WEIGHTS) | tensors).items() if v is not None}
    save_file(state, folder / WEIGHTS)


def index(folder: Path, record) -> None:
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(record))


DAMAGE = {
    "truncated": (truncate, "safetensors: damaged or truncated"),
    "empty file": (lambda f: (f / WEIGHTS).write_bytes(b""), "safetensors: damaged or truncated"),
    "no file": (lambda f: (f / WEIGHTS).unlink(), "safetensors: not found"),
    "missing key": (lambda f: change(f, **{"proj_out.bias": None}), r"missing \['proj_out.bias'\]"),
    "extra key": (lambda f: change(f, stray=torch.zeros(1)), r"unexpected \['stray'\]"),
    "shape": (lambda f: change(f, **{"proj_out.bias": torch.zeros(3)}), r"proj_out.bias is \(3,\), wanted \(64,\)"),
    "fewer blocks": (lambda f: edit(f, num_layers=3), r"unexpected \['blocks.3.attn1.norm_k.weight'"),
    "more blocks": (lambda f: edit(f, num_layers=5), r"missing \['blocks.4.attn1.norm_k.weight'"),
    "class": (lambda f: edit(f, _class_name="FluxTransformer2DModel"), "_class_name is 'FluxTransformer2DModel'"),
    "config": (lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
    "other family": (
        lambda f: other_weights(f, "context_embedder.token_refiner.refiner_blocks.0.norm1.bias"),
        r"weights of HunyuanVideo \(diffusers format\), config.json describes Wan \(diffusers format\)",
    ),
    "other format": (
        lambda f: other_weights(f, "time_projection.1.bias"),
        r"weights of Wan \(original format\), config",
    ),
    "VAE": (lambda f: other_weights(f, "decoder.conv_in.bias", "encoder.conv_in.bias"), "the weights of a VAE, config"),
    "UNet": (lambda f: other_weights(f, "down_blocks.0.bias"), "the weights of a UNet, config.json describes Wan"),
    "VAE config": (
        lambda f: edit(f, _class_name="AutoencoderKLWan"),
        "'AutoencoderKLWan'; supported: WanTransformer3D",
    ),
    "quantised": (
        lambda f: change(f, **{"proj_out.bias": torch.zeros(64).to(torch.float8_e4m3fn)}),
        "proj_out.bias is float8_e4m3fn, wanted float32, bfloat16 or float16",
    ),
    "unknown key": (lambda f: edit(f, vace_layers=[0]), r"vace_layers=a list of 1 is not a key of this network"),
    "size as text": (lambda f: edit(f, ffn_dim="40"), "ffn_dim: is '40', wanted a whole number from 1 to"),
    "size 0": (lambda f: edit(f, num_attention_heads=0), "num_attention_heads: is 0, wanted a whole number from 1 to"),
    "list": (
        lambda f: (f / "config.json").write_text("[]"),
        "config.json is a list of 0, .*wanted the keys of a network",
    ),
    "index of pickles": (
        lambda f: index(f, {"weight_map": {"a": "a.bin"}}),
        "names 'a.bin'; wanted .safetensors files",
    ),
    "index outside": (lambda f: index(f, {"weight_map": {"a": "../a.safetensors"}}), "names files outside its folder"),
    "index absolute": (lambda f: index(f, {"weight_map": {"a": "/a.safetensors"}}), "names files outside its folder"),
    "index of nothing": (lambda f: index(f, {"metadata": {}}), "index.json has no 'weight_map'"),
    "index no record": (lambda f: index(f, []), "index.json is a list of 0, wanted an object"),
    "shard lost": (lambda f: index(f, {"weight_map": {"a": "lost.safetensors"}}), "lost.safetensors: not found"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_folders(folder: Path, damage, message: str):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_keys_that_diffusers_ignores(folder: Path, tmp_path: Path):
    """Notes in config.json, and the unused norms in published image-to-video weights."""
    edit(folder, _diffusers_version="0.33.0", _name_or_path="x", pos_embed_seq_len=None, quantization_config=None)
    assert same(load_model(folder), build(CONFIG, seed=1))
    model = build(CONFIG | {"in_channels": 36, "image_dim": 8, "added_kv_proj_dim": 24}, seed=1)
    save_model(model, folder)
    change(folder, **{f"blocks.{i}.attn2.norm_added_q.weight": torch.ones(24) for i in range(4)})
    assert same(load_model(folder), model)
    change(folder, **{"blocks.4.attn2.norm_added_q.weight": torch.ones(24)})
    with pytest.raises(ValueError, match=r"unexpected \['blocks.4.attn2.norm_added_q.weight'\]"):
        load_model(folder)


def test_a_failed_load_leaves_the_model_as_it_was(folder: Path):
    model = build(CONFIG, seed=2)
    change(folder, **{"proj_out.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="do not fit"):
        weights.load_weights(model, folder)
    assert same(model, build(CONFIG, seed=2))

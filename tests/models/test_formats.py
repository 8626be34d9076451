"""Original Wan and HunyuanVideo checkpoints: golden outputs, keys against diffusers' converters, round trips."""

import json
from pathlib import Path

import pytest
import torch
from helpers import small_hunyuan, small_wan
from safetensors.torch import load_file, save_file

from fastlightgen.config import preset
from fastlightgen.models.base import Cond
from fastlightgen.models.folder import weights
from fastlightgen.models.folder.files import WEIGHTS
from fastlightgen.models.folder.original import from_original, original_config, save_original, to_original
from fastlightgen.models.folder.weights import build, file_values, load_model, load_weights, save_model
from fastlightgen.models.hunyuan.keys import hunyuan_keys
from fastlightgen.models.keys import inverse
from fastlightgen.models.wan.keys import wan_keys
from fastlightgen.models.wan.original import IMAGE_DIM

GOLDEN = Path(__file__).parents[1] / "golden"
# Outputs are about 2 large, so 1e-5 is 40 float32 roundings. The original computes the time sinusoid in float64,
# diffusers and this package in float32: that alone causes 9e-6.
TOLERANCE = 1e-5
SMALL = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 20, "freq_dim": 32, "ffn_dim": 40}
SMALL |= {"num_layers": 2}
I2V = SMALL | {"in_channels": 36, "image_dim": IMAGE_DIM, "added_kv_proj_dim": 24}
HUNYUAN = {  # diffusers' defaults, which describe the real network
    "_class_name": "HunyuanVideoTransformer3DModel",
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 20,
    "num_single_layers": 40,
    "num_refiner_layers": 2,
    "mlp_ratio": 4.0,
    "guidance_embeds": True,
}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@torch.no_grad()
def test_golden_wan():
    model, io = load_model(GOLDEN / "wan-t2v"), load_file(GOLDEN / "wan-t2v" / "io.safetensors")
    v = model(io["x"], io["t"], Cond(io["text"]))
    torch.testing.assert_close(v, io["out"], rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_golden_hunyuan():
    model, io = load_model(GOLDEN / "hunyuan"), load_file(GOLDEN / "hunyuan" / "io.safetensors")
    lengths = io["text_mask"].sum(1).long()
    cond = Cond(io["text"], text_len=lengths, pooled=io["pooled"], guidance=io["guidance"])
    torch.testing.assert_close(model(io["x"], io["t"], cond), io["out"], rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_golden_hunyuan_in_diffusers_class():
    stock = pytest.importorskip("diffusers").HunyuanVideoTransformer3DModel
    folder = GOLDEN / "hunyuan"
    with torch.device("meta"):
        config = from_original(json.loads((folder / "config.json").read_text()))
        net = stock(**{k: v for k, v in config.items() if k != "_class_name"})
    net.register_to_config(_class_name=stock.__name__)  # as in the config.json of a model folder
    load_weights(net, folder)
    io = load_file(folder / "io.safetensors")
    out = net(io["x"], 1000 * io["t"], io["text"], io["text_mask"], io["pooled"], 1000 * io["guidance"]).sample
    torch.testing.assert_close(out, io["out"], rtol=0, atol=TOLERANCE)
    assert same(to_original(net), load_file(folder / "model.safetensors"))  # the way back, bit for bit
    given = json.loads((folder / "config.json").read_text())
    assert given.items() <= original_config(net.config).items()


@pytest.mark.parametrize("name", ["wan2.1-t2v-14b", "wan2.1-i2v-14b"])
def test_wan_keys_are_those_of_diffusers_converter(name: str):
    convert = pytest.importorskip("diffusers.loaders.single_file_utils").convert_wan_transformer_to_diffusers
    config = preset(name)["network"]
    keys = wan_keys(config)
    # One number per original tensor, so that a tensor under a wrong name cannot look right.
    numbers = {theirs: torch.tensor(float(i)) for i, theirs in enumerate(sorted(keys.values()))}
    assert len(numbers) == len(keys)
    want = {ours: numbers[theirs] for ours, theirs in keys.items()}
    assert same(convert(dict(numbers)), want)
    with torch.device("meta"):
        assert build(config).state_dict().keys() == keys.keys()


def test_hunyuan_rows_are_those_of_diffusers_converter():
    """At the real size, which is a constant in the converter; tensors have one column to save memory."""
    diffusers = pytest.importorskip("diffusers")
    convert = diffusers.loaders.single_file_utils.convert_hunyuan_video_transformer_to_diffusers
    table, originals, count = hunyuan_keys(HUNYUAN), {}, 0
    for key, pieces in sorted(inverse(table).items()):
        rows = pieces[-1].stop or 6
        originals[key] = torch.arange(count, count + rows, dtype=torch.float64)  # every row has its own number
        count += rows
    want = {
        key: torch.cat([originals[source.key][a:b] for a, b in source.rows or [(0, None)]])
        for key, source in table.items()
    }
    assert same(convert(dict(originals)), want)
    with torch.device("meta"):
        net = diffusers.HunyuanVideoTransformer3DModel()
    assert net.state_dict().keys() == want.keys()
    heights = {k: v.shape[0] for k, v in net.state_dict().items()}
    assert all(heights[key] == len(want[key]) for key, source in table.items() if source.rows)


@pytest.mark.parametrize("config", [SMALL, I2V, SMALL | {"cross_attn_norm": False}], ids=["t2v", "i2v", "no norm"])
def test_there_and_back(tmp_path: Path, config: dict):
    model = build(config, seed=3)
    folder = save_original(model, tmp_path / "original")
    stored = load_file(folder / WEIGHTS)
    assert same(stored, to_original(model)) and "blocks.1.self_attn.q.weight" in stored
    other = load_model(folder)
    assert same(other.state_dict(), model.state_dict()) and other.config == model.config
    half = load_model(save_original(model, folder, torch.bfloat16), dtype=torch.bfloat16)  # replaces the first
    assert same(half.state_dict(), build(config, seed=3).bfloat16().state_dict())


def test_golden_wan_there_and_back(tmp_path: Path):
    folder = save_original(load_model(GOLDEN / "wan-t2v"), tmp_path / "back")
    assert same(load_file(folder / WEIGHTS), load_file(GOLDEN / "wan-t2v" / WEIGHTS))
    given = json.loads((GOLDEN / "wan-t2v" / "config.json").read_text())
    assert given.items() <= json.loads((folder / "config.json").read_text()).items()


def test_a_pruned_model_goes_back_renumbered(tmp_path: Path):
    model = build(SMALL | {"num_layers": 4}, seed=3)
    kept = {k: model.state_dict()[f"blocks.{i}.ffn.net.2.weight"] for k, i in enumerate([0, 3])}
    stored = load_file(save_original(model.prune([0, 3]), tmp_path / "m") / WEIGHTS)
    assert all(torch.equal(stored[f"blocks.{k}.ffn.2.weight"], v) for k, v in kept.items())
    assert not any(key.startswith("blocks.2.") for key in stored)


@pytest.mark.parametrize("save", [save_model, save_original])
@pytest.mark.parametrize("keep", [None, [0, 3]])
@pytest.mark.parametrize("family", ["wan", "hunyuan"])
def test_the_values_of_a_file_by_the_names_of_the_pruned_network(tmp_path: Path, family: str, keep, save):
    """HunyuanVideo has 2 double and 3 single blocks here; its original file fuses several tensors into one."""
    save(build(SMALL | {"num_layers": 4}) if family == "wan" else small_hunyuan(num_refiner_layers=2), tmp_path / "m")
    found, whole = list(file_values(tmp_path / "m", keep)), load_model(tmp_path / "m")
    assert len(found) == len(dict(found))
    assert same(dict(found), (whole.prune(keep) if keep else whole).state_dict())


def test_the_values_of_a_bfloat16_file_are_float32(tmp_path: Path):
    found = dict(file_values(save_model(small_wan(), tmp_path / "m", torch.bfloat16)))
    assert same(found, {k: v.bfloat16().float() for k, v in small_wan().state_dict().items()})


def test_only_clip_sized_image_tokens_go_back(tmp_path: Path):
    with pytest.raises(ValueError, match="WanModel: image_dim is 8; the original network's is 1280"):
        save_original(build(I2V | {"image_dim": 8}), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_original_folder_with_other_files_and_shards(tmp_path: Path):
    """The folder as downloaded: shards with an index, and pickles of the VAE and the text encoder."""
    model = build(SMALL, seed=4)
    folder = save_original(model, tmp_path / "m")
    stored = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = {key: f"diffusion_pytorch_model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(stored)}
    for name in set(names.values()):
        save_file({k: v for k, v in stored.items() if names[k] == name}, folder / name)
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    (folder / "Wan2.1_VAE.pth").write_bytes(b"not read")
    (folder / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"not read")
    assert same(load_model(folder).state_dict(), model.state_dict())
    index.unlink()
    assert same(load_model(folder).state_dict(), model.state_dict())


def edited(changes: dict, base: str = "wan-t2v") -> dict:
    return json.loads((GOLDEN / base / "config.json").read_text()) | changes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (edited({"model_type": "flf2v"}), "model_type is 'flf2v'; only 't2v' and 'i2v'"),
        (edited({"text_len": 226}), "text_len is 226; only 512"),
        (edited({"num_heads": 5}), "dim is 48; it must be a multiple of num_heads, which is 5"),
        (edited({"num_heads": 0}), "dim is 48; it must be a multiple of num_heads, which is 0"),
        (edited({"vace_layers": [0, 1]}), r"vace_layers=\[0, 1\] is not a key of WanModel"),
        (edited({"num_layers": "3"}), "num_layers: is '3', wanted a whole number from 0 to 1000"),
        (edited({"text_projection": "linear"}, "hunyuan"), "text_projection is 'linear'; only 'single_refiner'"),
    ],
)
def test_unsupported_original_configuration(tmp_path: Path, config: dict, message: str):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"^config.json: {message}"):
        load_model(tmp_path)


def test_defaults_of_the_original_configurations():
    """The published config.json of Wan T2V 1.3B; HunyuanVideo 13B has none, so that its class name must suffice."""
    wan = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 1536, "eps": 1e-06, "ffn_dim": 8960}
    wan |= {"freq_dim": 256, "in_dim": 16, "model_type": "t2v", "num_heads": 12, "num_layers": 30, "out_dim": 16}
    with torch.device("meta"):
        got, want = (
            build(c).cfg for c in (from_original(wan | {"text_len": 512}), preset("wan2.1-t2v-1.3b")["network"])
        )
    assert got == want
    hunyuan = from_original({"_class_name": "HYVideoDiffusionTransformer", "i2v_condition_type": "token_replace"})
    stock = pytest.importorskip("diffusers").HunyuanVideoTransformer3DModel
    with torch.device("meta"):
        net = stock(**{k: v for k, v in hunyuan.items() if k != "_class_name"})
    assert sum(p.numel() for p in net.parameters()) == 12_821_012_544
    assert net.config.image_condition_type == "token_replace"


def test_pipeline_folder(tmp_path: Path):
    model = build(SMALL, seed=5)
    save_model(model, tmp_path / "transformer", stage=3)
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    assert same(load_model(tmp_path).state_dict(), model.state_dict())
    assert weights.read_card(tmp_path)["stage"] == 3
    (tmp_path / "transformer_2").mkdir()
    with pytest.raises(ValueError, match="has a transformer_2/ that model_index.json does not name"):
        load_model(tmp_path)
    (tmp_path / "transformer_2").rmdir()
    (tmp_path / "transformer").rename(tmp_path / "unet")
    with pytest.raises(ValueError, match="a pipeline without transformer/config.json"):
        load_model(tmp_path)

"""export to=comfyui and to=gguf: the file by diffusers' converter, float8 and blocks by hand, the workflow."""

import json
import os
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import error_line
from safetensors import safe_open
from safetensors.torch import load_file

from fastlightgen.config import main
from fastlightgen.export import export
from fastlightgen.flow import ladder
from fastlightgen.models.families import build
from fastlightgen.models.folder.weights import save_model
from fastlightgen.pipelines.comfyui import sigmas

KEEP = [0, 2]
WAN = {"num_attention_heads": 1, "attention_head_dim": 128, "ffn_dim": 192, "num_layers": 2, "in_channels": 16}
HUNYUAN = {"num_attention_heads": 1, "num_layers": 1, "num_single_layers": 1}
HUNYUAN15 = {"num_attention_heads": 1, "num_layers": 1, "text_embed_dim": 64, "image_embed_dim": 32}
CONFIGS = {
    "wan t2v": {"_class_name": "WanTransformer3DModel", **WAN},
    "wan i2v": {
        "_class_name": "WanTransformer3DModel", **WAN, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 128
    },
    "wan 5b": {"_class_name": "WanTransformer3DModel", **WAN, "in_channels": 48, "out_channels": 48},
    "hunyuan": {"_class_name": "HunyuanVideoTransformer3DModel", **HUNYUAN},
    "hunyuan i2v": {
        "_class_name": "HunyuanVideoTransformer3DModel", **HUNYUAN, "in_channels": 33,
        "num_single_layers": 0,  # diffusers' converter knows single blocks of one width only, 3072
        "image_condition_type": "latent_concat", "guidance_embeds": False,
    },
    "hunyuan15": {"_class_name": "HunyuanVideo15Transformer3DModel", **HUNYUAN15, "task_type": "t2v"},
    "hunyuan15 i2v": {"_class_name": "HunyuanVideo15Transformer3DModel", **HUNYUAN15, "task_type": "i2v"},
}  # fmt: skip
CONVERTERS = {
    "wan": "convert_wan_transformer_to_diffusers",
    "hunyuan": "convert_hunyuan_video_transformer_to_diffusers",
}
DETECTED = {"wan t2v": ("num_layers", 2), "wan i2v": ("num_layers", 2), "wan 5b": ("num_layers", 2)}
DETECTED |= {"hunyuan": ("depth", 1)}


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """name -> (network with random weights, its folder)."""
    out = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = build(config).requires_grad_(False)
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.05)
        card = {"ladder": ladder(4, 5.0), "shift": 5.0, "guidance": 1.0, "sampler": "stochastic", "stage": 3}
        folder = tmp_path_factory.mktemp("comfy") / "model"
        out[name] = model, save_model(model, folder, kept_blocks=KEEP, **card)
    return out


def run(folder, out, *words: str):
    main(export, "export", [f"model={folder}", "to=comfyui", f"out={out}", "dtype=float32", "threads=1", *words])
    return load_file(out), json.loads(out.with_suffix(".workflow.json").read_text())


@pytest.mark.parametrize("name", ["wan t2v", "wan i2v", "wan 5b", "hunyuan i2v"])
def test_diffusers_reads_the_same_weights(students, tmp_path, name):
    """diffusers converts the original format with code of its own."""
    from diffusers.loaders import single_file_utils

    model, folder = students[name]
    state, _ = run(folder, tmp_path / "student.safetensors")
    converted = getattr(single_file_utils, CONVERTERS[name.split()[0]])(dict(state))
    wanted = model.state_dict()
    assert converted.keys() == wanted.keys()
    assert all(torch.equal(converted[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", ["hunyuan15", "hunyuan15 i2v"])
def test_the_blocks_of_hunyuan15_are_named_like_hunyuans(students, tmp_path, name):
    """ComfyUI loads both with one class. Tencent's own files of HunyuanVideo-1.5 have q, k and v apart."""
    from diffusers.loaders import single_file_utils

    model, folder = students[name]
    state, graph = run(folder, tmp_path / "student.safetensors")
    new = {key: state.pop(key) for key in list(state) if key.startswith(("byt5_in.", "vision_in.", "cond_type_"))}
    converted = single_file_utils.convert_hunyuan_video_transformer_to_diffusers(dict(state))
    converted = {re.sub("^time_text_embed", "time_embed", key): value for key, value in converted.items()}
    wanted = model.state_dict()
    own = [key for key in wanted if key.startswith(("context_embedder_2.", "image_embedder.", "cond_type_embed."))]
    assert converted.keys() == wanted.keys() - own
    assert all(torch.equal(value, wanted[key]) for key, value in converted.items())
    assert torch.equal(new.pop("cond_type_embedding.weight"), wanted["cond_type_embed.weight"])
    assert torch.equal(new["byt5_in.fc3.weight"], wanted["context_embedder_2.linear_3.weight"])
    assert torch.equal(new["vision_in.proj.3.weight"], wanted["image_embedder.linear_2.weight"])
    assert len(new) == 8 + 8  # weights and biases of four layers each
    loader = next(node["inputs"] for node in graph.values() if node["class_type"] == "DualCLIPLoader")
    assert loader["type"] == "hunyuan_video_15"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_link_of_the_workflow_leads_to_a_node(students, tmp_path, name):
    _, graph = run(students[name][1], tmp_path / "student.safetensors")
    links = [v for node in graph.values() for v in node["inputs"].values() if isinstance(v, list)]
    assert links and all(set(link) & set(graph) and isinstance(link[1], int) for link in links)
    of = {node["class_type"]: node["inputs"] for node in graph.values()}
    sampler = of["KSampler"]
    assert (sampler["sampler_name"], sampler["scheduler"], sampler["steps"], sampler["cfg"]) == ("lcm", "simple", 4, 1)
    assert of["ModelSamplingSD3"]["shift"] == 5.0 and of["UNETLoader"]["unet_name"] == "student.safetensors"
    latent = of.get("Wan22ImageToVideoLatent")  # of a VAE of 48 channels, whose size differs; a picture is optional
    assert (latent is not None) == (name == "wan 5b")
    assert latent is None or (latent["width"], latent["height"], latent["length"]) == (1280, 704, 121)
    assert ("LoadImage" in of) == ("i2v" in name) and ("FluxGuidance" in of) == (name == "hunyuan")


def test_the_metadata_says_how_to_sample_and_no_other_depth(students, tmp_path):
    run(students["wan t2v"][1], tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    card = json.loads(metadata["fastlightgen"])
    assert card["ladder"] == ladder(4, 5.0) and card["sampler"] == "stochastic" and card["num_blocks"] == 2
    assert set(metadata) <= {"format", "fastlightgen", "sums"}  # `config` would override what ComfyUI detects


def test_float8(students, tmp_path):
    """By hand: the scale makes the largest element 448; e4m3 keeps 3 bits, so a rounding moves by a sixteenth."""
    model, folder = students["wan t2v"]
    plain, _ = run(folder, tmp_path / "a.safetensors")
    state, _ = run(folder, tmp_path / "b.safetensors", "quant=fp8")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        record = json.loads(file.metadata()["_quantization_metadata"])
    assert record["format_version"] == "1.0"
    scaled = {key.removesuffix(".weight_scale") for key in state if key.endswith(".weight_scale")}
    assert scaled == set(record["layers"]) and len(scaled) == 2 * 10  # q k v o twice, two of the feed-forward
    for name in scaled:
        q, scale, w = state[f"{name}.weight"], state[f"{name}.weight_scale"], plain[f"{name}.weight"]
        assert q.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.dim() == 0
        assert scale.item() == pytest.approx(w.abs().max().item() / 448, rel=1e-6)
        error = (q.float() * scale - w).abs()
        assert (error <= w.abs() / 16 + scale * 2**-10).all() and error.max() > 0
    others = {key for key in plain if key.removesuffix(".weight") not in scaled}
    assert all(torch.equal(state[key], plain[key]) for key in others)


def by_hand(kind: str, rows: np.ndarray) -> np.ndarray:
    """Values of GGUF blocks [N, bytes] of 32 numbers: a half-precision scale d, perhaps a least value m, digits."""
    halves = rows[:, :4].copy().view(np.float16).astype(np.float32)
    d, m = halves[:, :1], halves[:, 1:]
    if kind == "q8_0":
        return d * rows[:, 2:].copy().view(np.int8)
    low = rows[:, -16:]
    digits = np.concatenate([low & 15, low >> 4], 1).astype(np.float32)
    if kind == "q4_0":
        return d * (digits - 8)
    fifth = np.unpackbits(rows[:, 4:8], axis=1, bitorder="little")
    return d * (digits + 16 * fifth) + m


@pytest.mark.parametrize("quant, bits, step", [("q8_0", 8.5, 1 / 127), ("q5_1", 6, 2 / 31), ("q4_0", 4.5, 1 / 8)])
def test_gguf(students, tmp_path, quant, bits, step):
    """The blocks by hand: no number moves by more than half a step (a whole one where Q4_0 clips)."""
    import gguf

    plain, _ = run(students["wan i2v"][1], tmp_path / "a.safetensors")
    words = [f"model={students['wan i2v'][1]}", "to=gguf", f"out={tmp_path / 'a.gguf'}", "dtype=float32", "threads=1"]
    main(export, "export", [*words, f"quant={quant}"])
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert reader.get_field("general.architecture").contents() == "wan"
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors.keys() == plain.keys()
    matrices = [name for name, tensor in tensors.items() if tensor.tensor_type.name == quant.upper()]
    assert len(matrices) == 2 * 12  # as float8, and two for the picture in each block
    for name, tensor in tensors.items():
        wanted = plain[name].flatten(1).numpy() if plain[name].dim() > 1 else plain[name].numpy()
        if name not in matrices:
            assert np.array_equal(tensor.data.reshape(wanted.shape), wanted)
            continue
        blocks = wanted.reshape(-1, 32)
        found = by_hand(quant, np.array(tensor.data).reshape(len(blocks), -1))
        assert np.allclose(
            found.reshape(wanted.shape), gguf.quants.dequantize(tensor.data, tensor.tensor_type), atol=1e-6
        )
        limit = np.abs(blocks).max(1, keepdims=True) * step
        assert (np.abs(found - blocks) <= limit * (1 if quant == "q4_0" else 0.51) + 1e-4).all()
        assert tensor.n_bytes * 8 == bits * wanted.size
    patch = "patch_embedding.weight"
    shape = reader.get_field(f"comfy.gguf.orig_shape.{patch}").contents()
    assert shape == list(plain[patch].shape) and len(shape) == 5
    graph = json.loads((tmp_path / "a.workflow.json").read_text())
    assert graph["1"] == {"class_type": "UnetLoaderGGUF", "inputs": {"unet_name": "a.gguf"}}


def test_gguf_refuses_rows_that_its_blocks_do_not_fit(tmp_path, capsys):
    model = build(CONFIGS["wan t2v"] | {"ffn_dim": 200})
    card = {"ladder": ladder(4, 5.0), "shift": 5.0, "guidance": 1.0, "sampler": "ode"}
    folder = save_model(model, tmp_path / "odd", **card)
    line = error_line(capsys, refused, f"model={folder}", "to=gguf", f"out={tmp_path / 'x.gguf'}")
    assert "blocks.0.ffn.2.weight has rows of 200, not a multiple of 32" in line and not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize("steps, limit", [(1, 2e-8), (2, 2e-8), (3, 1e-3), (4, 2e-8), (8, 2e-8)])
@pytest.mark.parametrize("shift", [1.0, 5.0, 12.0])
def test_its_scheduler_follows_the_ladder(steps, limit, shift):
    assert max(abs(a - b) for a, b in zip(sigmas(steps, shift), ladder(steps, shift), strict=True)) <= limit


def test_what_it_cannot_carry_is_refused_before_anything_is_written(students, tmp_path, capsys):
    def said(folder, *words: str) -> str:
        line = error_line(capsys, refused, f"model={folder}", "to=comfyui", *words)
        assert not list(tmp_path.glob("*.safetensors"))
        return line

    out = f"out={tmp_path / 'x.safetensors'}"
    assert "the network has attention_head_dim 32, and ComfyUI assumes 128" in said(small_heads(tmp_path), out)
    assert "wanted a student of Stage III" in said("tiny", out)
    line = error_line(capsys, refused, "model=tiny", "to=gguf", f"out={tmp_path / 'x.gguf'}")
    assert line.startswith("error: to=gguf: wanted a student of Stage III")
    assert "give a name that ends in .safetensors" in said(students["wan t2v"][1], f"out={tmp_path / 'x'}")
    assert "takes no pipeline=" in said(students["wan t2v"][1], out, "pipeline=p")
    assert "ComfyUI renames the layers of HunyuanVideo" in said(students["hunyuan"][1], out, "quant=fp8")
    words = [f"model={students['wan t2v'][1]}", f"out={tmp_path / 'y'}"]
    assert "pipeline is required" in error_line(capsys, refused, *words)


def refused(*words: str) -> None:
    main(export, "export", list(words))


def small_heads(tmp_path):
    model = build(CONFIGS["wan t2v"] | {"attention_head_dim": 32})
    card = {"ladder": ladder(4, 5.0), "shift": 5.0, "guidance": 1.0, "sampler": "ode"}
    return save_model(model, tmp_path / "small", **card)


@pytest.mark.skipif(not os.environ.get("FLG_COMFYUI"), reason="FLG_COMFYUI names no checkout of ComfyUI")
@pytest.mark.parametrize("name", DETECTED)
@torch.no_grad()
def test_comfyui_itself(students, tmp_path, monkeypatch, name):
    """Its unmodified detection and classes load the file strictly, and predict what the student predicts."""
    monkeypatch.setattr(sys, "argv", ["x", "--cpu"])
    monkeypatch.syspath_prepend(os.environ["FLG_COMFYUI"])
    from comfy import options

    options.enable_args_parsing()  # ComfyUI reads --cpu
    from comfy import model_detection, ops

    state, _ = run(students[name][1], tmp_path / "student.safetensors")
    config = model_detection.model_config_from_unet(state, "")
    key, depth = DETECTED[name]
    assert config.unet_config[key] == depth
    made = config.get_model(state, "")
    missing, unexpected = made.diffusion_model.load_state_dict(config.process_unet_state_dict(state), strict=False)
    assert not missing and not unexpected and ops

    model, net = students[name][0].eval(), made.diffusion_model.float().eval()
    x_t, t, cond, _ = model.example_inputs(batch=1, seed=0)
    cond = replace(cond, text_len=None, image=None if name == "wan 5b" else cond.image)  # there a frame of the latent
    x = x_t if cond.image is None else torch.cat([x_t, cond.image], 1)
    given = {"y": cond.pooled, "guidance": cond.guidance} if name == "hunyuan" else {"clip_fea": cond.image_embeds}
    found, wanted = net(x, 1000 * t, cond.text, **given), model(x_t, t, cond)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1)

"""export to=comfyui: the file by diffusers' own converter, float8 by hand, the workflow, ComfyUI itself if given."""

import json
import os
import sys

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
CONFIGS = {
    "wan t2v": {"_class_name": "WanTransformer3DModel", **WAN},
    "wan i2v": {
        "_class_name": "WanTransformer3DModel", **WAN, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 128
    },
    "hunyuan": {"_class_name": "HunyuanVideoTransformer3DModel", **HUNYUAN},
    "hunyuan i2v": {
        "_class_name": "HunyuanVideoTransformer3DModel", **HUNYUAN, "in_channels": 33,
        "num_single_layers": 0,  # diffusers' converter knows single blocks of one width only, 3072
        "image_condition_type": "latent_concat", "guidance_embeds": False,
    },
}  # fmt: skip
CONVERTERS = {
    "wan": "convert_wan_transformer_to_diffusers",
    "hunyuan": "convert_hunyuan_video_transformer_to_diffusers",
}
DETECTED = {"wan t2v": ("num_layers", 2), "wan i2v": ("num_layers", 2), "hunyuan": ("depth", 1)}


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


@pytest.mark.parametrize("name", ["wan t2v", "wan i2v", "hunyuan i2v"])
def test_diffusers_reads_the_same_weights(students, tmp_path, name):
    """diffusers converts the original format with code of its own."""
    from diffusers.loaders import single_file_utils

    model, folder = students[name]
    state, _ = run(folder, tmp_path / "student.safetensors")
    converted = getattr(single_file_utils, CONVERTERS[name.split()[0]])(dict(state))
    wanted = model.state_dict()
    assert converted.keys() == wanted.keys()
    assert all(torch.equal(converted[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_link_of_the_workflow_leads_to_a_node(students, tmp_path, name):
    _, graph = run(students[name][1], tmp_path / "student.safetensors")
    links = [v for node in graph.values() for v in node["inputs"].values() if isinstance(v, list)]
    assert links and all(set(link) & set(graph) and isinstance(link[1], int) for link in links)
    of = {node["class_type"]: node["inputs"] for node in graph.values()}
    sampler = of["KSampler"]
    assert (sampler["sampler_name"], sampler["scheduler"], sampler["steps"], sampler["cfg"]) == ("lcm", "simple", 4, 1)
    assert of["ModelSamplingSD3"]["shift"] == 5.0 and of["UNETLoader"]["unet_name"] == "student.safetensors"
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
def test_comfyui_itself(students, tmp_path, monkeypatch, name):
    """Its unmodified detection and classes load the file strictly."""
    monkeypatch.setattr(sys, "argv", ["x", "--cpu"])
    monkeypatch.syspath_prepend(os.environ["FLG_COMFYUI"])
    from comfy import model_detection, ops

    state, _ = run(students[name][1], tmp_path / "student.safetensors")
    config = model_detection.model_config_from_unet(state, "")
    key, depth = DETECTED[name]
    assert config.unet_config[key] == depth
    made = config.get_model(state, "")
    missing, unexpected = made.diffusion_model.load_state_dict(config.process_unet_state_dict(state), strict=False)
    assert not missing and not unexpected and ops

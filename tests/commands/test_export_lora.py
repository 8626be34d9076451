"""export to=lora: diffusers' file in stock diffusers, ComfyUI's by its rules, what each rank leaves out by numpy."""

import re

import numpy as np
import pytest
import torch
from helpers import error_line
from safetensors.torch import load_file
from torch import nn

from fastlightgen.config import main
from fastlightgen.export import export
from fastlightgen.flow import ladder
from fastlightgen.models.families import build
from fastlightgen.models.folder.original import to_original
from fastlightgen.models.folder.weights import save_model
from fastlightgen.pipelines.comfyui import table_of

WAN = {"_class_name": "WanTransformer3DModel", "num_attention_heads": 1, "attention_head_dim": 128, "ffn_dim": 192}
CONFIGS = {
    "wan": WAN | {"num_layers": 2, "in_channels": 16, "text_dim": 64},
    "wan i2v": WAN | {"num_layers": 1, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 128},
    "hunyuan": {
        "_class_name": "HunyuanVideoTransformer3DModel", "num_attention_heads": 1, "num_layers": 1,
        "num_single_layers": 1,
    },
    "hunyuan15": {
        "_class_name": "HunyuanVideo15Transformer3DModel", "num_attention_heads": 1, "num_layers": 1,
        "text_embed_dim": 64, "image_embed_dim": 32,
    },
}  # fmt: skip
CARD = {"ladder": ladder(4, 5.0), "shift": 5.0, "guidance": 1.0, "sampler": "ode", "stage": 3}
RANK = 3  # of the change that the tests make


def pair(name: str, others: float):
    """A teacher, and a student whose linear layers differ by a matrix of RANK and all else by noise of this size."""
    torch.manual_seed(0)
    teacher, student = (build(CONFIGS[name]).requires_grad_(False) for _ in range(2))
    for p in teacher.parameters():
        p.copy_(torch.randn_like(p) * 0.05)
    student.load_state_dict(teacher.state_dict())
    linear = {f"{key}.weight" for key, m in student.named_modules() if isinstance(m, nn.Linear)}
    for key, p in student.named_parameters():
        if key in linear:
            p += 0.02 * torch.randn(p.shape[0], RANK) @ torch.randn(RANK, p.shape[1])
        else:
            p += others * torch.randn_like(p)
    return teacher, student


@pytest.fixture
def folders(tmp_path):
    def made(name: str, others: float = 0.0):
        teacher, student = pair(name, others)
        save_model(teacher, tmp_path / "teacher")
        save_model(student, tmp_path / "student", **CARD)
        return teacher, student

    return made


def run(tmp_path, *words: str):
    out = tmp_path / "lora.safetensors"
    given = [f"model={tmp_path / 'student'}", f"teacher={tmp_path / 'teacher'}", "to=lora", f"out={out}"]
    last = dict(word.split("=", 1) for word in [*given, "dtype=float32", "threads=1", *words])
    main(export, "export", [f"{key}={value}" for key, value in last.items()])
    return out


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_stock_diffusers_loads_it_and_predicts_as_the_student(folders, tmp_path, name, capsys):
    pytest.importorskip("peft")
    import diffusers

    _, student = folders(name)
    out = run(tmp_path, f"rank={RANK}")
    said = capsys.readouterr().out
    assert f"what each rank leaves out of their change: rank {RANK}: 0.0%" in said
    assert "sample with 4 steps, shift 5, guidance 1, sampler ode (ComfyUI: euler, scheduler simple)" in said
    stock = getattr(diffusers, CONFIGS[name]["_class_name"]).from_pretrained(tmp_path / "teacher").eval()
    x_t, t, cond, _ = student.eval().example_inputs(batch=1, seed=0)
    stock.load_lora_adapter(load_file(out), prefix="transformer")
    stock.fuse_lora()
    mine, theirs = student.state_dict(), stock.state_dict()
    fused = {key.replace(".base_layer", ""): value for key, value in theirs.items() if "lora_" not in key}
    assert fused.keys() == mine.keys()
    for key, value in mine.items():
        assert torch.allclose(fused[key], value, atol=1e-5), key


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_rules_of_comfyui_give_all_weights_of_the_student(folders, tmp_path, name):
    """Its keys: NAME.lora_up, NAME.lora_down and alpha change NAME.weight; .diff adds to it, .diff_b to the bias."""
    teacher, student = folders(name, others=0.01)
    file = load_file(run(tmp_path, f"rank={RANK + 2}").with_suffix(".comfyui.safetensors"))
    state = {f"diffusion_model.{k}": v.clone() for k, v in to_original(teacher, table_of(teacher)).items()}
    for key, value in file.items():
        base = re.sub(r"\.(lora_down\.weight|lora_up\.weight|alpha|diff|diff_b)$", "", key)
        weight = f"{base}.weight" if f"{base}.weight" in state else base
        if key.endswith(".lora_up.weight"):
            down = file[f"{base}.lora_down.weight"]
            state[weight] += file[f"{base}.alpha"] / len(down) * value @ down
        elif key.endswith(".diff_b"):
            state[f"{base}.bias"] += value
        elif key.endswith(".diff"):
            state[weight] += value
    for key, value in to_original(student, table_of(student)).items():
        assert torch.allclose(state[f"diffusion_model.{key}"], value, atol=1e-5), key


@torch.no_grad()
def test_what_a_rank_leaves_out_is_what_numpy_says(folders, tmp_path, capsys):
    teacher, student = folders("wan")
    cut = 2
    run(tmp_path, f"rank={cut}")
    left = whole = 0.0
    old = teacher.state_dict()
    for key, value in student.state_dict().items():
        change = (value - old[key]).double().numpy()
        if change.any():
            energy = np.linalg.svd(change, compute_uv=False) ** 2
            left, whole = left + energy[cut:].sum(), whole + energy.sum()
    said = capsys.readouterr().out
    assert f"rank {cut}: {(left / whole) ** 0.5:.1%}" in said
    assert "norms, biases and tables are 0.0% of the change" in said


def test_a_wide_matrix_is_cut_as_an_exact_decomposition_cuts_it(monkeypatch):
    from fastlightgen.pipelines import lora_student

    torch.manual_seed(0)
    change = torch.randn(96, 5) @ torch.diag(torch.tensor([9.0, 7, 5, 3, 1])) @ torch.randn(5, 80)
    exact = lora_student.factors(change, 4)
    monkeypatch.setattr(lora_student, "EXACT", 8)
    quick = lora_student.factors(change, 4)
    assert torch.allclose(quick.up @ quick.down, exact.up @ exact.down, atol=1e-3)
    assert torch.allclose(quick.energy, exact.energy, rtol=1e-4)


def test_refusals(folders, tmp_path, capsys):
    _, student = folders("wan")
    words = [f"model={tmp_path / 'student'}", "to=lora", f"out={tmp_path / 'a.safetensors'}"]
    said = error_line(capsys, lambda: main(export, "export", words))
    assert said == "error: teacher is required: to=lora writes the difference to it\n"
    save_model(student.prune([1]), tmp_path / "pruned", **CARD)
    said = error_line(capsys, lambda: run(tmp_path, f"model={tmp_path / 'pruned'}"))
    assert said.startswith("error: to=lora: the student has 1 of 2 blocks, and a LoRA drops none; use to=diffusers")
    said = error_line(capsys, lambda: run(tmp_path, f"model={tmp_path / 'teacher'}"))
    assert said == "error: to=lora: student and teacher have the same weights, nothing to write\n"
    other = build(CONFIGS["wan"] | {"ffn_dim": 256})
    save_model(other, tmp_path / "other")
    said = error_line(capsys, lambda: run(tmp_path, f"teacher={tmp_path / 'other'}"))
    assert said.endswith(": ffn_dim is 256 and the student's 192; give the student's teacher\n")
    assert not list(tmp_path.glob("*.safetensors"))

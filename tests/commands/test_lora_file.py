"""A teacher's LoRA, renumbered, changes the student's blocks as it changed the same blocks of the teacher."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastlightgen.pipelines.lora_file import METADATA, remap_lora

WAN = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 10}
WAN |= {"freq_dim": 16, "ffn_dim": 20, "num_layers": 5}
KEEP, MAP, TEACHER = [0, 2, 4], {"blocks": {0: 0, 2: 1, 4: 2}}, {"blocks": 5}
HUNYUAN_MAP = {"transformer_blocks": {1: 0}, "single_transformer_blocks": {0: 0, 3: 1}}
HUNYUAN = {"transformer_blocks": 2, "single_transformer_blocks": 4}


def lora(form: str, blocks: int = 5, rank: int = 3) -> dict[str, torch.Tensor]:
    """A LoRA on two linear layers of every block, with alpha in the formats that store it."""
    g, out = torch.Generator().manual_seed(0), {}
    for i in range(blocks):
        for layer, (d_out, d_in) in {"attn1.to_q": (24, 24), "ffn.net.2": (24, 20)}.items():
            down, up = torch.randn(rank, d_in, generator=g), torch.randn(d_out, rank, generator=g)
            key = form.format(i=i, layer=layer)
            out |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    return out


def merge(network, tensors: dict[str, torch.Tensor], head: str = "transformer.") -> None:
    """Add B A to the weights W by hand."""
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix(head).removesuffix(".lora_A.weight")
            with torch.no_grad():
                network.get_submodule(name).weight += tensors[key.replace("lora_A", "lora_B")] @ down


@torch.no_grad()
def test_pruning_and_the_lora_commute(tmp_path):
    """Merge then prune equals prune then merge with the renumbered file, in diffusers' class."""
    from diffusers import WanTransformer3DModel

    def network(blocks: int):
        torch.manual_seed(1)
        return WanTransformer3DModel(**WAN | {"num_layers": blocks}).eval()

    teacher, student = network(5), network(3)
    pruned = torch.nn.ModuleList(teacher.blocks[i] for i in KEEP)
    student.load_state_dict({**teacher.state_dict(), **pruned.state_dict(prefix="blocks.")}, strict=False)
    save_file(lora("transformer.blocks.{i}.{layer}"), tmp_path / "a.safetensors")
    assert remap_lora("lora", tmp_path / "a.safetensors", tmp_path / "out", MAP, TEACHER) == ("a.safetensors", 3, 2)
    x = (torch.randn(1, 4, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 6, 10))
    plain = student(*x).sample
    merge(teacher, load_file(tmp_path / "a.safetensors"))
    teacher.blocks = torch.nn.ModuleList(teacher.blocks[i] for i in KEEP)
    merge(student, load_file(tmp_path / "out" / "a.safetensors"))
    assert torch.equal(student(*x).sample, teacher(*x).sample)
    assert (student(*x).sample - plain).abs().max() > 0.1  # the LoRA has an effect


@pytest.mark.parametrize(
    "name, number",
    [
        ("transformer.blocks.{}.attn1.to_q.lora_A.weight", {2: 1}),
        ("diffusion_model.blocks.{}.cross_attn.k.lora_down.weight", {4: 2}),
        ("lora_unet_blocks_{}_ffn_0.lora_up.weight", {2: 1}),
        ("base_model.model.blocks.{}.attn2.to_v.lora_B.weight", {2: 1}),
        ("blocks.{}.attn1.to_q.alpha", {4: 2}),
        ("transformer.blocks.{}.attn1.to_q.lora_A.weight", {1: None}),
        ("transformer.condition_embedder.time_proj.lora_A.weight", {0: 0}),
    ],
)
def test_names_of_wan(tmp_path, name: str, number: dict):
    [(old, new)] = number.items()
    save_file({"blocks.0.x": torch.zeros(1), name.format(old): torch.ones(1)}, tmp_path / "a.safetensors")
    remap_lora("lora", tmp_path / "a.safetensors", tmp_path / "out", MAP, TEACHER)
    wanted = {} if new is None else {name.format(new): 1}
    assert load_file(tmp_path / "out/a.safetensors") == {"blocks.0.x": 0} | wanted


def test_names_of_hunyuan(tmp_path):
    """Two block lists with a map each; the text refiner's blocks keep their numbers."""
    names = [
        ("transformer.transformer_blocks.{}.attn.to_q.lora_A.weight", 1, 0),
        ("transformer.transformer_blocks.{}.attn.to_q.lora_A.weight", 0, None),
        ("transformer.single_transformer_blocks.{}.proj_mlp.lora_B.weight", 3, 1),
        ("transformer.single_transformer_blocks.{}.proj_mlp.lora_B.weight", 1, None),
        ("diffusion_model.double_blocks.{}.img_attn_qkv.lora_A.weight", 1, 0),
        ("diffusion_model.single_blocks.{}.linear1.lora_A.weight", 3, 1),
        ("transformer.context_embedder.token_refiner.refiner_blocks.{}.ff.lora_A.weight", 1, 1),
    ]
    old = {name.format(a): torch.tensor(float(i)) for i, (name, a, _) in enumerate(names)}
    save_file(old, tmp_path / "a.safetensors")
    remap_lora("lora", tmp_path / "a.safetensors", tmp_path / "out", HUNYUAN_MAP, HUNYUAN)
    wanted = {name.format(b): float(i) for i, (name, _, b) in enumerate(names) if b is not None}
    assert load_file(tmp_path / "out/a.safetensors") == wanted


def test_names_of_hunyuan15(tmp_path):
    """One block list; the original has q, k and v apart, ComfyUI's files have them fused."""
    names = [
        ("transformer.transformer_blocks.{}.attn.add_k_proj.lora_A.weight", 4, 2),
        ("transformer.transformer_blocks.{}.attn.add_k_proj.lora_A.weight", 1, None),
        ("diffusion_model.double_blocks.{}.img_attn_q.lora_A.weight", 2, 1),
        ("diffusion_model.double_blocks.{}.img_attn_qkv.lora_A.weight", 2, 1),
        ("lora_unet_double_blocks_{}_txt_attn_k.lora_up.weight", 3, None),
        ("transformer.context_embedder.token_refiner.refiner_blocks.{}.ff.lora_A.weight", 1, 1),
    ]
    old = {name.format(a): torch.tensor(float(i)) for i, (name, a, _) in enumerate(names)}
    save_file(old, tmp_path / "a.safetensors")
    blocks = {"transformer_blocks": {0: 0, 2: 1, 4: 2}}
    given = ("lora", tmp_path / "a.safetensors", tmp_path / "out", blocks, {"transformer_blocks": 5})
    assert remap_lora(*given) == ("a.safetensors", 2, 2)
    wanted = {name.format(b): float(i) for i, (name, _, b) in enumerate(names) if b is not None}
    assert load_file(tmp_path / "out/a.safetensors") == wanted


def test_settings_inside_the_file_are_renumbered(tmp_path):
    settings = {
        "transformer.r": 3,
        "transformer.rank_pattern": {"blocks.2.attn1.to_q": 8, "blocks.1.attn1.to_q": 8, "to_v": 2},
        "transformer.target_modules": ["to_k", "blocks.4.ffn.net.2", "blocks.3.ffn.net.2"],
    }
    metadata = {"format": "pt", METADATA: json.dumps(settings)}
    save_file(lora("transformer.blocks.{i}.{layer}"), tmp_path / "a.safetensors", metadata=metadata)
    remap_lora("lora", tmp_path / "a.safetensors", tmp_path / "out", MAP, TEACHER)
    with safe_open(tmp_path / "out/a.safetensors", "pt") as f:
        assert json.loads(f.metadata()[METADATA]) == {
            "transformer.r": 3,
            "transformer.rank_pattern": {"blocks.1.attn1.to_q": 8, "to_v": 2},
            "transformer.target_modules": ["to_k", "blocks.2.ffn.net.2"],
        }


@pytest.mark.parametrize(
    "keys, settings, message",
    [
        (["blocks.7.x"], {}, r"blocks.7.x: no such block in the teacher \(5 blocks\); give a LoRA that was trained"),
        (["single_blocks.0.x"], {}, "single_blocks.0.x: no such block in the teacher"),
        (["blocks.1.x", "blocks.3.x"], {}, "changes 2 blocks, all of them dropped: nothing is left"),
        (["conv.x"], {}, "changes no block: nothing is left"),
        (["blocks.0.x"], {"transformer.layers_to_transform": [0]}, "layers_to_transform cannot be renumbered"),
    ],
)
def test_refused(tmp_path, keys, settings, message):
    file = tmp_path / "a.safetensors"
    save_file({k: torch.zeros(1) for k in keys}, file, metadata={METADATA: json.dumps(settings)})
    with pytest.raises(ValueError, match=f"lora={file}: {message}"):
        remap_lora("lora", file, tmp_path / "out", MAP, TEACHER)
    assert not (tmp_path / "out/a.safetensors").exists()


def test_not_a_safetensors_file(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"\x80\x02nonsense, and long enough to hold a header")
    for file in (tmp_path / "a.pt", tmp_path / "nowhere.safetensors"):
        with pytest.raises(ValueError, match="cannot be read as safetensors .*; give a .safetensors file"):
            remap_lora("lora", file, tmp_path / "out", MAP, TEACHER)

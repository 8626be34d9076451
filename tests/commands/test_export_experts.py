"""Two experts in ComfyUI's, GGUF's and LoRA's formats: both files, and the workflow played by ComfyUI's rules."""

import json
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import error_line
from safetensors.torch import load_file, save_file
from students import make_pair, make_student, stock
from torch import Tensor

from fastlightgen import flow
from fastlightgen.config import main
from fastlightgen.export import export
from fastlightgen.flow import ladder
from fastlightgen.models.base import Cond
from fastlightgen.models.families import build
from fastlightgen.models.folder.pair import load_sampler
from fastlightgen.models.folder.weights import load_model, save_model

WAN = {"_class_name": "WanTransformer3DModel", "num_attention_heads": 1, "attention_head_dim": 128, "ffn_dim": 192}
WAN |= {"num_layers": 3}
CONFIGS = {"t2v": WAN | {"in_channels": 16}, "i2v": WAN | {"in_channels": 36}}
STEPS, SHIFT, BOUNDARY = 4, 5.0, 0.875
TIMES = ladder(STEPS, SHIFT)  # 1, .9375, .8333, .625
SHAPE = (1, 16, 2, 4, 4)
KEEP = {"high": [0, 2], "low": [1]}
WORDS = ("dtype=float32", "threads=1")


def save(folder: Path, name: str, sampler: str, keep=KEEP, boundary: float = BOUNDARY) -> Path:
    """Students of both experts with random weights, which keep other blocks."""
    for seed, expert in enumerate(("high", "low")):
        torch.manual_seed(seed)
        model = build(CONFIGS[name]).requires_grad_(False)
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.05)
        card = {"ladder": TIMES, "shift": SHIFT, "guidance": 1.0, "sampler": sampler, "stage": 3}
        card |= {"expert": expert, "boundary": boundary, "kept_blocks": keep[expert]}
        save_model(model.prune(keep[expert]), folder / expert, **card)
    return folder


@pytest.fixture(scope="module", params=[("t2v", "stochastic"), ("t2v", "ode"), ("i2v", "ode")], ids="-".join)
def student(request, tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("experts") / "model", *request.param)


def run(folder: Path, out: Path, to: str = "comfyui") -> dict:
    main(export, "export", [f"model={folder}", f"to={to}", f"out={out}", *WORDS])
    return json.loads(out.with_suffix(".workflow.json").read_text())


def drawn_by(seed: int) -> Callable[[], Tensor]:
    """The fresh noise of a sampler on a CPU."""
    generator = torch.Generator().manual_seed(seed + 1)
    return lambda: torch.randn(SHAPE, generator=generator)


def noises(graph: dict, fresh: Callable[[int], Callable[[], Tensor]] = drawn_by) -> list[Tensor]:
    """The first noise and those after the steps, as ComfyUI draws them."""
    nodes = order_of(graph)
    out = [torch.randn(SHAPE, generator=torch.manual_seed(nodes[0]["noise_seed"]))]
    for node in nodes:
        draw = fresh(node["noise_seed"])
        out += [draw() for _ in range(node["start_at_step"], node["end_at_step"])]
    return out


@torch.no_grad()
def ours(folder: Path, drawn: list[Tensor]) -> tuple[Tensor, Cond]:
    """The latents of our sampler, and the text and picture channels that it read."""
    model = load_sampler(folder)
    _, _, cond, _ = load_model(folder / "high").example_inputs(batch=1, seed=0, size=SHAPE[2:])
    card = json.loads((folder / "high/fastlightgen.json").read_text())
    x = flow.rollout(lambda x, t: model(x, t, cond), drawn[0], TIMES, card["sampler"], lambda i: drawn[i + 1])
    return x, cond


def order_of(graph: dict) -> list[dict]:
    """The samplers from the latent to the decoder, by their links."""
    (decoder,) = (n for n in graph.values() if n["class_type"] == "VAEDecode")
    node, out = graph[decoder["inputs"]["samples"][0]], []
    while node["class_type"] == "KSamplerAdvanced":
        out.insert(0, node["inputs"])
        node = graph[node["inputs"]["latent_image"][0]]
    return out


@torch.no_grad()
def played(graph: dict, folder: Path, drawn: list[Tensor], cond) -> Tensor:
    """The samplers of a workflow, with diffusers' class and converter, by ComfyUI's rules:

    `simple` takes every so many of 1000 shifted levels. A sampler starts at s x noise + (1 - s) x latent, takes its own
    steps, and returns the result over 1 - s of the level that it leaves. Without noise of its own it starts at
    (1 - s) x latent.
    """
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    x, pending = torch.zeros(SHAPE), iter(drawn[1:])
    for node in order_of(graph):
        shifted = graph[node["model"][0]]["inputs"]
        state = load_file(folder / graph[shifted["model"][0]]["inputs"]["unet_name"])
        state = convert_wan_transformer_to_diffusers(state)
        blocks = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        config = {k: v for k, v in WAN.items() if not k.startswith("_")}
        channels = state["patch_embedding.weight"].shape[1]
        net = WanTransformer3DModel(**config | {"num_layers": blocks, "in_channels": channels}).eval()
        net.load_state_dict(state)
        shift, n = shifted["shift"], node["steps"]
        table = [shift * u / (1 + (shift - 1) * u) for u in ((i + 1) / 1000 for i in range(1000))]
        levels = [*(table[-(1 + int(i * 1000 / n))] for i in range(n)), 0.0]
        levels = levels[node["start_at_step"] : node["end_at_step"] + 1]
        assert (node["scheduler"], node["cfg"]) == ("simple", 1.0)
        x = (1 - levels[0]) * x + (levels[0] * drawn[0] if node["add_noise"] == "enable" else 0)
        for s, after in zip(levels, levels[1:], strict=False):
            seen = x if cond.image is None else torch.cat([x, cond.image], 1)
            v = net(seen, torch.tensor([1000 * s]), cond.text).sample
            if node["sampler_name"] == "euler":
                x = x + (after - s) * v
            else:
                noise = next(pending)
                x = (1 - after) * (x - s * v) + after * noise
        if node["return_with_leftover_noise"] == "enable":
            x = x / (1 - levels[-1])
    return x


def test_the_workflow_samples_as_we_do(student: Path, tmp_path):
    graph = run(student, tmp_path / "s.safetensors")
    first, second = order_of(graph)
    assert (first["start_at_step"], first["end_at_step"]) == (0, 2)  # 1 and .9375 lie above .875
    assert (second["start_at_step"], second["end_at_step"]) == (2, 4)
    drawn = noises(graph)
    assert len({tuple(noise.flatten()[:3].tolist()) for noise in drawn}) == len(drawn)  # no noise is used twice
    wanted, cond = ours(student, drawn)
    assert wanted.std() > 0.1
    torch.testing.assert_close(played(graph, tmp_path, drawn, cond), wanted, rtol=0, atol=1e-5)
    loaders = [node["inputs"]["unet_name"] for node in graph.values() if node["class_type"] == "UNETLoader"]
    assert loaders == ["s_high_noise.safetensors", "s_low_noise.safetensors"]
    picture = {"LoadImage", "WanImageToVideo"} & {node["class_type"] for node in graph.values()}
    assert bool(picture) == (cond.image is not None)
    assert "CLIPVisionEncode" not in {node["class_type"] for node in graph.values()}


def test_the_split_follows_the_boundary(tmp_path):
    for boundary, split in ((0.9375, 2), (0.95, 1), (0.6, 4)):
        folder = save(tmp_path / f"{boundary}", "t2v", "ode", boundary=boundary)
        steps = order_of(run(folder, tmp_path / f"{boundary}.safetensors"))
        assert [(s["start_at_step"], s["end_at_step"]) for s in steps] == [(0, split), (split, 4)]


def test_gguf(student: Path, tmp_path):
    import gguf

    graph = run(student, tmp_path / "s.gguf", "gguf")
    loaders = [n["inputs"] for n in graph.values() if n["class_type"] == "UnetLoaderGGUF"]
    assert loaders == [{"unet_name": "s_high_noise.gguf"}, {"unet_name": "s_low_noise.gguf"}]
    for expert in ("high", "low"):
        found = {t.name: t for t in gguf.GGUFReader(tmp_path / f"s_{expert}_noise.gguf").tensors}
        wanted = load_model(student / expert).state_dict()["blocks.0.ffn.net.2.weight"]
        tensor = found["blocks.0.ffn.2.weight"]
        error = (torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type)) - wanted).abs()
        limit = wanted.reshape(len(wanted), -1, 32).abs().amax(2, keepdim=True) / 127 * 0.51 + 1e-4
        assert (error.reshape(len(wanted), -1, 32) <= limit).all() and error.max() > 0
        assert f"blocks.{len(KEEP[expert])}.ffn.2.weight" not in found


def teacher_of(folder: Path, rank: int) -> None:
    """Teachers whose attention outputs differ from the students' by matrices of this rank, each expert's by another."""
    for seed, expert in enumerate(("high", "low")):
        torch.manual_seed(10 + seed)
        model = load_model(folder / "student" / expert).requires_grad_(False)
        for name, p in model.named_parameters():
            if name.endswith("attn1.to_out.0.weight"):
                p += 0.05 * torch.randn(len(p), rank) @ torch.randn(rank, p.shape[1])
        save_model(model, folder / "teacher" / expert, expert=expert, boundary=BOUNDARY, stage=0)


def test_lora(tmp_path, capsys):
    """Each file in the network of its own, by diffusers: its weights are the student's."""
    pytest.importorskip("peft")
    from diffusers import WanTransformer3DModel

    save(tmp_path / "student", "t2v", "ode", keep={"high": [0, 1, 2], "low": [0, 1, 2]})
    teacher_of(tmp_path, 2)
    words = [f"model={tmp_path / 'student'}", f"teacher={tmp_path / 'teacher'}", "to=lora", "rank=3", *WORDS]
    main(export, "export", [*words, f"out={tmp_path / 's.safetensors'}"])
    said = capsys.readouterr().out
    low = tmp_path / "s_low_noise.safetensors"
    assert f"load_lora_weights('{low}', load_into_transformer_2=True)" in said
    for expert in ("high", "low"):
        net = WanTransformer3DModel.from_pretrained(tmp_path / "teacher" / expert)
        wanted = load_model(tmp_path / "student" / expert).state_dict()
        key = "blocks.1.attn1.to_out.0.weight"
        assert (net.state_dict()[key] - wanted[key]).abs().max() > 0.01
        net.load_lora_adapter(load_file(tmp_path / f"s_{expert}_noise.safetensors"), prefix="transformer")
        net.fuse_lora()
        fused = {k.replace(".base_layer", ""): v for k, v in net.state_dict().items() if "lora_" not in k}
        assert all(torch.allclose(fused[k], v, atol=1e-5) for k, v in wanted.items())
        assert (tmp_path / f"s_{expert}_noise.comfyui.safetensors").is_file()


def test_a_teachers_lora_is_renumbered_for_each_expert(pipeline, tmp_path, capsys):
    """By hand: block b of an expert's LoRA holds the number b; its student kept other blocks than the other one."""
    source, model = pipeline("a14b"), make_pair(pipeline("a14b"), tmp_path / "model")
    key = "transformer.blocks.{}.attn1.to_q.lora_{}.weight"
    for name, size in (("first", 1.0), ("second", 100.0)):
        tensors = {key.format(b, "A"): torch.full((2, 24), size * b) for b in range(4)}
        save_file(tensors | {key.format(b, "B"): torch.ones(24, 2) for b in range(4)}, tmp_path / f"{name}.safetensors")
    words = [f"model={model}", f"pipeline={source}", f"out={tmp_path / 'out'}", "progress=false", *WORDS]
    files = [f"lora={tmp_path / 'first.safetensors'}", f"lora_2={tmp_path / 'second.safetensors'}"]
    main(export, "export", [*words, *files])
    said = capsys.readouterr().out
    assert "lora: 3 blocks renumbered, 1 dropped" in said and "lora_2: 2 blocks renumbered, 2 dropped" in said
    for file, kept in (("lora/first", [0.0, 2.0, 3.0]), ("lora_2/second", [100.0, 300.0])):
        found = load_file(tmp_path / f"out/{file}.safetensors")
        assert [found[key.format(b, "A")].unique().item() for b in range(len(kept))] == kept
        assert len(found) == 2 * len(kept)
    pytest.importorskip("peft")
    pipe = stock(tmp_path / "out")
    before = [net.blocks[1].attn1.to_q.weight.clone() for net in (pipe.transformer, pipe.transformer_2)]
    readme = (tmp_path / "out/README.md").read_text()
    for call in re.findall(r"`pipe\.load_lora_weights\((.*)\)`", readme):  # as the model card says
        exec(f"pipe.load_lora_weights({call})".replace('"out/', f'"{tmp_path}/out/'), {"pipe": pipe})
    pipe.fuse_lora(components=["transformer", "transformer_2"])
    nets = zip((pipe.transformer, pipe.transformer_2), before, (2 * 2.0, 2 * 300.0), strict=True)
    for net, weight, change in nets:  # B A, summed over the rank 2
        layer = net.blocks[1].attn1.to_q
        assert torch.allclose(layer.base_layer.weight, weight + change, rtol=1e-6)
    one = [f"model={make_student(pipeline('wan_t2v'), tmp_path / 'one')}", f"pipeline={pipeline('wan_t2v')}", *WORDS]
    line = error_line(capsys, lambda *w: main(export, "export", list(w)), *one, f"out={tmp_path / 'o2'}", files[1])
    assert "the model has one network; give the file as lora=" in line


def test_mistakes(tmp_path, capsys):
    folder = save(tmp_path / "model", "t2v", "ode")

    def said(*words: str) -> str:
        return error_line(capsys, lambda *w: main(export, "export", list(w)), *words)

    for to, end in (("comfyui", ".safetensors"), ("gguf", ".gguf"), ("onnx", "")):
        line = said(f"model={folder / 'low'}", f"to={to}", f"out={tmp_path / 'x'}{end}")
        assert "is the low-noise expert of two, which makes no clips alone; give the folder that holds both" in line
    assert "has two experts, and the folder's generate.py steps with one network; use to=diffusers" in said(
        f"model={folder}", "to=onnx", f"out={tmp_path / 'x'}"
    )
    (tmp_path / "y_low_noise.safetensors").write_text("mine")
    line = said(f"model={folder}", "to=comfyui", f"out={tmp_path / 'y.safetensors'}")
    assert "y_low_noise.safetensors: exists; delete it or give another name" in line
    assert not list(tmp_path.glob("y_high*")) and not list(tmp_path.glob("*.json"))
    one = save_model(build(CONFIGS["t2v"]), tmp_path / "one")
    words = [f"model={folder}", "to=lora", f"out={tmp_path / 'z.safetensors'}"]
    assert "number of networks 1, the student's 2; give the student's teacher" in said(*words, f"teacher={one}")


@pytest.mark.skipif(not os.environ.get("FLG_COMFYUI"), reason="FLG_COMFYUI names no checkout of ComfyUI")
@torch.no_grad()
def test_comfyui_itself(tmp_path, monkeypatch):
    """Its unmodified loader and samplers take the steps of the workflow, on a CPU in float32."""
    monkeypatch.setattr(sys, "argv", ["x", "--cpu", "--force-fp32"])
    monkeypatch.syspath_prepend(os.environ["FLG_COMFYUI"])
    from comfy import options

    options.enable_args_parsing()  # of sys.argv
    from comfy import sample, sd
    from comfy.k_diffusion import sampling
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    folder = save(tmp_path / "model", "t2v", "stochastic")
    graph = run(folder, tmp_path / "s.safetensors")
    latent = torch.zeros(SHAPE)

    def fresh(seed: int) -> Callable[[], Tensor]:
        return partial(sampling.default_noise_sampler(latent, seed), None, None)

    drawn = noises(graph, fresh)
    wanted, cond = ours(folder, drawn)
    for node in order_of(graph):
        shifted = graph[node["model"][0]]["inputs"]
        net = sd.load_diffusion_model(str(tmp_path / graph[shifted["model"][0]]["inputs"]["unet_name"]))
        (net,) = ModelSamplingSD3().patch(net, shifted["shift"])
        alone = node["add_noise"] == "disable"
        noise = torch.zeros(SHAPE) if alone else sample.prepare_noise(latent, node["noise_seed"])
        latent = sample.sample(
            net, noise, node["steps"], node["cfg"], node["sampler_name"], node["scheduler"], [[cond.text, {}]],
            [[cond.text, {}]], latent, disable_noise=alone, start_step=node["start_at_step"],
            last_step=node["end_at_step"], force_full_denoise=node["return_with_leftover_noise"] == "disable",
            seed=node["noise_seed"], disable_pbar=True,
        )  # fmt: skip
    torch.testing.assert_close(net.model.process_latent_in(latent), wanted, rtol=0, atol=1e-5)

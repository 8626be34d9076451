"""HunyuanVideo-1.5's presets, original format, and plan; which weights and configurations are its own."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from helpers import counted
from hunyuan15_cases import BASE, TASKS, network
from safetensors.torch import load_file

from fastlightgen.config import preset
from fastlightgen.models.families import network as planned
from fastlightgen.models.families import recognise
from fastlightgen.models.folder.original import from_original, original_config, save_original
from fastlightgen.models.folder.weights import build, load_model
from fastlightgen.models.hunyuan15.cost import hunyuan15
from fastlightgen.parallel.shares import WHOLE
from fastlightgen.planner.walk import Route, walk

# config.json of the original 480p_t2v, and what 480p_i2v and 720p change.
ORIGINAL = {
    "_class_name": "HunyuanVideo_1_5_DiffusionTransformer", "_diffusers_version": "0.35.0", "attn_mode": "flash",
    "attn_param": None, "concat_condition": True, "glyph_byT5_v2": True, "guidance_embed": False, "heads_num": 16,
    "hidden_size": 2048, "ideal_resolution": "480p", "ideal_task": "t2v", "in_channels": 32,
    "is_reshape_temporal_channels": False, "mlp_act_type": "gelu_tanh", "mlp_width_ratio": 4,
    "mm_double_blocks_depth": 54, "mm_single_blocks_depth": 0, "out_channels": 32, "patch_size": [1, 1, 1],
    "qk_norm": True, "qk_norm_type": "rms", "qkv_bias": True, "rope_dim_list": [16, 56, 56], "rope_theta": 256,
    "text_pool_type": None, "text_projection": "single_refiner", "text_states_dim": 3584, "text_states_dim_2": None,
    "use_attention_mask": True, "use_cond_type_embedding": True, "use_meanflow": False, "vision_projection": "linear",
    "vision_states_dim": 1152,
}  # fmt: skip


def test_the_original_configurations():
    for task in TASKS:
        with torch.device("meta"):
            got = build(from_original(ORIGINAL | {"ideal_task": task})).cfg
            assert got == build(preset(f"hunyuanvideo1.5-{task}")["network"]).cfg
            large = build(from_original(ORIGINAL | {"ideal_task": task, "ideal_resolution": "720p"})).cfg
        assert got.released["shift"] == 5.0 and large == replace(got, target_size=960)
        assert large.released["shift"] == {"t2v": 9.0, "i2v": 7.0}[task]
        assert (
            original_config(asdict(large) | {"_class_name": "HunyuanVideo15Transformer3DModel"}).items()
            <= (ORIGINAL | {"ideal_task": task, "ideal_resolution": "720p"}).items()
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_mode": "flex-block-attn"}, "attn_mode is 'flex-block-attn', the attention of a sparse network; only"),
        ({"use_meanflow": True}, "use_meanflow is true: a step-distilled or super-resolution network"),
        ({"guidance_embed": True}, "guidance_embed is True; only False is supported"),
        ({"ideal_resolution": "1080p"}, "ideal_resolution is '1080p'; wanted '480p' or '720p'"),
        ({"mm_single_blocks_depth": 2}, "mm_single_blocks_depth is 2; only 0 is supported"),
        ({"text_pool_type": "clip"}, "text_pool_type='clip' is not a key of HunyuanVideo_1_5_DiffusionTransformer"),
    ],
)
def test_other_original_networks_are_refused_by_name(tmp_path, changes: dict, message: str):
    (tmp_path / "config.json").write_text(json.dumps(ORIGINAL | changes))
    with pytest.raises(ValueError, match=message) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [None, [0, 3]])
def test_the_original_format_there_and_back(tmp_path, keep: list[int] | None):
    model = network({"num_refiner_layers": 2, "text_embed_2_dim": 1472} | TASKS["i2v"])
    model = model if keep is None else model.prune(keep)
    folder = save_original(model, tmp_path / "m")
    stored, again = load_file(folder / "diffusion_pytorch_model.safetensors"), load_model(folder)
    assert (
        "double_blocks.1.txt_attn_k.weight" in stored
        and "txt_in.individual_token_refiner.blocks.1.norm1.bias" in stored
    )
    assert recognise(stored) == "HunyuanVideo-1.5 (original format)"
    # Tencent's final layer has shift before scale.
    scale, shift = model.norm_out.linear.weight.chunk(2)
    assert torch.equal(stored["final_layer.adaLN_modulation.1.weight"], torch.cat([shift, scale]))
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_the_presets_have_the_published_size():
    diffusers = pytest.importorskip("diffusers")
    for task in TASKS:
        config = preset(f"hunyuanvideo1.5-{task}")["network"]
        with torch.device("meta"):
            model = build(config)
            theirs = diffusers.HunyuanVideo15Transformer3DModel(
                **{k: v for k, v in config.items() if k != "_class_name"}
            )

        def size(m) -> int:
            return sum(p.numel() for p in m.parameters())

        assert size(model) == size(theirs) == planned(config, (3, 4, 4)).params == 8_326_608_160
        assert {size(b) for b in model.blocks} == {151_056_896} and model.num_blocks == 54


@pytest.mark.parametrize("heads", [None, 1])
@pytest.mark.parametrize("task", TASKS)
def test_the_plan_counts_what_torch_counts(task: str, heads: int | None):
    """Operations of a forward and a backward pass; the prompt has no quoted words, and the picture 9 tokens."""
    config = BASE | TASKS[task] | ({} if heads is None else {"kept_attention_heads": heads})
    model = build(config, 0)
    x_t, t, cond, _ = model.example_inputs(1, size=(3, 3, 4))
    cond = replace(cond, text_len=None, text_2=None, text_2_len=None)
    net = hunyuan15(model.config, (3, 3, 4), cond.text.shape[1], True, WHOLE, picture=9)
    cost = walk(net, [Route(grad=True)])
    with torch.no_grad():
        assert counted(lambda: model(x_t, t, cond)) == cost.forward
    # The text's half of the last block has no gradient, and the plan counts one for all blocks.
    assert counted(lambda: model(x_t, t, cond).sum().backward()) == pytest.approx(cost.flops, rel=0.05)
    assert net.params == sum(p.numel() for p in model.parameters())


def test_weights_are_told_from_hunyuanvideos():
    assert recognise(network({}).state_dict()) == "HunyuanVideo-1.5 (diffusers format)"
    other = build(preset("tiny-hunyuan")["network"], 0)
    assert recognise(other.state_dict()) == "HunyuanVideo (diffusers format)"

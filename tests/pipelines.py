"""Very small diffusers pipelines with all parts of a real one, built offline: `wan_t2v(folder)` and so on.

Weights are random but fixed by a seed. Running a Wan image-to-video pipeline needs ftfy. The fixture `pipeline`
(conftest.py) builds each kind once per session.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from pipeline_parts import (
    HUNYUAN,
    HUNYUAN15,
    IMAGE_DIM,
    TEXT_DIM,
    WAN,
    clip_processor,
    hunyuan_parts,
    llama_config,
    qwen_tokenizer,
    wan_parts,
)


def seeded(seed: int):
    """Decorator: draw the weights from `seed` without changing the caller's random state."""

    def wrap(build: Callable) -> Callable:
        @functools.wraps(build)
        def run(*args) -> Path:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return build(*args)

        return run

    return wrap


@seeded(0)
def wan_t2v(folder: Path) -> Path:
    """WanPipeline: UMT5, AutoencoderKLWan, UniPC with shift 3."""
    from diffusers import WanPipeline, WanTransformer3DModel

    parts = wan_parts()
    return save(WanPipeline(transformer=WanTransformer3DModel(**WAN), **parts), folder)


@seeded(1)
def wan_i2v(folder: Path) -> Path:
    """WanImageToVideoPipeline: as wan_t2v, with a CLIP vision encoder and 36 channels."""
    from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
    from transformers import CLIPVisionConfig, CLIPVisionModel

    parts = wan_parts()
    network = WAN | {"in_channels": 36, "image_dim": IMAGE_DIM, "added_kv_proj_dim": 24}
    vision = CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    pipe = WanImageToVideoPipeline(
        transformer=WanTransformer3DModel(**network),
        image_encoder=CLIPVisionModel(vision),
        image_processor=clip_processor(28),
        **parts,
    )
    return save(pipe, folder)


def ti2v_parts() -> dict:
    """As wan_parts, with a VAE of Wan2.2's kind (48 channels, 4 x 16 x 16), and its network."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    statistics = {"latents_mean": [0.1 * (i % 5 - 2) for i in range(48)]}
    statistics["latents_std"] = [0.5 + 0.01 * i for i in range(48)]
    vae = AutoencoderKLWan(
        base_dim=8, decoder_base_dim=8, z_dim=48, dim_mult=[1, 1, 1, 1], num_res_blocks=1, is_residual=True,
        in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16, **statistics,
    )  # fmt: skip
    network = WanTransformer3DModel(**WAN | {"in_channels": 48, "out_channels": 48})
    return wan_parts() | {"vae": vae, "transformer": network, "expand_timesteps": True}


def a14b_parts(**changes) -> dict:
    """The parts of Wan2.2 A14B: two networks with other weights, which meet at a boundary; no CLIP."""
    from diffusers import WanTransformer3DModel

    high, low = (WanTransformer3DModel(**WAN | changes) for _ in range(2))
    return wan_parts() | {"transformer": high, "transformer_2": low}


@seeded(5)
def a14b(folder: Path) -> Path:
    """WanPipeline with two experts."""
    from diffusers import WanPipeline

    return save(WanPipeline(boundary_ratio=0.875, **a14b_parts()), folder)


@seeded(6)
def a14b_i2v(folder: Path) -> Path:
    """WanImageToVideoPipeline with two experts and 36 channels."""
    from diffusers import WanImageToVideoPipeline

    parts = a14b_parts(in_channels=36)
    return save(WanImageToVideoPipeline(image_encoder=None, image_processor=None, boundary_ratio=0.9, **parts), folder)


@seeded(4)
def ti2v(folder: Path) -> Path:
    """WanPipeline with a time per token, which also takes a first frame."""
    from diffusers import WanPipeline

    return save(WanPipeline(**ti2v_parts()), folder)


@seeded(4)
def ti2v_i2v(folder: Path) -> Path:
    """WanImageToVideoPipeline with a time per token."""
    from diffusers import WanImageToVideoPipeline

    return save(WanImageToVideoPipeline(image_encoder=None, image_processor=None, **ti2v_parts()), folder)


@seeded(2)
def hunyuan_t2v(folder: Path) -> Path:
    """HunyuanVideoPipeline: Llama, CLIP text, AutoencoderKLHunyuanVideo, embedded guidance."""
    from diffusers import HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
    from transformers import LlamaModel

    parts = hunyuan_parts()
    encoder = LlamaModel(llama_config(parts["tokenizer"]))
    network = HunyuanVideoTransformer3DModel(in_channels=16, out_channels=16, guidance_embeds=True, **HUNYUAN)
    return save(HunyuanVideoPipeline(transformer=network, text_encoder=encoder, **parts), folder)


@seeded(3)
def hunyuan_i2v(folder: Path, condition: str = "latent_concat") -> Path:
    """HunyuanVideoImageToVideoPipeline with Llava; condition: latent_concat (33 channels) or token_replace (16)."""
    from diffusers import HunyuanVideoImageToVideoPipeline, HunyuanVideoTransformer3DModel
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    parts = hunyuan_parts()
    tokenizer = parts["tokenizer"]
    vision = CLIPVisionConfig(  # 24 x 24 patches: the pipeline requires 576 image tokens
        hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=336, patch_size=14
    )
    llava = LlavaConfig(
        vision_config=vision,
        text_config=llama_config(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    concat = condition == "latent_concat"
    network = HunyuanVideoTransformer3DModel(
        in_channels=33 if concat else 16,
        out_channels=16,
        guidance_embeds=not concat,
        image_condition_type=condition,
        **HUNYUAN,
    )
    pipe = HunyuanVideoImageToVideoPipeline(
        transformer=network,
        text_encoder=LlavaForConditionalGeneration(llava),
        image_processor=clip_processor(336),
        **parts,
    )
    return save(pipe, folder)


def hunyuan_i2v_token(folder: Path) -> Path:
    return hunyuan_i2v(folder, "token_replace")


def hunyuan15_parts(**changes) -> dict:
    """Qwen2.5-VL's language model, ByT5, AutoencoderKLHunyuanVideo15, a guider, and the network."""
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        ClassifierFreeGuidance,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideo15Transformer3DModel,
    )
    from transformers import ByT5Tokenizer, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, T5Config, T5EncoderModel

    tokenizer = qwen_tokenizer()
    text = Qwen2_5_VLTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_DIM, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
    )  # fmt: skip
    glyphs = T5Config(vocab_size=384, d_model=1472, d_kv=8, d_ff=16, num_layers=2, num_heads=2, pad_token_id=0)
    return {
        "tokenizer": tokenizer,
        "text_encoder": Qwen2_5_VLTextModel(text),
        "tokenizer_2": ByT5Tokenizer(),
        "text_encoder_2": T5EncoderModel(glyphs),
        "vae": AutoencoderKLHunyuanVideo15(block_out_channels=(16, 16, 32, 64, 64), layers_per_block=1),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "guider": ClassifierFreeGuidance(guidance_scale=6.0),
        "transformer": HunyuanVideo15Transformer3DModel(**HUNYUAN15 | changes),
    }


@seeded(7)
def hunyuan15_t2v(folder: Path) -> Path:
    """HunyuanVideo15Pipeline."""
    from diffusers import HunyuanVideo15Pipeline

    return save(HunyuanVideo15Pipeline(**hunyuan15_parts(task_type="t2v")), folder)


@seeded(8)
def hunyuan15_i2v(folder: Path) -> Path:
    """HunyuanVideo15ImageToVideoPipeline, for clips of 64 x 64 pixels."""
    from diffusers import HunyuanVideo15ImageToVideoPipeline
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    vision = SiglipVisionConfig(  # 27 x 27 patches, as in the real one
        hidden_size=IMAGE_DIM, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=378,
        patch_size=14,
    )  # fmt: skip
    pipe = HunyuanVideo15ImageToVideoPipeline(
        image_encoder=SiglipVisionModel(vision),
        feature_extractor=SiglipImageProcessor(size={"height": 378, "width": 378}),
        **hunyuan15_parts(task_type="i2v", target_size=64),
    )
    return save(pipe, folder)


KINDS: dict[str, Callable[[Path], Path]] = {
    f.__name__: f
    for f in (
        wan_t2v,
        wan_i2v,
        a14b,
        a14b_i2v,
        ti2v,
        ti2v_i2v,
        hunyuan_t2v,
        hunyuan_i2v,
        hunyuan_i2v_token,
        hunyuan15_t2v,
        hunyuan15_i2v,
    )  # fmt: skip
}


def save(pipe, folder: Path) -> Path:
    pipe.save_pretrained(folder)
    return folder

"""HunyuanVideo-1.5 in ComfyUI: what its code assumes, the keys of its files, and the nodes around the network."""

from collections.abc import Mapping
from functools import partial

from fastlightgen.models.graph import Comfy, Graph, Inputs, embedded, output, picture, prompts, size_of
from fastlightgen.models.hunyuan15.keys import hunyuan15_keys


def inputs(graph: Graph, config: Mapping, shape: tuple[int, int, int], guidance: float) -> Inputs:
    """Both text encoders, the VAE and, for image-to-video, the first frame."""
    files = ("qwen_2.5_vl_7b_fp8_scaled.safetensors", "byt5_small_glyphxl_fp16.safetensors")
    clip = graph.add("DualCLIPLoader", clip_name1=files[0], clip_name2=files[1], type="hunyuan_video_15")
    vae = graph.add("VAELoader", vae_name="hunyuanvideo15_vae_fp16.safetensors")
    positive, negative = prompts(graph, clip)
    if config["task_type"] == "t2v":
        return Inputs(positive, negative, graph.add("EmptyHunyuanVideo15Latent", **size_of(shape)), vae)
    image = picture(graph)
    seen = embedded(graph, image, "sigclip_vision_patch14_384.safetensors")
    given = {"positive": positive, "negative": negative, "vae": vae, "start_image": image, "clip_vision_output": seen}
    both = graph.add("HunyuanVideo15ImageToVideo", **given, **size_of(shape))
    return Inputs(both, output(both, 1), output(both, 2), vae)


COMFY = Comfy(
    assumes={
        "attention_head_dim": 128,
        "mlp_ratio": 4.0,
        "rope_axes_dim": (16, 56, 56),
        "rope_theta": 256.0,
        "num_refiner_layers": 2,
        "text_embed_2_dim": 1472,
    },
    inputs=inputs,
    gguf="hyvid",
    float8=False,  # it renames the keys of its files, and not the names of the float8 layers
    keys=partial(hunyuan15_keys, fused=True),
)

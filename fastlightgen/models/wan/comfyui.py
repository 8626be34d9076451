"""Wan in ComfyUI: what its code assumes, and the nodes around the network."""

from collections.abc import Mapping

from fastlightgen.models.graph import Comfy, Graph, Inputs, embedded, output, picture, prompts, size_of


def inputs(graph: Graph, config: Mapping, shape: tuple[int, int, int], guidance: float) -> Inputs:
    """Text encoder, VAE, and for image-to-video the first frame, for Wan2.1 with its CLIP embedding."""
    clip = graph.add("CLIPLoader", clip_name="umt5_xxl_fp8_e4m3fn_scaled.safetensors", type="wan")
    positive, negative = prompts(graph, clip)
    vae = graph.add("VAELoader", vae_name="wan_2.1_vae.safetensors")
    if config["in_channels"] == config["out_channels"]:
        latent = graph.add("EmptyHunyuanLatentVideo", **size_of(shape))  # the same latents: 16 channels, 4 x 8 x 8
        return Inputs(positive, negative, latent, vae)
    image = picture(graph)
    seen = {"clip_vision_output": embedded(graph, image, "clip_vision_h.safetensors")} if config["image_dim"] else {}
    start = graph.add(
        "WanImageToVideo",
        positive=positive,
        negative=negative,
        vae=vae,
        start_image=image,
        **seen,
        **size_of(shape),
    )
    return Inputs(start, output(start, 1), output(start, 2), vae)


COMFY = Comfy(
    assumes={
        "attention_head_dim": 128,
        "text_dim": 4096,
        "freq_dim": 256,
        "patch_size": (1, 2, 2),
        "out_channels": 16,
        "cross_attn_norm": True,
        "eps": 1e-6,
    },
    inputs=inputs,
    gguf="wan",
    float8=True,
)

"""HunyuanVideo in ComfyUI: what its code assumes, and the nodes around the network."""

from collections.abc import Mapping

from fastlightgen.models.graph import PROMPT, Comfy, Graph, Inputs, embedded, output, picture, size_of

INTERLEAVE = 4  # ComfyUI's own workflow: of the picture's tokens, every fourth stands before the prompt
KINDS = {"latent_concat": "v1 (concat)", "token_replace": "v2 (replace)"}


def inputs(graph: Graph, config: Mapping, shape: tuple[int, int, int], guidance: float) -> Inputs:
    """Both text encoders, the VAE, the guidance that the network reads, and for image-to-video the first frame."""
    files = ("clip_l.safetensors", "llava_llama3_fp8_scaled.safetensors")
    clip = graph.add("DualCLIPLoader", clip_name1=files[0], clip_name2=files[1], type="hunyuan_video")
    vae = graph.add("VAELoader", vae_name="hunyuan_video_vae_bf16.safetensors")
    negative = graph.add("CLIPTextEncode", text="", clip=clip)
    kind = config["image_condition_type"]
    if kind is None:
        positive = graph.add("CLIPTextEncode", text=PROMPT, clip=clip)
        latent = graph.add("EmptyHunyuanLatentVideo", **size_of(shape))
    else:
        image = picture(graph)
        seen = embedded(graph, image, "llava_llama3_vision.safetensors")
        text = {"clip": clip, "clip_vision_output": seen, "prompt": PROMPT, "image_interleave": INTERLEAVE}
        read = graph.add("TextEncodeHunyuanVideo_ImageToVideo", **text)
        given = {"positive": read, "vae": vae, "guidance_type": KINDS[kind], "start_image": image}
        positive = graph.add("HunyuanImageToVideo", **given, **size_of(shape))
        latent = output(positive, 1)
    if config["guidance_embeds"]:
        positive = graph.add("FluxGuidance", guidance=guidance, conditioning=positive)
    return Inputs(positive, negative, latent, vae)


COMFY = Comfy(
    assumes={
        "attention_head_dim": 128,
        "mlp_ratio": 4.0,
        "pooled_projection_dim": 768,
        "rope_axes_dim": (16, 56, 56),
        "rope_theta": 256.0,
        "num_refiner_layers": 2,
    },
    inputs=inputs,
    gguf="hyvid",
    float8=False,  # it renames the keys of the original format, and not the names of the float8 layers
)

"""Wan2.2 TI2V in ComfyUI: what its code assumes, and the nodes around the network."""

from collections.abc import Mapping
from dataclasses import replace

from fastlightgen.models.graph import Graph, Inputs, prompts, size_of
from fastlightgen.models.wan.comfyui import COMFY as WAN
from fastlightgen.models.wan_ti2v.config import CHANNELS


def inputs(graph: Graph, config: Mapping, shape: tuple[int, int, int], guidance: float) -> Inputs:
    """Text encoder, VAE and latent. A picture at the latent node's `start_image` makes it image-to-video."""
    clip = graph.add("CLIPLoader", clip_name="umt5_xxl_fp8_e4m3fn_scaled.safetensors", type="wan")
    positive, negative = prompts(graph, clip)
    vae = graph.add("VAELoader", vae_name="wan2.2_vae.safetensors")
    latent = graph.add("Wan22ImageToVideoLatent", vae=vae, **size_of(shape))
    return Inputs(positive, negative, latent, vae)


COMFY = replace(WAN, assumes={**WAN.assumes, "in_channels": CHANNELS, "out_channels": CHANNELS}, inputs=inputs)

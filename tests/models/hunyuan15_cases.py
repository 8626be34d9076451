"""Very small networks of HunyuanVideo-1.5."""

import torch

from fastlightgen.models.families import build
from fastlightgen.models.hunyuan15.model import Hunyuan15Model

BASE = {"_class_name": "HunyuanVideo15Transformer3DModel", "num_attention_heads": 2, "attention_head_dim": 12}
BASE |= {"rope_axes_dim": [4, 4, 4], "text_embed_dim": 20, "text_embed_2_dim": 14, "image_embed_dim": 10}
BASE |= {"num_layers": 4, "in_channels": 65, "out_channels": 32}
TASKS = {"t2v": {"task_type": "t2v"}, "i2v": {"task_type": "i2v"}}


def network(changes: dict, seed: int = 1) -> Hunyuan15Model:
    """A network with random weights, biases and norms included, which start small or as the identity."""
    model = build(BASE | changes, seed)
    assert isinstance(model, Hunyuan15Model)
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += (0.3 if "norm" in name or "bias" in name else 0.02) * torch.randn(p.shape, generator=gen)
    return model

"""The "stock" classes of the invented family Ribbon: tiny diffusers classes that share no code with tests/ribbon.py.

Shapes: B batch, F H W latent, L tokens, T text tokens, D hidden, S mood.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn


class RibbonTransformer(ModelMixin, ConfigMixin):
    """The same network, written a second time without this package."""

    @register_to_config
    def __init__(
        self, in_channels=8, num_attention_heads=2, attention_head_dim=8, num_layers=4, text_dim=6, mood_dim=3
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.x_in, self.text_in = nn.Linear(4 * in_channels, dim), nn.Linear(text_dim, dim)
        self.time_in, self.mood_in = nn.Linear(8, dim), nn.Linear(mood_dim, dim)
        names = ("to_q", "to_k", "to_v", "to_out")
        layers = [{n: nn.Linear(dim, dim) for n in names} | {"mod": nn.Linear(dim, 3 * dim)} for _ in range(num_layers)]
        self.blocks = nn.ModuleList(nn.ModuleDict(block) for block in layers)
        self.proj_out = nn.Linear(dim, 4 * in_channels)

    def forward(self, hidden_states, timestep, mood, encoder_hidden_states, text_length, return_dict=True):
        (b, c, f, h, w), heads = hidden_states.shape, self.config.num_attention_heads
        patches = F.unfold(hidden_states.transpose(1, 2).reshape(b * f, c, h, w), 2, stride=2)  # [B F, 4 C, H W / 4]
        x = self.x_in(patches.transpose(1, 2).reshape(b, -1, 4 * c))
        freq = torch.tensor([10000 ** (-i / 4) for i in range(4)])
        wave = timestep.float()[..., None] * freq
        time = self.time_in(torch.cat([wave.cos(), wave.sin()], -1).to(x.dtype))  # [B, F, D]
        emb = F.silu((time + self.mood_in(mood)[:, None]).repeat_interleave(h * w // 4, 1))
        text = self.text_in(encoder_hidden_states)
        read = torch.ones(b, 1, 1, x.shape[1] + text.shape[1], dtype=torch.bool)
        for i, n in enumerate(text_length.tolist()):
            read[i, ..., x.shape[1] + n :] = False
        for block in self.blocks:
            shift, scale, gate = block["mod"](emb).chunk(3, -1)
            y = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
            q, k, v = (
                block[n](z).view(b, -1, heads, x.shape[-1] // heads).transpose(1, 2)
                for n, z in (("to_q", y), ("to_k", torch.cat([y, text], 1)), ("to_v", torch.cat([y, text], 1)))
            )
            scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~read, -torch.inf)
            x = x + gate * block["to_out"]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        out = self.proj_out(F.layer_norm(x, x.shape[-1:])).view(b * f, -1, 4 * c).transpose(1, 2)
        return (F.fold(out, (h, w), 2, stride=2).view(b, f, c, h, w).transpose(1, 2),)


class RibbonVAE(ModelMixin, ConfigMixin):
    """Averages colours over patches of 16 x 16 pixels and over 1 (first) or 4 frames, as 8 channels."""

    @register_to_config
    def __init__(self, shift=0.2, scale=3.0):
        super().__init__()
        self.mix = nn.Parameter(torch.linalg.qr(torch.randn(8, 3))[0])

    def encode(self, video: Tensor):
        parts = [video[:, :, :1], video[:, :, 1:]][: 1 + (video.shape[2] > 1)]
        means = [F.avg_pool3d(v, (min(4, v.shape[2]), 16, 16)) for v in parts]
        z = torch.einsum("zc,bcfhw->bzfhw", self.mix, torch.cat(means, 2))
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: z))

    def decode(self, z: Tensor, return_dict: bool = True):
        colours = torch.einsum("zc,bzfhw->bcfhw", self.mix, z).repeat_interleave(16, 3).repeat_interleave(16, 4)
        return (torch.cat([colours[:, :, :1], colours[:, :, 1:].repeat_interleave(4, 2)], 2),)

    def enable_tiling(self) -> None:
        """Tiling is not needed at this size."""


class RibbonText(ModelMixin, ConfigMixin):
    """Encodes every letter as a vector, and the prompt's mood: fraction of vowels, fraction of spaces, length."""

    @register_to_config
    def __init__(self, text_dim=6):
        super().__init__()
        self.letters = nn.Parameter(torch.randn(256, text_dim))


class RibbonPipeline(DiffusionPipeline):
    def __init__(self, vae, text_encoder, transformer, scheduler):
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, transformer=transformer, scheduler=scheduler)

    def encode_prompt(self, prompt: str, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        letters = list(prompt.encode()[: tokens - 1]) + [0]
        text = F.pad(self.text_encoder.letters[letters], (0, 0, 0, tokens - len(letters)))
        mood = torch.tensor([sum(map(prompt.count, "aeiou")), prompt.count(" "), len(prompt)]) / max(1, len(prompt))
        return text, torch.tensor(len(letters)), mood.float()

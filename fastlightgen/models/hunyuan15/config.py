"""The configuration of HunyuanVideo-1.5's transformer, and its conditions.

Shapes: B batch, T tokens of Qwen2.5-VL, G tokens of ByT5 (the quoted words of a prompt), I tokens of SigLIP.
"""

from dataclasses import dataclass

from torch import Tensor

from fastlightgen.models.base import Cond
from fastlightgen.models.hunyuan.layers import JointConfig

TASKS = ("t2v", "i2v")
SHIFT, SHIFTS = 5.0, {("t2v", 960): 9.0, ("i2v", 960): 7.0}  # of the released weights; (task, target size): at 720p


@dataclass(frozen=True)
class Hunyuan15Config(JointConfig):
    """The fields of diffusers' HunyuanVideo15Transformer3DModel config.json."""

    title = "HunyuanVideo-1.5"

    in_channels: int = 65
    out_channels: int = 32
    num_attention_heads: int = 16
    num_layers: int = 54
    patch_size: int = 1
    text_embed_dim: int = 3584
    text_embed_2_dim: int = 1472
    image_embed_dim: int = 1152
    target_size: int = 640  # the pixels of a square with the area of the clips that it was trained on
    task_type: str = "i2v"
    use_meanflow: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.one_of("task_type", *TASKS)
        if self.use_meanflow:
            raise ValueError(
                f"{self.title} config: use_meanflow is true: a step-distilled or super-resolution network, which reads "
                "a second time; give the network that it was distilled from (480p_t2v, 480p_i2v, 720p_t2v, 720p_i2v)"
            )
        if self.in_channels != (wanted := 2 * self.out_channels + 1):
            raise ValueError(
                f"{self.title} config: in_channels is {self.in_channels}; wanted {wanted}: latent, first frame and mask"
            )

    @property
    def pictured(self) -> bool:
        return self.task_type == "i2v"

    @property
    def extra_channels(self) -> int:
        """Condition channels: the latents of the first frame, and a mask."""
        return self.in_channels - self.out_channels

    @property
    def released(self) -> dict[str, float]:
        return {"steps": 50, "guidance": 6.0, "shift": SHIFTS.get((self.task_type, self.target_size), SHIFT)}


@dataclass(frozen=True, eq=False)
class Hunyuan15Cond(Cond):
    """Conditions with a second text. `image` None stands for zeros, `image_embeds` None for no picture."""

    text_fields = (*Cond.text_fields, "text_2", "text_2_len")

    text_2: Tensor | None = None  # [B, G, C]
    text_2_len: Tensor | None = None  # [B], 0 for a prompt without quoted words; None: G

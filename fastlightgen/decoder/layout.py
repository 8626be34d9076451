"""Which tensors of a VAE's decoder share which channels, for diffusers' AutoencoderKLWan and AutoencoderKLHunyuanVideo.

An axis is a set of channels with one name. A residual stream is an axis, and so is what the first convolution of a
residual block passes to the second. Removing a channel removes its slice from every tensor that has the axis.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

Sides = tuple[str, ...]  # the axes that lie one after the other along a dimension of a tensor; () : it stays
OWN = ("decoder_base_dim", "num_res_blocks", "block_out_channels", "layers_per_block", "norm_num_groups")


@dataclass
class Layout:
    """The axes of a decoder and the tensors that have them."""

    sides: dict[str, tuple[Sides, Sides]] = field(default_factory=dict)  # tensor -> axes of dimensions 0 and 1
    sizes: dict[str, int] = field(default_factory=dict)  # axis -> its channels
    units: dict[str, int] = field(default_factory=dict)  # axis -> channels that stay or go together, if not 1
    # (tensor, segment of dimension 0, axis, power): after pruning, times (channels left / channels before)**power.
    scaled: list[tuple[str, int, str, float]] = field(default_factory=list)

    def add(self, decoder: nn.Module, name: str, out: Sides, into: Sides = ()) -> None:
        """Note the axes of the weight and the bias of a layer, or of one parameter of that name."""
        tensors = {key for key, _ in decoder.named_parameters() if key == name or key.rpartition(".")[0] == name}
        assert tensors, name
        for key in tensors:
            shape = decoder.get_parameter(key).shape
            self.sides[key] = (out, into if len(shape) > 1 else ())
            for dim, axes in enumerate(self.sides[key]):
                for axis in axes:
                    size = shape[dim] // len(axes)
                    assert self.sizes.setdefault(axis, size) == size, (key, axis)


def has_shortcut(resnet: nn.Module) -> bool:
    """Whether a residual block has a convolution beside its branch, because it changes the number of channels."""
    return isinstance(resnet.conv_shortcut, nn.Module) and not isinstance(resnet.conv_shortcut, nn.Identity)


class Tracer:
    """Follows the residual stream through a decoder and notes the axes of every layer."""

    def __init__(self, decoder: Any, conv: str, norm: str, group: int):
        """`conv`, `norm`: what follows the name of a convolution, of a norm; `group`: groups of a norm, 0 without."""
        self.decoder, self.conv, self.norm, self.groups = decoder, conv, norm, group
        self.layout, self.stream = Layout(), "stream0"

    def branch_off(self) -> str:
        """A new name for the stream."""
        return f"stream{int(self.stream.removeprefix('stream')) + 1}"

    def add(self, name: str, out: Sides, into: Sides = ()) -> None:
        self.layout.add(self.decoder, name, out, into)

    def normed(self, name: str, axis: str) -> None:
        """A norm over the channels of an axis.

        Wan's divides by the root mean square over all channels, so fewer channels change its scale. GroupNorm keeps
        its statistics if whole groups go.
        """
        self.add(name + self.norm, (axis,))
        size = self.layout.sizes[axis]
        if self.groups:
            self.layout.units[axis] = size // self.groups
        else:
            self.layout.scaled.append((name + self.norm, 0, axis, -0.5))

    def resnet(self, name: str, block: nn.Module) -> None:
        """norm1, conv1, norm2, conv2, and a convolution beside them if the number of channels changes."""
        inner, out = f"{name}.inner", self.branch_off() if has_shortcut(block) else self.stream
        self.normed(f"{name}.norm1", self.stream)
        self.add(f"{name}.conv1{self.conv}", (inner,), (self.stream,))
        self.normed(f"{name}.norm2", inner)
        self.add(f"{name}.conv2{self.conv}", (out,), (inner,))
        if has_shortcut(block):
            self.add(f"{name}.conv_shortcut{self.conv}", (out,), (self.stream,))
        self.stream = out

    def resnets(self, name: str, block: Any) -> None:
        for j, resnet in enumerate(block.resnets):
            self.resnet(f"{name}.resnets.{j}", resnet)


def wan(decoder: Any) -> Layout:
    """AutoencoderKLWan of Wan 2.1: RMS norms, one attention, upsampling that halves the channels."""
    trace = Tracer(decoder, "", ".gamma", 0)
    trace.add("conv_in", (trace.stream,))
    mid, layout = decoder.mid_block, trace.layout
    trace.resnet("mid_block.resnets.0", mid.resnets[0])
    for j, resnet in enumerate(mid.resnets[1:]):
        name = f"mid_block.attentions.{j}"
        trace.normed(f"{name}.norm", trace.stream)
        trace.add(f"{name}.to_qkv", (f"{name}.qk", f"{name}.qk", f"{name}.v"), (trace.stream,))
        # The products of q and k are divided by the root of their channels.
        layout.scaled += [(f"{name}.to_qkv.{kind}", 0, f"{name}.qk", 0.5) for kind in ("weight", "bias")]
        trace.add(f"{name}.proj", (trace.stream,), (f"{name}.v",))
        trace.resnet(f"mid_block.resnets.{j + 1}", resnet)
    for i, block in enumerate(decoder.up_blocks):
        trace.resnets(f"up_blocks.{i}", block)
        if block.upsamplers is not None:
            name = f"up_blocks.{i}.upsamplers.0"
            if block.upsamplers[0].mode == "upsample3d":  # two frames for one; the first frame passes it by
                trace.add(f"{name}.time_conv", (trace.stream, trace.stream), (trace.stream,))
            new = trace.branch_off()
            trace.add(f"{name}.resample.1", (new,), (trace.stream,))
            trace.stream = new
    trace.normed("norm_out", trace.stream)
    trace.add("conv_out", (), (trace.stream,))
    return layout


def hunyuan(decoder: Any) -> Layout:
    """AutoencoderKLHunyuanVideo: group norms, attention with linear layers, upsampling that keeps the channels."""
    trace = Tracer(decoder, ".conv", "", decoder.conv_norm_out.num_groups)
    trace.add("conv_in.conv", (trace.stream,))
    mid, layout = decoder.mid_block, trace.layout
    trace.resnet("mid_block.resnets.0", mid.resnets[0])
    for j, (attention, resnet) in enumerate(zip(mid.attentions, mid.resnets[1:], strict=True)):
        name = f"mid_block.attentions.{j}"
        if attention is not None:
            trace.normed(f"{name}.group_norm", trace.stream)
            for part, axis in (("to_q", "qk"), ("to_k", "qk"), ("to_v", "v")):
                trace.add(f"{name}.{part}", (f"{name}.{axis}",), (trace.stream,))
            layout.scaled += [(f"{name}.to_q.{kind}", 0, f"{name}.qk", 0.5) for kind in ("weight", "bias")]
            trace.add(f"{name}.to_out.0", (trace.stream,), (f"{name}.v",))
        trace.resnet(f"mid_block.resnets.{j + 1}", resnet)
    for i, block in enumerate(decoder.up_blocks):
        trace.resnets(f"up_blocks.{i}", block)
        if block.upsamplers is not None:
            new = trace.branch_off()
            trace.add(f"up_blocks.{i}.upsamplers.0.conv.conv", (new,), (trace.stream,))
            trace.stream = new
    trace.normed("conv_norm_out", trace.stream)
    trace.add("conv_out.conv", (), (trace.stream,))
    return layout


@dataclass(frozen=True)
class Kind:
    """A VAE class of diffusers, as far as its decoder is pruned."""

    layout: Callable[[Any], Layout]
    parts: Callable[[Any], int]  # decoder -> the number of equal parts that every axis can be cut into
    blocks: str  # the key of config.json that counts a level's residual blocks, one fewer than the decoder has
    latent: str  # the key that counts the channels of a latent
    space: tuple[str, ...]  # the keys that give the latents their scale
    temporal: str  # the keys with the frames per latent frame, and the pixels per latent row
    spatial: str
    fps: float  # of the clips that the released weights were trained on

    def narrowed(self, config: Mapping[str, Any], left: int, parts: int) -> dict[str, Any]:
        """The keys of config.json that say that `left` of `parts` equal parts of the channels are left."""
        if "block_out_channels" not in config:
            return {"decoder_base_dim": left}
        widths = [width * left // parts for width in config["block_out_channels"]]
        return {"block_out_channels": widths, "norm_num_groups": left}


KINDS: dict[str, Kind] = {
    "AutoencoderKLWan": Kind(
        wan,
        lambda decoder: decoder.dim,
        "num_res_blocks",
        "z_dim",
        ("latents_mean", "latents_std"),
        "scale_factor_temporal",
        "scale_factor_spatial",
        16,
    ),
    "AutoencoderKLHunyuanVideo": Kind(
        hunyuan,
        lambda decoder: decoder.conv_norm_out.num_groups,
        "layers_per_block",
        "latent_channels",
        ("scaling_factor",),
        "temporal_compression_ratio",
        "spatial_compression_ratio",
        24,
    ),
}

"""The cost of Wan2.2 TI2V's transformer: Wan's, with the embedding of t = 0 beside that of t."""

from collections.abc import Mapping
from dataclasses import replace

from fastlightgen.models.cost import Network, Work, linear
from fastlightgen.models.wan.cost import wan
from fastlightgen.parallel.shares import Part


def wan_ti2v(cfg: Mapping, latent: tuple[int, int, int], text: int, fused: bool, part: Part) -> Network:
    """The cost of WanTransformer3DModel with a time per token; `text`: number of text tokens."""
    net = wan(cfg, latent, text, fused, part)
    dim = net.width
    times = Work(linear(2, (dim, dim), (dim, 6 * dim)), entry=linear(2, (cfg["freq_dim"], dim)))
    return replace(net, family="wan-ti2v", tables=times)

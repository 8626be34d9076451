"""A pruned decoder equals the full one with the channels set to zero; diffusers' own class loads it."""

import diffusers
import pytest
import torch
from vaes import small_vae

from fastlightgen.decoder.folder import read_vae, write_vae
from fastlightgen.decoder.layout import KINDS
from fastlightgen.decoder.prune import (
    add_rows,
    channel_scores,
    choose,
    choose_blocks,
    compress,
    error,
    without_blocks,
)
from fastlightgen.decoder.prune import small_vae as assemble

PARTS = {"wan": 8, "hunyuan": 4}
CASES = [
    ("wan", {}),
    ("wan", {"dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}),  # no change of width: one stream through several levels
    ("hunyuan", {}),
    ("hunyuan", {"block_out_channels": (8, 8, 8, 8), "mid_block_add_attention": False}),
]


def pairs(count: int = 2, dtype=torch.float32):
    gen = torch.Generator().manual_seed(1)
    shapes = ((1, 4, 2, 3, 4), (1, 3, 5, 24, 32))
    return [tuple(0.5 * torch.randn(s, generator=gen, dtype=dtype) for s in shapes) for _ in range(count)]


def zeroed(decoder, layout, kept):
    """The full decoder whose layers write zeros into the channels that go, norms included."""
    out = without_blocks(decoder, {})
    for name, p in out.named_parameters():
        axes = layout.sides[name][0]
        if axes:
            left = torch.cat([torch.zeros(layout.sizes[axis]).index_fill(0, kept[axis], 1) for axis in axes])
            p.mul_(left.to(p.dtype).view(-1, *[1] * (p.dim() - 1)))
    return out


@pytest.mark.parametrize("dropped", [0, 1])
@pytest.mark.parametrize(("family", "changes"), CASES)
@torch.no_grad()
def test_pruned_equals_zeroed(family, changes, dropped):
    vae = small_vae(family, **changes)
    kind, z = KINDS[type(vae).__name__], pairs()[0][0]
    vae.decoder = without_blocks(vae.decoder, {level: [1] for level in range(4)} if dropped else {})
    layout, parts = kind.layout(vae.decoder), kind.parts(vae.decoder)
    assert parts == PARTS[family]
    gen = torch.Generator().manual_seed(2)  # random channels: low and high ones go, other ones of every axis
    kept = choose({a: torch.rand(n, generator=gen) for a, n in layout.sizes.items()}, layout, parts // 2, parts)
    assert any(index.tolist() != list(range(len(index))) for index in kept.values())
    small, _ = assemble(vae, vae.decoder, kept, parts // 2, parts, dropped)
    full = vae.decode(z).sample
    vae.decoder = zeroed(vae.decoder, layout, kept)
    wanted, got = vae.decode(z).sample, small.decode(z).sample
    assert full.abs().max() < 1 and (wanted - full).abs().max() > 0.01  # the channels matter, and nothing clamps
    assert (got - wanted).abs().max() <= 1e-5
    wanted, got = vae.double().decode(z.double()).sample, small.double().decode(z.double()).sample
    assert (got - wanted).abs().max() <= 1e-6  # the weights that make up for the channels were rounded to float32


@pytest.mark.parametrize("family", ["wan", "hunyuan"])
def test_every_parameter_has_its_axes(family):
    """Only the last convolution writes a fixed number of channels, and only the first one reads one."""
    decoder = small_vae(family).decoder
    layout = KINDS[f"AutoencoderKL{'Wan' if family == 'wan' else 'HunyuanVideo'}"].layout(decoder)
    assert layout.sides.keys() == dict(decoder.named_parameters()).keys()
    fixed_out = {n.split(".")[0] for n, (out, _) in layout.sides.items() if not out}
    fixed_in = {n for n, (_, into) in layout.sides.items() if not into and decoder.get_parameter(n).dim() > 1}
    assert fixed_out == {"conv_out"}
    assert {n for n in fixed_in if "norm" not in n} == {f"conv_in{'.conv' * (family == 'hunyuan')}.weight"}


@pytest.mark.parametrize("family", ["wan", "hunyuan"])
def test_taylor_is_the_derivative(family, monkeypatch):
    """The squared finite difference of the error along a factor on a channel's weights, in float64."""
    wan = diffusers.models.autoencoders.autoencoder_kl_wan
    monkeypatch.setattr(wan.WanUpsample, "forward", torch.nn.Upsample.forward)  # its own rounds to float32
    vae = small_vae(family).double()
    layout = KINDS[type(vae).__name__].layout(vae.decoder)
    pair = pairs(1, torch.float64)
    vae.decoder.requires_grad_(True)
    scores = channel_scores(vae, layout, pair, "taylor")
    vae.decoder.requires_grad_(False)
    for axis, channel in (("stream1", 2), ("mid_block.resnets.0.inner", 5), ("mid_block.attentions.0.v", 3)):
        errors = []
        for factor in (1 - 1e-5, 1 + 1e-5):
            state = {k: v.clone() for k, v in vae.decoder.state_dict().items()}
            for name, (axes, _) in layout.sides.items():
                for k, own in enumerate(axes):
                    if own == axis:
                        state[name][k * layout.sizes[axis] + channel] *= factor
            before, vae.decoder = vae.decoder, without_blocks(vae.decoder, {})
            vae.decoder.load_state_dict(state)
            errors.append(error(vae, *pair[0]).item())
            vae.decoder = before
        wanted = ((errors[1] - errors[0]) / 2e-5) ** 2
        assert wanted > 0 and scores[axis][channel].item() == pytest.approx(wanted, rel=1e-4)


def test_norm_scores_by_hand():
    """A convolution of two outputs and its bias; two segments of one axis add up."""
    from types import SimpleNamespace

    layout = SimpleNamespace(sides={"w": (("a", "a"), ()), "b": (("a",), ())})
    scores = {"a": torch.zeros(2)}
    add_rows(scores, layout, ["w", "b"], [torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8]]), torch.tensor([0.5, 0.25])])
    assert scores["a"].tolist() == [1 + 2 + 5 + 6 + 0.5, 3 + 4 + 7 + 8 + 0.25]


def test_whole_groups_go():
    """Units of two channels; the sum over a unit decides."""
    from types import SimpleNamespace

    layout = SimpleNamespace(units={"a": 2})
    kept = choose({"a": torch.tensor([9.0, 0, 4, 4, 1, 9, 0, 7])}, layout, 2, 4)
    assert kept["a"].tolist() == [0, 1, 4, 5]  # sums 9, 8, 10, 7


@torch.no_grad()
def test_the_cheapest_block_goes():
    """A residual block whose branch is nearly silent is dropped, in every level."""
    vae = small_vae("wan")
    silent = {0: 1, 1: 2, 2: 0, 3: 1}
    for level, j in silent.items():
        block = vae.decoder.up_blocks[level].resnets[j]
        block.conv2.weight.mul_(1e-3), block.conv2.bias.mul_(1e-3)
    z = pairs()[0][0]
    x = vae.decode(z).sample
    assert choose_blocks(vae, [(z, x)], 1) == {level: [j] for level, j in silent.items()}
    assert torch.equal(vae.decode(z).sample, x)  # the full decoder is left as it was


@pytest.mark.parametrize(("family", "dropped", "encodes"), [("wan", 0, True), ("wan", 1, False), ("hunyuan", 1, False)])
@torch.no_grad()
def test_stock_class_loads_it(tmp_path, family, dropped, encodes):
    """diffusers reads the folder without a missing or unexpected key, and decodes the same frames."""
    vae = small_vae(family)
    z, x = pairs()[0]
    with torch.enable_grad():
        small, record = compress(vae, pairs(), 0.5, dropped, "taylor")
    write_vae(small, tmp_path / "vae", record)
    stock, found = getattr(diffusers, type(vae).__name__).from_pretrained(tmp_path / "vae", output_loading_info=True)
    assert not any(found.values())
    assert torch.equal(stock.decode(z).sample, small.decode(z).sample)
    assert torch.equal(read_vae(tmp_path / "vae").decode(z).sample, small.decode(z).sample)
    before, after = record["parameters"]
    assert (before, after) == tuple(sum(p.numel() for p in v.decoder.parameters()) for v in (vae, stock))
    assert after < 0.3 * before and record["encoder"] == encodes
    mine, its = (v.encode(x).latent_dist.mode() for v in (stock, vae))
    assert torch.equal(mine, its) if encodes else mine.isnan().all()


def test_nothing_to_prune():
    vae = small_vae("hunyuan")
    with pytest.raises(ValueError, match="keep_channels=0.95: .* 4 parts, of which all would stay"):
        compress(vae, pairs(1), 0.95, 0, "norm")
    with pytest.raises(ValueError, match="drop_layers=3: a level of this decoder has 3 residual blocks; give 0 to 2"):
        compress(vae, pairs(1), 0.5, 3, "norm")

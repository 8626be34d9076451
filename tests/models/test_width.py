"""Width pruning: saliency by its definition, a pruned network and the full one with zeros, diffusers' class."""

import json

import pytest
import torch
from helpers import small_hunyuan
from torch import nn

from fastlightgen.config import preset
from fastlightgen.models.families import build, family_of, narrowed, network
from fastlightgen.models.folder.narrow import save_narrowed
from fastlightgen.models.folder.weights import load_model, on_meta, save_model
from fastlightgen.models.width import blocks_of, row_saliency, watched

WAN = {"patch_size": [1, 2, 2], "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4}
WAN |= {"text_dim": 20, "freq_dim": 16, "ffn_dim": 48, "num_layers": 3, "eps": 1e-8}
I2V = WAN | {"in_channels": 9, "image_dim": 8, "added_kv_proj_dim": 32}
HUNYUAN15 = preset("tiny-hunyuan15")["network"] | {"num_attention_heads": 4, "attention_head_dim": 8}
HUNYUAN15 |= {"rope_axes_dim": [4, 2, 2], "mlp_ratio": 1.5, "num_layers": 3}


def small(kind: str, seed: int = 0):
    if kind == "hunyuan":
        return small_hunyuan(2, 2, seed, num_attention_heads=4, mlp_ratio=1.5, guidance_embeds=False)
    return build({"i2v": I2V, "hunyuan15": HUNYUAN15}.get(kind, WAN), seed)


KINDS = pytest.mark.parametrize("kind", ["t2v", "i2v", "hunyuan", "hunyuan15"])


def test_the_saliency_of_a_row():
    """w_i^T X^T X w_i by its matrices, with the bias as the weight of an input that is 1."""
    gen = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*s, generator=gen, dtype=torch.float64) for s in ((2, 7, 5), (4, 5), (4,)))
    ones = torch.cat([x.reshape(14, 5), torch.ones(14, 1, dtype=torch.float64)], 1)
    full = torch.cat([w, b[:, None]], 1)
    wanted = torch.stack([row @ (ones.T @ ones) @ row for row in full])
    torch.testing.assert_close(row_saliency(x, w, b), wanted, rtol=1e-12, atol=0)
    plain = torch.stack([row @ (ones[:, :5].T @ ones[:, :5]) @ row for row in w])
    torch.testing.assert_close(row_saliency(x, w, None), plain, rtol=1e-12, atol=0)


@KINDS
@torch.no_grad()
def test_walks_measure_every_row(kind):
    """Inputs of all linear layers, found by replacing the layers themselves; two walks add up."""
    net = small(kind).double()
    x_t, t, cond, null = net.example_inputs(2)
    x_t, t = x_t.double(), t.double()
    cond, null = (c.map(lambda v: v.double() if v.is_floating_point() else v) for c in (cond, null))
    with watched(net) as found:
        net(x_t, t, cond), net(x_t, t, null)
    grams: dict[str, torch.Tensor] = {}
    names = {id(m.weight): n for n, m in net.named_modules() if isinstance(m, nn.Linear)}
    real = torch.nn.functional.linear

    def spy(x, weight, bias=None):
        name = names.get(id(weight))
        if name in found:
            flat = x.reshape(-1, x.shape[-1])
            ones = torch.cat([flat, flat.new_ones(len(flat), 1)], 1)
            grams[name] = grams.get(name, 0) + ones.T @ ones
        return real(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", spy)
        net(x_t, t, cond), net(x_t, t, null)
    assert len(found) == {"t2v": 3 * 7, "i2v": 3 * 9, "hunyuan": 2 * 8 + 2 * 4, "hunyuan15": 3 * 8}[kind]
    assert grams.keys() == found.keys()
    for name, got in found.items():
        layer = net.get_submodule(name)
        w = torch.cat([layer.weight, layer.bias[:, None]], 1)
        torch.testing.assert_close(got, ((w @ grams[name]) * w).sum(1), rtol=1e-9, atol=1e-12)


def zeroed(net, heads: int, ffn: int, seed: int = 1) -> None:
    """Set the rows of `heads` random heads and `ffn` random neurons of every block to zero."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, block in blocks_of(net):
            for part in block.prunable():
                layers = [block.get_submodule(name) for name in part.rows]
                units = len(layers[0].weight) // part.size
                for unit in torch.randperm(units, generator=gen)[: heads if part.kind == "heads" else ffn].tolist():
                    rows = slice(unit * part.size, (unit + 1) * part.size)
                    for layer in layers:
                        layer.weight[rows], layer.bias[rows] = 0, 0


@KINDS
@pytest.mark.parametrize(("heads", "ffn", "keep"), [(2, 0, None), (0, 24, None), (1, 24, [0, 2]), (3, 47, [1, 2])])
@torch.no_grad()
def test_a_pruned_network_is_the_full_one_with_zeros(kind, heads, ffn, keep, tmp_path):
    """The zeroed units have the smallest saliency. Wan's norm over all heads sees zeros, which its factor makes up for.

    GELU(0) = 0, and a head whose values are 0 adds nothing.
    """
    net = small(kind)
    zeroed(net, heads, ffn)
    source, total = save_model(net, tmp_path / "full"), net.cfg.ffn_width
    keep = list(range(net.num_blocks)) if keep is None else keep
    full = load_model(source).prune(keep)
    x_t, t, cond, _ = full.example_inputs(2, seed=3)
    with watched(full) as saliency:
        v = full(x_t, t, cond)
    out = save_narrowed(source, tmp_path / "narrow", keep, saliency, 4 - heads, total - ffn)
    narrow = load_model(out)
    torch.testing.assert_close(narrow(x_t, t, cond), v, rtol=1e-5, atol=1e-5)
    assert narrow.cfg.dim == full.cfg.dim and (narrow.cfg.heads, narrow.cfg.ffn_width) == (4 - heads, total - ffn)
    stored = json.loads((out / "config.json").read_text())
    assert stored.get("kept_attention_heads") == ((4 - heads) if heads else None)
    counted = network(narrow.config, (3, 4, 4)).params
    assert counted == sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in full.parameters())
    x_t, t, cond, _ = narrow.example_inputs(1)
    flops = narrow.block_flops(x_t, cond)
    assert len(flops) == len(keep) and flops[0] < full.block_flops(x_t, cond)[0]


@KINDS
@torch.no_grad()
def test_the_least_salient_rows_go(kind, tmp_path):
    """Every kept unit has a larger score than every dropped one; the rows that stay are copied bit for bit."""
    net = small(kind)
    source = save_model(net, tmp_path / "full")
    x_t, t, cond, _ = net.example_inputs(2, seed=3)
    with watched(net) as saliency:
        net(x_t, t, cond)
    narrow = load_model(save_narrowed(source, tmp_path / "n", range(net.num_blocks), saliency, 2, 20))
    for (prefix, block), (_, small_block) in zip(blocks_of(net), blocks_of(narrow), strict=True):
        for part in block.prunable():
            score = sum(saliency[f"{prefix}.{name}"].view(-1, part.size).sum(1) for name in part.rows)
            left = 2 if part.kind == "heads" else 20
            kept = sorted(score.topk(left).indices.tolist())
            rows = [u * part.size + i for u in kept for i in range(part.size)]
            for name in part.rows:
                before, after = block.get_submodule(name), small_block.get_submodule(name)
                assert torch.equal(after.weight, before.weight[rows]) and torch.equal(after.bias, before.bias[rows])


@torch.no_grad()
def test_the_norm_keeps_the_scale_of_the_heads_that_stay(tmp_path):
    """Wan norms q over all heads together. On the measured tokens q keeps its mean square over the heads that stay."""
    net = small("t2v")
    block = net.blocks[0]
    block.attn1.to_q.weight[:8] *= 5  # one head is much larger than the others
    source = save_model(net, tmp_path / "full")
    inputs = []
    hook = block.attn1.to_q.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    x_t, t, cond, _ = net.example_inputs(2, seed=3)
    with watched(net) as saliency:
        net(x_t, t, cond)
    hook.remove()
    narrow = load_model(save_narrowed(source, tmp_path / "n", [0, 1, 2], saliency, 2, 48)).blocks[0].attn1
    q, small_q = block.attn1.to_q(inputs[0]), narrow.to_q(inputs[0])
    ratio = (small_q.square().mean() / q.square().mean()).sqrt()
    assert ratio > 1.2
    torch.testing.assert_close(narrow.norm_q.weight / ratio, torch.ones(16), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["t2v", "i2v", "hunyuan"])
@torch.no_grad()
def test_diffusers_loads_a_narrower_feed_forward(kind, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    net = small(kind)
    source = save_model(net, tmp_path / "full")
    x_t, t, cond, _ = net.example_inputs(1, seed=3)
    with watched(net) as saliency:
        net(x_t, t, cond)
    keep = [0, 2]
    saliency = {k.replace(f"{n}.2.", f"{n}.1."): v for n in ("blocks",) for k, v in saliency.items() if ".1." not in k}
    if kind == "hunyuan":
        keep = [0, 1, 2, 3]
        with watched(net) as saliency:
            net(x_t, t, cond)
    out = save_narrowed(source, tmp_path / "narrow", keep, saliency, 4, 19)
    narrow = load_model(out)
    stock, found = getattr(diffusers, net.config_class).from_pretrained(out, output_loading_info=True)
    assert not any(found.values()) and narrow.cfg.is_stock
    inputs = family_of(narrow.config).stock_inputs(narrow.cfg, x_t, t, cond)
    torch.testing.assert_close(stock(**inputs, return_dict=False)[0], narrow(x_t, t, cond), rtol=1e-5, atol=1e-5)


def test_the_paper_s_network():
    """Wan2.1 1.3B with 10 of 12 heads in self- and cross-attention and a feed-forward of 4480.

    The paper's text says 850M (and 0.8B in its tables). Counted are all parameters of the transformer, embeddings and
    output included, with the hidden width of 1536 unchanged, as Sec. 2.1 says: 911.5M, of which
    885.8M are in the blocks. No part of it counts 850M.
    """
    config = narrowed(preset("wan2.1-t2v-1.3b")["network"], 10, 4480)
    net = on_meta(config)
    total = sum(p.numel() for p in net.parameters())
    assert sum(p.numel() for p in net.blocks.parameters()) == 885_761_280
    assert round(total / 1e6, 1) == 911.5 and network(config, (21, 60, 104)).params == total
    wide = on_meta(narrowed(preset("wan2.1-t2v-1.3b")["network"], 12, 4480))
    assert round(sum(p.numel() for p in wide.parameters()) / 1e6) == 1006


def test_configurations_that_cannot_be():
    with pytest.raises(ValueError, match="Wan config: kept_attention_heads is 4; wanted null or .* from 1 to 3"):
        build(WAN | {"kept_attention_heads": 4})
    with pytest.raises(ValueError, match="kept_attention_heads"):
        build(WAN | {"kept_attention_heads": 0})
    for width in (1, 19, 20, 21, 23, 47, 49):  # int(dim x ratio) gives the width back
        assert small("hunyuan").cfg.narrowed(4, width).ffn_width == width

"""Key tables: where each tensor of diffusers' format stands in the original repositories' checkpoints, and back.

One entry per tensor of the exact configuration, no substring replaces. Wan only renames. HunyuanVideo's original fuses
q, k, v (and the MLP of a single block) into one tensor, and its final modulation has shift before scale: such entries
name rows of the original.
"""

from collections.abc import Mapping
from dataclasses import dataclass

WEIGHT_BIAS = ("weight", "bias")


@dataclass(frozen=True)
class Source:
    """Where a tensor comes from: all of the tensor `key`, or these (start, stop) rows of it, one below the other."""

    key: str
    rows: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Piece:
    """Rows start:stop of an original tensor are the rows of the tensor `key` from `offset` on; stop None: all."""

    key: str
    start: int = 0
    stop: int | None = None
    offset: int = 0


Table = dict[str, Source]

WAN_OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head",
}
WAN_IMAGE = {
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
}
ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
HUNYUAN_OUTSIDE = {
    "x_embedder.proj": "img_in.proj",
    "time_text_embed.timestep_embedder.linear_1": "time_in.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "time_in.mlp.2",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "context_embedder.time_text_embed.timestep_embedder.linear_1": "txt_in.t_embedder.mlp.0",
    "context_embedder.time_text_embed.timestep_embedder.linear_2": "txt_in.t_embedder.mlp.2",
    "context_embedder.time_text_embed.text_embedder.linear_1": "txt_in.c_embedder.linear_1",
    "context_embedder.time_text_embed.text_embedder.linear_2": "txt_in.c_embedder.linear_2",
    "context_embedder.proj_in": "txt_in.input_embedder",
    "proj_out": "final_layer.linear",
}
HUNYUAN_GUIDANCE = {
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.mlp.0",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.mlp.2",
}
HUNYUAN_REFINER = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.to_out.0": "self_attn_proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
    "norm_out.linear": "adaLN_modulation.1",
}
HUNYUAN_DOUBLE = {
    "norm1.linear": "img_mod.linear",
    "norm1_context.linear": "txt_mod.linear",
    "attn.to_out.0": "img_attn_proj",
    "attn.to_add_out": "txt_attn_proj",
    "ff.net.0.proj": "img_mlp.fc1",
    "ff.net.2": "img_mlp.fc2",
    "ff_context.net.0.proj": "txt_mlp.fc1",
    "ff_context.net.2": "txt_mlp.fc2",
}
HUNYUAN_DOUBLE_NORMS = {
    "attn.norm_q": "img_attn_q_norm",
    "attn.norm_k": "img_attn_k_norm",
    "attn.norm_added_q": "txt_attn_q_norm",
    "attn.norm_added_k": "txt_attn_k_norm",
}
# How the weights of each kind are told from the others, for the error about a folder that mixes two.
SIGNS = {
    "condition_embedder.time_proj.": "Wan (diffusers format)",
    "time_projection.1.": "Wan (original format)",
    "context_embedder.token_refiner.": "HunyuanVideo (diffusers format)",
    "txt_in.individual_token_refiner.": "HunyuanVideo (original format)",
    "down_blocks.": "a UNet",
    "decoder.": "a VAE",
    "encoder.": "an encoder",
}


def recognise(keys) -> str:
    """What network has such keys, in words; "" if it is none that is known."""
    return next((name for sign, name in SIGNS.items() if any(key.startswith(sign) for key in keys)), "")


def named(modules: Mapping[str, str], ours: str = "", theirs: str = "", leaves=WEIGHT_BIAS) -> dict[str, str]:
    """{"a": "b"} as {"a.weight": "b.weight", "a.bias": "b.bias"}, behind a prefix on either side."""
    return {f"{ours}{a}.{leaf}": f"{theirs}{b}.{leaf}" for a, b in modules.items() for leaf in leaves}


def wan_keys(config: Mapping) -> dict[str, str]:
    """Key in diffusers' format -> key in the original Wan2.1 checkpoint, for a diffusers configuration."""
    image = config.get("image_dim") is not None
    keys = named(WAN_OUTSIDE | (WAN_IMAGE if image else {})) | {"scale_shift_table": "head.modulation"}
    for i in range(config["num_layers"]):
        block = f"blocks.{i}."
        for ours, theirs in (("attn1.", "self_attn."), ("attn2.", "cross_attn.")):
            keys |= named(ATTENTION, block + ours, block + theirs)
            keys |= named({"norm_q": "norm_q", "norm_k": "norm_k"}, block + ours, block + theirs, ("weight",))
        if image:
            keys |= named({"add_k_proj": "k_img", "add_v_proj": "v_img"}, block + "attn2.", block + "cross_attn.")
            keys[f"{block}attn2.norm_added_k.weight"] = f"{block}cross_attn.norm_k_img.weight"
        if config["cross_attn_norm"]:
            keys |= named({"norm2": "norm3"}, block, block)  # the original counts the cross-attention's norm last
        keys |= named({"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}, block, block)
        keys[f"{block}scale_shift_table"] = f"{block}modulation"
    return keys


def wan_table(config: Mapping) -> Table:
    return {ours: Source(theirs) for ours, theirs in wan_keys(config).items()}


def hunyuan_keys(config: Mapping) -> Table:
    """Key in diffusers' format -> its place in the original HunyuanVideo checkpoint, for a diffusers configuration."""
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    mlp = int(dim * config["mlp_ratio"])
    whole = named(HUNYUAN_OUTSIDE | (HUNYUAN_GUIDANCE if config["guidance_embeds"] else {}))
    split: Table = {}
    for leaf in WEIGHT_BIAS:  # diffusers: scale, shift
        split[f"norm_out.linear.{leaf}"] = Source(f"final_layer.adaLN_modulation.1.{leaf}", ((dim, 2 * dim), (0, dim)))
    for i in range(config["num_refiner_layers"]):
        ours = f"context_embedder.token_refiner.refiner_blocks.{i}."
        theirs = f"txt_in.individual_token_refiner.blocks.{i}."
        whole |= named(HUNYUAN_REFINER, ours, theirs)
        split |= fused([f"{ours}attn.{n}" for n in ("to_q", "to_k", "to_v")], f"{theirs}self_attn_qkv", [dim] * 3)
    for i in range(config["num_layers"]):
        ours, theirs = f"transformer_blocks.{i}.", f"double_blocks.{i}."
        whole |= named(HUNYUAN_DOUBLE, ours, theirs) | named(HUNYUAN_DOUBLE_NORMS, ours, theirs, ("weight",))
        split |= fused([f"{ours}attn.{n}" for n in ("to_q", "to_k", "to_v")], f"{theirs}img_attn_qkv", [dim] * 3)
        added = [f"{ours}attn.{n}" for n in ("add_q_proj", "add_k_proj", "add_v_proj")]
        split |= fused(added, f"{theirs}txt_attn_qkv", [dim] * 3)
    for i in range(config["num_single_layers"]):
        ours, theirs = f"single_transformer_blocks.{i}.", f"single_blocks.{i}."
        whole |= named({"norm.linear": "modulation.linear", "proj_out": "linear2"}, ours, theirs)
        whole |= named({"attn.norm_q": "q_norm", "attn.norm_k": "k_norm"}, ours, theirs, ("weight",))
        parts = [f"{ours}{n}" for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
        split |= fused(parts, f"{theirs}linear1", [dim, dim, dim, mlp])
    return {ours: Source(theirs) for ours, theirs in whole.items()} | split


def fused(ours: list[str], theirs: str, heights: list[int]) -> Table:
    """Entries of linear layers that the original keeps as one, with `heights` outputs each."""
    out, start = {}, 0
    for module, height in zip(ours, heights, strict=True):
        for leaf in WEIGHT_BIAS:
            out[f"{module}.{leaf}"] = Source(f"{theirs}.{leaf}", ((start, start + height),))
        start += height
    return out


def inverse(table: Table) -> dict[str, list[Piece]]:
    """Original key -> the tensors that it is made of, from its first row to its last."""
    out: dict[str, list[Piece]] = {}
    for key, source in table.items():
        pieces, offset = out.setdefault(source.key, []), 0
        if not source.rows:
            pieces.append(Piece(key))
        for start, stop in source.rows:
            pieces.append(Piece(key, start, stop, offset))
            offset += stop - start
    return {key: sorted(pieces, key=lambda p: p.start) for key, pieces in out.items()}


def unused_keys(config: Mapping) -> set[str]:
    """Keys that diffusers' files may hold and its network does not read: Wan's image-to-video checkpoints have them."""
    if config.get("added_kv_proj_dim") is None:
        return set()
    return {f"blocks.{i}.attn2.norm_added_q.weight" for i in range(config["num_layers"])}

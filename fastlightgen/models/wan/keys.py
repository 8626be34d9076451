"""Wan2.1: the place of each tensor of diffusers' format in the original checkpoint. The two differ in names only."""

from collections.abc import Mapping

from fastlightgen.models.keys import Source, Table, named

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


def wan_keys(config: Mapping) -> dict[str, str]:
    """Key in diffusers' format -> key in the original Wan2.1 checkpoint, for a diffusers configuration."""
    image = config.get("image_dim") is not None
    keys = named(WAN_OUTSIDE | (WAN_IMAGE if image else {})) | {"scale_shift_table": "head.modulation"}
    for i in range(config["num_layers"]):
        block = f"blocks.{i}."
        for part, original in (("attn1.", "self_attn."), ("attn2.", "cross_attn.")):
            keys |= named(ATTENTION, block + part, block + original)
            keys |= named({"norm_q": "norm_q", "norm_k": "norm_k"}, block + part, block + original, ("weight",))
        if image:
            keys |= named({"add_k_proj": "k_img", "add_v_proj": "v_img"}, block + "attn2.", block + "cross_attn.")
            keys[f"{block}attn2.norm_added_k.weight"] = f"{block}cross_attn.norm_k_img.weight"
        if config["cross_attn_norm"]:
            keys |= named({"norm2": "norm3"}, block, block)  # the cross-attention's norm is number 3 in the original
        keys |= named({"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}, block, block)
        keys[f"{block}scale_shift_table"] = f"{block}modulation"
    return keys


def wan_table(config: Mapping) -> Table:
    """`wan_keys` as a key table."""
    return {key: Source(original) for key, original in wan_keys(config).items()}


def unused_keys(config: Mapping) -> set[str]:
    """Keys of Wan's published image-to-video checkpoints that diffusers' network does not read."""
    if config.get("added_kv_proj_dim") is None:
        return set()
    return {f"blocks.{i}.attn2.norm_added_q.weight" for i in range(config["num_layers"])}

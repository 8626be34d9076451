"""Key maps between diffusers' and the original repositories' names, for random depths: every row has one place."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import tried
from torch import Tensor

from fastlightgen.config import preset
from fastlightgen.models.families import family_of
from fastlightgen.models.folder.original import assembled, from_original, key_table, original_config
from fastlightgen.models.folder.weights import on_meta
from fastlightgen.models.keys import Table, inverse
from fastlightgen.models.wan.original import IMAGE_DIM

HEADS, HEAD = 2, 12


@st.composite
def wan(draw) -> dict[str, Any]:
    image = draw(st.booleans())
    return {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD,
        "in_channels": draw(st.sampled_from([4, 36])),
        "text_dim": 8,
        "freq_dim": 8,
        "ffn_dim": draw(st.integers(1, 9)),
        "num_layers": draw(st.integers(1, 24)),
        "cross_attn_norm": draw(st.booleans()),
        "image_dim": IMAGE_DIM if image else None,
        "added_kv_proj_dim": HEADS * HEAD if image else None,
    }


@st.composite
def hunyuan(draw) -> dict[str, Any]:
    depths = {"num_layers": (1, 12), "num_single_layers": (1, 20), "num_refiner_layers": (2, 2)}
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": 8, "rope_axes_dim": [4, 2, 2]}
    return preset("tiny-hunyuan")["network"] | sizes | {k: draw(st.integers(*ends)) for k, ends in depths.items()}


@st.composite
def hunyuan15(draw) -> dict[str, Any]:
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": 8, "rope_axes_dim": [4, 2, 2], "num_refiner_layers": 2}
    task = {"task_type": draw(st.sampled_from(["t2v", "i2v"])), "target_size": draw(st.sampled_from([640, 960]))}
    own = sizes | task | {"text_embed_2_dim": 1472, "num_layers": draw(st.integers(1, 12))}
    return preset("tiny-hunyuan15")["network"] | own


def numbered(config: Mapping) -> tuple[dict[str, Tensor], Table]:
    """The tensors of a network, every element with a number of its own, and the key table."""
    net, count, state = on_meta(config), 0, {}
    for key, value in net.state_dict().items():
        state[key] = torch.arange(count, count + value.numel()).view(value.shape)
        count += value.numel()
    return state, key_table(net.config)


@tried(12)
@given(st.one_of(wan(), hunyuan(), hunyuan15()))
def test_there_and_back_for_random_depths(config):
    state, table = numbered(config)
    original = {key: assembled(state, pieces) for key, pieces in inverse(table).items()}
    held = torch.cat([v.flatten() for v in original.values()]).sort().values
    assert torch.equal(held, torch.arange(sum(v.numel() for v in state.values())))  # every element once
    for key, source in table.items():
        whole = original[source.key]
        back = torch.cat([whole[start:stop] for start, stop in source.rows]) if source.rows else whole
        assert torch.equal(back, state[key]), key


@tried(20)
@given(st.one_of(wan(), hunyuan(), hunyuan15()))
def test_configurations_there_and_back(config):
    own = on_meta(config).config
    try:
        original = original_config(own)
    except ValueError as err:  # that file has no key for every setting; which, is said
        assert "use to=diffusers without original=" in str(err)
        return
    family = family_of(own)
    stored = [source.key for source in key_table(own).values()]
    assert asdict(family.settings(from_original(original, stored))) == asdict(family.settings(own))

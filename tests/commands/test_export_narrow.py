"""Export of width-pruned students: diffusers loads a narrower feed-forward; fewer heads are announced at the start."""

import json

import pytest
import torch
from students import SHIFT, STEPS, stock
from test_export import refused, run

from fastlightgen.flow import ladder
from fastlightgen.models.folder.narrow import save_narrowed
from fastlightgen.models.folder.weights import load_model
from fastlightgen.models.width import watched


@pytest.fixture(scope="module")
def narrow(pipeline, tmp_path_factory):
    """(heads, neurons) -> the pipeline and a width-pruned student of its network."""
    source = pipeline("wan_t2v")

    @torch.no_grad()
    def make(heads: int, ffn: int):
        net = load_model(source / "transformer")
        x_t, t, cond, _ = net.example_inputs(1)
        with watched(net) as saliency:
            net(x_t, t, cond)
        card = {"stage": 3, "ladder": ladder(STEPS, SHIFT), "shift": SHIFT, "guidance": 1.0, "sampler": "ode"}
        out = tmp_path_factory.mktemp("narrow") / "model"
        blocks = range(net.num_blocks)
        return source, save_narrowed(
            source / "transformer", out, blocks, saliency, heads, ffn, kept_blocks=list(blocks), **card
        )

    return make


def test_a_narrower_feed_forward_is_a_stock_network(narrow, tmp_path, capsys):
    source, model = narrow(2, 5)
    run(f"model={model}", f"pipeline={source}", f"out={tmp_path / 'out'}", "dtype=float32")
    said = capsys.readouterr().out
    assert "stock diffusers holds the same weights" in said and "warning" not in said
    assert stock(tmp_path / "out").transformer.config.ffn_dim == 5


def test_fewer_heads_are_announced_before_the_work(narrow, tmp_path, capsys, monkeypatch):
    """The warning comes before the weights are read. The export itself loads with this package."""
    source, model = narrow(1, 5)
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("fastlightgen.models.folder.weights.load_weights", raises)
        run(f"model={model}", f"pipeline={source}", f"out={out}", "dtype=float32")
    assert "has 1 of 2 heads per attention, which stock diffusers cannot load" in capsys.readouterr().out
    run(f"model={model}", f"pipeline={source}", f"out={out}", "dtype=float32")
    assert "fastlightgen, and not stock diffusers, holds the same weights" in capsys.readouterr().out
    again, before = load_model(out), load_model(model)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), before.parameters(), strict=True))
    text = (out / "README.md").read_text()
    assert "python -m fastlightgen.generate model=out" in text and "DiffusionPipeline" not in text
    assert json.loads((out / "transformer/config.json").read_text())["kept_attention_heads"] == 1


def raises(*args, **keys):
    raise ZeroDivisionError


def test_what_cannot_be_exported(narrow, tmp_path, capsys):
    source, model = narrow(1, 5)
    words = [f"model={model}", f"pipeline={source}", f"out={tmp_path / 'out'}"]
    assert "kept_attention_heads is 1, and the original format has None there" in refused(
        capsys, *words, "original=true"
    )
    assert "changes rows that width pruning dropped from the model" in refused(capsys, *words, "lora=some.safetensors")

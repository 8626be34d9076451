"""Two experts: which one predicts, what a folder of both holds, and the errors of folders that do not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import with_random_norms

from fastlightgen.config import preset
from fastlightgen.models.experts import TwoExperts
from fastlightgen.models.families import build
from fastlightgen.models.folder.experts import expert_of, experts_of
from fastlightgen.models.folder.pair import load_sampler, sampler_card
from fastlightgen.models.folder.released import preset_of, sampling
from fastlightgen.models.folder.weights import load_model, save_model, save_original
from fastlightgen.models.sample import sampling_plan

SMALL = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 20, "freq_dim": 32, "ffn_dim": 40}
SMALL |= {"num_layers": 4}
SIZES = {"wan2.2-t2v-a14b": 14_288_491_584, "wan2.2-i2v-a14b": 14_288_901_184}


@pytest.mark.parametrize(("name", "params"), SIZES.items())
def test_an_expert_of_a_preset_has_the_size_of_diffusers_class(name: str, params: int):
    diffusers = pytest.importorskip("diffusers")
    config = preset(name)["network"]
    with torch.device("meta"):
        nets = build(config), diffusers.WanTransformer3DModel(**config)
    assert [sum(p.numel() for p in net.parameters()) for net in nets] == [params, params]


def test_the_time_chooses_the_expert():
    nets = [build(SMALL, seed) for seed in (1, 2)]
    both = TwoExperts(*nets, 0.875)
    x_t, _, cond, _ = nets[0].example_inputs(batch=2)
    for t, own in ((1.0, 0), (0.875, 0), (0.8749, 1), (0.02, 1)):  # as diffusers has it: high from the boundary up
        assert torch.equal(both(x_t, t, cond), nets[own](x_t, t, cond))
        assert torch.equal(both(x_t, torch.full((2,), t), cond), nets[own](x_t, t, cond))
    with pytest.raises(AssertionError, match="one call is of one expert"):
        both(x_t, torch.tensor([0.9, 0.8]), cond)


@torch.no_grad()
def test_pruning_an_image_expert_equals_skipping():
    net = with_random_norms(build(SMALL | {"in_channels": 36}, 1), 1)
    x_t, t, cond, null = net.example_inputs(batch=2)
    assert cond.image is not None and cond.image_embeds is None
    wanted = [net(x_t, t, c, keep=[0, 2]) for c in (cond, null)]
    assert not torch.equal(wanted[0], net(x_t, t, cond)) and net.prune([0, 2]).num_blocks == 2
    assert all(torch.equal(net(x_t, t, c), want) for c, want in zip((cond, null), wanted, strict=True))


def test_presets_are_told_apart_by_their_number_of_networks(tmp_path):
    """The network of Wan2.2 T2V A14B is that of Wan2.1 T2V 14B; the number of blocks does not matter for the match."""
    assert preset_of("wan2.2-t2v-a14b") == "wan2.2-t2v-a14b" and experts_of("wan2.1-t2v-14b") is None
    assert experts_of("wan2.2-i2v-a14b").boundary == 0.9
    for parts in (("transformer",), ("transformer", "transformer_2")):
        folder = tmp_path / str(len(parts))
        for part in parts:
            (folder / part).mkdir(parents=True)
            (folder / part / "config.json").write_text(json.dumps(preset("wan2.1-t2v-14b")["network"]))
        index = {part: ["diffusers", "WanTransformer3DModel"] for part in parts}
        index |= {"_class_name": "WanPipeline"} | ({"boundary_ratio": 0.875} if len(parts) > 1 else {})
        (folder / "model_index.json").write_text(json.dumps(index))
    assert preset_of(tmp_path / "1") == "wan2.1-t2v-14b" and expert_of(tmp_path / "1/transformer") is None
    assert preset_of(tmp_path / "2") == preset_of(tmp_path / "2/transformer_2") == "wan2.2-t2v-a14b"
    assert expert_of(tmp_path / "2/transformer_2") == ("low", 0.875)
    values = sampling(tmp_path / "2").values
    plan = sampling_plan({}, 0, -1.0, "auto", values)
    assert (plan["guidance"], plan["guidance_2"]) == (4.0, 3.0)  # wan/configs/wan_t2v_A14B.py: low 3, high 4
    assert "guidance_2" not in sampling_plan({}, 0, 6.0, "auto", values)  # the user's is that of both
    assert values["shift"] == 12.0 and sampling(tmp_path / "1").values["shift"] == 5.0


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Both layouts of this program: the results of a stage, and the original repository's."""
    root = tmp_path_factory.mktemp("experts")
    for name, part, seed in (("high", "high_noise_model", 1), ("low", "low_noise_model", 2)):
        net = build(SMALL | {"in_channels": 36}, seed)
        card = {"stage": 3, "expert": name, "boundary": 0.8, "ladder": [1.0, 0.5], "shift": 1.0, "source": name}
        save_model(net, root / "ours" / name, **card)
        save_original(net, root / "original" / part)
    return root


def test_cards_and_boundaries(made: Path):
    assert experts_of(made / "ours").boundary == 0.8
    assert experts_of(made / "original").boundary == 0.9  # of Wan2.2 I2V, whose folders do not tell
    card = sampler_card(made / "ours")
    assert card["ladder"] == [1.0, 0.5] and "source" not in card and "expert" not in card
    nets = load_sampler(made / "ours"), load_sampler(made / "original")
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    assert nets[1].config["image_dim"] is None  # model_type is i2v: the weights tell that no CLIP is read


def edited(folder: Path, out: Path, part: str = "", file: str = "fastlightgen.json", **changes) -> Path:
    """A copy of a folder with another value in one of its files; without changes, without that part."""
    shutil.copytree(folder, out)
    if not changes:
        shutil.rmtree(out / part)
        return out
    path = out / part / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return out


def fails(run, *args) -> str:
    with pytest.raises(ValueError) as error:
        run(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_folders_that_hold_no_two_experts(made: Path, pipeline, tmp_path):
    ours, original, stock = made / "ours", made / "original", pipeline("a14b")
    cases = [
        (edited(ours, tmp_path / "a", "low"), "a: has two experts, and low/ holds no model; copy or train it, or give"),
        (edited(original, tmp_path / "b", "high_noise_model"), "and high_noise_model/ holds no model"),
        (edited(stock, tmp_path / "c", "transformer_2"), "and transformer_2/ holds no model"),
        (
            edited(stock, tmp_path / "d", file="model_index.json", boundary_ratio=None),
            "names two experts and the boundary_ratio None; wanted a number between 0 and 1",
        ),
        (
            edited(stock, tmp_path / "e", file="model_index.json", transformer_2=[None, None]),
            "has a boundary_ratio, as Wan2.2 A14B has, and no transformer_2; copy the folder again, or for",
        ),
        (edited(ours, tmp_path / "f", "low", boundary=0.7), "its experts meet at the boundaries 0.8 and 0.7"),
        (edited(ours, tmp_path / "g", "low", stage=2), "its experts come from stages 3 and 2"),
        (
            edited(ours, tmp_path / "h", "low", "config.json", in_channels=16),
            "its experts have in_channels 36 and 16; give two of one model",
        ),
    ]
    for folder, message in cases:
        assert message in fails(experts_of, folder)
    clip = {"image_dim": 8, "added_kv_proj_dim": 24}
    both = edited(edited(stock, tmp_path / "i", "transformer", "config.json", **clip), tmp_path / "j", "transformer_2",
                  "config.json", **clip)  # fmt: skip
    assert "its experts read CLIP tokens (image_dim 8), as Wan2.1's network does" in fails(experts_of, both)
    other = edited(ours, tmp_path / "k", "low", ladder=[1.0, 0.6])
    assert "its experts were trained for ladder [1.0, 0.5] and [1.0, 0.6]" in fails(sampler_card, other)


def test_the_folder_of_a_run_names_its_latest_result(made: Path, tmp_path):
    for stage in ("stage2", "stage3"):
        (tmp_path / stage / "model").mkdir(parents=True)
        for name in ("high", "low"):
            (tmp_path / stage / "model" / name).symlink_to(made / "ours" / name)
    assert f"is the folder of a run; give model={tmp_path}/stage3/model, its latest result" in fails(
        load_model, tmp_path
    )


def test_networks_that_are_taken_for_others(made: Path, pipeline, tmp_path):
    assert "has two networks; give the folder of one of them, " in fails(load_model, made / "ours")
    assert "is the low-noise expert of two, which makes no clips alone" in fails(load_sampler, made / "ours/low")
    assert "is the high-noise expert of two" in fails(load_sampler, pipeline("a14b") / "transformer")
    # Weights of 2.2's I2V with the configuration of 2.1's, and the reverse.
    old, new = pipeline("wan_i2v") / "transformer", pipeline("a14b_i2v") / "transformer"
    for config, weights in ((old, new), (new, old)):
        shutil.copytree(config, mixed := tmp_path / config.parent.name)
        name = "diffusion_pytorch_model.safetensors"
        shutil.copyfile(weights / name, mixed / name)
        assert "the weights do not fit config.json: " in fails(load_model, mixed)

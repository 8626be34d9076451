"""export original=true: complete and readable, with its card, or refused before anything is written."""

import json

import pytest
import torch
from helpers import small_hunyuan
from students import KEEP, STEPS, make_student

from fastlightgen.config import main
from fastlightgen.export import export
from fastlightgen.generate import generate
from fastlightgen.models.folder.networks import full_depth
from fastlightgen.models.folder.weights import load_model, read_card, save_model, save_original

SIZE = "size=32x48x9"


def run(*words: str) -> None:
    main(export, "export", [*words, "original=true", "dtype=float32", "threads=1", "progress=false"])


@pytest.fixture(scope="module")
def made(pipeline, tmp_path_factory):
    """(pipeline, student, export with original/) of Wan T2V."""
    root, source = tmp_path_factory.mktemp("original"), pipeline("wan_t2v")
    model = make_student(source, root / "model")
    run(f"model={model}", f"pipeline={source}", f"out={root / 'out'}", "link=true")
    return source, model, root / "out"


def sampled(capsys, *words: str) -> list[str]:
    """The lines that generate prints."""
    capsys.readouterr()
    main(generate, "generate", [*words, "prompt=a red ball", SIZE, "threads=1", "progress=false", "seed=1"])
    return capsys.readouterr().out.splitlines()


def test_it_goes_beside(made):
    _, model, out = made
    a, b = load_model(model), load_model(out / "original")
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_every_form_of_a_student_has_its_card(made):
    _, model, out = made
    cards = [json.loads((out / part / "fastlightgen.json").read_text()) for part in (".", "transformer", "original")]
    assert cards[0] == cards[1] == cards[2] and cards[0]["kept_blocks"] == KEEP
    assert cards[0]["ladder"] == read_card(model)["ladder"]


def test_every_form_samples_the_same_clip(made, tmp_path, capsys):
    source, model, out = made
    for name, folder in (("a", model), ("b", out / "transformer"), ("c", out / "original")):
        lines = sampled(capsys, f"model={folder}", f"pipeline={source}", f"out={tmp_path / name}.png")
        assert f" {STEPS} steps, guidance 1; " in lines[-2] and not any("warning" in line for line in lines)
    assert len({(tmp_path / f"{name}.png").read_bytes() for name in "abc"}) == 1


def test_a_pruned_network_without_a_card_is_doubted(made, tmp_path, capsys):
    source, model, _ = made
    folder = save_original(load_model(model), tmp_path / "bare")
    (folder / "fastlightgen.json").unlink()
    words = [f"model={folder}", f"pipeline={source}", f"out={tmp_path / 'a.png'}"]
    lines = sampled(capsys, *words, "steps=2")
    wanted = f"warning: {folder} has 3 of 4 blocks and no fastlightgen.json, so it is sampled as a teacher: 2 steps, "
    assert lines[0] == wanted + "guidance 5; copy the student's fastlightgen.json into it, or give steps= and guidance="
    lines = sampled(capsys, *words, "steps=2", "guidance=1")  # asked for in full
    assert not any("warning" in line for line in lines)
    lines = sampled(capsys, f"model={source}", f"out={tmp_path / 'a.png'}", "steps=1")  # the teacher itself
    assert not any("warning" in line for line in lines)


def test_presets_tell_how_deep_a_network_was(tmp_path):
    """Without a pipeline: the configuration of Wan T2V 1.3B, which has 30 blocks, in the original format."""
    config = {"_class_name": "WanModel", "dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 21}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert full_depth(tmp_path) == 30
    (tmp_path / "config.json").write_text(json.dumps(config | {"ffn_dim": 8961}))
    assert full_depth(tmp_path) == 21  # no preset has this width


@pytest.mark.parametrize(
    "kind, said",
    [
        ("wan_i2v", "WanModel: image_dim is 8; the original network's is 1280; use to=diffusers without original="),
        (
            "hunyuan_t2v",
            "HYVideoDiffusionTransformer: num_refiner_layers is 1, and the original format has 2 there and no key for "
            "it; use to=diffusers without original=",
        ),
    ],
)
def test_what_cannot_be_read_back_is_refused_before_anything_is_copied(
    pipeline, tmp_path, capsys, monkeypatch, kind, said
):
    source = pipeline(kind)
    model = make_student(source, tmp_path / "model")
    monkeypatch.setattr("fastlightgen.pipelines.export.copy_parts", lambda *_: pytest.fail("copied"))
    with pytest.raises(SystemExit) as stop:
        run(f"model={model}", f"pipeline={source}", f"out={tmp_path / 'out'}")
    assert stop.value.code == 2 and said in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_hunyuan_with_the_refiner_of_the_original_is_read_back(tmp_path):
    model = small_hunyuan(num_refiner_layers=2)
    other = load_model(save_original(model, tmp_path / "m", ladder=[1.0, 0.5]))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items())
    assert read_card(tmp_path / "m")["ladder"] == [1.0, 0.5]
    with pytest.raises(ValueError, match="num_refiner_layers is 1, and the original format has 2"):
        save_original(small_hunyuan(num_refiner_layers=1), tmp_path / "n")
    assert not (tmp_path / "n").exists()
    save_model(small_hunyuan(num_refiner_layers=1), tmp_path / "n")  # diffusers' format can

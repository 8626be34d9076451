"""Model folders: equal bits in and out, stock diffusers on both sides, strict reading, whole writing, public names."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastlightgen
from fastlightgen.models import files, weights
from fastlightgen.models.weights import WEIGHTS, build, load_model, read_card, save_model

CONFIG = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 20, "freq_dim": 32, "ffn_dim": 40}
CONFIG |= {"num_layers": 4}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(build(CONFIG, seed=1), tmp_path / "model", stage=2, shift=3.0)


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_round_trip_is_bit_equal(folder: Path):
    model = build(CONFIG, seed=1)
    assert same(load_model(folder), model)
    half = save_model(model, folder.with_name("half"), dtype=torch.bfloat16)
    assert same(load_model(half, dtype=torch.bfloat16), build(CONFIG, seed=1).bfloat16())
    assert load_file(half / WEIGHTS)["proj_out.bias"].dtype == torch.bfloat16
    assert next(model.parameters()).dtype == torch.float32  # saving changed nothing


def test_card(folder: Path):
    card = read_card(folder)
    assert {"family", "stage", "num_blocks", "kept_blocks", "ladder", "shift", "guidance", "source"} <= card.keys()
    assert (card["family"], card["stage"], card["num_blocks"], card["shift"]) == ("wan", 2, 4, 3.0)
    (folder / "fastlightgen.json").unlink()
    assert read_card(folder) == {}
    assert load_model(folder).num_blocks == 4  # a folder that another program wrote


def test_pruned_folder(folder: Path):
    model = load_model(folder)
    x_t, t, cond, _ = model.example_inputs()
    with torch.no_grad():
        want = model(x_t, t, cond, keep=[0, 3])
        save_model(model.prune([0, 3]), folder)
        assert torch.equal(load_model(folder)(x_t, t, cond), want)
    assert json.loads((folder / "config.json").read_text())["num_layers"] == 2


@pytest.mark.parametrize("keep", [None, [0, 2, 3]], ids=["whole", "pruned"])
@torch.no_grad()
def test_stock_from_pretrained_loads_it(folder: Path, keep):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("accelerate", reason="diffusers needs accelerate for from_pretrained of this class")
    model = load_model(folder)
    if keep:
        save_model(model.prune(keep), folder)
    load = diffusers.WanTransformer3DModel.from_pretrained
    other, log = load(folder, local_files_only=True, output_loading_info=True)
    assert not any(log.values())  # no key missing, unexpected or misshapen
    x_t, t, cond, _ = model.example_inputs(batch=2)
    want = other(x_t, 1000 * t, cond.text).sample
    torch.testing.assert_close(model(x_t, t, cond), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shards", ["10GB", "20KB"])
def test_loads_what_diffusers_saves(tmp_path: Path, shards: str):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    other = diffusers.WanTransformer3DModel(**CONFIG)
    other.save_pretrained(tmp_path, max_shard_size=shards)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or shards == "10GB"
    assert same(load_model(tmp_path), other)


def test_presets_draw_their_weights_from_the_seed():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = load_model("tiny", seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's random numbers go on as they were
    torch.manual_seed(6)
    assert same(first, load_model("tiny", seed=3)) and not same(first, load_model("tiny", seed=4))
    assert first.num_blocks == 12
    assert load_model("tiny", dtype=torch.bfloat16).proj_out.weight.dtype == torch.bfloat16


def truncate(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def change(folder: Path, **tensors) -> None:
    state = {k: v for k, v in (load_file(folder / WEIGHTS) | tensors).items() if v is not None}
    save_file(state, folder / WEIGHTS)


def index(folder: Path, record) -> None:
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(record))


DAMAGE = {
    "truncated": (truncate, "safetensors: damaged or truncated"),
    "empty file": (lambda f: (f / WEIGHTS).write_bytes(b""), "safetensors: damaged or truncated"),
    "no file": (lambda f: (f / WEIGHTS).unlink(), "safetensors: not found"),
    "missing key": (lambda f: change(f, **{"proj_out.bias": None}), r"missing \['proj_out.bias'\]"),
    "extra key": (lambda f: change(f, stray=torch.zeros(1)), r"unexpected \['stray'\]"),
    "shape": (lambda f: change(f, **{"proj_out.bias": torch.zeros(3)}), r"proj_out.bias is \(3,\), wanted \(64,\)"),
    "fewer blocks": (lambda f: edit(f, num_layers=3), r"unexpected \['blocks.3.attn1.norm_k.weight'"),
    "more blocks": (lambda f: edit(f, num_layers=5), r"missing \['blocks.4.attn1.norm_k.weight'"),
    "class": (lambda f: edit(f, _class_name="FluxTransformer2DModel"), "_class_name is 'FluxTransformer2DModel'"),
    "config": (lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
    "index outside": (lambda f: index(f, {"weight_map": {"a": "../a.safetensors"}}), "names files outside its folder"),
    "index absolute": (lambda f: index(f, {"weight_map": {"a": "/a.safetensors"}}), "names files outside its folder"),
    "index of nothing": (lambda f: index(f, {"metadata": {}}), "index.json: has no weight_map"),
    "index no record": (lambda f: index(f, []), "index.json: has no weight_map"),
    "shard lost": (lambda f: index(f, {"weight_map": {"a": "lost.safetensors"}}), "lost.safetensors: not found"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_folders(folder: Path, damage, message: str):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_a_failed_load_leaves_the_model_as_it_was(folder: Path):
    model = build(CONFIG, seed=2)
    change(folder, **{"proj_out.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="do not fit"):
        weights.load_weights(model, folder)
    assert same(model, build(CONFIG, seed=2))


def test_neither_folder_nor_preset(tmp_path: Path):
    with pytest.raises(ValueError, match=r"neither a folder with config.json nor a preset \(.*tiny"):
        load_model(tmp_path)


@pytest.mark.parametrize("when", ["during", "before"])
def test_an_interrupted_save_leaves_the_old_folder_whole(folder: Path, monkeypatch, when: str):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def dies(state, path, metadata):
        if when == "during":
            Path(path).write_bytes(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(files, "save_file", dies)
    with pytest.raises(OSError, match="No space left"):
        save_model(build(CONFIG, seed=2), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    monkeypatch.undo()
    save_model(build(CONFIG, seed=2), folder)  # and the next save succeeds, leaving nothing else behind
    assert same(load_model(folder), build(CONFIG, seed=2)) and list(folder.parent.iterdir()) == [folder]


def test_saving_replaces_model_folders_only(tmp_path: Path):
    (tmp_path / "thesis").mkdir()
    save_model(build(CONFIG, seed=2), tmp_path / "thesis")  # empty: fine
    for name in ("work", "work/file"):
        path = tmp_path / name
        path.write_text("text") if path.parent.name == "work" else path.mkdir()
    for path in (tmp_path / "work", tmp_path / "work/file"):
        with pytest.raises(ValueError, match="is not a model folder, so it is not replaced"):
            save_model(build(CONFIG, seed=2), path)
    assert (tmp_path / "work/file").read_text() == "text"


def test_public_names():
    names = ["load_model", "save_model", "Stream", "Cond"]
    names += [f"flow.{n}" for n in ("add_noise", "velocity", "x0_from_velocity", "shift_time", "ladder")]
    names += ["guidance.well_guided", "ops.dmd_gradient", "ops.norm_modulate"]
    for name in names:
        module, _, leaf = f"fastlightgen.{name}".rpartition(".")
        assert callable(getattr(importlib.import_module(module), leaf)), name
    model = fastlightgen.load_model("tiny")
    x_t, t, cond, null = model.example_inputs(batch=1, seed=0, size=(1, 2, 2))
    stream = fastlightgen.Stream(fastlightgen.Cond(text=cond.text, image=cond.image), keep=[0], grad=False)
    assert torch.equal(model.walk(x_t, t, [stream])[0], model(x_t, t, cond, keep=[0]))
    assert model.block_calls == 2
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = fastlightgen.nothing
